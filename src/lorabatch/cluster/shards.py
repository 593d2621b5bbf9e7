"""``lorabatch infer --shards N``: one prompt file, any number of processes, one result.

Every process runs the same command. The first writes ``plan.json``; each claims shards until none is free, and has
their prompts completed by a child process that loads the model once, so that a prompt that takes its process down
costs one process. A range whose process died is not tried as a whole again but in halves; a single prompt that did it
twice, alone, while we lived to see it, is put into quarantine, as an error record. What ends ourselves (a kill, a lost node) is held against no prompt: the
next owner of the shard takes over every finished completion and goes on. Whoever sees the last shard done merges:
every request of the input exactly once, in input order (``cluster/gather.py``). ``--retry_failed`` gives each finished
shard that has failed requests another item to claim, with those alone.

    plan.json   shards/0003/claim-000   shards/0003/output-000/24-32/completions.jsonl   shards/0003/DONE.json
    shards/0003/output-000/deaths.jsonl   shards/0003/retry-001/claim-000 ...
"""

from __future__ import annotations

import os
import time
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from lorabatch import hub
from lorabatch.cluster.child import RangeChild
from lorabatch.cluster.claims import Claim, abandoned_earlier, is_done, owners, work_through
from lorabatch.cluster.gather import NO_KEY, completion_files, failed_prompts, merge
from lorabatch.cluster.watch import watched
from lorabatch.config import InferConfig
from lorabatch.errors import InterruptedRun, LorabatchError, UsageError
from lorabatch.infer.adapters import files_sha256, merged_adapter
from lorabatch.infer.prompts import PromptFile
from lorabatch.infer.ranges import completions
from lorabatch.infer.requests import completion_record
from lorabatch.measure.environment import environment
from lorabatch.records import JsonlWriter, RunFolder, read_json, read_jsonl, replacing, utc_now, write_json, writing
from lorabatch.schema import sealed
from lorabatch.signals import StopSignals

# What may differ between the processes that share the work.
FREE = {"output_dir", "resume", "batch_size", "threads", "no_cuda", "prefill_tokens", "output_order", "claim_timeout_s", "leave_early"}
FREE |= {"shards", "retry_failed"}  # the bounds say what matters of the first
VOID = "deaths-are-void"  # beside deaths that no prompt is to blame for
PLAN_LOST = "restore the file, or choose another --output_dir; what is finished lies below shards/"
TRIES_ALONE = 2  # deaths of its process, while it ran alone, that a prompt may have
LEFT_BEHIND = 2  # owners that may be lost over a range before it is cut, lest one prompt take its neighbours' owners down for ever
QUARANTINE = "the process that computed this request died ({reason}); quarantined"


def run_sharded(config: InferConfig, command: list[str]) -> int:
    """Returns 0 when the merged result is complete, or, with ``--leave_early``, when nothing is left to claim.

    Raises UsageError for a folder with other work, InterruptedRun after a signal, and what the children
    report as the user's mistake.
    """
    if not config.output_dir or config.overwrite or config.rows or config.iters > 1:
        fix = "give --output_dir, the same for all processes; leave --overwrite, --rows and --iters out"
        raise UsageError("cannot work with these flags", where="--shards", fix=fix)
    folder = Path(config.output_dir)
    prompts = PromptFile(Path(config.prompts), replace(config, rows=None))
    plan = _plan(config, prompts, folder, command)
    spans = list(pairwise(plan["bounds"]))
    shards = [folder / "shards" / f"{i:04d}" for i in range(len(spans))]
    items = [_Item(shard, shard, (span,)) for shard, span in zip(shards, spans, strict=True)]
    items += list(_retries(items)) if config.retry_failed else []
    sizes = [end - first for first, end in pairwise(bisect_left(prompts.indices, bound) for bound in plan["bounds"])]
    with StopSignals() as signals, watched(shards, sizes), RangeChild(_child_settings(config), signals) as child:
        seen = _Seen()

        def work(index: int, claim: Claim) -> None:
            _Shard(claim, items[index], config, child, seen).complete()
            first, end = items[index].spans[0][0], items[index].spans[-1][1]
            print(f"shard {claim.folder.relative_to(folder / 'shards')} (prompts {first} to {end - 1}) done", flush=True)

        left = work_through(
            [item.folder for item in items],
            work,
            timeout_s=config.claim_timeout_s,
            wait=not config.leave_early,  # for what others hold, should they die
            stop_requested=lambda: bool(signals),
        )
        if left and signals.received:
            what = f"stopped by {signals.received.name}; {left} shards left"
            raise InterruptedRun(what, where=folder, fix="run the same command again")
    if left:
        print(
            f"nothing left to claim; {left} shards with {', '.join(owners([i.folder for i in items])) or 'nobody'}; the last process merges"
        )
        return 0
    merge(folder, config, prompts, shards)
    return 0


def _plan(config: InferConfig, prompts: PromptFile, folder: Path, command: list[str]) -> dict[str, Any]:
    """The plan on disk, made if there is none. UsageError if it is of other work."""
    num_prompts = 1 + prompts.indices[-1]
    path = folder / "plan.json"
    assert config.shards is not None
    shards = min(config.shards, num_prompts)
    config_kept = {k: v for k, v in config.to_dict().items() if k not in FREE}
    plan = {
        "schema_version": 1,
        "prompts_sha256": hub.file_sha256(Path(config.prompts)),
        "base_sha256": hub.model_sha256(hub.find_model(config.base_model).path),
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
    found = read_json(path, fix=PLAN_LOST)
    if found != plan:
        was, now = found | found.get("config", {}), plan | config_kept
        differing = sorted(k for k in now if k != "config" and was.get(k) != now[k])
        raise UsageError(f"holds other work ({', '.join(differing)} differ)", where=path, fix="choose another --output_dir")
    if not (folder / "run.json").exists():  # begun now, or by a process that was killed before it came to this
        flags: dict[str, Any] = {"config": config.to_dict(), "command": command, "environment": environment()}
        RunFolder.create(folder, kind="infer", folder_flag="--output_dir", resume=True, shared=True, **flags)
    return plan


def _adapter_folders(config: InferConfig, prompts: PromptFile) -> dict[str, Path]:
    merged = merged_adapter(config)
    return ({} if merged is None else {"--adapter_dir": merged}) | prompts.adapters.folders


def _child_settings(config: InferConfig) -> dict[str, Any]:
    free = {"shards": None, "rows": None, "output_dir": None, "leave_early": False, "resume": False, "retry_failed": False}
    return config.to_dict() | free | {"output_order": "finished", "output_format": "lorabatch"}


@dataclass(frozen=True)
class _Item:
    """What is claimed as one: the prompts of a shard, or those of a finished shard that are tried once more."""

    folder: Path  # of its claims
    shard: Path  # below which completions of its prompts may lie
    spans: tuple[tuple[int, int], ...]


def _retries(items: list[_Item]) -> Iterator[_Item]:
    """The failed requests of shards that are done. Processes that begin together share them; one that begins later tries again."""
    for item in items:
        failed = failed_prompts(item.shard) if is_done(item.shard) else []
        if failed:
            starts = [i for i in failed if i - 1 not in failed]
            ends = [i + 1 for i in failed if i + 1 not in failed]
            number = 1 + sum(map(is_done, item.shard.glob("retry-*")))
            yield _Item(item.shard / f"retry-{number:03d}", item.shard, tuple(zip(starts, ends, strict=True)))


@dataclass
class _Seen:
    """By one worker, over all its shards."""

    quarantined: int = 0


class _Shard:
    """The computation of one claimed item."""

    def __init__(self, claim: Claim, item: _Item, config: InferConfig, child: RangeChild, seen: _Seen) -> None:
        self._claim, self._item, self._config, self._child, self._seen = claim, item, config, child, seen
        self._files: list[Path] = []
        self._quarantined: list[str] = []
        self._work_keys: set[str] = set()
        self._started = time.perf_counter()

    def complete(self) -> None:
        claim = self._claim
        with writing(claim.outputs):
            claim.outputs.mkdir(exist_ok=True)
        for first, end in self._item.spans:
            self._range(first, end)
        files = [str(path.relative_to(claim.folder)) for path in self._files]
        facts = {"seconds": time.perf_counter() - self._started, "host": os.uname().nodename, "at": utc_now()}
        claim.finish({"files": files, "quarantined": self._quarantined, "work_keys": sorted(self._work_keys), **facts})

    def _range(self, first: int, end: int) -> None:
        """Completions of prompts first..end-1: by one process, or in halves if that died on them, now or under an earlier claim."""
        folder = self._claim.outputs / f"{first}-{end}"
        while True:
            deaths = self._deaths(first, end)
            if end - first == 1 and len(deaths) >= TRIES_ALONE:
                return self._quarantine(first, folder, deaths[-1])
            if end - first > 1 and (deaths or self._owners_lost(folder.name) >= LEFT_BEHIND):
                print(f"prompts {first} to {end - 1}: going on in halves ({deaths[-1] if deaths else 'owners lost'})", flush=True)
                middle = (first + end) // 2
                self._range(first, middle)
                return self._range(middle, end)
            if self._one_process(first, end, folder):
                return None

    def _deaths(self, first: int, end: int) -> list[str]:
        """Why processes died that had begun on exactly this range, under any claim whose owner lived to see it."""
        found = []
        for path in sorted(self._claim.folder.glob("output-*/deaths.jsonl")):
            if not path.with_name(VOID).exists():
                for death in read_jsonl(path, damaged=lambda line: None):  # costs another try
                    if (death["first"], death["end"]) == (first, end):
                        found.append(death["reason"])
                        self._work_keys.add(death["work_key"] or "")
        return found

    def _owners_lost(self, name: str) -> int:
        claim = self._claim
        begun = [g for g in range(claim.generation) if (claim.folder / f"output-{g:03d}" / name).exists()]
        return sum(abandoned_earlier(claim.folder, generation) for generation in begun)

    def _one_process(self, first: int, end: int, folder: Path) -> bool:
        """Whether every request of the range has its record; if not, the death of the process is on record."""
        ended = self._child.complete(folder, rows=f"{first}:{end}", earlier=[str(p) for p in completion_files(self._item.shard)])
        if ended.code == 0 or (ended.code == 65 and self._all_recorded(folder, first, end)):
            self._files.append(folder / "completions.jsonl")
            self._work_keys.add(self._child.work_key or "")
            return True
        ended.raise_mistake()
        with JsonlWriter(self._claim.outputs / "deaths.jsonl") as file:
            file.write({"first": first, "end": end, "reason": ended.reason, "work_key": self._child.work_key, "at": utc_now()})
        return False

    def _all_recorded(self, folder: Path, first: int, end: int) -> bool:
        return {r["index"] for r in completions(folder / "completions.jsonl")} == set(range(first, end))

    def _quarantine(self, index: int, folder: Path, reason: str) -> None:
        """An error record for every completion of this prompt; merging prefers those that are finished, whoever wrote them."""
        if self._seen.quarantined and not self._anything_completed():
            (self._claim.outputs / VOID).touch()
            fix = f"mend the cause ({folder / 'log.txt'}) and run the same command again, with --retry_failed"
            raise LorabatchError(f"every process dies, not only those of some prompts ({reason})", where=self._claim.folder, fix=fix)
        self._seen.quarantined += 1
        with writing(folder):
            folder.mkdir(exist_ok=True)
        config = replace(self._config, rows=f"{index}:{index + 1}")
        merged = merged_adapter(config)
        requests = list(PromptFile(Path(config.prompts), config))
        with replacing(folder / "quarantine.jsonl") as file:
            for request in requests:
                request.error = QUARANTINE.format(reason=reason)
                record = completion_record(request, None, key=NO_KEY, adapter=None if merged is None else str(merged))
                file.write(sealed(record) + b"\n")
        self._quarantined.append(requests[0].id)  # the prompt once, however many completions it owes
        self._files += [path for path in (folder / "completions.jsonl", folder / "quarantine.jsonl") if path.exists()]

    def _anything_completed(self) -> bool:
        return any(record["error"] is None for path in completion_files(self._item.shard.parent) for record in completions(path))
