"""The nats of every item under the base and each adapter, in one pass over the items."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorabatch.corpus.packing import pack
from lorabatch.corpus.tokens import TokenDocument, Tokenizer, target_bytes, tokenise
from lorabatch.errors import DataError, LorabatchError
from lorabatch.evaluate.items import CHOICE, Item, Task
from lorabatch.model.load import Model
from lorabatch.model.lora import LoraWeights
from lorabatch.schema import Record


@dataclass(frozen=True)
class TokenItem:
    """An item as the model reads it: for each of its documents the parts that it was split into."""

    item: Item
    documents: tuple[tuple[TokenDocument, ...], ...]
    num_bytes: int  # UTF-8 bytes of the supervised text

    @property
    def parts(self) -> list[TokenDocument]:
        return [part for document in self.documents for part in document]

    @property
    def num_tokens(self) -> int:
        return sum(part.num_tokens for part in self.parts)


def tokenise_task(task: Task, tokenizer: Tokenizer, *, max_len: int, vocab: int) -> list[TokenItem]:
    """Items that have something to count; a document that the length limit leaves nothing of is
    not among them. DataError for a question that does not fit: its options must be whole."""
    documents = [document for item in task.items for document in item.documents]
    corpus = tokenise(documents, tokenizer, max_len=max_len, vocab_size=vocab)
    if task.kind == CHOICE and (corpus.num_cut or corpus.num_dropped):
        raise DataError(
            f"{corpus.num_cut} options do not fit into {max_len} tokens with their question",
            where=task.path,
            fix="raise --max_len, or remove the long questions",
        )
    parts: dict[int, list[TokenDocument]] = {}
    for source, part in zip(corpus.sources, corpus.documents, strict=True):
        parts.setdefault(source, []).append(_without_end(part) if task.kind == CHOICE else part)
    places = iter(range(len(documents)))
    of_items = [
        tuple(tuple(parts.get(next(places), ())) for _ in item.documents) for item in task.items
    ]
    found = [
        TokenItem(item, of_item, num_bytes)
        for item, of_item in zip(task.items, of_items, strict=True)
        if (num_bytes := sum(target_bytes([p for d in of_item for p in d], tokenizer)))
    ]
    if not found:
        raise DataError(
            "no item has anything to score", where=task.path, fix="give longer documents"
        )
    return found


def _without_end(part: TokenDocument) -> TokenDocument:
    """An option ends where its text does: whether the model would stop there is not asked."""
    return TokenDocument(part.token_ids[:-1], part.first_target)


def batches(items: Sequence[TokenItem], block_tokens: int) -> Iterator[list[TokenItem]]:
    """Neighbours that fill a block. A function of the items alone: a resumed evaluation computes
    the same products."""
    batch: list[TokenItem] = []
    for item in items:
        if batch and sum(i.num_tokens for i in batch) + item.num_tokens > block_tokens:
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch


def score(
    model: Model,
    adapters: Mapping[str, LoraWeights | None],
    batch: Sequence[TokenItem],
    block_tokens: int,
) -> Iterator[tuple[str, Item, Record]]:
    """(name of the model, item, its figures) of a batch under each of ``adapters``; None: the base
    alone. LorabatchError where the model's numbers are not finite."""
    parts = [part for item in batch for part in item.parts]
    for name, weights in adapters.items():
        with model.wearing(weights):
            sums = iter(_nats(model, parts, block_tokens))
        for item in batch:
            nats = [sum(next(sums) for _ in document) for document in item.documents]
            if not all(map(_is_finite, nats)):
                raise LorabatchError(
                    f"the model '{name}' gives numbers that are not finite",
                    where=item.item.id,
                    fix="use --dtype fp32, or another adapter",
                )
            yield name, item.item, _figures(item, nats)


def _is_finite(value: float) -> bool:
    return abs(value) < float("inf")


def _figures(item: TokenItem, nats: list[float]) -> Record:
    tokens = sum(part.num_targets for part in item.parts)
    if item.item.answer is None:
        return {"tokens": tokens, "bytes": item.num_bytes, "nll": nats[0]}
    sizes, answer = list(item.item.sizes), item.item.answer
    return {"tokens": tokens, "option_nll": nats, "option_sizes": sizes, "answer": answer}


def _nats(model: Model, parts: Sequence[TokenDocument], block_tokens: int) -> list[float]:
    """Sum over each part's supervised tokens, in double precision."""
    sums = [0.0] * len(parts)
    for block in pack([part.num_tokens for part in parts], block_tokens):
        ids: list[Tensor] = [torch.from_numpy(parts[i].token_ids) for i in block]
        found = model.token_nll(ids, [parts[i].targets for i in block])
        for i, each in zip(block, found, strict=True):
            sums[i] = float(each.double().sum())
    return sums
