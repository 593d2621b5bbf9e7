"""Random models with the shapes of real ones, and the clocks of the stages."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorabatch.infer.requests import Request, SamplingParams
from lorabatch.infer.runners.eager import NativeRunner
from lorabatch.infer.runners.graph import GraphRunner
from lorabatch.machine.device import TYPE_NAMES, choose_device, choose_dtype
from lorabatch.machine.environment import environment, gpu_description
from lorabatch.model.attention import Segment
from lorabatch.model.native import NativeModel
from lorabatch.model.spec import ModelSpec, spec_from_config
from lorabatch.model.weights import build_decoder


def _llama(hidden: int, mlp: int, layers: int, heads: int, kv: int, vocab: int, **more: Any) -> Any:
    sizes = {"hidden_size": hidden, "intermediate_size": mlp, "num_hidden_layers": layers}
    return {
        **sizes,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "vocab_size": vocab,
        "max_position_embeddings": 4096,
        "bos_token_id": None,
        "eos_token_id": None,
        **more,
    }


def _gpt2(hidden: int, layers: int, heads: int, vocab: int) -> Any:
    sizes = {"n_embd": hidden, "n_layer": layers, "n_head": heads, "vocab_size": vocab}
    return {**sizes, "n_positions": 1024, "bos_token_id": None, "eos_token_id": None}


# name -> (transformers' configuration, its values)
MODELS = {
    "smollm2-135m": (
        "LlamaConfig",
        _llama(576, 1536, 30, 9, 3, 49152, tie_word_embeddings=True),
    ),
    "distilgpt2": ("GPT2Config", _gpt2(768, 6, 12, 50257)),
    "qwen2.5-0.5b": (
        "Qwen2Config",
        _llama(896, 4864, 24, 14, 2, 151936, tie_word_embeddings=True),
    ),
    "qwen3-0.6b": (
        "Qwen3Config",
        _llama(1024, 3072, 28, 16, 8, 151936, tie_word_embeddings=True, head_dim=128),
    ),
    "mistral-window": (
        "MistralConfig",
        _llama(1024, 3584, 8, 16, 4, 32000, sliding_window=64),
    ),
    "llama-7b": ("LlamaConfig", _llama(4096, 11008, 32, 32, 32, 32000)),
    "tiny-llama": ("LlamaConfig", _llama(64, 96, 2, 4, 2, 300)),
    "tiny-gpt2": ("GPT2Config", _gpt2(64, 2, 4, 300)),
}


@dataclass(frozen=True)
class Sizes:
    """What the stages ask of how large a model."""

    checked: tuple[str, ...]  # compared with transformers
    timed: tuple[str, ...]
    large: str
    batches: tuple[int, ...]
    prompt: int
    new: int
    steps: tuple[tuple[int, int], ...]  # of training: documents, tokens of each
    context: int  # of the stage "long"
    adapters: tuple[int, ...]
    gemm: int
    repeats: int


TRUE = Sizes(
    checked=("smollm2-135m", "distilgpt2", "qwen2.5-0.5b", "qwen3-0.6b", "mistral-window"),
    timed=("smollm2-135m", "qwen2.5-0.5b"),
    large="llama-7b",
    batches=(16, 64, 256, 1024),
    prompt=128,
    new=64,
    steps=((8, 128), (64, 128), (64, 512)),
    context=3800,
    adapters=(1, 4, 32),
    gemm=8192,
    repeats=20,
)
TINY = Sizes(
    checked=("tiny-llama", "tiny-gpt2"),
    timed=("tiny-llama",),
    large="tiny-llama",
    batches=(2, 5),
    prompt=12,
    new=4,
    steps=((2, 12), (4, 9)),
    context=80,
    adapters=(1, 3),
    gemm=64,
    repeats=2,
)


class Setup:
    def __init__(self, sizes: Sizes, out: Path, dtype: str | None = None) -> None:
        self.sizes, self.out = sizes, out
        self.device = choose_device(no_cuda=False)
        self.gpu = self.device.type == "cuda"
        self.dtype = choose_dtype(dtype or ("auto" if self.gpu else "fp32"), self.device)

    def facts(self) -> dict[str, Any]:
        return {
            "gpu": gpu_description(),
            "dtype": TYPE_NAMES[self.dtype],
            "sizes": "true" if self.sizes is TRUE else "tiny",
            "environment": environment(),
        }

    def network(self, name: str) -> Any:
        """transformers' model with random weights, made on the device; noise on every parameter, so
        that zero biases and unit norms hide nothing."""
        import transformers

        kind, values = MODELS[name]
        config = getattr(transformers, kind)(**values)
        torch.manual_seed(0)
        with torch.device(self.device):
            network = transformers.AutoModelForCausalLM.from_config(config, dtype=self.dtype)
            network.eval().requires_grad_(False)
            for parameter in network.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.02)
        return network

    def native(self, network: Any) -> NativeModel:
        """Ours over the same weights, in its type."""
        tensors = dict(network.state_dict())
        spec = spec_from_config(network.config)
        assert isinstance(spec, ModelSpec)
        decoder = build_decoder(
            spec, tensors, dtype=network.dtype, device=self.device, prepack=False
        )
        return NativeModel(spec, decoder, "random")

    def ways(self) -> tuple[str, ...]:
        """How steps are launched; a CPU records none."""
        return ("eager", "recorded") if self.gpu else ("eager",)

    def runner(
        self, model: NativeModel, slots: int, capacity: int, way: str = "eager", **more: Any
    ) -> NativeRunner:
        kind = GraphRunner if way == "recorded" else NativeRunner
        return kind(model, num_slots=slots, capacity=capacity, **more)

    def prompts(self, model: NativeModel, count: int, length: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(count * length)
        shape = (count, length)
        return torch.randint(model.spec.vocab_size, shape, generator=generator).tolist()

    def wait(self) -> None:
        if self.gpu:
            torch.cuda.synchronize()

    def seconds(self, run: Callable[[], object], repeats: int) -> float:
        """Of one call, the mean over ``repeats`` after one that warms up."""
        run()
        self.wait()
        start = time.perf_counter()
        for _ in range(repeats):
            run()
        self.wait()
        return (time.perf_counter() - start) / repeats

    def peak_bytes(self) -> int | None:
        return torch.cuda.max_memory_allocated() if self.gpu else None


def requests(count: int, **params: Any) -> list[Request]:
    return [Request(str(i), i, "", SamplingParams(ignore_eos=True, **params)) for i in range(count)]


def whole_prompts(prompts: Sequence[Sequence[int]], **more: Any) -> list[Segment]:
    return [Segment(slot, 0, ids, **more) for slot, ids in enumerate(prompts)]


def next_tokens(length: int, tokens: Sequence[int], adapters: Sequence[int] = ()) -> list[Segment]:
    """One new token of each slot, whose sequences are all ``length`` tokens long."""
    owners = adapters or [-1] * len(tokens)
    return [
        Segment(slot, length, [token], adapter=owner)
        for slot, (token, owner) in enumerate(zip(tokens, owners, strict=True))
    ]


def relative_error(got: Tensor, expected: Tensor) -> float:
    got, expected = got.double().cpu(), expected.double().cpu()
    return float((got - expected).norm() / expected.norm())
