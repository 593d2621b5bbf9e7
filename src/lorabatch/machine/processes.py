"""What this process and its descendants used, from ``/proc``."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

TICKS_PER_S, PAGE_BYTES = os.sysconf("SC_CLK_TCK"), os.sysconf("SC_PAGE_SIZE")
IO_NAMES = {
    "rchar": "read_bytes",
    "wchar": "write_bytes",
    "read_bytes": "disk_read_bytes",
    "write_bytes": "disk_write_bytes",
}


class ProcessTree:
    """A process and its descendants. The kernel adds a child that was waited for to its parent, so
    sums over the tree only grow."""

    def __init__(self, root: int) -> None:
        self._root, self._ids = root, [root]
        self._before: dict[str, float] = {}
        self.gauges: dict[str, float | None] = dict.fromkeys(
            ("rss_bytes", "processes", "os_threads")
        )

    def added(self) -> dict[str, float]:
        """What the tree added to each counter since the last call; a process that left the tree
        unwaited for is lost."""
        totals: dict[str, float] = {}
        found, rss, threads = [], 0.0, 0.0
        for pid in descendants(self._root):
            with suppress(OSError, ValueError, IndexError):  # it ended meanwhile
                counters, pages, count = _read_process(pid)
                found.append(pid)
                rss, threads = rss + pages * PAGE_BYTES, threads + count
                for name, value in counters.items():
                    totals[name] = totals.get(name, 0.0) + value
        before, self._before, self._ids = self._before, totals, found
        if found:
            self.gauges = {"rss_bytes": rss, "processes": len(found), "os_threads": threads}
        return {name: max(0.0, value - before.get(name, value)) for name, value in totals.items()}

    def pss_bytes(self) -> float | None:
        """Resident memory with shared pages divided among those who share them."""
        found = [value for pid in self._ids if (value := _pss(pid)) is not None]
        return sum(found) if found else None


def descendants(root: int) -> list[int]:
    """``root`` and all that descend from it. From each thread's list of children: no scan of all
    processes of a node."""
    found = [root]
    for pid in found:  # grows meanwhile
        with suppress(OSError):
            for task in Path(f"/proc/{pid}/task").iterdir():
                found += [
                    int(child) for child in (task / "children").read_text(encoding="ascii").split()
                ]
    return found


def _read_process(pid: int) -> tuple[dict[str, float], int, int]:
    """(counters, resident pages, threads). Fields of ``/proc/PID/stat`` are counted after the name,
    which may hold anything."""
    fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    # user, system, and of children waited for
    counters = {"cpu_s": sum(int(field) for field in fields[11:15]) / TICKS_PER_S}
    if times := thread_times(pid):
        counters["cpu_wait_s"] = sum(waited for _, waited in times.values())
    with suppress(OSError):  # another user's process
        for line in Path(f"/proc/{pid}/io").read_text(encoding="ascii").splitlines():
            name, _, value = line.partition(": ")
            if name in IO_NAMES:
                counters[IO_NAMES[name]] = float(value)
    return counters, int(fields[21]), int(fields[17])


def thread_times(pid: int | str = "self") -> dict[str, tuple[float, float]]:
    """Of each living thread the seconds that it ran, and those for which it was ready to run but
    others had the cores.

    Empty where the kernel does not count them.
    """
    found = {}
    with suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            with suppress(OSError, ValueError):  # not counted, or the thread ended meanwhile
                ran, waited = (task / "schedstat").read_text(encoding="ascii").split()[:2]
                found[task.name] = int(ran) / 1e9, int(waited) / 1e9
    return found


def _pss(pid: int) -> float | None:
    with suppress(OSError, ValueError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines():
            if line.startswith("Pss:"):
                return 1024.0 * int(line.split()[1])
    return None
