"""The few questions we ask Slurm, and how its answers are read."""

from __future__ import annotations

import math
import os
import re
import shutil
import subprocess
from collections.abc import Mapping

ANSWER_TIMEOUT_S = 60
UNLIMITED = ("UNLIMITED", "INFINITE", "NOT_SET")


def ask(*command: str) -> str | None:
    """Output of a Slurm command; None where it is not installed, fails, or does not answer within a
    minute."""
    if shutil.which(command[0]) is None:
        return None
    try:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=ANSWER_TIMEOUT_S, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None


def seconds(limit: str) -> float | None:
    """Slurm's time formats in seconds: M, M:S, H:M:S, D-H, D-H:M, D-H:M:S; inf if unlimited; None
    if it is none of them."""
    if limit.strip().upper() in UNLIMITED:
        return float("inf")
    match = re.fullmatch(r"(?:(\d{1,9})-)?(\d{1,9})(?::(\d{1,9}))?(?::(\d{1,9}))?", limit.strip())
    if match is None:
        return None
    days, *parts = (int(part or 0) for part in match.groups())
    has_days, has_third = match[1] is not None, match[4] is not None
    if has_days or has_third:
        hours, minutes, rest = parts
    else:
        hours, (minutes, rest) = 0, parts[:2]
    return ((days * 24 + hours) * 60 + minutes) * 60.0 + rest


def partition_limits() -> dict[str, float]:
    """Longest time in seconds of every partition; empty without a Slurm that answers."""
    found = {}
    for line in (ask("sinfo", "--noheader", "--format=%R %l") or "").splitlines():
        name, _, limit = line.partition(" ")
        found[name] = seconds(limit) or float("inf")
    return found


def local_rank(variables: Mapping[str, str]) -> int:
    """Which of the processes on its node this is, and so which GPU is its own: as torchrun says,
    else as Slurm says."""
    return int(variables.get("LOCAL_RANK") or variables.get("SLURM_LOCALID") or 0)


def job_id() -> str | None:
    """The job that we run in, as Slurm's commands take it: ARRAY_TASK, because the number of one
    task of an array means them all."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID")


def job_seconds_left() -> float | None:
    """Of the job that we run in; None outside a job, without a limit, or where Slurm does not
    answer."""
    job = job_id()
    answer = ask("squeue", "--noheader", f"--jobs={job}", "--format=%L") if job else None
    left_s = seconds(answer) if answer else None
    return None if left_s is None or math.isinf(left_s) else left_s
