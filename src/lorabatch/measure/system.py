"""What the machine did during a run: one line a second in ``system.jsonl``, from a thread of its own.

CPU, memory and I/O are those of this process and its descendants, from ``/proc``; limits and throttling are the control
group's; GPU figures come from NVML; the energy of the processors is the node's. What cannot be read is null, with the reason.
"""

from __future__ import annotations

import os
import resource
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from lorabatch.errors import UnavailableError
from lorabatch.measure import gpu
from lorabatch.records import JsonlWriter

TICKS_PER_S, PAGE_BYTES = os.sysconf("SC_CLK_TCK"), os.sysconf("SC_PAGE_SIZE")
PSS_EVERY = 60  # samples: the kernel walks every page of the process for it
IO_NAMES = {"rchar": "read_bytes", "wchar": "write_bytes", "read_bytes": "disk_read_bytes", "write_bytes": "disk_write_bytes"}
COUNTERS = {  # what is counted: its rate's name, and the unit of that rate
    "cpu_s": ("cpu_percent", 100),  # of one core
    "cpu_wait_s": ("cpu_wait_percent", 100),
    "throttled_s": ("throttled_share", 1),
    "cpu_energy_j": ("cpu_power_w", 1),
    **{name: (f"{name}_per_s", 1) for name in (*IO_NAMES.values(), "voluntary_switches", "involuntary_switches")},
}
GAUGES = ("rss_bytes", "pss_bytes", "processes", "os_threads", *gpu.GAUGES)
UNLIMITED = 2**60  # version 1 of control groups writes "no limit" as a huge number of bytes


class SystemSampler:
    """Context manager. ``summary()``, while it runs or afterwards: means over time, maxima of memory; None where nothing was read."""

    def __init__(self, path: Path, *, interval_s: float = 1.0) -> None:
        self._path, self._interval_s = path, interval_s
        self._stop = threading.Event()
        self._tree, self._group, self._rapl, self._gpu = ProcessTree(os.getpid()), ControlGroup(), Rapl(), gpu.Gpu()
        self._before: dict[str, float] = {}
        self._totals: dict[str, float] = {}
        self._gauges: dict[str, list[float]] = {name: [0.0, 0.0, 0.0] for name in GAUGES}  # sum, count, maximum
        self._throttle_reasons: dict[str, int] = {}
        self._samples = 0
        self._sampling = threading.Lock()
        self._own_cpu_s = 0.0

    def __enter__(self) -> SystemSampler:
        self._start = self._last = time.perf_counter()
        self._counted()
        self._totals = {}
        self._start_energy_j = self._gpu.energy_j()
        self._thread = threading.Thread(target=self._loop, name="system-sampler", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _loop(self) -> None:
        with JsonlWriter(self._path, fsync_every_s=30) as writer:
            while True:
                stopped = self._stop.wait(self._interval_s)
                try:
                    writer.write(self._sample(last=stopped))
                except UnavailableError:  # a full disk: the run's own files will say so
                    return
                self._own_cpu_s = time.thread_time()
                if stopped:
                    return

    def _counted(self) -> dict[str, float]:
        """What was added to each counter since the last call; only those that could be read."""
        usage = resource.getrusage(resource.RUSAGE_SELF)
        own = {"voluntary_switches": float(usage.ru_nvcsw), "involuntary_switches": float(usage.ru_nivcsw)}
        throttled = self._group.throttled_s()
        own |= {} if throttled is None else {"throttled_s": throttled}
        added = {name: value - self._before.get(name, value) for name, value in own.items()}
        self._before = own
        joules = self._rapl.added_j()
        added |= self._tree.added() | ({} if joules is None else {"cpu_energy_j": joules})
        for name, value in added.items():
            self._totals[name] = self._totals.get(name, 0.0) + value
        return added

    def _sample(self, *, last: bool) -> dict[str, Any]:
        with self._sampling:  # the thread, and whoever asks for a summary before its end
            added, now = self._counted(), time.perf_counter()
            seconds, self._last = max(now - self._last, 1e-9), now
            gauges = {**self._tree.gauges, **self._gpu.sample()}
            gauges["pss_bytes"] = self._tree.pss_bytes() if last or self._samples % PSS_EVERY == PSS_EVERY - 1 else None
            for name, kept in self._gauges.items():
                if (value := gauges.get(name)) is not None:
                    kept[:] = kept[0] + value, kept[1] + 1, max(kept[2], value)
            reasons = self._gpu.throttle_reasons()
            for reason in reasons or ():
                self._throttle_reasons[reason] = self._throttle_reasons.get(reason, 0) + 1
            self._samples += 1
            return {"t_s": round(now - self._start, 3), **_rates(added, seconds), **gauges, "gpu_throttle_reasons": reasons}

    def summary(self) -> dict[str, Any]:
        if not self._stop.is_set():
            self._sample(last=True)  # of a run that ends before its process does
        means = {name: kept[0] / kept[1] if kept[1] else None for name, kept in self._gauges.items()}
        figures: dict[str, Any] = {**_rates(self._totals, self._last - self._start), **means}
        for name in ("rss_bytes", "pss_bytes", "gpu_memory_bytes", "os_threads"):
            figures[f"max_{name}"] = self._gauges[name][2] if self._gauges[name][1] else None
        end = self._gpu.energy_j()
        figures["energy_j"] = None if end is None or self._start_energy_j is None else end - self._start_energy_j
        figures["cpu_energy_j"] = self._totals.get("cpu_energy_j")
        throttled = {reason: count / self._samples for reason, count in self._throttle_reasons.items()}
        figures["gpu_throttle_share"] = None if "gpu_throttle_share" in self._gpu.missing else throttled
        reasons = self._gpu.missing | dict.fromkeys(("cpu_energy_j", "cpu_power_w"), self._rapl.missing or "not readable at the end")
        figures["missing"] = {name: reason for name, reason in reasons.items() if figures[name] is None}
        figures |= self._group.limits()
        figures["sampled_s"] = self._last - self._start
        figures["sampler_cpu_s"] = self._own_cpu_s
        return figures


def _rates(added: Mapping[str, float], seconds: float) -> dict[str, float | None]:
    """Counters per second, under the names and in the units of the records."""
    return {rate: unit * added[name] / seconds if name in added and seconds > 0 else None for name, (rate, unit) in COUNTERS.items()}


class ProcessTree:
    """A process and its descendants. The kernel adds a child that was waited for to its parent, so sums over the tree only grow."""

    def __init__(self, root: int) -> None:
        self._root, self._ids = root, [root]
        self._before: dict[str, float] = {}
        self.gauges: dict[str, float | None] = dict.fromkeys(("rss_bytes", "processes", "os_threads"))

    def added(self) -> dict[str, float]:
        """What the tree added to each counter since the last call; a process that left the tree unwaited for is lost."""
        totals: dict[str, float] = {}
        found, rss, threads = [], 0.0, 0.0
        for pid in descendants(self._root):
            with suppress(OSError, ValueError, IndexError):  # it ended meanwhile
                counters, pages, count = _read_process(pid)
                found.append(pid)
                rss, threads = rss + pages * PAGE_BYTES, threads + count
                for name, value in counters.items():
                    totals[name] = totals.get(name, 0.0) + value
        added = {name: max(0.0, value - self._before.get(name, value)) for name, value in totals.items()}
        self._before, self._ids = totals, found
        if found:
            self.gauges = {"rss_bytes": rss, "processes": len(found), "os_threads": threads}
        return added

    def pss_bytes(self) -> float | None:
        """Resident memory with shared pages divided among those who share them."""
        found = [value for pid in self._ids if (value := _pss(pid)) is not None]
        return sum(found) if found else None


def descendants(root: int) -> list[int]:
    """``root`` and all that descend from it. From each thread's list of children: no scan of all processes of a node."""
    found = [root]
    for pid in found:  # grows meanwhile
        with suppress(OSError):
            for task in Path(f"/proc/{pid}/task").iterdir():
                found += [int(child) for child in (task / "children").read_text(encoding="ascii").split()]
    return found


def _read_process(pid: int) -> tuple[dict[str, float], int, int]:
    """(counters, resident pages, threads). Fields of ``/proc/PID/stat`` are counted after the name, which may hold anything."""
    fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    counters = {"cpu_s": sum(int(field) for field in fields[11:15]) / TICKS_PER_S}  # user, system, and of children waited for
    if times := thread_times(pid):
        counters["cpu_wait_s"] = sum(waited for _, waited in times.values())
    with suppress(OSError):  # another user's process
        for line in Path(f"/proc/{pid}/io").read_text(encoding="ascii").splitlines():
            name, _, value = line.partition(": ")
            if name in IO_NAMES:
                counters[IO_NAMES[name]] = float(value)
    return counters, int(fields[21]), int(fields[17])


def thread_times(pid: int | str = "self") -> dict[str, tuple[float, float]]:
    """Of each living thread the seconds that it ran, and those for which it was ready to run but others had the cores.

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


class ControlGroup:
    """Limits of this process's control group and of those above it (version 1 or 2): what Slurm or a container allows."""

    def __init__(self, root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> None:
        self._memory, self._cpu = [root], [root]
        with suppress(OSError):
            for line in membership.read_text(encoding="utf-8").splitlines():
                _, controllers, path = line.split(":", 2)
                for kind, folders in (("memory", self._memory), ("cpu", self._cpu)):
                    if kind in controllers.split(","):
                        folders[:] = _upwards(root / controllers, path) if (root / controllers).exists() else _upwards(root / kind, path)
                    elif not controllers and (root / "cgroup.controllers").exists():
                        folders[:] = _upwards(root, path)

    def limits(self) -> dict[str, float | None]:
        memory = [
            value for folder in self._memory for name in ("memory.max", "memory.limit_in_bytes") for value in _numbers(folder / name)[:1]
        ]
        cores = [quota / period for folder in self._cpu for quota, period in [_quota(folder)] if quota and period]
        memory = [value for value in memory if value < UNLIMITED]
        return {"cgroup_memory_bytes": min(memory, default=None), "cgroup_cores": min(cores, default=None)}

    def throttled_s(self) -> float | None:
        """Seconds for which the group had to wait because its quota was used up."""
        stat = _table(self._cpu[0] / "cpu.stat")
        return next((stat[name] / unit for name, unit in (("throttled_usec", 1e6), ("throttled_time", 1e9)) if name in stat), None)

    def left_bytes(self) -> float:
        """What the tightest limit leaves (infinite without one). Pages of files that were read once are free: the kernel drops them."""
        left = [float("inf")]
        for folder in self._memory:
            for limit, usage, once in (
                ("memory.max", "memory.current", "inactive_file"),
                ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
            ):
                most, used = _numbers(folder / limit)[:1], _numbers(folder / usage)[:1]
                if most and used and most[0] < UNLIMITED:
                    left.append(most[0] - used[0] + _table(folder / "memory.stat").get(once, 0))
        return max(0.0, min(left))


def _upwards(root: Path, path: str) -> list[Path]:
    """The group's folder and those above it, as far as they are visible from here (a container sees only its own)."""
    folder = root / path.strip("/")
    return [place for place in (folder, *folder.parents) if place.is_relative_to(root) and place.is_dir()] or [root]


def _quota(folder: Path) -> tuple[float, float]:
    both = _numbers(folder / "cpu.max")
    if len(both) < 2:
        both = _numbers(folder / "cpu.cfs_quota_us") + _numbers(folder / "cpu.cfs_period_us")
    return (both[0], both[1]) if len(both) == 2 and both[0] > 0 else (0.0, 0.0)


def _numbers(path: Path) -> list[float]:
    """The numbers in a one-line file; none where it is missing. "max" is no number."""
    with suppress(OSError):
        return [float(word) for word in path.read_text(encoding="ascii").split() if word.lstrip("-").isdigit()]
    return []


def _table(path: Path) -> dict[str, int]:
    """A file with a name and a number in each line; empty where it is missing."""
    with suppress(OSError, ValueError):
        return {name: int(value) for name, value in map(str.split, path.read_text(encoding="ascii").splitlines())}
    return {}


class Rapl:
    """Energy of the node's processors from ``/sys/class/powercap`` (Intel's and AMD's RAPL); most sites let only root read it."""

    def __init__(self, root: Path = Path("/sys/class/powercap")) -> None:
        self._last: dict[Path, int] = {}
        self._wraps: dict[Path, int] = {}  # a counter starts again at zero after this many microjoules
        self.missing: str | None = None
        try:
            for zone in sorted(root.glob("intel-rapl:*")):  # of packages "intel-rapl:0", of their parts "intel-rapl:0:1"
                if zone.name.count(":") == 1 and (zone / "name").read_text(encoding="ascii").startswith("package"):
                    self._wraps[zone] = int((zone / "max_energy_range_uj").read_text(encoding="ascii")) + 1
                    self._last[zone] = int((zone / "energy_uj").read_text(encoding="ascii"))
            if not self._last:
                self.missing = f"no processor in {root}"
        except (OSError, ValueError) as error:
            self.missing, self._last = f"{root}: {getattr(error, 'strerror', None) or error}", {}

    def added_j(self) -> float | None:
        """Joules since the last call. Whoever shares the node is in them."""
        total = 0.0
        for zone, before in self._last.items():
            try:
                now = int((zone / "energy_uj").read_text(encoding="ascii"))
            except (OSError, ValueError):
                return None
            total += (now - before) % self._wraps[zone] / 1e6
            self._last[zone] = now
        return total if self._last else None


def free_memory_bytes() -> int:
    """What this process can still take: of the machine's memory, within its control groups."""
    import psutil

    return int(min(psutil.virtual_memory().available, ControlGroup().left_bytes()))


def peak_memory_bytes() -> int:
    """Largest resident set of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
