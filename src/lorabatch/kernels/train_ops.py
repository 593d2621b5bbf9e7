"""Training's passes over memory in C++ (``kernels/train.cpp``), for CPUs that can; every caller has
a plain form beside it.

``train_ops(x)`` says whether they serve a tensor; the methods take contiguous tensors of its type.

Shapes: T tokens, N query heads, K key/value heads, D head size, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from lorabatch.errors import LorabatchError
from lorabatch.kernels import library
from lorabatch.kernels.api import CData, constants, ffi, pointer, type_of
from lorabatch.kernels.panels import whole
from lorabatch.spans import operation

Rope: TypeAlias = tuple[Tensor, Tensor]  # cosines and sines, each [T, 1, D / 2]


class LowRank(NamedTuple):
    """One adapter of a fused layer, as the kernels take it."""

    a: Tensor  # [r, I]
    b: Tensor  # [O of its part, r]
    start: int  # the first of its columns
    scale: float


def low_width(ranks: Iterable[int]) -> int:
    """Columns of x Aᵀ of adapters of these ranks: each is as wide as whole vectors."""
    return sum(whole(rank, constants().LOW_WIDTH) for rank in ranks)


class TrainOps:
    """The library's functions for one type of number."""

    def __init__(self, kernels: CData, dtype: torch.dtype) -> None:
        self._kernels, self._type = kernels, type_of(dtype)

    def _run(self, function: str, profiled_as: str, *arguments: CData) -> None:
        """Calls ``lb_train_<function>``; tensors (None: none) are passed by where they begin."""
        given = [pointer(x) if x is None or isinstance(x, Tensor) else x for x in arguments]
        with operation(profiled_as):
            misfit = getattr(self._kernels, f"lb_train_{function}")(self._type, *given)
        if misfit:
            raise LorabatchError(
                f"lb_train_{function} was given sizes that do not fit together",
                where="kernels",
                fix="this is an error of lorabatch",
            )

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """RMSNorm over the last axis: (the result, 1 / root mean square [..., 1] in fp32)."""
        y, inverse = torch.empty_like(x), torch.empty(*x.shape[:-1], 1)
        self._run("norm", "norms", x, weight, eps, y, inverse, *_rows(x), torch.get_num_threads())
        return y, inverse

    def norm_grad(self, x: Tensor, weight: Tensor, inverse: Tensor, grad: Tensor) -> Tensor:
        out, threads = torch.empty_like(x), torch.get_num_threads()
        self._run("norm_grad", "norms", x, weight, inverse, grad, out, *_rows(x), threads)
        return out

    def swiglu(self, x: Tensor) -> Tensor:
        out = torch.empty(x.shape[0], x.shape[1] // 2, dtype=x.dtype)
        self._run("swiglu", "activation", x, None, out, *out.shape, torch.get_num_threads())
        return out

    def swiglu_grad(self, x: Tensor, grad: Tensor) -> Tensor:
        out = torch.empty_like(x)
        self._run("swiglu", "activation", x, grad, out, *grad.shape, torch.get_num_threads())
        return out

    def loss_rows(
        self, logits: Tensor, targets: Tensor, *, replace: bool, smoothing: float, z: float
    ) -> Tensor:
        """Loss of each row [n] in fp32; with ``replace`` its gradient takes the place of the logits
        [n, V]."""
        loss, how = torch.empty(logits.shape[0]), (replace, smoothing, z, torch.get_num_threads())
        self._run("loss", "loss", logits, targets, loss, *logits.shape, *how)
        return loss

    def lora(self, parts: Sequence[LowRank], x: Tensor, y: Tensor) -> Tensor:
        """Adds ``scale (x Aᵀ) Bᵀ`` of each part to its columns of y [T, O]; returns x Aᵀ of all
        parts [T, low_width]. The parts have one rank."""
        low = torch.empty(x.shape[0], low_width(_ranks(parts)), dtype=x.dtype)
        structs = _parts(parts)
        self._run("lora", "adapters", _adapters(structs, parts, x, y), x, low, y)
        return low

    def lora_grad(
        self, parts: Sequence[LowRank], x: Tensor, low: Tensor, grad: Tensor, x_grad: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """(gradients of all A [parts * r, I], of all B one after another, flat), fp32; adds the
        adapters' share to x_grad [T, I]."""
        a_grad = torch.empty(sum(_ranks(parts)), x.shape[1])
        b_grads = torch.empty(sum(part.b.numel() for part in parts))
        structs = _parts(parts)
        adapters, low_grad = _adapters(structs, parts, x, grad), torch.empty_like(low)
        grads = (low_grad, x_grad, a_grad, b_grads)
        self._run("lora_grad", "adapters", adapters, x, low, grad, *grads)
        return a_grad, b_grads

    def attend(
        self, qkv: Tensor, heads: int, kv_heads: int, rope: Rope | None, starts: Tensor
    ) -> tuple[Tensor, Tensor]:
        """qkv [T, (N + 2K) D], starts [documents + 1] -> (outputs [T, N D], log-sum-exps [N,
        T])."""
        head_dim = qkv.shape[1] // (heads + 2 * kv_heads)
        out = torch.empty(qkv.shape[0], heads * head_dim, dtype=qkv.dtype)
        log_sums = torch.empty(heads, qkv.shape[0])
        block = _block(qkv, heads, kv_heads, rope, starts, out, log_sums)
        self._run("attend", "attention", block, 0)
        return out, log_sums

    def attend_grad(
        self,
        qkv: Tensor,
        heads: int,
        kv_heads: int,
        rope: Rope | None,
        starts: Tensor,
        out: Tensor,
        log_sums: Tensor,
        grad: Tensor,
    ) -> Tensor:
        """grad [T, N D] of the outputs -> the gradient of qkv."""
        qkv_grad = torch.empty_like(qkv)
        block = _block(qkv, heads, kv_heads, rope, starts, out, log_sums)
        block.grad, block.grad_stride = pointer(grad), qkv.shape[1]
        block.q_grad, block.k_grad, block.v_grad = _first_heads(qkv_grad, heads, kv_heads)
        self._run("attend", "attention", block, 1)
        return qkv_grad


def _rows(x: Tensor) -> tuple[int, int]:
    """Rows and columns of x [..., columns]."""
    return x.numel() // x.shape[-1], x.shape[-1]


def _ranks(parts: Sequence[LowRank]) -> list[int]:
    return [part.a.shape[0] for part in parts]


def _parts(parts: Sequence[LowRank]) -> CData:
    """struct Part []. Whoever points to it must hold it."""
    return ffi().new(
        "struct Part[]",
        [
            {
                "a": pointer(part.a),
                "b": pointer(part.b),
                "start": part.start,
                "width": part.b.shape[0],
                "scale": part.scale,
            }
            for part in parts
        ],
    )


def _adapters(structs: CData, parts: Sequence[LowRank], x: Tensor, y: Tensor) -> CData:
    """struct Adapters *, of a layer x [T, I] -> y [T, O]."""
    fields = {
        "parts": structs,
        "count": len(parts),
        "rank": parts[0].a.shape[0],
        "in": x.shape[1],
        "out": y.shape[1],
        "tokens": x.shape[0],
        "threads": torch.get_num_threads(),
    }
    return ffi().new("struct Adapters *", fields)


def _block(
    qkv: Tensor,
    heads: int,
    kv_heads: int,
    rope: Rope | None,
    starts: Tensor,
    out: Tensor,
    log_sums: Tensor,
) -> CData:
    """struct Block *, for the forward pass."""
    cos, sin = rope if rope is not None else (None, None)
    q, k, v = _first_heads(qkv, heads, kv_heads)
    head_dim = qkv.shape[1] // (heads + 2 * kv_heads)
    fields = {
        "q": q,
        "k": k,
        "v": v,
        "cos": pointer(cos),
        "sin": pointer(sin),
        "out": pointer(out),
        "log_sums": pointer(log_sums),
        "starts": pointer(starts),
        "documents": len(starts) - 1,
        "tokens": qkv.shape[0],
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "stride": qkv.shape[1],
        "scale": head_dim**-0.5,
        "threads": torch.get_num_threads(),
    }
    return ffi().new("struct Block *", fields)


def _first_heads(qkv: Tensor, heads: int, kv_heads: int) -> list[CData]:
    """Where the first query, key and value head begin."""
    head_dim = qkv.shape[1] // (heads + 2 * kv_heads)
    return [pointer(qkv[:, first * head_dim :]) for first in (0, heads, heads + kv_heads)]


def train_ops(x: Tensor) -> TrainOps | None:
    return _train_ops(x.dtype) if x.device.type == "cpu" else None


@functools.cache
def _train_ops(dtype: torch.dtype) -> TrainOps | None:
    kernels = library("train")
    try:
        return None if kernels is None else TrainOps(kernels, dtype)
    except KeyError:  # there is no such Type
        return None
