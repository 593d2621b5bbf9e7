"""Documents from .txt, .jsonl, .csv and .parquet files, the first three also as .gz, with the place
of each mistake.

A row becomes a ``Document``: plain text, or a prompt with its completion. Rows may have a text
field, ``prompt`` + ``completion``, ``question`` + ``answer``, or ``messages``.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import BinaryIO

from lorabatch.errors import DataError, LorabatchError, UnavailableError
from lorabatch.schema import Fields, Record
from lorabatch.spans import spanned

QA_PROMPT = "Question: {question}\nAnswer:"
FORMATS = (".txt", ".jsonl", ".csv", ".parquet")
PARQUET_BATCH = 1024  # rows in memory at once


@dataclass(frozen=True)
class Document:
    """Text to learn from. With a prompt, only ``text`` (the completion) is supervised."""

    text: str
    where: str  # file:line or file:row
    prompt: str | None = None
    messages: tuple[Mapping[str, str], ...] | None = None  # rendered by the model's chat template
    group: str | None = None  # whose it is (a patient, a source): never in two files
    domain: str | None = None

    @property
    def learned(self) -> str:
        """The text that is supervised."""
        return self._said(by_assistant=True) if self.messages else self.text

    @property
    def given(self) -> str:
        """The text before it; empty for plain text."""
        return self._said(by_assistant=False) if self.messages else self.prompt or ""

    def _said(self, *, by_assistant: bool) -> str:
        chosen = [m for m in self.messages or () if (m["role"] == "assistant") == by_assistant]
        return "\n".join(message["content"] for message in chosen)


@dataclass(frozen=True)
class _Names:
    """Of the fields of a row."""

    text: str
    group: str | None
    domain: str | None


@spanned("read data")
def read_documents(
    path: Path,
    *,
    txt_format: str = "auto",
    text_field: str = "text",
    group_field: str | None = None,
    domain_field: str | None = None,
) -> list[Document]:
    """All documents of a file. DataError names the file and line of what is wrong."""
    check_file(path)
    names = _Names(text_field, group_field, domain_field)
    readers: dict[str, Callable[[], list[Document]]] = {
        ".txt": lambda: _text_documents(path, txt_format),
        **dict.fromkeys(ROWS, lambda: [_from_row(row, at, names) for at, row in rows(path)]),
    }
    kind = kind_of_file(path)
    if kind == ".txt" and (group_field or domain_field):
        raise DataError(
            f"a .txt file has no field '{group_field or domain_field}'",
            where=path,
            fix="give a .jsonl, .csv or .parquet file, or leave out --group_field and "
            "--domain_field",
        )
    documents = readers[kind]()
    if not documents:
        raise DataError(
            "contains no documents", where=path, fix="give a file with at least one document"
        )
    return documents


def check_file(path: Path) -> None:
    if not path.exists():
        raise DataError("no such file", where=path, fix="check the path")
    if path.is_dir():
        raise DataError("is a folder", where=path, fix="give a file")
    if not path.is_file():
        raise DataError(
            "not a regular file",
            where=path,
            fix="write it to a file first: it is read more than once",
        )
    if path.stat().st_size == 0:
        raise DataError("the file is empty", where=path, fix="give a file with at least one line")


def kind_of_file(path: Path) -> str:
    """One of FORMATS, by the name. DataError for any other."""
    packed = path.suffix.lower() == ".gz"
    kind = Path(path.stem if packed else path.name).suffix.lower()
    if kind not in FORMATS or (packed and kind == ".parquet"):
        raise DataError(
            f"unknown kind of file '{path.suffix}'",
            where=path,
            fix=f"give one of {', '.join(FORMATS)}; all but the last may be packed (.gz)",
        )
    return kind


def rows(path: Path) -> Iterator[tuple[str, Record]]:
    """(file:line or file:row, fields) of each row of a .jsonl, .csv or .parquet file, read as it is
    needed."""
    return ROWS[kind_of_file(path)](path)


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """Its bytes, unpacked. DataError for what only calls itself .gz, or was cut."""
    try:
        with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as file:
            yield file  # type: ignore[misc]
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(
            f"not a readable gzip file ({error})", where=path, fix="pack it again"
        ) from None


def read_text(path: Path) -> str:
    """UTF-8 text of a file. DataError for binary content, or with the line of the first wrong
    byte."""
    with _opened(path) as file:
        content = file.read()
    if (nul := content.find(b"\0")) >= 0:
        raise DataError(
            "binary content, not text",
            where=f"{path}:{content[:nul].count(10) + 1}",
            fix="give a text file in UTF-8",
        )
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise _not_utf8(content[error.start], f"{path}:{line}") from None


def numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    """(1-based number, text without its line end) of each line, read as it is needed. Errors as of
    ``read_text``."""
    with _opened(path) as file:
        for number, line in enumerate(file, 1):
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if b"\0" in line:
                raise DataError(
                    "binary content, not text", where=f"{path}:{number}", fix="give a text file"
                )
            try:
                yield number, line.decode().removesuffix("\n").removesuffix("\r")
            except UnicodeDecodeError as error:
                raise _not_utf8(line[error.start], f"{path}:{number}") from None


def _not_utf8(byte: int, where: str) -> DataError:
    return DataError(
        f"byte 0x{byte:02x} is not UTF-8", where=where, fix="convert it: iconv -f latin1 -t utf-8"
    )


def text_lines(text: str) -> list[str]:
    """Lines between line feeds (or Windows' line ends) only: a form feed or U+2028 inside a line is
    part of it."""
    return text.replace("\r\n", "\n").split("\n")


def _text_documents(path: Path, txt_format: str) -> list[Document]:
    """One document a line, or blocks between blank lines. "auto": blocks if a blank line separates
    any text."""
    lines = text_lines(read_text(path))
    if txt_format == "line" or (txt_format == "auto" and not has_blocks(lines)):
        return [
            Document(line.strip(), f"{path}:{n}") for n, line in enumerate(lines, 1) if line.strip()
        ]
    documents: list[Document] = []
    block: list[str] = []
    for number, line in enumerate([*lines, ""], 1):
        if line.strip():
            block.append(line.rstrip())
        elif block:
            documents.append(Document("\n".join(block), f"{path}:{number - len(block)}"))
            block = []
    return documents


def has_blocks(lines: Sequence[str]) -> bool:
    """Whether a blank line separates any text."""
    return "\n\n" in "\n".join(line.strip() for line in lines).strip("\n")


def jsonl_rows(path: Path) -> Iterator[tuple[str, Record]]:
    """(file:line, object) of every non-blank line. DataError at the first line that is not a JSON
    object."""
    for number, line in numbered_lines(path):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = json.loads(line, object_pairs_hook=_object)
        except (ValueError, RecursionError) as error:  # the second: nested a thousand deep
            raise DataError(
                f"not valid JSON ({error})", where=where, fix="fix or remove the line"
            ) from None
        if not isinstance(row, dict):
            raise DataError("not a JSON object", where=where, fix="each line must be {...}")
        yield where, row


def _object(pairs: list[tuple[str, object]]) -> Record:
    """Of a duplicate key Python would keep the last value and lose the others without a
    word."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"duplicate key '{_first_twice([k for k, _ in pairs])}'")
    return found


def _first_twice(names: Sequence[str]) -> str:
    return next(n for i, n in enumerate(names) if n in names[:i])


def csv_rows(path: Path) -> Iterator[tuple[str, Record]]:
    """The standard reader, because every cell is text: a table library would turn "NA" into a
    missing value and 007 into 7."""
    # a cell may be longer than the 128 KiB that the reader takes for a missing quote
    csv.field_size_limit(2**31 - 1)
    try:
        with _opened(path) as file:
            text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
            begin = _to_first_row(text)
            reader = csv.reader(chain(begin, text), delimiter=_delimiter(begin), strict=True)
            cells = ((f"{path}:{reader.line_num}", row) for row in reader if row)
            yield from _named(cells)
    except csv.Error as error:
        read_text(path)  # names what is not text
        raise DataError(
            f"not a readable csv file ({error})", where=path, fix="check the quotes"
        ) from None
    except UnicodeDecodeError:
        read_text(path)
        raise


def _to_first_row(lines: Iterable[str]) -> list[str]:
    """Empty lines and the first that is not."""
    found = []
    for line in lines:
        found.append(line)
        if line.strip():
            break
    return found


def _delimiter(begin: list[str]) -> str:
    """What separates the names of the header, the last of these lines: spreadsheets write
    semicolons where the comma is the decimal mark."""
    header = begin[-1] if begin else ""
    names = next(csv.reader([header]), [])
    return ";" if len(names) == 1 and ";" in header else ","


def _named(cells: Iterator[tuple[str, list[str]]]) -> Iterator[tuple[str, Record]]:
    """Rows with the names of the first. DataError where cells would be lost: a name twice, more or
    fewer cells than names."""
    where, header = next(cells, ("", []))
    if len(set(header)) < len(header):
        raise DataError(
            f"duplicate column '{_first_twice(header)}'",
            where=where,
            fix="rename or remove one of them",
        )
    for where, row in cells:
        if len(row) != len(header):
            what = f"{len(row)} cells where the header names {len(header)}"
            raise DataError(
                what,
                where=where,
                fix="put text that holds commas between quotes, or fill the row up",
            )
        if any("\0" in cell for cell in row):
            raise DataError("binary content, not text", where=where, fix="give a text file")
        yield where, dict(zip(header, row, strict=True))


def parquet_rows(path: Path) -> Iterator[tuple[str, Record]]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise UnavailableError(
            "reading .parquet files needs pyarrow, which datasets brings",
            fix="run: pip install datasets",
        ) from None
    number = 0
    try:
        table = pyarrow.parquet.ParquetFile(path)
        names = table.schema_arrow.names
        if len(set(names)) < len(names):  # a row would keep the last of them
            raise ValueError(f"Multiple matches for column '{_first_twice(names)}'")
        for batch in table.iter_batches(PARQUET_BATCH):
            for row in batch.to_pylist():
                number += 1
                yield f"{path}:{number}", row
    except LorabatchError:  # of the one who reads, where a row is wrong
        raise
    except Exception as error:  # it raises its own classes for each kind of damage
        raise DataError(
            f"not a readable parquet file ({type(error).__name__}: {error})",
            where=path,
            fix="check the file",
        ) from None


ROWS = {".jsonl": jsonl_rows, ".csv": csv_rows, ".parquet": parquet_rows}


def _from_row(row: Fields, where: str, names: _Names) -> Document:
    document = document_of(row, where, names.text)
    if names.group is None and names.domain is None:
        return document
    group, domain = (
        None if name is None else _label(row, name, where) for name in (names.group, names.domain)
    )
    return replace(document, group=group, domain=domain)


def _label(row: Fields, name: str, where: str) -> str:
    """A group or a domain, as text."""
    value = row.get(name)
    if isinstance(value, bool) or not isinstance(value, (str, int)) or not str(value).strip():
        what = "is empty" if name in row and value in (None, "") else "is not a text or a number"
        raise DataError(
            f"'{name}' {what}" if name in row else f"no field '{name}'",
            where=where,
            fix="fill it in for every row, or name another field",
        )
    return str(value).strip()


def document_of(row: Fields, where: str, text_field: str) -> Document:
    """A row without its group and domain. DataError for one without text."""
    if text_field in row:
        return Document(_string(row, text_field, where), where)
    if "prompt" in row and "completion" in row:
        return Document(
            _string(row, "completion", where), where, prompt=_string(row, "prompt", where)
        )
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


def _string(row: Fields, name: str, where: str) -> str:
    value = row[name]
    if not isinstance(value, str):
        raise DataError(
            f"'{name}' is {type(value).__name__}, not text", where=where, fix="fix this row"
        )
    if any("\ud800" <= c <= "\udfff" for c in value):
        raise DataError(
            f"'{name}' contains half a surrogate pair, which is not a character",
            where=where,
            fix="fix this row",
        )
    if not value.strip():
        raise DataError(f"'{name}' is empty", where=where, fix="fill or remove the row")
    return value


def _messages(value: object, where: str) -> tuple[Mapping[str, str], ...]:
    if not isinstance(value, list) or not value or not all(map(_is_message, value)):
        raise DataError(
            "'messages' is not a list of {role, content}", where=where, fix="fix this row"
        )
    if value[-1]["role"] != "assistant":
        raise DataError(
            "the last message is not the assistant's",
            where=where,
            fix="end each conversation with what the model should say",
        )
    return tuple(value)


def _is_message(value: object) -> bool:
    return isinstance(value, dict) and all(
        isinstance(value.get(name), str) for name in ("role", "content")
    )
