"""How fast this machine can be: measured ceilings that every throughput is held against."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from lorabatch.model.linear import Dense, Prepacked, can_prepack


def measured_flops_per_s(dtype: torch.dtype, device: torch.device, *, rows: int = 1024, seconds: float = 0.3) -> float:
    """Best rate of a [rows, 576] x [576, 1536] product as the decoder would run it (bigger on GPUs)."""
    k, n = (576, 1536) if device.type == "cpu" else (8192, 8192)
    rows = rows if device.type == "cpu" else 8192
    weight, x = torch.ones(n, k, dtype=dtype, device=device), torch.ones(rows, k, dtype=dtype, device=device)
    product = Prepacked(weight) if device.type == "cpu" and can_prepack(dtype) else Dense(weight)
    return 2.0 * rows * k * n / _best_seconds(lambda: product.forward(x, None), device, seconds)


def measured_bytes_per_s(device: torch.device, *, seconds: float = 0.3) -> float:
    """Best rate of reading memory: the sum of a tensor far larger than the caches."""
    elements = (1 << 26) if device.type == "cpu" else (1 << 30)
    x = torch.ones(elements, dtype=torch.float32, device=device)
    return 4.0 * elements / _best_seconds(lambda: x.sum(), device, seconds)


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
