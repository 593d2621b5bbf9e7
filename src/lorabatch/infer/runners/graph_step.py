"""The whole step of decoding as a GPU can record it once and replay it: fixed shapes, fixed memory,
nothing that the host waits for. Not a line here may ask a tensor for its numbers.

What differs between steps is written into ``Rows`` before a replay; what was chosen is read from
there afterwards. Filters look at the CANDIDATES likeliest tokens; a row for which they do not
suffice is not settled, and the host chooses from its logits.

Shapes: n rows of a recorded step, V vocabulary, W candidates.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lorabatch.infer.runners.kv_cache import KVCache
from lorabatch.infer.runners.low_rank import RowGroups
from lorabatch.infer.runners.one_call import OneCallAttention
from lorabatch.infer.sampling import TEMPERATURES, fixed_places
from lorabatch.model.decoder import Decoder
from lorabatch.model.functional import NO_TOKEN, likeliest_ids
from lorabatch.model.varlen import Extents

CANDIDATES = 1024


@dataclass(frozen=True)
class Rows:
    """Memory of a recorded step. Rows beyond those of a step read and write a slot that nobody
    has."""

    # [n, 4] int64: token, its position, its place among those of the cache, its adapter or -1
    numbers: Tensor
    settings: Tensor  # [n, 5] float64: temperature (0: greedy), top-k, top-p, min-p, the draw
    chosen: Tensor  # [n, 2] int64: the next token; whether it is settled
    q_starts: Tensor  # [n + 1] int32: 0 .. n
    k_starts: Tensor  # [n + 1] int32
    logits: Tensor | None  # [n, V] fp32, where rows are sampled

    @classmethod
    def on(cls, device: torch.device, *, count: int, vocabulary: int) -> Rows:
        """With logits for those that are sampled."""

        def zeros(*shape: int, dtype: torch.dtype = torch.long) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        return cls(
            zeros(count, 4),
            zeros(count, 5, dtype=torch.float64),
            zeros(count, 2),
            torch.arange(count + 1, dtype=torch.int32, device=device),
            zeros(count + 1, dtype=torch.int32),
            zeros(count, vocabulary, dtype=torch.float32) if vocabulary else None,
        )

    def first(self, count: int, *, sampled: bool) -> Rows:
        """The first rows of this memory."""
        return Rows(
            self.numbers[:count],
            self.settings[:count],
            self.chosen[:count],
            self.q_starts[: count + 1],
            self.k_starts[: count + 1],
            self.logits[:count] if sampled and self.logits is not None else None,
        )


def decode_step(
    decoder: Decoder, cache: KVCache, rows: Rows, groups: RowGroups | None = None
) -> None:
    """One token of each row: read, and the next one chosen. groups: of the adapters, if there
    are."""
    token, position, place, _ = rows.numbers.unbind(1)
    if groups is not None:
        groups.of_row = rows.numbers[:, 3:]
    attention = OneCallAttention(cache, place, _extents(rows, cache.capacity))
    hidden = decoder(token, position, attention)
    logits = decoder.logits(hidden)
    if rows.logits is None:
        rows.chosen[:, 0].copy_(likeliest_ids(logits))
        return
    rows.logits.copy_(logits)
    chosen, settled = sampled(rows.logits, rows.settings)
    rows.chosen[:, 0].copy_(chosen)
    rows.chosen[:, 1].copy_(settled)


def _extents(rows: Rows, capacity: int) -> Extents:
    _, position, place, _ = rows.numbers.unbind(1)
    rows.k_starts[:-1].copy_(place - position)
    lengths = (position + 1).to(torch.int32)
    return Extents(rows.q_starts, rows.k_starts, lengths, max_q=1, max_k=capacity)


def sampled(logits: Tensor, settings: Tensor) -> tuple[Tensor, Tensor]:
    """(token [n], whether it is settled [n]) of logits [n, V] in fp32, with ``Rows.settings``."""
    temperature, most = settings[:, :1], logits.amax(dim=-1, keepdim=True)
    scaled = (logits - most) / temperature.clamp(*TEMPERATURES).float()
    drawn, settled = _drawn(scaled, settings)
    drawn = torch.where(most.isfinite(), drawn, NO_TOKEN).squeeze(1)
    greedy = settings[:, 0] == 0
    return torch.where(greedy, likeliest_ids(logits), drawn), greedy | settled.squeeze(1)


def _drawn(scaled: Tensor, settings: Tensor) -> tuple[Tensor, Tensor]:
    """(token [n, 1], whether it is settled [n, 1]) of rows that are not greedy. scaled: logits by
    temperature, at most 0."""
    _, top_k, top_p, min_p, draws = settings[:, :, None].unbind(1)  # [n, 1] each
    everything = scaled.softmax(dim=-1)
    probabilities, ids, dropped = _candidates(scaled, everything, top_k)
    before = probabilities.cumsum(dim=-1) - probabilities
    dropped = dropped | (before >= top_p.float())
    dropped = dropped | (probabilities < min_p.float() * probabilities[:, :1])
    dropped[:, :1].fill_(False)
    kept = probabilities.masked_fill(dropped, 0.0)
    bound = ids.gather(1, fixed_places(kept, draws).clamp(max=ids.shape[1] - 1))
    free = fixed_places(everything, draws).clamp(max=scaled.shape[1] - 1)
    filters = (top_k > 0) | (top_p < 1) | (min_p > 0)
    enough = ~filters | (top_k > 0) | dropped[:, -1:]
    if ids.shape == scaled.shape:
        enough = torch.ones_like(enough)
    return torch.where(filters, bound, free), enough


def _candidates(scaled: Tensor, everything: Tensor, top_k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(probabilities [n, W] from high to low, their token ids, which are beyond top-k) as
    ``sampling.filtered``: with top-k, shares of the k likeliest."""
    top, ids = scaled.topk(min(CANDIDATES, scaled.shape[1]))
    few = top_k > 0
    beyond = few & (torch.arange(ids.shape[1], device=ids.device) >= top_k)
    alone = top.masked_fill(beyond, -torch.inf).softmax(dim=-1)
    return torch.where(few, alone, everything.gather(1, ids)), ids, beyond
