"""One GPU through NVML (package nvidia-ml-py): what it did since the last look. What cannot be read
is null, and ``missing`` says why."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

from lorabatch.slurm import local_rank

GAUGES = (
    "gpu_util_percent",  # share of time in which any kernel ran: one thread makes 100 %
    # share of multiprocessors that had work, averaged over time (GPM; Hopper and later)
    "gpu_sm_active_percent",
    "gpu_tensor_active_percent",
    "gpu_dram_active_percent",  # of the memory's peak rate
    "gpu_memory_bytes",
    "gpu_power_w",
    "gpu_sm_mhz",
    "gpu_pcie_rx_bytes_per_s",  # received and sent by the GPU over the last 20 ms
    "gpu_pcie_tx_bytes_per_s",
)
# NVML_GPM_METRIC_*
GPM = {"gpu_sm_active_percent": 2, "gpu_tensor_active_percent": 5, "gpu_dram_active_percent": 10}
THROTTLE_BITS = {  # of NVML's clocks throttle reasons; an idle GPU (bit 0) is not throttled
    "application clocks": 0x2,
    "power cap": 0x4,
    "hardware slowdown": 0x8,
    "sync boost": 0x10,
    "software thermal": 0x20,
    "hardware thermal": 0x40,
    "power brake": 0x80,
    "display clocks": 0x100,
}


class Gpu:
    """The GPU that this rank uses, or nulls."""

    def __init__(self) -> None:
        self._handle: Any = None
        self.missing: dict[str, str] = {}  # figure -> why it is null
        self._samples: list[Any] = []  # of GPM: the last look and room for the next one
        try:
            import pynvml

            self._nvml = pynvml
            pynvml.nvmlInit()
            chosen = visible_gpu(os.environ)
            by = (
                pynvml.nvmlDeviceGetHandleByIndex
                if isinstance(chosen, int)
                else pynvml.nvmlDeviceGetHandleByUUID
            )
            self._handle = by(chosen)
        except Exception as error:  # no package, no driver, no permission: all mean "not measured"
            reason = (
                "nvidia-ml-py is not installed"
                if isinstance(error, ImportError)
                else f"NVML: {error}"
            )
            self.missing = dict.fromkeys((*GAUGES, "energy_j", "gpu_throttle_share"), reason)
            return
        self._start_gpm()

    def _read(
        self, figure: str, name: str, *values: Any, of: Callable[[Any], float] = float
    ) -> float | None:
        """``of`` what NVML's function ``name`` answers for this GPU."""
        if self._handle is None or figure in self.missing:
            return None
        try:
            return of(getattr(self._nvml, name)(self._handle, *values))
        except Exception as error:
            self.missing[figure] = f"NVML: {error}"
            return None

    def energy_j(self) -> float | None:
        """The board's own counter (Volta and later), whose difference is exact where sampled power
        is not."""
        return self._read(
            "energy_j",
            "nvmlDeviceGetTotalEnergyConsumption",
            of=lambda millijoules: millijoules / 1e3,
        )

    def sample(self) -> dict[str, float | None]:
        return {
            "gpu_util_percent": self._read(
                "gpu_util_percent", "nvmlDeviceGetUtilizationRates", of=lambda rates: rates.gpu
            ),
            "gpu_memory_bytes": self._read(
                "gpu_memory_bytes", "nvmlDeviceGetMemoryInfo", of=lambda memory: memory.used
            ),
            "gpu_power_w": self._read(
                "gpu_power_w", "nvmlDeviceGetPowerUsage", of=lambda milliwatts: milliwatts / 1e3
            ),
            "gpu_sm_mhz": self._read("gpu_sm_mhz", "nvmlDeviceGetClockInfo", 1),  # 1: NVML_CLOCK_SM
            **{
                f"gpu_pcie_{way}_bytes_per_s": self._read(
                    f"gpu_pcie_{way}_bytes_per_s",
                    "nvmlDeviceGetPcieThroughput",
                    counter,
                    of=lambda kb: kb * 1e3,
                )
                for way, counter in (("tx", 0), ("rx", 1))
            },
            **self._activity(),
        }

    def throttle_reasons(self) -> list[str] | None:
        mask = self._read("gpu_throttle_share", "nvmlDeviceGetCurrentClocksThrottleReasons", of=int)
        return None if mask is None else throttle_names(int(mask))

    def _start_gpm(self) -> None:
        """Performance counters of the chip without root: those of Hopper and later, where the site
        permits it."""
        nvml = self._nvml
        try:
            if not nvml.nvmlGpmQueryDeviceSupport(self._handle).isSupportedDevice:
                raise RuntimeError("this GPU has no GPM counters (Hopper and later have)")
            self._samples = [nvml.nvmlGpmSampleAlloc() for _ in range(2)]
            nvml.nvmlGpmSampleGet(self._handle, self._samples[0])
        except Exception as error:
            self.missing |= dict.fromkeys(GPM, f"NVML: {error}")

    def _activity(self) -> dict[str, float | None]:
        """GPM's means since the last look."""
        found: dict[str, float | None] = dict.fromkeys(GPM)
        if not self._samples or set(GPM) <= set(self.missing):
            return found
        nvml, (before, now) = self._nvml, self._samples
        try:
            nvml.nvmlGpmSampleGet(self._handle, now)
            asked = nvml.c_nvmlGpmMetricsGet_t()
            asked.version, asked.numMetrics, asked.sample1, asked.sample2 = (
                nvml.NVML_GPM_METRICS_GET_VERSION,
                len(GPM),
                before,
                now,
            )
            for place, metric in zip(asked.metrics, GPM.values(), strict=False):
                place.metricId = metric
            nvml.nvmlGpmMetricsGet(asked)
            self._samples = [now, before]
        except Exception as error:
            self.missing |= dict.fromkeys(GPM, f"NVML: {error}")
            return found
        for name, place in zip(GPM, asked.metrics, strict=False):
            if place.nvmlReturn == 0:
                found[name] = place.value
            else:
                self.missing[name] = f"NVML: {nvml.NVMLError(place.nvmlReturn)}"
        return found


def throttle_names(mask: int) -> list[str]:
    return [name for name, bit in THROTTLE_BITS.items() if mask & bit]


def visible_gpu(variables: Mapping[str, str]) -> int | str:
    """Which GPU CUDA gives this rank: an index on the node, or a UUID. Slurm and users restrict it
    by CUDA_VISIBLE_DEVICES."""
    rank = local_rank(variables)
    names = [
        name.strip()
        for name in variables.get("CUDA_VISIBLE_DEVICES", "").split(",")
        if name.strip()
    ]
    if not names:
        return rank
    name = names[min(rank, len(names) - 1)]
    return int(name) if name.isdigit() else name
