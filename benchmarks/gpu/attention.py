"""The stage that asks whether attention in one call is right on this device: each operator that it
has, against the reference loop, from irregular starts, in windows, with and without shared
heads."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from shapes import Setup, relative_error
from torch import Tensor

from lorabatch.model import varlen
from lorabatch.model.varlen import EFFICIENT, FLASH, LOOP, Extents

# in units of each type's own rounding, as a share of the result's norm
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}
SHARED, DIM, CAPACITY = 2, 64, 256
# (tokens before, new ones) of each sequence: single tokens, prompts, pieces, mixed
STEPS = {
    "decode": [(200, 1), (7, 1), (0, 1), (63, 1)],
    "prefill": [(0, 70), (0, 1), (0, 200)],
    "mixed": [(100, 1), (0, 90), (64, 30), (5, 1)],
}


def kinds(setup: Setup) -> Iterator[tuple[str, torch.dtype]]:
    if not setup.gpu:
        yield LOOP, torch.float32
        return
    new = torch.cuda.get_device_capability(setup.device) >= (8, 0)
    for dtype in (torch.bfloat16, torch.float16) if new else (torch.float16,):
        yield from (((FLASH, dtype),) if new else ())
        yield EFFICIENT, dtype
    yield EFFICIENT, torch.float32


def attention(setup: Setup) -> Iterator[dict[str, Any]]:
    for kind, dtype in kinds(setup):
        with mock.patch.object(varlen, "operator_for", lambda *_, kind=kind: kind):
            for (name, pieces), groups, window in itertools.product(
                STEPS.items(), (1, 3, 7), (None, 33)
            ):
                facts = {"operator": kind, "dtype": str(dtype), "groups": groups, "window": window}
                got, expected = step(setup, dtype, pieces, groups, window)
                yield {"what": name, **facts, **judged(got, expected, dtype)}
                if name == "prefill":
                    for each in zip(*gradients(setup, dtype, pieces, groups, window), strict=True):
                        yield {"what": "gradient", **facts, **judged(*each, dtype)}


def judged(got: Tensor, expected: Tensor, dtype: torch.dtype) -> dict[str, Any]:
    error = relative_error(got, expected)
    return {"relative_error": error, "ok": error < TOLERANCE[dtype]}


def step(
    setup: Setup, dtype: torch.dtype, pieces: list[tuple[int, int]], groups: int, window: int | None
) -> tuple[Tensor, Tensor]:
    """Of a cache whose other positions hold NaN; on a GPU replayed from a graph, other numbers than
    it was captured with."""
    counts, lengths = [n for _, n in pieces], [start + n for start, n in pieces]
    firsts = [CAPACITY * (len(pieces) - 1 - i) for i in range(len(pieces))]
    q = torch.randn(sum(counts), groups * SHARED, DIM, device=setup.device).to(dtype)
    keys, values = (
        torch.full((CAPACITY * len(pieces), SHARED, DIM), torch.nan, device=setup.device).to(dtype)
        for _ in "kv"
    )
    extents = Extents(
        varlen.ints([0, *itertools.accumulate(counts)], setup.device, torch.int32),
        varlen.ints([*firsts, 0], setup.device, torch.int32),
        varlen.ints(lengths, setup.device, torch.int32),
        max(counts),
        max(lengths),
    )

    def fill() -> None:
        for first, n in zip(firsts, lengths, strict=True):
            for cache in (keys, values):
                cache[first : first + n].normal_()

    fill()
    got = varlen.attend(q, keys, values, extents, window)
    if setup.gpu:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = varlen.attend(q, keys, values, extents, window)
        fill()
        graph.replay()
    reference = (t.cpu().float() for t in (q, keys, values))
    on_cpu = Extents(
        *(t.cpu() for t in (extents.q_starts, extents.k_starts, extents.k_lengths)), 0, 0
    )
    return got, varlen.loop(*reference, on_cpu, window)


def gradients(
    setup: Setup, dtype: torch.dtype, pieces: list[tuple[int, int]], groups: int, window: int | None
) -> tuple[list[Tensor], list[Tensor]]:
    """Of q, k and v of a packed block."""
    counts = [n for _, n in pieces]
    starts = torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32)
    heads = (groups * SHARED, SHARED, SHARED)
    inputs = [torch.randn(sum(counts), n, DIM).to(dtype) for n in heads]
    upstream = torch.randn(sum(counts), heads[0], DIM).to(dtype)
    found = []
    for device, attend in ((setup.device, varlen.attend_packed), ("cpu", varlen.loop)):
        places = Extents(starts.to(device), starts.to(device), None, max(counts), max(counts))
        kind = dtype if device == setup.device else torch.float32
        leaves = [t.to(device, kind).requires_grad_() for t in inputs]
        attend(*leaves, places, window).backward(upstream.to(device, kind))
        found.append([t.grad for t in leaves])
    return found[0], found[1]
