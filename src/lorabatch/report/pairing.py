"""Which completions of the base model and of an adapter answer the same prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from lorabatch.report.load import Completion, InferRun

T = TypeVar("T")


@dataclass(frozen=True)
class Pairing:
    base: InferRun
    tuned: InferRun
    pairs: list[tuple[Completion, Completion]]


def pair(base: InferRun, tuned: InferRun) -> list[tuple[Completion, Completion]]:
    """Completions with equal id *and* equal prompt, errors left out, in input order of
    ``tuned``."""
    before = {(c.id, c.prompt): c for c in base.completions if c.error is None}
    return [
        (before[c.id, c.prompt], c)
        for c in tuned.completions
        if c.error is None and (c.id, c.prompt) in before
    ]


def pairings(runs: Sequence[InferRun]) -> list[Pairing]:
    """For each adapter the two runs that share most prompts on the same base; the first of
    equals."""
    best: dict[str, Pairing] = {}
    for tuned in runs:
        for base in runs:
            if tuned.adapter is None or base.adapter is not None or not _same_base(base, tuned):
                continue
            candidate = Pairing(base, tuned, pair(base, tuned))
            if candidate.pairs and (
                tuned.adapter not in best or len(candidate.pairs) > len(best[tuned.adapter].pairs)
            ):
                best[tuned.adapter] = candidate
    return list(best.values())


def _same_base(one: InferRun, other: InferRun) -> bool:
    """By content where both runs recorded it, else by name."""
    for key in ("fingerprint", "name"):
        if one.model.get(key) and other.model.get(key):
            return bool(one.model[key] == other.model[key])
    return False


def spread(items: Sequence[T], most: int) -> list[T]:
    """At most ``most`` items, evenly over the whole sequence: ``spread("abcdef", 3) == ["a", "c",
    "e"]``."""
    count = min(most, len(items))
    return [items[i * len(items) // count] for i in range(count)]
