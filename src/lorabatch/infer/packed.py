"""Weights and adapters in the layout of the CPU kernels (``lorabatch/kernels/gemm.h``).

Shapes: O output features, I input features, r rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorabatch.model.linear import Part
from lorabatch.model.lora import LoraWeights
from lorabatch.model.panels import PANEL, panels, whole


@dataclass(frozen=True)
class PackedWeight:
    """A weight [O, I] in the kernels' panels. int8: also one scale per row, and 128 times the sum of each row's values."""

    panels: Tensor
    scales: Tensor | None
    sums: Tensor | None


def pack(weight: Tensor, *, quantize: str) -> PackedWeight:
    """int8: symmetric per output row, the largest magnitude becomes 127."""
    if quantize == "none":
        return PackedWeight(panels(weight), None, None)
    wide = weight.float()
    scales = wide.abs().amax(dim=1) / 127
    values = (wide / scales.clamp(min=1e-30)[:, None]).round().to(torch.int8)
    padded = torch.zeros(2, whole(len(scales), PANEL))
    padded[0, : len(scales)], padded[1, : len(scales)] = scales, 128 * values.sum(dim=1, dtype=torch.float32)
    return PackedWeight(panels(values), padded[0].contiguous(), padded[1].to(torch.int32))


@dataclass(frozen=True)
class LowRankBank:
    """The adapters of one part of a layer, one behind the other, in whole panels: A [adapters * rank, I], B [adapters * O, rank] with the scale."""

    a: Tensor
    b: Tensor
    rank: int
    vectors: int  # registers of 16 columns in a panel of A


def low_rank_bank(part: Part, in_features: int, adapters: Sequence[LoraWeights], dtype: torch.dtype) -> LowRankBank | None:
    """None if no adapter touches the part. Adapters of smaller rank, or without this part, are filled up with zeros."""
    rank = whole(max((a.pairs[part.path][0].shape[0] for a in adapters if part.path in a.pairs), default=0), 2)  # whole words in bf16
    if not rank:
        return None
    vectors = PANEL // 16 if whole(rank, 16) % PANEL == 0 else 1  # rank 16 would waste two thirds of a wide panel
    out_features, count = part.stop - part.start, len(adapters)
    a = torch.zeros(count, whole(rank, vectors * 16), in_features, dtype=dtype)  # whole panels each, so that one packing does all
    b = torch.zeros(count, whole(out_features, PANEL), rank, dtype=dtype)
    for i, adapter in enumerate(adapters):
        if part.path in adapter.pairs:
            own_a, own_b = adapter.scaled(part.path)
            a[i, : len(own_a)], b[i, :out_features, : len(own_a)] = own_a, own_b
    return LowRankBank(panels(a.flatten(0, 1), vectors * 16), panels(b.flatten(0, 1)), rank, vectors)
