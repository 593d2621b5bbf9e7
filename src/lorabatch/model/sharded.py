"""A base model that no single rank holds: each keeps its share of every layer's weight and borrows
the rest for a moment.

The fully sharded scheme of ZeRO-3 (arXiv 1910.02054) for weights that never change: gather,
multiply, forget. All ranks must therefore run the same number of passes (``Ranks.even``).
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor
from torch.nn import functional as F


class Gatherer(Protocol):
    """What sharding needs of the ranks."""

    rank: int
    count: int

    def gather(self, shard: Tensor) -> Tensor:
        """[n, …] of every rank -> [count * n, …]."""


class Sharded:
    """The product of a weight [O, I] of which each rank holds rows; gathered whole for each use."""

    def __init__(self, weight: Tensor, ranks: Gatherer) -> None:
        self._ranks, self._out_features = ranks, weight.shape[0]
        rows = -(-weight.shape[0] // ranks.count)
        self._shard = weight.new_zeros(rows, weight.shape[1])  # the last shares may be filled up
        mine = weight[ranks.rank * rows : (ranks.rank + 1) * rows]
        self._shard[: mine.shape[0]] = mine

    def _weight(self) -> Tensor:
        return self._ranks.gather(self._shard)[: self._out_features]

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, self._weight(), bias)

    def input_grad(self, grad: Tensor) -> Tensor:
        return grad @ self._weight()

    @property
    def num_bytes(self) -> int:
        return self._shard.numel() * self._shard.element_size()
