"""A decoder's forward step as a recorded program for the CPU kernels (``lorabatch/kernels/step.cpp``).

What a CUDA graph is to a GPU: the operations, their weights and their buffers are fixed once; a step only
fills in token ids, positions and slots, and replays everything with one call. No Python runs between two layers.

Shapes: T tokens of the step, H hidden size, N query heads, K key/value heads, D head size, S slots, C positions of a slot.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from lorabatch.errors import LorabatchError
from lorabatch.infer.packed import low_rank_bank, pack
from lorabatch.kernels import library
from lorabatch.model.decoder import Decoder, Layer, Norm
from lorabatch.model.linear import FrozenLinear
from lorabatch.model.lora import LoraWeights
from lorabatch.model.spec import ModelSpec

OPERATIONS = ("embedding", "norms", "products", "cache writes", "attention", "activation", "quantisation", "adapters")
EMBED, NORM, PRODUCT, STORE, ATTEND, ACTIVATE, QUANTISE, LOW_RANK = range(len(OPERATIONS))
OVERWRITE, ADD_TO_RESIDUAL, LOGITS, GREEDY = range(4)
PAGE, STRIP = 64, 8
MISFITS = ("", "tokens", "outputs", "token id", "position", "slot", "groups", "adapters")  # Misfit of step.cpp
PARAMS_PER_THREAD = 1 << 20  # multiplications that make another thread worth waking, about 10 us


class _Op(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("kind", "mode", "weight", "n", "k", "stride", "vectors")),
        *((name, ctypes.c_void_p) for name in ("a", "b", "c", "d", "e", "out", "scales", "plain")),
        ("value", ctypes.c_double),
    )


class _Step(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("bf16", "tokens", "outputs", "groups")),
        *((name, ctypes.c_void_p) for name in ("token_ids", "positions", "slots", "group_starts")),
        ("strips", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("strip_starts", "strip_lengths", "strip_adapters")),
        *((name, ctypes.c_int64) for name in ("heads", "kv_heads", "head_dim", "capacity", "threads", "scratch_floats")),
        *((name, ctypes.c_int64) for name in ("max_tokens", "num_slots", "vocab_size", "num_adapters")),
        *((name, ctypes.c_void_p) for name in ("scratch", "greedy", "greedy_value", "greedy_id", "seconds")),
    )


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
    if any(size % 4 for size in sizes) or spec.head_dim % 16 or spec.head_dim > 512:
        return f"sizes {sizes} or heads of {spec.head_dim} do not fit the kernels"
    return None


class Program:
    """The recorded step of one decoder over one KV cache. ``run`` is not reentrant: it owns its buffers."""

    seconds: ctypes.Array[ctypes.c_double] | None = None  # [OPERATIONS]: each adds its time here while lorabatch profile looks

    def __init__(
        self,
        decoder: Decoder,
        *,
        cache: Tensor,
        max_tokens: int,
        quantize: str = "none",
        adapters: Sequence[LoraWeights] = (),
    ) -> None:
        """cache: [layers, 2, S, K, C, D], only its memory is used; max_tokens: of the largest step; adapters: stay apart, chosen by row."""
        self.spec, self.dtype, self.quantize = decoder.spec, decoder.dtype, quantize
        spec = self.spec
        self.capacity, self.max_tokens, self._adapters = cache.shape[4], max_tokens, tuple(adapters)
        self._keep: list[Any] = [cache]  # what the recorded pointers point to
        kernels = library("step")
        assert kernels is not None
        self._run = kernels.lb_run
        self._run.argtypes, self._run.restype = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p), ctypes.c_int64
        width = max(spec.hidden_size, spec.intermediate_size, spec.num_heads * spec.head_dim)
        qkv = (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim
        gate = spec.intermediate_size * (2 if spec.family == "llama" else 1)
        self._residual = self._buffer(max_tokens, spec.hidden_size, dtype=torch.float32)
        self._wide = self._buffer(max_tokens, max(qkv, gate))
        self._narrow = self._buffer(max_tokens, width)
        self._bytes = self._buffer(max_tokens, width, dtype=torch.uint8)
        self._scales = self._buffer(max_tokens, 16, dtype=torch.float32)  # RowScale of step.cpp
        self._logits = torch.empty(0, spec.vocab_size)
        self._ops: list[_Op] = []
        self._max_rank = 0
        self._record(decoder, cache)
        self._body = (_Op * len(self._ops))(*self._ops)
        self._head = (_Op * 2)(self._norm(decoder.norm), self._product(decoder.head, LOGITS, out=None))
        self._head[0].mode = 1
        self._step = _Step(bf16=int(self.dtype == torch.bfloat16), heads=spec.num_heads, kv_heads=spec.num_kv_heads)
        self._step.head_dim, self._step.capacity = spec.head_dim, self.capacity
        self._step.max_tokens, self._step.num_slots = max_tokens, cache.shape[2]
        self._step.vocab_size, self._step.num_adapters = decoder.embedding.shape[0], len(adapters)
        self._set_threads()

    def run(
        self,
        token_ids: Sequence[int],
        positions: Sequence[int],
        slots: Sequence[int],
        group_starts: Sequence[int],
        adapters: Sequence[int] | None = None,
    ) -> Tensor:
        """All layers for a flat batch of up to ``max_tokens`` rows; the residual stream [T, H] in fp32, overwritten by the next call.

        Rows that are neighbours in one slot may form a group (``group_starts``, with the end). adapters: of each row, -1 for none.
        """
        strips = _strips(adapters) if adapters and self._adapters else ([], [], [])
        inputs = [torch.tensor(x, dtype=torch.int32) for x in (token_ids, positions, slots, group_starts, *strips)]
        step = self._step
        step.token_ids, step.positions, step.slots, step.group_starts, *rest = (t.data_ptr() for t in inputs)
        step.strip_starts, step.strip_lengths, step.strip_adapters = rest
        step.tokens, step.groups, step.strips = len(token_ids), len(group_starts) - 1, len(strips[0])
        self._call(self._body)
        return self._residual[: len(token_ids)]

    def logits(self, hidden: Tensor) -> Tensor:
        """Rows of what ``run`` returned [n, H] -> fp32 [n, V], overwritten by the next call."""
        if len(self._logits) < len(hidden):
            self._logits = torch.empty(len(hidden), self.spec.vocab_size)
        self._finish(hidden, LOGITS, self._logits)
        return self._logits[: len(hidden)]

    def greedy(self, hidden: Tensor) -> list[int]:
        """The likeliest token after each row [n, H]; of equals the first."""
        self._finish(hidden, GREEDY, None)
        return self._greedy[: len(hidden)].tolist()

    def _finish(self, hidden: Tensor, mode: int, out: Tensor | None) -> None:
        hidden = hidden.contiguous()
        norm, product = self._head
        norm.a, product.mode, product.out = hidden.data_ptr(), mode, None if out is None else out.data_ptr()
        step = self._step
        step.outputs, step.tokens, step.groups, step.strips = len(hidden), 0, 0, 0
        self._call(self._head)

    def _call(self, ops: Any) -> None:
        if self._threads != torch.get_num_threads():
            self._set_threads()
        rows = self._step.outputs if ops is self._head else self._step.tokens
        # Threads that have less to do than they need to meet cost more than they bring, above all on busy cores.
        self._step.threads = max(1, min(self._threads, rows * self.spec.num_matmul_params // PARAMS_PER_THREAD))
        self._step.seconds = None if self.seconds is None else ctypes.addressof(self.seconds)
        wrong = self._run(ctypes.addressof(ops), len(ops), ctypes.addressof(self._step))
        if wrong:  # found before anything was read or written
            raise LorabatchError(
                f"a step does not fit what was recorded: {MISFITS[wrong]}", where="kernels", fix="this is an error of lorabatch"
            )

    def _set_threads(self) -> None:
        threads, spec = torch.get_num_threads(), self.spec
        self._threads = threads
        wide = max(spec.intermediate_size, spec.hidden_size, spec.num_heads * spec.head_dim)
        floats = max(max_queries(self.dtype) * self.capacity, wide, STRIP * self._max_rank) + 64  # + 64: threads share no cache line
        self._scratch = torch.zeros(threads, floats)
        self._greedy = torch.zeros(self.max_tokens, dtype=torch.int32)
        self._best = torch.zeros(2, threads, self.max_tokens)
        step = self._step
        step.scratch_floats, step.scratch = floats, self._scratch.data_ptr()
        step.greedy, step.greedy_value, step.greedy_id = self._greedy.data_ptr(), self._best[0].data_ptr(), self._best[1].data_ptr()

    def _buffer(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        buffer = torch.zeros(*shape, dtype=dtype or self.dtype)
        self._keep.append(buffer)
        return buffer

    def _pointer(self, tensor: Tensor | None) -> int | None:
        if tensor is None:
            return None
        self._keep.append(tensor)
        return tensor.data_ptr()

    def _record(self, decoder: Decoder, cache: Tensor) -> None:
        spec = self.spec
        x, qkv, heads = self._residual, self._wide, self._narrow
        self._ops.append(
            _Op(
                kind=EMBED,
                n=spec.hidden_size,
                a=self._pointer(decoder.embedding),
                b=self._pointer(decoder.position_embedding),
                out=x.data_ptr(),
            )
        )
        turns = self._pointer(rope_table(decoder, self.capacity))
        for index, layer in enumerate(cast("list[Layer]", list(decoder.layers))):
            place = {"a": cache[index, 0].data_ptr(), "b": cache[index, 1].data_ptr()}
            self._ops.append(self._norm(layer.norm1))
            self._linear(layer.qkv, OVERWRITE, out=qkv)
            norms = {}
            if layer.q_norm is not None and layer.k_norm is not None:
                norms = {"c": self._pointer(layer.q_norm.weight), "d": self._pointer(layer.k_norm.weight)}
            self._ops.append(_Op(kind=STORE, **place, **norms, e=turns, out=qkv.data_ptr(), value=spec.norm_eps))
            self._ops.append(
                _Op(kind=ATTEND, **place, c=qkv.data_ptr(), out=heads.data_ptr(), k=layer.window or 0, value=spec.head_dim**-0.5)
            )
            if self.quantize != "none":
                self._ops.append(self._rows_op(QUANTISE, n=spec.num_heads * spec.head_dim, a=heads))
            self._linear(layer.out, ADD_TO_RESIDUAL, out=x)
            self._ops.append(self._norm(layer.norm2))
            self._linear(layer.up, OVERWRITE, out=qkv)
            self._ops.append(self._rows_op(ACTIVATE, n=spec.intermediate_size, a=qkv, mode=int(spec.family == "llama")))
            self._linear(layer.down, ADD_TO_RESIDUAL, out=x)

    def _linear(self, layer: FrozenLinear, mode: int, *, out: Tensor) -> None:
        """The product, then what the rows' adapters add to it."""
        self._ops.append(self._product(layer, mode, out=out))
        for part in layer.parts if self._adapters else ():
            bank = low_rank_bank(part, layer.in_features, self._adapters, self.dtype)
            if bank is not None:
                self._keep.append(bank)
                self._max_rank = max(self._max_rank, bank.rank)
                self._ops.append(
                    _Op(
                        kind=LOW_RANK,
                        mode=mode,
                        weight=bank.rank,
                        n=part.stop - part.start,
                        k=layer.in_features,
                        stride=layer.out_features,
                        vectors=bank.vectors,
                        a=self._narrow.data_ptr(),
                        b=bank.a.data_ptr(),
                        c=bank.b.data_ptr(),
                        out=out.data_ptr() + part.start * out.element_size(),
                    )
                )

    def _rows_op(self, kind: int, *, n: int, a: Tensor, mode: int = 0) -> _Op:
        """An operation on rows whose result feeds the next product: 8 bits with scales, or the plain type."""
        quantised = self.quantize != "none"
        out = self._bytes if quantised else self._narrow
        op = _Op(kind=kind, mode=mode, weight=int(quantised), n=n, a=a.data_ptr(), out=out.data_ptr(), scales=self._scales.data_ptr())
        if quantised and self._adapters and kind != QUANTISE:
            op.plain = self._narrow.data_ptr()
        return op

    def _norm(self, norm: Norm) -> _Op:
        op = self._rows_op(NORM, n=self.spec.hidden_size, a=self._residual)
        op.b, op.c, op.value = self._pointer(norm.weight), self._pointer(norm.bias), norm.eps
        return op

    def _product(self, layer: FrozenLinear, mode: int, *, out: Tensor | None) -> _Op:
        packed = pack(layer.product.weight, quantize=self.quantize)  # type: ignore[attr-defined]
        self._keep.append(packed)
        quantised = packed.scales is not None
        return _Op(
            kind=PRODUCT,
            mode=mode,
            weight=int(quantised),
            n=layer.out_features,
            k=layer.in_features,
            a=(self._bytes if quantised else self._narrow).data_ptr(),
            b=packed.panels.data_ptr(),
            c=self._pointer(packed.scales),
            d=self._pointer(packed.sums),
            e=self._pointer(layer.bias),
            out=None if out is None else out.data_ptr(),
            scales=self._scales.data_ptr(),
        )


def rope_table(decoder: Decoder, positions: int) -> Tensor | None:
    """[positions, D]: cosines then sines of every position, rounded as the plain path rounds them; None with learned positions."""
    if decoder.position_embedding is not None:
        return None
    cos, sin = decoder._rope(torch.arange(positions))
    return torch.cat([cos, sin], dim=-1)[:, 0].float().contiguous()


@functools.cache
def max_queries(dtype: torch.dtype) -> int:
    """Query vectors that attend together: as many as fill the kernel's registers, or a tile."""
    kernels = library("step")
    return int(kernels.lb_max_queries(int(dtype == torch.bfloat16))) if kernels is not None else 1


def group_size(spec: ModelSpec, dtype: torch.dtype) -> int:
    """Neighbouring rows of one slot that attend together."""
    return max(1, max_queries(dtype) // spec.group_size)


def _strips(adapters: Sequence[int]) -> tuple[list[int], list[int], list[int]]:
    """First row, length and adapter of runs of up to STRIP neighbouring rows with one adapter: [0, 0, -1, 1] -> ([0, 3], [2, 1], [0, 1])."""
    starts: list[int] = []
    lengths: list[int] = []
    chosen: list[int] = []
    previous = -1
    for row, adapter in enumerate(adapters):
        if adapter == previous and adapter >= 0 and lengths[-1] < STRIP:
            lengths[-1] += 1
        elif adapter >= 0:
            starts.append(row)
            lengths.append(1)
            chosen.append(adapter)
        previous = adapter
    return starts, lengths, chosen
