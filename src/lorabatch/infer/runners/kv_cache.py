"""Keys and values of running requests, and the attention that uses them.

A token's result depends on nothing but its own sequence, to the last bit on a CPU: not on its
neighbours, nor on how many tokens of its sequence come with it in one step. That rests on three
facts about torch's products on CPUs, measured (docs/LOG.md, 2026-11-24) and held by tests:
lengths rounded up to PAGE do not change sums over what is masked; a product's rows do not depend
on how many rows it has (in fp32 from MIN_ROWS on, in half precision above ONEDNN_MIN_ELEMENTS);
sums over more positions than SUM_LIMIT do depend on how many follow, so they are cut there.

Shapes: S slots, C positions per slot, T tokens of a flat batch, N query heads, K key/value
heads, G = N / K, D head size, n rows (slots 0 .. n-1), m tokens of a row.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lorabatch.model.attention import Segment, causal_attention
from lorabatch.model.spec import ModelSpec

PAGE = 64
MIN_ROWS = 4
SUM_LIMIT = {torch.float32: 128, torch.bfloat16: 1024, torch.float16: 1024}
SHORT_TOKENS = 8  # segments up to here (decoding, speculation) go through one product for all slots
QUERY_BLOCK = 128  # tokens of a long segment that share a product: bounds the scores held at once

# Half-precision products of up to this many multiplications take another kernel on CPUs, so for toy
# models the choice would depend on the number of rows; they are computed in fp32 instead.
ONEDNN_MIN_ELEMENTS = 4096


class KVCache:
    """One tensor [layers, 2, S, K, C, D]; slot s of it belongs to running request s. ``by_token``:
    all heads of a position lie together in memory, as attention in one call wants them."""

    def __init__(
        self,
        spec: ModelSpec,
        *,
        num_slots: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
        by_token: bool = False,
    ) -> None:
        self.capacity, self.by_token = pages(capacity), by_token
        rows = (self.capacity, spec.num_kv_heads)
        shape = (spec.num_layers, 2, num_slots, *(rows if by_token else rows[::-1]), spec.head_dim)
        # zeros: masked positions are multiplied, never NaN
        self.data = torch.zeros(shape, dtype=dtype, device=device)
        if by_token:
            self.data = self.data.transpose(3, 4)

    def tokens(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values [S * C, K, D] of a layer, a view; only ``by_token``."""
        keys, values = self.data[layer].transpose(2, 3).flatten(1, 2).unbind()
        return keys, values

    def copy(self, source: int, target: int, length: int) -> None:
        self.data[:, :, target, :, :length] = self.data[:, :, source, :, :length]

    def clear(self, slot: int) -> None:
        self.data[:, :, slot] = 0


def pages(length: int) -> int:
    """``length`` rounded up to whole pages."""
    return -(-length // PAGE) * PAGE


class CacheAttention:
    """The new tokens of some slots: their keys and values enter the cache, then each attends to its
    own slot.

    Query heads that share a key head are folded into the row axis of one batched product, and so
    are the tokens of a segment. Short segments of all slots share one product; it is as wide as
    the longest of them. Longer segments are taken one by one.
    """

    def __init__(self, cache: KVCache, segments: Sequence[Segment], positions: Tensor) -> None:
        """positions [T]: of all tokens of the segments, each in its own sequence."""
        self.cache, self.positions = cache, positions
        lengths = [len(s.token_ids) for s in segments]
        device = positions.device
        self.slots = torch.tensor([s.slot for s in segments], device=device).repeat_interleave(
            torch.tensor(lengths, device=device)
        )
        self.long: list[tuple[Segment, int]] = []  # with its first row of the flat batch
        short: list[Segment] = []
        flat: list[int] = []
        offsets: list[int] = []
        first = 0
        for segment, length in zip(segments, lengths, strict=True):
            if length > SHORT_TOKENS:
                self.long.append((segment, first))
            else:
                short.append(segment)
                flat += range(first, first + length)
                offsets += range(length)
            first += length
        self.num_rows = 1 + max((s.slot for s in short), default=-1)
        if short:
            self.flat = torch.tensor(flat, device=device)
            self.offsets = torch.tensor(offsets, device=device)
            self._set_widths(short)

    def _set_widths(self, short: list[Segment]) -> None:
        """How wide the product of the short segments is, and where each of its rows begins."""
        device = self.positions.device
        self.num_tokens = max(len(s.token_ids) for s in short)
        self.span = pages(max(s.start + len(s.token_ids) for s in short))
        self.starts = torch.zeros(self.num_rows, dtype=torch.long, device=device)
        starts = torch.tensor([s.start for s in short], device=device)
        self.starts[[s.slot for s in short]] = starts

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        keys, values = self.cache.data[layer]  # [S, K, C, D] each
        keys[self.slots, :, self.positions] = k
        values[self.slots, :, self.positions] = v
        out = torch.empty_like(q)
        for segment, first in self.long:
            rows = slice(first, first + len(segment.token_ids))
            # fused; a GPU's results depend on the batch in any case (one that is not NVIDIA's)
            if q.is_cuda and segment.start == 0:
                out[rows] = causal_attention(q[rows], k[rows], v[rows], window).view_as(q[rows])
                continue
            for at in range(0, len(segment.token_ids), QUERY_BLOCK):
                block = slice(first + at, min(first + at + QUERY_BLOCK, rows.stop))
                span = pages(segment.start + block.stop - first)
                slot = slice(segment.slot, segment.slot + 1)
                out[block] = attend(
                    q[None, block],
                    keys[slot, :, :span],
                    values[slot, :, :span],
                    self.positions[None, block],
                    window,
                )[0]
        if self.num_rows:
            self._attend_short(q, keys, values, window, out)
        return out.flatten(1)

    def _attend_short(
        self, q: Tensor, keys: Tensor, values: Tensor, window: int | None, out: Tensor
    ) -> None:
        """One product for all rows. Rows and tokens that are not of this step are computed on zeros
        and dropped."""
        n, span = self.num_rows, self.span
        m = max(self.num_tokens, -(-MIN_ROWS * keys.shape[1] // q.shape[1]) if in_fp32(q) else 1)
        padded = q.new_zeros(n, m, *q.shape[1:])
        slots = self.slots[self.flat]
        padded[slots, self.offsets] = q[self.flat]
        positions = self.starts[:, None] + torch.arange(m, device=q.device)
        y = attend(padded, keys[:n, :, :span], values[:n, :, :span], positions, window)
        out[self.flat] = y[slots, self.offsets]


def in_fp32(q: Tensor) -> bool:
    """Whether attention is computed in fp32: q [..., N, D] is, or is too small for half precision
    (ONEDNN_MIN_ELEMENTS)."""
    return q.dtype == torch.float32 or q.shape[-2] * q.shape[-1] * PAGE <= ONEDNN_MIN_ELEMENTS


def attend(
    q: Tensor, keys: Tensor, values: Tensor, positions: Tensor, window: int | None
) -> Tensor:
    """q [n, m, N, D] at positions [n, m] of their rows, against keys and values [n, K, span, D] ->
    [n, m, N, D]."""
    n, m, heads, head_dim = q.shape
    dtype, groups, span = q.dtype, heads // keys.shape[1], keys.shape[2]
    if in_fp32(q):
        q, keys, values = q.float(), keys.float(), values.float()
    folded = (
        q.view(n, m, -1, groups, head_dim)
        .permute(0, 2, 1, 3, 4)
        .reshape(n, -1, m * groups, head_dim)
    )
    scale = head_dim**-0.5
    if dtype == torch.float16:  # unscaled, products with large keys would pass fp16's 65,504
        folded, scale = folded * scale, 1.0
    scores = (folded @ keys.transpose(-1, -2)).float() * scale  # [n, K, m * G, span]
    places = torch.arange(span, device=q.device)
    hidden = places > positions[..., None]  # [n, m, span]
    if window is not None:
        hidden |= places <= positions[..., None] - window
    scores.view(n, -1, m, groups, span).masked_fill_(hidden[:, None, :, None, :], float("-inf"))
    weights = scores.softmax(dim=-1).to(q.dtype)
    piece = span if q.is_cuda else SUM_LIMIT[q.dtype]
    y = weights[..., :piece] @ values[..., :piece, :]
    for at in range(piece, span, piece):
        y = y.float() + weights[..., at : at + piece] @ values[..., at : at + piece, :]
    return (
        y.view(n, -1, m, groups, head_dim)
        .permute(0, 2, 1, 3, 4)
        .reshape(n, m, heads, head_dim)
        .to(dtype)
    )
