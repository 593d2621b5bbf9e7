"""Training documents that say the same twice, or two things about one prompt."""

from __future__ import annotations

import numpy as np

from lorabatch.check.duplicates import Sketches, earlier_equal, largest_first
from lorabatch.check.rules import Hit, Seen
from lorabatch.check.sides import Side


def exact(train: Side) -> Seen:
    hits = [
        Hit("dup.exact", train.where(number), train.where(first))
        for number, first in earlier_equal(train.whole)
    ]
    return Seen("dup.exact", len(train.documents), hits)


def near(train: Side, sketches: Sketches, least: float) -> Seen:
    """least: Jaccard index of the runs of five words."""
    groups = largest_first(sketches.groups(least).members())
    hits = [
        Hit("dup.near", train.where(number), train.where(group[0]), len(group))
        for group in groups
        for number in group[1:]
    ]
    places = sum(map(len, groups))
    note = f" in {len(groups):,} groups, the largest of {len(groups[0]):,}" if groups else ""
    return Seen("dup.near", len(train.documents), hits, note=note, places=places)


def conflicting(train: Side) -> Seen:
    """Equal prompts with different answers."""
    prompted = np.flatnonzero(train.prompts != 0)
    _, first, kind = np.unique(train.prompts[prompted], return_index=True, return_inverse=True)
    first = prompted[first[kind]]
    differs = train.texts[prompted] != train.texts[first]
    hits = [
        Hit("dup.conflict", train.where(number), train.where(other))
        for number, other in zip(prompted[differs].tolist(), first[differs].tolist(), strict=True)
    ]
    return Seen("dup.conflict", len(prompted), hits)
