"""How much of a held-out text stands in one training text: shared runs of eight words.

The index holds the held-out side, so memory follows the smaller file; training texts pass by once.
Runs that occur in more than ``BOILERPLATE`` training texts say nothing about one of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lorabatch.check.words import I64, U64, Words, documents_of, grams

GRAM = 8
BOILERPLATE = 10
FILTER_BITS = 22  # of a table that says at once of most runs that they are not in the index


@dataclass(frozen=True)
class Match:
    """The training text that shares most words with a held-out one."""

    held_out: int
    training: int
    share: float  # of the held-out text's words
    run: int  # longest run of shared words


class Overlap:
    def __init__(self, held_out: Iterable[Words]) -> None:
        some = list(held_out)
        self._words = _joined([words.counts for words in some])  # of each held-out text
        found = [_placed(words) for words in some]
        hashes = np.concatenate([np.zeros(0, np.uint64), *(h for h, _, _ in found)])
        # Every run once; where it stands: entries first[k] to first[k + 1] of the other two.
        order = np.argsort(hashes, kind="stable")
        self._runs, first = np.unique(hashes[order], return_index=True)
        self._first = np.append(first, len(order))
        self._documents = _joined([documents for _, documents, _ in found])[order]
        self._places = _joined([places for _, _, places in found])[order]
        self._filter = np.zeros(1 << FILTER_BITS, bool)
        self._filter[_short(self._runs)] = True
        self._seen: list[tuple[I64, I64]] = []  # (training text, run), each pair once

    def add(self, words: Words) -> None:
        """Training texts."""
        if not len(self._runs):
            return
        hashes, places = grams(words, GRAM)
        likely = np.flatnonzero(self._filter[_short(hashes)])
        hashes, places = hashes[likely], places[likely]
        runs = np.searchsorted(self._runs, hashes)
        same = np.flatnonzero(np.append(self._runs, 0)[runs] == hashes)
        runs, documents = runs[same], documents_of(words, places[same]) + words.first
        pairs = np.unique(documents * (len(self._runs) + 1) + runs)
        self._seen.append(np.divmod(pairs, len(self._runs) + 1))

    def matches(self) -> Iterator[Match]:
        """Of every held-out text that shares a run with a training text."""
        training = _joined([documents for documents, _ in self._seen])
        runs = _joined([runs for _, runs in self._seen])
        common = np.bincount(runs, minlength=len(self._runs)) > BOILERPLATE
        training, runs = training[~common[runs]], runs[~common[runs]]
        times = np.diff(self._first)[runs]  # a run may stand at several places
        within = np.arange(times.sum()) - np.repeat(np.cumsum(times) - times, times)
        entries = np.repeat(self._first[runs], times) + within
        found = (self._documents[entries], np.repeat(training, times), self._places[entries])
        return self._best(*(column[np.lexsort(found[::-1])] for column in found))

    def _best(self, held_out: I64, training: I64, places: I64) -> Iterator[Match]:
        """Of runs in order of held-out text, training text and place."""
        if not len(places):
            return
        new_pair = np.append(True, (np.diff(held_out) != 0) | (np.diff(training) != 0))
        pairs = np.flatnonzero(new_pair)
        step = np.append(places[1:] - places[:-1], 0)
        step[np.append(new_pair[1:], True)] = GRAM  # the last run of a pair is covered whole
        covered = np.add.reduceat(np.clip(step, 0, GRAM), pairs)
        shares = covered / self._words[held_out[pairs]]
        for held, best in _largest(held_out[pairs], shares):
            first, last = pairs[best], [*pairs, len(places)][best + 1]
            run = GRAM + _longest(np.diff(places[first:last]) == 1)
            yield Match(held, int(training[first]), float(shares[best]), run)


def _placed(words: Words) -> tuple[U64, I64, I64]:
    """(hash, text, place in the text) of every run."""
    hashes, places = grams(words, GRAM)
    documents = documents_of(words, places)
    return hashes, documents + words.first, places - words.bounds[documents]


def _largest(keys: I64, values: npt.NDArray[np.float64]) -> Iterator[tuple[int, int]]:
    """(key, index of its largest value, the first of equal ones) of sorted keys."""
    bounds = np.append(np.flatnonzero(np.append(True, np.diff(keys) != 0)), len(keys)).tolist()
    for start, end in itertools.pairwise(bounds):
        yield int(keys[start]), start + int(np.argmax(values[start:end]))


def _longest(flags: npt.NDArray[np.bool_]) -> int:
    """Length of the longest run of true ones."""
    breaks = np.flatnonzero(np.concatenate(([True], ~flags, [True])))
    return int(np.diff(breaks).max()) - 1


def _short(hashes: U64) -> I64:
    return (hashes >> np.uint64(64 - FILTER_BITS)).astype(np.int64)


def _joined(parts: list[I64]) -> I64:
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)
