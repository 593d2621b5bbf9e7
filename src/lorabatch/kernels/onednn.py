"""Products with a frozen weight: torch's own, and oneDNN's with the weight packed once.

Shapes: T tokens of the flat stream, I input features, O output features.
"""

from __future__ import annotations

import functools
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from lorabatch.kernels.panels import Panels


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
    """Weights in oneDNN's blocked layout; the transposed pack is made at the first backward
    pass."""

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
        return torch.ops.mkldnn._linear_pointwise(
            x.expand(2, -1).contiguous(), packed, bias, "none", [], ""
        )[:1]
    return torch.ops.mkldnn._linear_pointwise(x.contiguous(), packed, bias, "none", [], "")


def packed_product(weight: Tensor) -> Product:
    """The fastest product on a CPU that gives each row bits of its own, as far as there is one."""
    if Panels.serve(weight):
        return Panels(weight)
    return Prepacked(weight) if can_prepack(weight.dtype) else Dense(weight)


@functools.cache
def rows_are_independent(dtype: torch.dtype) -> bool:
    """Whether a row of ``packed_product`` on this CPU has the same bits whatever the number of
    rows: measured, on sizes where oneDNN's bf16 product on AMX failed (docs/LOG.md, 2026-11-29)."""
    generator = torch.Generator().manual_seed(0)
    for inputs, outputs in ((576, 1536), (1536, 576)):
        weight, x = (torch.randn(n, inputs, generator=generator).to(dtype) for n in (outputs, 256))
        product = packed_product(weight)
        whole = product.forward(x, None)
        if not all(
            torch.equal(product.forward(x[:rows], None), whole[:rows])
            for rows in (1, 5, 31, 64, 100)
        ):
            return False
    return True


@functools.cache
def can_prepack(dtype: torch.dtype) -> bool:
    """Whether this torch build has the private oneDNN operators and they agree with
    ``F.linear``."""
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
