"""Memory before the first step: what a block of tokens will need, how large a block fits, and what to do when it did not.

The prediction counts what is alive at the worst moment, the end of the forward pass and the top of the
backward pass: what every layer keeps, one layer's gradients, a chunk of logits, the packs of the
transposed weights, the optimiser. It is held against the real peak in ``tests/test_planner.py``.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch

from lorabatch.config import TrainConfig
from lorabatch.corpus.tokens import TokenDocument
from lorabatch.errors import TrainingError
from lorabatch.model.backend import Backend
from lorabatch.model.device import free_bytes
from lorabatch.model.linear import Prepacked
from lorabatch.model.loss import CHUNK_ELEMENTS
from lorabatch.model.native import NativeModel
from lorabatch.model.panels import Panels, whole
from lorabatch.model.spec import ModelSpec

HEADROOM = 0.9  # of the free memory: allocators keep some of what was freed


def layer_elements(spec: ModelSpec, checkpointing: str) -> int:
    """Numbers that one layer keeps for the backward pass, per token."""
    attention, mlp = spec.num_heads * spec.head_dim, spec.intermediate_size
    qkv = attention + 2 * spec.num_kv_heads * spec.head_dim
    up = 2 * mlp if spec.family == "llama" else mlp
    if checkpointing == "full":
        return spec.hidden_size
    kept = 2 * spec.hidden_size + qkv + attention + up
    return kept + (2 * spec.hidden_size + mlp if checkpointing == "none" else 0)


def step_bytes(
    spec: ModelSpec, *, block_tokens: int, element_bytes: int, lora_params: int, rank: int, checkpointing: str, packed: bool
) -> int:
    """Bytes that the first step adds to what the process holds once the model is loaded.

    packed: linear layers make a second, transposed pack of their weights for the backward pass.
    """
    low = 7 * whole(rank, 16)  # x Aᵀ of the seven parts of a layer, as the kernels keep it
    kept = spec.num_layers * (layer_elements(spec, checkpointing) + low)
    if checkpointing == "full":
        kept += layer_elements(spec, "none")
    up = 2 * spec.intermediate_size if spec.family == "llama" else spec.intermediate_size
    gradients = 2 * up + 2 * spec.intermediate_size + 3 * spec.hidden_size  # of one layer, and what it computes again
    per_token = (kept + gradients + 3 * spec.hidden_size) * element_bytes + spec.num_layers * spec.num_heads * 4
    transposed = spec.num_matmul_params * element_bytes if packed else 0
    return block_tokens * per_token + CHUNK_ELEMENTS * element_bytes + transposed + 3 * 4 * lora_params


def plan(model: Backend, config: TrainConfig, lora_params: int) -> tuple[int, int] | None:
    """(tokens of a block, predicted bytes of its step): ``--block_tokens`` or as many halvings of it as memory asks for.

    None for the hf backend, whose needs are not known.
    """
    if not isinstance(model, NativeModel):
        return None
    decoder = model.decoder
    free, tokens = free_bytes(decoder.device), config.block_tokens
    while True:
        needed = step_bytes(
            model.spec,
            block_tokens=tokens,
            element_bytes=decoder.embedding.element_size(),
            lora_params=lora_params,
            rank=config.lora_r,
            checkpointing=config.checkpointing,
            packed=isinstance(decoder.head.product, (Prepacked, Panels)),
        )
        if needed <= HEADROOM * free or tokens // 2 < config.max_len:
            break
        tokens //= 2
    if tokens < config.block_tokens or needed > HEADROOM * free:
        print(
            f"memory: a step of {tokens} tokens needs {needed / 2**30:.1f} GiB of {free / 2**30:.1f} GiB free; "
            + (f"blocks of {tokens} instead of {config.block_tokens} tokens" if tokens < config.block_tokens else "it may not fit")
            + ("" if config.checkpointing == "full" else " (--checkpointing full needs less)"),
            file=sys.stderr,
        )
    return tokens, needed


def halved(block_tokens: int, documents: Sequence[TokenDocument], error: BaseException) -> int:
    """The next smaller block. TrainingError when each document already has a block of its own."""
    if block_tokens <= min(d.num_tokens for d in documents):
        raise TrainingError(
            f"out of memory with one document at a time ({str(error).splitlines()[0] if str(error) else type(error).__name__})",
            where=f"blocks of {block_tokens} tokens",
            fix="lower --max_len, or use --checkpointing full",
        ) from error
    smaller = block_tokens // 2
    print(f"out of memory with blocks of {block_tokens} tokens: the step is repeated with blocks of {smaller}", file=sys.stderr)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return smaller
