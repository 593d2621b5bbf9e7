"""Whether held-out documents are in training: by their group, as they stand, or in large part."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from lorabatch.check.overlap import Match
from lorabatch.check.rules import Hit, Seen
from lorabatch.check.sides import Side


def by_group(train: Side, val: Side) -> Seen:
    """The group's own name may be a patient's number: places only."""
    first: dict[str, str] = {}
    for document in train.documents:
        if document.group is not None:
            first.setdefault(document.group, document.where)
    hits = [
        Hit("leak.group", document.where, first[document.group])
        for document in val.documents
        if document.group in first
    ]
    return Seen("leak.group", len(val.documents) if first else 0, hits)


def exact(train: Side, val: Side) -> Seen:
    known, first = np.unique(train.answers, return_index=True)
    at = np.minimum(np.searchsorted(known, val.answers), len(known) - 1)
    same = np.flatnonzero((known[at] == val.answers) & (val.texts != 0))
    hits = [
        Hit("leak.exact", val.where(number), train.where(first[at[number]]))
        for number in same.tolist()
    ]
    return Seen("leak.exact", len(val.documents), hits)


def near(train: Side, val: Side, matches: Iterable[Match], least: float) -> Seen:
    """Of texts of eight words and more. least: share of words."""
    found = sorted(matches, key=lambda match: (-match.share, match.held_out))
    hits = _hits("leak.near", train, val, found, least)
    what = f"validation texts share {100 * least:g} % of their words or more with one training text"
    return Seen("leak.near", len(val.documents), hits, what=what, note=_largest(found[:1]))


def _largest(matches: list[Match]) -> str:
    return "".join(
        f"; the largest share is {m.share:.2f} ({m.run} words in a row)" for m in matches
    )


def test_items(train: Side, items: Side, matches: Iterable[Match], least: float) -> Seen:
    hits = _hits("leak.eval", train, items, matches, least)
    return Seen("leak.eval", len(items.documents), hits)


def _hits(
    check: str, train: Side, held_out: Side, matches: Iterable[Match], least: float
) -> list[Hit]:
    return [
        Hit(
            check,
            held_out.where(match.held_out),
            train.where(match.training),
            figure=match.share,
            run=match.run,
        )
        for match in matches
        if match.share >= least
    ]
