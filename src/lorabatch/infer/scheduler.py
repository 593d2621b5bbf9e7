"""Which requests run next. Plain Python over lengths and slots; it touches no tensor.

The rule: whenever slots are free and requests wait, the next step is a prefill of as many of
them as fit into the free slots and the token budget; otherwise every running request decodes
one token. Requests join and leave between steps, so the batch stays full until the queue is dry.

Slots are kept dense: running requests occupy slots 0 .. n-1, so that decoding works on the first
n rows of the cache without gathering. When a request leaves, the last one moves into its place.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice

from lorabatch.infer.requests import Request


@dataclass(frozen=True)
class Batch:
    """One forward pass: a prefill of whole prompts, or one token for each running request."""

    is_prefill: bool
    requests: tuple[Request, ...]


@dataclass(frozen=True)
class Move:
    """What slot ``source`` holds, ``length`` positions, is from now on in slot ``target``."""

    source: int
    target: int
    length: int


class Scheduler:
    """``requests`` may be endless: only as many as there are slots are taken ahead of need.

    ``static``: admit only when nothing runs (for models whose cache cannot take newcomers).
    """

    def __init__(self, requests: Iterable[Request], *, max_running: int, prefill_tokens: int, static: bool = False) -> None:
        self._source = iter(requests)
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # index = slot
        self._max_running, self._prefill_tokens, self._static = max_running, prefill_tokens, static
        self._refill()

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def next_batch(self) -> Batch:
        admitted = self._admit()
        if admitted:
            return Batch(True, tuple(admitted))
        return Batch(False, tuple(self.running))

    def _admit(self) -> list[Request]:
        """Waiting requests for the free slots; one is always let in, however long, so none can starve."""
        admitted: list[Request] = []
        budget = self._prefill_tokens
        if self._static and self.running:
            return admitted
        while self.waiting and len(self.running) < self._max_running:
            cost = len(self.waiting[0].token_ids)
            if admitted and cost > budget and not self._static:
                break
            request = self.waiting.popleft()
            request.slot = len(self.running)
            self.running.append(request)
            admitted.append(request)
            budget -= cost
            self._refill()
        return admitted

    def _refill(self) -> None:
        self.waiting.extend(islice(self._source, self._max_running - len(self.waiting)))

    def release(self, finished: Iterable[Request]) -> list[Move]:
        """Free the slots of finished requests; returns the moves that the cache must follow, in order."""
        moves = []
        for request in sorted(finished, key=lambda r: -r.slot):
            last = self.running.pop()
            if last is not request:
                moves.append(Move(last.slot, request.slot, last.num_tokens - 1))
                last.slot = request.slot
                self.running[request.slot] = last
            request.slot = -1
        return moves
