"""``completions.jsonl``: what earlier runs finished, and the order of what this one wrote.

Ids, keys and places are held as 64-bit numbers, never as records, so that 100,000 completions take a few megabytes.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Container, Iterator
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import numpy as np

from lorabatch.errors import UsageError
from lorabatch.infer import openai_batch
from lorabatch.infer.prompts import PromptFile, id_digest
from lorabatch.records import dumps, read_jsonl, replacing


def finished_earlier(path: Path, prompts: PromptFile, work_key: str) -> tuple[bytearray, int]:
    """(1 at each position that is finished, how many of those failed). UsageError if ``path`` holds other work's completions."""
    done, failed = bytearray(len(prompts)), 0
    ids, keys = array("Q"), array("Q")
    for record in read_jsonl(path):
        ids.append(id_digest(record["id"], record["sample"]))
        keys.append(int(record["key"], 16))
        failed += record["error"] is not None
    if not ids:
        return done, failed
    digests = prompts.id_digests
    expected = np.fromiter((int(r.key(work_key), 16) for r in prompts), np.uint64, len(prompts))
    order = np.argsort(digests)
    places = np.searchsorted(digests[order], np.asarray(ids)).clip(max=len(digests) - 1)
    positions = order[places]
    wrong = np.flatnonzero((digests[positions] != ids) | (expected[positions] != keys))
    if len(wrong):
        record = next(islice(read_jsonl(path), int(wrong[0]), None))
        raise UsageError(
            f"completion '{record['id']}' was made with another prompt, parameters, model or adapter",
            where=path,
            fix="choose another --output_dir, or --overwrite",
        )
    np.frombuffer(done, dtype=np.uint8)[positions] = 1
    return done, failed


def drop_failed(path: Path) -> None:
    """Leave only the completions without an error, so that the others are tried again."""
    with replacing(path) as file:
        file.writelines(dumps(record).encode() + b"\n" for record in read_jsonl(path) if record["error"] is None)


def lines_in_input_order(path: Path) -> Iterator[bytes]:
    """The lines sorted by their place in the input; 16 bytes a line are held, the texts stay on disk."""
    places, starts = array("q"), array("q", [0])
    with path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                record = json.loads(line)
                places.append(record["index"] << 20 | record["sample"])
                starts.append(starts[-1] + len(line))
        for number in np.argsort(places, kind="stable").tolist():
            file.seek(starts[number])
            yield file.readline()


def write_openai_file(path: Path, completions: Path, *, model: str, created: int, adapters: Container[str] = ()) -> None:
    """One line of OpenAI's batch output per prompt, in input order."""
    records: Iterator[dict[str, Any]] = map(json.loads, lines_in_input_order(completions))
    with replacing(path) as file:
        for _, samples in groupby(records, key=lambda r: r["index"]):
            file.write(dumps(openai_batch.output_line(list(samples), model=model, created=created, adapters=adapters)).encode() + b"\n")
