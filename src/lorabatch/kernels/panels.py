"""Weights in the layout of the CPU kernels (``lorabatch/kernels/gemm.h``), and the frozen product
that training makes with them.

Shapes: T tokens, I input features, O output features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lorabatch.kernels import has_tiles, library, torch_has_tiles
from lorabatch.kernels.api import constants, ffi, pointer, type_of


def panels(values: Tensor, columns: int | None = None) -> Tensor:
    """[O, I] -> [O in whole panels, I]: only the memory behind it is meant, in panels of
    ``columns`` output features (PANEL unless given)."""
    values, columns = values.contiguous(), columns or constants().PANEL
    out = torch.empty(whole(values.shape[0], columns), values.shape[1], dtype=values.dtype)
    kernels = library("step")
    assert kernels is not None  # whoever packs has asked whether there are kernels
    kernels.lb_step_pack(
        pointer(values), *values.shape, values.element_size(), columns, pointer(out)
    )
    return out


def whole(count: int, size: int) -> int:
    """``count`` rounded up to a multiple of ``size``."""
    return -(-count // size) * size


class Panels:
    """A frozen product (``linear.Product``) of our own: each row's bits are its own, on tiles too.
    The transposed pack is made at the first backward pass."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self._panels = panels(weight)
        self._transposed: Tensor | None = None

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return _product(x, self._panels, bias, self.weight.shape[0])

    def input_grad(self, grad: Tensor) -> Tensor:
        if self._transposed is None:
            self._transposed = panels(self.weight.t())
        return _product(grad, self._transposed, None, self.weight.shape[1])

    @staticmethod
    def serve(weight: Tensor) -> bool:
        """bf16 on processors with tiles, where oneDNN's sums depend on the number of rows
        (docs/LOG.md, 2026-11-29). Ours are as fast in tiles; a variant without them, which somebody
        asked for by name, is slower there but keeps the promise."""
        suits = weight.dtype == torch.bfloat16 and not any(size % 2 for size in weight.shape)
        return suits and library("step") is not None and (has_tiles() or torch_has_tiles())


def _product(x: Tensor, packed: Tensor, bias: Tensor | None, columns: int) -> Tensor:
    kernels = library("train")
    assert kernels is not None  # ``serve`` was asked
    x = x.contiguous()
    y = torch.empty(x.shape[0], columns, dtype=x.dtype)
    assert x.dtype == torch.bfloat16 and packed.shape[1] == x.shape[1]
    kernels.lb_train_product(
        type_of(x.dtype),
        *(pointer(t) for t in (x, packed, bias, y)),
        *(*y.shape, x.shape[1], torch.get_num_threads()),
    )
    return y


@dataclass(frozen=True)
class PackedWeight:
    """A weight [O, I] in the kernels' panels. int8: also one scale per row, and ZERO_POINT times
    the sum of each row's values."""

    panels: Tensor
    scales: Tensor | None
    sums: Tensor | None


def pack(weight: Tensor, *, quantize: str) -> PackedWeight:
    """int8: symmetric per output row, the largest magnitude becomes 127."""
    if quantize == "none":
        return PackedWeight(panels(weight), None, None)
    wide = weight.float()
    scales = wide.abs().amax(dim=1) / 127
    values = (wide / scales.clamp(min=1e-30)[:, None]).round().to(torch.int8)
    c, count = constants(), len(scales)
    padded = torch.zeros(2, whole(count, c.PANEL))
    padded[0, :count] = scales
    padded[1, :count] = c.ZERO_POINT * values.sum(dim=1, dtype=torch.float32)
    return PackedWeight(panels(values), padded[0].contiguous(), padded[1].to(torch.int32))


def row_scales(rows: int, scale: float = 0.0) -> Tensor:
    """A struct RowScale for each of some 8-bit rows, without outliers; only the memory behind it is
    meant."""
    declared, struct = ffi(), "struct RowScale"
    width = declared.sizeof("float")
    scales = torch.zeros(rows, declared.sizeof(struct) // width)
    scales[:, declared.offsetof(struct, "scale") // width] = scale
    return scales
