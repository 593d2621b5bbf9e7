"""Which tokens of which requests the next step reads. Plain Python over lengths and slots; it
touches no tensor.

The rule: in every step each request past its prompt reads its newest token, and prompts are read
along, oldest slot first, until ``prefill_tokens`` of them are in the step; a longer prompt is cut
and continues in the next one. So nobody who generates waits for somebody else's prompt, the weights
are read once for both, and a step is never larger than prompt budget + one token per slot.
Requests join and leave between steps: the batch stays full until the queue is dry.

Slots are kept dense: running requests occupy slots 0 .. n-1, so that the first n rows of the cache
are used without gathering. When a request leaves, the last one moves into its place.

A newcomer whose prompt begins like that of a running request takes over the part that is already
cached there. If much more of it is just being read, the newcomer lets others pass and comes when
it is there. Exact: what a position holds depends on the tokens up to it and on nothing else.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

from lorabatch.infer.requests import Request

MIN_SHARED = 16  # tokens; for fewer a copy costs more than it saves
SORT_KEYS: dict[str, Callable[[Request], int]] = {
    "longest": lambda r: -r.num_positions,
    "adapter": lambda r: r.adapter_row,
}
# requests that are sorted at once; a block is finished before the next is looked at
LOOKAHEAD = {"longest": 1024, "adapter": 16384}


class Chunk(NamedTuple):  # one a row and step: a frozen dataclass costs twice as much
    """Tokens ``start:stop`` of a request's prompt and completion, read in this step.

    ``is_prompt``: they begin in the prompt. ``yields_token``: they end with the newest token, so
    that the next one can be chosen.
    """

    request: Request
    start: int
    stop: int
    is_prompt: bool
    yields_token: bool


@dataclass(frozen=True)
class Copy:
    """The first ``length`` positions of slot ``source`` are to be in slot ``target`` too.

    ``clear``: the source is free now, and what it holds was never looked at, because its prompt is
    still being read.
    """

    source: int
    target: int
    length: int
    clear: bool = False


@dataclass(frozen=True)
class Batch:
    """One forward pass; the copies, in order, come before it."""

    chunks: tuple[Chunk, ...]
    copies: tuple[Copy, ...]
    admitted: tuple[Request, ...]  # have a slot since this step
    prompt_tokens: int


class Scheduler:
    """``requests`` may be endless: only as many as there are slots (LOOKAHEAD if they are sorted)
    are taken ahead.

    ``order``: "longest" first, or one "adapter" after the other, so that a step reads few of them.

    ``static``: admit only when nothing runs, and whole prompts (for models whose cache cannot take
    newcomers). ``apart``: a step reads prompts or decodes, prompts first (where several steps of
    decoding follow one another at the price of one with a prompt).
    """

    def __init__(
        self,
        requests: Iterable[Request],
        *,
        max_running: int,
        prefill_tokens: int,
        static: bool = False,
        apart: bool = False,
        order: str = "arrival",
    ) -> None:
        self._source, self._apart = iter(requests), apart
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # index = slot
        # those of one adapter and first MIN_SHARED tokens
        self._alike: defaultdict[object, list[Request]] = defaultdict(list)
        self._max_running, self._prefill_tokens, self._static, self._order = (
            max_running,
            prefill_tokens,
            static,
            order,
        )
        self._refill()

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def next_batch(self) -> Batch:
        """The requests' ``cached`` counts what their slots hold once the step is done."""
        num_before = len(self.running)
        copies = self._admit()
        chunks, prompt_tokens = [], 0
        reading = self._apart and any(r.cached < len(r.token_ids) for r in self.running)
        for request in self.running:
            start, prompt = request.cached, len(request.token_ids)
            end = stop = prompt + len(request.output_ids)
            if start < prompt:
                if not self._static:
                    stop = min(stop, start + self._prefill_tokens - prompt_tokens)
                prompt_tokens += stop - start
            elif reading:
                continue
            if stop > start:
                chunks.append(Chunk(request, start, stop, start < prompt, stop == end))
                request.cached = stop
        admitted = tuple(self.running[num_before:])
        return Batch(tuple(chunks), tuple(copies), admitted, prompt_tokens)

    def _admit(self) -> list[Copy]:
        """Fill free slots while the prompts that are being read leave some of the step's budget."""
        copies: list[Copy] = []
        full = len(self.running) == self._max_running
        if not self.waiting or full or (self._static and self.running):
            return copies
        unread = sum(max(0, len(r.token_ids) - r.cached) for r in self.running)
        passed = []
        while (
            self.waiting
            and len(self.running) < self._max_running
            and (self._static or unread < self._prefill_tokens)
        ):
            request = self.waiting.popleft()
            donor, request.cached, soon = (
                (None, 0, 0) if self._static else self._shared_prefix(request)
            )
            if soon - request.cached >= MIN_SHARED:
                passed.append(request)
            else:
                request.slot = len(self.running)
                if donor is not None:
                    copies.append(Copy(donor.slot, request.slot, request.cached))
                self.running.append(request)
                self._alike[_beginning(request)].append(request)
                unread += len(request.token_ids) - request.cached
                self._refill(passed=len(passed))
        self.waiting.extendleft(reversed(passed))
        return copies

    def _shared_prefix(self, request: Request) -> tuple[Request | None, int, int]:
        """(running request with the longest cached common beginning, its length now, its length
        once all have read)."""
        donor, now, soon = None, 0, 0
        # the last token is read in any case: its result is wanted
        own, most = request.token_ids, len(request.token_ids) - 1
        for other in self._alike.get(_beginning(request), ()):
            common = min(common_length(own, other.token_ids), most)
            soon = max(soon, common)
            if min(common, other.cached) > max(now, MIN_SHARED - 1):
                donor, now = other, min(common, other.cached)
        return donor, now, soon

    def _refill(self, passed: int = 0) -> None:
        if self._order == "arrival":
            self.waiting.extend(
                islice(self._source, self._max_running - len(self.waiting) - passed)
            )
        elif not self.waiting and not passed:
            self.waiting.extend(
                sorted(islice(self._source, LOOKAHEAD[self._order]), key=SORT_KEYS[self._order])
            )

    def release(self, finished: Iterable[Request]) -> list[Copy]:
        """Free the slots of finished requests; returns the copies that the cache must follow, in
        order."""
        copies = []
        for request in sorted(finished, key=lambda r: -r.slot):
            last = self.running.pop()
            self._forget(request)
            if last is not request:
                copies.append(
                    Copy(
                        last.slot,
                        request.slot,
                        last.cached,
                        clear=last.cached < len(last.token_ids),
                    )
                )
                last.slot = request.slot
                self.running[request.slot] = last
            request.slot = -1
        return copies

    def _forget(self, request: Request) -> None:
        key = _beginning(request)
        self._alike[key] = [other for other in self._alike[key] if other is not request]
        if not self._alike[key]:
            del self._alike[key]


def _beginning(request: Request) -> object:
    """Requests with equal ones may share what their slots hold."""
    return request.adapter, tuple(request.token_ids[:MIN_SHARED])


def common_length(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two sequences begin with in common."""
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )
