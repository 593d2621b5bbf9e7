"""A loaded model that completes and scores what a program or a person gives it, without files: what
``lorabatch.load``, ``infer --prompt`` and ``chat`` have in common.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lorabatch.config import InferConfig
from lorabatch.infer.adapters import AdapterNames, check_adapters
from lorabatch.infer.feed import Feed
from lorabatch.infer.load import Loaded, load_for_inference
from lorabatch.infer.passes import Passes
from lorabatch.infer.prompts import prepare, prompt_bytes
from lorabatch.infer.requests import Request, SamplingParams
from lorabatch.infer.runners.base import HiddenRunner
from lorabatch.infer.stats import PassStats
from lorabatch.model import hub
from lorabatch.model.attention import Segment
from lorabatch.model.hf import HfModel

Messages = Sequence[Mapping[str, str]]
SCORED_AT_ONCE = 256  # rows of logits: a vocabulary wide each


class Given:
    """Requests that are all in memory, as ``Feed`` takes them."""

    def __init__(self, requests: Sequence[Request]) -> None:
        self._requests = requests
        self.longest_bytes = max(map(prompt_bytes, requests), default=0)
        self.most_new_tokens = max((r.params.max_new_tokens for r in requests), default=0)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._requests)


class Session:
    """``config``: its files and folders are not looked at, but for the base and the adapters."""

    def __init__(self, config: InferConfig) -> None:
        """Loads the model and says on stdout what serves. Errors: those of ``lorabatch infer``."""
        hub.prepare_environment()
        check_adapters(config)
        self.config, self.adapters = config, AdapterNames.parse(config.adapters)
        source = hub.find_model(config.base_model)
        self.loaded: Loaded = load_for_inference(config, source, self.adapters)
        self._passes = Passes(self.loaded, config, lasting=True)

    def requests(
        self,
        prompt: str | Messages,
        params: SamplingParams,
        *,
        index: int,
        adapter: str | None = None,
        grammar: str | None = None,
    ) -> list[Request]:
        """``params.n`` completions of one prompt. messages go through the chat template. DataError
        for an adapter that is not there."""
        chat = None if isinstance(prompt, str) else tuple(prompt)
        first = Request(str(index), index, prompt if isinstance(prompt, str) else "", params)
        first.messages, first.adapter, first.grammar = chat, adapter, grammar
        first.adapter_row = self.adapters.row(adapter)
        return [replace(first.restarted(), sample=sample) for sample in range(params.n)]

    def num_tokens(self, messages: Messages) -> int:
        """Of a conversation whose next word is the assistant's; 0 where the chat template refuses
        it."""
        (request,) = self.requests(messages, SamplingParams(), index=0)
        prepare([request], self.loaded.tokenizer, limit=sys.maxsize, long_prompt="error")
        return len(request.token_ids)

    def complete(
        self, requests: Sequence[Request], on_tokens: Callable[[Request], None] | None = None
    ) -> list[Request]:
        """All of them, done, in their order; one that cannot run has its ``error``. on_tokens: with
        each request that got tokens in a step."""
        done: dict[int, Request] = {}
        for position, request in enumerate(requests):
            request.position = position

        def refused(request: Request, *, record: bool) -> None:
            done[request.position] = request

        feed = Feed(
            Given(requests),
            self.loaded,
            long_prompt=self.config.long_prompt,
            done=bytearray(len(requests)),
            on_error=refused,
        )

        def finished(request: Request) -> None:
            feed.finish(request)
            done[request.position] = request

        if feed.next_positions:
            self._passes.reserve(self.config.batch_size, feed.likely_capacity())
            stats = PassStats(begin_s=time.perf_counter())
            self._passes.complete(feed, finished, lambda: False, stats, on_tokens)
        return [done[position] for position in range(len(requests))]

    def score(self, token_ids: list[int], first: int, *, adapter: str | None) -> float:
        """Natural logarithm of the probability of the tokens from ``first`` (at least 1) on, each
        predicted from all before it."""
        row, model = self.adapters.row(adapter), self.loaded.model
        if isinstance(model, HfModel):
            with torch.inference_mode():
                return -float(model.loss_sum([torch.tensor(token_ids)], [first]))
        runner = self._passes.reserve(self.config.batch_size, len(token_ids))
        wanted = len(token_ids) - first
        hidden = runner.forward([Segment(0, 0, token_ids[:-1], adapter=row, num_logits=wanted)])
        return _log_probability(runner, hidden, token_ids[first:])


def _log_probability(runner: HiddenRunner, hidden: Tensor, targets: Sequence[int]) -> float:
    """Of the token that follows each row of the hidden states [n, H]."""
    total = 0.0
    for at in range(0, len(targets), SCORED_AT_ONCE):
        chosen = targets[at : at + SCORED_AT_ONCE]
        logits = runner.logits(hidden[at : at + len(chosen)]).float()
        total += float(logits.log_softmax(dim=-1)[range(len(chosen)), chosen].double().sum())
    return total
