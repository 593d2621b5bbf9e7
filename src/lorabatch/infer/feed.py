"""Requests on their way to the engine: tokenised a window ahead of need, forgotten when
finished."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Protocol

from lorabatch.errors import DataError
from lorabatch.infer.constraints import Constraint, token_table
from lorabatch.infer.load import Loaded
from lorabatch.infer.prompts import prepare, prompt_bytes
from lorabatch.infer.requests import Request

WINDOW = 1024  # requests tokenised at once


class Prompts(Protocol):
    """A prompt file, or what a program gives."""

    longest_bytes: int  # of a prompt
    most_new_tokens: int  # that a request asks for

    def __iter__(self) -> Iterator[Request]: ...


class Feed:
    """Passes over the requests of a prompt file that are not ``done`` [a byte per position], one
    after another.

    ``on_error`` is called with each request that cannot run; ``record``: on the first pass. The
    first window is read at once. ``again``: further passes follow (``rewind``), so requests stay in
    memory and the file is read once.
    """

    def __init__(
        self,
        prompts: Prompts,
        loaded: Loaded,
        *,
        long_prompt: str,
        done: bytearray,
        on_error: Callable[..., None],
        again: bool = False,
    ) -> None:
        self._prompts, self._loaded, self._long_prompt, self._on_error = (
            prompts,
            loaded,
            long_prompt,
            on_error,
        )
        self._source: Iterator[Request] = (
            request for request in prompts if not done[request.position]
        )
        self._kept: list[Request] | None = [] if again else None
        self._first_pass = True
        self._ready: deque[Request] = deque()
        self._out: dict[int, Request] = {}  # handed out and not finished, by position
        self._read_all = False
        self._fill()

    def rewind(self) -> None:
        """From the first request again."""
        assert self._kept is not None
        self._source, self._first_pass, self._read_all = iter(self._kept), False, False

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
        self._ready.extendleft(
            self._out[position].restarted() for position in sorted(self._out, reverse=True)
        )
        self._out.clear()

    def likely_capacity(self) -> int:
        """Positions that a slot needs: exact if the first window is all, else by its tokens per
        byte and the file's longest prompt."""
        longest = max((r.num_positions for r in self._ready), default=1)
        if self._read_all:
            return longest
        tokens_per_byte = max(
            (len(r.token_ids) / max(1, prompt_bytes(r)) for r in self._ready), default=1
        )
        guess = int(tokens_per_byte * self._prompts.longest_bytes) + self._prompts.most_new_tokens
        return min(self._loaded.limit, max(longest, guess))

    def _fill(self) -> bool:
        """Make the next window ready that has a good request in it. False at the end of the
        file."""
        while not self._ready and not self._read_all:
            window = list(islice(self._source, WINDOW))
            self._read_all = len(window) < WINDOW
            if self._first_pass:
                loaded = self._loaded
                prepare(
                    window,
                    loaded.tokenizer,
                    limit=loaded.limit,
                    long_prompt=self._long_prompt,
                    vocab_size=loaded.model.vocab_size,
                )
                for request in window:
                    self._set_endings(request)
                    self._constrain(request)
            if self._kept is not None:
                if self._first_pass:
                    self._kept += window
                # what is kept stays as it was read
                window = [request.restarted() for request in window]
            for request in window:
                if request.error is None:
                    self._ready.append(request)
                else:
                    self._on_error(request, record=self._first_pass)
        return bool(self._ready)

    def _set_endings(self, request: Request) -> None:
        params = request.params
        eos_ids = () if params.ignore_eos else self._loaded.eos_ids
        known = range(self._loaded.model.vocab_size)
        request.ending_ids = tuple(i for i in {*eos_ids, *params.stop_token_ids} if i in known)

    def _constrain(self, request: Request) -> None:
        """A grammar that the tokenizer cannot follow is the request's error."""
        loaded, params = self._loaded, request.params
        if request.grammar is None or request.error:
            return
        if params.ignore_eos or params.min_new_tokens:
            request.error = (
                "a constrained text ends when it is complete: no ignore_eos, min_new_tokens"
            )
            return
        tokens = token_table(loaded.tokenizer, loaded.model.vocab_size, loaded.eos_ids)
        try:
            request.constraint = Constraint(request.grammar, tokens, loaded.model.vocab_size)
        except DataError as error:
            request.error = str(error)
