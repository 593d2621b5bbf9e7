"""``python -m lorabatch.infer.ranges DESCRIPTOR``: ranges of a prompt file, one after another, with
the model loaded once.

Standard input brings JSON lines: first the settings of ``lorabatch infer``, then jobs: ``folder``
(a run folder to make or to continue in), ``rows``, ``earlier`` (files of completions that may hold
some of them). Two answers to each job, JSON lines on
DESCRIPTOR: ``begun`` with what completions depend on beside their requests, then ``code`` and
``line`` as a command ends with them. What is no answer of ours (a crash, a bug) ends the process.
Started by ``lorabatch.cluster.child``.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from lorabatch.config import InferConfig
from lorabatch.errors import LorabatchError
from lorabatch.infer.adapters import AdapterNames
from lorabatch.infer.prompts import PromptFile
from lorabatch.infer.run import run_inference
from lorabatch.model import hub
from lorabatch.records import read_jsonl, replacing
from lorabatch.schema import Record, sealed
from lorabatch.settings import typed_values

if TYPE_CHECKING:
    from lorabatch.infer.passes import Passes


def serve(descriptor: int) -> None:
    with (
        os.fdopen(os.dup(0), encoding="utf-8") as jobs,
        os.fdopen(descriptor, "w", encoding="utf-8") as answers,
    ):
        _redirect(os.devnull, os.O_RDONLY, 0)  # what we start must not read our jobs

        config = InferConfig(**typed_values(InferConfig, json.loads(jobs.readline()), "settings"))
        passes = None
        for line in jobs:
            job = json.loads(line)
            _redirect(Path(job["folder"]) / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 1, 2)
            try:
                passes = passes or _passes(config)
                _answer(answers, begun=passes.loaded.work_key)
                code, last = _complete(config, job, passes), ""
            except LorabatchError as error:
                code, last = error.exit_code, f"lorabatch infer: {error}"
                print(last, file=sys.stderr)
            _answer(answers, code=code, line=last)


def _answer(answers: TextIO, **record: object) -> None:
    answers.write(json.dumps(record) + "\n")
    answers.flush()


def _passes(config: InferConfig) -> Passes:
    hub.prepare_environment()
    from lorabatch.infer.load import load_for_inference
    from lorabatch.infer.passes import Passes

    loaded = load_for_inference(
        config, hub.find_model(config.base_model), AdapterNames.parse(config.adapters)
    )
    return Passes(loaded, config, lasting=True)


def _complete(config: InferConfig, job: Record, passes: Passes) -> int:
    folder = Path(job["folder"])
    config = replace(config, rows=job["rows"], output_dir=str(folder), resume=True)
    if job["earlier"]:
        _take_over(
            map(Path, job["earlier"]),
            folder,
            PromptFile(Path(config.prompts), config),
            passes.loaded.work_key,
        )
    return run_inference(
        config,
        ["lorabatch", "infer", "--rows", job["rows"], "--output_dir", str(folder), "--resume"],
        passes,
    )


def _take_over(files: Iterable[Path], folder: Path, prompts: PromptFile, work_key: str) -> None:
    """Begin with what is finished already: every completion that this process could have written
    itself."""
    keys = {(r.index, r.sample): (r.id, r.key(work_key)) for r in prompts}
    with replacing(folder / "completions.jsonl") as written:
        for record in (r for file in files for r in completions(file)):
            place = record["index"], record["sample"]
            if record["error"] is None and keys.get(place) == (record["id"], record["key"]):
                written.write(sealed(record) + b"\n")
                del keys[place]


def completions(path: Path) -> Iterator[Record]:
    """The records of a file that another process may be writing, or was when it was killed: what is
    no whole record is left out."""
    return read_jsonl(path, damaged=lambda line: None)


def _redirect(path: Path | str, flags: int, *descriptors: int) -> None:
    """Let these descriptors stand for this file."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    opened = os.open(path, flags, 0o644)
    for descriptor in descriptors:
        os.dup2(opened, descriptor)
    os.close(opened)


if __name__ == "__main__":
    serve(int(sys.argv[1]))
