"""Any model of transformers as a runner: padded batches with transformers' own cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lorabatch.infer.runners.base import HiddenRunner
from lorabatch.model.attention import Segment
from lorabatch.model.functional import likeliest
from lorabatch.model.hf import HfModel
from lorabatch.schema import Record

MASK_STEPS = 64  # columns that the mask of a batch gets at once


class HfRunner(HiddenRunner):
    """Static, left-padded batches with transformers' own cache; a batch runs until all its requests
    are done."""

    static = True

    def __init__(self, model: HfModel) -> None:
        self._model = model
        self._row_of_slot: dict[int, int] = {}
        self._room = torch.empty(0, 0)  # [B, more than L] of the running batch
        self._width = 0  # L, its tokens so far

    @torch.inference_mode()
    def forward(self, segments: Sequence[Segment]) -> Tensor:
        """Whole prompts start a new batch; single tokens continue it. Logits [n, V], handed through
        as hidden states."""
        if segments[0].start == 0:
            return self._begin(segments)
        rows = [self._row_of_slot[s.slot] for s in segments]
        # finished rows read a zero
        step = torch.zeros(self._room.shape[0], 1, dtype=torch.long, device=self._model.device)
        step[rows, 0] = torch.tensor([s.token_ids[0] for s in segments], device=step.device)
        self._lengthen_mask()
        return self._forward(step)[rows]

    def _lengthen_mask(self) -> None:
        self._width += 1
        if self._width > self._room.shape[1]:
            more = self._room.new_ones(self._room.shape[0], MASK_STEPS)
            self._room = torch.cat([self._room, more], dim=1)

    @property
    def _mask(self) -> Tensor:
        """[B, L]"""
        return self._room[:, : self._width]

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden

    def greedy(self, hidden: Tensor) -> list[int]:
        return likeliest(hidden)

    def copy(self, source: int, target: int, length: int) -> None:
        self._row_of_slot[target] = self._row_of_slot[source]

    def clear(self, slot: int) -> None:
        """Every batch has a new cache, and each of its rows reads its own part."""

    def _begin(self, segments: Sequence[Segment]) -> Tensor:
        longest = max(len(s.token_ids) for s in segments)
        missing = [longest - len(s.token_ids) for s in segments]
        padded = [[0] * n + list(s.token_ids) for n, s in zip(missing, segments, strict=True)]
        self._width, room = longest, longest + MASK_STEPS
        self._room = torch.tensor(
            [[0] * n + [1] * (room - n) for n in missing], device=self._model.device
        )
        self._row_of_slot = {s.slot: row for row, s in enumerate(segments)}
        self._cache: Any = None
        return self._forward(torch.tensor(padded, device=self._model.device))

    def _forward(self, ids: Tensor) -> Tensor:
        inputs: Record = {
            "input_ids": ids,
            "attention_mask": self._mask,
            "past_key_values": self._cache,
            "use_cache": True,
        }
        if self._model._takes_few_logits:
            inputs["logits_to_keep"] = 1
        if self._model._takes_positions:
            inputs["position_ids"] = (self._mask.cumsum(dim=1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        output = self._model.model(**inputs)
        self._cache = output.past_key_values
        return output.logits[:, -1]
