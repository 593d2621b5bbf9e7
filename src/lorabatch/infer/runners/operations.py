"""What a decoder's step consists of, written down once for the CPU kernels: its operations
(``struct Op`` of ``lorabatch/kernels/api.h``), their packed weights and their buffers.

Shapes: T tokens of the largest step, H hidden size, N query heads, K key/value heads, D head size,
S slots, C positions of a slot.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from lorabatch.infer.runners.packed import pack_adapters
from lorabatch.kernels.api import CData, constants, ffi, pointer
from lorabatch.kernels.panels import pack, row_scales
from lorabatch.kernels.step import Op
from lorabatch.model.decoder import Decoder, Layer, Norm
from lorabatch.model.linear import FrozenLinear
from lorabatch.model.lora import LoraWeights
from lorabatch.model.spec import ModelSpec


def widest(spec: ModelSpec) -> int:
    """Features of the widest rows that a product reads."""
    return max(spec.hidden_size, spec.intermediate_size, spec.num_heads * spec.head_dim)


@dataclass(frozen=True)
class Buffers:
    """What operations leave for the next one, of the program's type unless said otherwise."""

    residual: Tensor  # [T, H], fp32
    wide: Tensor  # [T, at least (N + 2K) D]: results of fused products
    narrow: Tensor  # [T, widest]: what products read
    eight_bit: Tensor  # the same in 8 bits
    scales: Tensor  # of the 8-bit rows

    @staticmethod
    def of(spec: ModelSpec, dtype: torch.dtype, max_tokens: int) -> Buffers:
        qkv = (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim
        up = spec.intermediate_size * (2 if spec.family == "llama" else 1)
        return Buffers(
            residual=torch.zeros(max_tokens, spec.hidden_size),
            wide=torch.zeros(max_tokens, max(qkv, up), dtype=dtype),
            narrow=torch.zeros(max_tokens, widest(spec), dtype=dtype),
            eight_bit=torch.zeros(max_tokens, widest(spec), dtype=torch.uint8),
            scales=row_scales(max_tokens),
        )


class Operations:
    """The operations of all layers (``body``) and of the head, as arrays that the kernels read."""

    def __init__(
        self,
        decoder: Decoder,
        *,
        cache: Tensor,
        max_tokens: int,
        quantize: str,
        adapters: Sequence[LoraWeights],
    ) -> None:
        """cache: [layers, 2, S, K, C, D]."""
        self._spec, self._dtype, self._quantize = decoder.spec, decoder.dtype, quantize
        self._adapters, self._cache = adapters, cache
        self._buffers = Buffers.of(decoder.spec, decoder.dtype, max_tokens)
        self._held: list[Tensor] = []  # what the operations point to, and nobody else holds
        self.max_rank = 0
        self.residual = self._buffers.residual
        self.body = _array(self._all_layers(decoder, cache))
        head = self._product(decoder.head, constants().LOGITS, out=None)
        self.head = _array([self._norm(decoder.norm, constants().OUTPUT_ROWS), head])

    def _all_layers(self, decoder: Decoder, cache: Tensor) -> list[Op]:
        ops, rope = [self._embedding(decoder)], rope_table(decoder, cache.shape[4])
        for index, layer in enumerate(cast("list[Layer]", list(decoder.layers))):
            keys, values = cache[index]
            ops += self._attention(layer, keys, values, rope)
            ops += self._feed_forward(layer)
        return ops

    def _embedding(self, decoder: Decoder) -> Op:
        return {
            "kind": constants().EMBEDDING,
            "n": self._spec.hidden_size,
            "a": self._hold(decoder.embedding),
            "b": self._hold(decoder.position_embedding),
            "out": pointer(self.residual),
        }

    def _attention(
        self, layer: Layer, keys: Tensor, values: Tensor, rope: Tensor | None
    ) -> list[Op]:
        c, buffers = constants(), self._buffers
        ops = [
            self._norm(layer.norm1, c.TOKEN_ROWS),
            *self._linear(layer.qkv, c.OVERWRITE, out=buffers.wide),
            self._cache_write(layer, keys, values, rope),
            self._attend(layer, keys, values),
        ]
        if self._quantize != "none":
            heads = self._spec.num_heads * self._spec.head_dim
            ops.append(self._rows(c.QUANTISATION, n=heads, a=buffers.narrow))
        return ops + self._linear(layer.out, c.ADD_TO_RESIDUAL, out=self.residual)

    def _cache_write(self, layer: Layer, keys: Tensor, values: Tensor, rope: Tensor | None) -> Op:
        op = {
            "kind": constants().CACHE_WRITES,
            "a": pointer(keys),
            "b": pointer(values),
            "e": self._hold(rope),
            "out": pointer(self._buffers.wide),
            "value": self._spec.norm_eps,
        }
        if layer.q_norm is not None and layer.k_norm is not None:
            op["c"] = self._hold(layer.q_norm.weight)
            op["d"] = self._hold(layer.k_norm.weight)
        return op

    def _attend(self, layer: Layer, keys: Tensor, values: Tensor) -> Op:
        return {
            "kind": constants().ATTENTION,
            "k": layer.window or 0,
            "a": pointer(keys),
            "b": pointer(values),
            "c": pointer(self._buffers.wide),
            "out": pointer(self._buffers.narrow),
            "value": self._spec.head_dim**-0.5,
        }

    def _feed_forward(self, layer: Layer) -> list[Op]:
        c, wide = constants(), self._buffers.wide
        activation = c.SWIGLU if self._spec.family == "llama" else c.GELU
        return [
            self._norm(layer.norm2, c.TOKEN_ROWS),
            *self._linear(layer.up, c.OVERWRITE, out=wide),
            self._rows(c.ACTIVATION, n=self._spec.intermediate_size, a=wide, mode=activation),
            *self._linear(layer.down, c.ADD_TO_RESIDUAL, out=self.residual),
        ]

    def _linear(self, layer: FrozenLinear, mode: int, *, out: Tensor) -> list[Op]:
        """The product, then what the rows' adapters add to it."""
        ops = [self._product(layer, mode, out=out)]
        for part in layer.parts if self._adapters else ():
            packed = pack_adapters(part, layer.in_features, self._adapters, self._dtype)
            if packed is not None:
                self.max_rank = max(self.max_rank, packed.rank)
                ops.append(
                    {
                        "kind": constants().ADAPTERS,
                        "mode": mode,
                        "n": part.stop - part.start,
                        "k": layer.in_features,
                        "rank": packed.rank,
                        "stride": layer.out_features,
                        "vectors": packed.vectors,
                        "a": pointer(self._buffers.narrow),
                        "b": self._hold(packed.a),
                        "c": self._hold(packed.b),
                        "out": pointer(out[:, part.start :]),
                    }
                )
        return ops

    def _rows(self, kind: int, *, n: int, a: Tensor, mode: int = 0) -> Op:
        """An operation on rows whose result feeds the next product: 8 bits with scales, or the
        plain type."""
        c, buffers, quantised = constants(), self._buffers, self._quantize != "none"
        op = {
            "kind": kind,
            "mode": mode,
            "weight": c.INT8 if quantised else c.NATIVE,
            "n": n,
            "a": pointer(a),
            "out": pointer(buffers.eight_bit if quantised else buffers.narrow),
            "scales": pointer(buffers.scales),
        }
        if quantised and self._adapters and kind != c.QUANTISATION:
            op["plain"] = pointer(buffers.narrow)
        return op

    def _norm(self, norm: Norm, mode: int) -> Op:
        op = self._rows(constants().NORMS, n=self._spec.hidden_size, a=self.residual, mode=mode)
        op |= {"b": self._hold(norm.weight), "c": self._hold(norm.bias), "value": norm.eps}
        return op

    def _product(self, layer: FrozenLinear, mode: int, *, out: Tensor | None) -> Op:
        packed = pack(layer.product.weight, quantize=self._quantize)  # type: ignore[attr-defined]
        c, buffers, quantised = constants(), self._buffers, packed.scales is not None
        return {
            "kind": c.PRODUCTS,
            "mode": mode,
            "weight": c.INT8 if quantised else c.NATIVE,
            "n": layer.out_features,
            "k": layer.in_features,
            "a": pointer(buffers.eight_bit if quantised else buffers.narrow),
            "b": self._hold(packed.panels),
            "c": self._hold(packed.scales),
            "d": self._hold(packed.sums),
            "e": self._hold(layer.bias),
            "out": pointer(out),
            "scales": pointer(buffers.scales),
        }

    def _hold(self, tensor: Tensor | None) -> CData:
        if tensor is not None:
            self._held.append(tensor)
        return pointer(tensor)


def _array(ops: Sequence[Op]) -> CData:
    return ffi().new("struct Op[]", ops)


def rope_table(decoder: Decoder, positions: int) -> Tensor | None:
    """[positions, D]: cosines then sines of every position, rounded as the plain path rounds them;
    None with learned positions."""
    if decoder.position_embedding is not None:
        return None
    cos, sin = decoder._rope(torch.arange(positions))
    return torch.cat([cos, sin], dim=-1)[:, 0].float().contiguous()
