"""Which documents go through the model together: order, steps, blocks. Plain Python over lengths.

A step is ``batch_size`` documents of the shuffled order, as in any padded trainer; packing only
lays a step's documents into blocks of at most ``block_tokens`` tokens. The order is a function of
(seed, epoch) alone, so a resumed run continues the same sequence without stored state.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

Parts = Sequence[tuple[int, float]]  # (documents, weight) of each of several files


def epoch_order(num_documents: int, *, seed: int, epoch: int, parts: Parts = ()) -> list[int]:
    """What an epoch takes, in its order. parts: of the documents, in turn; of weight 0.3 an epoch
    takes 0.3 of them, the next epoch goes on behind them, and none comes a second time before all
    had their turn. No parts: all documents."""
    order: list[int] = []
    first = 0
    for file, (count, weight) in enumerate(parts or ((num_documents, 1.0),)):
        taken = _taken(count, weight)
        turns = _endless(count, epoch * taken, taken, seed=f"{seed}/file {file}")
        order += sorted(first + i for i in turns)
        first += count
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return order


def epoch_size(num_documents: int, parts: Parts = ()) -> int:
    return sum(_taken(*part) for part in parts) if parts else num_documents


def _taken(count: int, weight: float) -> int:
    """Documents that an epoch takes; at least one of a file that counts at all."""
    return max(1, round(weight * count)) if weight else 0


def _endless(count: int, start: int, length: int, *, seed: str) -> list[int]:
    """Of shuffles of ``range(count)`` one after another: ``length`` numbers from ``start`` on."""
    found: list[int] = []
    for turn in range(start // count, -(-(start + length) // count)):
        once = list(range(count))
        random.Random(f"{seed}/{turn}").shuffle(once)
        found += once
    return found[start % count :][:length]


def steps_per_epoch(num_documents: int, documents_per_step: int) -> int:
    return -(-num_documents // documents_per_step)


def training_steps(
    num_documents: int, documents_per_step: int, *, epochs: int, seed: int, parts: Parts = ()
) -> Iterator[tuple[int, list[int]]]:
    """(epoch, document indices) of every optimiser step; the last step of an epoch may be
    smaller."""
    for epoch in range(epochs):
        order = epoch_order(num_documents, seed=seed, epoch=epoch, parts=parts)
        for start in range(0, len(order), documents_per_step):
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
    """Indices of ``lengths`` for each of ``count`` ranks, sums near-equal: the longest first, each
    to the one that has least.

    Example: ``deal([5, 3, 4, 2], 2) == [[0, 3], [1, 2]]``.
    """
    shares: list[list[int]] = [[] for _ in range(count)]
    sums = [0] * count
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        least = min(range(count), key=lambda rank: sums[rank])
        shares[least].append(index)
        sums[least] += lengths[index]
    return [sorted(share) for share in shares]
