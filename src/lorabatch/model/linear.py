"""Frozen linear layers, and the low-rank adapters that train on top of them.

Shapes: T tokens of the flat stream, I input features, O output features, r rank.

A layer may be several layers of the checkpoint in one product (q, k and v; gate and up). Each
``Part`` keeps its own name and its own adapter, so files look as if nothing had been fused.

The product itself sits behind small classes with the same two methods: ``Dense`` (torch's
linear, any device), ``Prepacked`` (oneDNN's blocked layout, CPU), ``Panels`` (our own kernels; panels.py)
and those of quantised.py and sharded.py. Which one serves depends on the device, the number type and the sizes of
the weight, never on the number of rows: a row's bits must not depend on its neighbours.
On the development machine (Zen 4, two cores) prepacking gave 1.1 to 2.2 times the rate of ``F.linear``, and rows whose value does
not depend on how many other rows there are, from two rows on (docs/LOG.md, 2026-11-24). oneDNN's bf16 product on AMX does not
keep that promise: there ``Panels`` serve.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorabatch.model import fused
from lorabatch.model.fused import MOST_RANKS, Passes, passes_for
from lorabatch.model.panels import Panels, whole

Before = Callable[[Tensor], Tensor]  # a frozen function of each row that is cheap to compute again: a norm, an activation


@dataclass(frozen=True)
class Part:
    """One linear layer of the checkpoint: its path there, and its rows ``start:stop`` of the fused weight."""

    path: str
    start: int
    stop: int


class Product(Protocol):
    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """[T, I] -> [T, O]: x Wᵀ + bias."""

    def input_grad(self, grad: Tensor) -> Tensor:
        """[T, O] -> [T, I]: grad W."""


class Dense:
    def __init__(self, weight: Tensor) -> None:
        self.weight = weight  # [O, I]

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, self.weight, bias)

    def input_grad(self, grad: Tensor) -> Tensor:
        return grad @ self.weight


class Prepacked:
    """Weights in oneDNN's blocked layout; the transposed pack is made at the first backward pass."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self._packed = _pack(weight)
        self._packed_transposed: Tensor | None = None

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return _packed_linear(x, self._packed, bias)

    def input_grad(self, grad: Tensor) -> Tensor:
        if self._packed_transposed is None:
            self._packed_transposed = _pack(self.weight.t().contiguous())
        return _packed_linear(grad, self._packed_transposed, None)


def _pack(weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight, 64)


def _packed_linear(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    # A single row takes another kernel whose sums are ordered differently; two rows do not.
    if x.shape[0] == 1:
        return torch.ops.mkldnn._linear_pointwise(x.expand(2, -1).contiguous(), packed, bias, "none", [], "")[:1]
    return torch.ops.mkldnn._linear_pointwise(x.contiguous(), packed, bias, "none", [], "")


def packed_product(weight: Tensor) -> Product:
    """The fastest product on a CPU that gives each row bits of its own, as far as there is one."""
    if Panels.serve(weight):
        return Panels(weight)
    return Prepacked(weight) if can_prepack(weight.dtype) else Dense(weight)


@functools.cache
def rows_are_independent(dtype: torch.dtype) -> bool:
    """Whether a row of ``packed_product`` on this CPU has the same bits whatever the number of rows: measured, on sizes where oneDNN's bf16
    product on AMX failed (docs/LOG.md, 2026-11-29)."""
    generator = torch.Generator().manual_seed(0)
    for inputs, outputs in ((576, 1536), (1536, 576)):
        weight, x = (torch.randn(n, inputs, generator=generator).to(dtype) for n in (outputs, 256))
        product = packed_product(weight)
        whole = product.forward(x, None)
        if not all(torch.equal(product.forward(x[:rows], None), whole[:rows]) for rows in (1, 5, 31, 64, 100)):
            return False
    return True


@functools.cache
def can_prepack(dtype: torch.dtype) -> bool:
    """Whether this torch build has the private oneDNN operators and they agree with ``F.linear``."""
    if dtype not in (torch.float32, torch.bfloat16):
        return False
    try:
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(48, 32, generator=generator).to(dtype)
        x = torch.randn(5, 32, generator=generator).to(dtype)
        got, expected = Prepacked(weight).forward(x, None), F.linear(x, weight)
    except (RuntimeError, AttributeError, NotImplementedError):
        return False
    return torch.allclose(got, expected, rtol=2e-2, atol=2e-1 if dtype == torch.bfloat16 else 1e-4)


class Adapter(nn.Module):
    """The low-rank update ``scale * B A`` of one part. Source: LoRA, arXiv 2106.09685."""

    def __init__(self, a: Tensor, b: Tensor, scale: float) -> None:
        super().__init__()
        self.a = nn.Parameter(a)  # [r, I], fp32
        self.b = nn.Parameter(b)  # [O of the part, r], fp32
        self.scale = scale


Adapted = Sequence[tuple[Part, Adapter]]  # parts of a layer that have an adapter


class FrozenLinear(nn.Module):
    """``y = x Wᵀ + bias`` with a weight that never gets a gradient, plus the adapters of its parts."""

    def __init__(self, weight: Tensor, bias: Tensor | None, parts: Sequence[Part], *, prepack: bool) -> None:
        super().__init__()
        self.parts = tuple(parts)
        self.bias = bias
        self.in_features, self.out_features = weight.shape[1], weight.shape[0]
        self.product: Product = packed_product(weight) if prepack else Dense(weight)
        self.adapters = nn.ModuleDict()  # key: index of the part, as a string
        self.dropout = 0.0

    def forward(self, x: Tensor, before: Before | None = None) -> Tensor:
        """x [T, I] -> [T, O]. With ``before``, of ``before(x)``: then x is what is kept for the backward pass, not ``before(x)``."""
        if self.adapters:
            adapted = self._adapted()
            tensors = [t for _, adapter in adapted for t in (adapter.a, adapter.b)]
            return _AdaptedProduct.apply(x, self, before, adapted, self._mask(x), *tensors)
        if before is not None:
            x = before(x)
        if torch.is_grad_enabled() and x.requires_grad:
            return _FrozenProduct.apply(x, self)
        return self.product.forward(x, self.bias)

    @property
    def adapters_why_not(self) -> str | None:
        """What the kernels for adapters lack for this layer's."""
        return _kernels_lack(self._adapted(), dropout=self.dropout > 0) if self.adapters else None

    def _adapted(self) -> Adapted:
        adapters = cast("list[tuple[str, Adapter]]", list(self.adapters.items()))
        return [(self.parts[int(index)], adapter) for index, adapter in adapters]

    def _mask(self, x: Tensor) -> Tensor | None:
        """[T, I] of zeros and 1 / (1 - p): one for all parts of the layer; peft draws one per part, which is as valid."""
        if not self.training or not self.dropout:
            return None
        keep = 1 - self.dropout
        return x.new_empty(x.shape[0], self.in_features).bernoulli_(keep).div_(keep)


class _FrozenProduct(torch.autograd.Function):
    """The product without adapters: saves nothing, computes only the gradient of its input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: FrozenLinear) -> Tensor:
        ctx.layer = layer
        return layer.product.forward(x, layer.bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.layer.product.input_grad(grad), None


class _AdaptedProduct(torch.autograd.Function):
    """``x Wᵀ + bias`` and, per adapted part, ``scale * (mask * x) Aᵀ Bᵀ``.

    Saves the input and the rank-sized ``(mask * x) Aᵀ``. The A matrices of all parts go through one
    product; products with a rank-sized side come first, so no [O, I] gradient ever exists.
    With ``before`` x stands for ``before(x)``, which the backward pass computes again.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, layer: FrozenLinear, before: Before | None, adapted: Adapted, mask: Tensor | None, *tensors: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x, mask, *tensors)
        ctx.before = before
        if before is not None:
            x = before(x)
        y = layer.product.forward(x, layer.bias)
        ctx.low = _add_low_rank(adapted, x, mask, y)  # ours alone, so it needs no version check
        ctx.layer, ctx.adapted = layer, adapted
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, mask, *_ = ctx.saved_tensors
        given = x.detach().requires_grad_(ctx.needs_input_grad[0])
        if ctx.before is not None:
            with torch.enable_grad():
                again = ctx.before(given)
            x = again.detach()
        grad = grad.contiguous()
        x_grad = ctx.layer.product.input_grad(grad) if ctx.needs_input_grad[0] else None
        grads = _low_rank_grads(ctx.adapted, x, mask, ctx.low, grad, x_grad)
        if x_grad is not None and ctx.before is not None:
            (x_grad,) = torch.autograd.grad(again, given, x_grad)
        return (x_grad, None, None, None, None, *grads)


def _add_low_rank(adapted: Adapted, x: Tensor, mask: Tensor | None, y: Tensor) -> Tensor:
    """Adds the adapters' part to y [T, O]; returns x Aᵀ of all parts [T, sum of r], each padded to 16s where the kernels serve."""
    passes = _lora_passes(adapted, x, mask)
    if passes is not None:
        return passes.lora(_fused_parts(adapted), adapted[0][1].a.shape[0], x, y)
    a_all = torch.cat([adapter.a.to(x.dtype) for _, adapter in adapted])  # [sum of r, I]
    low = (x if mask is None else x * mask) @ a_all.t()
    for part, adapter, h in _parts(adapted, low):
        y[:, part.start : part.stop].addmm_(h, adapter.b.to(x.dtype).t(), alpha=adapter.scale)
    return low


def _low_rank_grads(adapted: Adapted, x: Tensor, mask: Tensor | None, low: Tensor, grad: Tensor, x_grad: Tensor | None) -> list[Tensor]:
    """Gradients of A [r, I] and B [O of the part, r] of each part in turn, fp32; the adapters' share is added to ``x_grad``."""
    a_parts, b_parts = ([getattr(adapter, half) for _, adapter in adapted] for half in "ab")
    passes = _lora_passes(adapted, x, mask)
    if passes is not None:
        a_all_grad, flat = passes.lora_grad(_fused_parts(adapted), a_parts[0].shape[0], x, low, grad, x_grad)
        b_grads = [g.view(b.shape) for g, b in zip(flat.split([b.numel() for b in b_parts]), b_parts, strict=True)]
    else:
        a_all_grad, b_grads = _plain_grads(adapted, x, mask, low, grad, x_grad)
    a_grads = a_all_grad.split([a.shape[0] for a in a_parts])
    return [g for pair in zip(a_grads, b_grads, strict=True) for g in pair]


def _plain_grads(
    adapted: Adapted, x: Tensor, mask: Tensor | None, low: Tensor, grad: Tensor, x_grad: Tensor | None
) -> tuple[Tensor, list[Tensor]]:
    """(gradients of all A [sum of r, I], of each B), as above."""
    low_grad = torch.empty_like(low)
    b_grads = []
    for (part, adapter, h), (_, _, h_grad) in zip(_parts(adapted, low), _parts(adapted, low_grad), strict=True):
        part_grad = grad[:, part.start : part.stop]
        torch.mm(part_grad, adapter.b.to(x.dtype) * adapter.scale, out=h_grad)
        b_grads.append((part_grad.t() @ h).float().mul_(adapter.scale))
    if x_grad is not None:
        a_all = torch.cat([adapter.a.to(x.dtype) for _, adapter in adapted])
        if mask is None:
            x_grad.addmm_(low_grad, a_all)
        else:
            x_grad.add_((low_grad @ a_all).mul_(mask))
    return (low_grad.t() @ (x if mask is None else x * mask)).float(), b_grads


def _lora_passes(adapted: Adapted, x: Tensor, mask: Tensor | None) -> Passes | None:
    """The C++ kernels, where they suit."""
    if _kernels_lack(adapted, dropout=mask is not None) or not x.is_contiguous():
        return None
    return passes_for(x)


def _kernels_lack(adapted: Adapted, *, dropout: bool) -> str | None:
    """Why the C++ kernels do not serve these adapters."""
    if dropout:
        return "--lora_dropout"
    odd = [n for _, adapter in adapted for n in (adapter.a.shape[1], adapter.b.shape[0]) if n % 64]
    if odd:
        return f"layers have {odd[0]} features, not a multiple of 64"
    ranks = [adapter.a.shape[0] for _, adapter in adapted]
    if len(set(ranks)) > 1 or sum(whole(rank, 16) for rank in ranks) > MOST_RANKS:
        return f"ranks {sorted(ranks)} of one layer: equal ones of at most {MOST_RANKS} together are served"
    return None


def _fused_parts(adapted: Adapted) -> list[fused.Part]:
    return [
        fused.Part(adapter.a.data_ptr(), adapter.b.data_ptr(), part.start, adapter.b.shape[0], adapter.scale) for part, adapter in adapted
    ]


def _parts(adapted: Adapted, low: Tensor) -> list[tuple[Part, Adapter, Tensor]]:
    """(part, adapter, its columns of ``low`` [T, r]) for each adapted part."""
    widths = [adapter.a.shape[0] for _, adapter in adapted]
    return [(*pair, columns) for pair, columns in zip(adapted, low.split(widths, dim=1), strict=True)]
