"""Settings of ``lorabatch chat``, as ``config.py`` has them of the other commands."""

from __future__ import annotations

from dataclasses import dataclass

from lorabatch.config import A_MODEL, DTYPES, THREADS, InferConfig, TrainConfig
from lorabatch.settings import Settings, setting


@dataclass(frozen=True)
class ChatConfig(Settings, command="chat"):
    """Talk to a model on the terminal, or answer the lines of standard input one after another."""

    base_model: str = setting(TrainConfig.base_model, A_MODEL)
    adapter_dir: str | None = setting(
        None, "LoRA adapter in PEFT's format ('none': the base alone)"
    )
    beside_base: bool = setting(False, "the base answers too, for comparison")
    system: str | None = setting(None, "system message that begins the conversation")
    max_new_tokens: int = setting(256, "most tokens of an answer", minimum=1)
    temperature: float = setting(InferConfig.temperature, "0: greedy", minimum=0)
    top_k: int = setting(
        InferConfig.top_k, "sample among the k likeliest tokens (0: all)", minimum=0
    )
    top_p: float = setting(
        InferConfig.top_p, "sample among the likeliest tokens that sum to p", above=0, maximum=1
    )
    repetition_penalty: float = setting(
        InferConfig.repetition_penalty, "divide the logits of tokens already seen (1: off)", above=0
    )
    seed: int = setting(InferConfig.seed, "seed of sampling; answer i uses seed + i", minimum=0)
    max_len: int | None = setting(
        None,
        "longest conversation in tokens (default: the model's limit); the oldest turns go first",
        minimum=2,
    )
    dtype: str = setting(InferConfig.dtype, "type of weights and KV cache", choices=DTYPES)
    quantize: str = setting(
        InferConfig.quantize, "int8: 8-bit weights and activations", choices=("none", "int8")
    )
    no_cuda: bool = setting(False, "stay on the CPU")
    backend: str = setting(
        InferConfig.backend,
        "native decoder, or transformers for any other model",
        choices=("auto", "native", "hf"),
    )
    threads: int | None = setting(None, THREADS, minimum=1, maximum=1024)
