"""The one place where sequences exist. Everywhere else tokens are rows of a flat [T, ...] matrix.

Shapes: T tokens, L tokens of one sequence, S cache slots, C positions of a slot,
N query heads, K key/value heads, G = N / K, D head size.

The decoder calls an ``Attention`` object once per layer. ``PackedAttention`` is for training
and scoring; the KV cache of inference brings two more (``lorabatch.infer.kv_cache``).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F


class Attention(Protocol):
    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        """q [T, N, D], k and v [T, K, D] -> [T, N * D]."""


class PackedAttention:
    """Causal attention within each document of a packed block; nothing crosses a boundary.

    One fused call per document: its cost is the sum of L², never T², and what a document gets is
    a function of its own rows alone.
    """

    def __init__(self, lengths: Sequence[int]) -> None:
        self.lengths = list(lengths)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        pieces = (t.split(self.lengths) for t in (q, k, v))
        return torch.cat([causal_attention(q1, k1, v1, window) for q1, k1, v1 in zip(*pieces, strict=True)])


def causal_attention(q: Tensor, k: Tensor, v: Tensor, window: int | None = None) -> Tensor:
    """One sequence: q [L, N, D], k and v [L, K, D] -> [L, N * D]."""
    length, heads, _ = q.shape
    group = heads // k.shape[1]
    q, k, v = (t.transpose(0, 1).unsqueeze(0) for t in (q, k, v))  # [1, N or K, L, D]
    if group > 1 and not _fused_gqa(q.device.type):
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        group = 1
    mask = None
    if window is not None and length > window:
        rows = torch.arange(length, device=q.device)
        distance = rows[:, None] - rows[None, :]
        mask = (distance >= 0) & (distance < window)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=group > 1)
    return y[0].transpose(0, 1).reshape(length, -1)


@functools.cache
def _fused_gqa(device_type: str) -> bool:
    """CUDA's fused kernels take grouped heads in half precision only; elsewhere sharing is expanded."""
    return device_type == "cpu"
