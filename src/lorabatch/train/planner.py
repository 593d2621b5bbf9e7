"""Memory before the first step: what a block of tokens will need, how large a block fits, and what
to do when it did not.

The prediction counts what is alive at the worst moment, the end of the forward pass and the top of
the backward pass: what every layer keeps, one layer's gradients, a chunk of logits, the packs of
the transposed weights, the optimiser. ``tests/train/test_planner.py`` compares it with the real
peak.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, TypeVar, cast

import torch

from lorabatch.config import TrainConfig
from lorabatch.corpus.tokens import TokenDocument
from lorabatch.errors import TrainingError
from lorabatch.kernels.onednn import Prepacked
from lorabatch.kernels.panels import Panels
from lorabatch.kernels.train_ops import low_width, train_ops
from lorabatch.machine.device import free_bytes, out_of_memory
from lorabatch.model.backend import Backend
from lorabatch.model.decoder import Decoder, Layer
from lorabatch.model.loss import CHUNK_ELEMENTS
from lorabatch.model.native import NativeModel
from lorabatch.model.spec import ModelSpec
from lorabatch.progress import note

T = TypeVar("T")
LESS_TO_UPDATE = "the adapter before this step is kept; lower --lora_r, or adapt fewer layers"
LESS_OF_A_SHARED_BASE = (
    "lower --block_tokens, or use --checkpointing full; then resume with --resume auto"
)
HEADROOM = 0.9  # of the free memory: allocators keep some of what was freed


@dataclass(frozen=True)
class Kept:
    """What torch's operators keep beside what our kernels do."""

    rotated: bool = False  # queries and keys after the rotation, beside those before it
    logits: bool = False  # of a chunk: as fp32, and their probabilities
    wide: bool = False  # the residual stream is fp32 although the model is fp16


def kept_by(decoder: Decoder) -> Kept:
    plain = train_ops(decoder.embedding) is None
    layers = cast("Iterable[Layer]", decoder.layers)
    apart = plain or any(layer.attention_why_not for layer in layers)
    return Kept(
        rotated=apart and decoder.position_embedding is None,
        logits=plain,
        wide=decoder.dtype == torch.float16,
    )


def layer_elements(spec: ModelSpec, checkpointing: str, kept: Kept = Kept()) -> int:
    """Numbers that one layer keeps for the backward pass, per token."""
    attention, mlp = spec.num_heads * spec.head_dim, spec.intermediate_size
    shared = spec.num_kv_heads * spec.head_dim
    up = 2 * mlp if spec.family == "llama" else mlp
    residual = spec.hidden_size * (2 if kept.wide else 1)
    if checkpointing == "full":
        return residual
    elements = 2 * residual + (attention + 2 * shared) + attention + up
    elements += attention + shared if kept.rotated else 0
    return elements + (2 * spec.hidden_size + mlp if checkpointing == "none" else 0)


def step_bytes(
    spec: ModelSpec,
    *,
    block_tokens: int,
    element_bytes: int,
    lora_params: int,
    r: int,
    checkpointing: str,
    packed: bool,
    kept: Kept = Kept(),
) -> int:
    """Bytes that the first step adds to what the process holds once the model is loaded.

    packed: linear layers make a second, transposed pack of their weights for the backward pass.
    """
    low = low_width([r] * 7)  # x Aᵀ of the seven parts of a layer, as the kernels keep it
    elements = spec.num_layers * (layer_elements(spec, checkpointing, kept) + low)
    if checkpointing == "full":
        elements += layer_elements(spec, "none", kept)
    up = 2 * spec.intermediate_size if spec.family == "llama" else spec.intermediate_size
    # of one layer, and what it computes again
    gradients = 2 * up + 2 * spec.intermediate_size + 3 * spec.hidden_size
    per_token = (
        elements + gradients + 3 * spec.hidden_size
    ) * element_bytes + spec.num_layers * spec.num_heads * 4
    transposed = spec.num_matmul_params * element_bytes if packed else 0
    chunk = CHUNK_ELEMENTS * (element_bytes + (4 + element_bytes if kept.logits else 0))
    return block_tokens * per_token + chunk + transposed + 3 * 4 * lora_params


def plan(model: Backend, config: TrainConfig, lora_params: int) -> tuple[int, int] | None:
    """(tokens of a block, predicted bytes of its step): ``--block_tokens`` or as many halvings of
    it as memory asks for.

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
            r=config.lora_r,
            checkpointing=config.checkpointing,
            packed=isinstance(decoder.head.product, (Prepacked, Panels)),
            kept=kept_by(decoder),
        )
        if needed <= HEADROOM * free or tokens // 2 < config.max_len:
            break
        tokens //= 2
    if tokens < config.block_tokens or needed > HEADROOM * free:
        _warn(config, tokens, needed, free)
    return tokens, needed


def _warn(config: TrainConfig, tokens: int, needed: int, free: int) -> None:
    smaller = f"blocks of {tokens} instead of {config.block_tokens} tokens"
    outcome = smaller if tokens < config.block_tokens else "it may not fit"
    advice = "" if config.checkpointing == "full" else " (--checkpointing full needs less)"
    print(
        f"memory: a step of {tokens} tokens needs {needed / 2**30:.1f} GiB of "
        f"{free / 2**30:.1f} GiB free; {outcome}{advice}",
        file=sys.stderr,
    )


class InBlocks(Protocol):
    """Whatever works in blocks of at most so many tokens."""

    block_tokens: int


def within_memory(
    work: Callable[[], T], sized: InBlocks, documents: Sequence[TokenDocument], *, even: bool
) -> T:
    """What ``work`` returns, tried again with smaller blocks (``sized.block_tokens``) while memory
    does not suffice.

    even: ranks that must make the same number of passes; the others are in the middle of one, so
    nothing can be tried again. TrainingError then, and with one document at a time.
    """
    while True:
        try:
            if not even:
                return work()
            with memory_for(f"a block of {sized.block_tokens} tokens", LESS_OF_A_SHARED_BASE):
                return work()
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            sized.block_tokens = halved(sized.block_tokens, documents, error)


@contextmanager
def memory_for(what: str, fix: str) -> Iterator[None]:
    """TrainingError with ``fix`` where memory does not suffice for what smaller blocks cannot
    help."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise TrainingError(f"out of memory ({_told(error)})", where=what, fix=fix) from error


def _told(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def halved(block_tokens: int, documents: Sequence[TokenDocument], error: BaseException) -> int:
    """The next smaller block. TrainingError when each document already has a block of its own."""
    if block_tokens <= min(d.num_tokens for d in documents):
        raise TrainingError(
            f"out of memory with one document at a time ({_told(error)})",
            where=f"blocks of {block_tokens} tokens",
            fix="lower --max_len, or use --checkpointing full",
        ) from error
    smaller = block_tokens // 2
    note(f"out of memory with blocks of {block_tokens} tokens: repeated with blocks of {smaller}")
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return smaller
