"""Attention: what knows where sequences begin and end. To the decoder tokens are rows of a flat [T,
...] matrix.

Shapes: T tokens, L tokens of one sequence, S cache slots, C positions of a slot,
N query heads, K key/value heads, G = N / K, D head size.

The decoder calls an ``Attention`` object once per layer. ``PackedAttention`` is for training
and scoring; the KV cache of inference brings another (``lorabatch.infer.runners.kv_cache``).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from lorabatch.kernels.train_ops import TrainOps, train_ops
from lorabatch.model.functional import Context
from lorabatch.model.varlen import LOOP, Extents, attend_packed, ints, operator_for


class Attention(Protocol):
    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        """q [T, N, D], k and v [T, K, D] -> [T, N * D]."""


@dataclass(slots=True)  # one a row and step: frozen, it would take three times as long to make
class Segment:
    """Consecutive new tokens of one running sequence in one step of inference; never changed."""

    slot: int
    start: int  # tokens of the sequence that its slot holds already
    token_ids: Sequence[int]
    adapter: int = -1  # which of the adapters that are loaded; -1: none
    # hidden states wanted, of the last so many tokens (0: part of a prompt, not its last)
    num_logits: int = 1


class PackedAttention:
    """Causal attention within each document of a packed block; nothing crosses a boundary.

    One fused call per document: its cost is the sum of L², never T², and what a document gets is
    a function of its own rows alone. On NVIDIA GPUs one call for all documents (``varlen.py``).
    """

    def __init__(self, lengths: Sequence[int]) -> None:
        self.lengths = list(lengths)
        self._starts = torch.tensor([0, *itertools.accumulate(self.lengths)])
        self._extents: Extents | None = None

    def _on(self, device: torch.device) -> Extents:
        """The documents' places, copied to the device once for all layers."""
        if self._extents is None:
            starts = ints(self._starts.tolist(), device, torch.int32)
            longest = max(self.lengths)
            self._extents = Extents(starts, starts, None, longest, longest)
        return self._extents

    def whole(
        self, qkv: Tensor, heads: int, kv_heads: int, rope: tuple[Tensor, Tensor] | None
    ) -> Tensor | None:
        """Rotation and attention in one pass over qkv [T, (N + 2K) D], D in 64s, -> [T, N * D];
        None where there are no kernels."""
        ops = train_ops(qkv)
        if ops is None:
            return None
        cos, sin = rope if rope is not None else (None, None)
        if torch.is_grad_enabled() and qkv.requires_grad:
            return _PackedWhole.apply(qkv, cos, sin, self._starts, (heads, kv_heads), ops)
        return ops.attend(qkv.contiguous(), heads, kv_heads, rope, self._starts)[0]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        if operator_for(q.device, q.dtype, q.shape[2]) != LOOP:
            return attend_packed(q, k, v, self._on(q.device), window).flatten(1)
        if q.device.type == "cpu" and (window is None or max(self.lengths) <= window):
            if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
                return _PackedFlash.apply(q, k, v, self.lengths)
            return _packed_flash(q, k, v, self.lengths)[0]
        documents = (t.split(self.lengths) for t in (q, k, v))
        return torch.cat(
            [causal_attention(q1, k1, v1, window) for q1, k1, v1 in zip(*documents, strict=True)]
        )


class _PackedWhole(torch.autograd.Function):
    """The C++ kernel (``kernels/train.cpp``). Saves its input as the product made it, the output
    and a log-sum-exp per row and head."""

    @staticmethod
    def forward(
        ctx: Context,
        qkv: Tensor,
        cos: Tensor | None,
        sin: Tensor | None,
        starts: Tensor,
        heads: tuple[int, int],
        ops: TrainOps,
    ) -> Tensor:
        out, log_sums = ops.attend(
            qkv, *heads, None if cos is None or sin is None else (cos, sin), starts
        )
        ctx.save_for_backward(qkv, cos, sin, starts, out, log_sums)
        ctx.heads, ctx.ops = heads, ops
        return out

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor | None, ...]:
        qkv, cos, sin, starts, out, log_sums = ctx.saved_tensors
        rope = None if cos is None else (cos, sin)
        return (
            ctx.ops.attend_grad(qkv, *ctx.heads, rope, starts, out, log_sums, grad.contiguous()),
            None,
            None,
            None,
            None,
            None,
        )


class _PackedFlash(torch.autograd.Function):
    """torch's fused CPU attention, called once per document on views of the packed tensors.

    Through ``scaled_dot_product_attention`` each document would cost copies: shared key/value
    heads repeated, results concatenated, gradients split. Here they are read through a zero stride
    and written in place.
    """

    @staticmethod
    def forward(ctx: Context, q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
        out, log_sums = _packed_flash(q, k, v, lengths)
        ctx.save_for_backward(q, k, v, out, *log_sums)
        ctx.lengths = lengths
        return out

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, out, *log_sums = ctx.saved_tensors
        q_grad, k_grad, v_grad = (torch.empty(t.shape, dtype=t.dtype) for t in (q, k, v))
        documents = zip(
            *(
                t.split(ctx.lengths)
                for t in (q, k, v, out, grad.contiguous(), q_grad, k_grad, v_grad)
            ),
            log_sums,
            strict=True,
        )
        for q1, k1, v1, out1, grad1, q1_grad, k1_grad, v1_grad, log_sum in documents:
            groups = k1.shape[1]
            q4, k4, v4 = _grouped(q1, groups), _grouped(k1, groups, q1), _grouped(v1, groups, q1)
            out4, grad4 = (_grouped(t.view(q1.shape), groups) for t in (out1, grad1))
            dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                grad4, q4, k4, v4, out4, log_sum, 0.0, True
            )
            _grouped(q1_grad, groups).copy_(dq)
            k1_grad.copy_(dk.sum(1).transpose(0, 1))
            v1_grad.copy_(dv.sum(1).transpose(0, 1))
        return q_grad, k_grad, v_grad, None


def _packed_flash(
    q: Tensor, k: Tensor, v: Tensor, lengths: list[int]
) -> tuple[Tensor, list[Tensor]]:
    """(outputs [T, N * D], one log-sum-exp tensor a document)."""
    out = torch.empty(q.shape[0], q.shape[1] * q.shape[2], dtype=q.dtype)
    log_sums = []
    for q1, k1, v1, out1 in zip(*(t.split(lengths) for t in (q, k, v, out)), strict=True):
        groups = k1.shape[1]
        inputs = _grouped(q1, groups), _grouped(k1, groups, q1), _grouped(v1, groups, q1)
        result, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *inputs, 0.0, True
        )
        _grouped(out1.view(q1.shape), groups).copy_(result)
        log_sums.append(log_sum)
    return out, log_sums


def _grouped(x: Tensor, groups: int, like: Tensor | None = None) -> Tensor:
    """View one document's [L, heads, D] as [K, G, L, D]; keys and values (``like`` q) are shared by
    a zero stride."""
    length, heads, dim = x.shape
    view = x.view(length, groups, heads // groups, dim).permute(1, 2, 0, 3)
    return view if like is None else view.expand(groups, like.shape[1] // groups, length, dim)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, window: int | None = None) -> Tensor:
    """One sequence: q [L, N, D], k and v [L, K, D] -> [L, N * D]."""
    length, heads, _ = q.shape
    group = heads // k.shape[1]
    q, k, v = (t.transpose(0, 1).unsqueeze(0) for t in (q, k, v))  # [1, N or K, L, D]
    if group > 1 and not _fused_gqa(q.device.type):
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        group = 1
    mask = None
    if window is not None and length > window:
        rows = torch.arange(length, device=q.device)
        distance = rows[:, None] - rows[None, :]
        mask = (distance >= 0) & (distance < window)
    y = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=group > 1
    )
    return y[0].transpose(0, 1).reshape(length, -1)


@functools.cache
def _fused_gqa(device_type: str) -> bool:
    """CUDA's fused kernels take grouped heads in half precision only; elsewhere sharing is
    expanded."""
    return device_type == "cpu"
