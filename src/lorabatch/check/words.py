"""Words as 64-bit numbers, so that a hundred megabytes of text are compared in seconds.

Two texts are equal here if their words are: case, punctuation and spaces do not count, digits do
("5 mg" and "50 mg" are two facts). Hashes are polynomials modulo 2**64 with a random number for
each character; they are the same in every process.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

U64 = npt.NDArray[np.uint64]
I64 = npt.NDArray[np.int64]

CHUNK_CHARACTERS = 1 << 20  # looked at together: some 50 MB of arrays
CODES = 0x33480  # of characters that are told apart: all later ones are rare, and count as the last
BASE = 0x9E3779B97F4A7C13  # odd, so that it has an inverse modulo 2**64; 3 modulo 8
INVERSE = pow(BASE, -1, 1 << 64)


@dataclass(frozen=True)
class Words:
    """Of several documents: hashes [W]; document d has those from bounds[d] to bounds[d + 1]."""

    hashes: U64
    bounds: I64
    first: int = 0  # number of the first of these documents among all

    @property
    def counts(self) -> I64:
        """[D] words of each document."""
        return np.diff(self.bounds)


def normalised(text: str) -> str:
    if text.isascii():
        return text.lower()
    return unicodedata.normalize("NFKC", text).casefold()


def chunks(texts: Iterable[str]) -> Iterator[tuple[int, list[str]]]:
    """(number of the first one, some texts) until all were there."""
    first, size, some = 0, 0, list[str]()
    for text in texts:
        if some and size + len(text) > CHUNK_CHARACTERS:
            yield first, some
            first, size, some = first + len(some), 0, []
        some.append(text)
        size += len(text)
    if some:
        yield first, some


def words_of(texts: Sequence[str], first: int = 0) -> Words:
    plain = [normalised(text) for text in texts]
    codes = code_points("\n".join(plain))
    values = _values()[codes]
    inside = np.concatenate(([False], values != 0, [False]))
    edges = np.flatnonzero(inside[1:] != inside[:-1])
    starts, ends = edges[::2], edges[1::2]
    ends_of_texts = np.cumsum([len(text) + 1 for text in plain])
    bounds = np.concatenate(([0], np.searchsorted(starts, ends_of_texts)))
    return Words(_spans(values, starts, ends), bounds.astype(np.int64), first)


def all_words(texts: Iterable[str]) -> Iterator[Words]:
    return (words_of(some, first) for first, some in chunks(texts))


def code_points(text: str) -> npt.NDArray[np.uint32]:
    """[characters] below CODES."""
    found = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    return np.minimum(found, np.uint32(CODES - 1))


def text_hashes(words: Words) -> U64:
    """[D] one number for the sequence of words of each document; 0 for a document without any."""
    found = _spans(words.hashes, words.bounds[:-1], words.bounds[1:])
    return np.where(words.counts > 0, found, np.uint64(0))


def grams(words: Words, n: int) -> tuple[U64, I64]:
    """(hash, place of its first word) of every run of n words of one document."""
    hashes = words.hashes
    count = max(0, len(hashes) - n + 1)
    sums = np.zeros(count, np.uint64)
    for offset in range(n):
        sums *= np.uint64(BASE)
        sums += hashes[offset : offset + count]
    whole = np.ones(count, bool)
    for bound in words.bounds[1:-1]:  # a run that begins before a bound and ends after it
        whole[max(0, bound - n + 1) : bound] = False
    places = np.flatnonzero(whole)
    return mixed(sums[places]), places


def documents_of(words: Words, places: I64) -> I64:
    """Number, within these words, of the document that each place is in."""
    return np.searchsorted(words.bounds, places, side="right") - 1


def mixed(values: U64) -> U64:
    """Every bit depends on all others (the end of splitmix64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _spans(values: U64, starts: I64, ends: I64) -> U64:
    """A hash of each values[start:end]."""
    powers, inverses = _powers(1 << max(len(values), 1).bit_length())
    sums = np.concatenate((np.zeros(1, np.uint64), np.cumsum(values * powers[: len(values)])))
    return mixed((sums[ends] - sums[starts]) * inverses[starts])


@functools.lru_cache(maxsize=2)
def _powers(count: int) -> tuple[U64, U64]:
    """BASE**i and BASE**-i modulo 2**64."""
    powers = np.ones((2, count), np.uint64)
    powers[0, 1:], powers[1, 1:] = BASE, INVERSE
    np.cumprod(powers, axis=1, out=powers)
    return powers[0], powers[1]


@functools.cache
def _values() -> U64:
    """[CODES] a random number for each character of words, 0 for all others."""
    return np.where(matching(r"\w"), mixed(np.arange(CODES, dtype=np.uint64) + np.uint64(BASE)), 0)


def matching(characters: str) -> npt.NDArray[np.bool_]:
    """[CODES] which characters a class of a regular expression matches."""
    table = np.zeros(CODES, bool)
    for found in re.finditer(f"{characters}+", "".join(map(chr, range(CODES)))):
        table[found.start() : found.end()] = True
    return table
