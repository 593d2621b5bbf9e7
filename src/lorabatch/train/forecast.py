"""``train --dry_run``: documents, tokens, steps, memory and time of a run, from its data and the
base's configuration; no weight is read and nothing is written."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import torch

from lorabatch.config import TrainConfig
from lorabatch.corpus.packing import training_steps
from lorabatch.corpus.tokens import TokenCorpus, TokenDocument
from lorabatch.kernels.onednn import Prepacked, packed_product
from lorabatch.kernels.panels import Panels
from lorabatch.machine.device import TYPE_NAMES, choose_device, choose_dtype, choose_threads
from lorabatch.model import forecast, load
from lorabatch.model.cost import training_flops
from lorabatch.model.hub import ModelSource
from lorabatch.model.spec import ModelSpec, spec_from_config
from lorabatch.train.figures import data_line
from lorabatch.train.load import tokenise_runs
from lorabatch.train.loop import planned_steps
from lorabatch.train.planned import PlannedRun
from lorabatch.train.planner import step_bytes

FORWARD = 1 / 2  # of a training pass's products, in evaluation
WEIGHT_BYTES = {"load_in_4bit": 0.53, "load_in_8bit": 1.0}


@dataclass(frozen=True)
class Work:
    """What all steps of a run do. ``largest_block``: tokens."""

    tokens: int
    targets: int
    squared_lengths: int
    largest_block: int


def run_dry(runs: Sequence[PlannedRun], source: ModelSource) -> int:
    """Print the forecast of each run. Errors: those that ``train`` finds before it loads."""
    config = runs[0].config
    model_config = load.load_config(source.path)
    spec = None if config.backend == "hf" else spec_from_config(model_config)
    corpora = tokenise_runs(runs, model_config, load.load_tokenizer(source.path))
    device = choose_device(no_cuda=config.no_cuda)
    threads = choose_threads(config.threads)
    dtype = choose_dtype(config.dtype, device)
    print(f"dry run: base {source.name}, {TYPE_NAMES[dtype]} on {device}, {threads} threads")
    for run, (corpus, validation) in zip(runs, corpora, strict=True):
        print(f"{run.name}: " * bool(run.name) + data_line(corpus, validation))
        rows = data_rows(corpus, run.config)
        if spec is None:
            rows.append(("memory and time", "not known for the hf backend"))
        else:
            rows += _needs(spec, run.config, corpus, validation, dtype, device)
        print(forecast.table(rows))
    return 0


def data_rows(corpus: TokenCorpus, config: TrainConfig) -> list[tuple[str, str]]:
    share = corpus.num_targets / corpus.num_tokens
    steps = planned_steps(config, corpus.epoch_documents)
    return [
        ("steps", f"{steps}, of {config.batch_size * config.grad_accum_steps} documents each"),
        ("supervised", f"{corpus.num_targets:,} of {corpus.num_tokens:,} tokens ({share:.0%})"),
    ]


def _needs(
    spec: ModelSpec,
    config: TrainConfig,
    corpus: TokenCorpus,
    validation: TokenCorpus | None,
    dtype: torch.dtype,
    device: torch.device,
) -> Sequence[tuple[str, str]]:
    work = work_of(corpus, config)
    adapters = forecast.lora_params(spec, r=config.lora_r, targets=config.target_modules)
    rate = forecast.rates("train", dtype, device)
    flops = training_flops(
        spec,
        tokens=work.tokens,
        targets=work.targets,
        squared_lengths=work.squared_lengths,
        lora_params=adapters,
    )
    steps = planned_steps(config, corpus.epoch_documents)
    flops += num_evaluations(config, steps) * _evaluation_flops(spec, validation, adapters)
    seconds = forecast.START_S + flops / rate.flops_per_s
    memory = peak_bytes(spec, config, work, adapters, dtype, device)
    return [("trainable", f"{adapters:,} parameters"), *forecast.needs(memory, seconds, rate)]


def work_of(corpus: TokenCorpus, config: TrainConfig) -> Work:
    """The same documents in the same order as the run."""
    documents = corpus.documents
    plan = training_steps(
        len(documents),
        config.batch_size * config.grad_accum_steps,
        epochs=config.epochs,
        seed=config.seed,
        parts=corpus.parts,
    )
    tokens = targets = squared = block = 0
    for _, indices in islice(plan, planned_steps(config, corpus.epoch_documents)):
        step = [documents[i] for i in indices]
        count = sum(d.num_tokens for d in step)
        tokens, targets = tokens + count, targets + sum(d.num_targets for d in step)
        squared += _squares(step)
        longest = max(d.num_tokens for d in step)
        block = max(block, longest, min(count, config.block_tokens))
    return Work(tokens, targets, squared, block)


def num_evaluations(config: TrainConfig, steps: int) -> int:
    """One before the first step, one at the end, and what lies between."""
    every = config.eval_every_steps or max(1, math.ceil(steps / 4))
    return 1 + math.ceil(steps / every)


def peak_bytes(
    spec: ModelSpec,
    config: TrainConfig,
    work: Work,
    adapters: int,
    dtype: torch.dtype,
    device: torch.device,
) -> int:
    """Of the process on a CPU; of the device, with what the process needs besides, on a GPU."""
    stored = next((n for name, n in WEIGHT_BYTES.items() if getattr(config, name)), dtype.itemsize)
    packs = device.type == "cpu" and isinstance(
        packed_product(torch.zeros(64, 64, dtype=dtype)), (Prepacked, Panels)
    )
    step = step_bytes(
        spec,
        block_tokens=work.largest_block,
        element_bytes=dtype.itemsize,
        lora_params=adapters,
        r=config.lora_r,
        checkpointing=config.checkpointing,
        packed=packs,
    )
    base = forecast.base_bytes(spec, stored, dtype.itemsize)
    return forecast.PROCESS_BYTES + base + step + 4 * adapters


def _evaluation_flops(spec: ModelSpec, validation: TokenCorpus | None, adapters: int) -> float:
    if validation is None:
        return 0.0
    return FORWARD * training_flops(
        spec,
        tokens=validation.num_tokens,
        targets=validation.num_targets,
        squared_lengths=_squares(validation.documents),
        lora_params=adapters,
    )


def _squares(documents: Sequence[TokenDocument]) -> int:
    return sum(d.num_tokens**2 for d in documents)
