"""``lorabatch chat``: a conversation on the terminal, or over the lines of standard input; the base
beside the adapter if asked for."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING

from lorabatch.config import InferConfig
from lorabatch.config_chat import ChatConfig
from lorabatch.errors import DataError, UsageError
from lorabatch.model import hub

if TYPE_CHECKING:
    from lorabatch.infer.session import Session

NAME = "adapter"  # of the adapter where the base answers too
BASE = "base"
ROOM = 4  # of the model's positions, one in so many at most is kept free for the answer
HELP = "/reset begins a new conversation, /quit or Ctrl-D ends it"


@dataclass
class Side:
    """Who answers, and the conversation as this one knows it. ``adapter``: its name; None: the base
    or the adapter that is merged into it."""

    label: str
    adapter: str | None
    messages: list[dict[str, str]] = field(default_factory=list)


def run_chat(config: ChatConfig, command: list[str]) -> int:
    """Returns the exit code. Raises UsageError, DataError for a model without chat template or an
    adapter that is not there, before the model loads."""
    infer_config = _infer_config(config)
    hub.prepare_environment()
    from lorabatch.infer.adapters import check_adapters
    from lorabatch.model.load import load_tokenizer

    check_adapters(infer_config)
    source = hub.find_model(config.base_model)
    if not load_tokenizer(source.path).chat_template:
        raise DataError(
            "this model has no chat template",
            where=f"--base_model {config.base_model}",
            fix="use an instruct model, or lorabatch infer --prompt",
        )
    from lorabatch.infer.session import Session

    with redirect_stdout(sys.stderr):
        session = Session(infer_config)
        print(HELP)
    _converse(session, config)
    return 0


def _infer_config(config: ChatConfig) -> InferConfig:
    if config.beside_base and config.adapter_dir in (None, "none"):
        raise UsageError(
            "there is no adapter to compare the base with",
            where="--beside_base",
            fix="add --adapter_dir",
        )
    shared = {f.name for f in fields(ChatConfig)} & {f.name for f in fields(InferConfig)}
    infer_config = InferConfig(**{name: getattr(config, name) for name in shared})
    if not config.beside_base:
        return replace(infer_config, batch_size=1)
    adapters = (f"{NAME}={config.adapter_dir}",)
    return replace(infer_config, batch_size=2, adapter_dir=None, adapters=adapters)


def _converse(session: Session, config: ChatConfig) -> None:
    sides = _sides(config)
    for turn, text in enumerate(_said()):
        if text == "/quit":
            return
        if text == "/reset":
            sides = _sides(config)
            continue
        for side in sides:
            side.messages.append({"role": "user", "content": text})
        try:
            _answer(session, config, sides, turn)
        except DataError as error:  # the text is too long, or the template refuses it
            print(f"lorabatch chat: {error}", file=sys.stderr)
            for side in sides:
                side.messages.pop()


def _sides(config: ChatConfig) -> list[Side]:
    start = [{"role": "system", "content": config.system}] if config.system else []
    if config.beside_base:
        return [Side(f"{BASE}: ", None, [*start]), Side(f"{NAME}: ", NAME, [*start])]
    return [Side("", None, [*start])]


def _said() -> Iterator[str]:
    """What the user says, a line each, until the end of the input."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    asked = ""
    if sys.stdin.isatty():
        asked = "you> "
        with suppress(ImportError):
            import readline  # noqa: F401  (keys that edit the line)
    while True:
        try:
            text = input(asked).strip()
        except EOFError:
            print(end="\n" if asked else "")
            return
        if text:
            yield text


def _answer(session: Session, config: ChatConfig, sides: list[Side], turn: int) -> None:
    """Both at once, in one batch. DataError for what cannot be answered."""
    from lorabatch.infer.requests import SamplingParams
    from lorabatch.infer.stream import Streams

    params = replace(SamplingParams.of(session.config), seed=config.seed + turn)
    requests = []
    for side in sides:
        _forget(session, side, config.max_new_tokens)
        requests += session.requests(side.messages, params, index=turn, adapter=side.adapter)
    streams = Streams(session.loaded.tokenizer, [side.label for side in sides])
    answered = session.complete(requests, streams.grow)
    streams.end(answered)
    for side, request in zip(sides, answered, strict=True):
        side.messages.append({"role": "assistant", "content": request.text})


def _forget(session: Session, side: Side, max_new_tokens: int) -> None:
    """Drop the oldest turns until the conversation leaves room for an answer; says so. None where
    the newest text alone is too long: it is the one to be refused."""
    limit, first = session.loaded.limit, int(side.messages[0]["role"] == "system")
    most = limit - min(max_new_tokens, limit // ROOM)
    kept = list(side.messages)
    while (size := session.num_tokens(kept)) > most and len(kept) > first + 1:
        del kept[first : first + 2]
    dropped = (len(side.messages) - len(kept)) // 2
    if dropped and size < limit:
        side.messages = kept
        print(f"({side.label}{dropped} turns forgotten: the conversation is long)", file=sys.stderr)
