"""The whole step of decoding as a GPU can record it once and replay it: fixed shapes, fixed memory,
nothing that the host waits for. Not a line here may ask a tensor for its numbers.

The host writes what its requests are into ``Rows``, replays the step several times, and reads what
was chosen: tokens, draws and ends stay on the device in between. A row that has ended stands still.
Filters look at the CANDIDATES likeliest tokens; a row for which they do not suffice ends as not
settled, and the host chooses from its logits.

Shapes: n rows of a recorded step, V vocabulary, W candidates, P places for tokens that occurred.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import torch
from torch import Tensor

from lorabatch.infer.runners.kv_cache import KVCache
from lorabatch.infer.runners.low_rank import RowGroups
from lorabatch.infer.runners.one_call import OneCallAttention
from lorabatch.infer.sampling import TEMPERATURES, draws_of, fixed_places
from lorabatch.model.decoder import Decoder
from lorabatch.model.functional import NO_TOKEN, likeliest_ids
from lorabatch.model.varlen import Extents

CANDIDATES = 1024
MOST_STEPS = 16  # between two looks of the host
MOST_REPORTED = 20  # likeliest tokens of which the probability is asked for at most
NOTHING, UNSETTLED = -2, -3  # in a token's place: the row had ended; the host has to choose
# Columns of ``Rows.numbers``. The token; its position, its place among those of the cache, how many
# tokens the request has (these three grow); its adapter or -1; how many more tokens it may get; two
# of its random numbers; then what ends it.
TOKEN, POSITION, PLACE, STEP, ADAPTER, LEFT, SEED, SAMPLE, ENDINGS = range(9)
ENDED_BY = (NO_TOKEN, UNSETTLED)  # the first endings of every row
COLUMNS = ENDINGS + len(ENDED_BY) + 8


class Kind(NamedTuple):
    """What a recorded step can do beside choosing the likeliest tokens."""

    drawn: bool = False  # or chosen from logits in any other way
    penalised: bool = False
    reported: bool = False  # log-probabilities


@dataclass(frozen=True)
class Rows:
    """Memory of a recorded step. Rows beyond those of a step read and write a slot that nobody
    has."""

    kind: Kind
    cursor: Tensor  # [1] int64: the step's place among those since the host looked
    q_starts: Tensor  # [n + 1] int32: 0 .. n
    k_starts: Tensor  # [n + 1] int32
    numbers: Tensor  # [n, COLUMNS] int64
    # [n, 7] float64: temperature (0: greedy), top-k, top-p, min-p, the three penalties
    settings: Tensor
    chosen: Tensor  # [n, MOST_STEPS] int64: the tokens, NOTHING behind the last
    logits: Tensor  # [n, V] fp32
    seen: Tensor  # [n, 2, P] int64: tokens that occurred, how often generated
    seen_count: Tensor  # [n, 1] int64: how many places of them are in use
    logprobs: Tensor  # [n, MOST_STEPS, 1 + MOST_REPORTED] fp32: the token's own, the likeliest ones
    likeliest: Tensor  # [n, MOST_STEPS, MOST_REPORTED] int64: which these are

    @classmethod
    def on(
        cls, device: torch.device, kind: Kind, *, count: int, vocabulary: int, seen: int
    ) -> Rows:
        """seen: P. What the kind does not need has no memory."""

        def zeros(*shape: int, dtype: torch.dtype = torch.long) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        few = min(MOST_REPORTED, vocabulary) * kind.reported
        return cls(
            kind,
            zeros(1),
            torch.arange(count + 1, dtype=torch.int32, device=device),
            zeros(count + 1, dtype=torch.int32),
            zeros(count, COLUMNS),
            zeros(count, 7, dtype=torch.float64),
            zeros(count, MOST_STEPS),
            zeros(count, vocabulary * kind.drawn, dtype=torch.float32),
            zeros(count, 2, seen * kind.penalised),
            zeros(count, 1),
            zeros(count, MOST_STEPS, 1 + few, dtype=torch.float32),
            zeros(count, MOST_STEPS, few),
        )

    def first(self, count: int) -> Rows:
        """The first rows of this memory."""
        own = [field.name for field in fields(self)][4:]
        starts = {name: getattr(self, name)[: count + 1] for name in ("q_starts", "k_starts")}
        return replace(self, **starts, **{name: getattr(self, name)[:count] for name in own})


def decode_step(
    decoder: Decoder, cache: KVCache, rows: Rows, groups: RowGroups | None = None
) -> None:
    """One token of each row: read, and the next one chosen. groups: of the adapters, if there
    are."""
    token, position, place = rows.numbers[:, : PLACE + 1].unbind(1)
    if groups is not None:
        groups.of_row = rows.numbers[:, ADAPTER : ADAPTER + 1]
    attention = OneCallAttention(cache, place, _extents(rows, cache.capacity))
    hidden = decoder(token, position, attention)
    logits = decoder.logits(hidden)
    _advance(rows, _choose(rows, logits) if rows.kind.drawn else likeliest_ids(logits))


def _choose(rows: Rows, logits: Tensor) -> Tensor:
    """What follows each row [n]: a token, NO_TOKEN or UNSETTLED."""
    rows.logits.copy_(logits)
    scores = _penalised(rows) if rows.kind.penalised else rows.logits
    seed, step, sample = (rows.numbers[:, column] for column in (SEED, STEP, SAMPLE))
    chosen, settled = sampled(scores, rows.settings, draws_of(seed, step, sample)[:, None])
    chosen = torch.where(settled, chosen, UNSETTLED)
    if rows.kind.penalised:  # a penalty must not make a number of what is none
        chosen = torch.where(rows.logits.amax(dim=-1).isfinite(), chosen, NO_TOKEN)
    if rows.kind.reported:
        values = rows.logits.log_softmax(dim=-1)
        own = values.gather(1, chosen.clamp(min=0)[:, None])
        top, ids = values.topk(rows.likeliest.shape[2])
        rows.logprobs.index_copy_(1, rows.cursor, torch.cat([own, top], dim=1)[:, None])
        rows.likeliest.index_copy_(1, rows.cursor, ids[:, None])
    return chosen


def _advance(rows: Rows, chosen: Tensor) -> None:
    """Write down the tokens chosen [n]; rows that they do not end go on with them."""
    numbers = rows.numbers
    left = numbers[:, LEFT]
    rows.chosen.index_copy_(1, rows.cursor, torch.where(left > 0, chosen, NOTHING)[:, None])
    rows.cursor.add_(1)
    ended = (numbers[:, ENDINGS:] == chosen[:, None]).any(dim=1)
    left.sub_(1).clamp_(min=0).masked_fill_(ended, 0)
    goes_on = left > 0
    numbers[:, TOKEN].copy_(torch.where(goes_on, chosen, numbers[:, TOKEN]))
    numbers[:, POSITION : STEP + 1].add_(goes_on[:, None])
    if rows.kind.penalised:
        _count(rows, chosen, goes_on)


def _penalised(rows: Rows) -> Tensor:
    """``sampling.penalised`` of tokens that are on the device; [n, V]."""
    ids, counts = rows.seen.unbind(1)
    repetition, presence, frequency = rows.settings[:, 4:, None].unbind(1)  # [n, 1] each
    score = rows.logits.gather(1, ids).double()
    score = torch.where(score < 0, score * repetition, score / repetition)
    score = score - (presence * (counts > 0) + frequency * counts)
    most = torch.finfo(torch.float32).max
    return rows.logits.scatter(1, ids, score.clamp(-most, most).float())


def _count(rows: Rows, chosen: Tensor, goes_on: Tensor) -> None:
    """Places that are not in use hold the row's first token again, so each is counted where it
    stands."""
    ids, counts = rows.seen.unbind(1)
    here = (ids == chosen[:, None]) & goes_on[:, None]
    counts.add_(here)
    new = goes_on[:, None] & ~here.any(dim=1, keepdim=True)
    place = rows.seen_count.clamp(max=ids.shape[1] - 1)
    ids.scatter_(1, place, torch.where(new, chosen[:, None], ids.gather(1, place)))
    counts.scatter_(1, place, torch.where(new, 1, counts.gather(1, place)))
    rows.seen_count.add_(new)


def _extents(rows: Rows, capacity: int) -> Extents:
    position, place = rows.numbers[:, POSITION], rows.numbers[:, PLACE]
    rows.k_starts[:-1].copy_(place - position)
    lengths = (position + 1).to(torch.int32)
    return Extents(rows.q_starts, rows.k_starts, lengths, max_q=1, max_k=capacity)


def sampled(logits: Tensor, settings: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
    """(token [n], whether it is settled [n]) of logits [n, V] in fp32, with ``Rows.settings`` and
    draws [n, 1]."""
    temperature, most = settings[:, :1], logits.amax(dim=-1, keepdim=True)
    scaled = (logits - most) / temperature.clamp(*TEMPERATURES).float()
    drawn, settled = _drawn(scaled, settings, draws)
    drawn = torch.where(most.isfinite(), drawn, NO_TOKEN).squeeze(1)
    greedy = settings[:, 0] == 0
    return torch.where(greedy, likeliest_ids(logits), drawn), greedy | settled.squeeze(1)


def _drawn(scaled: Tensor, settings: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
    """(token [n, 1], whether it is settled [n, 1]) of rows that are not greedy. scaled: logits by
    temperature, at most 0."""
    top_k, top_p, min_p = settings[:, 1:4, None].unbind(1)  # [n, 1] each
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
