"""Weights in the layout of the CPU kernels (``lorabatch/kernels/gemm.h``), and the frozen product that training makes with them.

Shapes: T tokens, I input features, O output features.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from lorabatch.kernels import has_tiles, library, torch_has_tiles

PANEL = 48  # columns


def panels(values: Tensor, columns: int = PANEL) -> Tensor:
    """[O, I] -> [O in whole panels, I]: only the memory behind it is meant, in panels of ``columns`` output features."""
    values = values.contiguous()
    out = torch.empty(whole(values.shape[0], columns), values.shape[1], dtype=values.dtype)
    kernels = library("step")
    assert kernels is not None  # whoever packs has asked whether there are kernels
    count = [ctypes.c_int64(x) for x in (*values.shape, values.element_size(), columns)]
    kernels.lb_pack(ctypes.c_void_p(values.data_ptr()), *count, ctypes.c_void_p(out.data_ptr()))
    return out


def whole(count: int, size: int) -> int:
    """``count`` rounded up to a multiple of ``size``."""
    return -(-count // size) * size


class Panels:
    """A frozen product (``linear.Product``) of our own: each row's bits are its own, on tiles too. The transposed pack is made at the first
    backward pass."""

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
        """bf16 on processors with tiles, where oneDNN's sums depend on the number of rows (docs/LOG.md, 2026-11-29). Ours are as fast in
        tiles; a variant without them, which somebody asked for by name, is slower there but keeps the promise."""
        suits = weight.dtype == torch.bfloat16 and not any(size % 2 for size in weight.shape)
        return suits and library("step") is not None and (has_tiles() or torch_has_tiles())


def _product(x: Tensor, packed: Tensor, bias: Tensor | None, columns: int) -> Tensor:
    kernels = library("train")
    assert kernels is not None  # ``serve`` was asked
    x = x.contiguous()
    y = torch.empty(x.shape[0], columns, dtype=x.dtype)
    assert x.dtype == torch.bfloat16 and packed.shape[1] == x.shape[1]
    pointers = [ctypes.c_void_p(None if t is None else t.data_ptr()) for t in (x, packed, bias, y)]
    kernels.lb_product_bfloat16(*pointers, *(ctypes.c_int64(n) for n in (*y.shape, x.shape[1], torch.get_num_threads())))
    return y
