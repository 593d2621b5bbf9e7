"""What an architecture is, as plain values: everything the native decoder needs to know.

``spec_from_config`` reads a transformers configuration; ``None`` means "not ours", and the
model then runs through ``lorabatch.model.hf``.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from lorabatch.errors import DataError
from lorabatch.schema import Fields

if TYPE_CHECKING:
    from transformers import PretrainedConfig

LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3")
NATIVE_ROPE = ("default", "linear", "llama3", "yarn")
# names of config.json that count something, far above any model: what is larger is a damaged or
# hostile file
MOST_OF = {
    "num_hidden_layers n_layer num_layers": 2**10,
    "num_attention_heads n_head num_heads num_key_value_heads head_dim": 2**14,
    "hidden_size n_embd": 2**20,
    "intermediate_size n_inner": 2**22,
    "vocab_size": 2**24,
    "max_position_embeddings n_positions sliding_window": 2**27,
}
MOST = {name: most for names, most in MOST_OF.items() for name in names.split()}
REAL = ("eps", "epsilon", "theta", "factor")  # endings of names whose value is a finite number


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
    biases: tuple[str, ...] = ()  # which products have one: qkv, out, up, down

    def __post_init__(self) -> None:
        """DataError for numbers that no model can have."""
        wrong = self._wrong_counts() or self._wrong_pairs()
        reals = (self.norm_eps, self.rope_scale, *self.rope_inv_freq)
        if not all(map(math.isfinite, reals)) or self.norm_eps < 0:
            wrong.append("an epsilon or a rotary frequency that is not a number")
        if self.sliding_window is not None and self.sliding_window < 1:
            wrong.append(f"sliding_window {self.sliding_window}")
        if wrong:
            raise _unusable(f"no model has {', '.join(wrong)}")

    def _wrong_counts(self) -> list[str]:
        counts = {
            k: v
            for k, v in asdict(self).items()
            if k.endswith(("_size", "_dim", "_positions")) or k.startswith("num_")
        }
        return [f"{k} {v!r}" for k, v in counts.items() if type(v) is not int or v < 1]

    def _wrong_pairs(self) -> list[str]:
        """Counts that do not go together."""
        wrong = []
        if self.num_heads % self.num_kv_heads:
            wrong.append(f"num_heads {self.num_heads} for {self.num_kv_heads} key/value heads")
        if not wrong and self.rope_inv_freq and self.head_dim % 2:
            wrong.append(f"head_dim {self.head_dim} with rotary positions")
        whole = self.family != "gpt2" or self.num_heads * self.head_dim == self.hidden_size
        if not wrong and not whole:
            wrong.append(f"hidden_size {self.hidden_size} for {self.num_heads} heads")
        return wrong

    @property
    def group_size(self) -> int:
        """Query heads that share one key/value head."""
        return self.num_heads // self.num_kv_heads

    @property
    def num_matmul_params(self) -> int:
        """Parameters that take part in matrix products per token: linear layers and head, not
        look-ups."""
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        attention = self.hidden_size * (2 * q + 2 * kv)
        mlp = self.hidden_size * self.intermediate_size * (3 if self.family == "llama" else 2)
        return self.num_layers * (attention + mlp) + self.hidden_size * self.vocab_size

    @property
    def kv_elements_per_token(self) -> int:
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim

    def digest(self) -> str:
        # the names of a checkpoint's tensors tell that
        shape = {k: v for k, v in asdict(self).items() if k != "biases"}
        return hashlib.sha256(json.dumps(shape, sort_keys=True).encode()).hexdigest()


def spec_from_config(config: PretrainedConfig) -> ModelSpec | None:
    """The native spec of a transformers configuration, or None if the native decoder lacks a
    feature it needs. Raises DataError."""
    make = {"gpt2": _gpt2, **dict.fromkeys(LLAMA_LIKE, _llama)}.get(config.model_type)
    try:
        return make(config) if make else None
    except (TypeError, ValueError, LookupError, ArithmeticError, AttributeError) as error:
        raise _unusable(f"{type(error).__name__}: {error}") from error


def check_numbers(config: Fields) -> None:
    """Before anything is built by them: counts of config.json are whole numbers within reason,
    scales are finite. Raises DataError."""
    for name, value in _entries(config):
        if (
            name in MOST
            and value is not None
            and not (type(value) is int and 0 <= value <= MOST[name])
        ):
            raise _unusable(f"{name} is {str(value)[:40]}, not a whole number up to {MOST[name]:,}")
        if (
            name.endswith(REAL)
            and value is not None
            and not (
                isinstance(value, (int, float)) and type(value) is not bool and math.isfinite(value)
            )
        ):
            raise _unusable(f"{name} is {str(value)[:40]}, not a number")


def _unusable(why: str) -> DataError:
    return DataError(f"config.json cannot be used ({why})", fix="restore the file")


def _entries(value: object, name: str = "") -> Iterator[tuple[str, object]]:
    """(name, value) of every plain value in a JSON document; what lies in a list has the list's
    name."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _entries(inner, str(key))
    elif isinstance(value, list):
        for inner in value:
            yield from _entries(inner, name)
    else:
        yield name, value


def _gpt2(config: PretrainedConfig) -> ModelSpec | None:
    unusual = (
        config.scale_attn_by_inverse_layer_idx
        or not config.scale_attn_weights
        or config.add_cross_attention
    )
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
        biases=("qkv", "out", "up", "down"),
    )


def _llama(config: PretrainedConfig) -> ModelSpec | None:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = _rope(config, head_dim)
    if rope is None or config.hidden_act != "silu":
        return None
    window, windowed = _windows(config)
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
        sliding_window=window,
        window_layers=windowed,
        rope_inv_freq=rope[0],
        rope_scale=rope[1],
        biases=_llama_biases(config),
    )


def _windows(config: PretrainedConfig) -> tuple[int | None, tuple[int, ...]]:
    """The window, and the layers that have it; (None, ()) where none has."""
    window = getattr(config, "sliding_window", None)
    if config.model_type.startswith("qwen") and not getattr(config, "use_sliding_window", False):
        window = None
    if not window:
        return None, ()
    kinds = getattr(config, "layer_types", None)
    if not kinds:
        return window, tuple(range(config.num_hidden_layers))
    layers = tuple(i for i, kind in enumerate(kinds) if kind == "sliding_attention")
    return (window if layers else None), layers


def _llama_biases(config: PretrainedConfig) -> tuple[str, ...]:
    if config.model_type == "qwen2":
        return ("qkv",)
    attention = config.model_type in ("llama", "qwen3") and config.attention_bias
    mlp = config.model_type == "llama" and config.mlp_bias
    return (("qkv", "out") if attention else ()) + (("up", "down") if mlp else ())


def _rope(config: PretrainedConfig, head_dim: int) -> tuple[tuple[float, ...], float] | None:
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
        # in fp32, step by step as transformers: later positions multiply the last bit of a
        # frequency
        import torch

        inv_freq = 1.0 / (
            theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim)
        )
        return tuple((inv_freq / factor).tolist()), 1.0
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    inv_freq, scale = ROPE_INIT_FUNCTIONS[kind](config, "cpu")
    return tuple(inv_freq.tolist()), float(scale)
