"""Keys and values of running requests, and the two attentions that use them.

Shapes: S slots, C positions per slot, T tokens of a flat batch, N query heads, K key/value
heads, G = N / K, D head size, n live rows (slots 0 .. n-1).
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorabatch.model.attention import causal_attention
from lorabatch.model.spec import ModelSpec

PAGE = 64  # lengths are rounded up to this: sums over a multiple of it do not depend on how many follow

# Half-precision products of up to this many multiplications take another kernel on CPUs, so for toy models the
# choice would depend on the number of rows; they are computed in fp32 instead.
ONEDNN_MIN_ELEMENTS = 4096


class KVCache:
    """One tensor [layers, 2, S, K, C, D]; slot s of it belongs to running request s."""

    def __init__(self, spec: ModelSpec, *, num_slots: int, capacity: int, dtype: torch.dtype, device: torch.device) -> None:
        self.capacity = -(-capacity // PAGE) * PAGE
        shape = (spec.num_layers, 2, num_slots, spec.num_kv_heads, self.capacity, spec.head_dim)
        self.data = torch.zeros(shape, dtype=dtype, device=device)  # zeros: masked positions are multiplied, never NaN

    def move(self, source: int, target: int, length: int) -> None:
        self.data[:, :, target, :, :length] = self.data[:, :, source, :, :length]


class PrefillAttention:
    """Causal attention within each prompt of a flat batch; writes their keys and values to the cache."""

    def __init__(self, cache: KVCache, slots: list[int], lengths: list[int]) -> None:
        self.cache, self.slots, self.lengths = cache, slots, lengths

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        outputs = []
        pieces = (t.split(self.lengths) for t in (q, k, v))
        for slot, length, (q1, k1, v1) in zip(self.slots, self.lengths, zip(*pieces, strict=True), strict=True):
            self.cache.data[layer, 0, slot, :, :length] = k1.transpose(0, 1)  # [K, L, D]
            self.cache.data[layer, 1, slot, :, :length] = v1.transpose(0, 1)
            outputs.append(causal_attention(q1, k1, v1, window))
        return torch.cat(outputs)


class DecodeAttention:
    """One new token per live row against its cached keys and values.

    Query heads that share a key head are folded into the row axis of one batched product. The
    length axis is cut at the longest live row, rounded up to whole pages, so a row's result is
    the same whatever its neighbours' lengths are.
    """

    def __init__(self, cache: KVCache, lengths: Tensor, longest: int) -> None:
        """lengths [n]: cached tokens of each row before this step; longest: their maximum."""
        self.cache, self.rows = cache, lengths.shape[0]
        self.lengths = lengths
        self.span = min(cache.capacity, -(-(longest + 1) // PAGE) * PAGE)
        self.row_index = torch.arange(self.rows, device=lengths.device)
        self.places = torch.arange(self.span, device=lengths.device)
        self.future = (self.places[None, :] > lengths[:, None])[:, None, None, :]  # [n, 1, 1, span]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        n, kv_heads, head_dim = k.shape
        keys, values = self.cache.data[layer, 0, :n], self.cache.data[layer, 1, :n]  # [n, K, C, D]
        keys[self.row_index, :, self.lengths] = k
        values[self.row_index, :, self.lengths] = v
        keys, values = keys[:, :, : self.span], values[:, :, : self.span]
        dtype = q.dtype
        if q[0].numel() * PAGE <= ONEDNN_MIN_ELEMENTS:
            q, keys, values = q.float(), keys.float(), values.float()
        q = q.reshape(n, kv_heads, -1, head_dim)  # [n, K, G, D]
        scores = (q @ keys.transpose(-1, -2)).float() * head_dim**-0.5
        hidden = self.future
        if window is not None:
            hidden = hidden | (self.places[None, :] <= self.lengths[:, None] - window)[:, None, None, :]
        weights = scores.masked_fill_(hidden, float("-inf")).softmax(dim=-1).to(q.dtype)
        return (weights @ values).reshape(n, -1).to(dtype)
