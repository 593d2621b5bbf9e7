"""What an architecture is, as plain values: everything the native decoder needs to know.

``spec_from_config`` reads a transformers configuration; ``None`` means "not ours", and the
model then runs through ``lorabatch.model.hf``.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any

LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3")
NATIVE_ROPE = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True)
class ModelSpec:
    """Shape of a decoder. ``*_size`` and ``*_dim`` count features, ``num_*`` count things."""

    family: str  # "gpt2" or "llama"
    model_type: str  # transformers' name: gpt2, llama, mistral, qwen2, qwen3
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    norm_eps: float
    activation: str
    tied_head: bool
    qk_norm: bool = False
    sliding_window: int | None = None  # each token sees itself and at most window - 1 before it
    window_layers: tuple[int, ...] = ()  # which layers have the window
    rope_inv_freq: tuple[float, ...] = ()  # [head_dim / 2], empty with learned positions
    rope_scale: float = 1.0  # multiplies cos and sin (YaRN's attention factor)

    @property
    def group_size(self) -> int:
        """Query heads that share one key/value head."""
        return self.num_heads // self.num_kv_heads

    @property
    def num_matmul_params(self) -> int:
        """Parameters that take part in matrix products per token: linear layers and head, not look-ups."""
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        attention = self.hidden_size * (2 * q + 2 * kv)
        mlp = self.hidden_size * self.intermediate_size * (3 if self.family == "llama" else 2)
        return self.num_layers * (attention + mlp) + self.hidden_size * self.vocab_size

    @property
    def kv_elements_per_token(self) -> int:
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim

    def digest(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


def spec_from_config(config: Any) -> ModelSpec | None:
    """The native spec of a transformers configuration, or None if the native decoder lacks a feature it needs."""
    if config.model_type == "gpt2":
        return _gpt2(config)
    if config.model_type in LLAMA_LIKE:
        return _llama(config)
    return None


def _gpt2(config: Any) -> ModelSpec | None:
    unusual = config.scale_attn_by_inverse_layer_idx or not config.scale_attn_weights or config.add_cross_attention
    if unusual or config.activation_function not in ("gelu_new", "gelu_pytorch_tanh", "gelu"):
        return None
    return ModelSpec(
        family="gpt2",
        model_type="gpt2",
        vocab_size=config.vocab_size,
        hidden_size=config.n_embd,
        intermediate_size=config.n_inner or 4 * config.n_embd,
        num_layers=config.n_layer,
        num_heads=config.n_head,
        num_kv_heads=config.n_head,
        head_dim=config.n_embd // config.n_head,
        max_positions=config.n_positions,
        norm_eps=config.layer_norm_epsilon,
        activation=config.activation_function,
        tied_head=config.tie_word_embeddings,
    )


def _llama(config: Any) -> ModelSpec | None:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = _rope(config, head_dim)
    if rope is None or config.hidden_act != "silu":
        return None
    window = getattr(config, "sliding_window", None)
    if config.model_type.startswith("qwen") and not getattr(config, "use_sliding_window", False):
        window = None
    kinds = getattr(config, "layer_types", None) or ["sliding_attention" if window else "full_attention"] * config.num_hidden_layers
    windowed = tuple(i for i, kind in enumerate(kinds) if kind == "sliding_attention") if window else ()
    return ModelSpec(
        family="llama",
        model_type=config.model_type,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=head_dim,
        max_positions=config.max_position_embeddings,
        norm_eps=config.rms_norm_eps,
        activation="silu",
        tied_head=config.tie_word_embeddings,
        qk_norm=config.model_type == "qwen3",
        sliding_window=window if windowed else None,
        window_layers=windowed,
        rope_inv_freq=rope[0],
        rope_scale=rope[1],
    )


def _rope(config: Any, head_dim: int) -> tuple[tuple[float, ...], float] | None:
    """Inverse frequencies and the factor on cos and sin; transformers computes the scaled variants.

    "dynamic" and "longrope" depend on the length of each sequence and are left to the hf backend.
    """
    parameters = getattr(config, "rope_parameters", None) or {}
    kind = parameters.get("rope_type", "default")
    if kind not in NATIVE_ROPE or parameters.get("partial_rotary_factor", 1.0) != 1.0:
        return None
    if kind in ("default", "linear"):
        theta = parameters.get("rope_theta", 10000.0)
        factor = parameters.get("factor", 1.0) if kind == "linear" else 1.0
        import torch  # in fp32, step by step as transformers: later positions multiply the last bit of a frequency

        inv_freq = 1.0 / (theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim))
        return tuple((inv_freq / factor).tolist()), 1.0
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    inv_freq, scale = ROPE_INIT_FUNCTIONS[kind](config, "cpu")
    return tuple(inv_freq.tolist()), float(scale)
