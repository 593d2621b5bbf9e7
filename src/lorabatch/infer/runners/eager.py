"""The decoder on torch's operators: any device, and the reference that the recorded program is
tested against."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lorabatch.infer.runners.base import Flat, HiddenRunner
from lorabatch.infer.runners.kv_cache import CacheAttention, KVCache
from lorabatch.infer.runners.low_rank import attach_adapters, by_adapter
from lorabatch.infer.runners.one_call import OneCallAttention, extents_of, places
from lorabatch.model.attention import Attention, Segment
from lorabatch.model.functional import likeliest
from lorabatch.model.lora import LoraWeights
from lorabatch.model.native import NativeModel
from lorabatch.model.varlen import LOOP, ints, operator_for


class NativeRunner(HiddenRunner):
    def __init__(
        self,
        model: NativeModel,
        *,
        num_slots: int,
        capacity: int,
        adapters: Sequence[LoraWeights] = (),
        one_call: bool | None = None,
    ) -> None:
        """adapters: stay apart, chosen by segment. one_call: attention is one call a layer
        (default: where torch has operators for it)."""
        decoder = model.decoder
        if one_call is None:
            kind = operator_for(decoder.device, decoder.dtype, model.spec.head_dim)
            one_call = kind != LOOP
        self._decoder = decoder
        stacked = one_call or decoder.device.type != "cpu"
        self._groups = attach_adapters(decoder, adapters, stacked=stacked) if adapters else None
        self.cache = KVCache(
            model.spec,
            num_slots=num_slots,
            capacity=capacity,
            dtype=decoder.dtype,
            device=decoder.device,
            by_token=one_call,
        )

    @torch.inference_mode()
    def forward(self, segments: Sequence[Segment]) -> Tensor:
        back = None
        if self._groups is not None:
            segments, back = by_adapter(segments)
            self._groups.set(segments, self._decoder.device)
        flat = Flat(segments)
        hidden = self._decoder(*self._inputs(flat, segments))
        if back is not None:
            return hidden[self._ints([flat.wanted[i] for i in back])]
        return hidden if len(flat.wanted) == len(hidden) else hidden[self._ints(flat.wanted)]

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        return self._decoder.logits(hidden)

    def greedy(self, hidden: Tensor) -> list[int]:
        return likeliest(self.logits(hidden))

    def copy(self, source: int, target: int, length: int) -> None:
        self.cache.copy(source, target, length)

    def clear(self, slot: int) -> None:
        self.cache.clear(slot)

    def _inputs(self, flat: Flat, segments: Sequence[Segment]) -> tuple[Tensor, Tensor, Attention]:
        """Token ids [T], positions [T], and the attention of a step."""
        if not self.cache.by_token:
            positions = self._ints(flat.positions)
            attention = CacheAttention(self.cache, segments, positions)
            return self._ints(flat.token_ids), positions, attention
        at = places(flat.slots, flat.positions, self.cache.capacity)
        together = self._ints([*flat.token_ids, *flat.positions, *at])
        ids, positions, at_device = together.view(3, -1).unbind()
        extents = extents_of(segments, self.cache.capacity, ids.device)
        return ids, positions, OneCallAttention(self.cache, at_device, extents)

    def _ints(self, values: Sequence[int]) -> Tensor:
        return ints(values, self._decoder.device, torch.long)
