"""What stands in the documents of all files: personal data, damage, repetition, languages."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from lorabatch.check.characters import broken, characters_of, signs_of
from lorabatch.check.identifiers import CONTACT, NUMBER, RECORD, Identifier, identifiers
from lorabatch.check.rules import Hit, Seen
from lorabatch.check.text import is_mojibake, languages, repeated_shares
from lorabatch.check.words import Words, chunks
from lorabatch.corpus.readers import Document

REPEATED = 0.3  # of a document
NO_LETTERS = 0.3  # of what is not space


class Contents:
    """Listens to the words of supervised texts, and looks at the characters of whole documents."""

    def __init__(self, documents: Sequence[Document], *, with_language: bool) -> None:
        self._documents, self._with_language = documents, with_language
        self._hits: dict[str, list[Hit]] = {
            name: [] for name in (NUMBER, CONTACT, RECORD, "text.broken", "text.mojibake")
        }
        self._repeated: list[Hit] = []
        self._languages: list[tuple[str, str | None]] = []  # of each document: file:line, language

    def listen(self, words: Words) -> None:
        for number in np.flatnonzero((shares := repeated_shares(words)) > REPEATED).tolist():
            where = self._documents[words.first + number].where
            self._repeated.append(Hit("text.repeat", where, figure=float(shares[number])))
        if self._with_language:
            for number, language in enumerate(languages(words), words.first):
                self._languages.append((self._documents[number].where, language))

    def look(self) -> None:
        """At prompts and texts."""
        for first, some in chunks(map(_all_of, self._documents)):
            characters = characters_of(some)
            damaged, unlettered = broken(characters)
            for number in np.flatnonzero((damaged > 0) | (unlettered > NO_LETTERS)).tolist():
                self._add("text.broken", first + number, float(damaged[number]))
            signs = signs_of(characters)
            for number, text in enumerate(some):
                for found in identifiers(text, signs, number):
                    self._add_identifier(found, first + number)
                if is_mojibake(text):
                    self._add("text.mojibake", first + number)

    def _add(self, check: str, number: int, figure: float | None = None) -> None:
        self._hits[check].append(Hit(check, self._documents[number].where, figure=figure))

    def _add_identifier(self, found: Identifier, number: int) -> None:
        where = self._documents[number].where
        hit = Hit(found.row, where, kind=found.kind, masked=found.masked)
        self._hits[found.row].append(hit)

    def seen(self) -> list[Seen]:
        total = len(self._documents)
        return [
            *(
                Seen(name, total, hits, note=_kinds(hits), places=len({hit.where for hit in hits}))
                for name, hits in self._hits.items()
            ),
            Seen("text.repeat", total, self._repeated),
        ]

    def language(self) -> Seen:
        """Documents of another language than most of their file."""
        counts = Counter(language for _, language in self._languages if language)
        main = counts.most_common(1)[0][0] if counts else None
        hits = [
            Hit("text.language", where, kind=language)
            for where, language in self._languages
            if language not in (None, main)
        ]
        note = _kinds(hits) + (f"; most are {main}" if main else "")
        return Seen("text.language", len(self._languages), hits, note=note)


def _all_of(document: Document) -> str:
    given = document.given
    return f"{given}\n{document.learned}" if given else document.learned


def _kinds(hits: Sequence[Hit]) -> str:
    """ " (2 CPF, 1 CNS)": of identifiers."""
    counts = Counter(hit.kind for hit in hits if hit.kind)
    text = ", ".join(f"{count} {kind}" for kind, count in counts.most_common())
    return f" ({text})" if text else ""
