"""The native model as the engine sees it: prefill some prompts, decode one token for every live slot."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from lorabatch.infer.kv_cache import DecodeAttention, KVCache, PrefillAttention
from lorabatch.model.native import NativeModel


class Runner(Protocol):
    static: bool  # admits a new batch only when the old one is done

    def prefill(self, prompts: Sequence[Sequence[int]], slots: Sequence[int]) -> Tensor:
        """Read prompts into their slots; logits [n, V] of the token after each."""

    def decode(self, token_ids: Sequence[int], lengths: Sequence[int]) -> Tensor:
        """Feed each live slot its newest token; lengths: tokens it had cached before. Logits [n, V]."""

    def move(self, source: int, target: int, length: int) -> None:
        """Slot ``source`` (``length`` cached tokens) becomes slot ``target``."""


class NativeRunner:
    static = False

    def __init__(self, model: NativeModel, *, num_slots: int, capacity: int) -> None:
        decoder = model.decoder
        self._decoder = decoder
        self.cache = KVCache(model.spec, num_slots=num_slots, capacity=capacity, dtype=decoder.dtype, device=decoder.device)

    @torch.inference_mode()
    def prefill(self, prompts: Sequence[Sequence[int]], slots: Sequence[int]) -> Tensor:
        lengths = [len(p) for p in prompts]
        token_ids = self._ints([i for p in prompts for i in p])
        positions = self._ints([i for n in lengths for i in range(n)])
        hidden = self._decoder(token_ids, positions, PrefillAttention(self.cache, list(slots), lengths))
        last = self._ints(lengths).cumsum(0) - 1
        return self._decoder.logits(hidden[last])

    @torch.inference_mode()
    def decode(self, token_ids: Sequence[int], lengths: Sequence[int]) -> Tensor:
        positions = self._ints(lengths)
        attention = DecodeAttention(self.cache, positions, max(lengths))
        return self._decoder.logits(self._decoder(self._ints(token_ids), positions, attention))

    def move(self, source: int, target: int, length: int) -> None:
        self.cache.move(source, target, length)

    def _ints(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=self._decoder.device)
