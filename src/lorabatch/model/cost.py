"""How much work the model is: FLOPs and bytes that the mathematics asks for, whatever the code
does.

LoRA's frozen weights need a forward product and an input-gradient product per token, no weight
gradient: 4 FLOPs per parameter, not the 6 of full fine-tuning. Adapters need all three: 6.
"""

from __future__ import annotations

from lorabatch.model.spec import ModelSpec

ABOVE = (
    "the ceiling is too low: others had the cores when it was measured, or the weights fit in the "
    "caches; run lorabatch bench machine"
)


def above_ceiling(share: float | None) -> str:
    """What must stand beside a share of more than 100 %; empty for others."""
    return f" ({ABOVE})" if share is not None and share > 1 else ""


def training_flops(
    spec: ModelSpec, *, tokens: int, targets: int, squared_lengths: int, lora_params: int
) -> float:
    """FLOPs of forward and backward of one set of documents.

    tokens: all of them; targets: supervised ones (only these reach the head); squared_lengths:
    sum of L² over documents (causal attention: half of it, two products forward and four backward).
    """
    head = spec.hidden_size * spec.vocab_size
    body = spec.num_matmul_params - head
    attention = 6.0 * squared_lengths * spec.num_layers * spec.num_heads * spec.head_dim
    return 4.0 * body * tokens + 4.0 * head * targets + 6.0 * lora_params * tokens + attention


def element_bytes(quantize: str, dtype_bytes: int) -> tuple[int, int]:
    """Of a weight, and of a cached key or value, which stays in the model's type."""
    return 1 if quantize == "int8" else dtype_bytes, dtype_bytes


def decode_bytes(
    spec: ModelSpec, *, steps: int, kv_tokens: int, element_bytes: tuple[int, int]
) -> float:
    """Bytes that decoding must read: all matrix weights once a step, and the cached keys and
    values. element_bytes: of the two."""
    weight, kept = element_bytes
    return float(
        weight * steps * spec.num_matmul_params + kept * kv_tokens * spec.kv_elements_per_token
    )


def decode_flops(spec: ModelSpec, *, tokens: int, kv_tokens: int) -> float:
    """FLOPs of decoding: every matrix weight once a token, and each query against every cached key
    and value."""
    attention = 4.0 * kv_tokens * spec.num_layers * spec.num_heads * spec.head_dim
    return 2.0 * tokens * spec.num_matmul_params + attention
