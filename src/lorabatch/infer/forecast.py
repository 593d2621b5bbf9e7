"""``infer --dry_run``: prompts, tokens, memory and time of a run, from its prompts and the base's
configuration; no weight is read and nothing is written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch

from lorabatch.config import InferConfig
from lorabatch.corpus.tokens import Tokenizer
from lorabatch.infer.adapters import check_adapters
from lorabatch.infer.feed import WINDOW
from lorabatch.infer.prompts import PromptFile, prepare
from lorabatch.machine.device import TYPE_NAMES, choose_device, choose_dtype, choose_threads
from lorabatch.model import forecast, hub, load
from lorabatch.model.cost import decode_bytes, decode_flops, element_bytes
from lorabatch.model.spec import ModelSpec, spec_from_config


@dataclass
class Work:
    """What all requests do. ``kv_tokens``: cached tokens that all decode steps read together;
    ``longest``: positions of a request."""

    requests: int = 0
    impossible: int = 0
    input_tokens: int = 0
    most_new_tokens: int = 0
    kv_tokens: int = 0
    longest: int = 0


def run_dry(config: InferConfig) -> int:
    """Print the forecast. Errors: those that ``infer`` finds before it loads the model."""
    hub.prepare_environment()
    check_adapters(config)
    prompts = PromptFile(Path(config.prompts), config)
    source = hub.find_model(config.base_model)
    model_config = load.load_config(source.path)
    spec = None if config.backend == "hf" else spec_from_config(model_config)
    device, threads = choose_device(no_cuda=config.no_cuda), choose_threads(config.threads)
    dtype = choose_dtype(config.dtype, device)
    work = work_of(prompts, load.load_tokenizer(source.path), config, spec)
    print(f"dry run: base {source.name}, {TYPE_NAMES[dtype]} on {device}, {threads} threads")
    cannot = f", {work.impossible} of them cannot run" if work.impossible else ""
    rows = [
        ("requests", f"{work.requests:,}{cannot}"),
        ("prompt tokens", f"{work.input_tokens:,}"),
        ("new tokens", f"{work.most_new_tokens:,} at most"),
    ]
    if spec is None:
        rows.append(("memory and time", "not known for the hf backend"))
    else:
        rows += _needs(spec, config, work, dtype, device)
    print(forecast.table(rows))
    return 0


def work_of(
    prompts: PromptFile, tokenizer: Tokenizer, config: InferConfig, spec: ModelSpec | None
) -> Work:
    """Tokenises all prompts, a window at a time."""
    work, source = Work(), iter(prompts)
    positions = spec.max_positions if spec else config.max_len or 2**31
    limit = min(positions, config.max_len or positions)
    while window := list(islice(source, WINDOW)):
        prepare(window, tokenizer, limit=limit, long_prompt=config.long_prompt)
        work.requests += len(window)
        for request in window:
            if request.error:
                work.impossible += 1
                continue
            given, new = len(request.token_ids), request.max_new_tokens
            work.input_tokens += given
            work.most_new_tokens += new
            work.kv_tokens += new * given + new * new // 2
            work.longest = max(work.longest, given + new)
    return work


def _needs(
    spec: ModelSpec, config: InferConfig, work: Work, dtype: torch.dtype, device: torch.device
) -> Sequence[tuple[str, str]]:
    sizes = element_bytes(config.quantize, dtype.itemsize)
    slots = max(1, min(config.batch_size, work.requests - work.impossible))
    rate = forecast.rates("infer", dtype, device)
    passes = config.iters + (1 if config.iters > 1 else 0)
    seconds = forecast.START_S + passes * _pass_s(spec, work, slots, sizes, rate)
    memory = forecast.PROCESS_BYTES + forecast.base_bytes(spec, sizes[0], dtype.itemsize)
    memory += slots * work.longest * spec.kv_elements_per_token * sizes[1]
    return forecast.needs(memory, seconds, rate)


def _pass_s(
    spec: ModelSpec, work: Work, slots: int, sizes: tuple[int, int], rate: forecast.Rates
) -> float:
    """sizes: bytes of a weight, and of a cached key or value."""
    steps = -(-work.most_new_tokens // slots)
    reading = decode_bytes(spec, steps=steps, kv_tokens=work.kv_tokens, element_bytes=sizes)
    computing = decode_flops(spec, tokens=work.most_new_tokens, kv_tokens=work.kv_tokens)
    prefill = 2.0 * spec.num_matmul_params * work.input_tokens
    decode_s = max(reading / rate.bytes_per_s, computing / rate.flops_per_s)
    return decode_s + prefill / rate.flops_per_s
