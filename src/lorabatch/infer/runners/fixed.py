"""Recorded steps whose shapes never change: a GPU adds in an order that depends on the shape of a
product, so then a request's tokens do not depend on who is beside it.

Every recorded step has as many rows as there are slots, every other one as many tokens as a full
one: what is missing is filled up with tokens of a slot that nobody has. It costs what a full step
costs. That equal rows get equal bits, wherever they stand, is looked at when the run begins. Never
run on a GPU so far.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lorabatch.infer.requests import Request, SamplingParams
from lorabatch.infer.runners.graph import GraphRunner
from lorabatch.infer.runners.graph_step import Kind
from lorabatch.model.attention import Segment
from lorabatch.model.native import NativeModel


class FixedRunner(GraphRunner):
    def __init__(
        self, model: NativeModel, *, num_slots: int, capacity: int, max_tokens: int, **more: Any
    ) -> None:
        """max_tokens: of a step. more: as ``GraphRunner``."""
        super().__init__(model, num_slots=num_slots, capacity=capacity, **more)
        self._max_tokens, self._longest = max_tokens, capacity
        if self._groups is not None:
            self._groups.apart_from = None

    def forward(self, segments: Sequence[Segment]) -> Tensor:
        """As the protocol says. One of the fillers is as long as a slot, so that no length of the
        others counts either."""
        total = sum(len(segment.token_ids) for segment in segments)
        full = -(-total // self._max_tokens) * self._max_tokens + self._longest
        sizes = [min(self._longest, full - at) for at in range(total, full, self._longest)]
        nobody = [Segment(self._nobody, 0, [0] * size, num_logits=0) for size in sizes]
        return super().forward([*segments, *nobody])

    def logits(self, hidden: Tensor) -> Tensor:
        """[n, H] -> [n, V], as many rows at once as there are slots."""
        blocks = (F.pad(block, (0, 0, 0, self._nobody - len(block))) for block in self._cut(hidden))
        return torch.cat([super(FixedRunner, self).logits(block) for block in blocks])[
            : len(hidden)
        ]

    def rows_are_alike(self) -> bool:
        """Whether the same token has the same bits in every row, of a step of either kind."""
        params = SamplingParams(temperature=1.0, ignore_eos=True)
        asked = [Request(str(i), i, "", params, token_ids=[1]) for i in range(self._nobody)]
        eager = self.logits(self.forward([Segment(i, 0, [1]) for i in range(self._nobody)]))
        self._burst([Segment(i, 1, [2]) for i in range(self._nobody)], asked)
        rows = self._rows.get(Kind(drawn=True))
        recorded = eager if rows is None else rows.logits[: self._nobody]
        return all(bool((logits == logits[:1]).all()) for logits in (eager, recorded))

    def _count(self, asked: int) -> int:
        return self._most

    def _cut(self, hidden: Tensor) -> Sequence[Tensor]:
        return hidden.split(self._nobody)
