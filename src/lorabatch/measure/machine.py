"""How fast this machine can be: measured ceilings that every throughput is held against.

``lorabatch bench machine`` measures all of them; a run that needs one which was never measured here
measures that one. Both keep the result per host, processor, torch version, device and number of
threads, so that runs on one machine are held against the same figures. A figure that was taken while
others used the machine is too low: the first runs measure again, and the largest stays.
"""

from __future__ import annotations

import hashlib
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from lorabatch import hub
from lorabatch.config import BenchMachineConfig
from lorabatch.errors import DataError, UnavailableError
from lorabatch.measure.environment import environment, gpu_description
from lorabatch.measure.peaks import PEAKS, known_peak
from lorabatch.model.device import TYPE_NAMES, TYPES, choose_device, choose_threads, cpu_has_bf16
from lorabatch.model.linear import Prepacked, can_prepack
from lorabatch.records import read_json, utc_now, write_json

CPU_SHAPES = ((576, 1536), (2048, 2048))  # (inputs, outputs): SmolLM2-135M's MLP, and one beyond small models
GPU_SHAPES = ((2048, 2048), (8192, 8192))
CPU_ROWS, GPU_ROWS = (1, 16, 64, 256, 1024), (1, 16, 256, 2048, 8192)
MEASUREMENTS = 3  # processes that measure a ceiling before it is taken for granted
_measured_here: set[tuple[Path, str]] = set()
INT8_ZERO_POINT = 128  # unsigned activations: signed ones fall to a reference loop in oneDNN


def measured_flops_per_s(dtype: torch.dtype, device: torch.device) -> float:
    """Best rate of a matrix product of this type, over kernels and shapes."""
    shapes, rows = (CPU_SHAPES, CPU_ROWS) if device.type == "cpu" else (GPU_SHAPES, GPU_ROWS)
    return _remembered(
        f"{TYPE_NAMES[dtype]}_flops_per_s",
        device,
        lambda: max(r["flops_per_s"] for r in gemm_rates(TYPE_NAMES[dtype], device, shapes=shapes, rows=rows[-2:], seconds=0.1)),
    )


def measured_bytes_per_s(device: torch.device) -> float:
    """Best rate of reading memory: the sum of a tensor far larger than the caches."""
    return _remembered("read_bytes_per_s", device, lambda: bandwidth(device, seconds=0.3)["read_bytes_per_s"])


def bandwidth(device: torch.device, *, seconds: float) -> dict[str, float]:
    """Bytes/s of reading, and of copying (every byte counted twice: once read, once written)."""
    x = torch.ones((1 << 26) if device.type == "cpu" else (1 << 30), dtype=torch.float32, device=device)
    y = torch.empty_like(x)
    return {
        "read_bytes_per_s": x.nbytes / _best_seconds(lambda: x.sum(), device, seconds),
        "copy_bytes_per_s": 2 * x.nbytes / _best_seconds(lambda: y.copy_(x), device, seconds),
    }


def gemm_rates(
    name: str, device: torch.device, *, shapes: tuple[tuple[int, int], ...], rows: tuple[int, ...], seconds: float
) -> Iterator[dict[str, Any]]:
    """One record per kernel, shape and number of rows: [rows, inputs] x [inputs, outputs] of type ``name`` (or int8)."""
    for inputs, outputs in shapes:
        for count in rows:
            for kernel, run in _kernels(name, device, count, inputs, outputs):
                flops = 2.0 * count * inputs * outputs / _best_seconds(run, device, seconds)
                yield {"dtype": name, "kernel": kernel, "rows": count, "inputs": inputs, "outputs": outputs, "flops_per_s": flops}


def _kernels(name: str, device: torch.device, rows: int, inputs: int, outputs: int) -> Iterator[tuple[str, Callable[[], object]]]:
    if name == "int8":
        with suppress(RuntimeError, AttributeError, NotImplementedError):  # private operators: this build may lack them
            yield "qlinear", _int8_product(rows, inputs, outputs)
        return
    weight, x = (torch.ones(n, inputs, dtype=TYPES[name], device=device) for n in (outputs, rows))
    yield "linear", lambda: F.linear(x, weight)
    if device.type == "cpu" and can_prepack(TYPES[name]):
        product = Prepacked(weight)
        yield "prepacked", lambda: product.forward(x, None)


def _int8_product(rows: int, inputs: int, outputs: int) -> Callable[[], object]:
    """u8 activations times s8 weights through oneDNN, bf16 out. Runs once here, so that a missing operator shows."""
    packed = torch.ops.onednn.qlinear_prepack(torch.ones(outputs, inputs, dtype=torch.int8), [rows, inputs])
    x, scales, zeros = torch.ones(rows, inputs, dtype=torch.uint8), torch.ones(outputs), torch.zeros(outputs, dtype=torch.int64)

    def run() -> object:
        return torch.ops.onednn.qlinear_pointwise(
            x, 1.0, INT8_ZERO_POINT, packed, scales, zeros, None, 1.0, 0, torch.bfloat16, "none", [], ""
        )

    run()
    return run


def _best_seconds(run: Callable[[], object], device: torch.device, budget_s: float) -> float:
    def once() -> float:
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    once()
    best, end = once(), time.perf_counter() + budget_s
    while time.perf_counter() < end:
        best = min(best, once())
    return best


def cache_file(device: torch.device) -> Path:
    """Where this machine's ceilings are kept: one file for each thing that changes them."""
    folder = Path(os.environ.get("LORABATCH_CEILINGS") or hub.converted_folder() / "ceilings").expanduser()
    parts = [environment()["cpu"], torch.__version__, str(device), torch.get_num_threads(), gpu_description()]
    return folder / f"{platform.node() or 'host'}-{hashlib.sha256(repr(parts).encode()).hexdigest()[:12]}.json"


def _remembered(name: str, device: torch.device, measure: Callable[[], float]) -> float:
    path = cache_file(device)
    kept: dict[str, Any] = {}
    with suppress(DataError):  # missing or torn: measured anew
        kept = read_json(path)
    value, times = float(kept.get(name) or 0.0), dict(kept.get("measurements") or {})
    if value and (times.get(name, 0) >= MEASUREMENTS or (path, name) in _measured_here):
        return value
    _measured_here.add((path, name))
    value, times[name] = max(value, measure()), times.get(name, 0) + 1
    _keep(path, kept | {name: value, "measurements": times, "measured_at": utc_now()})
    return value


def _keep(path: Path, record: dict[str, Any]) -> None:
    with suppress(OSError, UnavailableError):  # a cache: a read-only home costs a second per run, not the run
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, record)


def measure_machine(config: BenchMachineConfig) -> dict[str, Any]:
    """All ceilings of this machine; what runs will be held against from now on."""
    device, threads = choose_device(no_cuda=config.no_cuda), choose_threads(config.threads)
    cpu = device.type == "cpu"
    shapes, rows = (CPU_SHAPES, CPU_ROWS) if cpu else (GPU_SHAPES, GPU_ROWS)
    types = ["fp32", *(["bf16"] if not cpu or cpu_has_bf16() else []), "int8" if cpu else "fp16"]
    gemm = [r for name in types for r in gemm_rates(name, device, shapes=shapes, rows=rows, seconds=config.seconds)]
    best = {f"{name}_flops_per_s": max((r["flops_per_s"] for r in gemm if r["dtype"] == name), default=None) for name in types}
    gpu, env = gpu_description(), environment()
    peak = known_peak(gpu["name"], gpu["memory_bytes"]) if gpu else None
    record = {
        "schema_version": 1,
        "kind": "bench machine",
        "environment": env,
        "device": str(device),
        "gpu": gpu,
        "threads": threads,
        "measured_at": utc_now(),
        **bandwidth(device, seconds=5 * config.seconds),
        **best,
        "gemm": gemm,
        "vendor_peak": None if peak is None else {"name": peak.name, **peak.flops_per_s, "bytes_per_s": peak.bytes_per_s},
    }
    figures = ("read_bytes_per_s", *best)
    _keep(cache_file(device), record | {"measurements": dict.fromkeys(figures, MEASUREMENTS)})
    return record


def run_bench_machine(config: BenchMachineConfig) -> int:
    """Measure, keep, print; with ``config.output`` also write the record there."""
    record = measure_machine(config)
    host = record["environment"]
    name = record["gpu"]["name"] if record["gpu"] else host["cpu"]
    print(f"{host['host']}: {name}, {record['device']}, {record['threads']} threads, torch {host['packages']['torch']}")
    print(
        f"\n  {'type':6}{'kernel':11}{'inputs x outputs':>18}"
        + "".join(f"{f'{n} rows':>11}" for n in sorted({r["rows"] for r in record["gemm"]}))
    )
    series: dict[tuple[str, str, str], list[float]] = {}
    for r in record["gemm"]:
        series.setdefault((r["dtype"], r["kernel"], f"{r['inputs']} x {r['outputs']}"), []).append(r["flops_per_s"])
    for (dtype, kernel, shape), rates in series.items():
        print(f"  {dtype:6}{kernel:11}{shape:>18}" + "".join(f"{rate / 1e9:11.0f}" for rate in rates) + "  Gflop/s")
    print("\n" + "\n".join(f"  {what:5} {record[f'{what}_bytes_per_s'] / 1e9:8.1f} GB/s" for what in ("read", "copy")))
    print(
        f"\n  {'promised by the vendor':24}" + "".join(f"{head:>16}" for head in ("bf16 Tflop/s", "fp16 Tflop/s", "fp32 Tflop/s", "GB/s"))
    )
    for peak in PEAKS:
        rates_shown = [f"{peak.flops_per_s[t] / 1e12:.1f}" if t in peak.flops_per_s else "-" for t in ("bf16", "fp16", "fp32")]
        print(f"  {peak.name:24}" + "".join(f"{text:>16}" for text in (*rates_shown, f"{peak.bytes_per_s / 1e9:.0f}")))
    print(f"\nkept for the runs on this machine: {cache_file(choose_device(no_cuda=config.no_cuda))}")
    if config.output:
        write_json(Path(config.output), record)
        print(config.output)
    return 0
