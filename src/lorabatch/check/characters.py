"""Characters as numbers: what each document is made of, and which of them are worth a closer
look."""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lorabatch.check.words import CODES, I64, code_points, matching

Flags = npt.NDArray[np.bool_]
OTHER, LETTER, SPACE, BROKEN = range(4)
# Controls but for tab and line ends, the replacement character, private use, invisible ones. Left
# out: the joiners U+200C and U+200D, which some scripts and emoji need.
BROKEN_CHARACTERS = (
    r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufffd\ue000-\uf8ff\u200b\u2060\ufeff\ud800-\udfff]"
)


@dataclass(frozen=True)
class Characters:
    """Of several documents: codes [N]; document d has those from bounds[d] to bounds[d + 1] - 1,
    where a line end follows."""

    codes: npt.NDArray[np.uint32]
    bounds: I64

    def with_any(self, positions: I64) -> Flags:
        """[D] whether a document has one of the positions."""
        flags = np.zeros(len(self.bounds) - 1, bool)
        flags[np.searchsorted(self.bounds, positions, side="right") - 1] = True
        return flags

    def counts(self, flags: Flags) -> I64:
        """[D] how many characters of each document are flagged."""
        sums = np.concatenate(([0], np.cumsum(flags)))
        found: I64 = np.diff(sums[self.bounds])
        return found


@dataclass(frozen=True)
class Signs:
    """[D] what the texts have that identifiers need; a rule whose sign is missing is not tried."""

    number: Flags  # seven digits near each other
    digits: Flags  # four digits in a row, or six of a date
    address: Flags  # three dots near each other
    age: Flags  # a digit, then a word that may be "years" or "anos"
    at: Flags
    slash: Flags
    company: Flags  # what a CNPJ has: "/0001-"


def characters_of(texts: Sequence[str]) -> Characters:
    codes = code_points("\n".join([*texts, ""]))
    bounds = np.cumsum([0, *(len(text) + 1 for text in texts)])
    return Characters(codes, bounds)


def signs_of(characters: Characters) -> Signs:
    codes, with_any = characters.codes, characters.with_any
    digits = np.flatnonzero((codes - np.uint32(ord("0"))) < 10)  # below "0" it wraps around
    dots = np.flatnonzero(codes == ord("."))
    slashes = np.flatnonzero(codes == ord("/"))
    return Signs(
        number=with_any(_close(digits, 7, 25)),
        digits=with_any(_close(digits, 4, 4)) | with_any(_close(digits, 6, 10)),
        address=with_any(_close(dots, 3, 9)),
        age=with_any(_before_years(codes, digits)),
        at=with_any(np.flatnonzero(codes == ord("@"))),
        slash=with_any(slashes),
        company=with_any(slashes[np.append(codes, [0] * 5)[slashes + 5] == ord("-")]),
    )


def _close(positions: I64, count: int, width: int) -> I64:
    """Where this many of them begin that stand within so many characters."""
    ahead = positions[count - 1 :]
    return positions[: len(ahead)][ahead - positions[: len(ahead)] < width]


def _before_years(codes: npt.NDArray[np.uint32], digits: I64) -> I64:
    """Digits that a space or hyphen and a letter of "years" or "anos" follow."""
    padded = np.append(codes, [0, 0])
    spaced = np.isin(padded[digits + 1], [ord(" "), ord("-")])
    return digits[spaced & np.isin(padded[digits + 2], [ord(c) for c in "ayAY"])]


def broken(characters: Characters) -> tuple[I64, npt.NDArray[np.float64]]:
    """[D] damaged characters of each document, and the share of those that are neither letters nor
    spaces."""
    classes = _classes()[characters.codes]
    letters = characters.counts(classes == LETTER)
    seen = np.maximum(characters.counts(classes != SPACE), 1)
    return characters.counts(classes == BROKEN), 1 - letters / seen


@functools.cache
def _classes() -> npt.NDArray[np.uint8]:
    table = np.full(CODES, OTHER, np.uint8)
    table[matching(r"[^\W\d_]")] = LETTER
    marks = [c for c in range(0x300, 0x20000) if unicodedata.category(chr(c))[0] == "M"]
    table[marks] = LETTER
    table[matching(r"\s")] = SPACE
    table[matching(BROKEN_CHARACTERS)] = BROKEN
    return table
