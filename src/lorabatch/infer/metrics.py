"""What a run of inference measured, and the table at its end."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from lorabatch.infer.requests import Request
from lorabatch.infer.stats import PassStats
from lorabatch.machine.device import TYPE_NAMES
from lorabatch.machine.memory import peak_memory_bytes
from lorabatch.metrics.inference import Latencies, Times, infer_metrics, milliseconds, pooled
from lorabatch.metrics.schema import InferMetrics, InferStartup, KernelFacts
from lorabatch.metrics.statistics import percentile, rate, summary
from lorabatch.model.load import Model
from lorabatch.model.native import NativeModel
from lorabatch.progress import counted, rounded
from lorabatch.schema import Record

Pass = tuple[PassStats, Latencies]


def add_request(latencies: Latencies, request: Request) -> None:
    """One that finished."""
    times = Times(
        queue_ms=milliseconds(request.submitted_s, request.started_s),
        ttft_ms=milliseconds(request.submitted_s, request.first_token_s),
        e2el_ms=milliseconds(request.submitted_s, request.last_token_s),
    )
    latencies.add(times, input_tokens=len(request.token_ids), output_tokens=len(request.output_ids))


def run_metrics(
    passes: Sequence[Pass],
    model: Model,
    startup_s: Mapping[str, float],
    *,
    counts: Mapping[str, int],
    num_slots: int,
    iterations: int,
    quantize: str,
    adapter_bytes: float,
) -> InferMetrics:
    """``startup_s``: seconds of each phase before the first request could run. ``counts``: of
    ``sink.Tally``. ``adapter_bytes``: of one unmerged adapter, on average.
    """
    stats, latencies = [s for s, _ in passes], [x for _, x in passes]
    duration_s, whole_startup_s = sum(s.duration_s for s in stats), sum(startup_s.values())
    measured = infer_metrics(latencies, iterations=iterations, duration_s=duration_s, counts=counts)
    tokens_out = measured.total_output_tokens or 0
    return replace(
        measured,
        startup_s=whole_startup_s,
        startup=InferStartup(**{f"startup_{name}_s": s for name, s in startup_s.items()}),
        tokens_per_s_including_startup=rate(tokens_out, duration_s + whole_startup_s),
        max_running=num_slots,
        **_steps(stats),
        **_batches(passes, num_slots),
        peak_memory_bytes=torch.cuda.max_memory_allocated()
        if torch.cuda.is_initialized()
        else peak_memory_bytes(),
        # last: measuring them takes memory
        **_ceilings(stats, model, quantize, adapter_bytes),
    )


def _steps(stats: Sequence[PassStats]) -> Record:
    """Of the steps of all passes."""

    def total(name: str) -> float:
        return sum(getattr(s, name) for s in stats)

    def per(name: str, other: str) -> float | None:
        return rate(total(name), total(other))

    return {
        "itl_ms": summary(pooled(s.gaps_s for s in stats) * np.float32(1e3)),
        "mean_running": per("decode_tokens", "decode_steps"),
        "slots_used_while_waiting": per("waiting_slots", "waiting_steps"),
        "step_filled_while_waiting": per("waiting_fill", "waiting_steps"),
        "prefill_s": total("prefill_s"),
        "decode_s": total("decode_s"),
        "prefill_tokens_per_s": per("prefill_tokens", "prefill_s"),
        "decode_tokens_per_s": per("decode_tokens", "decode_s"),
        "decode_steps": total("decode_steps"),
        "shared_prefix_tokens": total("shared_tokens"),
        "guessed_tokens": total("guessed_tokens"),
        "accepted_tokens": total("accepted_tokens"),
    }


def _batches(passes: Sequence[Pass], num_slots: int) -> Record:
    """Of each pass: its rate, and its time for as many requests as run at once."""
    batch_ms = [s.duration_s * 1e3 / -(-x.completed // num_slots) for s, x in passes if x.completed]
    return {
        "batch_latency_p50_ms": percentile(batch_ms, 50),
        "batch_latency_p95_ms": percentile(batch_ms, 95),
        "pass_tokens_per_s": [rate(x.output_tokens, s.duration_s) for s, x in passes],
    }


def _ceilings(
    stats: Sequence[PassStats], model: Model, quantize: str, adapter_bytes: float
) -> Record:
    """Bytes and FLOPs that decoding asked for, and what memory and arithmetic could have delivered
    in that time."""
    seconds = sum(s.decode_s for s in stats)
    if not isinstance(model, NativeModel) or not seconds:
        return {}
    from lorabatch.machine.ceilings import cold_flops_per_s, kernel_facts, measured_bytes_per_s
    from lorabatch.model.cost import decode_bytes, decode_flops, element_bytes

    device, dtype = model.decoder.device, model.decoder.dtype
    kv_tokens = sum(s.decode_kv_tokens for s in stats)
    needed = adapter_bytes * sum(s.decode_adapters for s in stats) + decode_bytes(
        model.spec,
        steps=sum(s.decode_steps for s in stats),
        kv_tokens=kv_tokens,
        element_bytes=element_bytes(quantize, dtype.itemsize),
    )
    tokens = sum(s.decode_tokens for s in stats)
    flops_per_s = decode_flops(model.spec, tokens=tokens, kv_tokens=kv_tokens) / seconds
    bandwidth = measured_bytes_per_s(device, reached=needed / seconds)
    precision = TYPE_NAMES[dtype] if quantize == "none" else quantize
    ceiling = cold_flops_per_s(precision, device, reached=flops_per_s)
    mbu, arithmetic = rate(needed / seconds, bandwidth), rate(flops_per_s, ceiling)
    return {
        "mbu": mbu,
        "decode_flops_per_s": flops_per_s,
        "measured_bytes_per_s": bandwidth or None,
        "cold_flops_per_s": ceiling or None,
        # of whichever of the two binds
        "cold_share": None if mbu is None or arithmetic is None else max(mbu, arithmetic),
        "kernels": KernelFacts(**kernel_facts(device)),
    }


def print_table(figures: InferMetrics, path: Path, *, completed: int, total: int) -> None:
    """``completed``: of all ``total`` requests of the run, however many of them this process
    measured, and how often."""

    def shown(value: float | None, form: Callable[[float], str] = "{:.1f}".format) -> str:
        return "not measured" if value is None else form(value)

    measured = f" ({figures.completed} measured)" if figures.completed != completed else ""
    whole = (
        f"{shown(figures.tokens_per_s_including_startup, rounded)} with "
        f"{shown(figures.startup_s)} s of start-up"
    )
    ttft, tpot = figures.ttft_ms, figures.tpot_ms
    batches = f"{shown(figures.batch_latency_p50_ms)} / {shown(figures.batch_latency_p95_ms)} ms"
    empty = f" ({figures.empty} with an empty text)" if figures.empty else ""
    rows = [
        ("requests", f"{completed} completed{empty}, {figures.failed} failed of {total}{measured}"),
        ("output tokens/s", f"{shown(figures.tokens_per_s, rounded)}  ({whole})"),
        (
            "time to first token p50 / p95",
            f"{shown(ttft.p50)} / {shown(ttft.p95)} ms (queue included)",
        ),
        ("time per output token p50 / p95", f"{shown(tpot.p50)} / {shown(tpot.p95)} ms"),
        (
            "batch latency p50 / p95",
            f"{batches} over {counted(figures.iterations or 0, 'repetition')}",
        ),
        ("peak memory", f"{(figures.peak_memory_bytes or 0) / 2**30:.2f} GiB"),
    ]
    width = max(len(name) for name, _ in rows)
    print("\n".join(f"  {name:<{width}}  {value}" for name, value in rows))
    print(f"completions: {path / 'completions.jsonl'}")
