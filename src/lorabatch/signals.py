"""Reasons to stop before the end: SIGTERM, SIGUSR1 and SIGINT as a flag that loops look at, and the
end of the allotted time."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType

from lorabatch import slurm
from lorabatch.errors import UsageError

Handler = Callable[[int, FrameType | None], object] | int | None  # as signal.signal returns it


class StopSignals:
    """While entered, a first signal asks the work to stop after its step; a second SIGINT stops it
    at once."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._earlier: dict[int, Handler] = {}

    def __bool__(self) -> bool:
        return self.received is not None

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT and self.received == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)

    def __enter__(self) -> StopSignals:
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            self._earlier[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._earlier.items():
            signal.signal(number, handler)


@dataclass(frozen=True)
class Deadline:
    """When the work must be over, in seconds of the wall clock (infinite: never), and who says
    so."""

    at_s: float = float("inf")
    source: str = "nothing"

    def within(self, seconds: float) -> bool:
        return time.time() + seconds >= self.at_s

    @classmethod
    def from_flag_and_slurm(cls, time_limit: str | None) -> Deadline:
        """The earlier of ``--time_limit``, counted from now, and the end of the Slurm job."""
        found = [cls()]
        if time_limit is not None:
            found.append(cls(time.time() + limit_seconds(time_limit), f"--time_limit {time_limit}"))
        slurm_end_s = _slurm_end_s()
        if slurm_end_s is not None and slurm_end_s <= time.time():
            print("warning: SLURM_JOB_END_TIME is in the past: ignored", file=sys.stderr)
        elif slurm_end_s is not None:
            found.append(cls(slurm_end_s, "the end of the Slurm job"))
        return min(found, key=lambda d: d.at_s)


def _slurm_end_s() -> float | None:
    """When this Slurm job ends: from its environment, or asked from squeue where that does not
    say."""
    told = os.environ.get("SLURM_JOB_END_TIME", "")
    if told.isdigit():
        return float(told)
    # one question a job: all ranks stop when one does
    if os.environ.get("SLURM_PROCID", "0") != "0":
        return None
    left_s = slurm.job_seconds_left()
    return None if left_s is None else time.time() + left_s


def limit_seconds(text: str) -> float:
    """``"90"`` (minutes) or ``"1:30:00"`` (hours:minutes:seconds) in seconds. UsageError for
    anything else."""
    found = slurm.seconds(text) if re.fullmatch(r"[0-9]+(:[0-9]+:[0-9]+)?", text) else None
    if not found:
        raise UsageError(
            "not a time", where=f"--time_limit {text}", fix="give minutes (90) or h:mm:ss (1:30:00)"
        )
    return found
