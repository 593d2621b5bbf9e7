"""Frozen linear layers, and the low-rank adapters that train on top of them.

Shapes: T tokens of the flat stream, I input features, O output features, r rank.

A layer may be several layers of the checkpoint in one product (q, k and v; gate and up). Each
``Part`` keeps its own name and its own adapter, so files look as if nothing had been fused.

The product itself sits behind small classes with the same two methods: ``Dense`` (torch's linear,
any device), ``Prepacked`` (oneDNN's blocked layout, CPU), ``Panels`` (our own kernels; panels.py)
and those of quantised.py and sharded.py. Which one serves depends on the device, the number type
and the sizes of the weight, never on the number of rows: a row's bits must not depend on its
neighbours. On the development machine (Zen 4, two cores) prepacking gave 1.1 to 2.2 times the rate
of ``F.linear``, and rows whose value does not depend on how many other rows there are, from two
rows on (docs/LOG.md, 2026-11-24). oneDNN's bf16 product on AMX does not
keep that promise: there ``Panels`` serve.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from lorabatch.kernels.api import constants
from lorabatch.kernels.onednn import Dense, Product, packed_product
from lorabatch.kernels.train_ops import LowRank, TrainOps, low_width, train_ops
from lorabatch.model.functional import Context
from lorabatch.spans import operation

# a frozen function of each row that is cheap to compute again: a norm, an activation
Before = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Part:
    """One linear layer of the checkpoint: its path there, and its rows ``start:stop`` of the fused
    weight."""

    path: str
    start: int
    stop: int


class Adapter(nn.Module):
    """The low-rank update ``scale * B A`` of one part. Source: LoRA, arXiv 2106.09685."""

    def __init__(self, a: Tensor, b: Tensor, scale: float) -> None:
        super().__init__()
        self.a = nn.Parameter(a)  # [r, I], fp32
        self.b = nn.Parameter(b)  # [O of the part, r], fp32
        self.scale = scale


Adapted = Sequence[tuple[Part, Adapter]]  # parts of a layer that have an adapter


class FrozenLinear(nn.Module):
    """``y = x Wᵀ + bias`` with a weight that never gets a gradient, plus the adapters of its
    parts."""

    def __init__(
        self, weight: Tensor, bias: Tensor | None, parts: Sequence[Part], *, prepack: bool
    ) -> None:
        super().__init__()
        self.parts = tuple(parts)
        self.bias = bias
        self.in_features, self.out_features = weight.shape[1], weight.shape[0]
        self.dtype = weight.dtype
        self.product: Product = packed_product(weight) if prepack else Dense(weight)
        self.adapters = nn.ModuleDict()  # key: index of the part, as a string
        self.dropout = 0.0

    def forward(self, x: Tensor, before: Before | None = None) -> Tensor:
        """x [T, I] -> [T, O]. With ``before``, of ``before(x)``: then x is what is kept for the
        backward pass, not ``before(x)``."""
        if self.adapters:
            adapted = self._adapted()
            tensors = [t for _, adapter in adapted for t in (adapter.a, adapter.b)]
            return _AdaptedProduct.apply(x, self, before, adapted, self._mask(x), *tensors)
        if before is not None:
            x = before(x)
        if torch.is_grad_enabled() and x.requires_grad:
            return _FrozenProduct.apply(x, self)
        return self.project(x)

    def project(self, x: Tensor) -> Tensor:
        """[T, I] -> [T, O], without the adapters."""
        with operation("products"):
            return self.product.forward(x, self.bias)

    def project_wide(self, x: Tensor) -> Tensor:
        """``project`` in fp32 where products of half precision can keep their sums so (CUDA):
        rounded to bf16, many logits tie."""
        half = x.dtype in (torch.bfloat16, torch.float16)
        if x.device.type == "cpu" or torch.version.hip or not half:
            return self.project(x)
        if not isinstance(self.product, Dense):
            return self.project(x)
        y = torch.mm(x, self.product.weight.t(), out_dtype=torch.float32)
        return y if self.bias is None else y.add_(self.bias)

    def input_grad(self, grad: Tensor) -> Tensor:
        """[T, O] -> [T, I], without the adapters."""
        with operation("products"):
            return self.product.input_grad(grad)

    @property
    def adapters_why_not(self) -> str | None:
        """What the kernels for adapters lack for this layer's."""
        return _kernels_lack(self._adapted(), dropout=self.dropout > 0) if self.adapters else None

    def _adapted(self) -> Adapted:
        adapters = cast("list[tuple[str, Adapter]]", list(self.adapters.items()))
        return [(self.parts[int(index)], adapter) for index, adapter in adapters]

    def _mask(self, x: Tensor) -> Tensor | None:
        """[T, I] of zeros and 1 / (1 - p): one for all parts of the layer; peft draws one per part,
        which is as valid."""
        if not self.training or not self.dropout:
            return None
        keep = 1 - self.dropout
        mask = torch.empty(x.shape[0], self.in_features, dtype=self.dtype, device=x.device)
        return mask.bernoulli_(keep).div_(keep)


class _FrozenProduct(torch.autograd.Function):
    """The product without adapters: saves nothing, computes only the gradient of its input."""

    @staticmethod
    def forward(ctx: Context, x: Tensor, layer: FrozenLinear) -> Tensor:
        ctx.layer = layer
        return layer.project(x)

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.layer.input_grad(grad), None


class _AdaptedProduct(torch.autograd.Function):
    """``x Wᵀ + bias`` and, per adapted part, ``scale * (mask * x) Aᵀ Bᵀ``.

    Saves the input and the rank-sized ``(mask * x) Aᵀ``. The A matrices of all parts go through one
    product; products with a rank-sized side come first, so no [O, I] gradient ever exists.
    With ``before`` x stands for ``before(x)``, which the backward pass computes again.
    """

    @staticmethod
    def forward(
        ctx: Context,
        x: Tensor,
        layer: FrozenLinear,
        before: Before | None,
        adapted: Adapted,
        mask: Tensor | None,
        *tensors: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(x, mask, *tensors)
        ctx.before = before
        if before is not None:
            x = before(x)
        y = layer.project(x)
        # ours alone, so they need no version check
        ctx.low, ctx.copies = _add_low_rank(adapted, x, mask, y)
        ctx.layer, ctx.adapted = layer, adapted
        return y

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, mask, *_ = ctx.saved_tensors
        given = x.detach().requires_grad_(ctx.needs_input_grad[0])
        if ctx.before is not None:
            with torch.enable_grad():
                again = ctx.before(given)
            x = again.detach()
        grad = grad.contiguous()
        x_grad = ctx.layer.input_grad(grad) if ctx.needs_input_grad[0] else None
        grads = _low_rank_grads(ctx.adapted, x, mask, ctx.low, ctx.copies, grad, x_grad)
        if x_grad is not None and ctx.before is not None:
            (x_grad,) = torch.autograd.grad(again, given, x_grad)
        return (x_grad, None, None, None, None, *grads)


def _add_low_rank(
    adapted: Adapted, x: Tensor, mask: Tensor | None, y: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Adds the adapters' part to y [T, O]; returns x Aᵀ of all parts [T, sum of r], each padded to
    16s where the kernels serve, and where they do not the ``_copies`` that were multiplied."""
    ops = _lora_ops(adapted, x, mask)
    if ops is not None:
        return ops.lora(_for_kernels(adapted), x, y), None
    copies = torch.cat([half.detach().flatten() for half in _halves(adapted)]).to(x.dtype)
    a_all, b_parts = _copies(adapted, copies)
    low = (x if mask is None else x * mask) @ a_all.t()
    for (part, adapter, h), b in zip(_parts(adapted, low), b_parts, strict=True):
        y[:, part.start : part.stop].addmm_(h, b.t(), alpha=adapter.scale)
    return low, copies


def _low_rank_grads(
    adapted: Adapted,
    x: Tensor,
    mask: Tensor | None,
    low: Tensor,
    copies: Tensor | None,
    grad: Tensor,
    x_grad: Tensor | None,
) -> list[Tensor]:
    """Gradients of A [r, I] and B [O of the part, r] of each part in turn, fp32; the adapters'
    share is added to ``x_grad``."""
    b_grads: Sequence[Tensor]
    if copies is None:
        ops = _lora_ops(adapted, x, mask)
        assert ops is not None  # as in the forward pass
        a_all_grad, flat = ops.lora_grad(_for_kernels(adapted), x, low, grad, x_grad)
        b_parts = [adapter.b for _, adapter in adapted]
        b_grads = [
            g.view(b.shape)
            for g, b in zip(flat.split([b.numel() for b in b_parts]), b_parts, strict=True)
        ]
    else:
        a_all_grad, b_grads = _plain_grads(adapted, x, mask, low, copies, grad, x_grad)
    a_grads = a_all_grad.split([adapter.a.shape[0] for _, adapter in adapted])
    return [g for pair in zip(a_grads, b_grads, strict=True) for g in pair]


def _plain_grads(
    adapted: Adapted,
    x: Tensor,
    mask: Tensor | None,
    low: Tensor,
    copies: Tensor,
    grad: Tensor,
    x_grad: Tensor | None,
) -> tuple[Tensor, Sequence[Tensor]]:
    """(gradients of all A [sum of r, I], of each B), as above.

    On GPUs each small operator costs a launch: the scale goes into the products, and all gradients
    are cast at once.
    """
    a_all, b_parts = _copies(adapted, copies)
    low_grad, grads = torch.empty_like(low), torch.empty_like(copies)
    a_all_grad, b_grads = _copies(adapted, grads)
    for (part, adapter, h), h_grad, b, b_grad in zip(
        _parts(adapted, low), _columns(adapted, low_grad), b_parts, b_grads, strict=True
    ):
        part_grad = grad[:, part.start : part.stop]
        h_grad.addmm_(part_grad, b, beta=0, alpha=adapter.scale)  # whatever it held, by beta
        b_grad.addmm_(part_grad.t(), h, beta=0, alpha=adapter.scale)
    if x_grad is not None:
        if mask is None:
            x_grad.addmm_(low_grad, a_all)
        else:
            x_grad.add_((low_grad @ a_all).mul_(mask))
    torch.mm(low_grad.t(), x if mask is None else x * mask, out=a_all_grad)
    return _copies(adapted, grads.float())


def _halves(adapted: Adapted) -> list[Tensor]:
    """A of every part, then B of every part."""
    return [getattr(adapter, half) for half in "ab" for _, adapter in adapted]


def _copies(adapted: Adapted, flat: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Views of the ``_halves`` in one flat tensor: all A [sum of r, I], each B [O of the part,
    r]."""
    pieces = flat.split([half.numel() for half in _halves(adapted)])
    width = adapted[0][1].a.shape[1]
    a_all = flat[: sum(piece.numel() for piece in pieces[: len(adapted)])].view(-1, width)
    bs = zip(pieces[len(adapted) :], adapted, strict=True)
    return a_all, [piece.view(adapter.b.shape) for piece, (_, adapter) in bs]


def _lora_ops(adapted: Adapted, x: Tensor, mask: Tensor | None) -> TrainOps | None:
    """The C++ kernels, where they suit."""
    if _kernels_lack(adapted, dropout=mask is not None) or not x.is_contiguous():
        return None
    return train_ops(x)


def _kernels_lack(adapted: Adapted, *, dropout: bool) -> str | None:
    """Why the C++ kernels do not serve these adapters."""
    if dropout:
        return "--lora_dropout"
    tile, most = constants().TILE, constants().MAX_RANKS
    odd = [n for _, x in adapted for n in (x.a.shape[1], x.b.shape[0]) if n % tile]
    if odd:
        return f"layers have {odd[0]} features, not a multiple of {tile}"
    ranks = [adapter.a.shape[0] for _, adapter in adapted]
    if len(set(ranks)) > 1 or low_width(ranks) > most:
        return (
            f"ranks {sorted(ranks)} of one layer: equal ones of at most {most} together are served"
        )
    return None


def _for_kernels(adapted: Adapted) -> list[LowRank]:
    return [LowRank(adapter.a, adapter.b, part.start, adapter.scale) for part, adapter in adapted]


def _parts(adapted: Adapted, low: Tensor) -> list[tuple[Part, Adapter, Tensor]]:
    """(part, adapter, its columns of ``low`` [T, r]) for each adapted part."""
    return [(*pair, columns) for pair, columns in zip(adapted, _columns(adapted, low), strict=True)]


def _columns(adapted: Adapted, low: Tensor) -> Sequence[Tensor]:
    return low.split([adapter.a.shape[0] for _, adapter in adapted], dim=1)
