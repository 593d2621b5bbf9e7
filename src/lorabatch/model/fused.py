"""Training's passes over memory in C++ (``kernels/train.cpp``), for CPUs that can; every caller has a plain form beside it.

``passes_for(x)`` says whether they serve a tensor; the methods take contiguous tensors of its type.

Shapes: T tokens, N query heads, K key/value heads, D head size, V vocabulary.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from lorabatch.errors import LorabatchError
from lorabatch.kernels import library
from lorabatch.model.panels import whole

MOST_RANKS = 256  # of all parts of a layer together; MAX_RANKS of train.cpp
CHECKED = ("attend", "lora", "lora_grad", "loss")  # these return whether the sizes that they were given fit together


def _fits(result: int, function: Any, arguments: Any) -> None:
    if result:
        raise LorabatchError(
            f"{function.__name__} was given sizes that do not fit together", where="kernels", fix="this is an error of lorabatch"
        )


class _Block(ctypes.Structure):
    """As in train.cpp."""

    _fields_ = cast(
        "Any",
        [(n, ctypes.c_void_p) for n in ("q", "k", "v", "cos", "sin", "out", "log_sums", "grad", "q_grad", "k_grad", "v_grad", "starts")]
        + [(n, ctypes.c_int64) for n in ("documents", "tokens", "heads", "kv_heads", "head_dim", "stride", "grad_stride")]
        + [("scale", ctypes.c_double), ("threads", ctypes.c_int64)],
    )


class Part(ctypes.Structure):
    """One adapter of a fused layer, as in train.cpp."""

    _fields_ = cast(
        "Any",
        [("a", ctypes.c_void_p), ("b", ctypes.c_void_p), ("start", ctypes.c_int64), ("width", ctypes.c_int64), ("scale", ctypes.c_double)],
    )


class _Adapters(ctypes.Structure):
    _fields_ = cast(
        "Any",
        [("parts", ctypes.POINTER(Part)), *((n, ctypes.c_int64) for n in ("count", "rank", "in_", "out", "tokens", "threads"))],
    )


class Passes:
    """The library's functions for one type of number."""

    def __init__(self, lib: ctypes.CDLL, dtype: torch.dtype) -> None:
        pointer, count, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double
        self._functions = {}
        for name, arguments in {
            "attend": [ctypes.POINTER(_Block), count],
            "norm": [pointer, pointer, real, pointer, pointer, count, count, count],
            "norm_grad": [pointer, pointer, pointer, pointer, pointer, count, count, count],
            "swiglu": [pointer, pointer, pointer, count, count, count],
            "lora": [ctypes.POINTER(_Adapters), pointer, pointer, pointer],
            "lora_grad": [ctypes.POINTER(_Adapters)] + 7 * [pointer],
            "loss": [pointer, pointer, pointer, count, count, count, real, real, count],
        }.items():
            function = getattr(lib, f"lb_{name}_{str(dtype).removeprefix('torch.')}")  # AttributeError: not built for this type
            function.argtypes = arguments
            if name in CHECKED:
                function.restype, function.errcheck = count, _fits
            else:
                function.restype = None
            self._functions[name] = function

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """RMSNorm over the last axis: (the result, 1 / root mean square [..., 1] in fp32)."""
        y, inverse = torch.empty_like(x), torch.empty(*x.shape[:-1], 1)
        columns = x.shape[-1]
        self._functions["norm"](
            x.data_ptr(), weight.data_ptr(), eps, y.data_ptr(), inverse.data_ptr(), x.numel() // columns, columns, torch.get_num_threads()
        )
        return y, inverse

    def norm_grad(self, x: Tensor, weight: Tensor, inverse: Tensor, grad: Tensor) -> Tensor:
        out, columns = torch.empty_like(x), x.shape[-1]
        pointers = (t.data_ptr() for t in (x, weight, inverse, grad, out))
        self._functions["norm_grad"](*pointers, x.numel() // columns, columns, torch.get_num_threads())
        return out

    def swiglu(self, x: Tensor) -> Tensor:
        out = torch.empty(x.shape[0], x.shape[1] // 2, dtype=x.dtype)
        self._functions["swiglu"](x.data_ptr(), None, out.data_ptr(), *out.shape, torch.get_num_threads())
        return out

    def swiglu_grad(self, x: Tensor, grad: Tensor) -> Tensor:
        out = torch.empty_like(x)
        self._functions["swiglu"](x.data_ptr(), grad.data_ptr(), out.data_ptr(), *grad.shape, torch.get_num_threads())
        return out

    def loss_rows(self, logits: Tensor, targets: Tensor, *, replace: bool, smoothing: float, z: float) -> Tensor:
        """Loss of each row [n] in fp32; with ``replace`` its gradient takes the place of the logits [n, V]."""
        loss = torch.empty(logits.shape[0])
        pointers = (t.data_ptr() for t in (logits, targets, loss))
        self._functions["loss"](*pointers, *logits.shape, replace, smoothing, z, torch.get_num_threads())
        return loss

    def lora(self, parts: Sequence[Part], rank: int, x: Tensor, y: Tensor) -> Tensor:
        """Adds ``scale (x Aᵀ) Bᵀ`` of each part to its columns of y [T, O]; returns x Aᵀ of all parts, each as wide as r rounded up to 16s."""
        low = torch.empty(x.shape[0], len(parts) * whole(rank, 16), dtype=x.dtype)
        self._functions["lora"](_adapters(parts, rank, x, y), x.data_ptr(), low.data_ptr(), y.data_ptr())
        return low

    def lora_grad(
        self, parts: Sequence[Part], rank: int, x: Tensor, low: Tensor, grad: Tensor, x_grad: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """(gradients of all A [parts * r, I], of all B one after another, flat), fp32; adds the adapters' share to x_grad [T, I]."""
        a_grad, b_grads = torch.empty(len(parts) * rank, x.shape[1]), torch.empty(rank * sum(p.width for p in parts))
        low_grad = torch.empty_like(low)
        pointers = (t.data_ptr() for t in (x, low, grad, low_grad))
        self._functions["lora_grad"](
            _adapters(parts, rank, x, grad), *pointers, None if x_grad is None else x_grad.data_ptr(), a_grad.data_ptr(), b_grads.data_ptr()
        )
        return a_grad, b_grads

    def attend(self, qkv: Tensor, heads: int, kv_heads: int, rope: tuple[Tensor, Tensor] | None, starts: Tensor) -> tuple[Tensor, Tensor]:
        """qkv [T, (N + 2K) D], rope each [T, 1, D / 2], starts [documents + 1] -> (outputs [T, N D], log-sum-exps [N, T])."""
        head_dim = qkv.shape[1] // (heads + 2 * kv_heads)
        out, log_sums = torch.empty(qkv.shape[0], heads * head_dim, dtype=qkv.dtype), torch.empty(heads, qkv.shape[0])
        block = self._block(qkv, heads, kv_heads, rope, starts, out, log_sums)
        self._functions["attend"](ctypes.byref(block), 0)
        return out, log_sums

    def attend_grad(
        self,
        qkv: Tensor,
        heads: int,
        kv_heads: int,
        rope: tuple[Tensor, Tensor] | None,
        starts: Tensor,
        out: Tensor,
        log_sums: Tensor,
        grad: Tensor,
    ) -> Tensor:
        """grad [T, N D] of the outputs -> the gradient of qkv."""
        qkv_grad = torch.empty_like(qkv)
        block = self._block(qkv, heads, kv_heads, rope, starts, out, log_sums)
        block.grad, block.grad_stride = grad.data_ptr(), qkv.shape[1]
        block.q_grad, block.k_grad, block.v_grad = _places(qkv_grad, heads, kv_heads)
        self._functions["attend"](ctypes.byref(block), 1)
        return qkv_grad

    @staticmethod
    def _block(
        qkv: Tensor, heads: int, kv_heads: int, rope: tuple[Tensor, Tensor] | None, starts: Tensor, out: Tensor, log_sums: Tensor
    ) -> _Block:
        head_dim = qkv.shape[1] // (heads + 2 * kv_heads)
        block = _Block(
            documents=len(starts) - 1, tokens=qkv.shape[0], heads=heads, kv_heads=kv_heads, head_dim=head_dim, stride=qkv.shape[1]
        )
        block.q, block.k, block.v = _places(qkv, heads, kv_heads)
        if rope is not None:
            block.cos, block.sin = rope[0].data_ptr(), rope[1].data_ptr()
        block.out, block.log_sums, block.starts = out.data_ptr(), log_sums.data_ptr(), starts.data_ptr()
        block.scale, block.threads = head_dim**-0.5, torch.get_num_threads()
        return block


def _adapters(parts: Sequence[Part], rank: int, x: Tensor, y: Tensor) -> _Adapters:
    array = (Part * len(parts))(*parts)
    return _Adapters(array, len(parts), rank, x.shape[1], y.shape[1], x.shape[0], torch.get_num_threads())


def _places(qkv: Tensor, heads: int, kv_heads: int) -> Sequence[int]:
    """Addresses of the first query, key and value head."""
    bytes_per_head = qkv.shape[1] // (heads + 2 * kv_heads) * qkv.element_size()
    return [qkv.data_ptr() + n * bytes_per_head for n in (0, heads, heads + kv_heads)]


def passes_for(x: Tensor) -> Passes | None:
    return _passes(x.dtype) if x.device.type == "cpu" else None


@functools.cache
def _passes(dtype: torch.dtype) -> Passes | None:
    lib = library("train")
    try:
        return None if lib is None else Passes(lib, dtype)
    except AttributeError:
        return None
