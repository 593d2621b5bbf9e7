"""The prompt file: checked as a whole before anything is loaded, then read again request by request.

What makes the *file* unreadable (no such file, not UTF-8, a broken JSON line, two equal ids)
stops the run before it starts; what makes one *request* impossible (empty, too long, a setting
out of range) becomes its error record. Neither pass keeps the file in memory.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from lorabatch.config import InferConfig
from lorabatch.corpus.readers import QA_PROMPT, check_file, jsonl_rows, numbered_lines
from lorabatch.corpus.tokens import unknown_token
from lorabatch.errors import DataError, LorabatchError, UsageError, nearest
from lorabatch.infer import openai_batch
from lorabatch.infer.adapters import AdapterNames
from lorabatch.infer.requests import Request, SamplingParams

KINDS = {"int": int, "int | None": int, "float": float, "bool": bool}
PARAM_TYPES = {f.name: KINDS[str(f.type)] for f in fields(SamplingParams) if str(f.type) in KINDS}
LIST_TYPES: dict[str, type] = {"stop": str, "stop_token_ids": int}
ROW_FIELDS = ("id", "prompt", "question", "messages", "adapter", *PARAM_TYPES, *LIST_TYPES)
CHECK_EVERY = 1024  # prompts


class ChangedError(LorabatchError):
    """The input changed under a run that had begun: no DataError, which would leave an earlier run's record as it was."""

    exit_code = 65


class PromptFile:
    """A checked file of prompts; iterating reads its requests in order, one at a time, as often as asked.

    .txt: one prompt a line, blank lines skipped. .jsonl: ``prompt`` (or ``question``, or ``messages``),
    optional ``id`` and parameters, or lines of OpenAI's batch interface. ``id`` defaults to the
    0-based number of the prompt. A prompt with ``n`` > 1 gives n requests.
    """

    def __init__(self, path: Path, config: InferConfig) -> None:
        """Raises DataError for what is wrong with the file as a whole."""
        check_file(path)
        self._state = path.stat()
        if path.suffix.lower() not in (".txt", ".jsonl"):
            raise DataError(f"unknown kind of file '{path.suffix}'", where=path, fix="give .txt (one prompt a line) or .jsonl")
        self._path, self._config = path, config
        self.adapters = AdapterNames.parse(config.adapters)
        self._range = row_range(config.rows)
        self._defaults = SamplingParams(**{f.name: getattr(config, f.name) for f in fields(SamplingParams)})
        self.ignored: set[str] = set()
        self.longest_bytes = self.most_new_tokens = 0
        self._length: int | None = None  # not known yet
        digests = array("Q")
        self.indices = array("q")  # of each request: the place of its prompt, rising
        for request in self:
            self.indices.append(request.index)
            digests.append(id_digest(request.id, request.sample))
            self.longest_bytes = max(self.longest_bytes, prompt_bytes(request))
            self.most_new_tokens = max(self.most_new_tokens, request.params.max_new_tokens)
        if not digests:
            raise DataError("no prompts in it", where=path, fix="give a file with at least one prompt")
        self.id_digests = np.frombuffer(digests, dtype=np.uint64)  # [requests]
        self._length = len(digests)
        self._check_ids()

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
        """ChangedError if the file is not the one that was checked: it is read again while requests run."""
        known, fields = self._state, ("st_dev", "st_ino", "st_size", "st_mtime_ns")
        try:
            seen = self._path.stat()
        except OSError:
            seen = None
        if seen is None or any(getattr(seen, f) != getattr(known, f) for f in fields):
            fix = "leave it alone until the end; --resume goes on if the finished prompts are still the same"
            raise ChangedError("changed, replaced or removed during the run", where=self._path, fix=fix)

    def _prompts(self) -> Iterator[Request]:
        if self._path.suffix.lower() == ".txt":
            prompts = (text.strip() for _, text in numbered_lines(self._path))
            for index, prompt in enumerate(p for p in prompts if p):
                yield Request(str(index), index, prompt, self._params(index))
        else:
            for index, (where, row) in enumerate(jsonl_rows(self._path)):
                error = None
                if openai_batch.is_line(row):
                    row, error = openai_batch.as_row(row, where, adapters=self.adapters.folders)
                self.ignored |= row.keys() - set(ROW_FIELDS)
                yield self._from_row(row, index, where, error)

    def _params(self, index: int) -> SamplingParams:
        return replace(self._defaults, seed=self._defaults.seed + index)

    def _from_row(self, row: Mapping[str, Any], index: int, where: str, error: str | None) -> Request:
        id = str(index if row.get("id") is None else row["id"]).encode(errors="replace").decode()
        request = Request(id, index, "", self._params(index), error=error)
        name = next((n for n in ("prompt", "question", "messages") if n in row), None)
        if name is None and request.error is None:
            raise DataError("no 'prompt', 'question' or 'messages'", where=where, fix=nearest("prompt", row) if row else "add a prompt")
        try:
            if name == "messages":
                request.messages = tuple(_typed(row, name, list))
            elif name is not None:
                text = _typed(row, name, str)
                request.prompt = QA_PROMPT.format(question=text) if name == "question" else text
            request.params = _row_params(row, request.params)
            request.adapter = None if row.get("adapter") is None else _typed(row, "adapter", str)
            request.adapter_row = self.adapters.row(request.adapter)
        except LorabatchError as refused:
            request.error = request.error or str(refused)
        return request

    def _check_ids(self) -> None:
        """Equal digests are rare enough to be looked up in the file: only equal ids are an error."""
        values, counts = np.unique(self.id_digests, return_counts=True)
        suspects = set(values[counts > 1].tolist())
        seen: dict[tuple[str, int], int] = {}
        for request in self if suspects else ():
            if id_digest(request.id, request.sample) in suspects:
                first = seen.setdefault((request.id, request.sample), request.index)
                if first != request.index:
                    raise DataError(
                        f"id '{request.id}' occurs twice (prompts {first} and {request.index})", where=self._path, fix="make the ids unique"
                    )


def row_range(rows: str | None) -> tuple[int, int | None]:
    """``"10:20"`` -> (10, 20). UsageError for anything else."""
    if rows is None:
        return 0, None
    first, _, end = rows.partition(":")
    if not (first.isdecimal() and end.isdecimal() and int(first) < int(end)):
        raise UsageError("not a range of prompts", where=f"--rows {rows}", fix="give FIRST:END, counted from 0, for example 0:100")
    return int(first), int(end)


def _typed(row: Mapping[str, Any], name: str, kind: type) -> Any:
    if not isinstance(row[name], kind):
        raise DataError(f"'{name}' is {type(row[name]).__name__}, not {'text' if kind is str else 'a list'}")
    return row[name]


def id_digest(id: str, sample: int) -> int:
    """64 bits that stand for a completion's identity, so that 100,000 of them take 800 kB."""
    return int.from_bytes(hashlib.blake2b(f"{sample} {id}".encode(errors="surrogatepass"), digest_size=8).digest(), "little")


def prompt_bytes(request: Request) -> int:
    """Size of what will be tokenised, without a chat template's additions."""
    texts = [request.prompt] if request.messages is None else [str(m) for m in request.messages]
    return sum(len(t.encode(errors="surrogatepass")) for t in texts)


def _row_params(row: Mapping[str, Any], params: SamplingParams) -> SamplingParams:
    """The row's own parameters over the defaults, within the same bounds as the flags."""
    changes: dict[str, Any] = {}
    for name in row.keys() & PARAM_TYPES.keys():
        value, kind = row[name], PARAM_TYPES[name]
        if isinstance(value, bool) != (kind is bool) or not isinstance(value, (int, float)) or (kind is int and value % 1 != 0):
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


def prepare(requests: list[Request], tokenizer: Any, *, limit: int, long_prompt: str, vocab_size: int | None = None) -> None:
    """Tokenise these prompts and fit each into ``limit`` positions; what does not fit gets its ``error``."""
    for request in requests:
        if request.messages is not None and request.error is None:
            _render_chat(request, tokenizer)
        _check_characters(request)
    good = [r for r in requests if r.error is None and r.prompt.strip()]
    plain = [r for r in good if r.messages is None]
    chats = [r for r in good if r.messages is not None]
    for group, special in ((plain, True), (chats, False)):
        if group:
            texts = [r.prompt for r in group]
            encoded = tokenizer(texts, add_special_tokens=special, return_attention_mask=False, verbose=False)["input_ids"]
            for request, ids in zip(group, encoded, strict=True):
                request.token_ids = list(ids)
    for request in requests:
        if request.error is None and not request.token_ids:
            request.error = "empty prompt"
        elif request.error is None:
            request.error = unknown_token(request.token_ids, vocab_size)
        if request.error is None:
            _fit(request, limit, long_prompt)


def _render_chat(request: Request, tokenizer: Any) -> None:
    try:
        request.prompt = tokenizer.apply_chat_template(
            [dict(m) for m in request.messages or ()], tokenize=False, add_generation_prompt=True
        )
    except Exception as error:  # templates are programs of the model's author and raise what they like
        request.error = f"the chat template refused the messages ({error})"


def _check_characters(request: Request) -> None:
    """JSON can hold half of a surrogate pair, which is no character: tokenizers and UTF-8 files refuse it."""
    try:
        request.prompt.encode()
    except UnicodeEncodeError:
        request.error = request.error or "the prompt holds half a surrogate pair, which is no character"
        request.prompt = request.prompt.encode(errors="replace").decode()


def _fit(request: Request, limit: int, long_prompt: str) -> None:
    room = limit - 1  # at least one new token
    if len(request.token_ids) > room:
        if long_prompt == "error":
            request.error = f"the prompt has {len(request.token_ids)} tokens, at most {room} fit (--max_len, --long_prompt truncate_left)"
            return
        request.token_ids = request.token_ids[-room:] if long_prompt == "truncate_left" else request.token_ids[:room]
        request.truncated = long_prompt
    request.max_new_tokens = min(request.params.max_new_tokens, limit - len(request.token_ids))
