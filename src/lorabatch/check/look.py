"""All checks over the files of a training, in as few passes as possible."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from lorabatch.check import copies, items, leaks, shape
from lorabatch.check.contents import Contents
from lorabatch.check.duplicates import Sketches
from lorabatch.check.overlap import Overlap
from lorabatch.check.rules import Seen
from lorabatch.check.sides import Listener, Side, side_of
from lorabatch.check.words import Words, all_words
from lorabatch.corpus.readers import Document


@dataclass(frozen=True)
class Files:
    train: Sequence[Document]
    val: Sequence[Document] | None
    test: Sequence[Document] = ()


def look_for_training(files: Files, near_words: float) -> Iterator[Seen]:
    """What ``train`` looks for: linear in the data. near_words: share that makes a leak."""
    return _asked(files, near_words, None)


def look_for_everything(files: Files, near_words: float, near_jaccard: float) -> Iterator[Seen]:
    """What shows without a tokenizer. near_jaccard: index that makes two texts near-equal."""
    return _asked(files, near_words, near_jaccard)


def _asked(files: Files, near_words: float, near_jaccard: float | None) -> Iterator[Seen]:
    """But for what these files cannot have: prompts of plain text, groups without a field."""
    return (seen for seen in _look(files, near_words, near_jaccard) if seen.total)


def _look(files: Files, near_words: float, near_jaccard: float | None) -> Iterator[Seen]:
    val = files.val or ()
    contents = Contents([*files.train, *val], with_language=near_jaccard is not None)
    held = _HeldOut.of(val, _after(len(files.train), contents.listen))
    sketches = Sketches()
    more = [sketches.add] if near_jaccard else []
    train = side_of(files.train, contents.listen, held.overlap.add, *more)
    contents.look()
    if val:
        yield from _leaks(train, held, near_words)
        yield shape.size(files.train, val)
    if files.test:
        yield _test_items(train, files.test, near_words)
    yield from (copies.exact(train), copies.conflicting(train), *contents.seen())
    yield shape.seams(files.train)
    if near_jaccard is not None:
        yield copies.near(train, sketches, near_jaccard)
        yield contents.language()
        yield shape.outliers(train)


@dataclass(frozen=True)
class _HeldOut:
    """Documents that must not stand in training."""

    side: Side
    overlap: Overlap

    @classmethod
    def of(cls, documents: Sequence[Document], *listeners: Listener) -> _HeldOut:
        words: list[Words] = []
        side = side_of(documents, words.append, *listeners)
        return cls(side, Overlap(words))


def _leaks(train: Side, held: _HeldOut, near_words: float) -> Iterator[Seen]:
    yield leaks.by_group(train, held.side)
    yield leaks.exact(train, held.side)
    yield leaks.near(train, held.side, held.overlap.matches(), near_words)


def _test_items(train: Side, test: Sequence[Document], near_words: float) -> Seen:
    held = _HeldOut.of(list(items.judged(test)))
    for words in all_words(items.whole_texts(train.documents)):
        held.overlap.add(words)
    return leaks.test_items(train, held.side, held.overlap.matches(), near_words)


def _after(count: int, listen: Listener) -> Listener:
    """Numbers that come after those of another file."""
    return lambda words: listen(replace(words, first=words.first + count))
