"""Documents to token ids, and which of them are supervised.

EOS ends every complete document and is supervised, so that the model learns to stop; it is never
masked by its value. A document that was cut gets no EOS, because its text goes on.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lorabatch.corpus.readers import Document
from lorabatch.errors import DataError

IntArray = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class TokenDocument:
    """token_ids [L]; positions from ``first_target`` on are predicted and count in the loss."""

    token_ids: IntArray
    first_target: int  # at least 1: the first token of a document has nothing to be predicted from

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_targets(self) -> int:
        return max(0, len(self.token_ids) - self.first_target)


@dataclass(frozen=True)
class TokenCorpus:
    """Tokenised documents and what happened to them on the way."""

    documents: tuple[TokenDocument, ...]
    num_read: int
    num_split: int  # long texts laid out as several documents
    num_cut: int  # long answers that lost their end
    num_dropped: int  # nothing left to predict
    target_bytes: int | None = None  # UTF-8 bytes of the supervised text, for bits per byte

    @property
    def num_tokens(self) -> int:
        return sum(d.num_tokens for d in self.documents)

    @property
    def num_targets(self) -> int:
        return sum(d.num_targets for d in self.documents)


def tokenise(
    documents: Sequence[Document],
    tokenizer: Any,
    *,
    max_len: int,
    vocab_size: int | None = None,
    train_on_prompt: bool = False,
    count_bytes: bool = False,
) -> TokenCorpus:
    """Tokenise all documents. tokenizer: a transformers tokenizer; vocab_size: of the model.

    Raises DataError if nothing is left to learn, and for a token that the model does not have.
    """
    ids = _encode(tokenizer, [d.text for d in documents if d.messages is None and d.prompt is None], special=True)
    prompts = _encode(tokenizer, [d.prompt for d in documents if d.prompt is not None], special=True)
    completions = _encode(tokenizer, [d.text for d in documents if d.prompt is not None], special=False)
    out: list[TokenDocument] = []
    num_split = num_cut = num_dropped = 0
    for document in documents:
        if document.messages is not None:
            prompt_ids, text_ids = _chat_ids(tokenizer, document)
        elif document.prompt is not None:
            prompt_ids, text_ids = next(prompts), [*next(completions), tokenizer.eos_token_id]
        else:
            prompt_ids, text_ids = [], [*next(ids), tokenizer.eos_token_id]
        pieces, cut = _fit(prompt_ids, text_ids, max_len)
        num_split += len(pieces) > 1
        num_cut += cut
        unknown = unknown_token(prompt_ids, vocab_size) or unknown_token(text_ids, vocab_size)
        if unknown:
            raise DataError(unknown, where=document.where, fix="use the model's own tokenizer")
        for piece in pieces:
            first = 1 if train_on_prompt or not prompt_ids else len(prompt_ids)
            token_document = TokenDocument(np.asarray(piece, dtype=np.int64), first)
            if token_document.num_targets:
                out.append(token_document)
            else:
                num_dropped += 1
    if not out:
        raise DataError(
            "no document has a token to learn from",
            where=documents[0].where.rsplit(":", 1)[0],
            fix="raise --max_len or check the prompts' length",
        )
    target_bytes = _target_bytes(out, tokenizer) if count_bytes else None
    return TokenCorpus(tuple(out), len(documents), num_split, num_cut, num_dropped, target_bytes)


def unknown_token(ids: Sequence[int], vocab_size: int | None) -> str | None:
    """What is wrong with token ids that the embedding of the model has no row for; None if it has all."""
    largest = max(ids, default=0)
    if vocab_size is None or largest < vocab_size:
        return None
    return f"the tokenizer writes token {largest}, and the model's vocabulary ends at {vocab_size - 1}"


def _encode(tokenizer: Any, texts: Sequence[str | None], *, special: bool) -> Any:
    """Token ids of each text, in order, as an iterator (one batched call: the tokenizer is threaded)."""
    if not texts:
        return iter(())
    return iter(tokenizer(list(texts), add_special_tokens=special, return_attention_mask=False, verbose=False)["input_ids"])


def _chat_ids(tokenizer: Any, document: Document) -> tuple[list[int], list[int]]:
    if not tokenizer.chat_template:
        raise DataError(
            "this model has no chat template for 'messages'", where=document.where, fix="use prompt + completion, or an instruct model"
        )
    messages = [dict(m) for m in document.messages or ()]
    try:
        prompt = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception as error:  # templates are programs of the model's author and raise what they like
        raise DataError(
            f"the chat template refuses the messages ({error})", where=document.where, fix="begin with a user's message"
        ) from None
    if not whole.startswith(prompt):
        raise DataError(
            "the chat template writes the prompt differently once it is answered", where=document.where, fix="use prompt + completion"
        )
    prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    text_ids = tokenizer(whole[len(prompt) :].rstrip("\n"), add_special_tokens=False)["input_ids"]
    return prompt_ids, text_ids if tokenizer.eos_token_id in text_ids[-1:] else [*text_ids, tokenizer.eos_token_id]


def _fit(prompt_ids: list[int], text_ids: list[int], max_len: int) -> tuple[list[list[int]], bool]:
    """(pieces, was an answer cut). Plain text is split so that nothing is lost; an answer loses its end."""
    if prompt_ids:
        return [(prompt_ids + text_ids)[:max_len]], len(prompt_ids) + len(text_ids) > max_len
    pieces = -(-len(text_ids) // max_len)
    bounds = [len(text_ids) * i // pieces for i in range(pieces + 1)]  # even: a last piece of one token could not be predicted
    return [text_ids[a:b] for a, b in itertools.pairwise(bounds)], False


def _target_bytes(documents: Sequence[TokenDocument], tokenizer: Any) -> int:
    """UTF-8 bytes of all supervised tokens; a character cut between two tokens is counted once, by its bytes."""
    targets = [d.token_ids[d.first_target :].tolist() for d in documents]
    sizes = {i: _token_bytes(tokenizer, i) for i in {i for ids in targets for i in ids}}
    return sum(sizes[i] for ids in targets for i in ids)


def _token_bytes(tokenizer: Any, token_id: int) -> int:
    """Bytes of one token: in a byte-level vocabulary each character of its name stands for one byte."""
    name = tokenizer.convert_ids_to_tokens(token_id)
    if token_id in tokenizer.all_special_ids:
        return 0
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None and "ByteLevel" in str(backend.decoder):
        return len(name)
    if re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", name):  # SentencePiece's fallback
        return 1
    return len(name.replace("\u2581", " ").encode("utf-8"))
