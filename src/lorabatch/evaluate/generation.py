"""Completions of the base and every adapter, greedy, and how near they come to what was wanted.

chrF (Popović 2015) counts characters that two texts share in order, so it needs no tokenizer and
serves every language: 0 to 100, the best of several targets. It comes from sacrebleu.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorabatch.corpus.tokens import Tokenizer
from lorabatch.errors import DataError, LorabatchError, UnavailableError
from lorabatch.evaluate.items import Item
from lorabatch.infer.engine import Engine
from lorabatch.infer.requests import Request, SamplingParams
from lorabatch.infer.runners import make_runner
from lorabatch.model.load import Model
from lorabatch.model.lora import LoraWeights
from lorabatch.schema import Record

if TYPE_CHECKING:
    from sacrebleu.metrics import CHRF

AT_ONCE = 16  # requests in one batch
ITEMS_A_PASS = 16  # whose completions are written together


def chrf() -> CHRF:
    """The metric. UnavailableError where sacrebleu is not installed."""
    try:
        from sacrebleu.metrics import CHRF
    except ImportError:
        raise UnavailableError(
            "rows with a 'target' are compared by chrF, which comes from the package sacrebleu",
            fix="run: pip install 'sacrebleu>=2.6'",
        ) from None
    return CHRF()


@dataclass(frozen=True)
class Generator:
    """What completes prompts: a model of its own, whose products are packed for inference."""

    model: Model
    tokenizer: Tokenizer
    eos_ids: frozenset[int]
    adapters: Mapping[str, LoraWeights | None]
    max_new_tokens: int

    def score(self, items: Sequence[Item]) -> Iterator[tuple[str, Item, Record]]:
        """(name of the model, item, its figures). LorabatchError where the model's numbers are not
        finite."""
        metric, done = chrf(), {}
        for request in self._completed(items):
            if request.error:
                raise LorabatchError(request.error, where=items[request.index].id)
            done[request.adapter, request.index] = request
        for name in self.adapters:
            for index, item in enumerate(items):
                yield name, item, _figures(done[name, index], item, metric)

    def _completed(self, items: Sequence[Item]) -> list[Request]:
        requests = [
            self._request(item, index, row, name)
            for row, name in enumerate(self.adapters, start=-1)
            for index, item in enumerate(items)
        ]
        longest = max(request.num_positions for request in requests)
        runner = make_runner(
            self.model,
            num_slots=AT_ONCE,
            capacity=longest,
            max_tokens=longest,
            adapters=[weights for weights in self.adapters.values() if weights is not None],
        )
        finished: list[Request] = []
        Engine(
            runner, self.tokenizer, self.eos_ids, max_running=AT_ONCE, prefill_tokens=longest
        ).run(requests, finished.append)
        return finished

    def _request(self, item: Item, index: int, row: int, name: str) -> Request:
        """row: of the adapter among those of the runner; -1: the base."""
        prompt = item.documents[0].prompt or ""
        ids = self.tokenizer(prompt, return_attention_mask=False, verbose=False)["input_ids"]
        if not ids or len(ids) + self.max_new_tokens > self.model.max_positions:
            raise DataError(
                f"a prompt of {len(ids)} tokens with {self.max_new_tokens} new ones does not fit "
                f"into {self.model.max_positions}",
                where=item.id,
                fix="shorten the prompt, or lower --max_new_tokens",
            )
        return Request(
            item.id,
            index,
            prompt,
            SamplingParams(max_new_tokens=self.max_new_tokens),
            token_ids=list(ids),
            max_new_tokens=self.max_new_tokens,
            adapter=name,
            adapter_row=row,
        )


def _figures(request: Request, item: Item, metric: CHRF) -> Record:
    text, targets = request.text.strip(), [d.text.strip() for d in item.documents]
    return {
        "tokens": len(request.output_ids),
        "chrf": max(metric.sentence_score(text, [target]).score for target in targets),
        "exact": text in targets,
        "empty": not text,
        "finish_reason": request.finish_reason,
    }
