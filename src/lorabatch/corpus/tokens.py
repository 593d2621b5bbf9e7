"""Documents to token ids, and which of them are supervised.

EOS ends every complete document and is supervised, so that the model learns to stop; it is never
masked by its value. A document that was cut gets no EOS, because its text continues. Of a
conversation every turn of the assistant is supervised, with the template's end marker.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from lorabatch.corpus.packing import epoch_size
from lorabatch.corpus.readers import Document
from lorabatch.errors import DataError
from lorabatch.schema import Fields
from lorabatch.spans import spanned

IntArray = npt.NDArray[np.int64]
Spans = tuple[tuple[int, int], ...]  # positions a to b-1 of each (a, b), in order
# Which tokens of a document are predicted: all from a position on, or those of some spans.
Targets = int | Spans
# Token ids in turn of what is given and of what is taught: given, taught, given, taught ...
Pieces = list[list[int]]


class Tokenizer(Protocol):
    """What we use of a transformers tokenizer."""

    eos_token_id: int
    chat_template: str | None
    all_special_ids: list[int]

    def __hash__(self) -> int: ...

    def __call__(self, text: str | list[str], **options: bool) -> Fields:
        """``input_ids``: of the text, or of each text."""

    def apply_chat_template(
        self, messages: list[dict[str, str]], *, tokenize: bool, add_generation_prompt: bool = False
    ) -> str: ...

    def convert_ids_to_tokens(self, ids: int) -> str: ...

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str: ...


@dataclass(frozen=True)
class TokenDocument:
    """token_ids [L]; positions from ``first_target`` on are predicted and count in the loss, but
    for those of ``gaps``: what others say between two answers."""

    token_ids: IntArray
    first_target: int  # at least 1: the first token of a document has nothing to be predicted from
    gaps: Spans = ()

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def targets(self) -> Targets:
        return self.spans if self.gaps else self.first_target

    @property
    def spans(self) -> Spans:
        """What is predicted."""
        begins = (self.first_target, *(b for _, b in self.gaps))
        return tuple(zip(begins, (*(a for a, _ in self.gaps), self.num_tokens), strict=True))

    @property
    def num_targets(self) -> int:
        return num_targets(self.targets, self.num_tokens)


def spans_of(targets: Targets, length: int) -> Spans:
    """The same as spans, of a document of ``length`` tokens."""
    return ((targets, length),) if isinstance(targets, int) else targets


def num_targets(targets: Targets, length: int) -> int:
    return sum(max(0, b - a) for a, b in spans_of(targets, length))


@dataclass(frozen=True)
class TokenCorpus:
    """Tokenised documents and what happened to them on the way."""

    documents: tuple[TokenDocument, ...]
    num_read: int
    num_split: int  # long texts laid out as several documents
    num_cut: int  # long answers that lost their end
    num_dropped: int  # nothing left to predict
    target_bytes: int | None = None  # UTF-8 bytes of the supervised text, for bits per byte
    sources: tuple[int, ...] = ()  # of each document: which of those that were read it is part of
    parts: tuple[tuple[int, float], ...] = ()  # of several files; see packing

    @property
    def epoch_documents(self) -> int:
        """That an epoch takes."""
        return epoch_size(len(self.documents), self.parts)

    @property
    def num_tokens(self) -> int:
        return sum(d.num_tokens for d in self.documents)

    @property
    def num_targets(self) -> int:
        return sum(d.num_targets for d in self.documents)


def mixed(corpora: Sequence[tuple[TokenCorpus, float]]) -> TokenCorpus:
    """One corpus of those of several files, each with its weight in an epoch."""
    (first, weight), *others = corpora
    if not others and weight == 1:
        return first
    files = [corpus for corpus, _ in corpora]
    return TokenCorpus(
        documents=tuple(d for corpus in files for d in corpus.documents),
        num_read=sum(corpus.num_read for corpus in files),
        num_split=sum(corpus.num_split for corpus in files),
        num_cut=sum(corpus.num_cut for corpus in files),
        num_dropped=sum(corpus.num_dropped for corpus in files),
        parts=tuple((len(corpus.documents), weight) for corpus, weight in corpora),
    )


@spanned("tokenise")
def tokenise(
    documents: Sequence[Document],
    tokenizer: Tokenizer,
    *,
    max_len: int,
    vocab_size: int | None = None,
    train_on_prompt: bool = False,
    turns: str = "all",
    count_bytes: bool = False,
) -> TokenCorpus:
    """Tokenise all documents. tokenizer: a transformers tokenizer; vocab_size: of the model; turns:
    "all" answers of a conversation are supervised, or the "last".

    Raises DataError if nothing is left to learn, for a token that the model does not have, and for
    a conversation that the chat template does not write turn by turn.
    """
    out: list[TokenDocument] = []
    sources: list[int] = []
    num_split = num_cut = num_dropped = 0
    for source, (document, pieces) in enumerate(encoded(documents, tokenizer, turns)):
        unknown = unknown_token([i for piece in pieces for i in piece], vocab_size)
        if unknown:
            raise DataError(unknown, where=document.where, fix="use the model's own tokenizer")
        fitted, cut = fit(pieces, max_len, train_on_prompt=train_on_prompt)
        num_split += len(fitted) > 1
        num_cut += cut
        kept = [part for part in fitted if part.num_targets]
        num_dropped += len(fitted) - len(kept)
        out += kept
        sources += [source] * len(kept)
    if not out:
        raise DataError(
            "no document has a token to learn from",
            where=documents[0].where.rsplit(":", 1)[0],
            fix="raise --max_len or check the prompts' length",
        )
    num_bytes = sum(target_bytes(out, tokenizer)) if count_bytes else None
    return TokenCorpus(
        tuple(out), len(documents), num_split, num_cut, num_dropped, num_bytes, tuple(sources)
    )


def encoded(
    documents: Sequence[Document], tokenizer: Tokenizer, turns: str = "all"
) -> Iterator[tuple[Document, Pieces]]:
    """Each document and its pieces; of plain text, which nothing is given for, the first is
    empty."""
    plain = [d.text for d in documents if d.messages is None and d.prompt is None]
    ids = _encode(tokenizer, plain, special=True)
    prompted = [(d.prompt, d.text) for d in documents if d.prompt is not None]
    prompts = _encode(tokenizer, [prompt for prompt, _ in prompted], special=True)
    completions = _encode(tokenizer, [text for _, text in prompted], special=False)
    for document in documents:
        if document.messages is not None:
            yield document, _chat_ids(tokenizer, document, turns)
        elif document.prompt is not None:
            yield document, [next(prompts), [*next(completions), tokenizer.eos_token_id]]
        else:
            yield document, [[], [*next(ids), tokenizer.eos_token_id]]


def unknown_token(ids: Sequence[int], vocab_size: int | None) -> str | None:
    """What is wrong with token ids that the embedding of the model has no row for; None if it has
    all."""
    largest = max(ids, default=0)
    if vocab_size is None or largest < vocab_size:
        return None
    return (
        f"the tokenizer writes token {largest}, and the model's vocabulary ends at {vocab_size - 1}"
    )


def _encode(tokenizer: Tokenizer, texts: list[str], *, special: bool) -> Iterator[list[int]]:
    """Token ids of each text, in order, as an iterator (one batched call: the tokenizer is
    threaded)."""
    if not texts:
        return iter(())
    return iter(
        tokenizer(texts, add_special_tokens=special, return_attention_mask=False, verbose=False)[
            "input_ids"
        ]
    )


def _chat_ids(tokenizer: Tokenizer, document: Document, turns: str) -> Pieces:
    """Each answer is what the template adds to the prompt that it answers. Line ends behind its end
    marker belong to what comes next: nobody waits for them."""
    if not tokenizer.chat_template:
        raise DataError(
            "this model has no chat template for 'messages'",
            where=document.where,
            fix="use prompt + completion, or an instruct model",
        )
    texts, done = [], ""
    for prompt, answered in _rendered(tokenizer, document, turns):
        if not (prompt.startswith(done) and answered.startswith(prompt)):
            raise DataError(
                "the chat template writes the prompt differently once it is answered",
                where=document.where,
                fix="use prompt + completion, or --turns last if only earlier answers change",
            )
        texts.append(prompt[len(done) :])
        texts.append(answered[len(prompt) :].rstrip("\n"))
        done = prompt + texts[-1]
    pieces = list(_encode(tokenizer, texts, special=False))
    if tokenizer.eos_token_id not in pieces[-1][-1:]:
        pieces[-1].append(tokenizer.eos_token_id)
    return pieces


def _rendered(tokenizer: Tokenizer, document: Document, turns: str) -> Iterator[tuple[str, str]]:
    """(everything before it, the same with it) of each answer that is taught, as the chat template
    writes them."""
    messages = [dict(m) for m in document.messages or ()]
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    for i in answers if turns == "all" else answers[-1:]:
        try:
            yield (
                tokenizer.apply_chat_template(
                    messages[:i], tokenize=False, add_generation_prompt=True
                ),
                tokenizer.apply_chat_template(messages[: i + 1], tokenize=False),
            )
        except Exception as error:
            # templates are programs of the model's author and raise what they like
            raise DataError(
                f"the chat template refuses the messages ({error})",
                where=document.where,
                fix="start with a user's message",
            ) from None


def fit(
    pieces: Pieces, max_len: int, *, train_on_prompt: bool = False
) -> tuple[list[TokenDocument], bool]:
    """(documents, was an answer cut). Plain text is split so that nothing is lost; what has a
    prompt loses its end."""
    ids = list(itertools.chain.from_iterable(pieces))
    if not pieces[0] and len(pieces) == 2:
        count = -(-len(ids) // max_len)
        # even: a last part of one token could not be predicted
        bounds = [len(ids) * i // count for i in range(count + 1)]
        return [_document(ids[a:b], 1) for a, b in itertools.pairwise(bounds)], False
    first, gaps, kept = _supervision(pieces, max_len)
    if train_on_prompt:
        return [_document(ids[:max_len], 1)], len(ids) > max_len
    return [_document(ids[:kept], first, gaps)], len(ids) > max_len


def _supervision(pieces: Pieces, max_len: int) -> tuple[int, Spans, int]:
    """(first target, gaps, tokens to keep): what comes behind the last answer that begins within
    ``max_len`` would teach nothing."""
    ends = list(itertools.accumulate(map(len, pieces)))
    gaps, kept = list(zip(ends[1:-1:2], ends[2::2], strict=True)), max_len
    while gaps and gaps[-1][1] >= kept:
        kept = min(kept, gaps.pop()[0])
    return max(1, ends[0]), tuple(gaps), kept


def _document(ids: list[int], first_target: int, gaps: Spans = ()) -> TokenDocument:
    return TokenDocument(np.asarray(ids, dtype=np.int64), first_target, gaps)


def target_bytes(documents: Sequence[TokenDocument], tokenizer: Tokenizer) -> list[int]:
    """UTF-8 bytes of each document's supervised tokens; a character cut between two tokens is
    counted once, by its bytes."""
    targets = [[i for a, b in d.spans for i in d.token_ids[a:b].tolist()] for d in documents]
    sizes = {i: _token_bytes(tokenizer, i) for i in {i for ids in targets for i in ids}}
    return [sum(sizes[i] for i in ids) for ids in targets]


def _token_bytes(tokenizer: Tokenizer, token_id: int) -> int:
    """Bytes of one token: in a byte-level vocabulary each character of its name stands for one
    byte."""
    name = tokenizer.convert_ids_to_tokens(token_id)
    if token_id in tokenizer.all_special_ids:
        return 0
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None and "ByteLevel" in str(backend.decoder):
        return len(name)
    if re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", name):  # SentencePiece's fallback
        return 1
    return len(name.replace("\u2581", " ").encode("utf-8"))
