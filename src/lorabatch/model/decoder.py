"""The decoder: [T] token ids to [T, H] hidden states, for GPT-2 and Llama-like models.

Shapes: T tokens of the flat stream (any mix of sequences), H hidden size, N query heads,
K key/value heads, D head size, M intermediate size, V vocabulary.

There is no batch axis and no padding. Which tokens see which is the business of the
``Attention`` object that is passed in; everything else works on rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lorabatch.kernels.api import constants
from lorabatch.model.attention import Attention, PackedAttention
from lorabatch.model.functional import rms_norm, rotate, swiglu
from lorabatch.model.linear import Before, FrozenLinear
from lorabatch.model.spec import ModelSpec


class Norm(nn.Module):
    """RMSNorm, or LayerNorm when there is a bias. Weights are frozen."""

    def __init__(self, weight: Tensor, bias: Tensor | None, eps: float) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = weight, bias, eps

    def forward(self, x: Tensor) -> Tensor:
        if self.bias is not None:
            weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
            return F.layer_norm(x, x.shape[-1:], weight, bias, self.eps).to(self.weight.dtype)
        return rms_norm(x, self.weight, self.eps)


class Layer(nn.Module):
    """One pre-norm transformer layer."""

    def __init__(
        self,
        spec: ModelSpec,
        index: int,
        *,
        norm1: Norm,
        qkv: FrozenLinear,
        out: FrozenLinear,
        norm2: Norm,
        up: FrozenLinear,
        down: FrozenLinear,
        q_norm: Norm | None = None,
        k_norm: Norm | None = None,
    ) -> None:
        super().__init__()
        self.spec, self.index = spec, index
        self.window = spec.sliding_window if index in spec.window_layers else None
        self.norm1, self.qkv, self.out = norm1, qkv, out
        self.norm2, self.up, self.down = norm2, up, down
        self.q_norm, self.k_norm = q_norm, k_norm
        # what backward computes again: nothing, norms and activations, or the whole layer
        self.checkpointing = "selective"

    @property
    def attention_why_not(self) -> str | None:
        """What the one-pass kernel for packed documents lacks for this layer."""
        if self.q_norm is not None:
            return "queries and keys are normalised"
        if self.window is not None:
            return "the model has attention windows"
        head_dim, tile = self.spec.head_dim, constants().TILE
        return (
            f"heads have {head_dim} features, not a multiple of {tile}" if head_dim % tile else None
        )

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor] | None, attention: Attention
    ) -> Tensor:
        if self.checkpointing == "full" and torch.is_grad_enabled():
            # what dropout drew must come again; without it there is no random state to look at
            drawn = any(layer.dropout for layer in (self.qkv, self.out, self.up, self.down))
            return checkpoint(
                self._run, x, rope, attention, use_reentrant=False, preserve_rng_state=drawn
            )
        return self._run(x, rope, attention)

    def _run(self, x: Tensor, rope: tuple[Tensor, Tensor] | None, attention: Attention) -> Tensor:
        x = x + self.out(self._attend(x, rope, attention))
        return x + self._after(self._activate, self.down, self._after(self.norm2, self.up, x))

    def _after(self, before: Before, linear: FrozenLinear, x: Tensor) -> Tensor:
        return linear(before(x)) if self.checkpointing == "none" else linear(x, before)

    def _attend(
        self, x: Tensor, rope: tuple[Tensor, Tensor] | None, attention: Attention
    ) -> Tensor:
        spec = self.spec
        qkv = self._after(self.norm1, self.qkv, x)
        if isinstance(attention, PackedAttention) and self.attention_why_not is None:
            y = attention.whole(qkv, spec.num_heads, spec.num_kv_heads, rope)
            if y is not None:
                return y
        heads = qkv.view(x.shape[0], -1, spec.head_dim)  # [T, N + 2K, D]
        q, k, v = heads.split([spec.num_heads, spec.num_kv_heads, spec.num_kv_heads], dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        return attention(self.index, q, k, v, self.window)

    def _activate(self, x: Tensor) -> Tensor:
        if self.spec.family == "llama":
            return swiglu(x)
        return F.gelu(x, approximate="none" if self.spec.activation == "gelu" else "tanh")


class Decoder(nn.Module):
    def __init__(
        self,
        spec: ModelSpec,
        *,
        embedding: Tensor,
        positions: Tensor | None,
        layers: list[Layer],
        norm: Norm,
        head: FrozenLinear,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.embedding = embedding  # [V, H]
        self.position_embedding = positions  # [max_positions, H], GPT-2 only
        self.layers = nn.ModuleList(layers)
        self.norm, self.head = norm, head
        self._inv_freq = (
            torch.tensor(spec.rope_inv_freq, dtype=torch.float32, device=embedding.device)
            if spec.rope_inv_freq
            else None
        )

    @property
    def device(self) -> torch.device:
        return self.embedding.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.dtype

    def forward(self, token_ids: Tensor, positions: Tensor, attention: Attention) -> Tensor:
        """token_ids [T], positions [T] (place of each token in its own sequence) -> [T, H],
        normalised."""
        x = self.embedding[token_ids]
        rope = None
        if self.position_embedding is not None:
            x = x + self.position_embedding[positions]
        else:
            rope = self._rope(positions)
        if self.dtype == torch.float16:  # sums of many layers may pass its 65,504
            x = x.float()
        for layer in self.layers:
            x = layer(x, rope, attention)
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """[n, H] -> [n, V] in the model's own type; on GPUs in fp32."""
        return self.head.project_wide(hidden)

    def _rope(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin, each [T, 1, D / 2]: angles in fp32, result in the model's type."""
        assert self._inv_freq is not None  # models without learned positions have it
        angles = positions.to(torch.float32)[:, None, None] * self._inv_freq
        return (angles.cos() * self.spec.rope_scale).to(self.dtype), (
            angles.sin() * self.spec.rope_scale
        ).to(self.dtype)

    def linears(self) -> Iterator[FrozenLinear]:
        """The linear layers of all transformer layers, bottom to top, without the head."""
        for layer in cast("Iterator[Layer]", iter(self.layers)):
            yield from (layer.qkv, layer.out, layer.up, layer.down)
