"""``lorabatch status``: how far a run is, or the jobs of a submission, from Slurm and from the
files that they write."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from lorabatch import slurm
from lorabatch.cluster.claims import DONE
from lorabatch.cluster.progress import run_folders, run_line
from lorabatch.config import StatusConfig
from lorabatch.errors import DataError
from lorabatch.records import read_json

BAD_ENDS = {
    "BOOT_FAIL",
    "CANCELLED",
    "DEADLINE",
    "FAILED",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "PREEMPTED",
    "REVOKED",
    "TIMEOUT",
}


def run_status(config: StatusConfig, command: list[str]) -> int:
    """One line per job of a submission: Slurm's states, and the shards that are done; or one per
    run. Returns 70 if a job or a run failed, else 0. DataError for a folder that is neither."""
    run_dir = Path(config.folder)
    if not (run_dir / "jobs.json").exists():
        return _show_runs(run_dir)
    ids: dict[str, str] = read_json(run_dir / "jobs.json")["jobs"]
    failed = False
    for name, job in ids.items():
        states = _states(job)
        failed |= not BAD_ENDS.isdisjoint(states)
        shown = ", ".join(
            f"{count} {state}" if sum(states.values()) > 1 else state
            for state, count in states.items()
        )
        print(
            f"{name:7} job {job}: "
            f"{shown or 'no longer in the queue, and no accounting'}{_progress(run_dir, name)}"
        )
    return 70 if failed else 0


def _show_runs(folder: Path) -> int:
    runs = run_folders(folder)
    for name in ("shards", "tasks"):
        if (folder / name).is_dir():
            print(f"{folder}: {_items_done(folder / name)}")
            return 70 * _failed(runs) if runs == [folder] else 0
    if not runs:
        raise DataError(
            "neither a run nor a submission (no run.json, no jobs.json)",
            where=folder,
            fix="give the folder that train, infer or submit named",
        )
    for run in runs:
        print(f"{run}: {run_line(run)}")
    return 70 * _failed(runs)


def _failed(runs: list[Path]) -> bool:
    return any(read_json(run / "run.json")["status"] == "failed" for run in runs)


def _items_done(folder: Path) -> str:
    """Of shared work."""
    items = [p for p in folder.iterdir() if p.is_dir()]
    return f"{sum((p / DONE).exists() for p in items)} of {len(items)} begun {folder.name} done"


def _states(job: str) -> Counter[str]:
    """Of the job, or of every task of an array. The queue knows what goes on now, the accounting
    (seconds behind) what is over."""
    over = _rows(
        "sacct",
        "-X",
        "--noheader",
        "--parsable2",
        "--delimiter= ",
        f"--jobs={job}",
        "--format=JobID,State",
    )
    now = _rows("squeue", "--noheader", "--array", f"--jobs={job}", "--format=%i %T")
    waiting = "["  # the accounting's line for all tasks that have not begun
    return Counter(
        (
            {task: state for task, state in over.items() if not (now and waiting in task)} | now
        ).values()
    )


def _rows(*command: str) -> dict[str, str]:
    """First two words of the lines of an answer ("8_1 CANCELLED by 0" -> {"8_1": "CANCELLED"})."""
    lines = [line.split() for line in (slurm.ask(*command) or "").splitlines() if line.strip()]
    return {job: state for job, state, *_ in lines}


def _progress(run_dir: Path, name: str) -> str:
    for folder in (run_dir / name / "shards", run_dir / "tasks"):
        if name in ("infer", "sweep") and folder.is_dir():
            return f"; {_items_done(folder)}"
    runs = run_folders(run_dir / name)
    return "".join(f"; {run_line(run)}" for run in runs)
