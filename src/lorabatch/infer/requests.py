"""What is asked for, and how far it is: a ``Request`` holds all state of one completion but its
keys and values. No tensors here."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import astuple, dataclass, field, fields, replace

from lorabatch.config import InferConfig
from lorabatch.corpus.tokens import Tokenizer
from lorabatch.infer.constraints import Constraint
from lorabatch.infer.speculation import Lookup
from lorabatch.metrics.inference import milliseconds
from lorabatch.schema import Record

NOT_FINITE = "the model's numbers are not finite"


@dataclass(frozen=True)
class SamplingParams:
    """How one request is decoded, by default as ``InferConfig`` says. ``temperature`` 0 is greedy;
    ``seed`` alone determines its random numbers."""

    max_new_tokens: int = InferConfig.max_new_tokens
    temperature: float = InferConfig.temperature
    top_k: int = InferConfig.top_k
    top_p: float = InferConfig.top_p
    min_p: float = InferConfig.min_p
    repetition_penalty: float = InferConfig.repetition_penalty
    presence_penalty: float = InferConfig.presence_penalty
    frequency_penalty: float = InferConfig.frequency_penalty
    seed: int = InferConfig.seed
    stop: tuple[str, ...] = InferConfig.stop
    stop_token_ids: tuple[int, ...] = InferConfig.stop_token_ids
    ignore_eos: bool = InferConfig.ignore_eos
    # how many likeliest tokens to report beside each token's own; None: nothing
    logprobs: int | None = InferConfig.logprobs
    n: int = InferConfig.n
    min_new_tokens: int = InferConfig.min_new_tokens  # last: see Request._identity

    @classmethod
    def of(cls, config: InferConfig) -> SamplingParams:
        """What the flags say."""
        return cls(**{field.name: getattr(config, field.name) for field in fields(cls)})

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def penalised(self) -> bool:
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1, 0, 0)

    @property
    def likeliest(self) -> bool:
        """Whether each token is simply the likeliest one, so that nobody needs to see the
        logits."""
        return self.greedy and not self.penalised and self.logprobs is None


@dataclass
class TokenLogprob:
    """Natural logarithms of probabilities, before penalties and temperature: the token's own and
    the likeliest ones'."""

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
    # place among all completions of the run, those of one prompt next to each other
    position: int = 0
    messages: tuple[Mapping[str, str], ...] | None = None
    error: str | None = None
    token_ids: list[int] = field(default_factory=list)  # the prompt's
    output_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)  # of output_ids, where asked for
    # token id -> how often it was generated; see sampling
    counts: dict[int, int] = field(default_factory=dict)
    lookup: Lookup | None = None  # of its speculation, once it guesses
    truncated: str | None = None  # the policy that shortened the prompt
    max_new_tokens: int = 0  # params.max_new_tokens, or what fits behind the prompt
    # name among --adapters; None: the base, or the one that is merged in
    adapter: str | None = None
    grammar: str | None = None  # that its text must follow
    constraint: Constraint | None = None  # of the grammar, as far as the text has come
    kept: Record | None = None  # fields of its row that go into its record
    ending_ids: tuple[int, ...] = ()  # that end it, but not before params.min_new_tokens
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
        """Identity for --resume, 16 hexadecimal digits: id, content and parameters; ``work_key``:
        model, adapter and limits."""
        # as given, before the chat template
        prompt = self.prompt if self.messages is None else list(self.messages)
        what = [self.id, self.sample, prompt, self._identity(), self.adapter, work_key]
        what += [self.grammar] if self.grammar else []
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]

    def _identity(self) -> tuple[object, ...]:
        """Of the parameters. One that came later counts only where it is used, so that runs from
        before it was there can be resumed."""
        params = astuple(self.params)
        return params if self.params.min_new_tokens else params[:-1]

    @property
    def must_continue(self) -> bool:
        """Whether no token may end the completion yet."""
        return len(self.output_ids) < self.params.min_new_tokens

    @property
    def likeliest(self) -> bool:
        """Whether the next token is simply the likeliest one: nobody needs to see the logits."""
        return self.params.likeliest and not self.must_continue and self.constraint is None

    def restarted(self) -> Request:
        """A fresh copy, to be completed again from its prompt."""
        return replace(
            self,
            output_ids=[],
            logprobs=[],
            counts={},
            lookup=None,
            constraint=self.constraint and self.constraint.restarted(),
            slot=-1,
            text="",
            finish_reason=None,
        )


def completion_record(
    request: Request, tokenizer: Tokenizer | None, *, key: str, adapter: str | None
) -> Record:
    """The line of ``completions.jsonl``. Times are milliseconds from submission (``queue_ms``:
    until prefill began). ``tokenizer``: None for a request that failed before it ran."""

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
        **_times(request),
        "truncated": request.truncated,
        "error": request.error,
        "logprobs": _logprobs(request, tokenizer),
        "chat": request.messages is not None,
        **({"fields": request.kept} if request.kept else {}),
        "index": request.index,
        "key": key,
    }


def _times(request: Request) -> Record:
    ends = {
        "queue_ms": request.started_s,
        "ttft_ms": request.first_token_s,
        "e2el_ms": request.last_token_s,
    }
    begin = request.submitted_s
    return {name: round(milliseconds(begin, at), 3) if at else None for name, at in ends.items()}


def _logprobs(request: Request, tokenizer: Tokenizer | None) -> list[Record] | None:
    """OpenAI's shape: the text of each token, its log-probability, and the likeliest tokens with
    theirs."""
    if tokenizer is None or request.params.logprobs is None or request.error:
        return None
    return [
        {
            "token": tokenizer.decode([token_id]),
            "logprob": round(entry.own, 6),
            "top_logprobs": [
                {"token": tokenizer.decode([i]), "logprob": round(value, 6)}
                for i, value in zip(entry.top_ids, entry.top, strict=True)
            ],
        }
        for token_id, entry in zip(request.output_ids, request.logprobs, strict=True)
    ]
