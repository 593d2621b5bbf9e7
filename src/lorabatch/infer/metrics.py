"""What a run of inference measured: latencies in compact arrays, ``metrics.json``, the table at the end."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lorabatch.infer.engine import PassStats
from lorabatch.infer.requests import Request
from lorabatch.measure.statistics import percentile, rate, summary
from lorabatch.measure.system import peak_memory_bytes
from lorabatch.model.device import TYPE_NAMES
from lorabatch.model.load import Model
from lorabatch.model.native import NativeModel


def _samples() -> array[float]:
    return array("f")


@dataclass
class Latencies:
    """The finished requests of one pass over the work, in milliseconds and counts."""

    queue_ms: array[float] = field(default_factory=_samples)
    ttft_ms: array[float] = field(default_factory=_samples)
    tpot_ms: array[float] = field(default_factory=_samples)
    e2el_ms: array[float] = field(default_factory=_samples)
    input_tokens: int = 0
    output_tokens: int = 0

    @property
    def completed(self) -> int:
        return len(self.e2el_ms)

    def add(self, request: Request) -> None:
        self.queue_ms.append((request.started_s - request.submitted_s) * 1e3)
        self.ttft_ms.append((request.first_token_s - request.submitted_s) * 1e3)
        self.e2el_ms.append((request.last_token_s - request.submitted_s) * 1e3)
        if len(request.output_ids) > 1:
            self.tpot_ms.append((request.last_token_s - request.first_token_s) * 1e3 / (len(request.output_ids) - 1))
        self.input_tokens += len(request.token_ids)
        self.output_tokens += len(request.output_ids)


Pass = tuple[PassStats, Latencies]


def _pooled(arrays: Sequence[array[float]]) -> NDArray[np.float32]:
    return np.concatenate([np.empty(0, np.float32), *(np.asarray(a, np.float32) for a in arrays)])


def metrics(
    passes: Sequence[Pass],
    model: Model,
    startup_s: Mapping[str, float],
    *,
    counts: Mapping[str, int],
    num_slots: int,
    iterations: int,
    quantize: str,
    adapter_bytes: float,
) -> dict[str, Any]:
    """``metrics.json``: counts and times are sums over all measured repetitions, latencies are pooled.

    ``startup_s``: seconds of each phase before the first request could run. ``counts``: of ``sink.Tally``. ``adapter_bytes``: of one unmerged adapter, on average.
    """
    stats, latencies = [s for s, _ in passes], [x for _, x in passes]

    def total(name: str) -> Any:
        return sum(getattr(s, name) for s in stats)

    duration, completed = total("duration_s"), sum(x.completed for x in latencies)
    total_in, total_out = sum(x.input_tokens for x in latencies), sum(x.output_tokens for x in latencies)
    batch_ms = [s.duration_s * 1e3 / -(-x.completed // num_slots) for s, x in passes if x.completed]
    return {
        "schema_version": 1,
        "kind": "infer",
        "iterations": iterations,
        "duration_s": duration,
        "startup_s": sum(startup_s.values()),
        **{f"startup_{name}_s": seconds for name, seconds in startup_s.items()},
        "completed": completed,
        **counts,
        "total_input_tokens": total_in,
        "total_output_tokens": total_out,
        "request_throughput": rate(completed, duration),
        "output_throughput": rate(total_out, duration),
        "total_token_throughput": rate(total_in + total_out, duration),
        "tokens_per_s": rate(total_out, duration),
        "tokens_per_s_including_startup": rate(total_out, duration + sum(startup_s.values())),
        **summary("queue_ms", _pooled([x.queue_ms for x in latencies])),
        **summary("ttft_ms", _pooled([x.ttft_ms for x in latencies])),
        **summary("tpot_ms", _pooled([x.tpot_ms for x in latencies])),
        **summary("itl_ms", _pooled([s.gaps_s for s in stats]) * np.float32(1e3)),
        **summary("e2el_ms", _pooled([x.e2el_ms for x in latencies])),
        "batch_latency_p50_ms": percentile(batch_ms, 50),
        "batch_latency_p95_ms": percentile(batch_ms, 95),
        "max_running": num_slots,
        "mean_running": rate(total("decode_tokens"), total("decode_steps")),
        "slots_used_while_waiting": rate(total("waiting_slots"), total("waiting_steps")),
        "step_filled_while_waiting": rate(total("waiting_fill"), total("waiting_steps")),
        "prefill_s": total("prefill_s"),
        "decode_s": total("decode_s"),
        "prefill_tokens_per_s": rate(total("prefill_tokens"), total("prefill_s")),
        "decode_tokens_per_s": rate(total("decode_tokens"), total("decode_s")),
        "decode_steps": total("decode_steps"),
        "shared_prefix_tokens": total("shared_tokens"),
        "guessed_tokens": total("guessed_tokens"),
        "accepted_tokens": total("accepted_tokens"),
        "pass_tokens_per_s": [rate(x.output_tokens, s.duration_s) for s, x in passes],
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else peak_memory_bytes(),
        **_ceilings(stats, model, quantize, adapter_bytes),  # last: measuring them takes memory
    }


def _ceilings(stats: Sequence[PassStats], model: Model, quantize: str, adapter_bytes: float) -> dict[str, Any]:
    """Bytes and FLOPs that decoding asked for, and what memory and arithmetic could have delivered in that time."""
    seconds = sum(s.decode_s for s in stats)
    if not isinstance(model, NativeModel) or not seconds:
        return dict.fromkeys(("mbu", "decode_flops_per_s", "measured_bytes_per_s", "cold_flops_per_s", "cold_share"))
    from lorabatch.measure.machine import cold_flops_per_s, kernel_facts, measured_bytes_per_s
    from lorabatch.measure.roofline import decode_bytes, decode_flops, element_bytes

    kv_tokens, dtype, device = sum(s.decode_kv_tokens for s in stats), model.decoder.dtype, model.decoder.device
    steps, tokens = (sum(getattr(s, name) for s in stats) for name in ("decode_steps", "decode_tokens"))
    needed = decode_bytes(model.spec, steps=steps, kv_tokens=kv_tokens, element_bytes=element_bytes(quantize, dtype.itemsize))
    needed += adapter_bytes * sum(s.decode_adapters for s in stats)
    flops_per_s = decode_flops(model.spec, tokens=tokens, kv_tokens=kv_tokens) / seconds
    bandwidth = measured_bytes_per_s(device, reached=needed / seconds)
    ceiling = cold_flops_per_s(TYPE_NAMES[dtype] if quantize == "none" else quantize, device, reached=flops_per_s)
    return {
        "mbu": needed / seconds / bandwidth,
        "decode_flops_per_s": flops_per_s,
        "measured_bytes_per_s": bandwidth,
        "cold_flops_per_s": ceiling,
        "cold_share": max(needed / seconds / bandwidth, flops_per_s / ceiling),  # of whichever of the two binds
        **kernel_facts(device),
    }


def print_table(figures: Mapping[str, Any], path: Path, *, completed: int, total: int) -> None:
    """``completed``: of all ``total`` requests of the run, however many of them this process measured, and how often."""

    def shown(name: str, form: str = "{:.1f}") -> str:
        return "not measured" if figures[name] is None else form.format(figures[name])

    measured = f" ({figures['completed']} measured)" if figures["completed"] != completed else ""
    whole = f"{shown('tokens_per_s_including_startup', '{:.0f}')} with {figures['startup_s']:.1f} s of start-up"
    batches = f"{shown('batch_latency_p50_ms')} / {shown('batch_latency_p95_ms')} ms"
    rows = [
        ("requests", f"{completed} completed, {figures['failed']} failed of {total}{measured}"),
        ("output tokens/s", f"{shown('tokens_per_s', '{:.0f}')}  ({whole})"),
        ("time to first token p50 / p95", f"{shown('p50_ttft_ms')} / {shown('p95_ttft_ms')} ms (queue included)"),
        ("time per output token p50 / p95", f"{shown('p50_tpot_ms')} / {shown('p95_tpot_ms')} ms"),
        ("batch latency p50 / p95", f"{batches} over {figures['iterations']} repetition{'s' if figures['iterations'] > 1 else ''}"),
        ("peak memory", f"{figures['peak_memory_bytes'] / 2**30:.2f} GiB"),
    ]
    width = max(len(name) for name, _ in rows)
    print("\n".join(f"  {name:<{width}}  {value}" for name, value in rows))
    print(f"completions: {path / 'completions.jsonl'}")
