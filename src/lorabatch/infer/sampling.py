"""From logits to token ids, row by row settings, random numbers by counter.

A row's random number is a hash of (its seed, its step, its sample), so what a request draws does
not depend on its neighbours, on the batch size or on a resume. The order of the filters is
transformers': penalties, temperature, top-k, top-p, min-p.

Every legal setting leaves at least one token, whatever the logits. A row whose largest logit is not
finite has NO_TOKEN; single logits of minus infinity are tokens that the model rules out.

Shapes: n rows, V vocabulary, W candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from lorabatch.infer.requests import Request, SamplingParams, TokenLogprob
from lorabatch.model.functional import NO_TOKEN

_MASK = (1 << 64) - 1
# rows taken at once: their passes over V stay in the caches, and the allocator reuses the memory
CPU_ROWS = 8
FIRST_WIDTH = 64  # candidates looked at first where top-p or min-p will drop most of the vocabulary
# at the lower end nothing but the likeliest token has any mass left, at the upper all have the same
TEMPERATURES = (1e-6, 1e30)
FIXED_POINT = 2.0**40  # a probability of 1 as an integer; the least that counts is 1e-12
WIDENING = 32  # how many times more where they did not suffice


def uniform(seed: int, step: int, sample: int = 0) -> float:
    """A number in [0, 1) from three integers: two rounds of SplitMix64 (Steele, Lea & Flood,
    2014)."""
    state = seed & _MASK
    for word in (step, 0x5851F42D4C957F2D + sample):
        state = (state + 0x9E3779B97F4A7C15 + (word & _MASK) * 0xD1342543DE82EF95) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return (state >> 11) / (1 << 53)


def draws_of(seed: Tensor, step: Tensor, sample: Tensor) -> Tensor:
    """``uniform`` of int64 tensors [n] -> float64 [n], bit for bit: two's complement wraps as the
    masks do."""
    state = seed
    for word in (step, sample + signed(0x5851F42D4C957F2D)):
        state = state + signed(0x9E3779B97F4A7C15) + word * signed(0xD1342543DE82EF95)
        state = (state ^ _shifted(state, 30)) * signed(0xBF58476D1CE4E5B9)
        state = (state ^ _shifted(state, 27)) * signed(0x94D049BB133111EB)
        state = state ^ _shifted(state, 31)
    return _shifted(state, 11).to(torch.float64) / (1 << 53)


def signed(word: int) -> int:
    """The same 64 bits as an int64."""
    return (word & _MASK) - ((word & 1 << 63) << 1)


def _shifted(state: Tensor, count: int) -> Tensor:
    """To the right, zeros from the left."""
    return (state >> count) & ((1 << (64 - count)) - 1)


class Head(Protocol):
    """What turns hidden states [n, H] into logits [n, V], or into the likeliest tokens without
    anybody seeing logits."""

    def logits(self, hidden: Tensor) -> Tensor: ...

    def greedy(self, hidden: Tensor) -> list[int]: ...


def choose(head: Head, hidden: Tensor, requests: Sequence[Request]) -> list[int]:
    """The next token of each row of ``hidden`` [n, H]. Rows that want nothing but the likeliest
    token never see logits.

    They take the head's own way in any company: where two logits are equal it may prefer another
    token than ``sample``.
    """
    rest = [i for i, r in enumerate(requests) if not r.likeliest]
    if not rest:
        return head.greedy(hidden)
    plain = [i for i, r in enumerate(requests) if r.likeliest]
    chosen = dict(
        zip(
            rest, sample(head.logits(_rows(hidden, rest)), [requests[i] for i in rest]), strict=True
        )
    )
    if plain:
        chosen |= zip(plain, head.greedy(hidden[plain]), strict=True)
    return [chosen[i] for i in range(len(requests))]


def sample(logits: Tensor, requests: Sequence[Request]) -> list[int]:
    """The next token of each row, or NO_TOKEN; log-probabilities are added to the requests that
    want them.

    logits [n, V]; requests: whose rows they are.
    """
    at_once = CPU_ROWS if logits.device.type == "cpu" else len(requests)
    token_ids = []
    for start in range(0, len(requests), at_once):
        token_ids += _sample(
            logits[start : start + at_once].float(), requests[start : start + at_once]
        )
    return token_ids


def _sample(logits: Tensor, requests: Sequence[Request]) -> list[int]:
    scores = _constrained(_without_endings(penalised(logits, requests), requests), requests)
    chosen = torch.empty(len(requests), dtype=torch.long, device=logits.device)
    greedy = [i for i, request in enumerate(requests) if request.params.greedy]
    sampled = [i for i, request in enumerate(requests) if not request.params.greedy]
    if greedy:
        chosen[greedy] = _rows(scores, greedy).argmax(dim=-1)
    if sampled:
        params = [requests[i].params for i in sampled]
        draws = [
            uniform(p.seed, len(requests[i].output_ids), requests[i].sample)
            for i, p in zip(sampled, params, strict=True)
        ]
        chosen[sampled] = draw(_rows(scores, sampled), params, draws)
    _add_logprobs(logits, chosen, requests)
    return chosen.where(logits.amax(dim=-1).isfinite(), NO_TOKEN).tolist()


def _without_endings(scores: Tensor, requests: Sequence[Request]) -> Tensor:
    """Tokens that end a completion are ruled out until it has its least length."""
    rows = [i for i, r in enumerate(requests) if r.must_continue for _ in r.ending_ids]
    if not rows:
        return scores
    ids = [token_id for r in requests if r.must_continue for token_id in r.ending_ids]
    index = torch.tensor([rows, ids], device=scores.device).unbind()
    return scores.index_put(index, scores.new_tensor(float("-inf")))


def _constrained(scores: Tensor, requests: Sequence[Request]) -> Tensor:
    """Tokens that a request's constraint does not allow are ruled out."""
    rows = {i: r.constraint.allowed() for i, r in enumerate(requests) if r.constraint is not None}
    if not rows:
        return scores
    allowed = torch.ones(scores.shape, dtype=torch.bool)
    for row, mask in rows.items():
        allowed[row] = torch.from_numpy(mask)
    return scores.masked_fill(~allowed.to(scores.device), float("-inf"))


def _rows(tensor: Tensor, rows: list[int]) -> Tensor:
    return tensor if len(rows) == len(tensor) else tensor[rows]


def penalised(logits: Tensor, requests: Sequence[Request]) -> Tensor:
    """Logits of tokens that occurred are divided (multiplied if negative) by the repetition penalty
    (CTRL, arXiv 1909.05858), then lowered by the presence penalty and by the frequency penalty
    times their number (OpenAI's definition).

    The first looks at prompt and completion, the other two at the completion.
    """
    affected = [i for i, r in enumerate(requests) if r.params.penalised]
    if not affected:
        return logits
    rows: list[int] = []
    ids: list[int] = []
    factors: list[float] = []
    terms: list[float] = []
    for i in affected:
        params, counts = requests[i].params, counts_of(requests[i])
        rows += [i] * len(counts)
        ids += counts
        factors += [params.repetition_penalty] * len(counts)
        terms += [
            (params.presence_penalty if c else 0.0) + params.frequency_penalty * c
            for c in counts.values()
        ]
    logits = logits.clone()
    places = torch.tensor([rows, ids], device=logits.device).unbind()
    factor, term = torch.tensor([factors, terms], device=logits.device, dtype=torch.float64)
    score = logits[places].double()
    most = torch.finfo(logits.dtype).max  # an extreme penalty makes extreme scores, but scores
    logits[places] = (
        (torch.where(score < 0, score * factor, score / factor) - term)
        .clamp(-most, most)
        .to(logits.dtype)
    )
    return logits


def counts_of(request: Request) -> dict[int, int]:
    """How often each token id of prompt or completion was generated; kept with the request and
    brought up to date."""
    counts = request.counts
    if not counts:
        counts.update(dict.fromkeys(request.token_ids, 0))
    for token_id in request.output_ids[sum(counts.values()) :]:
        counts[token_id] = counts.get(token_id, 0) + 1
    return counts


def draw(logits: Tensor, params: Sequence[SamplingParams], draws: Sequence[float]) -> Tensor:
    """One token per row by inverse CDF over its filtered distribution. logits [n, V] fp32, draws in
    [0, 1) -> [n].

    Rows are taken together only if they look at equally many candidates, so equal rows give equal
    bits in any company.
    """
    chosen = torch.empty(len(params), dtype=torch.long, device=logits.device)
    waiting: dict[tuple[bool, int], list[int]] = {}  # (are W all, W) -> rows
    for i, p in enumerate(params):
        width = p.top_k or (FIRST_WIDTH if p.top_p < 1 or p.min_p > 0 else 0)
        waiting.setdefault((p.top_k > 0, width), []).append(i)
    while waiting:
        (whole, width), rows = waiting.popitem()
        probabilities, ids, settled = filtered(
            _rows(logits, rows), [params[i] for i in rows], width
        )
        find = places if logits.device.type == "cpu" else exact_places
        found = find(probabilities, [draws[i] for i in rows])
        # of NaN there is no place
        chosen[rows] = ids.gather(1, found.clamp(max=ids.shape[1] - 1)).squeeze(1)
        wider = [i for i, good in zip(rows, settled, strict=True) if not good]
        if wider:
            waiting.setdefault((whole, width * WIDENING), []).extend(wider)
    return chosen


def places(probabilities: Tensor, draws: Sequence[float]) -> Tensor:
    """Where each row's draw falls among its candidates [n, W] -> [n, 1]."""
    mass = probabilities.cumsum(dim=-1)
    points = torch.tensor(draws, device=mass.device)[:, None] * mass[:, -1:]
    # below the whole mass after rounding too
    return torch.searchsorted(mass, points * (1 - 2**-23), right=True)


def exact_places(probabilities: Tensor, draws: Sequence[float]) -> Tensor:
    """The same in integers, whose sums do not depend on their order: GPUs add in any order."""
    device = probabilities.device
    return fixed_places(
        probabilities, torch.tensor(draws, dtype=torch.float64, device=device)[:, None]
    )


def fixed_places(probabilities: Tensor, shares: Tensor) -> Tensor:
    """shares [n, 1]: the draws, in float64."""
    mass = (probabilities.double() * FIXED_POINT).long().cumsum(dim=-1)
    whole = mass[:, -1:]
    return torch.searchsorted(mass, (shares * whole).long().minimum(whole - 1), right=True)


def filtered(
    logits: Tensor, params: Sequence[SamplingParams], width: int
) -> tuple[Tensor, Tensor, list[bool]]:
    """(probabilities with dropped tokens at 0, their token ids, which rows are settled) of the
    ``width`` likeliest tokens.

    Sorted from high to low; ``width`` 0: all tokens in their own order, for rows without filters. A
    row is settled
    when its last candidate is dropped: then so is every token that was not looked at, and no sort
    of V was needed.
    """
    vocabulary = logits.shape[1]

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=logits.device)[:, None]

    least, most = TEMPERATURES
    # at most 0
    scaled = (logits - logits.amax(dim=-1, keepdim=True)) / column(
        [min(max(p.temperature, least), most) for p in params]
    )
    if width == 0:
        return (
            scaled.softmax(dim=-1),
            torch.arange(vocabulary, device=logits.device).expand_as(logits),
            [True] * len(params),
        )
    top, ids = scaled.topk(min(width, vocabulary))
    probabilities = (
        top.softmax(dim=-1) if params[0].top_k else scaled.softmax(dim=-1).gather(1, ids)
    )
    before = probabilities.cumsum(dim=-1) - probabilities  # mass of likelier tokens
    keep = (before < column([p.top_p for p in params])) & (
        probabilities >= column([p.min_p for p in params]) * probabilities[:, :1]
    )
    keep[:, 0] = True  # also where a bound is too small for its type
    settled = (
        [True] * len(params) if params[0].top_k or width >= vocabulary else (~keep[:, -1]).tolist()
    )
    return probabilities.masked_fill(~keep, 0.0), ids, settled


def _add_logprobs(logits: Tensor, chosen: Tensor, requests: Sequence[Request]) -> None:
    """Of the model's own distribution: before penalties, temperature and filters."""
    rows = [i for i, r in enumerate(requests) if r.params.logprobs is not None]
    if not rows:
        return
    values = _rows(logits, rows).log_softmax(dim=-1)
    own = values.gather(1, chosen[rows][:, None]).squeeze(1).tolist()
    most = min(values.shape[1], max(requests[i].params.logprobs or 0 for i in rows))
    top, ids = (t.tolist() for t in values.topk(most))
    for place, i in enumerate(rows):
        wanted = requests[i].params.logprobs
        requests[i].logprobs.append(
            TokenLogprob(own[place], ids[place][:wanted], top[place][:wanted])
        )
