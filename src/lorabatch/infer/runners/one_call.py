"""Attention to the KV cache in one call a layer, for GPUs: prompts, pieces of prompts and single
tokens alike (``model/varlen.py``). Starts and lengths are on the device.

Shapes: T tokens of a flat batch, N query heads, K key/value heads, D head size.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from lorabatch.infer.runners.kv_cache import KVCache
from lorabatch.model.attention import Segment
from lorabatch.model.varlen import Extents, attend, ints


class OneCallAttention:
    """The new tokens of some slots: their keys and values enter the cache, then all attend, each to
    its own slot."""

    def __init__(self, cache: KVCache, places: Tensor, extents: Extents) -> None:
        """places [T]: where each new token lies among all positions of the cache."""
        self._cache, self._places, self._extents = cache, places, extents

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        keys, values = self._cache.tokens(layer)
        keys.index_copy_(0, self._places, k)
        values.index_copy_(0, self._places, v)
        return attend(q, keys, values, self._extents, window).flatten(1)


def extents_of(segments: Sequence[Segment], capacity: int, device: torch.device) -> Extents:
    """Of slots with ``capacity`` positions each; one copy to the device."""
    counts = [len(segment.token_ids) for segment in segments]
    lengths = [segment.start + n for segment, n in zip(segments, counts, strict=True)]
    q_starts = [0, *itertools.accumulate(counts)]
    k_starts = [*(segment.slot * capacity for segment in segments), 0]
    together = ints([*q_starts, *k_starts, *lengths], device, torch.int32)
    q, k, n = together.split([len(q_starts), len(k_starts), len(lengths)])
    return Extents(q, k, n, max_q=max(counts), max_k=max(lengths))


def places(slots: Sequence[int], positions: Sequence[int], capacity: int) -> list[int]:
    """Where each token lies among all positions of the cache."""
    return [slot * capacity + position for slot, position in zip(slots, positions, strict=True)]
