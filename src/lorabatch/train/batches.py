"""Blocks of a step's documents, ready for the model: packed, and divided among the ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lorabatch.corpus.packing import pack
from lorabatch.corpus.tokens import Targets, TokenDocument
from lorabatch.spans import span
from lorabatch.train.ranks import Ranks


def blocks_of(
    documents: Sequence[TokenDocument], block_tokens: int
) -> Iterator[tuple[list[Tensor], list[Targets]]]:
    """Packed blocks as (token ids, targets) of their documents, ready for ``loss_sum``."""
    with span("pack"):
        blocks = pack([d.num_tokens for d in documents], block_tokens)
    for block in blocks:
        chosen = [documents[i] for i in block]
        yield [torch.from_numpy(d.token_ids) for d in chosen], [d.targets for d in chosen]


def rank_blocks(
    documents: Sequence[TokenDocument], block_tokens: int, ranks: Ranks
) -> Iterator[tuple[list[Tensor], list[Targets], bool]]:
    """This rank's blocks of the documents of all ranks, and whether they count.

    Where all ranks must make the same number of passes, some repeat a short document that does not.
    """
    blocks = [list(blocks_of(share, block_tokens)) for share in ranks.shares(documents)]
    mine = blocks[ranks.rank]
    yield from ((*block, True) for block in mine)
    if ranks.even:
        shortest = min(documents, key=lambda d: d.num_tokens)
        for _ in range(max(map(len, blocks)) - len(mine)):
            yield [torch.from_numpy(shortest.token_ids)], [shortest.targets], False
