"""What is asked for, and how far it is: a ``Request`` holds all state of one completion but its keys and values. No tensors here."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import astuple, dataclass, field, replace
from typing import Any

from lorabatch.infer.speculation import Lookup

NOT_FINITE = "the model's numbers are not finite"


@dataclass(frozen=True)
class SamplingParams:
    """How one request is decoded. ``temperature`` 0 is greedy; ``seed`` alone determines its random numbers."""

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None  # how many likeliest tokens to report beside each token's own; None: nothing
    n: int = 1

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def penalised(self) -> bool:
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1, 0, 0)

    @property
    def likeliest(self) -> bool:
        """Whether each token is simply the likeliest one, so that nobody needs to see the logits."""
        return self.greedy and not self.penalised and self.logprobs is None


@dataclass
class TokenLogprob:
    """Natural logarithms of probabilities, before penalties and temperature: the token's own and the likeliest ones'."""

    own: float
    top_ids: list[int]
    top: list[float]


@dataclass
class Request:
    """One prompt and everything that happens to it. Times are ``perf_counter`` seconds."""

    id: str
    index: int  # place of its prompt in the input
    prompt: str
    params: SamplingParams
    sample: int = 0  # which of the ``params.n`` completions of its prompt
    position: int = 0  # place among all completions of the run, those of one prompt next to each other
    messages: tuple[Mapping[str, str], ...] | None = None
    error: str | None = None
    token_ids: list[int] = field(default_factory=list)  # the prompt's
    output_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)  # of output_ids, where asked for
    counts: dict[int, int] = field(default_factory=dict)  # token id -> how often it was generated; see sampling
    lookup: Lookup | None = None  # of its speculation, once it guesses
    truncated: str | None = None  # the policy that shortened the prompt
    max_new_tokens: int = 0  # params.max_new_tokens, or what fits behind the prompt
    adapter: str | None = None  # name among --adapters; None: the base, or the one that is merged in
    adapter_row: int = -1  # its place among --adapters
    slot: int = -1
    cached: int = 0  # tokens that the slot holds
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

    @property
    def num_positions(self) -> int:
        """The most a slot must hold for it."""
        return len(self.token_ids) + self.max_new_tokens

    def key(self, work_key: str) -> str:
        """Identity for --resume, 16 hexadecimal digits: id, content and parameters; ``work_key``: model, adapter and limits."""
        prompt = self.prompt if self.messages is None else list(self.messages)  # as given, before the chat template
        what = [self.id, self.sample, prompt, astuple(self.params), self.adapter, work_key]
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]

    def restarted(self) -> Request:
        """A fresh copy, to be completed again from its prompt."""
        return replace(self, output_ids=[], logprobs=[], counts={}, lookup=None, slot=-1, text="", finish_reason=None)


def completion_record(request: Request, tokenizer: Any, *, key: str, adapter: str | None) -> dict[str, Any]:
    """The line of ``completions.jsonl``. Times are milliseconds from submission (``queue_ms``: until prefill began)."""

    def since_submission(at: float) -> float | None:
        return round((at - request.submitted_s) * 1e3, 3) if at else None

    return {
        "id": request.id,
        "prompt": request.prompt,
        "text": request.text,
        "adapter": request.adapter or adapter,
        "seed": request.params.seed,
        "sample": request.sample,
        "input_tokens": len(request.token_ids),
        "output_tokens": len(request.output_ids),
        "finish_reason": "error" if request.error else request.finish_reason,
        "queue_ms": since_submission(request.started_s),
        "ttft_ms": since_submission(request.first_token_s),
        "e2el_ms": since_submission(request.last_token_s),
        "truncated": request.truncated,
        "error": request.error,
        "logprobs": _logprobs(request, tokenizer),
        "chat": request.messages is not None,
        "index": request.index,
        "key": key,
    }


def _logprobs(request: Request, tokenizer: Any) -> list[dict[str, Any]] | None:
    """OpenAI's shape: the text of each token, its log-probability, and the likeliest tokens with theirs."""
    if request.params.logprobs is None or request.error:
        return None
    return [
        {
            "token": tokenizer.decode([token_id]),
            "logprob": round(entry.own, 6),
            "top_logprobs": [
                {"token": tokenizer.decode([i]), "logprob": round(value, 6)} for i, value in zip(entry.top_ids, entry.top, strict=True)
            ],
        }
        for token_id, entry in zip(request.output_ids, request.logprobs, strict=True)
    ]
