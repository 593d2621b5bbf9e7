"""``lorabatch infer --shards N``, ``--processes N``: one prompt file, any number of processes, one result.

Every process runs the same command (``--processes`` does the work of N of them, each on its own cores). The
first writes ``plan.json``; each claims shards until none is free, and computes a shard with ``lorabatch infer
--rows FIRST:END`` in a child process, so that a prompt that takes its process down costs one process. A range
whose process died is not tried as a whole again but in halves; a single prompt that does it is put into
quarantine, as an error record. Whoever sees the last shard done merges: every request of the input exactly
once, in input order.

    plan.json   shards/0003/claim-000   shards/0003/output-000/24-32/completions.jsonl   shards/0003/DONE.json
"""

from __future__ import annotations

import os
import sys
import time
from bisect import bisect_left
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

from lorabatch import hub
from lorabatch.cluster.child import run_child
from lorabatch.cluster.claims import DONE, Claim, died, is_done, owners, work_through
from lorabatch.cluster.crew import share_cores, watched
from lorabatch.config import InferConfig
from lorabatch.errors import DataError, InterruptedRun, LorabatchError, UsageError
from lorabatch.infer.adapters import files_sha256, merged_adapter
from lorabatch.infer.prompts import PromptFile
from lorabatch.infer.requests import completion_record
from lorabatch.infer.run import default_output_dir
from lorabatch.infer.sink import write_openai_file
from lorabatch.measure.environment import environment, usable_cores
from lorabatch.measure.statistics import rate, summary
from lorabatch.records import RunFolder, dumps, read_json, read_jsonl, replacing, utc_now, write_json, writing
from lorabatch.signals import StopSignals

# What may differ between the processes that share the work.
FREE = {"output_dir", "resume", "batch_size", "threads", "no_cuda", "prefill_tokens", "output_order", "claim_timeout_s", "leave_early"}
FREE |= {"shards", "processes"}  # the bounds say what matters of them
NO_KEY = "0" * 16  # of a quarantined record: a later process may try again
QUARANTINE = "the process that computed this request died ({reason}); quarantined"


def run_sharded(config: InferConfig, command: list[str]) -> int:
    """Returns 0 when the merged result is complete, or, with ``--leave_early``, when nothing is left to claim.

    Raises UsageError for a folder with other work, InterruptedRun after a signal, and what the children
    report as the user's mistake.
    """
    if config.output_dir is None and config.shards is None:
        config = replace(config, output_dir=str(default_output_dir(config)))
    if not config.output_dir or config.overwrite or config.rows or config.iters > 1:
        fix = "give --output_dir, the same for all processes; leave --overwrite, --rows and --iters out"
        raise UsageError("cannot work with these flags", where="--shards, --processes", fix=fix)
    crew: list[list[int] | None] = list(share_cores(os.sched_getaffinity(0), config.processes)) if config.processes != 1 else [None]
    folder = Path(config.output_dir)
    prompts = PromptFile(Path(config.prompts), replace(config, rows=None))
    plan = _plan(config, prompts, folder, command, default_shards=len(crew))
    spans = list(pairwise(plan["bounds"]))
    shards = [folder / "shards" / f"{i:04d}" for i in range(len(spans))]
    sizes = [end - first for first, end in pairwise(bisect_left(prompts.indices, bound) for bound in plan["bounds"])]
    with StopSignals() as signals, watched(shards, sizes):

        def worker(place: int, cores: list[int] | None, *, wait: bool) -> int:
            """Shards until none is free; how many are not done. One of as many workers as there are parts of the cores."""
            mine = config if cores is None else replace(config, threads=config.threads or max(1, usable_cores() // len(crew)))

            def work(index: int, claim: Claim) -> None:
                first, end = spans[index]
                _Shard(claim, mine, signals, cores, place).complete(first, end)
                print(f"shard {index} (prompts {first} to {end - 1}) done; {sum(map(is_done, shards))} of {len(shards)}", flush=True)

            return work_through(shards, work, timeout_s=config.claim_timeout_s, wait=wait, stop_requested=lambda: bool(signals))

        with ThreadPoolExecutor(len(crew)) as pool:
            for ended in [pool.submit(worker, place, cores, wait=False) for place, cores in enumerate(crew)]:
                ended.result()
        left = worker(0, None, wait=not config.leave_early)  # what others hold, should they die
        if left and signals.received:
            what = f"stopped by {signals.received.name}; {left} shards left"
            raise InterruptedRun(what, where=folder, fix="run the same command again")
    if left:
        print(f"nothing left to claim; {left} shards with {', '.join(owners(shards)) or 'nobody'}; the last process merges")
        return 0
    merge(folder, prompts, shards)
    return 0


def _plan(config: InferConfig, prompts: PromptFile, folder: Path, command: list[str], *, default_shards: int) -> dict[str, Any]:
    """The plan on disk, made if there is none. UsageError if it is of other work."""
    num_prompts = 1 + prompts.indices[-1]
    path = folder / "plan.json"
    if config.shards is None and path.exists():
        default_shards = len(read_json(path)["bounds"]) - 1
    shards = min(config.shards or default_shards, num_prompts)
    config_kept = {k: v for k, v in config.to_dict().items() if k not in FREE}
    plan = {
        "schema_version": 1,
        "prompts_sha256": hub.file_sha256(Path(config.prompts)),
        "adapters_sha256": {name: files_sha256(folder) for name, folder in _adapter_folders(config, prompts).items()},
        "bounds": [i * num_prompts // shards for i in range(shards + 1)],
        "config": config_kept,
    }
    if not path.exists():
        # The plan comes before run.json: a run folder without one, looked at in this order, is no work of ours.
        if (folder / "run.json").exists() and not path.exists():
            raise UsageError("holds another run", where=folder, fix="choose another --output_dir")
        with writing(folder, fix="choose another --output_dir"):
            folder.mkdir(parents=True, exist_ok=True)
        write_json(path, plan)  # processes that start at once write the same
        flags: dict[str, Any] = {"config": config.to_dict(), "command": command, "environment": environment()}
        RunFolder.create(folder, kind="infer", folder_flag="--output_dir", resume=True, shared=True, **flags)
    found = read_json(path)
    if found != plan:
        was, now = found | found.get("config", {}), plan | config_kept
        differing = sorted(k for k in now if k != "config" and was.get(k) != now[k])
        raise UsageError(f"holds other work ({', '.join(differing)} differ)", where=path, fix="choose another --output_dir")
    return plan


def _adapter_folders(config: InferConfig, prompts: PromptFile) -> dict[str, Path]:
    merged = merged_adapter(config)
    return ({} if merged is None else {"--adapter_dir": merged}) | prompts.adapters.folders


class _Shard:
    """The computation of one claimed shard."""

    def __init__(self, claim: Claim, config: InferConfig, signals: StopSignals, cores: Sequence[int] | None, place: int) -> None:
        self._claim, self._config, self._signals = claim, config, signals
        self._cores, self._place = cores, place
        self._files: list[Path] = []
        self._quarantined: list[str] = []
        self._started = time.perf_counter()

    def complete(self, first: int, end: int) -> None:
        claim = self._claim
        claim.outputs.mkdir(exist_ok=True)
        settings = replace(
            self._config,
            shards=None,
            processes=1,
            rows=None,
            output_dir=None,
            leave_early=False,
            resume=False,
            output_order="finished",
            output_format="lorabatch",
        )
        self._settings = claim.outputs / "settings.toml"
        self._settings.write_text(settings.to_toml(), encoding="utf-8")
        self._range(first, end)
        files = [str(path.relative_to(claim.folder)) for path in self._files]
        seconds = time.perf_counter() - self._started
        claim.finish({"files": files, "quarantined": self._quarantined, "seconds": seconds, "host": os.uname().nodename, "at": utc_now()})

    def _range(self, first: int, end: int) -> None:
        """Completions of prompts first..end-1: by one process, or in halves if that died on them, now or under an earlier claim."""
        folder = self._claim.outputs / f"{first}-{end}"
        reason = "its claim was abandoned" if self._died_before(folder.name) else self._one_process(first, end, folder)
        if reason is None:
            self._files.append(folder / "completions.jsonl")
        elif end - first > 1:
            print(f"the process of prompts {first} to {end - 1} died ({reason}): going on in halves", flush=True)
            middle = (first + end) // 2
            self._range(first, middle)
            self._range(middle, end)
        else:
            self._quarantine(first, folder, reason)

    def _died_before(self, name: str) -> bool:
        claim = self._claim
        return any((claim.folder / f"output-{g:03d}" / name).exists() and died(claim.folder, g) for g in range(claim.generation))

    def _one_process(self, first: int, end: int, folder: Path) -> str | None:
        """None when every request of the range has its record, else why the process died."""
        folder.mkdir(exist_ok=True)
        with (folder / "completions.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(dumps(record) + "\n" for record in self._finished_earlier(first, end))
        words: list[str | Path] = ["infer", "--config", self._settings, "--rows", f"{first}:{end}", "--output_dir", folder, "--resume"]
        ended = run_child(words, folder / "log.txt", self._signals, cores=self._cores, place=self._place)
        if ended.code == 0 or (ended.code == 65 and self._all_recorded(folder, first, end)):
            return None
        ended.raise_mistake()
        return ended.reason

    def _finished_earlier(self, first: int, end: int) -> list[dict[str, Any]]:
        """Records of this range from every process that worked on this shard before."""
        found = {}
        for path in sorted(self._claim.folder.glob("output-*/*/completions.jsonl")):
            for record in read_jsonl(path):
                if first <= record["index"] < end and record["key"] != NO_KEY:
                    found[record["index"], record["sample"]] = record
        return list(found.values())

    def _all_recorded(self, folder: Path, first: int, end: int) -> bool:
        return {r["index"] for r in read_jsonl(folder / "completions.jsonl")} == set(range(first, end))

    def _quarantine(self, index: int, folder: Path, reason: str) -> None:
        """An error record for every completion that this prompt still owes."""
        folder.mkdir(exist_ok=True)
        path = folder / "completions.jsonl"
        earlier = self._finished_earlier(index, index + 1)
        config = replace(self._config, rows=f"{index}:{index + 1}")
        merged = merged_adapter(config)
        owed = [r for r in PromptFile(Path(config.prompts), config) if r.sample not in {e["sample"] for e in earlier}]
        with path.open("w", encoding="utf-8") as file:
            file.writelines(dumps(record) + "\n" for record in earlier)
            for request in owed:
                request.error = QUARANTINE.format(reason=reason)
                record = completion_record(request, None, key=NO_KEY, adapter=None if merged is None else str(merged))
                file.write(dumps(record) + "\n")
        self._quarantined += [request.id for request in owed[:1]]  # of the prompt: once, however many it owes
        self._files.append(path)
        if len(self._quarantined) > 1 and not self._finished_earlier(0, sys.maxsize):
            fix = f"mend the cause ({folder / 'log.txt'}) and run the same command again"
            raise LorabatchError(f"every process dies, not only those of some prompts ({reason})", where=self._claim.folder, fix=fix)


def merge(folder: Path, prompts: PromptFile, shards: list[Path]) -> None:
    """Write ``completions.jsonl`` and ``metrics.json`` from finished shards. DataError unless every request has exactly one record."""
    done = [read_json(shard / DONE) for shard in shards]
    requests = iter(prompts)
    totals = _Totals()
    with replacing(folder / "completions.jsonl") as file:
        for shard, record in zip(shards, done, strict=True):
            for completion in _in_order(shard, record["files"]):
                request = next(requests, None)
                place = tuple(completion[k] for k in ("index", "sample", "id"))
                if request is None or (request.index, request.sample, request.id) != place:
                    what = f"completion {completion['id']!r} stands where the input has {request.id if request else 'its end'!r}"
                    raise DataError(what, where=shard, fix="did the prompt file change? remove the output folder and begin again")
                totals.add(completion)
                file.write(dumps(completion).encode() + b"\n")
    missing = next(requests, None)
    if missing is not None:
        raise DataError(f"no completion for {missing.id!r}", where=folder, fix="remove the output folder and begin again")
    quarantined = [id for record in done for id in record["quarantined"]]
    pieces = [shard / Path(file).parent for shard, record in zip(shards, done, strict=True) for file in record["files"]]
    figures = totals.metrics(pieces) | {"shards": len(shards), "quarantined": quarantined}
    write_json(folder / "metrics.json", figures)
    record = read_json(folder / "run.json")
    if record["config"]["output_format"] == "openai":
        name, path = record["config"]["base_model"], folder / "batch_output.jsonl"
        adapters = [entry.partition("=")[0] for entry in record["config"]["adapters"]]
        write_openai_file(path, folder / "completions.jsonl", model=name, created=int(time.time()), adapters=adapters)
    first = read_json(pieces[0] / "run.json") if (pieces[0] / "run.json").exists() else {}
    shared = {k: first.get(k) for k in ("model", "device", "dtype", "threads", "backend", "gpu")}
    RunFolder(folder, record).finish("completed", failed=totals.failed, **shared)
    counts = f"{totals.completed} completed, {totals.failed} failed of {len(prompts)}"
    print(f"{counts}, every request exactly once: {folder / 'completions.jsonl'}")
    if not totals.completed:
        raise DataError("every request failed", where=folder / "completions.jsonl", fix="see the 'error' of its lines")
    if quarantined:
        print(f"in quarantine, because their processes died: {', '.join(quarantined)}")


def _in_order(shard: Path, files: list[str]) -> list[dict[str, Any]]:
    """A shard's records by place in the input. A request that two claims computed counts once."""
    found = {(r["index"], r["sample"]): r for file in files for r in read_jsonl(shard / file)}
    return [found[place] for place in sorted(found)]


class _Totals:
    """Counts and latencies over all completions."""

    def __init__(self) -> None:
        self.completed = self.failed = self._tokens_in = self._tokens_out = 0
        self._times: dict[str, list[float]] = {"queue_ms": [], "ttft_ms": [], "tpot_ms": [], "e2el_ms": []}

    def add(self, record: dict[str, Any]) -> None:
        if record["error"] is not None:
            self.failed += 1
            return
        self.completed += 1
        tokens = record["output_tokens"]
        self._tokens_in += record["input_tokens"]
        self._tokens_out += tokens
        for name in ("queue_ms", "ttft_ms", "e2el_ms"):
            self._times[name].append(record[name])
        if tokens > 1:
            self._times["tpot_ms"].append((record["e2el_ms"] - record["ttft_ms"]) / (tokens - 1))

    def metrics(self, pieces: list[Path]) -> dict[str, Any]:
        """``duration_s`` is wall time from the first process's start to the last one's end, waits in the queue included."""
        runs = [read_json(piece / "run.json") for piece in pieces if (piece / "run.json").exists()]
        spans = [(datetime.fromisoformat(r["started_at"]), datetime.fromisoformat(r["finished_at"])) for r in runs if r["finished_at"]]
        wall_s = (max(end for _, end in spans) - min(start for start, _ in spans)).total_seconds() if spans else 0.0
        busy = [read_json(piece / "metrics.json")["duration_s"] for piece in pieces if (piece / "metrics.json").exists()]
        return {
            "schema_version": 1,
            "kind": "infer",
            "iterations": 1,
            "duration_s": wall_s,
            "processes_s": sum(busy),
            "completed": self.completed,
            "failed": self.failed,
            "total_input_tokens": self._tokens_in,
            "total_output_tokens": self._tokens_out,
            "request_throughput": rate(self.completed, wall_s),
            "output_throughput": rate(self._tokens_out, wall_s),
            "total_token_throughput": rate(self._tokens_in + self._tokens_out, wall_s),
            "tokens_per_s": rate(self._tokens_out, wall_s),
            **{name: value for what, values in self._times.items() for name, value in summary(what, values).items()},
        }
