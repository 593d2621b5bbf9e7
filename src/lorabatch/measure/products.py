"""The matrix products that ceilings are measured with: [rows, inputs] x [inputs, outputs] with a frozen weight, by torch and by our kernels.

Hot: one weight again and again, so that it stays in the cache. Cold: many weights in turn, together well beyond the caches,
as in a model, whose layers push each other out. A run is held against the cold rate: the hot one is more than any model reaches,
and by how much differs between machines.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lorabatch.kernels import library
from lorabatch.model.device import TYPES, free_bytes
from lorabatch.model.linear import Dense, Prepacked, Product, can_prepack

COLD_BYTES = 1 << 28  # of all weights together; less where memory is short
INT8_ZERO_POINT = 128  # unsigned activations: signed ones fall to a reference loop in oneDNN
SCALE_FLOATS = 16  # RowScale of step.cpp

Calls = list[Callable[[], object]]  # the same product with one weight after another
OfRows = Callable[[int], Calls]


def gemm_rates(
    name: str, device: torch.device, *, shapes: Sequence[tuple[int, int]], rows: Sequence[int], seconds: float, cold: bool = False
) -> Iterator[dict[str, Any]]:
    """One record per kernel, shape and number of rows, of type ``name`` (of torch, or int8)."""
    for inputs, outputs in shapes:
        size = outputs * inputs * (1 if name == "int8" else TYPES[name].itemsize)
        copies = -(-cold_bytes(device) // size) if cold else 1
        for kernel, of_rows in _kernels(name, device, inputs, outputs, copies):
            for count in rows:
                if (least_s := best_seconds(of_rows(count), device, seconds)) is not None:
                    about = {"dtype": name, "kernel": kernel, "rows": count, "inputs": inputs, "outputs": outputs}
                    flops_per_s = 2.0 * count * inputs * outputs / least_s
                    yield {**about, "cold": cold, "weights_bytes": copies * size, "flops_per_s": flops_per_s}


def cold_bytes(device: torch.device) -> int:
    return min(COLD_BYTES, free_bytes(device) // 4)


def best_seconds(calls: Calls, device: torch.device, budget_s: float) -> float | None:
    """Of the shortest call; None without any. The first one warms up; cold weights are not met again before all others were."""
    if not calls:
        return None

    def once(run: Callable[[], object]) -> float:
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    once(calls[0])
    best, end, number = float("inf"), time.perf_counter() + budget_s, 0
    while number == 0 or time.perf_counter() < end:
        number += 1
        best = min(best, once(calls[number % len(calls)]))
    return best


def _kernels(name: str, device: torch.device, inputs: int, outputs: int, copies: int) -> Iterator[tuple[str, OfRows]]:
    if name == "int8":
        yield "qlinear", lambda rows: _qlinear(rows, inputs, outputs, copies)
    else:
        yield from _torchs(TYPES[name], device, inputs, outputs, copies)
    if device.type == "cpu" and (own := own_product(name, inputs, outputs, copies)) is not None:
        yield "own", own


def _torchs(dtype: torch.dtype, device: torch.device, inputs: int, outputs: int, copies: int) -> Iterator[tuple[str, OfRows]]:
    weight = torch.ones(outputs, inputs, dtype=dtype, device=device)

    def of_rows(products: Sequence[Product], rows: int) -> Calls:
        x = torch.ones(rows, inputs, dtype=dtype, device=device)
        return [functools.partial(product.forward, x, None) for product in products]

    for kernel, make in (("linear", lambda: Dense(weight.clone())), ("prepacked", lambda: Prepacked(weight))):
        if kernel == "linear" or (device.type == "cpu" and can_prepack(dtype)):
            products = [make() for _ in range(copies)]
            yield kernel, functools.partial(of_rows, products)
            products.clear()  # their memory, before the next kernel's weights are made


def _qlinear(rows: int, inputs: int, outputs: int, copies: int) -> Calls:
    """u8 activations times s8 weights through oneDNN, bf16 out. Nothing where this build lacks the private operators."""
    x, scales, zeros = torch.ones(rows, inputs, dtype=torch.uint8), torch.ones(outputs), torch.zeros(outputs, dtype=torch.int64)

    def run(packed: Tensor) -> object:
        return torch.ops.onednn.qlinear_pointwise(
            x, 1.0, INT8_ZERO_POINT, packed, scales, zeros, None, 1.0, 0, torch.bfloat16, "none", [], ""
        )

    with suppress(RuntimeError, AttributeError, NotImplementedError):
        weight = torch.ones(outputs, inputs, dtype=torch.int8)
        packed = [torch.ops.onednn.qlinear_prepack(weight, [rows, inputs]) for _ in range(copies)]
        run(packed[0])
        return [functools.partial(run, weight) for weight in packed]
    return []


def own_product(name: str, inputs: int, outputs: int, copies: int) -> OfRows | None:
    """The product of our kernels, as the recorded program calls it; None where no kernel serves this type. Each call returns its rows."""
    kernels = library("step")
    if kernels is None or name not in ("fp32", "bf16", "int8"):
        return None
    program, packed = (importlib.import_module(f"lorabatch.infer.{module}") for module in ("program", "packed"))  # of a higher layer
    dtype, quantised = TYPES.get(name, torch.bfloat16), name == "int8"
    first = packed.pack(torch.ones(outputs, inputs, dtype=dtype), quantize="int8" if quantised else "none")
    weights = [first, *(replace(first, panels=first.panels.clone()) for _ in range(copies - 1))]

    def of_rows(rows: int) -> Calls:
        x = torch.full((rows, inputs), INT8_ZERO_POINT + 1, dtype=torch.uint8) if quantised else torch.ones(rows, inputs, dtype=dtype)
        scales, out, zeros = torch.zeros(rows, SCALE_FLOATS), torch.empty(rows, outputs, dtype=dtype), torch.zeros(rows, dtype=torch.int32)
        scales[:, 0] = 1  # the rest are outliers, none
        step = program._Step(bf16=int(dtype == torch.bfloat16), tokens=rows, threads=torch.get_num_threads())
        step.max_tokens, step.num_slots, step.vocab_size, step.capacity = rows, 1, 1, 1
        step.token_ids = step.positions = step.slots = zeros.data_ptr()
        fixed = {"kind": program.PRODUCT, "mode": program.OVERWRITE, "weight": int(quantised), "n": outputs, "k": inputs}
        fixed |= {"a": x.data_ptr(), "out": out.data_ptr(), "scales": scales.data_ptr()}

        def run(weight: Any, *_: Tensor) -> Tensor:
            columns = {key: None if t is None else t.data_ptr() for key, t in (("c", weight.scales), ("d", weight.sums))}
            operation = program._Op(**fixed, **columns, b=weight.panels.data_ptr())
            wrong = kernels.lb_run(ctypes.c_void_p(ctypes.addressof(operation)), ctypes.c_int64(1), ctypes.c_void_p(ctypes.addressof(step)))
            assert not wrong, program.MISFITS[wrong]
            return out

        return [functools.partial(run, weight, x, scales, zeros) for weight in weights]  # the step only has their addresses

    return of_rows
