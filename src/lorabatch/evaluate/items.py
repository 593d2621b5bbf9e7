"""What an evaluation scores: documents, multiple-choice questions, or prompts with what should
follow, each in a cluster. No model is needed to read and check them."""

from __future__ import annotations

import hashlib
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lorabatch.config_trust import EvalConfig
from lorabatch.corpus.readers import Document, jsonl_rows, kind_of_file, read_documents
from lorabatch.errors import DataError, UsageError
from lorabatch.schema import Fields, dumps

DOCUMENTS, CHOICE, GENERATION = "documents", "choice", "generation"
LETTERS = string.ascii_uppercase


@dataclass(frozen=True)
class Item:
    """One document, or one question with a document for each of its options, or one prompt with a
    document for each text that may follow."""

    id: str
    group: str  # cluster of items that are not independent; its own id where there is none
    documents: tuple[Document, ...]
    answer: int | None = None  # place of the right option
    sizes: tuple[int, ...] = ()  # characters of each option, for the length-normalised choice
    domain: str | None = None  # what the figures are also listed by

    def content(self) -> str:
        """Identity of what is scored, wherever it came from: 16 hexadecimal digits."""
        texts = [[d.prompt, d.text, [dict(m) for m in d.messages or ()]] for d in self.documents]
        return digest(dumps({"texts": texts, "answer": self.answer}))


@dataclass(frozen=True)
class Task:
    """The items of one file."""

    name: str
    kind: str  # DOCUMENTS, CHOICE or GENERATION
    path: Path
    items: tuple[Item, ...]


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_tasks(config: EvalConfig) -> list[Task]:
    """UsageError for files of one name, DataError for what is wrong in them, with its line."""
    paths = [Path(file) for file in (*config.files, *([config.general] if config.general else []))]
    names = [path.stem for path in paths]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(
                f"two files are called '{name}', which is what their results are called",
                where="lorabatch eval",
                fix="rename one of them",
            )
    tasks = [_read_task(path, config) for path in paths]
    if config.general and tasks[-1].kind != DOCUMENTS:
        raise UsageError(
            "holds no plain documents", where=f"--general {config.general}", fix="give it as a FILE"
        )
    return tasks


def _read_task(path: Path, config: EvalConfig) -> Task:
    rows: list[tuple[str, Fields]] = []
    if path.is_file() and kind_of_file(path) == ".jsonl":
        rows = list(jsonl_rows(path))
    names = {name for _, row in rows for name in row}
    some = rows[: config.max_items]
    if "options" in names:
        items = [_question(row, where, config) for where, row in some]
        _check_answers(items, path)
        return Task(path.stem, CHOICE, path, tuple(items))
    if "target" in names:
        wanted = tuple(_wanted(row, where, config) for where, row in some)
        return Task(path.stem, GENERATION, path, wanted)
    return Task(path.stem, DOCUMENTS, path, tuple(_documents(path, dict(rows), config)))


def _documents(path: Path, rows: Mapping[str, Fields], config: EvalConfig) -> list[Item]:
    """rows: of .jsonl, by place."""
    documents = read_documents(path, txt_format=config.txt_format, text_field=config.text_field)
    if not rows and (config.group_field or config.domain_field):
        raise UsageError(
            f"{path.name} has no fields that this command reads",
            where="--group_field" if config.group_field else "--domain_field",
            fix="give .jsonl files, or leave it out",
        )
    some = documents[: config.max_items]
    return [_item(rows.get(d.where, {}), d.where, (d,), config) for d in some]


def _item(
    row: Fields,
    where: str,
    documents: tuple[Document, ...],
    config: EvalConfig,
    answer: int | None = None,
    sizes: tuple[int, ...] = (),
) -> Item:
    given = row.get("id")
    name = where.rpartition("/")[2]  # file:line, wherever the file lies
    if isinstance(given, (str, int)):
        name = f"{name} {given}"
    group = _label(row, "group_field", config, where)
    domain = _label(row, "domain_field", config, where)
    return Item(name, group or name, documents, answer, sizes, domain)


def _label(row: Fields, flag: str, config: EvalConfig, where: str) -> str | None:
    """What a row has in the field that a flag names; None without the flag."""
    field = getattr(config, flag)
    if field is None:
        return None
    value = row.get(field)
    if not isinstance(value, (str, int)) or value == "":
        raise DataError(
            f"no text or number in the field '{field}'",
            where=where,
            fix=f"fill it in every row, or name another --{flag}",
        )
    return str(value)


def _wanted(row: Fields, where: str, config: EvalConfig) -> Item:
    """A prompt, and its ``target``: a text, or a list of them."""
    prompt, given = row.get("prompt"), row.get("target")
    targets = [given] if isinstance(given, str) else given
    if not isinstance(prompt, str) or not prompt.strip():
        raise DataError("no 'prompt'", where=where, fix="each row needs prompt and target")
    if not isinstance(targets, list) or not all(isinstance(t, str) and t.strip() for t in targets):
        raise DataError(
            "'target' is not a text or a list of texts", where=where, fix="fix this row"
        )
    if not targets:
        raise DataError("no 'target'", where=where, fix="give a text that should follow")
    documents = tuple(Document(text, where, prompt=prompt) for text in targets)
    return _item(row, where, documents, config)


# Multiple choice


def _question(row: Fields, where: str, config: EvalConfig) -> Item:
    question = row.get("question")
    if not isinstance(question, str) or not question.strip():
        raise DataError(
            "no 'question'", where=where, fix="each row needs question, options, answer"
        )
    letters, options = _options(row.get("options"), where)
    answer = _answer(row.get("answer"), letters, options, where)
    listed = "".join(f"{a}. {text}\n" for a, text in zip(letters, options, strict=True))
    said = letters if config.answer_with == "letter" else options
    prompt = f"Question: {question}\n{listed if config.answer_with == 'letter' else ''}Answer:"
    documents = tuple(Document(f" {text}", where, prompt=prompt) for text in said)
    return _item(row, where, documents, config, answer, tuple(map(len, said)))


def _options(value: object, where: str) -> tuple[list[str], list[str]]:
    """(letters, texts) of a list, or of {"A": text, …}."""
    texts = list(value.values()) if isinstance(value, dict) else value
    named = list(value) if isinstance(value, dict) else []
    if not isinstance(texts, list) or not all(isinstance(t, str) and t.strip() for t in texts):
        raise DataError(
            "'options' is neither a list of texts nor {letter: text}",
            where=where,
            fix="fix this row",
        )
    if not 2 <= len(texts) <= len(LETTERS) or len(set(texts)) < len(texts):
        raise DataError(
            f"'options' has to be 2 to {len(LETTERS)} different texts",
            where=where,
            fix="fix this row",
        )
    return named or list(LETTERS[: len(texts)]), texts


def _answer(value: object, letters: list[str], options: list[str], where: str) -> int:
    """Place of the right option, which a row gives as text, letter or place."""
    if type(value) is int and 0 <= value < len(options):
        return value
    for known in (options, letters):
        if isinstance(value, str) and value in known:
            return known.index(value)
    raise DataError(
        f"the answer {value!r} is none of the {len(options)} options"
        if value is not None
        else "no 'answer'",
        where=where,
        fix=f"give the text of one, {letters[0]} to {letters[-1]}, or 0 to {len(options) - 1}",
    )


def _check_answers(items: Sequence[Item], path: Path) -> None:
    if len(items) > 1 and len({item.answer for item in items}) == 1:
        raise DataError(
            f"the answer of all {len(items)} questions is option {LETTERS[items[0].answer or 0]}: "
            "whoever always says it is right",
            where=path,
            fix="mix the options, or add questions",
        )
