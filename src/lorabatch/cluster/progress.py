"""How far a run is, from its folder alone: what it wrote, and whether a process still has it."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from statistics import median

from lorabatch.progress import clock
from lorabatch.records import read_json, read_jsonl
from lorabatch.schema import Fields, Record

RECENT = 20  # steps that say how fast it goes now


def run_folders(folder: Path) -> list[Path]:
    """The run of this folder, or those of ``train --jobs`` below it."""
    if (folder / "run.json").exists():
        return [folder]
    return sorted(path.parent for path in folder.glob("*/run.json"))


def run_line(folder: Path) -> str:
    """One line: kind, state, position, figures, time left. DataError for a damaged record."""
    record = read_json(folder / "run.json")
    status = str(record["status"])
    if status == "running" and not _has_owner(folder):
        status = "no longer running, and did not end by itself: resume it"
    running = status == "running"
    parts = _training(folder, record, running) if record["kind"] == "train" else []
    parts = parts or _inference(folder, record, running)
    if record.get("error") and not running:
        parts.append(str(record["error"]))
    return "; ".join([f"{record['kind']} {status}", ", ".join(parts)] if parts else [status])


def _has_owner(folder: Path) -> bool:
    """Whether a process holds the folder's lock. True where that cannot be told: on a file system
    without locks, and of a folder that cannot be written."""
    try:
        descriptor = os.open(folder / ".lock", os.O_RDWR)
    except OSError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False


def _events(folder: Path) -> Iterator[Record]:
    """What is whole of the file: its last line may be half written."""
    path = folder / "events.jsonl"
    return read_jsonl(path, damaged=lambda line: None) if path.exists() else iter(())


def _training(folder: Path, record: Fields, running: bool) -> list[str]:
    events = list(_events(folder))
    steps = [e for e in events if e["event"] == "step"]
    if not steps:
        return ["no step yet"]
    last, planned = steps[-1], record.get("planned_steps")
    parts = [f"step {last['step']}" + (f" of {planned}" if planned else "")]
    parts.append(f"loss {last['loss']:.4f}")
    evaluated = [e["eval_loss"] for e in events if e["event"] == "eval" and e["eval_loss"]]
    if evaluated:
        parts.append(f"validation {evaluated[0]:.4f} -> {min(evaluated):.4f}")
    left = planned - last["step"] if running and planned else None
    return parts + _pace(steps[-RECENT:], left)


def _pace(recent: list[Record], left: int | None) -> list[str]:
    """left: steps, of a run that goes on."""
    rates = [e["tokens_per_s"] for e in recent]
    parts = [f"{median(rates):,.0f} tokens/s"]
    if left is not None and all(rates):
        step_s = median([(e.get("tokens") or 0) / e["tokens_per_s"] for e in recent])
        parts.append(f"about {clock(left * step_s)} left")
    return parts


def _inference(folder: Path, record: Fields, running: bool) -> list[str]:
    path, work = folder / "completions.jsonl", record.get("requests") or {}
    records = read_jsonl(path, damaged=lambda line: None) if path.exists() else iter(())
    done = failed = 0
    for completion in records:
        done, failed = done + 1, failed + (completion["error"] is not None)
    total = work.get("total")
    parts = [f"{done:,} of {total:,} requests" if total else f"{done:,} requests"]
    parts += [f"{failed:,} failed"] if failed else []
    here = done - work.get("earlier", 0)
    if running and total and here > 0:
        begun = datetime.fromisoformat(work["begun_at"])
        each_s = (datetime.now(timezone.utc) - begun).total_seconds() / here
        parts += [f"{60 / each_s:,.0f} a minute", f"about {clock((total - done) * each_s)} left"]
    return parts
