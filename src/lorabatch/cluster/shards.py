"""``lorabatch infer --shards N``: one prompt file, any number of processes, one result.

Every process runs the same command. The first writes ``plan.json``; each claims shards until none
is free, and has their prompts completed by a child process that loads the model once, so that a
prompt that takes its process down costs one process. A range whose process died is not tried as a
whole again but in halves; a single prompt that did it twice, alone, while we lived to see it, is
put into quarantine, as an error record. What ends ourselves (a kill, a lost node) is blamed on
no prompt: the next owner of the shard takes over every finished completion and continues. Whoever
sees the last shard done merges: every request of the input exactly once, in input order
(``cluster/merge.py``). ``--retry_failed`` gives each finished shard that has failed requests
another item to claim, with those alone.

    plan.json   shards/0003/claim-000   shards/0003/output-000/24-32/completions.jsonl
    shards/0003/DONE.json
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

from lorabatch.cluster.child import RangeChild
from lorabatch.cluster.claims import Claim, abandoned_earlier, is_done, owners, work_through
from lorabatch.cluster.merge import NO_KEY, completion_files, failed_prompts, merge
from lorabatch.cluster.watch import watched
from lorabatch.config import InferConfig
from lorabatch.errors import InterruptedRun, LorabatchError, UsageError
from lorabatch.infer.adapters import files_sha256, merged_adapter
from lorabatch.infer.one import run_prompt
from lorabatch.infer.prompts import PromptFile
from lorabatch.infer.ranges import completions
from lorabatch.infer.requests import completion_record
from lorabatch.infer.run import run_inference
from lorabatch.machine.environment import environment
from lorabatch.model import hub
from lorabatch.progress import counted
from lorabatch.records import (
    JsonlWriter,
    read_json,
    read_jsonl,
    replacing,
    utc_now,
    write_json,
    writing,
)
from lorabatch.runs import RunFolder
from lorabatch.schema import Record, sealed
from lorabatch.signals import StopSignals

# What may differ between the processes that share the work.
FREE = {
    "output_dir",
    "resume",
    "batch_size",
    "threads",
    "no_cuda",
    "prefill_tokens",
    "output_order",
    "claim_timeout_s",
    "leave_early",
}
FREE |= {"shards", "retry_failed", "fail_on_error", "prompt", "dry_run"}  # bounds tell of the first
VOID = "deaths-are-void"  # beside deaths that no prompt is to blame for
PLAN_LOST = "restore the file, or choose another --output_dir; what is finished is below shards/"
TRIES_ALONE = 2  # deaths of its process, while it ran alone, that a prompt may have
# owners that may be lost over a range before it is cut, lest one prompt take its neighbours' owners
# down for ever
LEFT_BEHIND = 2
QUARANTINE = "the process that computed this request died ({reason}); quarantined"


def run_infer(config: InferConfig, command: list[str]) -> int:
    """``lorabatch infer``: of one prompt, by this process alone, or with all others that share the
    work."""
    if config.prompt is not None:
        return run_prompt(config)
    if config.dry_run:
        from lorabatch.infer.forecast import run_dry

        return run_dry(config)
    if config.shards is None:
        return run_inference(config, command)
    return run_sharded(config, command)


def run_sharded(config: InferConfig, command: list[str]) -> int:
    """Returns 0 when the merged result is complete, or, with ``--leave_early``, when nothing is
    left to claim.

    Raises UsageError for a folder with other work, InterruptedRun after a signal, and what the
    children report as the user's mistake.
    """
    folder = _shared_folder(config)
    prompts = PromptFile(Path(config.prompts), replace(config, rows=None))
    plan = _plan(config, prompts, folder, command)
    spans = list(pairwise(plan["bounds"]))
    shards = [folder / "shards" / f"{i:04d}" for i in range(len(spans))]
    items = [_Item(shard, shard, (span,)) for shard, span in zip(shards, spans, strict=True)]
    items += list(_retries(items)) if config.retry_failed else []
    sizes = [
        end - first
        for first, end in pairwise(bisect_left(prompts.indices, bound) for bound in plan["bounds"])
    ]
    with (
        StopSignals() as signals,
        watched(shards, sizes),
        RangeChild(_child_settings(config), signals) as child,
    ):
        seen = _Seen()

        def work(index: int, claim: Claim) -> None:
            _Shard(claim, items[index], config, child, seen).complete()
            first, end = items[index].spans[0][0], items[index].spans[-1][1]
            shard = claim.folder.relative_to(folder / "shards")
            print(f"shard {shard} (prompts {first} to {end - 1}) done", flush=True)

        folders = [item.folder for item in items]
        left = work_through(
            folders,
            work,
            timeout_s=config.claim_timeout_s,
            wait=not config.leave_early,  # for what others hold, should they die
            stop_requested=lambda: bool(signals),
        )
        if left and signals.received:
            what = f"stopped by {signals.received.name}; {counted(left, 'shard')} left"
            raise InterruptedRun(what, where=folder, fix="run the same command again")
    if left:
        holders = ", ".join(owners(folders)) or "nobody"
        print(
            f"nothing left to claim; {counted(left, 'shard')} held by {holders}; the last process "
            "merges"
        )
        return 0
    tally = merge(folder, config, prompts, shards)
    if config.fail_on_error:
        tally.refuse_failures(folder / "completions.jsonl")
    return 0


def _shared_folder(config: InferConfig) -> Path:
    if not config.output_dir or config.overwrite or config.rows or config.iters > 1:
        raise UsageError(
            "cannot work with these flags",
            where="--shards",
            fix="give --output_dir, the same for all processes; leave out --overwrite, --rows and "
            "--iters",
        )
    return Path(config.output_dir)


def _plan(config: InferConfig, prompts: PromptFile, folder: Path, command: list[str]) -> Record:
    """The plan on disk, made if there is none. UsageError if it is of other work."""
    path, plan = folder / "plan.json", _planned(config, prompts)
    if not path.exists():
        # The plan comes before run.json: a run folder without one, looked at in this order, is no
        # work of ours.
        if (folder / "run.json").exists() and not path.exists():
            raise UsageError(
                "contains another run", where=folder, fix="choose another --output_dir"
            )
        with writing(folder, fix="choose another --output_dir"):
            folder.mkdir(parents=True, exist_ok=True)
        write_json(path, plan)  # processes that start at once write the same
    found = read_json(path, fix=PLAN_LOST)
    if found != plan:
        was, now = found | found.get("config", {}), plan | plan["config"]
        differing = sorted(k for k in now if k != "config" and was.get(k) != now[k])
        raise UsageError(
            f"was created with different settings ({', '.join(differing)} differ)",
            where=path,
            fix="choose another --output_dir",
        )
    # begun now, or by a process that was killed before it came to this
    if not (folder / "run.json").exists():
        RunFolder.create(
            folder,
            kind="infer",
            config=config.to_dict(),
            command=command,
            environment=environment(),
            folder_flag="--output_dir",
            resume=True,
            shared=True,
        )
    return plan


def _planned(config: InferConfig, prompts: PromptFile) -> Record:
    assert config.shards is not None
    num_prompts = 1 + prompts.indices[-1]
    shards = min(config.shards, num_prompts)
    adapters = _adapter_folders(config, prompts)
    return {
        "schema_version": 1,
        "prompts_sha256": hub.file_sha256(Path(config.prompts)),
        "base_sha256": hub.model_sha256(hub.find_model(config.base_model).path),
        "adapters_sha256": {name: files_sha256(folder) for name, folder in adapters.items()},
        "bounds": [i * num_prompts // shards for i in range(shards + 1)],
        "config": {k: v for k, v in config.to_dict().items() if k not in FREE},
    }


def _adapter_folders(config: InferConfig, prompts: PromptFile) -> dict[str, Path]:
    merged = merged_adapter(config)
    return ({} if merged is None else {"--adapter_dir": merged}) | prompts.adapters.folders


def _child_settings(config: InferConfig) -> Record:
    free = {
        "shards": None,
        "rows": None,
        "output_dir": None,
        "leave_early": False,
        "resume": False,
        "retry_failed": False,
        "fail_on_error": False,  # of the whole, not of a range
    }
    return config.to_dict() | free | {"output_order": "finished", "output_format": "lorabatch"}


@dataclass(frozen=True)
class _Item:
    """What is claimed as one: the prompts of a shard, or those of a finished shard that are tried
    once more."""

    folder: Path  # of its claims
    shard: Path  # below which completions of its prompts may lie
    spans: tuple[tuple[int, int], ...]


def _retries(items: list[_Item]) -> Iterator[_Item]:
    """The failed requests of shards that are done. Processes that begin together share them; one
    that begins later tries again."""
    for item in items:
        failed = failed_prompts(item.shard) if is_done(item.shard) else []
        if failed:
            starts = [i for i in failed if i - 1 not in failed]
            ends = [i + 1 for i in failed if i + 1 not in failed]
            number = 1 + sum(map(is_done, item.shard.glob("retry-*")))
            yield _Item(
                item.shard / f"retry-{number:03d}",
                item.shard,
                tuple(zip(starts, ends, strict=True)),
            )


@dataclass
class _Seen:
    """By one worker, over all its shards."""

    quarantined: int = 0


class _Shard:
    """The computation of one claimed item."""

    def __init__(
        self, claim: Claim, item: _Item, config: InferConfig, child: RangeChild, seen: _Seen
    ) -> None:
        self._claim, self._item, self._config, self._child, self._seen = (
            claim,
            item,
            config,
            child,
            seen,
        )
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
        facts = {
            "seconds": time.perf_counter() - self._started,
            "host": os.uname().nodename,
            "at": utc_now(),
        }
        claim.finish(
            {
                "files": files,
                "quarantined": self._quarantined,
                "work_keys": sorted(self._work_keys),
                **facts,
            }
        )

    def _range(self, first: int, end: int) -> None:
        """Completions of prompts first..end-1: by one process, or in halves if that died on them,
        now or under an earlier claim."""
        folder = self._claim.outputs / f"{first}-{end}"
        while True:
            deaths = self._deaths(first, end)
            if end - first == 1 and len(deaths) >= TRIES_ALONE:
                return self._quarantine(first, folder, deaths[-1])
            if end - first > 1 and (deaths or self._owners_lost(folder.name) >= LEFT_BEHIND):
                print(
                    f"prompts {first} to {end - 1}: continuing in halves "
                    f"({deaths[-1] if deaths else 'owners lost'})",
                    flush=True,
                )
                middle = (first + end) // 2
                self._range(first, middle)
                return self._range(middle, end)
            if self._one_process(first, end, folder):
                return None

    def _deaths(self, first: int, end: int) -> list[str]:
        """Why processes died that had begun on exactly this range, under any claim whose owner
        lived to see it."""
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
        begun = [
            g for g in range(claim.generation) if (claim.folder / f"output-{g:03d}" / name).exists()
        ]
        return sum(abandoned_earlier(claim.folder, generation) for generation in begun)

    def _one_process(self, first: int, end: int, folder: Path) -> bool:
        """Whether every request of the range has its record; if not, the death of the process is on
        record."""
        ended = self._child.complete(
            folder,
            rows=f"{first}:{end}",
            earlier=[str(p) for p in completion_files(self._item.shard)],
        )
        if ended.code == 0 or (ended.code == 65 and self._all_recorded(folder, first, end)):
            self._files.append(folder / "completions.jsonl")
            self._work_keys.add(self._child.work_key or "")
            return True
        ended.raise_mistake()
        with JsonlWriter(self._claim.outputs / "deaths.jsonl") as file:
            file.write(
                {
                    "first": first,
                    "end": end,
                    "reason": ended.reason,
                    "work_key": self._child.work_key,
                    "at": utc_now(),
                }
            )
        return False

    def _all_recorded(self, folder: Path, first: int, end: int) -> bool:
        return {r["index"] for r in completions(folder / "completions.jsonl")} == set(
            range(first, end)
        )

    def _quarantine(self, index: int, folder: Path, reason: str) -> None:
        """An error record for every completion of this prompt; merging prefers those that are
        finished, whoever wrote them."""
        if self._seen.quarantined and not self._anything_completed():
            (self._claim.outputs / VOID).touch()
            fix = (
                f"fix the cause ({folder / 'log.txt'}) and run the same command again, with "
                "--retry_failed"
            )
            raise LorabatchError(
                f"every process dies, not only those of some prompts ({reason})",
                where=self._claim.folder,
                fix=fix,
            )
        self._seen.quarantined += 1
        with writing(folder):
            folder.mkdir(exist_ok=True)
        config = replace(self._config, rows=f"{index}:{index + 1}")
        merged = merged_adapter(config)
        requests = list(PromptFile(Path(config.prompts), config))
        with replacing(folder / "quarantine.jsonl") as file:
            for request in requests:
                request.error = QUARANTINE.format(reason=reason)
                record = completion_record(
                    request, None, key=NO_KEY, adapter=None if merged is None else str(merged)
                )
                file.write(sealed(record) + b"\n")
        # the prompt once, however many completions it owes
        self._quarantined.append(requests[0].id)
        self._files += [
            path
            for path in (folder / "completions.jsonl", folder / "quarantine.jsonl")
            if path.exists()
        ]

    def _anything_completed(self) -> bool:
        return any(
            record["error"] is None
            for path in completion_files(self._item.shard.parent)
            for record in completions(path)
        )
