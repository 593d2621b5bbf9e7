"""What a run will need, before anything is loaded: sizes from ``config.json``, rates that this
machine reached before, and what to ask Slurm for.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from lorabatch.errors import UsageError
from lorabatch.machine.ceilings import cold_flops_per_s, kept_ceilings, measured_bytes_per_s
from lorabatch.machine.device import TYPE_NAMES
from lorabatch.model.lora import select
from lorabatch.model.spec import ModelSpec
from lorabatch.progress import clock

PROCESS_BYTES = int(0.85 * 2**30)  # Python, torch and transformers, with a tokenizer
START_S = 20.0  # importing, looking up, loading: measured on quiet machines as 5 to 15 s
# Of the cold product rate: what training reached in benchmarks/results on two kinds of CPU was 0.2
# to 0.66, and what a step of inference reaches of the rate that bounds it is about a half.
USUAL_SHARE = {"train": 0.3, "infer": 0.5}
MEMORY_RESERVE, TIME_RESERVE = 1.25, 1.5  # what is asked for, over what is expected
# Of a node of the site, where this machine is not one: what a run reaches there.
RATE_VARIABLE, BYTES_VARIABLE = "SITE_FLOPS_PER_S", "SITE_BYTES_PER_S"


@dataclass(frozen=True)
class Rates:
    """What the run will reach. ``source`` says how that is known."""

    flops_per_s: float
    bytes_per_s: float
    source: str


def rates(kind: str, dtype: torch.dtype, device: torch.device) -> Rates:
    """kind: "train" or "infer". UsageError for a stated rate that is no number."""
    if RATE_VARIABLE in os.environ:
        memory = _stated(BYTES_VARIABLE) if BYTES_VARIABLE in os.environ else math.inf
        return Rates(_stated(RATE_VARIABLE), memory, f"stated by {RATE_VARIABLE}")
    name, share = TYPE_NAMES[dtype], USUAL_SHARE[kind]
    memory = share * measured_bytes_per_s(device) if kind == "infer" else math.inf
    reached = float(kept_ceilings(device).get(reached_name(kind, dtype)) or 0.0)
    if reached:
        return Rates(reached, memory, f"reached by an earlier {kind} on this machine")
    cold = cold_flops_per_s(name, device)
    return Rates(share * cold, memory, f"{share:.0%} of this machine's measured products")


def reached_name(kind: str, dtype: torch.dtype) -> str:
    """Of the rate that a run reached, among the machine's ceilings."""
    return f"{TYPE_NAMES[dtype]}_{kind}_reached_flops_per_s"


def _stated(variable: str) -> float:
    text = os.environ[variable]
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise UsageError(
            f"'{text}' is not a rate", where=variable, fix="give a number, for example 5e11"
        )
    return value


def linear_shapes(spec: ModelSpec) -> dict[str, tuple[int, int]]:
    """{path: (inputs, outputs)} of the layers that may carry an adapter, under peft's names."""
    hidden, mlp = spec.hidden_size, spec.intermediate_size
    q, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    if spec.family == "gpt2":
        parts = {"attn.c_attn": (hidden, q + 2 * kv), "attn.c_proj": (q, hidden)}
        parts |= {"mlp.c_fc": (hidden, mlp), "mlp.c_proj": (mlp, hidden)}
        prefix = "transformer.h"
    else:
        parts = {f"self_attn.{n}_proj": (hidden, kv) for n in "kv"}
        parts |= {"self_attn.q_proj": (hidden, q), "self_attn.o_proj": (q, hidden)}
        parts |= {f"mlp.{n}_proj": (hidden, mlp) for n in ("gate", "up")}
        parts |= {"mlp.down_proj": (mlp, hidden)}
        prefix = "model.layers"
    return {f"{prefix}.{i}.{n}": s for i in range(spec.num_layers) for n, s in parts.items()}


def lora_params(spec: ModelSpec, *, r: int, targets: tuple[str, ...]) -> int:
    """UsageError for a target that the model does not have."""
    shapes = linear_shapes(spec)
    return sum(r * sum(shapes[path]) for path in select(shapes, targets))


def base_bytes(spec: ModelSpec, weight_bytes: float, table_bytes: int) -> int:
    """Of the frozen model. weight_bytes: of an element of a linear layer; table_bytes: of the
    embedding and the head."""
    head = spec.hidden_size * spec.vocab_size
    tables = head * (1 if spec.tied_head else 2)
    positions = 0 if spec.rope_inv_freq else spec.max_positions * spec.hidden_size
    linears = spec.num_matmul_params - head
    return int(linears * weight_bytes + (tables + positions) * table_bytes)


def request(memory_bytes: float, seconds: float) -> str:
    """Slurm's flags with a reserve: whole GiB, five minutes at a time."""
    gigabytes = math.ceil(MEMORY_RESERVE * memory_bytes / 2**30)
    minutes = 5 * math.ceil(TIME_RESERVE * seconds / 300)
    return f"--mem={gigabytes}G --time={minutes // 60}:{minutes % 60:02d}:00"


def table(rows: Iterable[tuple[str, str]]) -> str:
    rows = list(rows)
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"  {name:<{width}}  {value}" for name, value in rows)


def needs(memory_bytes: float, seconds: float, rate: Rates) -> Sequence[tuple[str, str]]:
    """The rows that end every forecast."""
    return (
        ("memory", f"{memory_bytes / 2**30:.2f} GiB"),
        ("time", f"{clock(seconds)} at {rate.flops_per_s / 1e9:.0f} GFLOP/s ({rate.source})"),
        ("ask Slurm for", request(memory_bytes, seconds)),
    )
