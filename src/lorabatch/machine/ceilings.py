"""How fast this machine can be: measured ceilings that every throughput is compared with.

``lorabatch bench machine`` measures all of them; a run that needs one which was never measured here
measures that one. Both keep the result per host, processor, torch version, device, number of
threads and kernels, so that runs on one machine are compared with the same figures. A figure that
was taken while others used the
machine is too low: the first processes measure again, more of them if they had to wait for cores,
and the largest stays.
"""

from __future__ import annotations

import hashlib
import os
import platform
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

from lorabatch.errors import DataError, UnavailableError
from lorabatch.kernels.facts import facts
from lorabatch.machine.device import TYPE_NAMES, out_of_memory
from lorabatch.machine.environment import environment, gpu_description
from lorabatch.machine.folders import converted_folder
from lorabatch.machine.products import best_seconds, gemm_rates
from lorabatch.machine.waits import Watch, disturbed
from lorabatch.records import read_json, utc_now, write_json
from lorabatch.schema import Record

# (inputs, outputs): SmolLM2-135M's MLP, and one beyond small models
CPU_SHAPES = ((576, 1536), (2048, 2048))
GPU_SHAPES = ((2048, 2048), (8192, 8192))
CPU_ROWS, GPU_ROWS = (1, 16, 64, 256, 1024), (1, 16, 256, 2048, 8192)
HOT, COLD = "flops_per_s", "cold_flops_per_s"  # ends of the names that ceilings are kept under
# processes that measure a ceiling before it is taken for granted; one that others disturbed counts
# half
MEASUREMENTS = 3
_measured_here: set[tuple[Path, str]] = set()


def cold_flops_per_s(name: str, device: torch.device, *, reached: float = 0.0) -> float:
    """Best rate of products of type ``name`` (of torch, or int8) with cold weights, over kernels
    and shapes: what runs are compared with.

    reached: what a run got. A ceiling below it was measured while others had the cores, and is
    measured again. 0 where no memory was left to measure it, here as in the functions below.
    """
    return _remembered(f"{name}_{COLD}", device, lambda: _best(name, device, cold=True), reached)


def kernel_facts(device: torch.device) -> Record:
    """What explains a low share of the ceiling, for ``metrics.json``; null on GPUs."""
    found = facts() if device.type == "cpu" else {"variant": None, "why_not": None, "types": None}
    return {
        "kernel_variant": found["variant"],
        "better_variants": found["why_not"],
        "native_types": found["types"],
    }


def measured_flops_per_s(dtype: torch.dtype, device: torch.device) -> float:
    """The same with one weight, which stays in the cache."""
    return _remembered(
        f"{TYPE_NAMES[dtype]}_{HOT}", device, lambda: _best(TYPE_NAMES[dtype], device, cold=False)
    )


def _best(name: str, device: torch.device, *, cold: bool) -> float:
    shapes, rows = (CPU_SHAPES, CPU_ROWS) if device.type == "cpu" else (GPU_SHAPES, GPU_ROWS)
    rates = gemm_rates(name, device, shapes=shapes, rows=rows[-1:], seconds=0.1, cold=cold)
    return max((float(r["flops_per_s"]) for r in rates), default=0.0)


def measured_bytes_per_s(device: torch.device, *, reached: float = 0.0) -> float:
    """Best rate of reading memory: the sum of a tensor far larger than the caches."""
    return _remembered(
        "read_bytes_per_s",
        device,
        lambda: bandwidth(device, seconds=0.3)["read_bytes_per_s"],
        reached,
    )


def bandwidth(device: torch.device, *, seconds: float) -> dict[str, float]:
    """Bytes/s of reading, and of copying (every byte counted twice: once read, once written)."""
    # 256 MiB; on GPUs random, because they are faster with constants
    filled = torch.randn if device.type == "cuda" else torch.ones
    x = filled(1 << 26, dtype=torch.float32, device=device)
    y = torch.empty_like(x)
    read_s, copy_s = (best_seconds([run], device, seconds) for run in (x.sum, lambda: y.copy_(x)))
    assert read_s is not None and copy_s is not None
    return {"read_bytes_per_s": x.nbytes / read_s, "copy_bytes_per_s": 2 * x.nbytes / copy_s}


def cache_file(device: torch.device) -> Path:
    """Where this machine's ceilings are kept: one file for each thing that changes them."""
    folder = Path(
        os.environ.get("LORABATCH_CEILINGS") or converted_folder() / "ceilings"
    ).expanduser()
    variant = facts()["variant"] if device.type == "cpu" else None
    parts = [
        environment()["cpu"],
        torch.__version__,
        str(device),
        torch.get_num_threads(),
        gpu_description(),
        variant,
    ]
    digest = hashlib.sha256(repr(parts).encode()).hexdigest()
    return folder / f"{platform.node() or 'host'}-{digest[:12]}.json"


def _remembered(
    name: str, device: torch.device, measure: Callable[[], float], reached: float = 0.0
) -> float:
    path, kept = cache_file(device), kept_ceilings(device)
    value, times = float(kept.get(name) or 0.0), dict(kept.get("measurements") or {})
    if value and (
        (path, name) in _measured_here or (times.get(name, 0) >= MEASUREMENTS and value >= reached)
    ):
        return value
    _measured_here.add((path, name))
    with Watch() as watch:
        try:
            value = max(value, measure())
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            print(f"no memory left to measure {name}: shares of it are not given", file=sys.stderr)
            return value
    # a node that is never quiet does not measure for ever
    times[name] = times.get(name, 0) + (0.5 if disturbed(watch.share) else 1)
    waited = {**(kept.get("waited_shares") or {}), name: watch.share}
    keep(
        path,
        {
            "schema_version": 1,
            **kept,
            name: value,
            "measurements": times,
            "waited_shares": waited,
            "measured_at": utc_now(),
        },
    )
    return value


def kept_ceilings(device: torch.device) -> Record:
    with suppress(DataError):  # missing or torn: measured again
        return read_json(cache_file(device), "ceilings")
    return {}


def note_reached(name: str, device: torch.device, value: float) -> None:
    """The best that a run reached, for the forecast of the next one: no ceiling."""
    kept = kept_ceilings(device)
    best = max(value, float(kept.get(name) or 0.0))
    keep(cache_file(device), {"schema_version": 1, **kept, name: best})


def keep(path: Path, record: Record) -> None:
    # a cache: a read-only home costs a second per run, not the run
    with suppress(OSError, UnavailableError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, record)
