"""Texts that are equal, and texts that nearly are.

Near-equal: the sets of their runs of five words have a Jaccard index of at least 0.8. MinHash
finds the pairs that may be (16 bands of 8 rows: of pairs at 0.8 it finds 95 %, at 0.9 all but one
in 10,000), and each of them is then compared exactly.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from lorabatch.check.words import BASE, I64, U64, Words, documents_of, grams, mixed, text_hashes

GRAM = 5
BANDS, ROWS = 16, 8
HASHES = BANDS * ROWS
# Of a pair at Jaccard 0.8 fewer than (0.8 - 0.15) * 128 minima agree once in 50,000 times; of one
# at 0.9 never.
SLACK = 0.15
# Templates with thousands of fillings make millions of pairs just below the bound. After this many
# exact comparisons a pair counts if its estimate is above the bound by MARGIN.
MOST_COMPARISONS, MARGIN = 500_000, 0.1
EMPTY = np.uint64(0)


def earlier_equal(hashes: U64) -> Iterator[tuple[int, int]]:
    """(number of a text, number of the first one equal to it) of each that has an earlier equal.
    hashes: ``text_hashes``; texts without words are no duplicates."""
    _, first, kind = np.unique(hashes, return_index=True, return_inverse=True)
    for number in np.flatnonzero((first[kind] != np.arange(len(hashes))) & (hashes != EMPTY)):
        yield int(number), int(first[kind[number]])


class Groups:
    """Things 0 to n - 1, joined step by step."""

    def __init__(self, count: int) -> None:
        self._parent = list(range(count))

    def root(self, thing: int) -> int:
        """The smallest of its group."""
        parent = self._parent
        while parent[thing] != thing:
            parent[thing] = thing = parent[parent[thing]]
        return thing

    def join(self, one: int, other: int) -> None:
        first, last = sorted((self.root(one), self.root(other)))
        self._parent[last] = first

    def join_equal(self, keys: Iterable[object]) -> None:
        """Things with equal keys; None is equal to nothing."""
        first: dict[object, int] = {}
        for thing, key in enumerate(keys):
            if key is not None:
                self.join(first.setdefault(key, thing), thing)

    def members(self) -> list[list[int]]:
        """Each group in order, in the order of their first members."""
        found: dict[int, list[int]] = defaultdict(list)
        for thing in range(len(self._parent)):
            found[self.root(thing)].append(thing)
        return list(found.values())


class Sketches:
    """MinHash of texts, and their runs of words for the exact comparison."""

    def __init__(self) -> None:
        self._minima: list[npt.NDArray[np.uint32]] = []
        self._grams: list[U64] = []
        self._hashes: list[U64] = []
        self._multipliers = mixed(np.arange(1, HASHES + 1, dtype=np.uint64)) | np.uint64(1)
        self._offsets = mixed(np.arange(1, HASHES + 1, dtype=np.uint64) + np.uint64(BASE))

    def add(self, words: Words) -> None:
        whole = text_hashes(words)
        hashes, starts = _grams_of_all(words, whole)
        self._hashes.append(whole)
        self._grams += [np.unique(part) for part in np.split(hashes, starts[1:])]
        minima = np.empty((len(whole), HASHES), np.uint32)
        for row, (a, b) in enumerate(zip(self._multipliers, self._offsets, strict=True)):
            values = ((hashes * a + b) >> np.uint64(32)).astype(np.uint32)
            minima[:, row] = np.minimum.reduceat(values, starts)
        self._minima.append(minima)

    def groups(self, least: float) -> Groups:
        """Near-equal texts joined; also those that hang together through others. least: Jaccard
        index."""
        hashes, minima = np.concatenate(self._hashes), np.concatenate(self._minima)
        groups = Groups(len(hashes))
        for number, first in earlier_equal(hashes):
            groups.join(number, first)
        distinct = np.array([n for n in range(len(hashes)) if groups.root(n) == n])
        distinct = distinct[hashes[distinct] != EMPTY]
        compared: set[tuple[int, int]] = set()  # a pair meets in several bands
        for members in _buckets(minima[distinct]):
            exact = len(compared) < MOST_COMPARISONS
            bound = least - SLACK if exact else least + MARGIN
            for pair in _likely(distinct[members], minima, bound):
                if groups.root(pair[0]) != groups.root(pair[1]) and pair not in compared:
                    compared.add(pair)
                    if not exact or self.jaccard(*pair) >= least:
                        groups.join(*pair)
        return groups

    def jaccard(self, one: int, other: int) -> float:
        a, b = self._grams[one], self._grams[other]
        common = len(np.intersect1d(a, b, assume_unique=True))
        return common / (len(a) + len(b) - common)


def _grams_of_all(words: Words, whole: U64) -> tuple[U64, I64]:
    """(runs of words, where those of each text begin); a text that is shorter than a run has one:
    all of it. whole: hashes of the texts."""
    hashes, places = grams(words, GRAM)
    bounds = np.searchsorted(places, words.bounds)
    short = np.flatnonzero(np.diff(bounds) == 0)
    hashes = np.insert(hashes, bounds[short], whole[short])
    documents = np.insert(documents_of(words, places), bounds[short], short)
    return hashes, np.searchsorted(documents, np.arange(len(whole)))


def _likely(
    members: I64, minima: npt.NDArray[np.uint32], least: float
) -> Iterator[tuple[int, int]]:
    """Pairs of which this share of the minima agrees."""
    for i, one in enumerate(members[:-1].tolist()):
        others = members[i + 1 :]
        agreed = (minima[others] == minima[one]).mean(axis=1)
        yield from ((one, other) for other in others[agreed >= least].tolist())


def _buckets(minima: npt.NDArray[np.uint32]) -> Iterator[I64]:
    """Rows that agree in all of a band, for each band and each such set of two or more."""
    factors = mixed(np.arange(ROWS, dtype=np.uint64)) | np.uint64(1)
    for band in range(BANDS):
        keys = (minima[:, band * ROWS : (band + 1) * ROWS] * factors).sum(axis=1, dtype=np.uint64)
        order = np.argsort(keys, kind="stable")
        bounds = np.flatnonzero(np.diff(keys[order])) + 1
        yield from (bucket for bucket in np.split(order, bounds) if len(bucket) > 1)


def largest_first(groups: Sequence[list[int]]) -> list[list[int]]:
    """Groups of two and more."""
    return sorted((group for group in groups if len(group) > 1), key=lambda group: -len(group))
