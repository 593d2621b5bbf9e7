"""Completions that must follow a JSON schema, a regular expression or a list of choices: which
tokens may come next, by llguidance (extra ``schema``).

A constraint belongs to its request and to nothing else, so a request's tokens do not depend on its
neighbours, and a request that is taken up again begins with a fresh one.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from lorabatch.config import InferConfig
from lorabatch.corpus.readers import check_file, read_text
from lorabatch.corpus.tokens import Tokenizer
from lorabatch.errors import DataError, UnavailableError, UsageError
from lorabatch.schema import Fields

if TYPE_CHECKING:
    from types import ModuleType

FLAGS = ("schema", "regex", "choices")
# A small model fills any white space that it may write until its tokens are used up.
COMPACT = {"whitespace_flexible": False}


def llguidance() -> ModuleType:
    """Raises UnavailableError where it is not installed."""
    try:
        import llguidance
    except ImportError:
        raise UnavailableError(
            "constrained output needs the package llguidance",
            fix="run: pip install 'lorabatch[schema]'",
        ) from None
    return llguidance


def of_flags(config: InferConfig) -> str | None:
    """The grammar that holds for all requests without one of their own. UsageError, DataError for
    one that is none, before anything is loaded."""
    given = [name for name in FLAGS if getattr(config, name)]
    if not given:
        return None
    where = " ".join(f"--{name}" for name in given)
    if len(given) > 1:
        raise UsageError("only one of these at a time", where=where, fix="choose one")
    if config.ignore_eos or config.min_new_tokens:
        what = "a text that is complete ends, whatever its length"
        raise UsageError(what, where=where, fix="leave out --ignore_eos and --min_new_tokens")
    if config.schema:
        path = Path(config.schema)
        check_file(path)
        return _json_grammar(read_text(path), where=str(path))
    if config.regex:
        return _checked(llguidance().LLMatcher.grammar_from_regex(config.regex), where=where)
    return _choice_grammar(config.choices, where=where)


def of_row(row: Fields) -> str | None:
    """The grammar of OpenAI's ``response_format``. DataError for one that is none."""
    wanted = row.get("response_format")
    kind = wanted.get("type") if isinstance(wanted, dict) else None
    if wanted is None or kind == "text":
        return None
    schema: object = {"type": "object"}
    if kind == "json_schema":
        inner = wanted.get("json_schema")
        schema = inner.get("schema") if isinstance(inner, dict) else None
    elif kind != "json_object":
        raise DataError("response_format is not of type text, json_object or json_schema")
    if not isinstance(schema, dict):
        raise DataError("response_format has no json_schema.schema")
    return _json_grammar(json.dumps(schema), where=None)


@functools.lru_cache(maxsize=64)
def _json_grammar(text: str, *, where: str | None) -> str:
    try:
        schema = json.loads(text)
        if not isinstance(schema, (dict, bool)):
            raise ValueError("neither an object nor true or false")
        grammar = llguidance().LLMatcher.grammar_from_json_schema(text, overrides=COMPACT)
    except (ValueError, RecursionError) as error:
        raise DataError(f"not a JSON schema ({error})", where=where, fix="fix it") from None
    return _checked(grammar, where=where)


def _choice_grammar(choices: Sequence[str], *, where: str) -> str:
    if not all(choices):
        raise UsageError("an empty choice", where=where, fix="leave it out")
    alternatives = " | ".join(map(json.dumps, choices))
    return _checked(llguidance().LLMatcher.grammar_from_lark(f"start: {alternatives}"), where=where)


def _checked(grammar: str, *, where: str | None) -> str:
    wrong, reasons = llguidance().LLMatcher.validate_grammar_with_warnings(grammar)
    if wrong:
        reason = " ".join(str(reasons[0]).split())[:200]
        raise DataError(f"cannot be followed ({reason})", where=where, fix="fix it")
    return str(grammar)


class Constraint:
    """What may come next in one completion."""

    def __init__(self, grammar: str, tokens: object, vocab_size: int) -> None:
        """DataError where no token can begin."""
        self._matcher = llguidance().LLMatcher(tokens, grammar)
        self._grammar, self._tokens, self._vocab_size = grammar, tokens, vocab_size
        if self._matcher.is_error() or not self.allowed().any():
            reason = " ".join(self._matcher.get_error().split())[:200] or "no token can begin it"
            raise DataError(f"the constraint cannot be followed ({reason})")

    def restarted(self) -> Constraint:
        return Constraint(self._grammar, self._tokens, self._vocab_size)

    def allowed(self) -> npt.NDArray[np.bool_]:
        """[V]"""
        mask = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        bits = np.unpackbits(mask, bitorder="little", count=self._vocab_size)
        return bits.view(np.bool_)

    def take(self, token_id: int) -> bool:
        """The token that was chosen; whether the completion is complete with it."""
        self._matcher.consume_token(token_id)
        return bool(self._matcher.is_stopped())


@functools.lru_cache(maxsize=1)
def token_table(tokenizer: Tokenizer, vocab_size: int, eos_ids: frozenset[int]) -> object:
    """llguidance's view of a tokenizer; takes about a second. UnavailableError for one that it
    cannot read."""
    llguidance()
    from llguidance.hf import from_tokenizer

    try:
        return from_tokenizer(tokenizer, n_vocab=vocab_size, eos_token=sorted(eos_ids))
    except Exception as error:  # of Rust, for each kind of tokenizer that it does not know
        raise UnavailableError(
            f"llguidance cannot read this tokenizer ({error})",
            where="constrained output",
            fix="use a model with a fast tokenizer",
        ) from None
