"""What is asked for: one ``Request`` object holds the whole state of one row. No tensors here.

A prompt file may hold bad rows. What makes the *file* unreadable (no such file, not UTF-8, a
broken JSON line, two equal ids) stops the run before it starts; what makes one *request*
impossible (empty, too long, a setting out of range) becomes its error record.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from lorabatch.config import InferConfig
from lorabatch.corpus.readers import QA_PROMPT, check_file, jsonl_rows, read_text, text_lines
from lorabatch.errors import DataError, LorabatchError, nearest


@dataclass(frozen=True)
class SamplingParams:
    """How one request is decoded. ``temperature`` 0 is greedy; ``seed`` alone determines its random numbers."""

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


@dataclass
class Request:
    """One prompt and everything that happens to it. Times are ``perf_counter`` seconds."""

    id: str
    index: int  # place in the input
    prompt: str
    params: SamplingParams
    messages: tuple[Mapping[str, str], ...] | None = None
    error: str | None = None
    token_ids: list[int] = field(default_factory=list)  # the prompt's
    output_ids: list[int] = field(default_factory=list)
    truncated: str | None = None  # the policy that shortened the prompt
    max_new_tokens: int = 0  # params.max_new_tokens, or what fits behind the prompt
    slot: int = -1
    text: str = ""
    finish_reason: str | None = None
    submitted_s: float = 0.0
    started_s: float = 0.0
    first_token_s: float = 0.0
    last_token_s: float = 0.0

    @property
    def num_tokens(self) -> int:
        """Tokens whose keys and values a slot holds once the newest token has been fed back."""
        return len(self.token_ids) + len(self.output_ids)

    def key(self, model_key: str) -> str:
        """Identity for --resume: id, content, parameters, model and adapter, by content."""
        what = [self.id, self.prompt, list(self.messages or ()), [getattr(self.params, f.name) for f in fields(self.params)], model_key]
        return hashlib.sha256(json.dumps(what, sort_keys=True, default=list).encode()).hexdigest()[:16]

    def restarted(self) -> Request:
        """A fresh copy for another repetition."""
        return replace(self, output_ids=[], slot=-1, text="", finish_reason=None)


PARAM_TYPES = {
    "max_new_tokens": int,
    "temperature": float,
    "top_k": int,
    "top_p": float,
    "min_p": float,
    "repetition_penalty": float,
    "seed": int,
    "ignore_eos": bool,
}
ROW_FIELDS = ("id", "prompt", "question", "messages", "stop", *PARAM_TYPES)


def read_requests(path: Path, config: InferConfig) -> tuple[list[Request], set[str]]:
    """(all requests of a prompt file in order, names of fields that were ignored).

    .txt: one prompt a line, blank lines skipped. .jsonl: ``prompt`` (or ``question``, or
    ``messages``), optional ``id`` and parameters. ``id`` defaults to the 0-based number of the prompt.
    """
    check_file(path)
    ignored: set[str] = set()
    if path.suffix.lower() == ".jsonl":
        requests = []
        for index, (where, row) in enumerate(jsonl_rows(path)):
            ignored |= set(row) - set(ROW_FIELDS)
            requests.append(_from_row(row, index, where, config))
    elif path.suffix.lower() == ".txt":
        prompts = [line.strip() for line in text_lines(read_text(path)) if line.strip()]
        requests = [Request(str(i), i, prompt, _default_params(config, i)) for i, prompt in enumerate(prompts)]
    else:
        raise DataError(f"unknown kind of file '{path.suffix}'", where=path, fix="give .txt (one prompt a line) or .jsonl")
    if not requests:
        raise DataError("no prompts in it", where=path, fix="give a file with at least one prompt")
    seen: dict[str, int] = {}
    for request in requests:
        if request.id in seen:
            raise DataError(
                f"id '{request.id}' occurs twice (prompts {seen[request.id]} and {request.index})", where=path, fix="make the ids unique"
            )
        seen[request.id] = request.index
    return requests, ignored


def _default_params(config: InferConfig, index: int) -> SamplingParams:
    return SamplingParams(**{f.name: getattr(config, f.name) for f in fields(SamplingParams)} | {"seed": config.seed + index})


def _from_row(row: dict[str, Any], index: int, where: str, config: InferConfig) -> Request:
    request = Request(str(row.get("id", index)), index, "", _default_params(config, index))
    if "prompt" in row:
        request.prompt = row["prompt"] if isinstance(row["prompt"], str) else ""
    elif "question" in row:
        request.prompt = QA_PROMPT.format(question=row["question"])
    elif isinstance(row.get("messages"), list):
        request.messages = tuple(row["messages"])
    else:
        raise DataError("no 'prompt', 'question' or 'messages'", where=where, fix=nearest("prompt", row) if row else "add a prompt")
    try:
        request.params = _row_params(row, request.params, config)
    except LorabatchError as error:
        request.error = str(error)
    return request


def _row_params(row: Mapping[str, Any], params: SamplingParams, config: InferConfig) -> SamplingParams:
    """The row's own parameters over the defaults, within the same bounds as the flags."""
    changes: dict[str, Any] = {}
    for name, kind in PARAM_TYPES.items():
        if name in row:
            value = row[name]
            if isinstance(value, bool) != (kind is bool) or not isinstance(value, (int, float)) or (kind is int and int(value) != value):
                raise DataError(f"{name} is {value!r}, not of type {kind.__name__}")
            changes[name] = kind(value)
    if "stop" in row:
        stop = [row["stop"]] if isinstance(row["stop"], str) else row["stop"]
        if not isinstance(stop, list) or not all(isinstance(s, str) and s for s in stop):
            raise DataError("stop is not a list of strings")
        changes["stop"] = tuple(stop)
    replace(config, **changes)  # checks the bounds
    return replace(params, **changes)


def prepare(requests: list[Request], tokenizer: Any, *, limit: int, long_prompt: str) -> None:
    """Tokenise all prompts and fit each into ``limit`` positions; what does not fit gets its ``error``."""
    for request in requests:
        if request.messages is not None and request.error is None:
            _render_chat(request, tokenizer)
    good = [r for r in requests if r.error is None and r.prompt.strip()]
    plain = [r for r in good if r.messages is None]
    chats = [r for r in good if r.messages is not None]
    for group, special in ((plain, True), (chats, False)):
        if group:
            encoded = tokenizer([r.prompt for r in group], add_special_tokens=special, return_attention_mask=False, verbose=False)[
                "input_ids"
            ]
            for request, ids in zip(group, encoded, strict=True):
                request.token_ids = list(ids)
    for request in requests:
        if request.error is None and not request.token_ids:
            request.error = "empty prompt"
        elif request.error is None:
            _fit(request, limit, long_prompt)


def _render_chat(request: Request, tokenizer: Any) -> None:
    try:
        request.prompt = tokenizer.apply_chat_template(
            [dict(m) for m in request.messages or ()], tokenize=False, add_generation_prompt=True
        )
    except Exception as error:  # templates are programs of the model's author and raise what they like
        request.error = f"the chat template refused the messages ({error})"


def _fit(request: Request, limit: int, long_prompt: str) -> None:
    room = limit - 1  # at least one new token
    if len(request.token_ids) > room:
        if long_prompt == "error":
            request.error = f"the prompt has {len(request.token_ids)} tokens, at most {room} fit (--max_len, --long_prompt truncate_left)"
            return
        request.token_ids = request.token_ids[-room:] if long_prompt == "truncate_left" else request.token_ids[:room]
        request.truncated = long_prompt
    request.max_new_tokens = min(request.params.max_new_tokens, limit - len(request.token_ids))


def completion_record(request: Request, *, key: str, adapter: str | None) -> dict[str, Any]:
    """The line of ``completions.jsonl``. Times are milliseconds from submission (``queue_ms``: until prefill began)."""

    def since_submission(at: float) -> float | None:
        return round((at - request.submitted_s) * 1e3, 3) if at else None

    return {
        "id": request.id,
        "prompt": request.prompt,
        "text": request.text,
        "adapter": adapter,
        "seed": request.params.seed,
        "input_tokens": len(request.token_ids),
        "output_tokens": len(request.output_ids),
        "finish_reason": "error" if request.error else request.finish_reason,
        "queue_ms": since_submission(request.started_s),
        "ttft_ms": since_submission(request.first_token_s),
        "e2el_ms": since_submission(request.last_token_s),
        "truncated": request.truncated,
        "error": request.error,
        "index": request.index,
        "key": key,
    }


def in_input_order(records: Iterator[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(records, key=lambda record: record["index"])
