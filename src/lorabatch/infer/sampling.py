"""From logits to token ids, row by row settings, random numbers by counter.

A row's random number is a hash of (its seed, its step), so what a request draws does not depend
on its neighbours, on the batch size or on a resume. The order of the filters is transformers':
repetition penalty, temperature, top-k, top-p, min-p.

Shapes: n rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lorabatch.infer.requests import Request, SamplingParams

_MASK = (1 << 64) - 1


def uniform(seed: int, step: int) -> float:
    """A number in [0, 1) from two integers: two rounds of SplitMix64 (Steele, Lea & Flood, 2014)."""
    state = seed & _MASK
    for word in (step, 0x5851F42D4C957F2D):
        state = (state + 0x9E3779B97F4A7C15 + (word & _MASK) * 0xD1342543DE82EF95) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return (state >> 11) / (1 << 53)


def sample(logits: Tensor, requests: Sequence[Request]) -> list[int]:
    """The next token of each row. logits [n, V]; requests: whose rows they are. One host synchronisation."""
    logits = penalised(logits, requests)
    chosen = logits.argmax(dim=-1)
    sampled = [i for i, request in enumerate(requests) if not request.params.greedy]
    if sampled:
        rows = torch.tensor(sampled, device=logits.device)
        params = [requests[i].params for i in sampled]
        draws = [uniform(p.seed, len(requests[i].output_ids)) for i, p in zip(sampled, params, strict=True)]
        chosen[rows] = _draw(logits[rows].float(), params, draws)
    return chosen.tolist()


def penalised(logits: Tensor, requests: Sequence[Request]) -> Tensor:
    """Divide positive and multiply negative logits of tokens already seen (CTRL, arXiv 1909.05858)."""
    affected = [i for i, r in enumerate(requests) if r.params.repetition_penalty != 1]
    if not affected:
        return logits
    logits = logits.float().clone()
    for i in affected:
        request = requests[i]
        seen = torch.tensor(sorted({*request.token_ids, *request.output_ids}), device=logits.device)
        score = logits[i, seen]
        penalty = request.params.repetition_penalty
        logits[i, seen] = torch.where(score < 0, score * penalty, score / penalty)
    return logits


def _draw(logits: Tensor, params: Sequence[SamplingParams], draws: Sequence[float]) -> Tensor:
    """Inverse-CDF sampling over the filtered distribution, likeliest tokens first. logits [n, V] fp32."""
    probabilities, order = filtered(logits, params)
    mass = probabilities.cumsum(dim=-1)
    points = torch.tensor(draws, dtype=torch.float32, device=logits.device)[:, None] * mass[:, -1:]
    place = (mass <= points).sum(dim=-1, keepdim=True).clamp(max=logits.shape[1] - 1)
    kept = (probabilities > 0).sum(dim=-1, keepdim=True) - 1  # rounding must not step onto a dropped token
    return order.gather(1, torch.minimum(place, kept)).squeeze(1)


def filtered(logits: Tensor, params: Sequence[SamplingParams]) -> tuple[Tensor, Tensor]:
    """(probabilities sorted from high to low with dropped tokens at 0, their token ids), both [n, V]."""

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=logits.device)[:, None]

    scaled, order = (logits / column([p.temperature for p in params])).sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(logits.shape[1], device=logits.device)[None, :]
    top_k = column([float(p.top_k or logits.shape[1]) for p in params])
    probabilities = scaled.masked_fill(rank >= top_k, float("-inf")).softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities  # mass of likelier tokens
    probabilities = probabilities.masked_fill(before >= column([p.top_p for p in params]), 0.0)
    least = column([p.min_p for p in params]) * probabilities[:, :1]
    return probabilities.masked_fill(probabilities < least, 0.0), order
