"""Documents from .txt, .jsonl, .csv and .parquet files, with the place of each mistake.

A row becomes a ``Document``: plain text, or a prompt with its completion. Rows may have a text
field, ``prompt`` + ``completion``, ``question`` + ``answer``, or ``messages``.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorabatch.errors import DataError, UnavailableError

QA_PROMPT = "Question: {question}\nAnswer:"
FORMATS = (".txt", ".jsonl", ".csv", ".parquet")


@dataclass(frozen=True)
class Document:
    """Text to learn from. With a prompt, only ``text`` (the completion) is supervised."""

    text: str
    where: str  # file:line or file:row
    prompt: str | None = None
    messages: tuple[Mapping[str, str], ...] | None = None  # rendered by the model's chat template


def read_documents(path: Path, *, txt_format: str = "auto", text_field: str = "text") -> list[Document]:
    """All documents of a file. DataError names the file and line of what is wrong."""
    check_file(path)
    readers: dict[str, Callable[[], list[Document]]] = {
        ".txt": lambda: _text_documents(path, txt_format),
        ".jsonl": lambda: [_from_row(row, where, text_field) for where, row in jsonl_rows(path)],
        ".csv": lambda: _csv_documents(path, text_field),
        ".parquet": lambda: _parquet_documents(path, text_field),
    }
    if path.suffix.lower() not in readers:
        raise DataError(f"unknown kind of file '{path.suffix}'", where=path, fix=f"give one of {', '.join(FORMATS)}")
    documents = readers[path.suffix.lower()]()
    if not documents:
        raise DataError("no documents in it", where=path, fix="give a file with at least one document")
    return documents


def check_file(path: Path) -> None:
    if not path.exists():
        raise DataError("no such file", where=path, fix="check the path")
    if path.is_dir():
        raise DataError("is a folder", where=path, fix="give a file")
    if not path.is_file():
        raise DataError("not a regular file", where=path, fix="write it to a file first: it is read more than once")
    if path.stat().st_size == 0:
        raise DataError("the file is empty", where=path, fix="give a file with at least one line")


def read_text(path: Path) -> str:
    """UTF-8 text of a file. DataError for binary content, or with the line of the first wrong byte."""
    content = path.read_bytes()
    if (nul := content.find(b"\0")) >= 0:
        raise DataError("binary content, not text", where=f"{path}:{content[:nul].count(10) + 1}", fix="give a text file in UTF-8")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise _not_utf8(content[error.start], f"{path}:{line}") from None


def numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    """(1-based number, text without its line end) of each line, read as it is needed. Errors as of ``read_text``."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if b"\0" in line:
                raise DataError("binary content, not text", where=f"{path}:{number}", fix="give a text file")
            try:
                yield number, line.decode().removesuffix("\n").removesuffix("\r")
            except UnicodeDecodeError as error:
                raise _not_utf8(line[error.start], f"{path}:{number}") from None


def _not_utf8(byte: int, where: str) -> DataError:
    return DataError(f"byte 0x{byte:02x} is not UTF-8", where=where, fix="convert it: iconv -f latin1 -t utf-8")


def text_lines(text: str) -> list[str]:
    """Lines between line feeds (or Windows' line ends) only: a form feed or U+2028 inside a line is part of it."""
    return text.replace("\r\n", "\n").split("\n")


def _text_documents(path: Path, txt_format: str) -> list[Document]:
    """One document a line, or blocks between blank lines. "auto": blocks if a blank line separates any text."""
    lines = text_lines(read_text(path))
    if txt_format == "auto":
        stripped = "\n".join(line.strip() for line in lines).strip("\n")
        txt_format = "blank" if "\n\n" in stripped else "line"
    if txt_format == "line":
        return [Document(line.strip(), f"{path}:{n}") for n, line in enumerate(lines, 1) if line.strip()]
    documents: list[Document] = []
    block: list[str] = []
    for number, line in enumerate([*lines, ""], 1):
        if line.strip():
            block.append(line.rstrip())
        elif block:
            documents.append(Document("\n".join(block), f"{path}:{number - len(block)}"))
            block = []
    return documents


def jsonl_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file:line, object) of every non-blank line. DataError at the first line that is not a JSON object."""
    for number, line in numbered_lines(path):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = json.loads(line, object_pairs_hook=_object)
        except (ValueError, RecursionError) as error:  # the second: nested a thousand deep
            raise DataError(f"not valid JSON ({error})", where=where, fix="mend or remove the line") from None
        if not isinstance(row, dict):
            raise DataError("not a JSON object", where=where, fix="each line must be {...}")
        yield where, row


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Of a key that is there twice Python would keep the last value and lose the others without a word."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"the key '{_first_twice([k for k, _ in pairs])}' is there twice")
    return found


def _first_twice(names: Sequence[str]) -> str:
    return next(n for i, n in enumerate(names) if n in names[:i])


def _csv_documents(path: Path, text_field: str) -> list[Document]:
    """The standard reader, because every cell is text: a table library would turn "NA" into a missing value and 007 into 7."""
    try:
        csv.field_size_limit(2**31 - 1)  # a document may be longer than the 128 KiB that the reader takes for a missing quote
        reader = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
        rows = [(f"{path}:{reader.line_num}", cells) for cells in reader if cells]
    except csv.Error as error:
        raise DataError(f"not a readable csv file ({error})", where=path, fix="check the quotes") from None
    return [_from_row(row, where, text_field) for where, row in _named(rows)]


def _named(rows: list[tuple[str, list[str]]]) -> Iterator[tuple[str, dict[str, str]]]:
    """Rows with the names of the first. DataError where cells would be lost: a name twice, more or fewer cells than names."""
    where, header = rows[0] if rows else ("", [])
    if len(set(header)) < len(header):
        raise DataError(f"the column '{_first_twice(header)}' is there twice", where=where, fix="rename or remove one of them")
    for where, cells in rows[1:]:
        if len(cells) != len(header):
            what = f"{len(cells)} cells where the header names {len(header)}"
            raise DataError(what, where=where, fix="put text that holds commas between quotes, or fill the row up")
        yield where, dict(zip(header, cells, strict=True))


def _parquet_documents(path: Path, text_field: str) -> list[Document]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise UnavailableError("reading .parquet files needs pyarrow, which datasets brings", fix="run: pip install datasets") from None
    try:
        rows = pyarrow.parquet.read_table(path, partitioning=None).to_pylist()
    except Exception as error:  # it raises its own classes for each kind of damage
        raise DataError(f"not a readable parquet file ({type(error).__name__}: {error})", where=path, fix="check the file") from None
    return [_from_row(row, f"{path}:{n}", text_field) for n, row in enumerate(rows, 1)]


def _from_row(row: Mapping[str, Any], where: str, text_field: str) -> Document:
    if text_field in row:
        return Document(_string(row, text_field, where), where)
    if "prompt" in row and "completion" in row:
        return Document(_string(row, "completion", where), where, prompt=_string(row, "prompt", where))
    if "question" in row and "answer" in row:
        prompt = QA_PROMPT.format(question=_string(row, "question", where))
        return Document(" " + _string(row, "answer", where), where, prompt=prompt)
    if "messages" in row:
        return Document("", where, messages=_messages(row["messages"], where))
    fields = ", ".join(map(str, row)) or "none"
    raise DataError(
        f"no '{text_field}', prompt + completion, question + answer or messages (fields: {fields})",
        where=where,
        fix="rename the field or use --text_field",
    )


def _string(row: Mapping[str, Any], name: str, where: str) -> str:
    value = row[name]
    if not isinstance(value, str):
        raise DataError(f"'{name}' is {type(value).__name__}, not text", where=where, fix="mend the row")
    if any("\ud800" <= c <= "\udfff" for c in value):
        raise DataError(f"'{name}' holds half a surrogate pair, which is no character", where=where, fix="mend the row")
    if not value.strip():
        raise DataError(f"'{name}' is empty", where=where, fix="fill or remove the row")
    return value


def _messages(value: Any, where: str) -> tuple[Mapping[str, str], ...]:
    good = (
        isinstance(value, list)
        and value
        and all(isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in value)
    )
    if not good:
        raise DataError("'messages' is not a list of {role, content}", where=where, fix="mend the row")
    if value[-1]["role"] != "assistant":
        raise DataError("the last message is not the assistant's", where=where, fix="end each conversation with what the model should say")
    return tuple(value)
