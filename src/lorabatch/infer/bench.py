"""``lorabatch bench infer``: batches of one size after another, each held against the ceiling of the machine."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

from lorabatch import hub
from lorabatch.config import BenchInferConfig
from lorabatch.errors import UsageError
from lorabatch.infer.engine import Engine
from lorabatch.infer.requests import Request, SamplingParams
from lorabatch.infer.runner import NativeRunner
from lorabatch.measure.environment import environment, gpu_description
from lorabatch.measure.machine import measured_bytes_per_s, measured_flops_per_s
from lorabatch.measure.roofline import decode_bytes
from lorabatch.measure.statistics import percentile
from lorabatch.model import load
from lorabatch.model.device import TYPE_NAMES, choose_device, choose_dtype, choose_threads
from lorabatch.model.native import NativeModel
from lorabatch.model.spec import ModelSpec
from lorabatch.records import utc_now, write_json


def run_bench_infer(config: BenchInferConfig) -> int:
    """Measure, print the table, write its JSON twin."""
    hub.prepare_environment()
    source = hub.find_model(config.base_model)
    device, threads = choose_device(no_cuda=config.no_cuda), choose_threads(config.threads)
    dtype = choose_dtype(config.dtype, device)
    model = load.load_model(source, load.load_config(source.path), backend="native", dtype=dtype, device=device)
    assert isinstance(model, NativeModel)
    if config.input_tokens + config.max_new_tokens > model.max_positions:
        raise UsageError(f"the model has {model.max_positions} positions", where="--input_tokens", fix="give fewer tokens")
    rates = measured_flops_per_s(dtype, device), measured_bytes_per_s(device)
    rows = [
        _row(size, seconds, model.spec, rates, config, dtype.itemsize)
        for size, seconds in _measure(model, load.load_tokenizer(source.path), config).items()
    ]
    record = {
        "schema_version": 1,
        "kind": "bench infer",
        "measured_at": utc_now(),
        "config": config.to_dict(),
        "environment": environment(),
        "gpu": gpu_description(),
        "model": source.name,
        "dtype": TYPE_NAMES[dtype],
        "device": str(device),
        "threads": threads,
        "flops_per_s": rates[0],
        "bytes_per_s": rates[1],
        "batches": rows,
    }
    path = Path(config.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, record)
    _print_table(record)
    print(path)
    return 0


def _measure(model: NativeModel, tokenizer: Any, config: BenchInferConfig) -> dict[int, list[float]]:
    """Seconds of each repetition by batch size. The order of sizes turns around each time, so that a drift hits all alike."""
    engines = {}
    for size in config.batch_sizes:
        runner = NativeRunner(model, num_slots=size, capacity=config.input_tokens + config.max_new_tokens)
        engines[size] = Engine(runner, tokenizer, (), max_running=size, prefill_tokens=max(2048, config.input_tokens))
    seconds: dict[int, list[float]] = {size: [] for size in engines}
    for repetition in range(config.repeats + 1):
        for size in list(engines)[:: 1 if repetition % 2 else -1]:
            start = time.perf_counter()
            engines[size].run(_requests(size, repetition, model.spec, config), lambda request: None)
            if repetition:  # the first one warms up
                seconds[size].append(time.perf_counter() - start)
    return seconds


def _requests(size: int, repetition: int, spec: ModelSpec, config: BenchInferConfig) -> list[Request]:
    """Random prompts that share nothing, so that no prefix is found twice."""
    rng, count = random.Random(f"{size} {repetition}"), config.max_new_tokens
    params = SamplingParams(max_new_tokens=count, ignore_eos=True)
    ids = [rng.choices(range(spec.vocab_size), k=config.input_tokens) for _ in range(size)]
    return [Request(str(i), i, "", params, token_ids=token_ids, max_new_tokens=count) for i, token_ids in enumerate(ids)]


def ceiling_seconds(
    spec: ModelSpec, size: int, input_tokens: int, new_tokens: int, rates: tuple[float, float], element_bytes: int
) -> tuple[float, str]:
    """(least seconds for a batch, what decoding is bound by) at these FLOP/s and bytes/s; attention's FLOPs are left out.

    One prefill of all prompts, then new_tokens - 1 steps of one token per request; each takes the longer of its
    products and its bytes (all weights once, the cached keys and values of every request).
    """
    flops_per_s, bytes_per_s = rates
    head = spec.hidden_size * spec.vocab_size
    weight_s = decode_bytes(spec, steps=1, kv_tokens=0, element_bytes=element_bytes) / bytes_per_s
    prefill_flops = 2.0 * size * ((spec.num_matmul_params - head) * input_tokens + head)
    steps = new_tokens - 1
    kv_tokens = size * sum(input_tokens + i for i in range(steps))
    compute_s = steps * 2.0 * size * spec.num_matmul_params / flops_per_s
    memory_s = decode_bytes(spec, steps=steps, kv_tokens=kv_tokens, element_bytes=element_bytes) / bytes_per_s
    return max(prefill_flops / flops_per_s, weight_s) + max(compute_s, memory_s), "compute" if compute_s > memory_s else "memory"


def _row(
    size: int, seconds: list[float], spec: ModelSpec, rates: tuple[float, float], config: BenchInferConfig, element_bytes: int
) -> dict[str, Any]:
    tokens = size * config.max_new_tokens
    least_s, bound = ceiling_seconds(spec, size, config.input_tokens, config.max_new_tokens, rates, element_bytes)
    median_s = percentile(seconds, 50)
    assert median_s
    return {
        "batch_size": size,
        "tokens_per_s": tokens / median_s,
        "min_tokens_per_s": tokens / max(seconds),
        "max_tokens_per_s": tokens / min(seconds),
        "batch_latency_p50_ms": median_s * 1e3,
        "batch_latency_p95_ms": (percentile(seconds, 95) or 0) * 1e3,
        "ceiling_tokens_per_s": tokens / least_s,
        "share_of_ceiling": least_s / median_s,
        "bound": bound,
    }


def _print_table(record: dict[str, Any]) -> None:
    config = record["config"]
    print(
        f"{record['model']}, {record['dtype']} on {record['device']}, {record['threads']} threads; prompts of {config['input_tokens']} tokens, "
        f"{config['max_new_tokens']} new ones, median of {config['repeats']}; measured here: "
        f"{record['flops_per_s'] / 1e9:.0f} Gflop/s, {record['bytes_per_s'] / 1e9:.1f} GB/s"
    )
    heads = ("batch", "output tokens/s", "lowest", "highest", "p50 ms", "p95 ms", "ceiling", "share", "bound by")
    print("\n" + "".join(f"{head:>{max(9, len(head) + 2)}}" for head in heads))
    for row in record["batches"]:
        numbers = [row[n] for n in ("tokens_per_s", "min_tokens_per_s", "max_tokens_per_s", "batch_latency_p50_ms", "batch_latency_p95_ms")]
        texts = [str(row["batch_size"]), *(f"{n:.0f}" for n in (*numbers, row["ceiling_tokens_per_s"]))]
        texts += [f"{row['share_of_ceiling']:.0%}", row["bound"]]
        print("".join(f"{text:>{max(9, len(head) + 2)}}" for head, text in zip(heads, texts, strict=True)))
