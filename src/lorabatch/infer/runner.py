"""The native model as the engine sees it: each step reads the new tokens of some slots, whatever their number.

Two here: ``ProgramRunner`` replays a recorded program of C++ kernels (CPUs that have them), ``NativeRunner`` runs the
decoder on torch's operators (everything else, and the reference that the program is tested against). ``HfRunner`` (``model/hf.py``) is the third.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from lorabatch.errors import UnavailableError
from lorabatch.hub import ModelSource
from lorabatch.infer.kv_cache import CacheAttention, KVCache, pages
from lorabatch.infer.low_rank import attach_bank, by_adapter
from lorabatch.infer.program import Program, group_size, unsupported
from lorabatch.model.attention import Segment
from lorabatch.model.functional import NO_TOKEN, likeliest
from lorabatch.model.linear import Dense
from lorabatch.model.load import Model, load_model
from lorabatch.model.lora import LoraWeights
from lorabatch.model.native import NativeModel
from lorabatch.model.spec import ModelSpec, spec_from_config


class Runner(Protocol):
    static: bool  # admits a new batch only when the old one is done; takes whole prompts, then single tokens

    def forward(self, segments: Sequence[Segment]) -> Tensor:
        """Read the tokens of all segments into their slots; hidden states [sum of num_logits, H], in their order."""

    def logits(self, hidden: Tensor) -> Tensor:
        """[n, H] -> [n, V]."""

    def greedy(self, hidden: Tensor) -> list[int]:
        """The likeliest token of each row; NO_TOKEN where the model's numbers are not finite."""

    def copy(self, source: int, target: int, length: int) -> None:
        """The first ``length`` tokens that slot ``source`` holds are also in slot ``target`` afterwards."""

    def clear(self, slot: int) -> None:
        """Nothing that this slot held can reach who has it next."""


class NativeRunner:
    static = False

    def __init__(self, model: NativeModel, *, num_slots: int, capacity: int, adapters: Sequence[LoraWeights] = ()) -> None:
        """adapters: stay apart, chosen by segment."""
        decoder = model.decoder
        self._decoder = decoder
        self._groups = attach_bank(decoder, adapters) if adapters else None
        self.cache = KVCache(model.spec, num_slots=num_slots, capacity=capacity, dtype=decoder.dtype, device=decoder.device)

    @torch.inference_mode()
    def forward(self, segments: Sequence[Segment]) -> Tensor:
        back = None
        if self._groups is not None:
            segments, back = by_adapter(segments)
            self._groups.set(segments)
        token_ids: list[int] = []
        positions: list[int] = []
        wanted: list[int] = []
        for segment in segments:
            token_ids += segment.token_ids
            positions += range(segment.start, segment.start + len(segment.token_ids))
            wanted += range(len(token_ids) - segment.num_logits, len(token_ids))
        places = self._ints(positions)
        hidden = self._decoder(self._ints(token_ids), places, CacheAttention(self.cache, segments, places))
        if back is not None:
            wanted = [wanted[i] for i in back]
        return hidden if back is None and len(wanted) == len(token_ids) else hidden[self._ints(wanted)]

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        return self._decoder.logits(hidden)

    def greedy(self, hidden: Tensor) -> list[int]:
        return likeliest(self.logits(hidden))

    def copy(self, source: int, target: int, length: int) -> None:
        self.cache.copy(source, target, length)

    def clear(self, slot: int) -> None:
        self.cache.clear(slot)

    def _ints(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=self._decoder.device)


class ProgramRunner:
    static = False

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
        self.cache = KVCache(model.spec, num_slots=num_slots, capacity=capacity, dtype=model.decoder.dtype, device=model.decoder.device)
        self._program = Program(model.decoder, cache=self.cache.data, max_tokens=max_tokens, quantize=quantize, adapters=adapters)
        self._group_size, self._max_tokens, self._apart = group_size(model.spec, model.decoder.dtype), max_tokens, bool(adapters)
        self.logits = self._program.logits

    def forward(self, segments: Sequence[Segment]) -> Tensor:
        """As the protocol says; the hidden states are not normalised yet, ``logits`` and ``greedy`` do that."""
        segments, back = by_adapter(segments) if self._apart else (segments, None)
        pieces = [self._run(piece) for piece in _cut(segments, self._max_tokens)]
        hidden = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        return hidden if back is None else hidden[back]

    def _run(self, segments: Sequence[Segment]) -> Tensor:
        token_ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        adapters: list[int] = []
        wanted: list[int] = []
        group_starts = [0]
        for segment in segments:
            count, first = len(segment.token_ids), len(token_ids)
            token_ids += segment.token_ids
            positions += range(segment.start, segment.start + count)
            slots += [segment.slot] * count
            adapters += [segment.adapter] * count
            group_starts += [first + min(i + self._group_size, count) for i in range(0, count, self._group_size)]
            wanted += range(first + count - segment.num_logits, first + count)
        residual = self._program.run(token_ids, positions, slots, group_starts, adapters)
        return residual[torch.tensor(wanted, dtype=torch.long)]  # a copy: the next step overwrites the residual stream

    def greedy(self, hidden: Tensor) -> list[int]:
        """The kernel's comparisons pass over NaN, so the rows are looked at before the head."""
        finite = hidden.isfinite().all(dim=1).tolist()
        return [token_id if good else NO_TOKEN for token_id, good in zip(self._program.greedy(hidden), finite, strict=True)]

    def copy(self, source: int, target: int, length: int) -> None:
        self.cache.copy(source, target, pages(length))  # positions of one page lie interleaved in memory

    def clear(self, slot: int) -> None:
        self.cache.clear(slot)


def _cut(segments: Sequence[Segment], max_tokens: int) -> Iterator[list[Segment]]:
    """The same tokens in the same order, in calls of at most ``max_tokens``."""
    piece: list[Segment] = []
    room = max_tokens
    for segment in segments:
        done, count = 0, len(segment.token_ids)
        while count - done > room:
            part = segment.token_ids[done : done + room]
            unwanted = count - segment.num_logits
            piece.append(replace(segment, start=segment.start + done, token_ids=part, num_logits=max(0, done + room - max(done, unwanted))))
            yield piece
            done, piece, room = done + room, [], max_tokens
        rest = count - done
        if done:  # seldom: a copy of every segment of every step would be a fifth of the host's time
            segment = replace(
                segment, start=segment.start + done, token_ids=segment.token_ids[done:], num_logits=min(segment.num_logits, rest)
            )
        piece.append(segment)
        room -= rest
    if piece:
        yield piece


def make_runner(
    model: NativeModel, *, num_slots: int, capacity: int, max_tokens: int, quantize: str = "none", adapters: Sequence[LoraWeights] = ()
) -> Runner:
    """The fastest runner of this machine for this model. UnavailableError if ``quantize`` needs kernels that are not there."""
    if programmed(model.spec, model.decoder.dtype, model.decoder.device, quantize=quantize):
        return ProgramRunner(model, num_slots=num_slots, capacity=capacity, max_tokens=max_tokens, quantize=quantize, adapters=adapters)
    return NativeRunner(model, num_slots=num_slots, capacity=capacity, adapters=adapters)


def programmed(spec: ModelSpec | None, dtype: torch.dtype, device: torch.device, *, quantize: str) -> bool:
    """Whether a model runs as a recorded program here; spec: None if it has no native decoder. UnavailableError if only a program quantises."""
    why = "it has no native decoder" if spec is None else unsupported(spec, dtype, device)
    if why is not None and quantize != "none":
        raise UnavailableError(f"not possible here: {why}", where=f"--quantize {quantize}", fix="use --quantize none")
    return why is None


def load_for_runner(
    source: ModelSource,
    config: Any,
    *,
    backend: str,
    dtype: torch.dtype,
    device: torch.device,
    quantize: str,
    adapter_dir: Path | None = None,
) -> Model:
    """As ``model.load.load_model``; a program packs the weights itself, so they are kept plain for it. Errors: those of both."""
    plain = programmed(None if backend == "hf" else spec_from_config(config), dtype, device, quantize=quantize)
    product = (lambda weight, _: Dense(weight)) if plain else None
    return load_model(source, config, backend=backend, dtype=dtype, device=device, adapter_dir=adapter_dir, product=product)
