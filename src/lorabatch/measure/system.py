"""What the machine did during a run: one line a second in ``system.jsonl``, from a thread of its own.

GPU figures come from NVML (package nvidia-ml-py) where it is there; what cannot be read is null.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import psutil

from lorabatch.measure.statistics import mean
from lorabatch.records import JsonlWriter

FIELDS = ("cpu_percent", "rss_bytes", "read_bytes_per_s", "write_bytes_per_s", "gpu_util_percent", "gpu_memory_bytes", "gpu_power_w")


class SystemSampler:
    """Context manager. ``summary()`` afterwards: means, and maxima of memory; None where nothing was read."""

    def __init__(self, path: Path, *, interval_s: float = 1.0) -> None:
        self._path, self._interval_s = path, interval_s
        self._stop = threading.Event()
        self._process = psutil.Process()
        self._gpu = _Nvml()
        self.samples: list[dict[str, Any]] = []
        self.own_cpu_s = 0.0

    def __enter__(self) -> SystemSampler:
        self._start = self._last = time.perf_counter()
        self._process.cpu_percent()
        self._io = self._read_io()
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
                sample = self._sample()
                self.samples.append(sample)
                writer.write(sample)
                if stopped:
                    self.own_cpu_s = time.thread_time()
                    return

    def _sample(self) -> dict[str, Any]:
        now, io = time.perf_counter(), self._read_io()
        seconds = max(now - self._last, 1e-9)
        rates = [None if a is None or b is None else (b - a) / seconds for a, b in zip(self._io, io, strict=True)]
        self._last, self._io = now, io
        return {
            "t_s": round(now - self._start, 3),
            "cpu_percent": self._process.cpu_percent(),  # 100 is one core
            "rss_bytes": self._process.memory_info().rss,
            "read_bytes_per_s": rates[0],
            "write_bytes_per_s": rates[1],
            **self._gpu.sample(),
        }

    def _read_io(self) -> tuple[float | None, float | None]:
        """Bytes read and written through system calls since the process began."""
        try:
            counters = self._process.io_counters()
            return float(counters.read_chars), float(counters.write_chars)
        except (psutil.Error, AttributeError, NotImplementedError, OSError):
            return None, None

    def summary(self) -> dict[str, Any]:
        def known(name: str) -> list[float]:
            return [s[name] for s in self.samples if s[name] is not None]

        figures: dict[str, Any] = {name: mean(known(name)) for name in FIELDS}
        figures |= {f"max_{name}": max(known(name), default=None) for name in ("rss_bytes", "gpu_memory_bytes")}
        end = self._gpu.energy_j()
        figures["energy_j"] = None if end is None or self._start_energy_j is None else end - self._start_energy_j
        figures["sampler_cpu_s"] = self.own_cpu_s
        return figures


class _Nvml:
    """The first visible GPU through NVML, or nulls."""

    def __init__(self) -> None:
        self._handle: Any = None
        try:
            import pynvml

            pynvml.nvmlInit()
            self._nvml = pynvml
            self._handle = pynvml.nvmlDeviceGetHandleByIndex(0)
        except Exception:  # no package, no driver, no permission: all mean "not measured"
            self._handle = None

    def _read(self, name: str) -> Any:
        if self._handle is None:
            return None
        try:
            return getattr(self._nvml, name)(self._handle)
        except self._nvml.NVMLError:
            return None

    def energy_j(self) -> float | None:
        millijoules = self._read("nvmlDeviceGetTotalEnergyConsumption")
        return None if millijoules is None else millijoules / 1e3

    def sample(self) -> dict[str, float | None]:
        utilisation, memory, milliwatts = (self._read(f"nvmlDeviceGet{n}") for n in ("UtilizationRates", "MemoryInfo", "PowerUsage"))
        return {
            "gpu_util_percent": None if utilisation is None else utilisation.gpu,
            "gpu_memory_bytes": None if memory is None else memory.used,
            "gpu_power_w": None if milliwatts is None else milliwatts / 1e3,
        }


def peak_memory_bytes() -> int:
    """Largest resident set of this process so far."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
