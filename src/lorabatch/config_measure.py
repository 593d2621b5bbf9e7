"""Settings of the commands that measure: bench, profile, compare."""

from __future__ import annotations

from dataclasses import dataclass

from lorabatch.config import A_MODEL, DTYPES, THREADS, InferConfig, TrainConfig
from lorabatch.settings import REQUIRED, Settings, setting


@dataclass(frozen=True)
class BenchMachineConfig(Settings, command="bench machine"):
    """Measure what this machine can do (matrix products, memory) and keep it as the ceiling of its
    runs."""

    output: str | None = setting(None, "also write the record to this JSON file")
    seconds: float = setting(0.1, "time spent on each figure", above=0)
    no_cuda: bool = setting(False, "stay on the CPU")
    threads: int | None = setting(None, THREADS, minimum=1, maximum=1024)


@dataclass(frozen=True)
class ProfileTrainConfig(TrainConfig, command="profile train"):
    """Train for a few steps and say where the time went; nothing but --profile_dir is written."""

    profile_dir: str = setting(
        "results/profile-train", "folder for trace, operators, memory and summary"
    )
    profile_steps: int = setting(3, "optimiser steps that torch.profiler records", minimum=1)


@dataclass(frozen=True)
class ProfileInferConfig(InferConfig, command="profile infer"):
    """Complete some prompts and say where the time went; nothing but --profile_dir is written."""

    profile_dir: str = setting(
        "results/profile-infer", "folder for trace, operators, memory and summary"
    )
    profile_steps: int = setting(8, "steps of the engine that torch.profiler records", minimum=1)


@dataclass(frozen=True)
class CompareConfig(Settings, command="compare"):
    """Say whether B is faster than A, or better: two run folders, or two files of lorabatch
    bench."""

    a: str = setting(REQUIRED, "run folder, or file of lorabatch bench", positional=True)
    b: str = setting(REQUIRED, "the same, of what may be faster", positional=True)
    across_hosts: bool = setting(
        False, "compare measurements of different machines, labelled as such"
    )


@dataclass(frozen=True)
class BenchConfig(Settings):
    """What both sweeps ask for."""

    base_model: str = setting(TrainConfig.base_model, A_MODEL)
    batch_sizes: tuple[int, ...] = setting(
        (1, 2, 4, 8, 16), "documents per optimiser step", minimum=1
    )
    repeats: int = setting(
        6,
        "measurements of each level, in alternating order, after a warm-up (six give an interval)",
        minimum=1,
    )
    threads_sweep: tuple[int, ...] = setting(
        (),
        "sweep these numbers of threads instead: at the first of --batch_sizes, and at that "
        "times the threads",
        minimum=1,
    )
    output: str = setting("results/bench-train.json", "JSON file for the figures of the table")
    dtype: str = setting(
        "auto", "type of weights and KV cache; adapters in training stay fp32", choices=DTYPES
    )
    no_cuda: bool = setting(False, "stay on the CPU")
    threads: int | None = setting(None, THREADS, minimum=1, maximum=1024)


@dataclass(frozen=True)
class BenchTrainConfig(BenchConfig, command="bench train"):
    """Training tokens/s of whole optimiser steps over batch sizes or numbers of threads."""

    document_tokens: int = setting(128, "random tokens of each document", minimum=2)
    block_tokens: int = setting(
        TrainConfig.block_tokens,
        "tokens of the packed block that goes through the model at once",
        minimum=2,
    )
    lora_r: int = setting(TrainConfig.lora_r, "rank of the adapters", minimum=1, maximum=65536)


@dataclass(frozen=True)
class BenchInferConfig(BenchConfig, command="bench infer"):
    """Output tokens/s and batch latency over batch sizes or threads, beside what the machine's
    measured rates would allow."""

    batch_sizes: tuple[int, ...] = setting(
        (1, 4, 16, 64, 256), "requests that run at the same time", minimum=1
    )
    output: str = setting("results/bench-infer.json", "JSON file for the figures of the table")
    input_tokens: int = setting(32, "random tokens of each prompt", minimum=1)
    max_new_tokens: int = setting(32, "tokens generated per request", minimum=2)
    quality: str | None = setting(
        None,
        "instead: bits per byte and greedy agreement of exact and int8 on this file's documents",
    )
    max_documents: int = setting(100, "--quality: use only the first N documents", minimum=1)
    quantize: str = setting(
        "none", "int8: 8-bit weights and activations on a CPU", choices=("none", "int8")
    )
