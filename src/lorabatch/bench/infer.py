"""``lorabatch bench infer``: batches of one size after another, each held against the ceiling of
the machine."""

from __future__ import annotations

import itertools
import random
import time
from typing import TYPE_CHECKING

import torch

from lorabatch.bench.quality import run_quality
from lorabatch.bench.sweep import Bench, Measure
from lorabatch.config_measure import BenchInferConfig
from lorabatch.errors import UnavailableError, UsageError
from lorabatch.infer.engine import Engine
from lorabatch.infer.requests import Request, SamplingParams
from lorabatch.infer.runners import load_for_runner, make_runner
from lorabatch.machine.ceilings import cold_flops_per_s, kernel_facts, measured_bytes_per_s
from lorabatch.machine.device import TYPE_NAMES
from lorabatch.model import load
from lorabatch.model.cost import decode_bytes, element_bytes
from lorabatch.model.native import NativeModel
from lorabatch.model.spec import ModelSpec
from lorabatch.progress import counted
from lorabatch.schema import Fields, Record

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def run_bench_infer(config: BenchInferConfig, command: list[str]) -> int:
    """Measure, print the table, write its JSON twin."""
    bench = Bench.prepare(config)
    device = bench.device
    model = load_for_runner(
        bench.source,
        bench.model_config,
        backend="native",
        dtype=bench.dtype,
        device=device,
        quantize=config.quantize,
    )
    assert isinstance(model, NativeModel)
    tokenizer = load.load_tokenizer(bench.source.path)
    if config.quality:
        return run_quality(config, model, tokenizer)
    if config.input_tokens + config.max_new_tokens > model.max_positions:
        raise UsageError(
            f"the model has {model.max_positions} positions",
            where="--input_tokens",
            fix="give fewer tokens",
        )
    points = bench.points(_one_batch(model, tokenizer, config, most=bench.sizes[-1]))
    precision = TYPE_NAMES[bench.dtype] if config.quantize == "none" else config.quantize

    def rates(threads: int) -> tuple[float, float]:
        torch.set_num_threads(threads)
        found = cold_flops_per_s(precision, device), measured_bytes_per_s(device)
        if not all(found):
            raise UnavailableError(
                "no memory left to measure the ceilings", fix="use a smaller batch"
            )
        return found

    for point in points:
        point |= _ceiling(
            bench, config, model.spec, point, rates(point.get("threads", bench.threads))
        )
    flops_per_s, bytes_per_s = rates(bench.threads)
    print(_described(bench, config, flops_per_s, bytes_per_s))
    return bench.finish(
        "bench infer",
        points,
        command,
        cold_flops_per_s=flops_per_s,
        measured_bytes_per_s=bytes_per_s,
        **kernel_facts(device),
    )


def _ceiling(
    bench: Bench,
    config: BenchInferConfig,
    spec: ModelSpec,
    point: Fields,
    rates: tuple[float, float],
) -> Record:
    """The tokens per second that the machine's rates allow at this point of a sweep."""
    size = point.get("batch_size", config.batch_sizes[0])
    width = element_bytes(config.quantize, bench.dtype.itemsize)
    least_s, bound = ceiling_seconds(
        spec, size, config.input_tokens, config.max_new_tokens, rates, width
    )
    ceiling = size * config.max_new_tokens / least_s
    return {
        "ceiling_tokens_per_s": ceiling,
        "share_of_ceiling": (point["tokens_per_s"]["median"] or 0) / ceiling,
        "bound": bound,
    }


def _described(
    bench: Bench, config: BenchInferConfig, flops_per_s: float, bytes_per_s: float
) -> str:
    precision = TYPE_NAMES[bench.dtype]
    if config.quantize != "none":
        precision = f"{config.quantize} weights, {precision} cache"
    return (
        f"{bench.source.name}, {precision} on {bench.device}, {counted(bench.threads, 'thread')}; "
        f"prompts of {config.input_tokens} tokens, {config.max_new_tokens} new ones; measured "
        f"here: {flops_per_s / 1e9:.0f} Gflop/s with cold weights, {bytes_per_s / 1e9:.1f} GB/s\n"
    )


def _one_batch(
    model: NativeModel, tokenizer: PreTrainedTokenizerBase, config: BenchInferConfig, *, most: int
) -> Measure:
    """A function that completes one whole batch of up to ``most`` requests."""
    capacity = config.input_tokens + config.max_new_tokens
    prefill_tokens = max(2048, config.input_tokens)
    runner = make_runner(
        model,
        num_slots=most,
        capacity=capacity,
        max_tokens=prefill_tokens + most,
        quantize=config.quantize,
    )
    engine = Engine(runner, tokenizer, (), max_running=most, prefill_tokens=prefill_tokens)
    number = itertools.count()

    def one_batch(size: int) -> dict[str, float | None]:
        requests = _requests(size, next(number), model.spec, config)
        start = time.perf_counter()
        engine.run(requests, lambda request: None)
        seconds = time.perf_counter() - start
        return {
            "tokens_per_s": size * config.max_new_tokens / seconds,
            "batch_latency_ms": seconds * 1e3,
        }

    return one_batch


def _requests(
    size: int, repetition: int, spec: ModelSpec, config: BenchInferConfig
) -> list[Request]:
    """Random prompts that share nothing, so that no prefix is found twice."""
    rng, count = random.Random(f"{size} {repetition}"), config.max_new_tokens
    params = SamplingParams(max_new_tokens=count, ignore_eos=True)
    ids = [rng.choices(range(spec.vocab_size), k=config.input_tokens) for _ in range(size)]
    return [
        Request(str(i), i, "", params, token_ids=token_ids, max_new_tokens=count)
        for i, token_ids in enumerate(ids)
    ]


def ceiling_seconds(
    spec: ModelSpec,
    size: int,
    input_tokens: int,
    new_tokens: int,
    rates: tuple[float, float],
    element_bytes: tuple[int, int],
) -> tuple[float, str]:
    """(least seconds for a batch, what decoding is bound by) at these FLOP/s (of cold weights) and
    bytes/s; attention's FLOPs are left out.

    element_bytes: of weights, and of cached keys and values.

    One prefill of all prompts, then new_tokens - 1 steps of one token per request; each takes the
    longer of its products and its bytes (all weights once, the cached keys and values of every
    request).
    """
    flops_per_s, bytes_per_s = rates
    head = spec.hidden_size * spec.vocab_size
    weight_s = decode_bytes(spec, steps=1, kv_tokens=0, element_bytes=element_bytes) / bytes_per_s
    prefill_flops = 2.0 * size * ((spec.num_matmul_params - head) * input_tokens + head)
    steps = new_tokens - 1
    kv_tokens = size * sum(range(input_tokens, input_tokens + steps))
    compute_s = steps * 2.0 * size * spec.num_matmul_params / flops_per_s
    memory_s = (
        decode_bytes(spec, steps=steps, kv_tokens=kv_tokens, element_bytes=element_bytes)
        / bytes_per_s
    )
    return max(prefill_flops / flops_per_s, weight_s) + max(
        compute_s, memory_s
    ), "compute" if compute_s > memory_s else "memory"
