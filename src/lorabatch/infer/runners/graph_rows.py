"""The host's side of a recorded step: what it writes into ``Rows`` before the replays, what it
reads from there afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import repeat

import numpy as np
import torch

from lorabatch.infer.requests import Request, TokenLogprob
from lorabatch.infer.runners.graph_step import CANDIDATES, COLUMNS, ENDED_BY, NOTHING, Kind, Rows
from lorabatch.infer.sampling import counts_of, sample, signed
from lorabatch.model.attention import Segment
from lorabatch.model.functional import NO_TOKEN
from lorabatch.model.varlen import host_tensor

ENDED_ALREADY = [*ENDED_BY, *[NO_TOKEN] * COLUMNS]


def is_recordable(segment: Segment, request: Request) -> bool:
    """A single token past the prompt, and nobody but the device has to look at what follows it."""
    if len(segment.token_ids) != 1 or segment.start < len(request.token_ids):
        return False
    looked_at = request.constraint is not None or request.must_continue
    return not looked_at and request.params.top_k <= CANDIDATES


def kind_of(requests: Sequence[Request]) -> Kind:
    """What a step must be able to do for all of them."""
    params = [request.params for request in requests]
    return Kind(
        drawn=not all(p.likeliest for p in params),
        penalised=any(p.penalised for p in params),
        reported=any(p.logprobs is not None for p in params),
    )


def tokens_left(request: Request) -> int:
    return max(1, request.max_new_tokens - len(request.output_ids))


def fill(
    rows: Rows, segments: Sequence[Segment], requests: Sequence[Request], capacity: int, nobody: int
) -> None:
    """One copy from the host, two if tokens are drawn, four with penalties; nobody waits for them.
    capacity: positions of a slot; nobody: the slot of rows without a segment."""
    device, empty = rows.numbers.device, len(rows.numbers) - len(segments)
    unused = [0, 0, nobody * capacity, 0, -1, 0, 0, 0, *ENDED_ALREADY][:COLUMNS]
    pairs = zip(segments, requests, strict=True)
    table = [*(_numbers(s, r, capacity) for s, r in pairs), *repeat(unused, empty)]
    numbers = host_tensor([n for row in table for n in row], device, torch.long)
    rows.numbers.view(-1).copy_(numbers, non_blocking=True)
    rows.cursor.zero_()
    if rows.kind.drawn:
        values = [*map(_settings, requests), *repeat((0.0,) * 4 + (1.0, 0.0, 0.0), empty)]
        settings = host_tensor([v for row in values for v in row], device, torch.float64)
        rows.settings.view(-1).copy_(settings, non_blocking=True)
    if rows.kind.penalised:
        _fill_seen(rows, requests)


def _numbers(segment: Segment, request: Request, capacity: int) -> list[int]:
    """A row of ``Rows.numbers``. Endings for which there is no column are seen by the engine."""
    start = segment.start
    row = [segment.token_ids[0], start, segment.slot * capacity + start, len(request.output_ids)]
    row += [segment.adapter, tokens_left(request), signed(request.params.seed), request.sample]
    return [*row, *ENDED_BY, *request.ending_ids, *ENDED_ALREADY][:COLUMNS]


def _settings(request: Request) -> tuple[float, ...]:
    """A row of ``Rows.settings``."""
    p = request.params
    penalties = (p.repetition_penalty, p.presence_penalty, p.frequency_penalty)
    return p.temperature, p.top_k, p.top_p, p.min_p, *penalties


def _fill_seen(rows: Rows, requests: Sequence[Request]) -> None:
    seen = np.zeros(rows.seen.shape, dtype=np.int64)
    used = np.zeros(rows.seen_count.shape, dtype=np.int64)
    for i, request in enumerate(requests):
        if request.params.penalised:
            counts = counts_of(request)
            pairs = np.fromiter((n for pair in counts.items() for n in pair), dtype=np.int64)
            used[i], pairs = len(counts), pairs.reshape(-1, 2).T
            seen[i] = pairs[:, :1]  # in the places that are not in use
            seen[i, :, : len(counts)] = pairs
    for memory, values in ((rows.seen, seen), (rows.seen_count, used)):
        host = torch.from_numpy(values)
        memory.copy_(host.pin_memory() if memory.is_cuda else host, non_blocking=True)


def read(rows: Rows, requests: Sequence[Request], steps: int) -> list[list[int]]:
    """The tokens of each request; what is not settled at the first step is chosen here."""
    table = rows.chosen[: len(requests), :steps].tolist()  # the only wait
    tokens = [row if row[-1] > NOTHING else _cut(row) for row in table]
    if rows.kind.reported:
        _report(rows, requests, tokens)
    for i, request in enumerate(requests):
        if not tokens[i]:  # a row that stood still: its logits are those of its first step
            tokens[i] = sample(rows.logits[i : i + 1], [request])
    return tokens


def _cut(row: list[int]) -> list[int]:
    return row[: next(i for i, token in enumerate(row) if token <= NOTHING)]


def _report(rows: Rows, requests: Sequence[Request], tokens: Sequence[Sequence[int]]) -> None:
    """The log-probabilities of these tokens, with those requests that want them."""
    values, ids = rows.logprobs[: len(requests)].tolist(), rows.likeliest[: len(requests)].tolist()
    for i, request in enumerate(requests):
        wanted = request.params.logprobs
        if wanted is not None:
            request.logprobs += [
                TokenLogprob(own, top_ids[:wanted], top[:wanted])
                for (own, *top), top_ids in zip(
                    values[i][: len(tokens[i])], ids[i][: len(tokens[i])], strict=True
                )
            ]
