"""What the machine did during a run: one line a second in ``system.jsonl``, from a thread of its
own.

CPU, memory and I/O are those of this process and its descendants, from ``/proc``; limits and
throttling are the control group's; GPU figures come from NVML; the energy of the processors is the
node's. What cannot be read is null, with the reason.
"""

from __future__ import annotations

import os
import resource
import threading
import time
from collections.abc import Mapping
from pathlib import Path

from lorabatch.errors import UnavailableError
from lorabatch.machine import gpu
from lorabatch.machine.cgroup import ControlGroup
from lorabatch.machine.energy import Rapl
from lorabatch.machine.processes import IO_NAMES, ProcessTree
from lorabatch.metrics.schema import SystemMetrics
from lorabatch.records import JsonlWriter
from lorabatch.schema import Record

PSS_EVERY = 60  # samples: the kernel walks every page of the process for it
COUNTERS = {  # what is counted: its rate's name, and the unit of that rate
    "cpu_s": ("cpu_percent", 100),  # of one core
    "cpu_wait_s": ("cpu_wait_percent", 100),
    "throttled_s": ("throttled_share", 1),
    "cpu_energy_j": ("cpu_power_w", 1),
    **{
        name: (f"{name}_per_s", 1)
        for name in (*IO_NAMES.values(), "voluntary_switches", "involuntary_switches")
    },
}
MAXIMA = ("rss_bytes", "pss_bytes", "gpu_memory_bytes", "os_threads")
GAUGES = ("rss_bytes", "pss_bytes", "processes", "os_threads", *gpu.GAUGES)


class SystemSampler:
    """Context manager. ``summary()``, while it runs or afterwards: means over time, maxima of
    memory; None where nothing was read."""

    def __init__(self, path: Path, *, interval_s: float = 1.0) -> None:
        self._path, self._interval_s = path, interval_s
        self._stop = threading.Event()
        self._tree, self._group, self._rapl, self._gpu = (
            ProcessTree(os.getpid()),
            ControlGroup(),
            Rapl(),
            gpu.Gpu(),
        )
        self._before: dict[str, float] = {}
        self._totals: dict[str, float] = {}
        # sum, count, maximum
        self._gauges: dict[str, list[float]] = {name: [0.0, 0.0, 0.0] for name in GAUGES}
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
        own = {
            "voluntary_switches": float(usage.ru_nvcsw),
            "involuntary_switches": float(usage.ru_nivcsw),
        }
        throttled = self._group.throttled_s()
        own |= {} if throttled is None else {"throttled_s": throttled}
        added = {name: value - self._before.get(name, value) for name, value in own.items()}
        self._before = own
        joules = self._rapl.added_j()
        added |= self._tree.added() | ({} if joules is None else {"cpu_energy_j": joules})
        for name, value in added.items():
            self._totals[name] = self._totals.get(name, 0.0) + value
        return added

    def _sample(self, *, last: bool) -> Record:
        with self._sampling:  # the thread, and whoever asks for a summary before its end
            added, now = self._counted(), time.perf_counter()
            seconds, self._last = max(now - self._last, 1e-9), now
            due = last or self._samples % PSS_EVERY == PSS_EVERY - 1
            gauges = {**self._tree.gauges, **self._gpu.sample()}
            gauges["pss_bytes"] = self._tree.pss_bytes() if due else None
            self._keep(gauges)
            reasons = self._gpu.throttle_reasons()
            for reason in reasons or ():
                self._throttle_reasons[reason] = self._throttle_reasons.get(reason, 0) + 1
            self._samples += 1
            return {
                "t_s": round(now - self._start, 3),
                **_rates(added, seconds),
                **gauges,
                "gpu_throttle_reasons": reasons,
            }

    def _keep(self, gauges: Mapping[str, float | None]) -> None:
        for name, kept in self._gauges.items():
            if (value := gauges.get(name)) is not None:
                kept[:] = kept[0] + value, kept[1] + 1, max(kept[2], value)

    def summary(self) -> SystemMetrics:
        if not self._stop.is_set():
            self._sample(last=True)  # of a run that ends before its process does
        sampled_s = self._last - self._start
        figures: Record = {**_rates(self._totals, sampled_s), **self._means(), **self._maxima()}
        figures |= {"energy_j": self._energy_j(), "gpu_throttle_share": self._throttle_share()}
        figures |= {"cpu_energy_j": self._totals.get("cpu_energy_j"), **self._group.limits()}
        reasons = self._gpu.missing | dict.fromkeys(
            ("cpu_energy_j", "cpu_power_w"), self._rapl.missing or "not readable at the end"
        )
        return SystemMetrics(
            missing={name: reason for name, reason in reasons.items() if figures[name] is None},
            sampled_s=sampled_s,
            sampler_cpu_s=self._own_cpu_s,
            **figures,
        )

    def _means(self) -> dict[str, float | None]:
        return {name: kept[0] / kept[1] if kept[1] else None for name, kept in self._gauges.items()}

    def _maxima(self) -> dict[str, float | None]:
        kept = {name: self._gauges[name] for name in MAXIMA}
        return {f"max_{name}": most if count else None for name, (_, count, most) in kept.items()}

    def _energy_j(self) -> float | None:
        """Of the GPU."""
        start, end = self._start_energy_j, self._gpu.energy_j()
        return None if end is None or start is None else end - start

    def _throttle_share(self) -> dict[str, float] | None:
        """Of the samples, by reason."""
        if "gpu_throttle_share" in self._gpu.missing:
            return None
        return {reason: count / self._samples for reason, count in self._throttle_reasons.items()}


def _rates(added: Mapping[str, float], seconds: float) -> dict[str, float | None]:
    """Counters per second, under the names and in the units of the records."""
    return {
        rate: unit * added[name] / seconds if name in added and seconds > 0 else None
        for name, (rate, unit) in COUNTERS.items()
    }
