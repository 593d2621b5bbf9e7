"""A decoder's forward step as a recorded program for the CPU kernels (``lorabatch/kernels/step.cpp``).

What a CUDA graph is to a GPU: the operations, their weights and their buffers are fixed once; a step only
fills in token ids, positions and slots, and replays everything with one call. No Python runs between two layers.

Shapes: T tokens of the step, H hidden size, N query heads, K key/value heads, D head size, S slots, C positions of a slot.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from lorabatch.kernels import library
from lorabatch.model.decoder import Decoder, Layer, Norm
from lorabatch.model.linear import FrozenLinear
from lorabatch.model.spec import ModelSpec

EMBED, NORM, PRODUCT, STORE, ATTEND, ACTIVATE, QUANTISE = range(7)
OVERWRITE, ADD_TO_RESIDUAL, LOGITS, GREEDY = range(4)
PANEL, PAGE, MAX_QUERIES = 48, 64, 6
HAS_BF16, HAS_INT8 = 1, 2


class _Op(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("kind", "mode", "weight", "n", "k")),
        *((name, ctypes.c_void_p) for name in ("a", "b", "c", "d", "e", "out", "scales", "next")),
        ("value", ctypes.c_double),
    )


class _Step(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("bf16", "tokens", "outputs", "groups")),
        *((name, ctypes.c_void_p) for name in ("token_ids", "positions", "slots", "output_rows", "group_starts")),
        *((name, ctypes.c_int64) for name in ("heads", "kv_heads", "head_dim", "capacity", "threads", "scratch_floats")),
        *((name, ctypes.c_void_p) for name in ("scratch", "greedy", "greedy_value", "greedy_id", "seconds")),
    )


def unsupported(spec: ModelSpec, dtype: torch.dtype, *, quantize: str = "none") -> str | None:
    """Why this model cannot run as a program on this machine; None if it can."""
    kernels = library("step")
    if kernels is None:
        return "no kernels on this machine"
    features = int(kernels.lb_features())
    if dtype not in (torch.float32, torch.bfloat16) or (dtype == torch.bfloat16 and not features & HAS_BF16):
        return f"no kernel for {dtype}"
    if quantize == "int8" and not features & HAS_INT8:
        return "this processor has no 8-bit dot products (AVX512-VNNI)"
    if spec.family == "gpt2" and spec.activation == "gelu":
        return "the exact GELU has no kernel"
    sizes = (spec.hidden_size, spec.intermediate_size, spec.num_heads * spec.head_dim)
    if any(size % 4 for size in sizes) or spec.head_dim % 16 or spec.head_dim > 512:
        return f"sizes {sizes} or heads of {spec.head_dim} do not fit the kernels"
    return None


@dataclass(frozen=True)
class PackedWeight:
    """A weight [O, I] in the kernels' panels. int8: also one scale per row, and 128 times the sum of each row's values."""

    panels: Tensor
    scales: Tensor | None
    sums: Tensor | None


def pack(weight: Tensor, *, quantize: str) -> PackedWeight:
    """int8: symmetric per output row, the largest magnitude becomes 127."""
    rows = -(-weight.shape[0] // PANEL) * PANEL
    if quantize == "none":
        return PackedWeight(_panels(weight, rows), None, None)
    wide = weight.float()
    scales = wide.abs().amax(dim=1) / 127
    values = (wide / scales.clamp(min=1e-30)[:, None]).round().to(torch.int8)
    padded = torch.zeros(2, rows)
    padded[0, : len(scales)], padded[1, : len(scales)] = scales, 128 * values.sum(dim=1, dtype=torch.float32)
    return PackedWeight(_panels(values, rows), padded[0].contiguous(), padded[1].to(torch.int32))


def _panels(values: Tensor, rows: int) -> Tensor:
    values = values.contiguous()
    out = torch.empty(rows, values.shape[1], dtype=values.dtype)
    kernels = library("step")
    assert kernels is not None  # ``unsupported`` was asked first
    count = [ctypes.c_int64(x) for x in (*values.shape, values.element_size())]
    kernels.lb_pack(ctypes.c_void_p(values.data_ptr()), *count, ctypes.c_void_p(out.data_ptr()))
    return out


class Program:
    """The recorded step of one decoder over one KV cache. ``run`` is not reentrant: it owns its buffers."""

    def __init__(self, decoder: Decoder, *, cache: Tensor, max_tokens: int, max_outputs: int, quantize: str = "none") -> None:
        """cache: [layers, 2, S, K, C, D], only its memory is used; max_tokens, max_outputs: the largest step."""
        self.spec, self.dtype, self.quantize = decoder.spec, decoder.dtype, quantize
        spec = self.spec
        self.capacity, self.max_tokens, self.max_outputs = cache.shape[4], max_tokens, max_outputs
        self._keep: list[Any] = [cache]  # what the recorded pointers point to
        kernels = library("step")
        assert kernels is not None
        self._run = kernels.lb_run
        self._run.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p)
        width = max(spec.hidden_size, spec.intermediate_size, spec.num_heads * spec.head_dim)
        qkv = (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim
        gate = spec.intermediate_size * (2 if spec.family == "llama" else 1)
        self._residual = self._buffer(max_tokens, spec.hidden_size, dtype=torch.float32)
        self._wide = self._buffer(max_tokens, max(qkv, gate))
        self._narrow = self._buffer(max_tokens, width)
        self._bytes = self._buffer(max_tokens, width, dtype=torch.uint8)
        self._scales = self._buffer(max_tokens, 16, dtype=torch.float32)  # RowScale of step.cpp
        self._logits: Tensor | None = None
        self._ops: list[_Op] = []
        self._record(decoder, cache)
        self._body = (_Op * len(self._ops))(*self._ops)
        self._head = {mode: self._head_ops(decoder, mode) for mode in (LOGITS, GREEDY)}
        self._step = _Step(bf16=int(self.dtype == torch.bfloat16), heads=spec.num_heads, kv_heads=spec.num_kv_heads)
        self._step.head_dim, self._step.capacity = spec.head_dim, self.capacity
        self._set_threads()

    def run(self, token_ids: Sequence[int], positions: Sequence[int], slots: Sequence[int], group_starts: Sequence[int]) -> None:
        """All layers for a flat batch. Rows that are neighbours in one slot may form a group (``group_starts``, with the end)."""
        if self._step.threads != torch.get_num_threads():
            self._set_threads()
        self._inputs = [torch.tensor(x, dtype=torch.int32) for x in (token_ids, positions, slots, group_starts)]
        ids, places, where, groups = (t.data_ptr() for t in self._inputs)
        self._step.tokens, self._step.groups = len(token_ids), len(group_starts) - 1
        self._step.token_ids, self._step.positions, self._step.slots, self._step.group_starts = ids, places, where, groups
        self._call(self._body)

    def logits(self, rows: Sequence[int]) -> Tensor:
        """fp32 [len(rows), V] after the given rows of the last ``run``. The tensor is overwritten by the next call."""
        if self._logits is None:
            self._logits = torch.empty(self.max_outputs, self.spec.vocab_size)
            self._head[LOGITS][-1].out = self._logits.data_ptr()
        self._finish(rows, LOGITS)
        return self._logits[: len(rows)]

    def greedy(self, rows: Sequence[int]) -> list[int]:
        """The likeliest token after each of the given rows; of equals the first."""
        self._finish(rows, GREEDY)
        return self._greedy[: len(rows)].tolist()

    def _finish(self, rows: Sequence[int], mode: int) -> None:
        self._rows = torch.tensor(rows, dtype=torch.int32)
        self._step.outputs, self._step.output_rows = len(rows), self._rows.data_ptr()
        self._call(self._head[mode])

    def _call(self, ops: Any) -> None:
        self._run(ctypes.addressof(ops), len(ops), ctypes.addressof(self._step))

    def _set_threads(self) -> None:
        threads, spec = torch.get_num_threads(), self.spec
        floats = max(MAX_QUERIES * self.capacity, spec.intermediate_size, spec.hidden_size, spec.num_heads * spec.head_dim) + 64
        self._scratch = torch.zeros(threads, floats)
        self._greedy = torch.zeros(self.max_outputs, dtype=torch.int32)
        self._best = torch.zeros(2, threads, self.max_outputs)
        step = self._step
        step.threads, step.scratch_floats, step.scratch = threads, floats, self._scratch.data_ptr()
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
            self._ops.append(self._product(layer.qkv, OVERWRITE, out=qkv))
            norms = {}
            if layer.q_norm is not None and layer.k_norm is not None:
                norms = {"c": self._pointer(layer.q_norm.weight), "d": self._pointer(layer.k_norm.weight)}
            self._ops.append(_Op(kind=STORE, **place, **norms, e=turns, out=qkv.data_ptr(), value=spec.norm_eps))
            self._ops.append(
                _Op(kind=ATTEND, **place, c=qkv.data_ptr(), out=heads.data_ptr(), k=layer.window or 0, value=spec.head_dim**-0.5)
            )
            if self.quantize != "none":
                self._ops.append(self._rows_op(QUANTISE, n=spec.num_heads * spec.head_dim, a=heads))
            self._ops.append(self._product(layer.out, ADD_TO_RESIDUAL, out=x))
            self._ops.append(self._norm(layer.norm2))
            self._ops.append(self._product(layer.up, OVERWRITE, out=qkv))
            self._ops.append(self._rows_op(ACTIVATE, n=spec.intermediate_size, a=qkv, mode=int(spec.family == "llama")))
            self._ops.append(self._product(layer.down, ADD_TO_RESIDUAL, out=x))

    def _head_ops(self, decoder: Decoder, mode: int) -> Any:
        norm = self._norm(decoder.norm)
        norm.mode = 1
        if not hasattr(self, "_head_product"):
            self._head_product = self._product(decoder.head, mode, out=None)
        product = _Op.from_buffer_copy(self._head_product)
        product.mode = mode
        return (_Op * 2)(norm, product)

    def _rows_op(self, kind: int, *, n: int, a: Tensor, mode: int = 0) -> _Op:
        """An operation on rows whose result feeds the next product: 8 bits with scales, or the plain type."""
        quantised = self.quantize != "none"
        out = self._bytes if quantised else self._narrow
        return _Op(kind=kind, mode=mode, weight=int(quantised), n=n, a=a.data_ptr(), out=out.data_ptr(), scales=self._scales.data_ptr())

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
def group_size(spec: ModelSpec) -> int:
    """Neighbouring rows of one slot that attend together: as many as fill the kernel's registers."""
    return max(1, MAX_QUERIES // spec.group_size)
