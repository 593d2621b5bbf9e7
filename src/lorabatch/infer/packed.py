"""Weights and adapters in the layout of the CPU kernels (``lorabatch/kernels/gemm.h``).

Shapes: O output features, I input features, r rank.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorabatch.infer.low_rank import fused_pair, part_ranks
from lorabatch.kernels import library
from lorabatch.model.linear import FrozenLinear
from lorabatch.model.lora import LoraWeights

PANEL = 48


@dataclass(frozen=True)
class PackedWeight:
    """A weight [O, I] in the kernels' panels. int8: also one scale per row, and 128 times the sum of each row's values."""

    panels: Tensor
    scales: Tensor | None
    sums: Tensor | None


def pack(weight: Tensor, *, quantize: str) -> PackedWeight:
    """int8: symmetric per output row, the largest magnitude becomes 127."""
    rows = -(-weight.shape[0] // PANEL) * PANEL
    if quantize == "none":
        return PackedWeight(_panels(weight, rows), None, None)
    wide = weight.float()
    scales = wide.abs().amax(dim=1) / 127
    values = (wide / scales.clamp(min=1e-30)[:, None]).round().to(torch.int8)
    padded = torch.zeros(2, rows)
    padded[0, : len(scales)], padded[1, : len(scales)] = scales, 128 * values.sum(dim=1, dtype=torch.float32)
    return PackedWeight(_panels(values, rows), padded[0].contiguous(), padded[1].to(torch.int32))


def _panels(values: Tensor, rows: int) -> Tensor:
    values = values.contiguous()
    out = torch.empty(rows, values.shape[1], dtype=values.dtype)
    kernels = library("step")
    assert kernels is not None  # ``unsupported`` was asked first
    count = [ctypes.c_int64(x) for x in (*values.shape, values.element_size())]
    kernels.lb_pack(ctypes.c_void_p(values.data_ptr()), *count, ctypes.c_void_p(out.data_ptr()))
    return out


@dataclass(frozen=True)
class LowRankBank:
    """The adapters of one layer, side by side: packed A [adapters, rank, I] and B [adapters, O, rank], the scale in B."""

    a: Tensor
    b: Tensor
    rank: int  # of all parts of the layer together


def low_rank_bank(layer: FrozenLinear, adapters: Sequence[LoraWeights], dtype: torch.dtype) -> LowRankBank | None:
    """None if no adapter touches the layer. Parts and adapters of smaller rank are filled up with zeros."""
    ranks = [r + r % 2 for r in part_ranks(layer, adapters)]  # whole words of the kernels in bf16
    if not any(ranks):
        return None
    pairs = [fused_pair(layer, adapter, ranks) for adapter in adapters]
    a, b = (torch.stack([_panels(m.to(dtype), -(-m.shape[0] // PANEL) * PANEL) for m in half]) for half in zip(*pairs, strict=True))
    return LowRankBank(a, b, sum(ranks))
