"""Items of a test: what of them must not stand in training."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from lorabatch.check.sides import SHORT_WORDS
from lorabatch.corpus.readers import (
    QA_PROMPT,
    Document,
    check_file,
    document_of,
    jsonl_rows,
    kind_of_file,
    read_documents,
)
from lorabatch.errors import DataError
from lorabatch.schema import Fields

ANSWER = QA_PROMPT.rpartition("}")[2]  # what stands between a question and its answer


def read_items(path: Path, txt_format: str, text_field: str) -> list[Document]:
    """As training documents; rows of .jsonl may also have a question and ``options``."""
    if kind_of_file(path) != ".jsonl":
        return read_documents(path, txt_format=txt_format, text_field=text_field)
    check_file(path)
    return [
        _choice(row, where) if "options" in row else document_of(row, where, text_field)
        for where, row in jsonl_rows(path)
    ]


def _choice(row: Fields, where: str) -> Document:
    """All options are its answer: which one is right, a text tells in many ways."""
    options = row["options"]
    texts = list(options.values()) if isinstance(options, dict) else options
    question = row.get("question")
    if not isinstance(question, str) or not isinstance(texts, list) or not texts:
        raise DataError(
            "'options' needs a 'question' and a list or mapping of texts",
            where=where,
            fix="fix this row",
        )
    return Document(" ".join(map(str, texts)), where, prompt=question)


def judged(items: Iterable[Document]) -> Iterator[Document]:
    """The answer alone, and of a short one the seam with its question: never the question alone,
    which anybody may ask."""
    for item in items:
        words = item.learned.split()
        if len(words) < SHORT_WORDS:
            before = item.given.removesuffix(ANSWER).split()
            words = [*before[1 - SHORT_WORDS :], *words]
        yield Document(" ".join(words), item.where)


def whole_texts(documents: Iterable[Document]) -> Iterator[str]:
    """Prompts and what follows them, as a text would have them."""
    return (f"{d.given.removesuffix(ANSWER)}\n{d.learned}" for d in documents)
