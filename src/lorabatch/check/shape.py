"""The form of documents and files, as far as it shows without a tokenizer."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

from lorabatch.check.rules import Hit, Seen
from lorabatch.check.sides import Side
from lorabatch.corpus.readers import Document

FEW_DOCUMENTS = 100  # of validation
OTHER_MIX = 0.1  # Jensen-Shannon divergence of the domains, in bits
OUTLIER = 10  # times the median
FEWEST_WORDS = 3
# Marks of chat templates. Those of the second kind are fine in a prompt that the user wrote.
MARKS = re.compile(r"<\|[a-z_]+\|>|</?s>|\[/?INST\]|<<SYS>>|<(?:start|end)_of_turn>")
ANSWER_MARKS = re.compile(r"^### (?:Response|Instruction|Assistant|User):", re.MULTILINE)


def seams(documents: Sequence[Document]) -> Seen:
    """Prompts that end in a space."""
    prompted = [document for document in documents if document.prompt]
    hits = [Hit("fmt.seam", d.where) for d in prompted if d.prompt and d.prompt[-1] in " \t\xa0"]
    return Seen("fmt.seam", len(prompted), hits)


def marks(documents: Sequence[Document], special: Sequence[str] = ()) -> Seen:
    """special: tokens of the model's own tokenizer."""
    hits = [Hit("fmt.special", d.where) for d in documents if _is_marked(d, special)]
    return Seen("fmt.special", len(documents), hits)


def _is_marked(document: Document, special: Sequence[str]) -> bool:
    text, given = document.learned, document.given
    if MARKS.search(text) or MARKS.search(given):
        return True
    if given and ANSWER_MARKS.search(text):
        return True
    return any(token in text or token in given for token in special)


def outliers(train: Side) -> Seen:
    """Listed, and no more: a long document may be the best one."""
    median = float(np.median(train.counts))
    numbers = np.flatnonzero((train.counts > OUTLIER * median) | (train.counts < FEWEST_WORDS))
    hits = [
        Hit("len.outlier", train.where(number), figure=float(train.counts[number]))
        for number in numbers.tolist()
    ]
    return Seen("len.outlier", len(train.counts), hits, note=f"; the median is {median:.0f}")


def size(train: Sequence[Document], val: Sequence[Document]) -> Seen:
    """Whether the validation file can carry a figure."""
    divergence = _divergence(_domains(train), _domains(val))
    text = f"{len(val):,} validation documents"
    if len(val) < FEW_DOCUMENTS:
        text += f", fewer than {FEW_DOCUMENTS}: their loss is a rough figure"
    if divergence > OTHER_MIX:
        text += f", of another mix of domains (Jensen-Shannon divergence {divergence:.2f} bits)"
    doubtful = len(val) < FEW_DOCUMENTS or divergence > OTHER_MIX
    return Seen("size", len(val), share=float(doubtful), text=text)


def _domains(documents: Sequence[Document]) -> Counter[str]:
    return Counter(document.domain for document in documents if document.domain is not None)


def _divergence(one: Counter[str], other: Counter[str]) -> float:
    """Jensen-Shannon, in bits: 0 for equal mixes, 1 for mixes without a common domain."""
    if not one or not other:
        return 0.0
    names = sorted(one | other)
    p, q = (np.array([c[name] for name in names]) / c.total() for c in (one, other))
    middle = (p + q) / 2
    return float(sum((x[x > 0] * np.log2((x / middle)[x > 0])).sum() / 2 for x in (p, q)))
