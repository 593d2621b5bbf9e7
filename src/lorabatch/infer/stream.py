"""A completion's text while it grows."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from lorabatch.corpus.tokens import Tokenizer
from lorabatch.errors import DataError, LorabatchError
from lorabatch.infer.requests import NOT_FINITE, Request


class Streams:
    """Completions that run at the same time, written one below the other: the first as it comes,
    each other one as soon as those above it are done. labels: what stands before each."""

    def __init__(self, tokenizer: Tokenizer, labels: Sequence[str]) -> None:
        self._tokenizer, self._labels = tokenizer, labels
        self._texts = [""] * len(labels)
        self._ended = [False] * len(labels)
        self._current, self._written = 0, 0  # which one is being written, characters of it
        print(labels[0], end="", flush=True)

    def grow(self, request: Request) -> None:
        """The request has new tokens, perhaps its last."""
        self._texts[request.position] = grown_text(request, self._tokenizer)
        self._ended[request.position] = request.finish_reason is not None
        while self._current < len(self._texts):
            text = self._texts[self._current]
            print(text[self._written :], end="", flush=True)
            self._written = max(self._written, len(text))
            if not self._ended[self._current]:
                return
            print()
            self._current, self._written = self._current + 1, 0
            if self._current < len(self._labels):
                print(self._labels[self._current], end="", flush=True)

    def end(self, requests: Sequence[Request]) -> None:
        """After the last token. Raises what made one of them impossible."""
        failed = next((request.error for request in requests if request.error), None)
        if failed is None:
            return
        if self._written or self._labels[self._current]:
            print()  # behind what is there of it
        sys.stdout.flush()
        if failed.startswith(NOT_FINITE):
            raise LorabatchError(failed)
        raise DataError(failed)


def grown_text(request: Request, tokenizer: Tokenizer) -> str:
    """What is certain to stay: no half character, no beginning of a stop string."""
    if request.finish_reason is not None:
        return request.text
    text = tokenizer.decode(request.output_ids, skip_special_tokens=True).rstrip("\ufffd")
    begun = [
        size
        for stop in request.params.stop
        for size in range(1, len(stop) + 1)
        if text.endswith(stop[:size])
    ]
    return text[: len(text) - max(begun, default=0)]
