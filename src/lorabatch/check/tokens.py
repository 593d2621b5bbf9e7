"""What the model's own tokenizer makes of the documents: cut, without an end, with nothing to
learn."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lorabatch.check.rules import Hit, Seen
from lorabatch.check.shape import marks, seams
from lorabatch.corpus.readers import Document
from lorabatch.corpus.tokens import Tokenizer, encoded, fit
from lorabatch.errors import visible

SEAM = 40  # characters on each side
OPEN, CLOSE = "⟦", "⟧"  # around supervised text


@dataclass(frozen=True)
class Lengths:
    """Supervised tokens of a document, before and after ``max_len``."""

    where: str
    wanted: int
    kept: int
    is_cut: bool


def lengths(documents: Sequence[Document], tokenizer: Tokenizer, max_len: int) -> list[Lengths]:
    """As ``corpus.tokens.tokenise`` cuts."""
    found = []
    for document, pieces in encoded(documents, tokenizer):
        parts, cut = fit(pieces, max_len)
        kept = sum(part.num_targets for part in parts)
        wanted = sum(map(len, pieces[1::2])) if cut else kept
        found.append(Lengths(document.where, wanted, kept, cut))
    return found


def seen(documents: Sequence[Document], tokenizer: Tokenizer, max_len: int) -> list[Seen]:
    found = lengths(documents, tokenizer, max_len)
    cut = [Hit("fmt.eos", d.where) for d in found if d.is_cut]
    empty = [Hit("len.none", d.where) for d in found if d.kept == 0]
    return [
        Seen("fmt.eos", len(found), cut),
        _cut(found, max_len),
        Seen("len.none", len(found), empty),
        marks(documents, _special(tokenizer)),
        _merging(documents, tokenizer),
    ]


def _cut(found: Sequence[Lengths], max_len: int) -> Seen:
    """The share is that of tokens."""
    hits = [Hit("len.cut", d.where, figure=d.wanted - d.kept) for d in found if d.is_cut]
    lost, wanted = sum(d.wanted - d.kept for d in found), sum(d.wanted for d in found)
    share = lost / max(wanted, 1)
    text = f"{len(hits):,} of {len(found):,} documents are longer than {max_len} tokens; "
    text += f"{lost:,} of {wanted:,} supervised tokens are cut ({100 * share:.1f} %)"
    return Seen("len.cut", len(found), hits, share=share, text=text)


def _special(tokenizer: Tokenizer) -> tuple[str, ...]:
    """The model's own special tokens, as they stand in texts."""
    return tuple(map(tokenizer.convert_ids_to_tokens, tokenizer.all_special_ids))


def _merging(documents: Sequence[Document], tokenizer: Tokenizer) -> Seen:
    """Prompts whose last token depends on the answer: with the answer they have other tokens than
    alone, which is how they come at inference."""
    spaced = seams(documents)
    tight = [
        document
        for document in documents
        if document.prompt and not (document.prompt[-1].isspace() or document.text[0].isspace())
    ]
    hits = [*spaced.hits, *(Hit("fmt.seam", d.where) for d in _merged(tight, tokenizer))]
    text = f"{len(hits):,} of {spaced.total:,} prompts end in a space, or in a token that merges "
    return Seen("fmt.seam", spaced.total, hits, text=f"{text}with the answer's first one")


def _merged(documents: Sequence[Document], tokenizer: Tokenizer) -> Iterator[Document]:
    """What merges does so near the seam: the rest need not be read."""
    if not documents:
        return
    ends = [document.given[-SEAM:] for document in documents]
    both = [end + document.text[:SEAM] for end, document in zip(ends, documents, strict=True)]
    alone, together = (
        tokenizer(texts, add_special_tokens=False)["input_ids"] for texts in (ends, both)
    )
    for document, prompt_ids, all_ids in zip(documents, alone, together, strict=True):
        if all_ids[: len(prompt_ids)] != prompt_ids:
            yield document


def shown(document: Document, tokenizer: Tokenizer, max_len: int) -> Iterator[str]:
    """The document as the model sees it, one text for each part, supervised tokens in brackets."""
    for _, pieces in encoded([document], tokenizer):
        parts, cut = fit(pieces, max_len)
        for part in parts:
            text, end, ids = "", 0, part.token_ids.tolist()
            for a, b in part.spans:
                given, learned = tokenizer.decode(ids[end:a]), tokenizer.decode(ids[a:b])
                text, end = f"{text}{given}{OPEN}{learned}{CLOSE}", b
            head = f"{document.where}: {part.num_tokens} tokens, {part.num_targets} supervised"
            yield f"{head}{', cut' if cut else ''}\n{visible(text)}"
