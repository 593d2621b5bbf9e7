"""What a training run says about itself: data, metrics.json, the lines printed at its end."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lorabatch.corpus.tokens import TokenCorpus
from lorabatch.measure.machine import cold_flops_per_s, kernel_facts
from lorabatch.measure.roofline import above_ceiling, training_flops
from lorabatch.measure.statistics import mean, percentile, perplexity, rate, summary
from lorabatch.measure.system import peak_memory_bytes
from lorabatch.model.backend import Backend
from lorabatch.model.device import TYPE_NAMES
from lorabatch.train.state import TrainState


def base_line(name: str, model: Backend, machine: Mapping[str, Any], trainable: int) -> str:
    """What is trained on what. machine: as run.json has it; trainable: parameters, of all runs."""
    size = f"{model.num_base_params / 1e6:.1f}M parameters in {model.base_bytes / 2**20:.1f} MiB"
    where = f"{machine['dtype']} on {machine['device']}, {machine['threads']} threads"
    where += f" x {machine['ranks']} ranks" if machine["ranks"] > 1 else ""
    where += f", {machine['kernel_variant']} kernels" if machine["kernel_variant"] else ""
    share = f"trainable {trainable:,} ({100 * trainable / (trainable + model.num_base_params):.2f} %)"
    return f"base {name} ({size}, {where}); {share}"


def data_record(corpus: TokenCorpus, validation: TokenCorpus | None) -> dict[str, Any]:
    def one(part: TokenCorpus) -> dict[str, Any]:
        return {
            "documents_read": part.num_read,
            "documents": len(part.documents),
            "split": part.num_split,
            "cut": part.num_cut,
            "dropped": part.num_dropped,
            "tokens": part.num_tokens,
            "target_tokens": part.num_targets,
            "median_tokens": percentile([d.num_tokens for d in part.documents], 50),
            "longest_tokens": max(d.num_tokens for d in part.documents),
        }

    return {"train": one(corpus), "val": one(validation) if validation else None}


def data_line(corpus: TokenCorpus, validation: TokenCorpus | None) -> str:
    def counted(part: TokenCorpus) -> str:
        changes = [
            f"{n} {what}" for n, what in ((part.num_split, "split"), (part.num_cut, "cut at --max_len"), (part.num_dropped, "dropped")) if n
        ]
        return f"{len(part.documents)} documents, {part.num_tokens:,} tokens" + (f" ({', '.join(changes)})" if changes else "")

    return f"train {counted(corpus)}; " + (f"validation {counted(validation)}" if validation else "no validation")


def metrics_record(
    state: TrainState, model: Backend, size: Mapping[str, Any], phases: Mapping[str, float], device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    peak_bytes = peak_memory_bytes() if device.type == "cpu" else torch.cuda.max_memory_allocated()  # before ceilings are measured
    achieved = ceiling = None
    if model.spec is not None and state.train_s:
        flops = training_flops(
            model.spec,
            tokens=state.tokens,
            targets=state.targets,
            squared_lengths=state.squared_lengths,
            lora_params=size["trainable_params"],
        )
        achieved = flops / state.train_s
        ceiling = cold_flops_per_s(TYPE_NAMES[dtype], device, reached=achieved)
    best = state.best_eval or state.last_eval
    per_minute = rate(state.step, state.train_s)
    return {
        "schema_version": 1,
        "kind": "train",
        "steps": state.step,
        "planned_steps": state.total_steps,
        "loss": state.last_loss,
        "eval_loss": best.loss if best else None,
        "perplexity": perplexity(best.loss) if best else None,
        "bits_per_byte": best.bits_per_byte if best else None,
        "eval_loss_before": state.first_eval.loss if state.first_eval else None,
        "bits_per_byte_before": state.first_eval.bits_per_byte if state.first_eval else None,
        "best_step": state.best_step,
        "epoch_s": mean(state.epoch_s),
        **summary("step_ms", state.step_ms),
        "steps_per_min": per_minute * 60 if per_minute else None,
        "tokens_per_s": rate(state.tokens, state.train_s),
        "total_tokens": state.tokens,
        "target_tokens": state.targets,
        "padding_share": 0.0 if model.backend == "native" else None,
        **size,
        "train_flops_per_s": achieved,
        "cold_flops_per_s": ceiling,
        "cold_share": achieved / ceiling if achieved and ceiling else None,
        **kernel_facts(device),
        "peak_memory_bytes": peak_bytes,
        "train_s": state.train_s,
        "phases": {name: round(seconds, 3) for name, seconds in phases.items()},
    }


def _shown(metrics: Mapping[str, Any], name: str, form: str, unit: str = "") -> str:
    return "not measured" if metrics[name] is None else form.format(metrics[name]) + unit


def _bits(metrics: Mapping[str, Any]) -> str:
    if metrics["bits_per_byte"] is None:
        return "not measured"
    return f"{_shown(metrics, 'bits_per_byte_before', '{:.4f}')} -> {_shown(metrics, 'bits_per_byte', '{:.4f}')}"


def print_summary(metrics: Mapping[str, Any], path: Path, root: str) -> None:
    rows = [
        ("steps", f"{metrics['steps']} of {metrics['planned_steps']}"),
        ("train loss", _shown(metrics, "loss", "{:.4f}")),
        ("validation bits per byte", _bits(metrics)),
        ("tokens/s", _shown(metrics, "tokens_per_s", "{:.0f}")),
        ("median step", _shown(metrics, "median_step_ms", "{:.0f}", " ms")),
        ("share of cold product rate (4N)", _shown(metrics, "cold_share", "{:.0%}") + above_ceiling(metrics["cold_share"])),
        ("peak memory", f"{metrics['peak_memory_bytes'] / 2**30:.2f} GiB"),
    ]
    width = max(len(name) for name, _ in rows)
    print("\n".join(f"  {name:<{width}}  {value}" for name, value in rows))
    print(f"{root} adapter: {path}")


def summary_line(metrics: Mapping[str, Any], path: Path) -> str:
    """The same for one of several runs."""
    return (
        f"{metrics['steps']} of {metrics['planned_steps']} steps, train loss {_shown(metrics, 'loss', '{:.4f}')}, "
        f"validation bits per byte {_bits(metrics)}, adapter: {path}"
    )
