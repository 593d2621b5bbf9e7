"""A runner in two halves: hidden states first, then the choice of tokens from them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import islice

import torch
from torch import Tensor

from lorabatch.infer.requests import Request
from lorabatch.infer.sampling import choose
from lorabatch.model.attention import Segment
from lorabatch.model.loss import row_losses
from lorabatch.spans import span


class Flat:
    """The tokens of all segments one after another: ids, positions in their sequences, slots and
    adapters of each; ``wanted``: the rows whose hidden states are asked for."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        self.token_ids: list[int] = []
        self.positions: list[int] = []
        self.slots: list[int] = []
        self.adapters: list[int] = []
        self.wanted: list[int] = []
        for segment in segments:
            count = len(segment.token_ids)
            self.token_ids += segment.token_ids
            self.positions += range(segment.start, segment.start + count)
            self.slots += [segment.slot] * count
            self.adapters += [segment.adapter] * count
            end = len(self.token_ids)
            self.wanted += range(end - segment.num_logits, end)


class HiddenRunner(ABC):
    """What the runners have in common that make hidden states in one call. Shapes: n wanted rows, H
    hidden size, V vocabulary."""

    static = apart = False

    @abstractmethod
    def forward(self, segments: Sequence[Segment]) -> Tensor:
        """Read the tokens of all segments into their slots; hidden states [sum of num_logits, H],
        in their order."""

    @abstractmethod
    def logits(self, hidden: Tensor) -> Tensor:
        """[n, H] -> [n, V]."""

    @abstractmethod
    def greedy(self, hidden: Tensor) -> list[int]:
        """The likeliest token of each row; NO_TOKEN where the model's numbers are not finite."""

    @abstractmethod
    def copy(self, source: int, target: int, length: int) -> None:
        """As ``Runner.copy``."""

    @abstractmethod
    def clear(self, slot: int) -> None:
        """As ``Runner.clear``."""

    def token_nll(self, token_ids: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Of all tokens but the first, each predicted from the true ones before it: (negative
        log-likelihood in nats, fp32 [n]; the likeliest token at its place [n]). Uses slot 0."""
        inputs = token_ids[:-1]
        hidden = self.forward([Segment(0, 0, inputs, num_logits=len(inputs))])
        logits = self.logits(hidden)
        targets = torch.tensor(token_ids[1:], device=logits.device)
        return row_losses(logits, targets), logits.argmax(dim=-1)

    def step(self, segments: Sequence[Segment], requests: Sequence[Request]) -> list[list[int]]:
        """As ``Runner.step``."""
        # Tokens of a completion are all wanted, those that speculation guessed too; of a prompt at
        # most the last.
        reads_prompt = any(len(segment.token_ids) > segment.num_logits for segment in segments)
        with span("prefill" if reads_prompt else "decode"):
            hidden = self.forward(segments)
        owners = [
            request
            for segment, request in zip(segments, requests, strict=True)
            for _ in range(segment.num_logits)
        ]
        with span("choose token"):
            chosen = iter(choose(self, hidden, owners) if owners else [])
            return [list(islice(chosen, s.num_logits)) for s in segments if s.num_logits]
