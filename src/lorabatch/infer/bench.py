"""``lorabatch bench infer``: batches of one size after another, each held against the ceiling of the machine."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lorabatch import hub
from lorabatch.config import BenchInferConfig
from lorabatch.errors import UsageError
from lorabatch.infer.engine import Engine
from lorabatch.infer.quality import run_quality
from lorabatch.infer.requests import Request, SamplingParams
from lorabatch.infer.runner import load_for_runner, make_runner
from lorabatch.measure.environment import gpu_description
from lorabatch.measure.machine import CPU_ROWS, CPU_SHAPES, gemm_rates, measured_bytes_per_s, measured_flops_per_s
from lorabatch.measure.roofline import decode_bytes
from lorabatch.measure.scaling import bench_record, sweep
from lorabatch.model import load
from lorabatch.model.device import TYPE_NAMES, choose_device, choose_dtype, choose_threads
from lorabatch.model.native import NativeModel
from lorabatch.model.spec import ModelSpec
from lorabatch.records import write_json


def run_bench_infer(config: BenchInferConfig, command: list[str]) -> int:
    """Measure, print the table, write its JSON twin."""
    hub.prepare_environment()
    source = hub.find_model(config.base_model)
    device, threads = choose_device(no_cuda=config.no_cuda), choose_threads(config.threads)
    dtype = choose_dtype(config.dtype, device)
    model_config = load.load_config(source.path)
    model = load_for_runner(source, model_config, backend="native", dtype=dtype, device=device, quantize=config.quantize)
    assert isinstance(model, NativeModel)
    if config.quality:
        return run_quality(config, model, load.load_tokenizer(source.path))
    if config.input_tokens + config.max_new_tokens > model.max_positions:
        raise UsageError(f"the model has {model.max_positions} positions", where="--input_tokens", fix="give fewer tokens")
    name, levels = ("threads", config.threads_sweep) if config.threads_sweep else ("batch_size", config.batch_sizes)
    points = _measure(model, load.load_tokenizer(source.path), config, name, levels)
    element_bytes = 1 if config.quantize == "int8" else dtype.itemsize, dtype.itemsize
    for point in points:
        torch.set_num_threads(point.get("threads", threads))
        rates = _flops_per_s(config, dtype, device), measured_bytes_per_s(device)
        size = point.get("batch_size", config.batch_sizes[0])
        least_s, bound = ceiling_seconds(model.spec, size, config.input_tokens, config.max_new_tokens, rates, element_bytes)
        ceiling = size * config.max_new_tokens / least_s
        point |= {"ceiling_tokens_per_s": ceiling, "share_of_ceiling": (point["tokens_per_s"]["median"] or 0) / ceiling, "bound": bound}
    torch.set_num_threads(threads)
    facts = {"gpu": gpu_description(), "dtype": TYPE_NAMES[dtype], "device": str(device), "threads": threads}
    ceilings = {"flops_per_s": _flops_per_s(config, dtype, device), "bytes_per_s": measured_bytes_per_s(device)}
    record = bench_record(
        "bench infer", name, points, command=command, config=config.to_dict(), model={"name": source.name}, **facts, **ceilings
    )
    path = Path(config.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, record)
    _print_table(record)
    print(path)
    return 0


def _flops_per_s(config: BenchInferConfig, dtype: torch.dtype, device: torch.device) -> float:
    if config.quantize == "none":
        return measured_flops_per_s(dtype, device)
    products = gemm_rates(config.quantize, device, shapes=CPU_SHAPES, rows=CPU_ROWS[-2:], seconds=0.1)
    return max(r["flops_per_s"] for r in products)


def _measure(model: NativeModel, tokenizer: Any, config: BenchInferConfig, name: str, levels: Sequence[int]) -> list[dict[str, Any]]:
    """Points of ``measure.scaling.sweep``: whole batches, each level warmed up once before the first one counts."""
    engines: dict[int, Engine] = {}
    for size in config.batch_sizes if name == "batch_size" else config.batch_sizes[:1]:
        capacity, prefill_tokens = config.input_tokens + config.max_new_tokens, max(2048, config.input_tokens)
        runner = make_runner(model, num_slots=size, capacity=capacity, max_tokens=prefill_tokens + size, quantize=config.quantize)
        engines[size] = Engine(runner, tokenizer, (), max_running=size, prefill_tokens=prefill_tokens)
    number = itertools.count()

    def one_batch(level: int) -> dict[str, float | None]:
        size = level if name == "batch_size" else config.batch_sizes[0]
        if name == "threads":
            torch.set_num_threads(level)
        requests = _requests(size, next(number), model.spec, config)
        start = time.perf_counter()
        engines[size].run(requests, lambda request: None)
        seconds = time.perf_counter() - start
        return {"tokens_per_s": size * config.max_new_tokens / seconds, "batch_latency_ms": seconds * 1e3}

    for level in levels:
        one_batch(level)
    return sweep(name, levels, config.repeats, one_batch)


def _requests(size: int, repetition: int, spec: ModelSpec, config: BenchInferConfig) -> list[Request]:
    """Random prompts that share nothing, so that no prefix is found twice."""
    rng, count = random.Random(f"{size} {repetition}"), config.max_new_tokens
    params = SamplingParams(max_new_tokens=count, ignore_eos=True)
    ids = [rng.choices(range(spec.vocab_size), k=config.input_tokens) for _ in range(size)]
    return [Request(str(i), i, "", params, token_ids=token_ids, max_new_tokens=count) for i, token_ids in enumerate(ids)]


def ceiling_seconds(
    spec: ModelSpec, size: int, input_tokens: int, new_tokens: int, rates: tuple[float, float], element_bytes: tuple[int, int]
) -> tuple[float, str]:
    """(least seconds for a batch, what decoding is bound by) at these FLOP/s and bytes/s; attention's FLOPs are left out.

    element_bytes: of weights, and of cached keys and values.

    One prefill of all prompts, then new_tokens - 1 steps of one token per request; each takes the longer of its
    products and its bytes (all weights once, the cached keys and values of every request).
    """
    flops_per_s, bytes_per_s = rates
    head = spec.hidden_size * spec.vocab_size
    weight_s = decode_bytes(spec, steps=1, kv_tokens=0, element_bytes=element_bytes[0]) / bytes_per_s
    prefill_flops = 2.0 * size * ((spec.num_matmul_params - head) * input_tokens + head)
    steps = new_tokens - 1
    kv_tokens = size * sum(input_tokens + i for i in range(steps))
    compute_s = steps * 2.0 * size * spec.num_matmul_params / flops_per_s
    memory_s = steps * weight_s + decode_bytes(spec, steps=0, kv_tokens=kv_tokens, element_bytes=element_bytes[1]) / bytes_per_s
    return max(prefill_flops / flops_per_s, weight_s) + max(compute_s, memory_s), "compute" if compute_s > memory_s else "memory"


def _print_table(record: dict[str, Any]) -> None:
    config, name = record["config"], record["sweep"]
    precision = record["dtype"] if config["quantize"] == "none" else f"{config['quantize']} weights, {record['dtype']} cache"
    print(
        f"{record['model']['name']}, {precision} on {record['device']}, {record['threads']} threads; prompts of {config['input_tokens']} tokens, "
        f"{config['max_new_tokens']} new ones, {config['repeats']} repetitions; measured here: "
        f"{record['flops_per_s'] / 1e9:.0f} Gflop/s, {record['bytes_per_s'] / 1e9:.1f} GB/s"
    )
    heads = (name, "output tokens/s", "of 95 %: from", "to", "batch ms", "ceiling", "share", "bound by")
    print("\n" + "".join(f"{head:>{max(9, len(head) + 2)}}" for head in heads))
    for point in record["points"]:
        rate, latency = point["tokens_per_s"], point["batch_latency_ms"]["median"]
        numbers = [rate["median"], rate["low"], rate["high"], latency, point["ceiling_tokens_per_s"]]
        texts = [str(point[name]), *("-" if n is None else f"{n:.0f}" for n in numbers), f"{point['share_of_ceiling']:.0%}", point["bound"]]
        print("".join(f"{text:>{max(9, len(head) + 2)}}" for head, text in zip(heads, texts, strict=True)))
    if record.get("knee") is not None:
        print(f"\nknee: beyond {record['knee']} at once a doubling brings less than 1.5 times the throughput")
    if record.get("serial_share") is not None:
        print(f"\nserial share (Amdahl): {record['serial_share']:.1%}")
