"""When a completion ends, and which text it has then."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lorabatch.corpus.tokens import Tokenizer
from lorabatch.infer.requests import Request, SamplingParams
from lorabatch.model.functional import NO_TOKEN
from lorabatch.spans import spanned

# a stop string may begin this many tokens plus its length before the newest one
STOP_TAIL_TOKENS = 16


class Endings:
    """``tokenizer``: transformers'; ``eos_ids``: tokens that end a completion."""

    def __init__(self, tokenizer: Tokenizer, eos_ids: Iterable[int]) -> None:
        self._tokenizer, self._eos_ids = tokenizer, frozenset(eos_ids)

    def plain(self, request: Request, tokens: Sequence[int]) -> int:
        """How many of these tokens, from the first on, nobody has to look at one by one: they
        neither end the request nor could."""
        params = request.params
        if params.stop or request.constraint is not None or NO_TOKEN in tokens:
            return 0
        ended = not (
            self._eos_ids.isdisjoint(tokens) and set(params.stop_token_ids).isdisjoint(tokens)
        )
        room = request.max_new_tokens - len(request.output_ids) - 1
        return 0 if ended else min(len(tokens), room)

    def is_done(self, request: Request) -> bool:
        """Whether the newest token is the last one; then the request has its text and its
        reason."""
        params, newest = request.params, request.output_ids[-1]
        complete = request.constraint is not None and request.constraint.take(newest)
        if (complete or self._ends(newest, params)) or (
            params.stop and not request.must_continue and self._hits_stop(request)
        ):
            request.finish_reason = "stop"
        elif len(request.output_ids) >= request.max_new_tokens:
            request.finish_reason = "length"
        else:
            return False
        request.text = self._text(request)
        return True

    def _ends(self, token_id: int, params: SamplingParams) -> bool:
        return token_id in params.stop_token_ids or (
            token_id in self._eos_ids and not params.ignore_eos
        )

    def _hits_stop(self, request: Request) -> bool:
        tail = request.output_ids[-(STOP_TAIL_TOKENS + max(map(len, request.params.stop))) :]
        text = self._tokenizer.decode(tail, skip_special_tokens=True)
        return any(stop in text for stop in request.params.stop)

    @spanned("text")
    def _text(self, request: Request) -> str:
        ids, params = request.output_ids, request.params
        text: str = self._tokenizer.decode(
            ids[:-1] if self._ends(ids[-1], params) else ids, skip_special_tokens=True
        )
        cuts = [text.find(stop) for stop in params.stop if stop in text]
        return text[: min(cuts)] if cuts else text
