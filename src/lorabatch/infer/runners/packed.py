"""Adapters in the layout of the CPU kernels (``lorabatch/kernels/gemm.h``).

Shapes: O output features, I input features, r rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorabatch.kernels.api import constants
from lorabatch.kernels.panels import panels, whole
from lorabatch.model.linear import Part
from lorabatch.model.lora import LoraWeights


@dataclass(frozen=True)
class PackedAdapters:
    """The adapters of one part of a layer, one behind the other, in whole panels: A [adapters *
    rank, I], B [adapters * O, rank] with the scale."""

    a: Tensor
    b: Tensor
    rank: int
    vectors: int  # registers of 16 columns in a panel of A


def pack_adapters(
    part: Part, in_features: int, adapters: Sequence[LoraWeights], dtype: torch.dtype
) -> PackedAdapters | None:
    """None if no adapter touches the part. Adapters of smaller rank, or without this part, are
    filled up with zeros."""
    ranks = [a.pairs[part.path][0].shape[0] for a in adapters if part.path in a.pairs]
    if not any(ranks):
        return None
    rank = whole(max(ranks), 2)  # whole words in bf16
    panel, out_features = constants().PANEL, part.stop - part.start
    # rank 16 would waste two thirds of a wide panel
    vectors = panel // 16 if whole(rank, 16) % panel == 0 else 1
    # whole panels each, so that one packing does all
    a = torch.zeros(len(adapters), whole(rank, vectors * 16), in_features, dtype=dtype)
    b = torch.zeros(len(adapters), whole(out_features, panel), rank, dtype=dtype)
    for own_a, own_b, adapter in zip(a, b, adapters, strict=True):
        if part.path in adapter.pairs:
            scaled_a, scaled_b = adapter.scaled(part.path)
            own_a[: len(scaled_a)] = scaled_a
            own_b[:out_features, : len(scaled_a)] = scaled_b
    return PackedAdapters(
        panels(a.flatten(0, 1), vectors * 16), panels(b.flatten(0, 1)), rank, vectors
    )
