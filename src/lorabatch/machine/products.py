"""The matrix products that ceilings are measured with: [rows, inputs] x [inputs, outputs] with a
frozen weight, by torch and by our kernels.

Hot: one weight again and again, so that it stays in the cache. Cold: many weights in turn, together
well beyond the caches, as in a model, whose layers push each other out. A run is held against the
cold rate: the hot one is more than any model reaches, and by how much differs between machines.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace

import torch
from torch import Tensor

from lorabatch.kernels import library
from lorabatch.kernels.api import CData, constants, ffi, pointer, type_of
from lorabatch.kernels.onednn import Dense, Prepacked, Product, can_prepack
from lorabatch.kernels.panels import PackedWeight, pack, row_scales
from lorabatch.kernels.step import replay
from lorabatch.machine.device import TYPES, free_bytes
from lorabatch.schema import Record

COLD_BYTES = 1 << 28  # of all weights together; less where memory is short
INT8_ZERO_POINT = 128  # unsigned activations: signed ones fall to a reference loop in oneDNN

Calls = list[Callable[[], object]]  # the same product with one weight after another
OfRows = Callable[[int], Calls]


def gemm_rates(
    name: str,
    device: torch.device,
    *,
    shapes: Sequence[tuple[int, int]],
    rows: Sequence[int],
    seconds: float,
    cold: bool = False,
) -> Iterator[Record]:
    """One record per kernel, shape and number of rows, of type ``name`` (of torch, or int8)."""
    for inputs, outputs in shapes:
        size = outputs * inputs * (1 if name == "int8" else TYPES[name].itemsize)
        copies = -(-cold_bytes(device) // size) if cold else 1
        for kernel, of_rows in _kernels(name, device, inputs, outputs, copies):
            for count in rows:
                if (least_s := best_seconds(of_rows(count), device, seconds)) is not None:
                    yield {
                        "dtype": name,
                        "kernel": kernel,
                        "rows": count,
                        "inputs": inputs,
                        "outputs": outputs,
                        "cold": cold,
                        "weights_bytes": copies * size,
                        "flops_per_s": 2.0 * count * inputs * outputs / least_s,
                    }


def cold_bytes(device: torch.device) -> int:
    return min(COLD_BYTES, free_bytes(device) // 4)


def best_seconds(calls: Calls, device: torch.device, budget_s: float) -> float | None:
    """Of the shortest call; None without any. The first one warms up; cold weights are not met
    again before all others were."""
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


def _kernels(
    name: str, device: torch.device, inputs: int, outputs: int, copies: int
) -> Iterator[tuple[str, OfRows]]:
    if name == "int8":
        yield "qlinear", lambda rows: _qlinear(rows, inputs, outputs, copies)
    else:
        yield from _torchs(TYPES[name], device, inputs, outputs, copies)
    if device.type == "cpu" and (own := own_product(name, inputs, outputs, copies)) is not None:
        yield "own", own


def _torchs(
    dtype: torch.dtype, device: torch.device, inputs: int, outputs: int, copies: int
) -> Iterator[tuple[str, OfRows]]:
    # GPUs multiply constants faster than numbers: they take less power
    filled = torch.randn if device.type == "cuda" else torch.ones
    weight = filled(outputs, inputs, dtype=dtype, device=device)

    def of_rows(products: Sequence[Product], rows: int) -> Calls:
        x = filled(rows, inputs, dtype=dtype, device=device)
        return [functools.partial(product.forward, x, None) for product in products]

    for kernel, make in (
        ("linear", lambda: Dense(weight.clone())),
        ("prepacked", lambda: Prepacked(weight)),
    ):
        if kernel == "linear" or (device.type == "cpu" and can_prepack(dtype)):
            products = [make() for _ in range(copies)]
            yield kernel, functools.partial(of_rows, products)
            products.clear()  # their memory, before the next kernel's weights are made


def _qlinear(rows: int, inputs: int, outputs: int, copies: int) -> Calls:
    """u8 activations times s8 weights through oneDNN, bf16 out. Nothing where this build lacks the
    private operators."""
    x, scales, zeros = (
        torch.ones(rows, inputs, dtype=torch.uint8),
        torch.ones(outputs),
        torch.zeros(outputs, dtype=torch.int64),
    )

    def run(packed: Tensor) -> object:
        return torch.ops.onednn.qlinear_pointwise(
            x,
            1.0,
            INT8_ZERO_POINT,
            packed,
            scales,
            zeros,
            None,
            1.0,
            0,
            torch.bfloat16,
            "none",
            [],
            "",
        )

    with suppress(RuntimeError, AttributeError, NotImplementedError):
        weight = torch.ones(outputs, inputs, dtype=torch.int8)
        packed = [torch.ops.onednn.qlinear_prepack(weight, [rows, inputs]) for _ in range(copies)]
        run(packed[0])
        return [functools.partial(run, weight) for weight in packed]
    return []


def own_product(name: str, inputs: int, outputs: int, copies: int) -> OfRows | None:
    """The product of our kernels, as the recorded program calls it; None where no kernel serves
    this type. Each call returns its rows."""
    kernels = library("step")
    if kernels is None or name not in ("fp32", "bf16", "int8"):
        return None
    dtype, quantised = TYPES.get(name, torch.bfloat16), name == "int8"
    first = pack(torch.ones(outputs, inputs, dtype=dtype), quantize="int8" if quantised else "none")
    weights = [first, *(replace(first, panels=first.panels.clone()) for _ in range(copies - 1))]

    def of_rows(rows: int) -> Calls:
        x = (
            torch.full((rows, inputs), constants().ZERO_POINT + 1, dtype=torch.uint8)
            if quantised
            else torch.ones(rows, inputs, dtype=dtype)
        )
        out, scales = torch.empty(rows, outputs, dtype=dtype), row_scales(rows, scale=1.0)
        return [_own_call(kernels, x, weight, scales, out) for weight in weights]

    return of_rows


def _own_call(
    kernels: CData, x: Tensor, weight: PackedWeight, scales: Tensor, out: Tensor
) -> Callable[[], Tensor]:
    """The recorded program's product x [T, I] -> out [T, O]; scales: of 8-bit rows."""
    c = constants()
    product = {
        "kind": c.PRODUCTS,
        "mode": c.OVERWRITE,
        "weight": c.NATIVE if weight.scales is None else c.INT8,
        "n": out.shape[1],
        "k": x.shape[1],
        "a": pointer(x),
        "b": pointer(weight.panels),
        "c": pointer(weight.scales),
        "d": pointer(weight.sums),
        "out": pointer(out),
        "scales": pointer(scales),
    }
    ops, inputs = ffi().new("struct Op[]", [product]), ffi().new("int32_t[]", len(x))
    step = _step_of_one_operation(out, inputs)

    def run(*_held: object) -> Tensor:
        replay(kernels, ops, step)
        return out

    # the structs only have addresses: the call holds what is there
    return functools.partial(run, x, weight, scales, inputs)


def _step_of_one_operation(out: Tensor, inputs: CData) -> CData:
    """struct Step *, as large as ``out``; inputs: a zero for each row."""
    fields = {
        "type": type_of(out.dtype),
        "tokens": len(out),
        "max_tokens": len(out),
        "threads": torch.get_num_threads(),
        **dict.fromkeys(("token_ids", "positions", "slots"), inputs),
        **dict.fromkeys(("num_slots", "vocab_size", "capacity"), 1),
    }
    return ffi().new("struct Step *", fields)
