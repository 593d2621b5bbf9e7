"""The documents of one file as the checks need them: read over once, and numbered."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lorabatch.check.words import I64, U64, Words, all_words, mixed, text_hashes
from lorabatch.corpus.readers import Document

SHORT_WORDS = 8  # a shorter answer is equal only together with its prompt: "Yes." is no leak
Listener = Callable[[Words], None]


@dataclass(frozen=True)
class Side:
    documents: Sequence[Document]
    counts: I64  # [D] words of the supervised text
    texts: U64  # [D] hashes of it, 0 without words
    prompts: U64  # [D] of what stands before it

    @property
    def whole(self) -> U64:
        """[D] prompt and text together; 0 without words in the text."""
        both = mixed(self.texts ^ mixed(self.prompts + np.uint64(1)))
        return np.where(self.texts == 0, np.uint64(0), both)

    @property
    def answers(self) -> U64:
        """[D] what makes two of them the same answer."""
        return np.where(self.counts < SHORT_WORDS, self.whole, self.texts)

    def where(self, number: int) -> str:
        return self.documents[number].where


def side_of(documents: Sequence[Document], *listeners: Listener) -> Side:
    """listeners: get the words of all supervised texts, some documents at a time."""
    hashes, counts = [], []
    for words in all_words(document.learned for document in documents):
        hashes.append(text_hashes(words))
        counts.append(words.counts)
        for listener in listeners:
            listener(words)
    return Side(
        documents,
        np.concatenate(counts) if counts else np.zeros(0, np.int64),
        np.concatenate(hashes) if hashes else np.zeros(0, np.uint64),
        _prompts(documents),
    )


def _prompts(documents: Sequence[Document]) -> npt.NDArray[np.uint64]:
    given = all_words(document.given for document in documents)
    return np.concatenate([np.zeros(0, np.uint64), *map(text_hashes, given)])
