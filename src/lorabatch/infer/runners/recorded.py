"""The decoder as a recorded program of C++ kernels, for CPUs that have them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lorabatch.infer.runners.base import Flat, HiddenRunner
from lorabatch.infer.runners.kv_cache import KVCache, pages
from lorabatch.infer.runners.low_rank import by_adapter
from lorabatch.infer.runners.program import Program, group_size
from lorabatch.model.attention import Segment
from lorabatch.model.functional import NO_TOKEN
from lorabatch.model.lora import LoraWeights
from lorabatch.model.native import NativeModel


class ProgramRunner(HiddenRunner):
    def __init__(
        self,
        model: NativeModel,
        *,
        num_slots: int,
        capacity: int,
        max_tokens: int,
        quantize: str = "none",
        adapters: Sequence[LoraWeights] = (),
    ) -> None:
        """max_tokens: of one call of the kernels; larger steps are cut, which changes no bit."""
        self.cache = KVCache(
            model.spec,
            num_slots=num_slots,
            capacity=capacity,
            dtype=model.decoder.dtype,
            device=model.decoder.device,
        )
        self._program = Program(
            model.decoder,
            cache=self.cache.data,
            max_tokens=max_tokens,
            quantize=quantize,
            adapters=adapters,
        )
        self._group_size, self._max_tokens, self._apart = (
            group_size(model.spec, model.decoder.dtype),
            max_tokens,
            bool(adapters),
        )

    def forward(self, segments: Sequence[Segment]) -> Tensor:
        """As the protocol says; the hidden states are not normalised yet, ``logits`` and ``greedy``
        do that."""
        segments, back = by_adapter(segments) if self._apart else (segments, None)
        chunks = [self._run(chunk) for chunk in _cut(segments, self._max_tokens)]
        hidden = chunks[0] if len(chunks) == 1 else torch.cat(chunks)
        return hidden if back is None else hidden[back]

    def _run(self, segments: Sequence[Segment]) -> Tensor:
        flat, size = Flat(segments), self._group_size
        group_starts = [0]
        for segment in segments:
            first, count = group_starts[-1], len(segment.token_ids)
            group_starts += [first + min(i + size, count) for i in range(0, count, size)]
        residual = self._program.run(
            flat.token_ids, flat.positions, flat.slots, group_starts, flat.adapters
        )
        # a copy: the next step overwrites the residual stream
        return residual[torch.tensor(flat.wanted, dtype=torch.long)]

    def logits(self, hidden: Tensor) -> Tensor:
        return self._program.logits(hidden)

    def greedy(self, hidden: Tensor) -> list[int]:
        """The kernel's comparisons pass over NaN, so the rows are looked at before the head."""
        finite = hidden.isfinite().all(dim=1).tolist()
        return [
            token_id if good else NO_TOKEN
            for token_id, good in zip(self._program.greedy(hidden), finite, strict=True)
        ]

    def copy(self, source: int, target: int, length: int) -> None:
        # positions of one page lie interleaved in memory
        self.cache.copy(source, target, pages(length))

    def clear(self, slot: int) -> None:
        self.cache.clear(slot)


def _cut(segments: Sequence[Segment], max_tokens: int) -> Iterator[list[Segment]]:
    """The same tokens in the same order, in calls of at most ``max_tokens``."""
    chunk: list[Segment] = []
    room = max_tokens
    for segment in segments:
        done, count = 0, len(segment.token_ids)
        while count - done > room:
            part = segment.token_ids[done : done + room]
            unwanted = count - segment.num_logits
            chunk.append(
                replace(
                    segment,
                    start=segment.start + done,
                    token_ids=part,
                    num_logits=max(0, done + room - max(done, unwanted)),
                )
            )
            yield chunk
            done, chunk, room = done + room, [], max_tokens
        rest = count - done
        # seldom: a copy of every segment of every step would be a fifth of the host's time
        if done:
            segment = replace(
                segment,
                start=segment.start + done,
                token_ids=segment.token_ids[done:],
                num_logits=min(segment.num_logits, rest),
            )
        chunk.append(segment)
        room -= rest
    if chunk:
        yield chunk
