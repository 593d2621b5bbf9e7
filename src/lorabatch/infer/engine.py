"""The loop of batched inference: decide, run, record."""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from lorabatch.infer.requests import Request, SamplingParams
from lorabatch.infer.runner import Runner
from lorabatch.infer.sampling import choose
from lorabatch.infer.scheduler import Batch, Scheduler
from lorabatch.model.attention import Segment

STOP_TAIL_TOKENS = 16  # a stop string may begin this many tokens plus its length before the newest one


@dataclass
class PassStats:
    """What one pass over the requests cost. Seconds and counts; ``gaps_s``: every gap between two tokens of a request."""

    begin_s: float = 0.0  # on the clock of ``perf_counter``
    duration_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    prefill_steps: int = 0
    decode_steps: int = 0
    prefill_tokens: int = 0
    decode_tokens: int = 0
    decode_kv_tokens: int = 0  # cached tokens read by all decode steps together
    gaps_s: array[float] = field(default_factory=lambda: array("d"))


class Engine:
    """Runs requests to their end. ``tokenizer``: transformers'; ``eos_ids``: tokens that end a completion."""

    def __init__(self, runner: Runner, tokenizer: Any, eos_ids: Iterable[int], *, max_running: int, prefill_tokens: int) -> None:
        self._runner, self._tokenizer, self._eos_ids = runner, tokenizer, frozenset(eos_ids)
        self._max_running, self._prefill_tokens = max_running, prefill_tokens

    def run(
        self,
        requests: Iterable[Request],
        on_finish: Callable[[Request], None],
        *,
        stop_requested: Callable[[], bool] = lambda: False,
        stats: PassStats | None = None,
    ) -> PassStats:
        """Complete all requests, taken from the iterable as slots need them; ``on_finish`` is called with each as it ends.

        Returns early if a stop is requested. Every request counts as submitted when the pass begins; ``stats`` of an
        earlier part of the same pass are added to.
        """
        scheduler = Scheduler(requests, max_running=self._max_running, prefill_tokens=self._prefill_tokens, static=self._runner.static)
        stats = stats or PassStats(begin_s=time.perf_counter())
        while scheduler.has_work and not stop_requested():
            batch = scheduler.next_batch()
            token_ids = self._step(batch, stats)
            finished = self._advance(batch, token_ids, stats)
            for move in scheduler.release(finished):
                self._runner.copy(move.source, move.target, move.length)
            for request in finished:
                on_finish(request)
        stats.duration_s = time.perf_counter() - stats.begin_s
        return stats

    def _step(self, batch: Batch, stats: PassStats) -> list[int]:
        """One forward pass and the sampling of one token per request."""
        start = time.perf_counter()
        if batch.is_prefill:
            segments = [Segment(r.slot, 0, r.token_ids) for r in batch.requests]
            for request in batch.requests:
                request.submitted_s, request.started_s = stats.begin_s, start
        else:
            segments = [Segment(r.slot, r.num_tokens - 1, r.output_ids[-1:]) for r in batch.requests]
        token_ids = choose(self._runner, self._runner.forward(segments), batch.requests)
        seconds = time.perf_counter() - start
        if batch.is_prefill:
            stats.prefill_s += seconds
            stats.prefill_steps += 1
            stats.prefill_tokens += sum(len(s.token_ids) for s in segments)
        else:
            stats.decode_s += seconds
            stats.decode_steps += 1
            stats.decode_tokens += len(segments)
            stats.decode_kv_tokens += sum(s.start for s in segments)
        return token_ids

    def _advance(self, batch: Batch, token_ids: list[int], stats: PassStats) -> list[Request]:
        """Append each request's token; returns those that are done."""
        now = time.perf_counter()
        finished = []
        for request, token_id in zip(batch.requests, token_ids, strict=True):
            request.output_ids.append(token_id)
            if len(request.output_ids) == 1:
                request.first_token_s = now
            else:
                stats.gaps_s.append(now - request.last_token_s)
            request.last_token_s = now
            if self._is_done(request, token_id):
                finished.append(request)
        return finished

    def _is_done(self, request: Request, token_id: int) -> bool:
        params = request.params
        if self._ends(token_id, params) or (params.stop and self._hits_stop(request)):
            request.finish_reason = "stop"
        elif len(request.output_ids) >= request.max_new_tokens:
            request.finish_reason = "length"
        else:
            return False
        request.text = self._text(request)
        return True

    def _ends(self, token_id: int, params: SamplingParams) -> bool:
        return token_id in params.stop_token_ids or (token_id in self._eos_ids and not params.ignore_eos)

    def _hits_stop(self, request: Request) -> bool:
        tail = request.output_ids[-(STOP_TAIL_TOKENS + max(map(len, request.params.stop))) :]
        text = self._tokenizer.decode(tail, skip_special_tokens=True)
        return any(stop in text for stop in request.params.stop)

    def _text(self, request: Request) -> str:
        ids, params = request.output_ids, request.params
        text: str = self._tokenizer.decode(ids[:-1] if self._ends(ids[-1], params) else ids, skip_special_tokens=True)
        cuts = [text.find(stop) for stop in params.stop if stop in text]
        return text[: min(cuts)] if cuts else text
