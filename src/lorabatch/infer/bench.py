"""``lorabatch bench infer``: batches of one size after another, each held against the ceiling of the machine."""

from __future__ import annotations

import itertools
import random
import time
from typing import Any

import torch

from lorabatch.config import BenchInferConfig
from lorabatch.errors import UsageError
from lorabatch.infer.engine import Engine
from lorabatch.infer.quality import run_quality
from lorabatch.infer.requests import Request, SamplingParams
from lorabatch.infer.runner import load_for_runner, make_runner
from lorabatch.measure.bench import Bench, Measure
from lorabatch.measure.machine import cold_flops_per_s, kernel_facts, measured_bytes_per_s
from lorabatch.measure.roofline import decode_bytes, element_bytes
from lorabatch.model import load
from lorabatch.model.device import TYPE_NAMES
from lorabatch.model.native import NativeModel
from lorabatch.model.spec import ModelSpec


def run_bench_infer(config: BenchInferConfig, command: list[str]) -> int:
    """Measure, print the table, write its JSON twin."""
    bench = Bench.prepare(config)
    dtype, device = bench.dtype, bench.device
    model = load_for_runner(bench.source, bench.model_config, backend="native", dtype=dtype, device=device, quantize=config.quantize)
    assert isinstance(model, NativeModel)
    tokenizer = load.load_tokenizer(bench.source.path)
    if config.quality:
        return run_quality(config, model, tokenizer)
    if config.input_tokens + config.max_new_tokens > model.max_positions:
        raise UsageError(f"the model has {model.max_positions} positions", where="--input_tokens", fix="give fewer tokens")
    points = bench.points(_one_batch(model, tokenizer, config, most=bench.sizes[-1]))
    width = element_bytes(config.quantize, dtype.itemsize)
    kind = TYPE_NAMES[dtype] if config.quantize == "none" else config.quantize

    def rates(threads: int) -> tuple[float, float]:
        torch.set_num_threads(threads)
        return cold_flops_per_s(kind, device), measured_bytes_per_s(device)

    for point in points:
        size, measured = point.get("batch_size", config.batch_sizes[0]), rates(point.get("threads", bench.threads))
        least_s, bound = ceiling_seconds(model.spec, size, config.input_tokens, config.max_new_tokens, measured, width)
        ceiling = size * config.max_new_tokens / least_s
        point |= {"ceiling_tokens_per_s": ceiling, "share_of_ceiling": (point["tokens_per_s"]["median"] or 0) / ceiling, "bound": bound}
    flops_per_s, bytes_per_s = rates(bench.threads)
    precision = TYPE_NAMES[dtype] if config.quantize == "none" else f"{config.quantize} weights, {TYPE_NAMES[dtype]} cache"
    print(
        f"{bench.source.name}, {precision} on {device}, {bench.threads} threads; prompts of {config.input_tokens} tokens, "
        f"{config.max_new_tokens} new ones; measured here: {flops_per_s / 1e9:.0f} Gflop/s with cold weights, "
        f"{bytes_per_s / 1e9:.1f} GB/s\n"
    )
    return bench.finish(
        "bench infer", points, command, cold_flops_per_s=flops_per_s, measured_bytes_per_s=bytes_per_s, **kernel_facts(device)
    )


def _one_batch(model: NativeModel, tokenizer: Any, config: BenchInferConfig, *, most: int) -> Measure:
    """A function that completes one whole batch of up to ``most`` requests."""
    capacity, prefill_tokens = config.input_tokens + config.max_new_tokens, max(2048, config.input_tokens)
    runner = make_runner(model, num_slots=most, capacity=capacity, max_tokens=prefill_tokens + most, quantize=config.quantize)
    engine = Engine(runner, tokenizer, (), max_running=most, prefill_tokens=prefill_tokens)
    number = itertools.count()

    def one_batch(size: int) -> dict[str, float | None]:
        requests = _requests(size, next(number), model.spec, config)
        start = time.perf_counter()
        engine.run(requests, lambda request: None)
        seconds = time.perf_counter() - start
        return {"tokens_per_s": size * config.max_new_tokens / seconds, "batch_latency_ms": seconds * 1e3}

    return one_batch


def _requests(size: int, repetition: int, spec: ModelSpec, config: BenchInferConfig) -> list[Request]:
    """Random prompts that share nothing, so that no prefix is found twice."""
    rng, count = random.Random(f"{size} {repetition}"), config.max_new_tokens
    params = SamplingParams(max_new_tokens=count, ignore_eos=True)
    ids = [rng.choices(range(spec.vocab_size), k=config.input_tokens) for _ in range(size)]
    return [Request(str(i), i, "", params, token_ids=token_ids, max_new_tokens=count) for i, token_ids in enumerate(ids)]


def ceiling_seconds(
    spec: ModelSpec, size: int, input_tokens: int, new_tokens: int, rates: tuple[float, float], element_bytes: tuple[int, int]
) -> tuple[float, str]:
    """(least seconds for a batch, what decoding is bound by) at these FLOP/s (of cold weights) and bytes/s; attention's FLOPs are left out.

    element_bytes: of weights, and of cached keys and values.

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
