"""Requests on their way to the engine: tokenised a window ahead of need, forgotten when finished."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

from lorabatch.infer.prompts import PromptFile, prepare, prompt_bytes
from lorabatch.infer.requests import Request

WINDOW = 1024  # requests tokenised at once


class Feed:
    """One pass over the requests of a prompt file that are not ``done`` [a byte per position].

    ``on_error`` is called with each request that cannot run. The first window is read at once.
    """

    def __init__(
        self,
        prompts: PromptFile,
        tokenizer: Any,
        *,
        limit: int,
        long_prompt: str,
        vocab_size: int | None = None,
        done: bytearray,
        on_error: Callable[[Request], None],
    ) -> None:
        self._prompts, self._tokenizer, self._on_error = prompts, tokenizer, on_error
        self._limit, self._long_prompt, self._vocab_size = limit, long_prompt, vocab_size
        self._source = (request for request in prompts if not done[request.position])
        self._ready: deque[Request] = deque()
        self._out: dict[int, Request] = {}  # handed out and not finished, by position
        self._read_all = False
        self._fill()

    def up_to(self, capacity: int) -> Iterator[Request]:
        """Requests in order, until one needs more than ``capacity`` positions."""
        while self._ready or self._fill():
            if self._ready[0].num_positions > capacity:
                return
            request = self._ready.popleft()
            self._out[request.position] = request
            yield request

    @property
    def num_out(self) -> int:
        return len(self._out)

    @property
    def next_positions(self) -> int:
        """Positions that the next request needs; 0 when none is left."""
        return self._ready[0].num_positions if self._ready or self._fill() else 0

    def finish(self, request: Request) -> None:
        del self._out[request.position]

    def take_back(self) -> None:
        """What was handed out and did not finish comes again, from its prompt."""
        self._ready.extendleft(self._out[position].restarted() for position in sorted(self._out, reverse=True))
        self._out.clear()

    def likely_capacity(self) -> int:
        """Positions that a slot needs: exact if the first window is all, else by its tokens per byte and the file's longest prompt."""
        longest = max((r.num_positions for r in self._ready), default=1)
        if self._read_all:
            return longest
        tokens_per_byte = max((len(r.token_ids) / max(1, prompt_bytes(r)) for r in self._ready), default=1)
        guess = int(tokens_per_byte * self._prompts.longest_bytes) + self._prompts.most_new_tokens
        return min(self._limit, max(longest, guess))

    def _fill(self) -> bool:
        """Tokenise the next window that has a good request in it. False at the end of the file."""
        while not self._ready and not self._read_all:
            window = list(islice(self._source, WINDOW))
            self._read_all = len(window) < WINDOW
            prepare(window, self._tokenizer, limit=self._limit, long_prompt=self._long_prompt, vocab_size=self._vocab_size)
            for request in window:
                if request.error is None:
                    self._ready.append(request)
                else:
                    self._on_error(request)
        return bool(self._ready)
