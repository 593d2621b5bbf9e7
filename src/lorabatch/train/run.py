"""``lorabatch train``: check everything that is cheap, then load, train, save, and leave a run folder behind."""

from __future__ import annotations

import functools
import os
import tempfile
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from itertools import compress
from pathlib import Path
from typing import Any

from lorabatch import hub
from lorabatch.config import TrainConfig
from lorabatch.corpus.readers import Document, read_documents
from lorabatch.corpus.tokens import TokenCorpus, tokenise
from lorabatch.errors import InterruptedRun, LorabatchError, UnavailableError, UsageError
from lorabatch.measure.environment import environment, gpu_description
from lorabatch.measure.system import SystemSampler
from lorabatch.progress import Phases, Progress
from lorabatch.records import RunFolder, read_json
from lorabatch.signals import Deadline, StopSignals
from lorabatch.train.jobfile import check_shared, read_jobs
from lorabatch.train.ranks import Ranks, find_place, joined


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
        plans = _plans(config, folder, several_ranks=place is not None)
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
        return _run_all([replace(plan, folder=scratch) for plan in plans], command, replace(work, folder=scratch))


def _plans(config: TrainConfig, folder: Path, *, several_ranks: bool) -> list[_Plan]:
    """The run, or those of ``--jobs``, with their documents; a file that several name is read once."""
    configs = {"": config}
    if config.jobs:
        configs = read_jobs(Path(config.jobs), config, folder)
        if len(configs) > 1:
            check_shared(config, several_ranks=several_ranks)
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
    flags: Any = {"kind": "train", "folder_flag": "--save_dir", "overwrite": work.config.overwrite}
    for plan in plans:  # a refusal changes none of them
        RunFolder.check(plan.folder, resume=plan.config.resume is not None, **flags)
    here = environment()
    runs: list[RunFolder] = []
    try:
        for plan in plans:
            facts: Any = {"config": plan.config.to_dict(), "command": command, "environment": here}
            runs.append(RunFolder.create(plan.folder, resume=plan.config.resume is not None, **facts, **flags))
        errors = [error for error in _train(plans, runs, work) if error]
    except BaseException as error:
        for run in runs:
            if run.record["status"] == "running":
                run.end_with(error)
        raise
    if not errors:
        return 0
    if not work.config.jobs:
        raise errors[0]
    stopped = next((error for error in errors if isinstance(error, InterruptedRun)), None)
    if stopped:
        raise InterruptedRun(stopped.what, where=work.folder, fix=stopped.fix)
    failed = type(errors[0])
    raise failed(f"{len(errors)} of {len(plans)} runs failed", where=work.folder, fix="their run.json says why; the others are complete")


def _is_done(plan: _Plan) -> bool:
    """Whether ``--resume auto`` finds the run that was asked for already complete."""
    config, record_path = plan.config, plan.folder / "run.json"
    if config.resume != "auto" or config.overwrite or not record_path.exists():
        return False
    record = read_json(record_path)
    earlier, now = record.get("config", {}), config.to_dict()
    same = (*config.fixed(), "base_model", "train_path", "val_path")
    return record.get("status") == "completed" and all(earlier.get(k) == now[k] for k in same)


def _train(plans: list[_Plan], runs: list[RunFolder], work: _Work) -> list[LorabatchError | None]:
    """Load once, then train, save and record each run; what ended each early."""
    config, source, ranks = work.config, work.source, work.ranks
    with SystemSampler(work.folder / "system.jsonl") as sampler:
        phases = Phases()
        from lorabatch.measure.machine import kernel_facts
        from lorabatch.model import load
        from lorabatch.model.device import TYPE_NAMES, choose_device, choose_dtype, choose_threads, keep_freed_memory
        from lorabatch.model.spec import spec_from_config
        from lorabatch.train import checkpoint
        from lorabatch.train.job import Base, Job
        from lorabatch.train.loop import Lane, alone, drive
        from lorabatch.train.planner import configure, plan
        from lorabatch.train.together import together

        phases.end("import_s")
        found = [
            ranks.from_first(checkpoint.find(p.config.resume, run.path) if p.config.resume and ranks.is_first else None)
            for p, run in zip(plans, runs, strict=True)
        ]
        device = choose_device(no_cuda=config.no_cuda)
        threads = choose_threads(config.threads)
        keep_freed_memory()
        # A timing decides "auto": once for all ranks, and a resumed run does not decide again.
        decided = [f.state["identity"]["content"]["dtype"] for f in found if f]
        dtype = ranks.from_first(choose_dtype(decided[0] if decided and config.dtype == "auto" else config.dtype, device))
        phases.begin()
        model_config = load.load_config(source.path)
        tokenizer = load.load_tokenizer(source.path)
        corpora = _tokenise(plans, model_config, tokenizer)
        phases.end("tokenise_s")
        if len(plans) > 1 and spec_from_config(model_config) is None:
            raise UnavailableError(
                f"the native decoder does not know this kind of {model_config.model_type} model, and only it takes several adapters",
                where="--jobs",
                fix="train them one by one (a sweep: with --runs_per_task 1)",
            )
        model: Any = load.load_model(
            source, model_config, backend=config.backend, dtype=dtype, device=device, product=_product(config, ranks)
        )
        base = Base(model, len(plans) > 1, source, device, dtype, threads, ranks, work.signals, work.deadline, sampler, phases.seconds)
        jobs = [Job(base, p.name, *rest) for p, *rest in zip(plans, runs, (p.config for p in plans), corpora, found, strict=True)]
        configure(model, plans[0].config)
        largest = replace(config, lora_r=max(p.config.lora_r for p in plans), max_len=max(p.config.max_len for p in plans))
        trainable = sum(job.learner.adapters.num_params for job in jobs)
        planned = plan(model, largest, trainable)
        phases.end("load_s")
        machine = {
            "device": str(device),
            "dtype": TYPE_NAMES[dtype],
            "threads": threads,
            "backend": model.backend,
            "kernel_variant": kernel_facts(device)["kernel_variant"] if model.backend == "native" else None,
            "ranks": ranks.count,
            "gpu": gpu_description(),
            "block_tokens": planned[0] if planned else config.block_tokens,
            "planned_step_bytes": planned[1] if planned else None,
        }
        size = f"{model.num_base_params / 1e6:.1f}M parameters in {model.base_bytes / 2**20:.1f} MiB"
        where = f"{machine['dtype']} on {device}, {threads} threads" + (f" x {ranks.count} ranks" if ranks.count > 1 else "")
        where += f", {machine['kernel_variant']} kernels" if machine["kernel_variant"] else ""
        share = f"trainable {trainable:,} ({100 * trainable / (trainable + model.num_base_params):.2f} %)"
        print(f"base {source.name} ({size}, {where}); {share}" + (f" in {len(jobs)} runs" if config.jobs else ""))
        for job in jobs:
            job.learner.block_tokens = machine["block_tokens"]
            job.prepare(machine)
        ranks.wait_for_loading()
        steps, done = (sum(n) for n in zip(*((job.planned_steps, job.learner.state.step) for job in jobs), strict=True))
        base.progress = Progress(steps, unit="step", description="train", done=done)
        gradients = together(model, {job.learner: job.terms for job in jobs}) if base.several else alone(model, ranks)
        try:
            return drive([Lane(job.learner, job.steps()) for job in jobs], gradients)
        finally:
            base.progress.close()


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
