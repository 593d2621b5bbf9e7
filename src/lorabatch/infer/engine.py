"""The loop of batched inference: decide, run, record."""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from lorabatch.infer.requests import NOT_FINITE, Request, SamplingParams
from lorabatch.infer.runner import Runner
from lorabatch.infer.sampling import choose
from lorabatch.infer.scheduler import Batch, Copy, Piece, Scheduler
from lorabatch.infer.speculation import Lookup
from lorabatch.model.attention import Segment
from lorabatch.model.functional import NO_TOKEN

STOP_TAIL_TOKENS = 16  # a stop string may begin this many tokens plus its length before the newest one


@dataclass
class PassStats:
    """What one pass over the requests cost. Seconds and counts; ``gaps_s``: every gap between two tokens of a request.

    A step that reads any prompt counts as prefill, with the tokens that decode along in it; decode figures are of the others.
    """

    begin_s: float = 0.0  # on the clock of ``perf_counter``
    duration_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    prefill_steps: int = 0
    decode_steps: int = 0
    prefill_tokens: int = 0
    decode_tokens: int = 0
    decode_kv_tokens: int = 0  # cached tokens read by all decode steps together
    decode_adapters: int = 0  # unmerged adapters read by all decode steps together
    waiting_steps: int = 0  # while requests waited for a slot
    waiting_slots: float = 0.0  # share of the slots in use, summed over these steps
    waiting_fill: float = 0.0  # that or the share of the step's prompt budget in use, whichever is larger
    shared_tokens: int = 0  # prompt tokens that were taken over from another request's slot
    guessed_tokens: int = 0  # read ahead by speculation
    accepted_tokens: int = 0  # of these, right
    gaps_s: array[float] = field(default_factory=lambda: array("d"))


class Engine:
    """Runs requests to their end. ``tokenizer``: transformers'; ``eos_ids``: tokens that end a completion.

    ``speculate``: tokens guessed ahead per greedy request and step (see ``lorabatch.infer.speculation``); 0: none.
    """

    def __init__(
        self,
        runner: Runner,
        tokenizer: Any,
        eos_ids: Iterable[int],
        *,
        max_running: int,
        prefill_tokens: int,
        order: str = "arrival",
        speculate: int = 0,
    ) -> None:
        self._runner, self._tokenizer, self._eos_ids = runner, tokenizer, frozenset(eos_ids)
        self._max_running, self._prefill_tokens, self._order = max_running, prefill_tokens, order
        self._speculate = 0 if runner.static else speculate

    def run(
        self,
        requests: Iterable[Request],
        on_finish: Callable[[Request], None],
        *,
        stop_requested: Callable[[], bool] = lambda: False,
        stats: PassStats | None = None,
    ) -> PassStats:
        """Complete all requests, taken from the iterable as slots need them; ``on_finish`` is called with each as it ends.

        Where the model's numbers are not finite a request ends with its ``error``; no other is affected.
        Returns early if a stop is requested. Every request counts as submitted when the pass begins; ``stats`` of an
        earlier part of the same pass are added to.
        """
        scheduler = Scheduler(
            requests,
            max_running=self._max_running,
            prefill_tokens=self._prefill_tokens,
            static=self._runner.static,
            order=self._order,
        )
        stats = stats or PassStats(begin_s=time.perf_counter())
        while scheduler.has_work and not stop_requested():
            batch = scheduler.next_batch()
            self._copy(batch.copies)
            if scheduler.waiting:
                self._count_filling(batch, stats)
            stats.shared_tokens += sum(c.length for c in batch.copies)
            finished = self._advance(batch, self._step(batch, stats), stats)
            self._copy(scheduler.release(finished))
            for request in finished:
                on_finish(request)
        stats.duration_s = time.perf_counter() - stats.begin_s
        return stats

    def _copy(self, copies: Iterable[Copy]) -> None:
        for copy in copies:
            self._runner.copy(copy.source, copy.target, copy.length)
            if copy.clear:
                self._runner.clear(copy.source)

    def _step(self, batch: Batch, stats: PassStats) -> list[list[int]]:
        """One forward pass. For each piece that yields a token: that token and those that its right guesses add."""
        start = time.perf_counter()
        for request in batch.admitted:
            request.submitted_s, request.started_s = stats.begin_s, start
        segments, owners = [], []
        for piece in batch.pieces:
            segment = self._segment(piece)
            segments.append(segment)
            owners += [piece.request] * segment.num_logits
        hidden = self._runner.forward(segments)
        chosen = iter(choose(self._runner, hidden, owners) if owners else ())
        tokens = [self._accepted(s, list(islice(chosen, s.num_logits)), stats) for s in segments if s.num_logits]
        self._count(batch, segments, tokens, time.perf_counter() - start, stats)
        return tokens

    def _count_filling(self, batch: Batch, stats: PassStats) -> None:
        slots = len(batch.pieces) / self._max_running
        prompts = sum(p.stop - p.start for p in batch.pieces if p.is_prompt) / self._prefill_tokens
        stats.waiting_steps += 1
        stats.waiting_slots += slots
        stats.waiting_fill += max(slots, min(prompts, 1.0))

    def _segment(self, piece: Piece) -> Segment:
        request = piece.request
        if piece.is_prompt:
            return Segment(
                request.slot,
                piece.start,
                request.token_ids[piece.start : piece.stop],
                adapter=request.adapter_row,
                num_logits=int(piece.yields_token),
            )
        token_ids = request.output_ids[-1:]
        room = min(self._speculate, request.max_new_tokens - len(request.output_ids) - 1)
        if room > 0 and request.params.likeliest:
            request.lookup = request.lookup or Lookup()
            token_ids = token_ids + request.lookup.guess(request.token_ids, request.output_ids, room)
        return Segment(request.slot, piece.start, token_ids, adapter=request.adapter_row, num_logits=len(token_ids))

    @staticmethod
    def _accepted(segment: Segment, chosen: list[int], stats: PassStats) -> list[int]:
        """The chosen tokens up to and with the first that contradicts the guess behind it."""
        guesses = segment.token_ids[-segment.num_logits :][1:]
        right = next((i for i, guess in enumerate(guesses) if guess != chosen[i]), len(guesses))
        stats.guessed_tokens += len(guesses)
        stats.accepted_tokens += right
        return chosen[: right + 1]

    @staticmethod
    def _count(batch: Batch, segments: list[Segment], tokens: list[list[int]], seconds: float, stats: PassStats) -> None:
        if any(piece.is_prompt for piece in batch.pieces):
            stats.prefill_s += seconds
            stats.prefill_steps += 1
            stats.prefill_tokens += sum(p.stop - p.start for p in batch.pieces if p.is_prompt)
        else:
            stats.decode_s += seconds
            stats.decode_steps += 1
            stats.decode_tokens += sum(map(len, tokens))
            stats.decode_kv_tokens += sum(s.start for s in segments)
            stats.decode_adapters += len({s.adapter for s in segments} - {-1})

    def _advance(self, batch: Batch, tokens: list[list[int]], stats: PassStats) -> list[Request]:
        """Append the tokens of each request; returns those that are done."""
        now = time.perf_counter()
        finished = []
        for request, new in zip((p.request for p in batch.pieces if p.yields_token), tokens, strict=True):
            for token_id in new:
                if token_id == NO_TOKEN:
                    self._refuse(request)
                    finished.append(request)
                    break
                request.output_ids.append(token_id)
                if len(request.output_ids) == 1:
                    request.first_token_s = now
                else:
                    stats.gaps_s.append(now - request.last_token_s)
                request.last_token_s = now
                if self._is_done(request, token_id):
                    finished.append(request)
                    break
            request.cached = request.num_tokens - 1
        return finished

    def _refuse(self, request: Request) -> None:
        """Masked positions weigh zero, and zero times NaN is NaN: the slot must not keep what it holds."""
        request.error = f"{NOT_FINITE} after {len(request.output_ids)} tokens; try --dtype fp32, or another adapter or model"
        self._runner.clear(request.slot)

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
