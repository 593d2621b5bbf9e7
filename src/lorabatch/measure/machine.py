"""How fast this machine can be: measured ceilings that every throughput is held against.

``lorabatch bench machine`` measures all of them; a run that needs one which was never measured here
measures that one. Both keep the result per host, processor, torch version, device, number of threads and kernels,
so that runs on one machine are held against the same figures. A figure that was taken while others used the
machine is too low: the first processes measure again, more of them if they had to wait for cores, and the largest stays.
"""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import torch

from lorabatch import hub
from lorabatch.config import BenchMachineConfig
from lorabatch.errors import DataError, UnavailableError
from lorabatch.kernels.facts import facts
from lorabatch.measure.environment import environment, gpu_description
from lorabatch.measure.peaks import PEAKS, known_peak
from lorabatch.measure.products import best_seconds, gemm_rates
from lorabatch.measure.waits import Watch, disturbed
from lorabatch.model.device import TYPE_NAMES, choose_device, choose_threads, cpu_has_bf16
from lorabatch.records import read_json, utc_now, write_json

CPU_SHAPES = ((576, 1536), (2048, 2048))  # (inputs, outputs): SmolLM2-135M's MLP, and one beyond small models
GPU_SHAPES = ((2048, 2048), (8192, 8192))
CPU_ROWS, GPU_ROWS = (1, 16, 64, 256, 1024), (1, 16, 256, 2048, 8192)
HOT, COLD = "flops_per_s", "cold_flops_per_s"  # ends of the names that ceilings are kept under
MEASUREMENTS = 3  # processes that measure a ceiling before it is taken for granted; one that others disturbed counts half
TRIES = 3  # of ``bench machine`` at a figure, until others leave it the cores
T = TypeVar("T")
_measured_here: set[tuple[Path, str]] = set()


def cold_flops_per_s(name: str, device: torch.device, *, reached: float = 0.0) -> float:
    """Best rate of products of type ``name`` (of torch, or int8) with cold weights, over kernels and shapes: what runs are held against.

    reached: what a run got. A ceiling below it was measured while others had the cores, and is measured again.
    """
    return _remembered(f"{name}_{COLD}", device, lambda: _best(name, device, cold=True), reached)


def kernel_facts(device: torch.device) -> dict[str, Any]:
    """What explains a low share of the ceiling, for ``metrics.json``; null on GPUs."""
    found = facts() if device.type == "cpu" else {"variant": None, "why_not": None, "types": None}
    return {"kernel_variant": found["variant"], "better_variants": found["why_not"], "native_types": found["types"]}


def measured_flops_per_s(dtype: torch.dtype, device: torch.device) -> float:
    """The same with one weight, which stays in the cache."""
    return _remembered(f"{TYPE_NAMES[dtype]}_{HOT}", device, lambda: _best(TYPE_NAMES[dtype], device, cold=False))


def _best(name: str, device: torch.device, *, cold: bool) -> float:
    shapes, rows = (CPU_SHAPES, CPU_ROWS) if device.type == "cpu" else (GPU_SHAPES, GPU_ROWS)
    rates = gemm_rates(name, device, shapes=shapes, rows=rows[-1:], seconds=0.1, cold=cold)
    return max((float(r["flops_per_s"]) for r in rates), default=0.0)


def measured_bytes_per_s(device: torch.device, *, reached: float = 0.0) -> float:
    """Best rate of reading memory: the sum of a tensor far larger than the caches."""
    return _remembered("read_bytes_per_s", device, lambda: bandwidth(device, seconds=0.3)["read_bytes_per_s"], reached)


def bandwidth(device: torch.device, *, seconds: float) -> dict[str, float]:
    """Bytes/s of reading, and of copying (every byte counted twice: once read, once written)."""
    x = torch.ones((1 << 26) if device.type == "cpu" else (1 << 30), dtype=torch.float32, device=device)
    y = torch.empty_like(x)
    read_s, copy_s = (best_seconds([run], device, seconds) for run in (x.sum, lambda: y.copy_(x)))
    assert read_s is not None and copy_s is not None
    return {"read_bytes_per_s": x.nbytes / read_s, "copy_bytes_per_s": 2 * x.nbytes / copy_s}


def cache_file(device: torch.device) -> Path:
    """Where this machine's ceilings are kept: one file for each thing that changes them."""
    folder = Path(os.environ.get("LORABATCH_CEILINGS") or hub.converted_folder() / "ceilings").expanduser()
    variant = facts()["variant"] if device.type == "cpu" else None
    parts = [environment()["cpu"], torch.__version__, str(device), torch.get_num_threads(), gpu_description(), variant]
    return folder / f"{platform.node() or 'host'}-{hashlib.sha256(repr(parts).encode()).hexdigest()[:12]}.json"


def _remembered(name: str, device: torch.device, measure: Callable[[], float], reached: float = 0.0) -> float:
    path, kept = cache_file(device), _kept(device)
    value, times = float(kept.get(name) or 0.0), dict(kept.get("measurements") or {})
    if value and ((path, name) in _measured_here or (times.get(name, 0) >= MEASUREMENTS and value >= reached)):
        return value
    _measured_here.add((path, name))
    with Watch() as watch:
        value = max(value, measure())
    times[name] = times.get(name, 0) + (0.5 if disturbed(watch.share) else 1)  # a node that is never quiet does not measure for ever
    waited = {**(kept.get("waited_shares") or {}), name: watch.share}
    _keep(path, {"schema_version": 1, **kept, name: value, "measurements": times, "waited_shares": waited, "measured_at": utc_now()})
    return value


def _kept(device: torch.device) -> dict[str, Any]:
    with suppress(DataError):  # missing or torn: measured anew
        return read_json(cache_file(device), "ceilings")
    return {}


def _keep(path: Path, record: dict[str, Any]) -> None:
    with suppress(OSError, UnavailableError):  # a cache: a read-only home costs a second per run, not the run
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, record)


def undisturbed(measure: Callable[[], T], tries: int = TRIES) -> tuple[T, float | None]:
    """(what ``measure`` gave, share of its time that it waited for cores): tried again while others have them; the least disturbed stays."""
    found: list[tuple[float, T]] = []
    while len(found) < tries and (not found or disturbed(min(share for share, _ in found))):
        with Watch() as watch:
            result = measure()
        if watch.share is None:
            return result, None
        found.append((watch.share, result))
    share, result = min(found, key=lambda pair: pair[0])
    return result, share


def measure_machine(config: BenchMachineConfig) -> dict[str, Any]:
    """All ceilings of this machine; what runs will be held against from now on."""
    device, threads = choose_device(no_cuda=config.no_cuda), choose_threads(config.threads)
    cpu = device.type == "cpu"
    shapes, rows = (CPU_SHAPES, CPU_ROWS) if cpu else (GPU_SHAPES, GPU_ROWS)
    types = ["fp32", *(["bf16"] if not cpu or cpu_has_bf16() else []), "int8" if cpu else "fp16"]
    gemm: list[dict[str, Any]] = []
    ceilings: dict[str, float | None] = {}
    waited: dict[str, float | None] = {}
    for name in types:
        for end in (HOT, COLD):
            figure = f"{name}_{end}"

            def measure(name: str = name, cold: bool = end == COLD) -> list[dict[str, Any]]:
                return list(gemm_rates(name, device, shapes=shapes, rows=rows, seconds=config.seconds, cold=cold))

            rates, waited[figure] = undisturbed(measure)
            ceilings[figure] = max((r["flops_per_s"] for r in rates), default=None)
            gemm += rates
    memory, waited["read_bytes_per_s"] = undisturbed(lambda: bandwidth(device, seconds=5 * config.seconds))
    gpu, env = gpu_description(), environment()
    peak = known_peak(gpu["name"], gpu["memory_bytes"]) if gpu else None
    record = {
        "schema_version": 1,
        "kind": "bench machine",
        "environment": env,
        "device": str(device),
        "gpu": gpu,
        "threads": threads,
        "kernels": facts() if cpu else None,
        "measured_at": utc_now(),
        **memory,
        **ceilings,
        "waited_shares": waited,
        "gemm": gemm,
        "vendor_peak": None if peak is None else {"name": peak.name, **peak.flops_per_s, "bytes_per_s": peak.bytes_per_s},
    }
    _keep(cache_file(device), record | _lasting(record, _kept(device)))
    return record


def _lasting(record: dict[str, Any], kept: dict[str, Any]) -> dict[str, Any]:
    """Which figures need no other measurement. A disturbed one does, and replaces none that was larger."""
    bad = [figure for figure, share in record["waited_shares"].items() if disturbed(share)]
    times = {figure: 0 if figure in bad else MEASUREMENTS for figure in record["waited_shares"]}
    return {"measurements": times} | {figure: max(record[figure] or 0.0, float(kept.get(figure) or 0.0)) for figure in bad}


def run_bench_machine(config: BenchMachineConfig) -> int:
    """Measure, keep, print; with ``config.output`` also write the record there."""
    record = measure_machine(config)
    print("\n".join(_lines(record)))
    print(f"\nkept for the runs on this machine: {cache_file(choose_device(no_cuda=config.no_cuda))}")
    if config.output:
        write_json(Path(config.output), record)
        print(config.output)
    return 0


def _lines(record: dict[str, Any]) -> list[str]:
    host, kernels = record["environment"], record["kernels"] or {}
    name = record["gpu"]["name"] if record["gpu"] else host["cpu"]
    lines = [f"{host['host']}: {name}, {record['device']}, {record['threads']} threads, torch {host['packages']['torch']}"]
    if kernels:
        lines.append(f"kernels: {kernels['variant'] or 'none'}" + (f" ({kernels['why_not']})" if kernels["why_not"] else ""))
    counts = sorted({r["rows"] for r in record["gemm"]})
    lines.append(f"\n  {'type':6}{'kernel':11}{'inputs x outputs':>18}  {'weights':8}" + "".join(f"{f'{n} rows':>11}" for n in counts))
    series: dict[tuple[str, str, str, str], list[float]] = {}
    for r in record["gemm"]:
        key = (r["dtype"], r["kernel"], f"{r['inputs']} x {r['outputs']}", "cold" if r["cold"] else "hot")
        series.setdefault(key, []).append(r["flops_per_s"])
    for (dtype, kernel, shape, kind), rates in series.items():
        lines.append(f"  {dtype:6}{kernel:11}{shape:>18}  {kind:8}" + "".join(f"{rate / 1e9:11.0f}" for rate in rates) + "  Gflop/s")
    lines += ["", *(f"  {what:5} {record[f'{what}_bytes_per_s'] / 1e9:8.1f} GB/s" for what in ("read", "copy"))]
    heads = ("bf16 Tflop/s", "fp16 Tflop/s", "fp32 Tflop/s", "GB/s")
    lines.append(f"\n  {'promised by the vendor':24}" + "".join(f"{head:>16}" for head in heads))
    for peak in PEAKS:
        shown = [f"{peak.flops_per_s[t] / 1e12:.1f}" if t in peak.flops_per_s else "-" for t in ("bf16", "fp16", "fp32")]
        lines.append(f"  {peak.name:24}" + "".join(f"{text:>16}" for text in (*shown, f"{peak.bytes_per_s / 1e9:.0f}")))
    bad = {figure: share for figure, share in record["waited_shares"].items() if disturbed(share)}
    if bad:
        found = ", ".join(f"{figure} ({share:.0%})" for figure, share in bad.items())
        lines.append(f"\nothers had the cores (waited, of the time computed): {found}: too low, so runs will measure them again")
    return lines
