"""The native model as the engine sees it: each step reads the new tokens of some slots, whatever their number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from lorabatch.infer.kv_cache import CacheAttention, KVCache
from lorabatch.model.attention import Segment
from lorabatch.model.native import NativeModel


class Runner(Protocol):
    static: bool  # admits a new batch only when the old one is done; takes whole prompts, then single tokens

    def forward(self, segments: Sequence[Segment]) -> Tensor:
        """Read the tokens of all segments into their slots; hidden states [sum of num_logits, H], in their order."""

    def logits(self, hidden: Tensor) -> Tensor:
        """[n, H] -> [n, V]."""

    def greedy(self, hidden: Tensor) -> list[int]:
        """The likeliest token of each row."""

    def copy(self, source: int, target: int, length: int) -> None:
        """The first ``length`` tokens that slot ``source`` holds are also in slot ``target`` afterwards."""


class NativeRunner:
    static = False

    def __init__(self, model: NativeModel, *, num_slots: int, capacity: int) -> None:
        decoder = model.decoder
        self._decoder = decoder
        self.cache = KVCache(model.spec, num_slots=num_slots, capacity=capacity, dtype=decoder.dtype, device=decoder.device)

    @torch.inference_mode()
    def forward(self, segments: Sequence[Segment]) -> Tensor:
        token_ids: list[int] = []
        positions: list[int] = []
        wanted: list[int] = []
        for segment in segments:
            token_ids += segment.token_ids
            positions += range(segment.start, segment.start + len(segment.token_ids))
            wanted += range(len(token_ids) - segment.num_logits, len(token_ids))
        places = self._ints(positions)
        hidden = self._decoder(self._ints(token_ids), places, CacheAttention(self.cache, segments, places))
        return hidden if len(wanted) == len(token_ids) else hidden[self._ints(wanted)]

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        return self._decoder.logits(hidden)

    def greedy(self, hidden: Tensor) -> list[int]:
        return self.logits(hidden).argmax(dim=-1).tolist()

    def copy(self, source: int, target: int, length: int) -> None:
        self.cache.copy(source, target, length)

    def _ints(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=self._decoder.device)
