"""Text that teaches nothing good: wrongly decoded, repeating itself, in another language."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from lorabatch.check.words import I64, Words, documents_of, grams, mixed, words_of

GRAM = 10
FEWEST_WORDS = 20  # of a text whose language is told
# UTF-8 read as Latin-1 or Windows-1252 turns one letter into two signs: the first is one of these,
# the second comes from this range (or from what Windows-1252 has in its place). A capital A with a
# tilde beside a sign is Portuguese too (IRMÃ”), so a small letter must stand next to the pair.
SECOND = "\x80-\xbfŒœŠšŽžŸƒˆ˜–—‘’‚“”„†‡•…‰‹›€™"
MOJIBAKE = re.compile(
    rf"[a-zà-ÿ][ÃÂ][{SECOND}]|[ÃÂ][{SECOND}][a-z]|Â[°µ±·²³½¼¾ºª®©]|â€[{SECOND}]|ï»¿|ï¿½"
)
MOJIBAKE_SIGNS = ("Ã", "Â", "â€", "ï")
# Words that a language cannot do without, and that the others (almost) do not have: not "mais",
# "das", "die", "no", "per", which several have, nor "na", which is also sodium.
FUNCTION_WORDS = {
    "English": "the of and to is that with for are this from which have been were they their has "
    "will should can may when you your by it be if or on at",
    "Portuguese": "não uma com dos ao aos à às pela pelo são foi também isso seu sua você sem "
    "muito há em do da nas nos um é ou depois até já só",
    "Spanish": "el los las y es del su sus pero muy también fue son está han sin usted cuando lo "
    "más hasta desde",
    "French": "le les est dans pas qui avec sont du ne vous aux cette ces il elle été ses leur et "
    "une au sur",
    "German": "der und ist nicht ein eine mit für von auf dem den sich werden wird auch bei oder "
    "sie als aus nach wie zu sind",
    "Italian": "il che è sono della nel gli più anche dei delle alla essere questo ha ed di dal "
    "nella degli",
}


def is_mojibake(text: str) -> bool:
    """Whether bytes of UTF-8 were read as another encoding and kept so."""
    if text.isascii() or not any(sign in text for sign in MOJIBAKE_SIGNS):
        return False
    return MOJIBAKE.search(text) is not None


def repeated_shares(words: Words) -> npt.NDArray[np.float64]:
    """[D] share of each document that its most frequent run of ten words makes up, where it occurs
    three times; else 0."""
    hashes, places = grams(words, GRAM)
    documents = documents_of(words, places)
    keys = hashes ^ mixed(documents.astype(np.uint64))  # of one document each
    order, shares = np.sort(keys), np.zeros(len(words.counts))
    thrice = np.unique(order[2:][order[2:] == order[:-2]])
    often = np.flatnonzero(np.isin(keys, thrice))
    _, first, times = np.unique(keys[often], return_index=True, return_counts=True)
    inside = documents[often[first]]
    np.maximum.at(shares, inside, np.minimum(times * GRAM / words.counts[inside], 1))
    return shares


def languages(words: Words) -> list[str | None]:
    """[D] the language of each document, by its function words; None where that does not show."""
    counts = np.stack([_hits(words, known) for known in _function_words()], axis=1)
    order = np.sort(counts, axis=1)
    clear = (words.counts >= FEWEST_WORDS) & (order[:, -1] >= 2 * order[:, -2] + 3)
    clear &= order[:, -1] >= 0.1 * words.counts
    names = list(FUNCTION_WORDS)
    return [
        names[best] if is_clear else None
        for best, is_clear in zip(counts.argmax(axis=1).tolist(), clear.tolist(), strict=True)
    ]


def _hits(words: Words, known: Sequence[np.uint64]) -> I64:
    sums = np.concatenate(([0], np.cumsum(np.isin(words.hashes, known))))
    found: I64 = np.diff(sums[words.bounds])
    return found


@functools.cache
def _function_words() -> tuple[list[np.uint64], ...]:
    return tuple(list(words_of([text]).hashes) for text in FUNCTION_WORDS.values())
