"""From the runs that were asked for to trainings over one loaded base: types, tokens, model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from lorabatch.config import TrainConfig
from lorabatch.corpus.readers import Document
from lorabatch.corpus.tokens import TokenCorpus, Tokenizer, mixed, tokenise
from lorabatch.errors import UsageError
from lorabatch.machine.ceilings import kernel_facts
from lorabatch.machine.device import (
    TYPE_NAMES,
    choose_device,
    choose_dtype,
    choose_threads,
    keep_freed_memory,
    return_freed_memory,
)
from lorabatch.machine.environment import gpu_description
from lorabatch.model import load
from lorabatch.model.backend import Backend
from lorabatch.model.quantised import Int8, Nf4
from lorabatch.model.sharded import Sharded
from lorabatch.model.weights import MakeProduct
from lorabatch.progress import Phases, Progress
from lorabatch.schema import Fields, Record
from lorabatch.train import checkpoint
from lorabatch.train.checkpoint import Checkpoint
from lorabatch.train.figures import base_line
from lorabatch.train.planned import PlannedRun, Process
from lorabatch.train.ranks import Ranks
from lorabatch.train.training import Corpora, Shared, Training

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class Loaded:
    trainings: dict[str, Training]  # by name
    progress: Progress


def load_runs(runs: list[PlannedRun], process: Process, here: Fields, phases: Phases) -> Loaded:
    """The base, once, and every run's data and settings checked against it: a mistake in the last
    run shows before the first one starts. here: the environment block of run.json."""
    config, source, ranks = process.config, process.source, process.ranks
    found = [ranks.from_first(_checkpoint(run) if ranks.is_first else None) for run in runs]
    device, threads = choose_device(no_cuda=config.no_cuda), choose_threads(config.threads)
    (return_freed_memory if config.checkpointing == "full" else keep_freed_memory)()
    dtype = _dtype(config, found, device, ranks)
    phases.begin()
    model_config = load.load_config(source.path)
    corpora = tokenise_runs(runs, model_config, load.load_tokenizer(source.path))
    phases.end("tokenise_s")
    model = load.load_model(
        source,
        model_config,
        backend=config.backend,
        dtype=dtype,
        device=device,
        product=_product(config, ranks),
    )
    shared = Shared(
        process=process,
        model=model,
        device=device,
        dtype=dtype,
        machine=_machine(model, device, dtype, threads, ranks),
        environment=here,
    )
    trainings = {
        run.name: Training(shared, run.name, run.config, tokens, saved)
        for run, tokens, saved in zip(runs, corpora, found, strict=True)
    }
    _announce(shared, list(trainings.values()))
    shared.progress = _progress(list(trainings.values()))
    phases.end("load_s")
    trainings[runs[0].name].phases = phases.seconds
    return Loaded(trainings, shared.progress)


def _checkpoint(run: PlannedRun) -> Checkpoint | None:
    return checkpoint.find(run.config.resume, run.folder) if run.config.resume else None


def _dtype(
    config: TrainConfig, found: list[Checkpoint | None], device: torch.device, ranks: Ranks
) -> torch.dtype:
    """A timing decides "auto": once for all ranks, and a resumed run does not decide again."""
    decided = [saved.state["identity"]["content"]["dtype"] for saved in found if saved]
    asked = decided[0] if decided and config.dtype == "auto" else config.dtype
    return ranks.from_first(choose_dtype(asked, device))


def _machine(
    model: Backend, device: torch.device, dtype: torch.dtype, threads: int, ranks: Ranks
) -> Record:
    """What run.json says of where the runs run."""
    native = model.backend == "native"
    return {
        "device": str(device),
        "dtype": TYPE_NAMES[dtype],
        "threads": threads,
        "backend": model.backend,
        "kernel_variant": kernel_facts(device)["kernel_variant"] if native else None,
        "ranks": ranks.count,
        "gpu": gpu_description(),
    }


def _announce(shared: Shared, trainings: Sequence[Training]) -> None:
    process = shared.process
    trainable = sum(training.trainable_params for training in trainings)
    line = base_line(process.source.name, shared.model, shared.machine, trainable)
    print(line + (f" in {len(trainings)} runs" if process.config.jobs else ""))


def _progress(trainings: Sequence[Training]) -> Progress:
    steps = sum(training.planned_steps for training in trainings)
    done = sum(training.steps_done for training in trainings)
    return Progress(steps, unit="step", description="train", done=done)


def _product(config: TrainConfig, ranks: Ranks) -> MakeProduct | None:
    """How the frozen layers are stored, if not as dense weights. UsageError for a combination that
    is not possible."""
    asked = [
        name for name in ("load_in_4bit", "load_in_8bit", "shard_base") if getattr(config, name)
    ]
    if len(asked) > 1:
        raise UsageError(
            "only one of these at a time",
            where=" ".join(f"--{name}" for name in asked),
            fix="choose one",
        )
    if not asked:
        return None
    if not config.shard_base:
        return Nf4 if config.load_in_4bit else Int8
    if ranks.count == 1:
        raise UsageError(
            "needs at least two ranks",
            where="--shard_base",
            fix="start several ranks with torchrun or srun",
        )
    ranks.even = True
    return lambda weight, rows: Sharded(weight, ranks)


def tokenise_runs(
    runs: Sequence[PlannedRun], model_config: PretrainedConfig, tokenizer: Tokenizer
) -> list[Corpora]:
    """(training, validation or None) of each run; what several runs have in common is tokenised
    once."""
    limit = getattr(model_config, "max_position_embeddings", None) or getattr(
        model_config, "n_positions", None
    )
    vocab_size = getattr(model_config.get_text_config(), "vocab_size", None)
    kept: dict[tuple[object, ...], TokenCorpus] = {}

    def tokens_of(
        documents: list[Document], most: int | None, config: TrainConfig, *, count_bytes: bool
    ) -> TokenCorpus:
        max_len = min(config.max_len, limit or config.max_len)
        key = (id(documents), most, max_len, config.train_on_prompt, config.turns, count_bytes)
        if key not in kept:
            kept[key] = tokenise(
                documents[:most],
                tokenizer,
                max_len=max_len,
                vocab_size=vocab_size,
                train_on_prompt=config.train_on_prompt,
                turns=config.turns,
                count_bytes=count_bytes,
            )
        return kept[key]

    def corpora(run: PlannedRun) -> Corpora:
        config, validation = run.config, None
        files = [
            (tokens_of(documents, config.max_train_documents, config, count_bytes=False), weight)
            for documents, weight in run.train
        ]
        if run.val_documents is not None:
            validation = tokens_of(
                run.val_documents, config.max_val_documents, config, count_bytes=True
            )
        return mixed(files), validation

    return [corpora(run) for run in runs]
