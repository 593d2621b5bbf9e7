"""What a training run says about itself: data, metrics.json, the lines printed at its end."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from lorabatch.corpus.tokens import TokenCorpus
from lorabatch.machine.ceilings import cold_flops_per_s, kernel_facts, note_reached
from lorabatch.machine.device import TYPE_NAMES
from lorabatch.machine.memory import peak_memory_bytes
from lorabatch.metrics.schema import DataCounts, KernelFacts, TrainMetrics, TrainPhases
from lorabatch.metrics.statistics import mean, percentile, perplexity, rate, summary
from lorabatch.model.backend import Backend
from lorabatch.model.cost import above_ceiling, training_flops
from lorabatch.model.forecast import reached_name
from lorabatch.progress import clock, counted, rounded
from lorabatch.schema import Fields, Record
from lorabatch.train.state import TrainState

LONG_ENOUGH_S = 10.0  # of steps, for their rate to say how long others will take


def base_line(name: str, model: Backend, machine: Fields, trainable: int) -> str:
    """What is trained on what. machine: as run.json has it; trainable: parameters, of all runs."""
    size = f"{model.num_base_params / 1e6:.1f}M parameters in {model.base_bytes / 2**20:.1f} MiB"
    where = f"{machine['dtype']} on {machine['device']}, {counted(machine['threads'], 'thread')}"
    where += f" x {machine['ranks']} ranks" if machine["ranks"] > 1 else ""
    where += f", {machine['kernel_variant']} kernels" if machine["kernel_variant"] else ""
    share = (
        f"trainable {trainable:,} ({100 * trainable / (trainable + model.num_base_params):.2f} %)"
    )
    return f"base {name} ({size}, {where}); {share}"


def data_record(corpus: TokenCorpus, validation: TokenCorpus | None) -> Record:
    def counts(part: TokenCorpus) -> Record:
        lengths = [document.num_tokens for document in part.documents]
        return DataCounts(
            documents_read=part.num_read,
            documents=len(part.documents),
            split=part.num_split,
            cut=part.num_cut,
            dropped=part.num_dropped,
            tokens=part.num_tokens,
            target_tokens=part.num_targets,
            median_tokens=percentile(lengths, 50),
            longest_tokens=max(lengths),
        ).to_dict()

    return {"train": counts(corpus), "val": counts(validation) if validation else None}


def data_line(corpus: TokenCorpus, validation: TokenCorpus | None) -> str:
    def described(part: TokenCorpus) -> str:
        changes = [
            f"{n} {what}"
            for n, what in (
                (part.num_split, "split"),
                (part.num_cut, "cut at --max_len"),
                (part.num_dropped, "dropped"),
            )
            if n
        ]
        return f"{counted(len(part.documents), 'document')}, {part.num_tokens:,} tokens" + (
            f" ({', '.join(changes)})" if changes else ""
        )

    taken = f", {corpus.epoch_documents} of them in an epoch" if corpus.parts else ""
    return f"train {described(corpus)}{taken}; " + (
        f"validation {described(validation)}" if validation else "no validation"
    )


def train_metrics(
    state: TrainState,
    model: Backend,
    phases: Mapping[str, float],
    device: torch.device,
    dtype: torch.dtype,
    *,
    size: Fields,
    saves: Fields,
) -> TrainMetrics:
    """``phases``: seconds, by the names of ``TrainPhases``; ``size`` of the model and ``saves``:
    fields by name."""
    # before ceilings are measured
    peak_bytes = peak_memory_bytes() if device.type == "cpu" else torch.cuda.max_memory_allocated()
    return TrainMetrics(
        peak_memory_bytes=peak_bytes,
        padding_share=0.0 if model.backend == "native" else None,
        phases=TrainPhases(**{name: round(seconds, 3) for name, seconds in phases.items()}),
        kernels=KernelFacts(**kernel_facts(device)),
        **_progress(state),
        **_quality(state),
        **_arithmetic(state, model, size["trainable_params"], device, dtype),
        **size,
        **saves,
    )


def _arithmetic(
    state: TrainState,
    model: Backend,
    trainable_params: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Record:
    """What the mathematics asked for in a second of steps, and the machine's ceiling."""
    if model.spec is None or not state.train_s:
        return {}
    flops = training_flops(
        model.spec,
        tokens=state.tokens,
        targets=state.targets,
        squared_lengths=state.squared_lengths,
        lora_params=trainable_params,
    )
    achieved = flops / state.train_s
    ceiling = cold_flops_per_s(TYPE_NAMES[dtype], device, reached=achieved)
    if state.train_s >= LONG_ENOUGH_S:
        note_reached(reached_name("train", dtype), device, achieved)
    return {
        "train_flops_per_s": achieved,
        "cold_flops_per_s": ceiling or None,
        "cold_share": achieved / ceiling if achieved and ceiling else None,
    }


def _progress(state: TrainState) -> Record:
    """How far a run came, and how fast."""
    per_second = rate(state.step, state.train_s)
    return {
        "steps": state.step,
        "planned_steps": state.total_steps,
        "train_s": state.train_s,
        "epoch_s": mean(state.epoch_s),
        "step_ms": summary(state.step_ms),
        "steps_per_min": per_second * 60 if per_second else None,
        "tokens_per_s": rate(state.tokens, state.train_s),
        "total_tokens": state.tokens,
        "target_tokens": state.targets,
    }


def _quality(state: TrainState) -> Record:
    """Before, and the best."""
    first, best = state.first_eval, state.best_eval or state.last_eval
    return {
        "loss": state.last_loss,
        "eval_loss_before": first.loss if first else None,
        "eval_loss": best.loss if best else None,
        "perplexity": perplexity(best.loss) if best else None,
        "bits_per_byte_before": first.bits_per_byte if first else None,
        "bits_per_byte": best.bits_per_byte if best else None,
        "best_step": state.best_step,
    }


def _shown(value: float | None, form: str, unit: str = "") -> str:
    return "not measured" if value is None else form.format(value) + unit


def _rate(value: float | None) -> str:
    return "not measured" if value is None else rounded(value)


def _epoch(metrics: TrainMetrics, steps: int) -> str:
    """Measured where one was completed, else what it takes at this rate, and said to be so."""
    if metrics.epoch_s is not None:
        return clock(metrics.epoch_s)
    if not metrics.train_s or not metrics.steps:
        return "not measured"
    return f"about {clock(steps * metrics.train_s / metrics.steps)} at this rate (none completed)"


def _bits(metrics: TrainMetrics) -> str:
    if metrics.bits_per_byte is None:
        return "not measured"
    return f"{_shown(metrics.bits_per_byte_before, '{:.4f}')} -> {metrics.bits_per_byte:.4f}"


def print_summary(metrics: TrainMetrics, path: Path, root: str, *, epoch_steps: int) -> None:
    """epoch_steps: optimiser steps of one epoch."""
    share, peak_bytes = metrics.cold_share, metrics.peak_memory_bytes or 0
    rows = [
        ("steps", f"{metrics.steps} of {metrics.planned_steps}"),
        ("train loss", _shown(metrics.loss, "{:.4f}")),
        ("validation bits per byte", _bits(metrics)),
        ("tokens/s", _rate(metrics.tokens_per_s)),
        ("median step", _shown(metrics.step_ms.median, "{:.0f}", " ms")),
        ("time per epoch", _epoch(metrics, epoch_steps)),
        ("share of cold product rate (4N)", _shown(share, "{:.0%}") + above_ceiling(share)),
        ("peak memory", f"{peak_bytes / 2**30:.2f} GiB"),
    ]
    width = max(len(name) for name, _ in rows)
    print("\n".join(f"  {name:<{width}}  {value}" for name, value in rows))
    print(f"{root} adapter: {path}")


def summary_line(metrics: TrainMetrics, path: Path) -> str:
    """The same for one of several runs."""
    return (
        f"{metrics.steps} of {metrics.planned_steps} steps, train loss "
        f"{_shown(metrics.loss, '{:.4f}')}, "
        f"validation bits per byte {_bits(metrics)}, adapter: {path}"
    )
