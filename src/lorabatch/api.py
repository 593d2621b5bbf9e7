"""``lorabatch.load``: a model in a program, for notebooks and scripts. docs/python.md shows it.

model = lorabatch.load("smollm2-135m", adapter="results/mine")
for completion in model.generate(["A fever is"], max_new_tokens=32):
    print(completion.text)
print(model.score(["A fever is a sign."])[0].bits_per_byte)
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from os import PathLike

from lorabatch.config import InferConfig
from lorabatch.corpus.tokens import unknown_token
from lorabatch.errors import DataError, UsageError, nearest
from lorabatch.infer.prompts import LIST_TYPES, PARAM_TYPES, row_params
from lorabatch.infer.requests import Request, SamplingParams
from lorabatch.infer.session import Messages, Session
from lorabatch.metrics.statistics import bits_per_byte
from lorabatch.settings import typed_values

Names = str | Sequence[str | None] | None  # of adapters: one for all prompts, or one for each
Sampling = float | bool | str | Sequence[str] | Sequence[int] | None
SAMPLING = {*PARAM_TYPES, *LIST_TYPES}
LOADING = {
    *("backend", "batch_size", "deterministic", "dtype", "long_prompt", "max_len", "no_cuda"),
    *("order", "prefill_tokens", "quantize", "speculate", "threads"),
}


@dataclass(frozen=True)
class Completion:
    """One completion of one prompt. With an ``error`` there is no text."""

    text: str
    finish_reason: str | None  # "stop": the model, a stop string or token ended it; "length"
    input_tokens: int
    token_ids: tuple[int, ...]  # the completion's, with the one that ended it
    logprobs: tuple[float, ...] | None  # natural logarithms, one a token, where asked for
    error: str | None


@dataclass(frozen=True)
class Score:
    """How likely a text is. ``num_tokens`` and ``num_bytes``: of what was predicted."""

    log_likelihood: float  # nats, the sum over the tokens
    num_tokens: int
    num_bytes: int

    @property
    def bits_per_byte(self) -> float | None:
        """None where nothing was predicted."""
        return bits_per_byte(-self.log_likelihood, self.num_bytes) if self.num_bytes else None


class LanguageModel:
    """A base model with its adapters, loaded. Made by ``lorabatch.load``."""

    def __init__(self, config: InferConfig) -> None:
        said = io.StringIO()
        with redirect_stdout(said):
            self._session = Session(config)
        self.description = said.getvalue().strip()  # what serves: type, device, kernels, adapters

    def generate(
        self,
        prompts: Sequence[str | Messages],
        *,
        adapter: Names = None,
        **sampling: Sampling,
    ) -> list[Completion]:
        """Complete all prompts in batches; results in their order, the ``n`` of a prompt side by
        side.

        prompts: plain texts, or lists of {"role", "content"} for the chat template. adapter: a name
        of ``adapters``, one for all or one for each prompt. sampling: as the flags of ``lorabatch
        infer`` (max_new_tokens, temperature, top_p, stop, seed ...); prompt i uses seed + i.

        Raises UsageError for an unknown or impossible setting, DataError for an unknown adapter. A
        prompt that cannot run has its ``error`` in its completion; the others run.
        """
        params, session = self._params(prompts, sampling), self._session
        names = self._names(adapter, len(prompts))
        requests: list[Request] = []
        for i, (prompt, name) in enumerate(zip(prompts, names, strict=True)):
            own = replace(params, seed=params.seed + i)
            requests += session.requests(prompt, own, index=i, adapter=name)
        with redirect_stdout(io.StringIO()):
            return list(map(_completion, session.complete(requests)))

    def score(
        self, texts: Sequence[str | tuple[str, str]], *, adapter: Names = None
    ) -> list[Score]:
        """How likely the model finds each text, or, of a pair (prompt, completion), the completion.
        Nothing is added: no end-of-text token.

        Raises DataError for a text that is empty or does not fit.
        """
        _refuse_text("texts", texts)
        names = self._names(adapter, len(texts))
        with redirect_stdout(io.StringIO()):
            return [self._score(i, t, n) for i, (t, n) in enumerate(zip(texts, names, strict=True))]

    def _score(self, index: int, text: str | tuple[str, str], adapter: str | None) -> Score:
        given, token_ids = self._encoded(text, where=f"texts[{index}]")
        first = max(1, len(given))
        total = 0.0
        if len(token_ids) > first:
            total = self._session.score(token_ids, first, adapter=adapter)
        decode = self._session.loaded.tokenizer.decode
        predicted = decode(token_ids[first:], skip_special_tokens=True)
        return Score(total, len(token_ids) - first, len(predicted.encode()))

    def _encoded(self, text: str | tuple[str, str], where: str) -> tuple[list[int], list[int]]:
        """(ids of the prompt, ids of everything). DataError for what cannot be scored."""
        loaded, (prompt, rest) = self._session.loaded, ("", text) if isinstance(text, str) else text
        encode = loaded.tokenizer
        given = encode(prompt, add_special_tokens=True)["input_ids"] if prompt else []
        token_ids = given + encode(rest, add_special_tokens=not prompt)["input_ids"]
        what = unknown_token(token_ids, loaded.model.vocab_size) if token_ids else "is empty"
        if len(token_ids) > loaded.limit:
            what = f"has {len(token_ids)} tokens, and at most {loaded.limit} fit"
        if what:
            raise DataError(what, where=where, fix="split, fill or remove it")
        return given, token_ids

    def _params(
        self, prompts: Sequence[str | Messages], sampling: Mapping[str, Sampling]
    ) -> SamplingParams:
        _refuse_text("prompts", prompts)
        for name in sampling:
            if name not in SAMPLING:
                raise UsageError(f"unknown setting '{name}'", fix=nearest(name, SAMPLING))
        row = {k: list(v) if isinstance(v, tuple) else v for k, v in sampling.items()}
        unset = {name for name, value in row.items() if value is None}  # logprobs=None: none
        try:
            params = SamplingParams.of(self._session.config)
            return row_params({k: v for k, v in row.items() if k not in unset}, params)
        except DataError as error:
            raise UsageError(error.what, fix="see lorabatch infer --help") from None

    def _names(self, adapter: Names, count: int) -> Iterator[str | None]:
        names = [adapter] * count if adapter is None or isinstance(adapter, str) else list(adapter)
        if len(names) != count:
            what = f"{len(names)} adapters for {count} prompts"
            raise UsageError(what, where="adapter", fix="give one name, or one for each")
        for name in names:
            self._session.adapters.row(name)
        return iter(names)


def _refuse_text(name: str, values: object) -> None:
    """A text is a sequence of texts too, each of one character, which nobody means."""
    if isinstance(values, str):
        raise UsageError("is a text, not a list of texts", where=name, fix="write [text]")


def _completion(request: Request) -> Completion:
    asked = request.params.logprobs is not None and request.error is None
    return Completion(
        text=request.text,
        finish_reason=request.finish_reason,
        input_tokens=len(request.token_ids),
        token_ids=tuple(request.output_ids),
        logprobs=tuple(entry.own for entry in request.logprobs) if asked else None,
        error=request.error,
    )


def load(
    base: str | PathLike[str],
    *,
    adapter: str | PathLike[str] | None = None,
    adapters: Mapping[str, str | PathLike[str]] | None = None,
    **settings: float | bool | str | None,
) -> LanguageModel:
    """A model ready to generate and to score.

    base: as ``--base_model``. adapter: a folder, merged into the base. adapters: name -> folder of
    each that ``generate`` and ``score`` choose from. settings: flags of ``lorabatch infer`` that
    say how to load and compute (LOADING), or what ``generate`` does unless told otherwise.

    Raises the errors of ``lorabatch infer``: UsageError, DataError, UnavailableError.
    """
    for name in settings:
        if name not in LOADING | SAMPLING:
            known = {"adapter", "adapters", *LOADING, *SAMPLING}
            raise UsageError(f"unknown setting '{name}'", fix=nearest(name, known))
    values: dict[str, object] = {"base_model": str(base), **settings}
    if adapter is not None:
        values["adapter_dir"] = str(adapter)
    if adapters:
        values["adapters"] = [f"{name}={folder}" for name, folder in adapters.items()]
    return LanguageModel(InferConfig(**typed_values(InferConfig, values, "lorabatch.load")))
