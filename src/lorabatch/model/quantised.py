"""A frozen base in 4 or 8 bits (QLoRA, arXiv 2305.14314): other ``Product`` classes, made by
bitsandbytes.

Weights are stored quantised and rebuilt in the activations' type for each product, one layer at a
time; adapters, embedding, norms and head are not quantised. Parity with peft on bitsandbytes is a
test.
"""

from __future__ import annotations

import contextlib
import io
import logging
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional as F

from lorabatch.errors import UnavailableError

# weights that share a scale, as in the paper; the scales are quantised again (double quantisation)
NF4_BLOCK = 64


class _Rebuilt:
    """A product whose dense weight [O, I] exists only while it is used. Parts are quantised one by
    one, as if not fused."""

    def weight(self, dtype: torch.dtype) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, self.weight(x.dtype), bias)

    def input_grad(self, grad: Tensor) -> Tensor:
        return grad @ self.weight(grad.dtype)


class Nf4(_Rebuilt):
    """4-bit NormalFloat in blocks of 64 with 8-bit scales: about 4.13 bits a weight."""

    def __init__(self, weight: Tensor, rows: list[int]) -> None:
        self._functional = import_bitsandbytes().functional
        self._parts = [
            self._functional.quantize_4bit(
                part.contiguous(), blocksize=NF4_BLOCK, compress_statistics=True, quant_type="nf4"
            )
            for part in weight.split(rows)
        ]

    def weight(self, dtype: torch.dtype) -> Tensor:
        parts = [
            self._functional.dequantize_4bit(packed, state).to(dtype)
            for packed, state in self._parts
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    @property
    def num_bytes(self) -> int:
        tensors = [
            t
            for packed, state in self._parts
            for t in (packed, state.absmax, state.offset, state.state2.absmax)
        ]
        return sum(t.numel() * t.element_size() for t in tensors)


class Int8(_Rebuilt):
    """8-bit integers with one fp32 scale a row, as LLM.int8() stores weights (arXiv 2208.07339).

    Activations stay as they are: nothing is lost to their outliers, and nothing gained from integer
    products.
    """

    def __init__(self, weight: Tensor, rows: list[int]) -> None:
        functional = import_bitsandbytes().functional
        self._integers, scales, _ = functional.int8_vectorwise_quant(weight.to(torch.float16))
        self._scales = scales.to(torch.float32)[:, None] / 127

    def weight(self, dtype: torch.dtype) -> Tensor:
        return (self._integers * self._scales).to(dtype)

    @property
    def num_bytes(self) -> int:
        return self._integers.numel() + self._scales.numel() * 4


def import_bitsandbytes() -> ModuleType:
    """The package. UnavailableError with the command that installs it."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            import bitsandbytes
    except (ImportError, OSError, RuntimeError):
        raise UnavailableError(
            "the package bitsandbytes is not here",
            where="--load_in_4bit, --load_in_8bit",
            fix="run: pip install bitsandbytes",
        ) from None
    return bitsandbytes
