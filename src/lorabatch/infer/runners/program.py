"""A decoder's forward step as a recorded program for the CPU kernels
(``lorabatch/kernels/step.cpp``).

What a CUDA graph is to a GPU: the operations, their weights and their buffers are fixed once; a
step only fills in token ids, positions and slots, and replays everything with one call. No Python
runs between two layers.

Shapes: T tokens of the step, H hidden size, V vocabulary, K key/value heads, D head size, S slots,
C positions of a slot.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lorabatch.infer.runners.operations import Operations, widest
from lorabatch.kernels import library
from lorabatch.kernels.api import CData, constants, ffi, pointer, type_of
from lorabatch.kernels.step import kinds, max_queries, replay
from lorabatch.model.decoder import Decoder
from lorabatch.model.lora import LoraWeights
from lorabatch.model.spec import ModelSpec
from lorabatch.spans import recorder

PARAMS_PER_THREAD = 1 << 20  # multiplications that make another thread worth waking, about 10 us


def unsupported(spec: ModelSpec, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why this model cannot run as a program on this machine; None if it can."""
    if device.type != "cpu":
        return f"the kernels are for CPUs, not for {device.type}"
    kernels = library("step")
    if kernels is None:
        return "no kernels on this machine"
    if dtype not in (torch.float32, torch.bfloat16):
        return f"no kernel for {dtype}"
    if spec.family == "gpt2" and spec.activation == "gelu":
        return "the exact GELU has no kernel"
    sizes = (spec.hidden_size, spec.intermediate_size, spec.num_heads * spec.head_dim)
    largest = constants().MAX_HEAD_DIM
    if any(size % 4 for size in sizes) or spec.head_dim % 16 or spec.head_dim > largest:
        return f"sizes {sizes} or heads of {spec.head_dim} do not fit the kernels"
    return None


class Program:
    """The recorded step of one decoder over one KV cache. ``run`` is not reentrant: it owns its
    buffers."""

    def __init__(
        self,
        decoder: Decoder,
        *,
        cache: Tensor,
        max_tokens: int,
        quantize: str = "none",
        adapters: Sequence[LoraWeights] = (),
    ) -> None:
        """cache: [layers, 2, S, K, C, D], only its memory is used; max_tokens: of the largest step;
        adapters: stay apart, chosen by row."""
        self.spec, self.dtype = decoder.spec, decoder.dtype
        self._kernels = library("step")
        assert self._kernels is not None  # ``unsupported`` was asked
        self._max_tokens, self._capacity = max_tokens, cache.shape[4]
        self._adapted = bool(adapters)
        self._ops = Operations(
            decoder, cache=cache, max_tokens=max_tokens, quantize=quantize, adapters=adapters
        )
        self._logits = torch.empty(0, self.spec.vocab_size)
        self._step = self._recorded(cache, decoder.embedding.shape[0], len(adapters))
        # looked up once, not in every step
        self._ints, self._strip = ffi().typeof("int32_t[]"), constants().STRIP
        self._set_threads()

    def _recorded(self, cache: Tensor, vocab_size: int, num_adapters: int) -> CData:
        """struct Step *, with what is the same in every step."""
        fields = {
            "type": type_of(self.dtype),
            "heads": self.spec.num_heads,
            "kv_heads": self.spec.num_kv_heads,
            "head_dim": self.spec.head_dim,
            "capacity": self._capacity,
            "max_tokens": self._max_tokens,
            "num_slots": cache.shape[2],
            "vocab_size": vocab_size,
            "num_adapters": num_adapters,
        }
        return ffi().new("struct Step *", fields)

    def run(
        self,
        token_ids: Sequence[int],
        positions: Sequence[int],
        slots: Sequence[int],
        group_starts: Sequence[int],
        adapters: Sequence[int] | None = None,
    ) -> Tensor:
        """All layers for a flat batch of up to ``max_tokens`` rows; the residual stream [T, H] in
        fp32, overwritten by the next call.

        Rows that are neighbours in one slot may form a group (``group_starts``, with the end).
        adapters: of each row, -1 for none.
        """
        starts, lengths, chosen = (
            _strips(adapters, self._strip) if adapters and self._adapted else ([], [], [])
        )
        new, ints, step = ffi().new, self._ints, self._step
        # C arrays, held until the kernels have read them
        inputs = [
            new(ints, x)
            for x in (token_ids, positions, slots, group_starts, starts, lengths, chosen)
        ]
        step.token_ids, step.positions, step.slots, step.group_starts = inputs[:4]
        step.strip_starts, step.strip_lengths, step.strip_adapters = inputs[4:]
        step.tokens, step.groups, step.strips = len(token_ids), len(group_starts) - 1, len(starts)
        self._call(self._ops.body, len(token_ids))
        return self._ops.residual[: len(token_ids)]

    def logits(self, hidden: Tensor) -> Tensor:
        """Rows of what ``run`` returned [n, H] -> fp32 [n, V], overwritten by the next call."""
        if len(self._logits) < len(hidden):
            self._logits = torch.empty(len(hidden), self.spec.vocab_size)
        self._finish(hidden, constants().LOGITS, self._logits)
        return self._logits[: len(hidden)]

    def greedy(self, hidden: Tensor) -> list[int]:
        """The likeliest token after each row [n, H]; of equals the first."""
        self._finish(hidden, constants().GREEDY, None)
        return self._greedy[: len(hidden)].tolist()

    def _finish(self, hidden: Tensor, mode: int, out: Tensor | None) -> None:
        hidden = hidden.contiguous()
        head, step = self._ops.head, self._step
        norm, product = head[0], head[1]
        norm.a, product.mode, product.out = pointer(hidden), mode, pointer(out)
        step.outputs, step.tokens, step.groups, step.strips = len(hidden), 0, 0, 0
        self._call(head, len(hidden))

    def _call(self, ops: CData, rows: int) -> None:
        if self._threads != torch.get_num_threads():
            self._set_threads()
        # Threads that have less to do than they need to meet cost more than they bring, above all
        # on busy cores.
        wanted = rows * self.spec.num_matmul_params // PARAMS_PER_THREAD
        self._step.threads = max(1, min(self._threads, wanted))
        profiled = recorder()
        seconds = ffi().NULL if profiled is None else ffi().new("double[]", len(kinds()))
        self._step.seconds = seconds
        replay(self._kernels, ops, self._step)
        if profiled is not None:
            for name, value in zip(kinds(), seconds, strict=True):
                profiled.add(name, value)

    def _set_threads(self) -> None:
        self._threads = threads = torch.get_num_threads()
        scores, low = max_queries(self.dtype) * self._capacity, self._strip * self._ops.max_rank
        # + 64: threads share no cache line
        floats = max(scores, widest(self.spec), low) + 64
        self._scratch = torch.zeros(threads, floats)
        self._greedy = torch.zeros(self._max_tokens, dtype=torch.int32)
        self._best = torch.zeros(2, threads, self._max_tokens)  # value and id of each thread
        step = self._step
        step.scratch_floats, step.scratch = floats, pointer(self._scratch)
        step.greedy, step.greedy_value = pointer(self._greedy), pointer(self._best[0])
        step.greedy_id = pointer(self._best[1])


def group_size(spec: ModelSpec, dtype: torch.dtype) -> int:
    """Neighbouring rows of one slot that attend together."""
    return max(1, max_queries(dtype) // spec.group_size)


def _strips(adapters: Sequence[int], longest: int) -> tuple[list[int], list[int], list[int]]:
    """First row, length and adapter of runs of neighbouring rows with one adapter: [0, 0, -1, 1] ->
    ([0, 3], [2, 1], [0, 1])."""
    starts: list[int] = []
    lengths: list[int] = []
    chosen: list[int] = []
    previous = -1
    for row, adapter in enumerate(adapters):
        if adapter == previous and adapter >= 0 and lengths[-1] < longest:
            lengths[-1] += 1
        elif adapter >= 0:
            starts.append(row)
            lengths.append(1)
            chosen.append(adapter)
        previous = adapter
    return starts, lengths, chosen
