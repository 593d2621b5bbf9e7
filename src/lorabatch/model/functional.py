"""Norm, rotary embedding and activation with backward passes that save little.

Composed from torch's own operations, each of these keeps several fp32 copies of its input for the
backward pass; on CPUs they are made of many passes over memory. Here each saves its input (which
the next layer has saved anyway, or which is a view of it) and recomputes the rest. Weights are
frozen, so only input gradients exist. Plain references: ``tests/model/test_functional.py``.
At the other end of the model: the likeliest token.

Shapes: T tokens, H features, D head size, M intermediate size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lorabatch.kernels.train_ops import train_ops

Context = Any  # autograd's
NO_TOKEN = -1  # in a token's place where the logits are not numbers to choose by


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm (arXiv 1910.07467) over the last axis; fp32 inside, like transformers. In the
    weight's type, whatever that of x."""
    if torch.is_grad_enabled() and x.requires_grad:
        return _RmsNorm.apply(x, weight, eps)
    return _normalised(x, weight, eps)[0]


def _normalised(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(the result, 1 / root mean square [..., 1] in fp32), step by step as transformers computes
    it."""
    ops = train_ops(x) if x.dtype == weight.dtype else None
    # also for slices of wider rows: which way is taken must not depend on the number of rows
    if ops is not None:
        return ops.norm(x.contiguous(), weight, eps)
    wide = x.float()
    inverse = wide.pow(2).mean(-1, keepdim=True).add_(eps).rsqrt_()
    return (wide * inverse).to(weight.dtype) * weight, inverse


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y, inverse = _normalised(x, weight, eps)
        ctx.save_for_backward(x, weight, inverse)
        return y

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor, None, None]:
        x, weight, inverse = ctx.saved_tensors
        ops = train_ops(x) if x.dtype == weight.dtype else None
        if ops is not None:
            return ops.norm_grad(x.contiguous(), weight, inverse, grad.contiguous()), None, None
        scaled = (grad * weight).float()
        unit = x.float() * inverse  # not in place: in fp32, float() is x itself
        scaled.addcmul_(unit, (scaled * unit).mean(-1, keepdim=True), value=-1)
        return scaled.mul_(inverse).to(x.dtype), None, None


def swiglu(x: Tensor) -> Tensor:
    """``silu(gate) * up`` of [T, 2M] = [gate, up] (arXiv 2002.05202) -> [T, M]."""
    if torch.is_grad_enabled() and x.requires_grad:
        return _SwiGlu.apply(x)
    return _gated(x)


def _gated(x: Tensor) -> Tensor:
    ops = train_ops(x) if x.is_contiguous() else None
    if ops is not None:
        return ops.swiglu(x)
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


class _SwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return _gated(x)

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        ops = train_ops(x) if x.is_contiguous() else None
        if ops is not None:
            return ops.swiglu_grad(x, grad.contiguous())
        gate, up = x.chunk(2, dim=-1)
        out = torch.empty_like(x)
        gate_grad, up_grad = out.chunk(2, dim=-1)
        torch.mul(grad, F.silu(gate), out=up_grad)
        gate_grad.copy_(torch.ops.aten.silu_backward(grad * up, gate))
        return out


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding (arXiv 2104.09864), halves layout: x [T, heads, D], cos and sin [T,
    1, D / 2]."""
    if torch.is_grad_enabled() and x.requires_grad:
        return _Rotate.apply(x, cos, sin)
    return _rotated(x, cos, sin)


class _Rotate(torch.autograd.Function):
    """A rotation's gradient is the rotation by the opposite angle: nothing of x is saved."""

    @staticmethod
    def forward(ctx: Context, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin)

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotated(grad, cos, -sin), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    half = x.shape[-1] // 2
    torch.mul(first, cos, out=out[..., :half]).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=out[..., half:]).addcmul_(first, sin)
    return out


def likeliest(logits: Tensor) -> list[int]:
    """The token of the largest logit of each row [n, V]; NO_TOKEN where that is infinite or any is
    NaN, which counts as the largest."""
    return likeliest_ids(logits).tolist()


def likeliest_ids(logits: Tensor) -> Tensor:
    """The same as a tensor [n]."""
    ids = logits.argmax(dim=-1, keepdim=True)
    return ids.where(logits.gather(1, ids).isfinite(), NO_TOKEN).squeeze(1)
