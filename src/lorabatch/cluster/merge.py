"""The end of ``lorabatch infer --shards``: one file of completions and one of figures from what
many processes wrote.

What a shard's ``DONE.json`` names is taken first. For a request that has only an error there, every
completion below the shard's folder counts that a process of this work could have written: also of
claims that were taken over, and of retries.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from lorabatch.cluster.claims import DONE, is_done
from lorabatch.config import InferConfig
from lorabatch.errors import DataError
from lorabatch.infer.prompts import PromptFile
from lorabatch.infer.ranges import completions
from lorabatch.infer.requests import Request
from lorabatch.infer.sink import Tally, write_openai_file
from lorabatch.metrics.inference import Latencies, Times, infer_metrics
from lorabatch.metrics.schema import InferMetrics
from lorabatch.model import hub
from lorabatch.records import read_json, replacing, write_json
from lorabatch.runs import RunFolder
from lorabatch.schema import Fields, Record, sealed

NO_KEY = "0" * 16  # of a quarantined record
AGAIN = "remove the output folder and begin again"
SHARED = ("model", "device", "dtype", "threads", "backend", "gpu")  # of the run.json of each shard
ANEW = "remove it and run the same command again: what is finished there is kept"


def completion_files(folder: Path) -> list[Path]:
    """Of every claim on a shard and on its retries."""
    return sorted(folder.rglob("output-*/*/completions.jsonl"))


def failed_prompts(shard: Path) -> list[int]:
    """The places of prompts of a finished shard that have a request without a completion."""
    best = _recorded(shard, _done(shard))
    return sorted({index for (index, _), record in best.items() if _rank(record)})


def merge(folder: Path, config: InferConfig, prompts: PromptFile, shards: Sequence[Path]) -> Tally:
    """Write ``completions.jsonl`` and ``metrics.json`` from finished shards. DataError unless every
    request has exactly one record."""
    plan, record = read_json(folder / "plan.json"), read_json(folder / "run.json")
    if hub.file_sha256(Path(config.prompts)) != plan["prompts_sha256"]:
        raise DataError("changed during the run", where=config.prompts, fix=AGAIN)
    done = [_done(shard) for shard in shards]
    files = [base / file for parts in done for base, part in parts for file in part["files"]]
    pieces = list(dict.fromkeys(file.parent for file in files))
    runs = [read_json(piece / "run.json") for piece in pieces if (piece / "run.json").exists()]
    _check_one_model(folder, runs)
    totals = _Totals(len(prompts))
    with replacing(folder / "completions.jsonl") as file:
        for completion in _in_input_order(prompts, shards, done, plan["bounds"][1:]):
            totals.add(completion)
            file.write(sealed(completion) + b"\n")
    metrics = replace(totals.metrics(pieces, runs), shards=len(shards))
    write_json(folder / "metrics.json", metrics.to_dict())
    if config.output_format == "openai":
        write_openai_file(
            folder / "batch_output.jsonl",
            folder / "completions.jsonl",
            model=config.base_model,
            created=int(time.time()),
            adapters=[entry.partition("=")[0] for entry in config.adapters],
        )
    shared = {name: runs[0].get(name) if runs else None for name in SHARED}
    RunFolder(folder, record).finish("completed", **totals.tally.counts(), **shared)
    totals.say(folder / "completions.jsonl")
    return totals.tally


def _check_one_model(folder: Path, runs: Sequence[Fields]) -> None:
    models = {
        run["model"]["fingerprint"]
        for run in runs
        if run.get("model") and run["model"].get("fingerprint")
    }
    if len(models) > 1:
        raise DataError(
            f"shards were computed with {len(models)} different models", where=folder, fix=AGAIN
        )


def _in_input_order(
    prompts: PromptFile,
    shards: Sequence[Path],
    done: Sequence[Sequence[tuple[Path, Record]]],
    ends: Sequence[int],
) -> Iterator[Record]:
    """The best completion of every request. DataError if one has none, or a completion no
    request."""
    work_keys = {key for parts in done for _, part in parts for key in part.get("work_keys", ())}
    requests = iter(prompts)
    request = next(requests, None)
    for shard, parts, end in zip(shards, done, ends, strict=True):
        found = _recorded(shard, parts)
        others = _Others(shard, work_keys)
        while request is not None and request.index < end:
            completion = others.better(request, found.pop((request.index, request.sample), None))
            if completion is None:
                raise DataError(
                    f"no completion for {request.id!r}, although it is done",
                    where=shard / DONE,
                    fix=ANEW,
                )
            yield completion
            request = next(requests, None)
        if found:
            raise DataError(
                f"completion {next(iter(found.values()))['id']!r} is of no request of the input",
                where=shard,
                fix=AGAIN,
            )


def _done(shard: Path) -> list[tuple[Path, Record]]:
    """(the folder that its files are relative to, the record) of a finished shard and of its
    finished retries."""
    return [
        (base, read_json(base / DONE, "shard", fix=ANEW))
        for base in (shard, *sorted(filter(is_done, shard.glob("retry-*"))))
    ]


def _rank(record: Fields) -> int:
    """0: completed; 1: an error of the request; 2: quarantined."""
    return 0 if record["error"] is None else 2 if record["key"] == NO_KEY else 1


def _recorded(shard: Path, parts: Sequence[tuple[Path, Record]]) -> dict[tuple[int, int], Record]:
    """The best record of each request, by its place. A request that two claims computed counts
    once."""
    best: dict[tuple[int, int], Record] = {}
    for path in (base / file for base, part in parts for file in part["files"]):
        for record in completions(path):
            place = record["index"], record["sample"]
            if place not in best or _rank(record) < _rank(best[place]):
                best[place] = record
    return best


class _Others:
    """What lies below a shard's folder beside the files that count; read only when a request has
    need of it."""

    def __init__(self, shard: Path, work_keys: set[str]) -> None:
        self._shard, self._work_keys = shard, work_keys
        self._found: dict[tuple[int, int], list[Record]] | None = None

    def better(self, request: Request, record: Record | None) -> Record | None:
        """The record of a request, or a better one that a process of this work wrote. DataError if
        it is of another request."""
        if record is not None and record["id"] != request.id:
            what = f"completion {record['id']!r} stands where the input has {request.id!r}"
            raise DataError(what, where=self._shard, fix=f"did the prompt file change? {AGAIN}")
        if record is not None and not _rank(record):
            return record
        own = [] if record is None else [record]
        return min([*own, *self._valid(request)], key=_rank, default=None)

    def _valid(self, request: Request) -> list[Record]:
        """Of this request, under a key that one of the processes gave it."""
        if self._found is None:
            self._found = {}
            for other in (r for path in completion_files(self._shard) for r in completions(path)):
                self._found.setdefault((other["index"], other["sample"]), []).append(other)
        candidates = self._found.get((request.index, request.sample), ())
        keys = {request.key(work_key) for work_key in self._work_keys} if candidates else set()
        return [r for r in candidates if r["id"] == request.id and r["key"] in keys]


class _Totals:
    """Counts and latencies over all completions."""

    def __init__(self, num_requests: int) -> None:
        self.tally, self._latencies = Tally(bytearray(num_requests)), Latencies("d")
        self.quarantined: list[str] = []  # prompts: each once, however many completions it owes

    def add(self, record: Record) -> None:
        self.tally.add(record)
        if record["error"] is None:
            self._latencies.add(
                Times(*(record.get(name) for name in ("queue_ms", "ttft_ms", "e2el_ms"))),
                input_tokens=record["input_tokens"],
                output_tokens=record["output_tokens"],
            )
        elif record["key"] == NO_KEY and self.quarantined[-1:] != [record["id"]]:
            self.quarantined.append(record["id"])

    def say(self, path: Path) -> None:
        """What a person should know at the end. DataError if nothing was completed."""
        self.tally.warn()
        counts = (
            f"{self.tally.completed} completed, {self.tally.failed} failed of "
            f"{len(self.tally.done)}"
        )
        print(f"{counts}, every request exactly once: {path}")
        if self.quarantined:
            fix = "run the same command with --retry_failed to try once more"
            print(
                f"in quarantine, because their processes died: {', '.join(self.quarantined)}; {fix}"
            )
        if not self.tally.completed:
            raise DataError("every request failed", where=path, fix="see the 'error' of its lines")

    def metrics(self, pieces: Sequence[Path], runs: Sequence[Fields]) -> InferMetrics:
        files = [piece / "metrics.json" for piece in pieces]
        processes = [InferMetrics.from_dict(read_json(file)) for file in files if file.exists()]
        return replace(
            infer_metrics(
                [self._latencies],
                iterations=1,
                duration_s=_duration_s(runs),
                counts=self.tally.counts(),
            ),
            processes_s=sum(process.duration_s or 0.0 for process in processes),
            quarantined=self.quarantined,
        )


def _duration_s(runs: Sequence[Fields]) -> float:
    """From the first process's start to the last one's end, waits in the queue included."""
    ended = [run for run in runs if run.get("started_at") and run.get("finished_at")]
    if not ended:
        return 0.0
    start = min(datetime.fromisoformat(run["started_at"]) for run in ended)
    end = max(datetime.fromisoformat(run["finished_at"]) for run in ended)
    return (end - start).total_seconds()
