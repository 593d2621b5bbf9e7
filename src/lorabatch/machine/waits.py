"""Whether others had the cores while something was measured: how long threads waited for a core,
over how long they ran.

A rate that was measured meanwhile is too low: it is no ceiling, and no verdict rests on it. Waits
for other virtual machines of the same host are not seen here. No torch import.
"""

from __future__ import annotations

import hashlib
import threading
import time

from lorabatch.machine.processes import thread_times
from lorabatch.metrics.schema import SystemMetrics
from lorabatch.schema import Fields

DISTURBED = 0.05  # waited this much of the time in which it ran: others used the machine
PROBE_S = 0.3


def disturbed(share: float | None) -> bool:
    """Of a share that ``Watch`` or ``waited_share`` gave; a share that is not known is not held
    against anybody."""
    return share is not None and share > DISTURBED


def waited_share(metrics: Fields) -> float | None:
    """The share in a run's ``metrics.json``; None where it was not recorded."""
    return SystemMetrics.from_dict(metrics).waited_share


class Watch:
    """Context manager over this process's threads. ``share``, afterwards: seconds waited over
    seconds run; None where none are counted."""

    def __init__(self) -> None:
        self.ran_s = self.waited_s = 0.0

    @property
    def share(self) -> float | None:
        return self.waited_s / self.ran_s if self.ran_s > 0 else None

    def __enter__(self) -> Watch:
        self._before = thread_times()
        return self

    def __exit__(self, *_: object) -> None:
        """May be entered again: times add up."""
        for thread, (ran, waited) in thread_times().items():
            ran_before, waited_before = self._before.get(thread, (0.0, 0.0))
            self.ran_s, self.waited_s = (
                self.ran_s + ran - ran_before,
                self.waited_s + waited - waited_before,
            )


def probe(cores: int, seconds: float = PROBE_S) -> float | None:
    """What work on so many cores has to wait just now, found by working: load averages of a node
    say nothing about our cores."""
    block, end, seen = bytes(1 << 20), time.perf_counter() + seconds, threading.Event()

    def work() -> None:
        while time.perf_counter() < end:
            hashlib.sha256(block)  # lets other threads of Python run

    def work_and_stay() -> None:
        work()
        seen.wait()  # the times of a thread that ended are gone

    threads = [threading.Thread(target=work_and_stay, daemon=True) for _ in range(cores - 1)]
    with Watch() as watch:
        for thread in threads:
            thread.start()
        work()
    seen.set()
    for thread in threads:
        thread.join()
    return watch.share
