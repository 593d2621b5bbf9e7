"""Which documents go through the model together: order, steps, blocks. Plain Python over lengths.

A step is ``batch_size`` documents of the shuffled order, as in any padded trainer; packing only
lays a step's documents into blocks of at most ``block_tokens`` tokens. The order is a function of
(seed, epoch) alone, so a resumed run continues the same sequence without stored state.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence


def epoch_order(num_documents: int, *, seed: int, epoch: int) -> list[int]:
    order = list(range(num_documents))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return order


def steps_per_epoch(num_documents: int, documents_per_step: int) -> int:
    return -(-num_documents // documents_per_step)


def training_steps(num_documents: int, documents_per_step: int, *, epochs: int, seed: int) -> Iterator[tuple[int, list[int]]]:
    """(epoch, document indices) of every optimiser step; the last step of an epoch may be smaller."""
    for epoch in range(epochs):
        order = epoch_order(num_documents, seed=seed, epoch=epoch)
        for start in range(0, num_documents, documents_per_step):
            yield epoch, order[start : start + documents_per_step]


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing: indices of ``lengths`` in blocks whose sums do not exceed ``capacity``.

    A document longer than the capacity gets a block of its own. Example:
    ``pack([5, 3, 4, 2], 7) == [[0, 3], [2, 1]]``.
    """
    blocks: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fitting = [b for b in range(len(blocks)) if room[b] >= lengths[index]]
        if fitting:
            best = min(fitting, key=lambda b: room[b])
            blocks[best].append(index)
            room[best] -= lengths[index]
        else:
            blocks.append([index])
            room.append(capacity - lengths[index])
    return blocks


def deal(lengths: Sequence[int], count: int) -> list[list[int]]:
    """Indices of ``lengths`` for each of ``count`` ranks, sums near-equal: the longest first, each to the one that has least.

    Example: ``deal([5, 3, 4, 2], 2) == [[0, 3], [1, 2]]``.
    """
    shares: list[list[int]] = [[] for _ in range(count)]
    sums = [0] * count
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        least = min(range(count), key=lambda rank: sums[rank])
        shares[least].append(index)
        sums[least] += lengths[index]
    return [sorted(share) for share in shares]
