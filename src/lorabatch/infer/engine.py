"""The loop of batched inference: decide, run, record."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from lorabatch.corpus.tokens import Tokenizer
from lorabatch.infer.endings import Endings
from lorabatch.infer.requests import NOT_FINITE, Request
from lorabatch.infer.runners import Runner
from lorabatch.infer.scheduler import Batch, Chunk, Copy, Scheduler
from lorabatch.infer.speculation import Lookup
from lorabatch.infer.stats import PassStats
from lorabatch.model.attention import Segment
from lorabatch.model.functional import NO_TOKEN
from lorabatch.spans import spanned


class Engine:
    """Runs requests to their end. ``tokenizer``: transformers'; ``eos_ids``: tokens that end a
    completion.

    ``speculate``: tokens guessed ahead per greedy request and step (see
    ``lorabatch.infer.speculation``); 0: none.
    """

    def __init__(
        self,
        runner: Runner,
        tokenizer: Tokenizer,
        eos_ids: Iterable[int],
        *,
        max_running: int,
        prefill_tokens: int,
        order: str = "arrival",
        speculate: int = 0,
    ) -> None:
        self._runner, self._endings = runner, Endings(tokenizer, eos_ids)
        self._max_running, self._prefill_tokens, self._order = max_running, prefill_tokens, order
        self._speculate = 0 if runner.static else speculate

    def run(
        self,
        requests: Iterable[Request],
        on_finish: Callable[[Request], None],
        *,
        stop_requested: Callable[[], bool] = lambda: False,
        stats: PassStats | None = None,
        on_tokens: Callable[[Request], None] | None = None,
    ) -> PassStats:
        """Complete all requests, taken from the iterable as slots need them; ``on_finish`` is
        called with each as it ends, ``on_tokens`` with each that got tokens in a step, the last
        ones too.

        Where the model's numbers are not finite a request ends with its ``error``; no other is
        affected. Returns early if a stop is requested. Every request counts as submitted when the
        pass begins; ``stats`` of an earlier part of the same pass are added to.
        """
        scheduler = self._scheduler(requests)
        stats = stats or PassStats(begin_s=time.perf_counter())
        while scheduler.has_work and not stop_requested():
            batch = scheduler.next_batch()
            if scheduler.waiting:
                stats.count_waiting(
                    batch,
                    running=len(scheduler.running),
                    max_running=self._max_running,
                    prefill_tokens=self._prefill_tokens,
                )
            tokens = self._step(batch, stats)
            yielding = [chunk.request for chunk in batch.chunks if chunk.yields_token]
            finished = self._advance(yielding, tokens, stats)
            self._copy(scheduler.release(finished))
            if on_tokens:
                for request in yielding:
                    on_tokens(request)
            for request in finished:
                on_finish(request)
        stats.duration_s = time.perf_counter() - stats.begin_s
        return stats

    def _scheduler(self, requests: Iterable[Request]) -> Scheduler:
        return Scheduler(
            requests,
            max_running=self._max_running,
            prefill_tokens=self._prefill_tokens,
            static=self._runner.static,
            apart=self._runner.apart,
            order=self._order,
        )

    @spanned("step")
    def _step(self, batch: Batch, stats: PassStats) -> list[list[int]]:
        """For each chunk that yields a token: that token and those that its right guesses add."""
        start = time.perf_counter()
        for request in batch.admitted:
            request.submitted_s, request.started_s = stats.begin_s, start
        self._copy(batch.copies)
        segments = [self._segment(chunk) for chunk in batch.chunks]
        tokens = self._runner.step(segments, [chunk.request for chunk in batch.chunks])
        if self._speculate:
            wanting = (segment for segment in segments if segment.num_logits)
            tokens = [_accepted(s, new, stats) for s, new in zip(wanting, tokens, strict=True)]
        stats.count_step(batch, segments, tokens, time.perf_counter() - start)
        return tokens

    def _copy(self, copies: Iterable[Copy]) -> None:
        for copy in copies:
            self._runner.copy(copy.source, copy.target, copy.length)
            if copy.clear:
                self._runner.clear(copy.source)

    def _segment(self, chunk: Chunk) -> Segment:
        request = chunk.request
        if chunk.is_prompt:
            return Segment(
                request.slot,
                chunk.start,
                request.token_ids[chunk.start : chunk.stop],
                adapter=request.adapter_row,
                num_logits=int(chunk.yields_token),
            )
        token_ids = request.output_ids[-1:]
        if not self._speculate:
            return Segment(request.slot, chunk.start, token_ids, request.adapter_row)
        room = min(self._speculate, request.max_new_tokens - len(request.output_ids) - 1)
        if room > 0 and request.likeliest:
            request.lookup = request.lookup or Lookup()
            token_ids = token_ids + request.lookup.guess(
                request.token_ids, request.output_ids, room
            )
        return Segment(
            request.slot,
            chunk.start,
            token_ids,
            adapter=request.adapter_row,
            num_logits=len(token_ids),
        )

    def _advance(
        self, yielding: list[Request], tokens: list[list[int]], stats: PassStats
    ) -> list[Request]:
        """Append the tokens of each request; returns those that are done."""
        now = time.perf_counter()
        return [
            request
            for request, new in zip(yielding, tokens, strict=True)
            if self._append(request, new, now, stats)
        ]

    def _append(self, request: Request, tokens: list[int], now: float, stats: PassStats) -> bool:
        """Whether the request ends with one of them; those behind it do not count."""
        output_ids = request.output_ids
        plain = self._endings.plain(request, tokens) if len(tokens) > 1 and output_ids else 0
        if plain:  # those that arrive together have no gap between them
            stats.gaps_s.extend([now - request.last_token_s, *[0.0] * (plain - 1)])
            output_ids += tokens[:plain]
            request.last_token_s = now
            tokens = tokens[plain:]
        for token_id in tokens:
            if token_id == NO_TOKEN:
                self._refuse(request)
                return True
            if output_ids:
                stats.gaps_s.append(now - request.last_token_s)
            else:
                request.first_token_s = now
            output_ids.append(token_id)
            request.last_token_s = now
            if self._endings.is_done(request):
                del request.logprobs[len(output_ids) :]
                return True
        request.cached = len(request.token_ids) + len(output_ids) - 1
        return False

    def _refuse(self, request: Request) -> None:
        """Masked positions weigh zero, and zero times NaN is NaN: the slot must not keep what it
        holds."""
        request.error = (
            f"{NOT_FINITE} after {len(request.output_ids)} tokens; try --dtype fp32, or another "
            "adapter or model"
        )
        self._runner.clear(request.slot)


def _accepted(segment: Segment, chosen: list[int], stats: PassStats) -> list[int]:
    """The chosen tokens up to and with the first that contradicts the guess behind it."""
    guesses = segment.token_ids[-segment.num_logits :][1:]
    if not guesses:
        return chosen
    right = next((i for i, guess in enumerate(guesses) if guess != chosen[i]), len(guesses))
    stats.guessed_tokens += len(guesses)
    stats.accepted_tokens += right
    return chosen[: right + 1]
