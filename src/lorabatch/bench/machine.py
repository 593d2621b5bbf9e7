"""``lorabatch bench machine``: all ceilings of this machine; what later runs are compared with."""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import torch

from lorabatch.config_measure import BenchMachineConfig
from lorabatch.kernels.facts import facts
from lorabatch.machine.ceilings import (
    COLD,
    CPU_ROWS,
    CPU_SHAPES,
    GPU_ROWS,
    GPU_SHAPES,
    HOT,
    MEASUREMENTS,
    bandwidth,
    cache_file,
    keep,
    kept_ceilings,
)
from lorabatch.machine.device import choose_device, choose_threads, cpu_has_bf16
from lorabatch.machine.environment import environment, gpu_description
from lorabatch.machine.peaks import PEAKS, known_peak
from lorabatch.machine.products import gemm_rates
from lorabatch.machine.waits import Watch, disturbed, probe
from lorabatch.progress import counted
from lorabatch.records import utc_now, write_json
from lorabatch.schema import Fields, Record

TRIES = 3  # of ``bench machine`` at a figure, until others leave it the cores
QUIET_TRIES, PAUSE_S = 15, 2.0  # it waits for them first, about half a minute at most
PEAK_TYPES = ("bf16", "fp16", "fp32")
T = TypeVar("T")


def wait_for_quiet(cores: int) -> None:
    """Until others leave the cores, or patience ends: then each figure says how it was taken."""
    for attempt in range(QUIET_TRIES):
        if not disturbed(probe(cores)):
            return
        if not attempt:
            most_s = QUIET_TRIES * PAUSE_S
            print(
                f"others have the cores: waiting at most {most_s:.0f} s for them", file=sys.stderr
            )
        time.sleep(PAUSE_S)


def undisturbed(measure: Callable[[], T], tries: int = TRIES) -> tuple[T, float | None]:
    """(what ``measure`` gave, share of its time that it waited for cores): tried again while others
    have them; the least disturbed stays."""
    found: list[tuple[float, T]] = []
    while len(found) < tries and (not found or disturbed(min(share for share, _ in found))):
        with Watch() as watch:
            result = measure()
        if watch.share is None:
            return result, None
        found.append((watch.share, result))
    share, result = min(found, key=lambda pair: pair[0])
    return result, share


def measure_machine(config: BenchMachineConfig) -> Record:
    """All ceilings of this machine; what runs are compared with from now on."""
    device, threads = choose_device(no_cuda=config.no_cuda), choose_threads(config.threads)
    cpu, gpu = device.type == "cpu", gpu_description()
    wait_for_quiet(threads)
    ceilings, waited, gemm = _measure_products(device, config.seconds)
    memory, waited["read_bytes_per_s"] = undisturbed(
        lambda: bandwidth(device, seconds=5 * config.seconds)
    )
    record = {
        "schema_version": 1,
        "kind": "bench machine",
        "environment": environment(),
        "device": str(device),
        "gpu": gpu,
        "threads": threads,
        "kernels": facts() if cpu else None,
        "measured_at": utc_now(),
        **memory,
        **ceilings,
        "waited_shares": waited,
        "gemm": gemm,
        "vendor_peak": _vendor_peak(gpu) if gpu else None,
    }
    keep(cache_file(device), record | _lasting(record, kept_ceilings(device)))
    return record


def _measure_products(
    device: torch.device, seconds: float
) -> tuple[dict[str, float | None], dict[str, float | None], list[Record]]:
    """(the fastest of each type, with hot and with cold weights; how long each waited for cores;
    every product that was measured)."""
    cpu = device.type == "cpu"
    shapes, rows = (CPU_SHAPES, CPU_ROWS) if cpu else (GPU_SHAPES, GPU_ROWS)
    types = ["fp32", *(["bf16"] if not cpu or cpu_has_bf16() else []), "int8" if cpu else "fp16"]
    ceilings: dict[str, float | None] = {}
    waited: dict[str, float | None] = {}
    gemm: list[Record] = []
    for name, end in itertools.product(types, (HOT, COLD)):

        def measure(name: str = name, cold: bool = end == COLD) -> list[Record]:
            return list(
                gemm_rates(name, device, shapes=shapes, rows=rows, seconds=seconds, cold=cold)
            )

        figure = f"{name}_{end}"
        rates, waited[figure] = undisturbed(measure)
        ceilings[figure] = max((r["flops_per_s"] for r in rates), default=None)
        gemm += rates
    return ceilings, waited, gemm


def _vendor_peak(gpu: Fields) -> Record | None:
    peak = known_peak(gpu["name"], gpu["memory_bytes"])
    if peak is None:
        return None
    return {"name": peak.name, **peak.flops_per_s, "bytes_per_s": peak.bytes_per_s}


def _lasting(record: Fields, kept: Fields) -> Record:
    """Which figures need no other measurement. A disturbed one does, and replaces none that was
    larger."""
    bad = [figure for figure, share in record["waited_shares"].items() if disturbed(share)]
    times = {figure: 0 if figure in bad else MEASUREMENTS for figure in record["waited_shares"]}
    return {"measurements": times} | {
        figure: max(record[figure] or 0.0, float(kept.get(figure) or 0.0)) for figure in bad
    }


def run_bench_machine(config: BenchMachineConfig, command: list[str]) -> int:
    """Measure, keep, print; with ``config.output`` also write the record there."""
    record = measure_machine(config)
    print("\n".join(_lines(record)))
    print(
        f"\nkept for the runs on this machine: {cache_file(choose_device(no_cuda=config.no_cuda))}"
    )
    if config.output:
        write_json(Path(config.output), record)
        print(config.output)
    return 0


def _lines(record: Fields) -> list[str]:
    return [
        *_described(record),
        *_product_lines(record["gemm"]),
        "",
        *(
            f"  {what:5} {record[f'{what}_bytes_per_s'] / 1e9:8.1f} GB/s"
            for what in ("read", "copy")
        ),
        *_peak_lines(),
        *_waited_lines(record["waited_shares"]),
    ]


def _described(record: Fields) -> Iterator[str]:
    host, kernels = record["environment"], record["kernels"]
    name = record["gpu"]["name"] if record["gpu"] else host["cpu"]
    yield (
        f"{host['host']}: {name}, {record['device']}, {counted(record['threads'], 'thread')}, "
        f"torch {host['packages']['torch']}"
    )
    if kernels:
        why_not = f" ({kernels['why_not']})" if kernels["why_not"] else ""
        yield f"kernels: {kernels['variant'] or 'none'}{why_not}"


def _product_lines(gemm: Sequence[Fields]) -> Iterator[str]:
    """One a type, kernel, shape and kind of weights; one column a number of rows."""
    counts = sorted({r["rows"] for r in gemm})
    yield (
        f"\n  {'type':6}{'kernel':11}{'inputs x outputs':>18}  {'weights':8}"
        + "".join(f"{f'{n} rows':>11}" for n in counts)
    )
    series: dict[str, list[float]] = {}
    for r in gemm:
        shape, kind = f"{r['inputs']} x {r['outputs']}", "cold" if r["cold"] else "hot"
        head = f"  {r['dtype']:6}{r['kernel']:11}{shape:>18}  {kind:8}"
        series.setdefault(head, []).append(r["flops_per_s"])
    for head, rates in series.items():
        yield head + "".join(f"{rate / 1e9:11.0f}" for rate in rates) + "  Gflop/s"


def _peak_lines() -> Iterator[str]:
    heads = *(f"{name} Tflop/s" for name in PEAK_TYPES), "GB/s"
    yield f"\n  {'promised by the vendor':24}" + "".join(f"{head:>16}" for head in heads)
    for peak in PEAKS:
        shown = [
            f"{peak.flops_per_s[name] / 1e12:.1f}" if name in peak.flops_per_s else "-"
            for name in PEAK_TYPES
        ]
        cells = (*shown, f"{peak.bytes_per_s / 1e9:.0f}")
        yield f"  {peak.name:24}" + "".join(f"{text:>16}" for text in cells)


def _waited_lines(shares: Mapping[str, float | None]) -> Iterator[str]:
    bad = [f"{figure} ({share:.0%})" for figure, share in shares.items() if disturbed(share)]
    if bad:
        yield (
            f"\nothers had the cores (waited, of the time computed): {', '.join(bad)}: too low, so "
            "runs will measure them again"
        )
