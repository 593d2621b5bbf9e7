"""The prompt file: checked as a whole before anything is loaded, then read again request by
request.

What makes the *file* unreadable (no such file, not UTF-8, a broken JSON line, two equal ids)
stops the run before it starts; what makes one *request* impossible (empty, too long, a setting
out of range) becomes its error record. Neither pass keeps the file in memory.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import fields, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lorabatch.config import InferConfig
from lorabatch.corpus.readers import QA_PROMPT, check_file, kind_of_file, numbered_lines, rows
from lorabatch.corpus.tokens import Tokenizer, unknown_token
from lorabatch.errors import DataError, LorabatchError, UnavailableError, UsageError, nearest
from lorabatch.infer import constraints, openai_batch
from lorabatch.infer.adapters import AdapterNames
from lorabatch.infer.requests import Request, SamplingParams
from lorabatch.schema import Fields, Record
from lorabatch.spans import spanned

KINDS = {"int": int, "int | None": int, "float": float, "bool": bool}
PARAM_TYPES = {f.name: KINDS[str(f.type)] for f in fields(SamplingParams) if str(f.type) in KINDS}
LIST_TYPES: dict[str, type] = {"stop": str, "stop_token_ids": int}
ROW_FIELDS = (
    *("id", "prompt", "question", "messages", "adapter", "response_format"),
    *(*PARAM_TYPES, *LIST_TYPES),
)
CHECK_EVERY = 1024  # prompts


class ChangedError(LorabatchError):
    """The input changed under a run that had begun: no DataError, which would leave an earlier
    run's record as it was."""

    exit_code = 65


class PromptFile:
    """A checked file of prompts; iterating reads its requests in order, one at a time, as often as
    asked.

    .txt: one prompt a line, blank lines skipped. .jsonl, .csv, .parquet: ``prompt`` (or
    ``question``, or ``messages``), optional ``id`` and parameters; in .jsonl also lines of OpenAI's
    batch interface. ``id`` defaults to the 0-based number of the prompt. A prompt with ``n`` > 1
    gives n requests.
    """

    def __init__(self, path: Path, config: InferConfig) -> None:
        """Raises DataError for what is wrong with the file as a whole."""
        check_file(path)
        self._state = path.stat()
        self._path, self._config, self._kind = path, config, kind_of_file(path)
        self.adapters = AdapterNames.parse(config.adapters)
        self._range = row_range(config.rows)
        self._defaults = SamplingParams.of(config)
        self.ignored: set[str] = set()
        self._grammar = constraints.of_flags(config)
        self._unseen = set(config.keep_fields)  # in no row so far
        self.longest_bytes = self.most_new_tokens = 0
        self._length: int | None = None  # not known yet
        self.indices = array("q")  # of each request: the place of its prompt, rising
        self.id_digests = self._scan()  # [requests]
        self._length = len(self.id_digests)
        self._check_ids()
        for name in self._unseen:
            fix = nearest(name, self.ignored) if self.ignored else "leave it out"
            raise DataError("no row has this field", where=f"--keep_fields {name}", fix=fix)

    def _scan(self) -> NDArray[np.uint64]:
        """Read all requests once; the digests of their ids."""
        digests = array("Q")
        for request in self:
            self.indices.append(request.index)
            digests.append(id_digest(request.id, request.sample))
            self.longest_bytes = max(self.longest_bytes, prompt_bytes(request))
            self.most_new_tokens = max(self.most_new_tokens, request.params.max_new_tokens)
        if not digests:
            raise DataError(
                "no prompts in it", where=self._path, fix="give a file with at least one prompt"
            )
        return np.frombuffer(digests, dtype=np.uint64)

    def __len__(self) -> int:
        return len(self.id_digests)

    def __iter__(self) -> Iterator[Request]:
        self.check_unchanged()
        position = 0
        for index, request in islice(enumerate(self._prompts()), *self._range):
            if index % CHECK_EVERY == 0 or position == self._length:
                self.check_unchanged()
            request.index = index
            for sample in range(request.params.n):
                one = request.restarted()
                one.sample, one.position = sample, position
                yield one
                position += 1
        self.check_unchanged()

    def check_unchanged(self) -> None:
        """ChangedError if the file is not the one that was checked: it is read again while requests
        run."""
        known, fields = self._state, ("st_dev", "st_ino", "st_size", "st_mtime_ns")
        try:
            seen = self._path.stat()
        except OSError:
            seen = None
        if seen is None or any(getattr(seen, f) != getattr(known, f) for f in fields):
            fix = (
                "leave it alone until the end; --resume continues if the finished prompts are "
                "still the same"
            )
            raise ChangedError(
                "changed, replaced or removed during the run", where=self._path, fix=fix
            )

    def _prompts(self) -> Iterator[Request]:
        if self._kind == ".txt":
            prompts = (text.strip() for _, text in numbered_lines(self._path))
            for index, prompt in enumerate(p for p in prompts if p):
                yield Request(str(index), index, prompt, self._params(index), grammar=self._grammar)
        else:
            for index, (where, row) in enumerate(rows(self._path)):
                request = self._from_row(*self._plain(row, where), index, where)
                request.kept = self._kept(row)
                yield request

    def _plain(self, row: Record, where: str) -> tuple[Record, str | None]:
        """(the row as one of .jsonl, its error); notes what is ignored of it."""
        error = None
        if self._kind == ".csv":
            row = _without_empty_cells(row)
        elif self._kind == ".parquet":
            row = {name: value for name, value in row.items() if value is not None}
        elif openai_batch.is_line(row):
            row, error = openai_batch.as_row(row, where, adapters=self.adapters.folders)
        self.ignored |= row.keys() - {*ROW_FIELDS, *self._config.keep_fields}
        return row, error

    def _kept(self, row: Fields) -> Record | None:
        """The fields that go into the record; null where this row has none."""
        self._unseen -= row.keys()
        return {name: _jsonable(row.get(name)) for name in self._config.keep_fields} or None

    def _params(self, index: int) -> SamplingParams:
        return replace(self._defaults, seed=self._defaults.seed + index)

    def _from_row(self, row: Fields, error: str | None, index: int, where: str) -> Request:
        id = str(index if row.get("id") is None else row["id"]).encode(errors="replace").decode()
        request = Request(id, index, "", self._params(index), error=error)
        name = next((n for n in ("prompt", "question", "messages") if n in row), None)
        if name is None and request.error is None:
            raise DataError(
                "no 'prompt', 'question' or 'messages'",
                where=where,
                fix=nearest("prompt", row) if row else "add a prompt",
            )
        try:
            _set_content(request, row, name)
            request.params = row_params(row, request.params)
            request.grammar = self._grammar
            if "response_format" in row:
                request.grammar = constraints.of_row(row)
            request.adapter = None if row.get("adapter") is None else _typed(row, "adapter", str)
            request.adapter_row = self.adapters.row(request.adapter)
        except UnavailableError:  # the whole run's
            raise
        except LorabatchError as refused:
            request.error = request.error or str(refused)
        return request

    def _check_ids(self) -> None:
        """Equal digests are rare enough to be looked up in the file: only equal ids are an
        error."""
        values, counts = np.unique(self.id_digests, return_counts=True)
        suspects = set(values[counts > 1].tolist())
        seen: dict[tuple[str, int], int] = {}
        for request in self if suspects else ():
            if id_digest(request.id, request.sample) in suspects:
                first = seen.setdefault((request.id, request.sample), request.index)
                if first != request.index:
                    raise DataError(
                        f"id '{request.id}' occurs twice (prompts {first} and {request.index})",
                        where=self._path,
                        fix="make the ids unique",
                    )


def _without_empty_cells(row: Fields) -> Record:
    """What a cell holds if it is not text: numbers and lists as JSON. An empty one says nothing."""
    found = {name: cell for name, cell in row.items() if cell}
    for name in found.keys() & {*PARAM_TYPES, *LIST_TYPES, "messages", "response_format"}:
        with suppress(ValueError):
            found[name] = json.loads(found[name])
    return found


def _jsonable(value: object) -> object:
    """A table's date or bytes as text."""
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return str(value)
    return value


def _set_content(request: Request, row: Fields, name: str | None) -> None:
    """name: of the field that holds the prompt."""
    if name == "messages":
        request.messages = tuple(map(_plain_message, _typed(row, name, list)))
    elif name is not None:
        text = _typed(row, name, str)
        request.prompt = QA_PROMPT.format(question=text) if name == "question" else text


def _plain_message(message: Any) -> Any:
    """A chat message whose content OpenAI's clients gave in parts, with their texts joined; any
    other as it is. DataError for a part that is no text: nothing here sees images or hears."""
    if not isinstance(message, dict) or not isinstance(message.get("content"), list):
        return message
    texts = []
    for part in message["content"]:
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind != "text" or not isinstance(part.get("text"), str):
            raise DataError(f"a part of a message's content is of type {kind!r}; only text is read")
        texts.append(part["text"])
    return message | {"content": "".join(texts)}


def row_range(rows: str | None) -> tuple[int, int | None]:
    """``"10:20"`` -> (10, 20). UsageError for anything else."""
    if rows is None:
        return 0, None
    first, _, end = rows.partition(":")
    if not (first.isdecimal() and end.isdecimal() and int(first) < int(end)):
        raise UsageError(
            "not a range of prompts",
            where=f"--rows {rows}",
            fix="give FIRST:END, counted from 0, for example 0:100",
        )
    return int(first), int(end)


def _typed(row: Fields, name: str, kind: type) -> Any:
    if not isinstance(row[name], kind):
        raise DataError(
            f"'{name}' is {type(row[name]).__name__}, not {'text' if kind is str else 'a list'}"
        )
    return row[name]


def id_digest(id: str, sample: int) -> int:
    """64 bits that stand for a completion's identity, so that 100,000 of them take 800 kB."""
    return int.from_bytes(
        hashlib.blake2b(f"{sample} {id}".encode(errors="surrogatepass"), digest_size=8).digest(),
        "little",
    )


def prompt_bytes(request: Request) -> int:
    """Size of what will be tokenised, without a chat template's additions."""
    texts = [request.prompt] if request.messages is None else [str(m) for m in request.messages]
    return sum(len(t.encode(errors="surrogatepass")) for t in texts)


def row_params(row: Fields, params: SamplingParams) -> SamplingParams:
    """A row's own parameters over the defaults, within the same bounds as the flags."""
    changes: Record = {}
    for name in row.keys() & PARAM_TYPES.keys():
        value, kind = row[name], PARAM_TYPES[name]
        if (
            isinstance(value, bool) != (kind is bool)
            or not isinstance(value, (int, float))
            or (kind is int and value % 1 != 0)
        ):
            raise DataError(f"{name} is {value!r}, not of type {kind.__name__}")
        try:
            changes[name] = kind(value)
        except OverflowError:  # a whole number beyond the largest float
            raise DataError(f"{name} is too large") from None
    for name in row.keys() & LIST_TYPES.keys():
        kind, values = LIST_TYPES[name], row[name] if isinstance(row[name], list) else [row[name]]
        if not all(isinstance(v, kind) and not isinstance(v, bool) and v != "" for v in values):
            raise DataError(f"{name} is not a list of {'strings' if kind is str else 'token ids'}")
        changes[name] = tuple(values)
    InferConfig.check(changes)
    return replace(params, **changes)


@spanned("tokenise")
def prepare(
    requests: list[Request],
    tokenizer: Tokenizer,
    *,
    limit: int,
    long_prompt: str,
    vocab_size: int | None = None,
) -> None:
    """Tokenise these prompts and fit each into ``limit`` positions; what does not fit gets its
    ``error``."""
    for request in requests:
        if request.messages is not None and request.error is None:
            _render_chat(request, tokenizer)
        _check_characters(request)
    good = [r for r in requests if r.error is None and r.prompt.strip()]
    _encode([r for r in good if r.messages is None], tokenizer, special_tokens=True)
    _encode([r for r in good if r.messages is not None], tokenizer, special_tokens=False)
    for request in requests:
        if request.error is None:
            request.error = _unusable(request.token_ids, vocab_size)
        if request.error is None:
            _fit(request, limit, long_prompt)


def _unusable(token_ids: list[int], vocab_size: int | None) -> str | None:
    return unknown_token(token_ids, vocab_size) if token_ids else "empty prompt"


def _encode(requests: list[Request], tokenizer: Tokenizer, *, special_tokens: bool) -> None:
    if not requests:
        return
    encoded = tokenizer(
        [request.prompt for request in requests],
        add_special_tokens=special_tokens,
        return_attention_mask=False,
        verbose=False,
    )
    for request, ids in zip(requests, encoded["input_ids"], strict=True):
        request.token_ids = list(ids)


def _render_chat(request: Request, tokenizer: Tokenizer) -> None:
    try:
        request.prompt = tokenizer.apply_chat_template(
            [dict(m) for m in request.messages or ()], tokenize=False, add_generation_prompt=True
        )
    except Exception as error:
        # templates are programs of the model's author and raise what they like
        request.error = f"the chat template refused the messages ({error})"


def _check_characters(request: Request) -> None:
    """JSON can hold half of a surrogate pair, which is no character: tokenizers and UTF-8 files
    refuse it."""
    try:
        request.prompt.encode()
    except UnicodeEncodeError:
        request.error = (
            request.error or "the prompt holds half a surrogate pair, which is no character"
        )
        request.prompt = request.prompt.encode(errors="replace").decode()


def _fit(request: Request, limit: int, long_prompt: str) -> None:
    room = limit - 1  # at least one new token
    if len(request.token_ids) > room:
        if long_prompt == "error":
            request.error = (
                f"the prompt has {len(request.token_ids)} tokens, at most {room} fit (--max_len, "
                "--long_prompt truncate_left)"
            )
            return
        request.token_ids = (
            request.token_ids[-room:]
            if long_prompt == "truncate_left"
            else request.token_ids[:room]
        )
        request.truncated = long_prompt
    request.max_new_tokens = min(request.params.max_new_tokens, limit - len(request.token_ids))
