"""``lorabatch train``: check everything that is cheap, then load, train, save, and leave a run folder behind."""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorabatch import hub
from lorabatch.config import TrainConfig
from lorabatch.corpus.readers import Document, read_documents
from lorabatch.corpus.tokens import TokenCorpus, tokenise
from lorabatch.errors import InterruptedRun, LorabatchError, UsageError
from lorabatch.measure.environment import environment, gpu_description
from lorabatch.measure.system import SystemSampler
from lorabatch.progress import Phases, Progress
from lorabatch.records import RunFolder, read_json
from lorabatch.signals import Deadline, StopSignals
from lorabatch.train.jobfile import read_jobs
from lorabatch.train.ranks import Ranks, find_place, joined

if TYPE_CHECKING:  # torch comes after what can be checked without it
    from lorabatch.model.backend import Backend
    from lorabatch.train.job import Job


@dataclass(frozen=True)
class _Plan:
    """One run before anything is loaded. ``name`` is empty for a run on its own."""

    name: str
    config: TrainConfig
    folder: Path
    train_documents: list[Document]
    val_documents: list[Document] | None


@dataclass(frozen=True)
class _Work:
    """What is known before anything is loaded."""

    config: TrainConfig
    folder: Path
    source: hub.ModelSource
    signals: StopSignals
    deadline: Deadline
    ranks: Ranks


def run_training(config: TrainConfig, command: list[str]) -> int:
    """Returns the exit code; raises LorabatchError for what the user can mend, if it can be known before anything is loaded."""
    with StopSignals() as signals, ExitStack() as stack:  # from the start: loading may take minutes
        hub.prepare_environment()
        deadline = Deadline.from_flag_and_slurm(config.time_limit)
        folder = Path(config.save_dir or f"results/lora-{Path(config.base_model).name.removesuffix('.gguf')}")
        place = find_place(os.environ)
        plans = _plans(config, folder)
        source = hub.find_model(config.base_model)
        ranks = stack.enter_context(joined(place, timeout_s=config.rank_timeout))
        done = ranks.from_first([ranks.is_first and _is_done(plan) for plan in plans])
        for plan in compress(plans, done):
            print(f"{plan.folder}: this run is complete; nothing to do")
        plans = [plan for plan, complete in zip(plans, done, strict=True) if not complete]
        if not plans:
            return 0
        work = _Work(config, folder, source, signals, deadline, ranks)
        if ranks.is_first:
            return _run_all(plans, command, work)
        # The other ranks do the same and keep nothing of it: one writer per run.
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        nowhere = stack.enter_context(Path(os.devnull).open("w"))
        stack.enter_context(redirect_stdout(nowhere))
        stack.enter_context(redirect_stderr(nowhere))
        return _run_all([replace(plan, folder=scratch / plan.name) for plan in plans], command, replace(work, folder=scratch))


def _plans(config: TrainConfig, folder: Path) -> list[_Plan]:
    """The run, or those of ``--jobs``, with their documents; a file that several name is read once."""
    configs = read_jobs(Path(config.jobs), config, folder) if config.jobs else {"": config}
    read = functools.cache(lambda path, txt_format, field: read_documents(Path(path), txt_format=txt_format, text_field=field))
    return [
        _Plan(
            name,
            c,
            folder / name,
            read(c.train_path, c.txt_format, c.text_field),
            read(c.val_path, c.txt_format, c.text_field) if c.val_path else None,
        )
        for name, c in configs.items()
    ]


def _run_all(plans: list[_Plan], command: list[str], work: _Work) -> int:
    config = work.config
    flags: Any = {"kind": "train", "folder_flag": "--save_dir", "overwrite": config.overwrite}
    for plan in plans:  # a refusal changes none of them
        RunFolder.check(plan.folder, resume=plan.config.resume is not None, **flags)
    here = environment()
    results: list[LorabatchError | None] = []
    loaded: _Loaded | None = None
    try:
        for plan in plans:
            resume = plan.config.resume is not None
            facts: Any = {"resume": resume, "config": plan.config.to_dict(), "command": command, "environment": here}
            with _begun(RunFolder.create(plan.folder, **facts, **flags)) as (run, sampler):
                loaded = loaded or _load(plans, here, work)  # in the first run's time
                results.append(loaded.jobs[plan.name].run(run, sampler))
            if isinstance(results[-1], InterruptedRun) or (results[-1] and work.ranks.count > 1):
                break  # what stopped this one stops the next; another rank that is gone does not come back
    finally:
        if loaded:
            loaded.progress.close()
    errors = [error for error in results if error]
    if not errors:
        return 0
    if isinstance(errors[-1], InterruptedRun) and config.jobs:
        raise InterruptedRun(errors[-1].what, where=work.folder, fix=errors[-1].fix)
    if len(plans) == 1 or len(results) < len(plans):
        raise errors[-1]
    failed = type(errors[0])
    raise failed(f"{len(errors)} of {len(plans)} runs failed", where=work.folder, fix="their run.json says why; the others are complete")


@contextmanager
def _begun(run: RunFolder) -> Iterator[tuple[RunFolder, SystemSampler]]:
    """A run while it is at work; what ends it without its knowledge is recorded."""
    try:
        with SystemSampler(run.path / "system.jsonl") as sampler:
            yield run, sampler
    except BaseException as error:
        if run.record["status"] == "running":
            run.end_with(error)
        raise


def _is_done(plan: _Plan) -> bool:
    """Whether ``--resume auto`` finds the run that was asked for already complete."""
    config, record_path = plan.config, plan.folder / "run.json"
    if config.resume != "auto" or config.overwrite or not record_path.exists():
        return False
    record = read_json(record_path)
    earlier, now = record.get("config", {}), config.to_dict()
    same = (*config.fixed(), "base_model", "train_path", "val_path")
    return record.get("status") == "completed" and all(earlier.get(k) == now[k] for k in same)


@dataclass(frozen=True)
class _Loaded:
    jobs: dict[str, Job]  # by name
    progress: Progress


def _load(plans: list[_Plan], here: Mapping[str, Any], work: _Work) -> _Loaded:
    """The base, once, and every run's data and settings held against it: a mistake in the last one shows before the first begins."""
    config, source, ranks = work.config, work.source, work.ranks
    phases = Phases()
    from lorabatch.measure.machine import kernel_facts
    from lorabatch.model import load
    from lorabatch.model.device import TYPE_NAMES, choose_device, choose_dtype, choose_threads, keep_freed_memory, return_freed_memory
    from lorabatch.train import checkpoint
    from lorabatch.train.figures import base_line
    from lorabatch.train.job import Base, Job

    phases.end("import_s")
    found = [ranks.from_first(checkpoint.find(p.config.resume, p.folder) if p.config.resume and ranks.is_first else None) for p in plans]
    device = choose_device(no_cuda=config.no_cuda)
    threads = choose_threads(config.threads)
    (return_freed_memory if config.checkpointing == "full" else keep_freed_memory)()
    # A timing decides "auto": once for all ranks, and a resumed run does not decide again.
    decided = [f.state["identity"]["content"]["dtype"] for f in found if f]
    dtype = ranks.from_first(choose_dtype(decided[0] if decided and config.dtype == "auto" else config.dtype, device))
    phases.begin()
    model_config = load.load_config(source.path)
    corpora = _tokenise(plans, model_config, load.load_tokenizer(source.path))
    phases.end("tokenise_s")
    model: Backend = load.load_model(
        source, model_config, backend=config.backend, dtype=dtype, device=device, product=_product(config, ranks)
    )
    machine = {
        "device": str(device),
        "dtype": TYPE_NAMES[dtype],
        "threads": threads,
        "backend": model.backend,
        "kernel_variant": kernel_facts(device)["kernel_variant"] if model.backend == "native" else None,
        "ranks": ranks.count,
        "gpu": gpu_description(),
    }
    base = Base(model, source, device, dtype, ranks, work.signals, work.deadline, machine, here)
    jobs = {p.name: Job(base, p.name, p.config, *rest) for p, *rest in zip(plans, corpora, found, strict=True)}
    trainable = sum(job.trainable_params for job in jobs.values())
    print(base_line(source.name, model, machine, trainable) + (f" in {len(jobs)} runs" if config.jobs else ""))
    steps, done = (sum(n) for n in zip(*((job.planned_steps, job.steps_done) for job in jobs.values()), strict=True))
    base.progress = Progress(steps, unit="step", description="train", done=done)
    phases.end("load_s")
    jobs[plans[0].name].phases = phases.seconds
    return _Loaded(jobs, base.progress)


def _product(config: TrainConfig, ranks: Ranks) -> Any:
    """How the frozen layers are stored, if not as dense weights. UsageError for a combination that is not possible."""
    asked = [name for name in ("load_in_4bit", "load_in_8bit", "shard_base") if getattr(config, name)]
    if len(asked) > 1:
        raise UsageError("only one of these at a time", where=" ".join(f"--{name}" for name in asked), fix="choose one")
    if config.shard_base:
        if ranks.count == 1:
            raise UsageError("there is nobody to share with", where="--shard_base", fix="start several ranks with torchrun or srun")
        from lorabatch.model.sharded import Sharded

        ranks.even = True
        return lambda weight, rows: Sharded(weight, ranks)
    if asked:
        from lorabatch.model.quantised import Int8, Nf4

        return Nf4 if config.load_in_4bit else Int8
    return None


def _tokenise(plans: list[_Plan], model_config: Any, tokenizer: Any) -> list[tuple[Any, Any]]:
    """(training, validation or None) of each run; what several runs have in common is tokenised once."""
    limit = getattr(model_config, "max_position_embeddings", None) or getattr(model_config, "n_positions", None)
    kept: dict[Any, TokenCorpus] = {}

    def tokens_of(documents: list[Document], most: int | None, config: TrainConfig, *, count_bytes: bool) -> TokenCorpus:
        max_len = min(config.max_len, limit or config.max_len)
        key = (id(documents), most, max_len, config.train_on_prompt, count_bytes)
        if key not in kept:
            kept[key] = tokenise(
                documents[:most],
                tokenizer,
                max_len=max_len,
                vocab_size=getattr(model_config.get_text_config(), "vocab_size", None),
                train_on_prompt=config.train_on_prompt,
                count_bytes=count_bytes,
            )
        return kept[key]

    return [
        (
            tokens_of(p.train_documents, p.config.max_train_documents, p.config, count_bytes=False),
            tokens_of(p.val_documents, p.config.max_val_documents, p.config, count_bytes=True) if p.val_documents is not None else None,
        )
        for p in plans
    ]
