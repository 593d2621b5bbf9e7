"""``lorabatch train``: check everything that is cheap, then load, train, save, and leave a run
folder behind."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import replace
from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING

from lorabatch.config import TrainConfig
from lorabatch.errors import InterruptedRun, LorabatchError
from lorabatch.machine.environment import environment
from lorabatch.machine.sampler import SystemSampler
from lorabatch.model import hub
from lorabatch.progress import Phases
from lorabatch.runs import RunFolder
from lorabatch.schema import Fields
from lorabatch.signals import Deadline, StopSignals
from lorabatch.train.planned import PlannedRun, Process, is_done, planned_runs
from lorabatch.train.ranks import find_rendezvous, joined

if TYPE_CHECKING:  # torch comes after what can be checked without it
    from lorabatch.train.load import Loaded


def run_training(config: TrainConfig, command: list[str]) -> int:
    """Returns the exit code; raises LorabatchError for what the user can fix, if it can be known
    before anything is loaded."""
    with StopSignals() as signals, ExitStack() as stack:  # from the start: loading may take minutes
        hub.prepare_environment()
        deadline = Deadline.from_flag_and_slurm(config.time_limit)
        folder = Path(
            config.save_dir or f"results/lora-{Path(config.base_model).name.removesuffix('.gguf')}"
        )
        rendezvous = find_rendezvous(os.environ)
        runs = planned_runs(config, folder)
        source = hub.find_model(config.base_model)
        if config.dry_run:
            from lorabatch.train.forecast import run_dry

            return run_dry(runs, source)
        ranks = stack.enter_context(joined(rendezvous, timeout_s=config.rank_timeout))
        done = ranks.from_first([ranks.is_first and is_done(run) for run in runs])
        for run in compress(runs, done):
            print(f"{run.folder}: this run is complete; nothing to do")
        runs = [run for run, complete in zip(runs, done, strict=True) if not complete]
        if not runs:
            return 0
        process = Process(config, folder, source, signals, deadline, ranks)
        if not ranks.is_first:
            # It does the same and keeps nothing of it: one writer per run.
            scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            nowhere = stack.enter_context(Path(os.devnull).open("w"))
            stack.enter_context(redirect_stdout(nowhere))
            stack.enter_context(redirect_stderr(nowhere))
            process = replace(process, folder=scratch)
            runs = [replace(run, folder=scratch / run.name) for run in runs]
        return _run_all(runs, process, command)


def _run_all(runs: list[PlannedRun], process: Process, command: list[str]) -> int:
    for planned in runs:  # a refusal changes none of them
        RunFolder.check(
            planned.folder,
            kind="train",
            folder_flag="--save_dir",
            overwrite=process.config.overwrite,
            resume=planned.config.resume is not None,
        )
    from lorabatch.train.datachecks import look_at_data  # when signals are listened to already

    runs = look_at_data(runs, process.ranks)
    here = environment()
    results: list[LorabatchError | None] = []
    loaded: Loaded | None = None
    try:
        for planned in runs:
            with _begun(_folder(planned, process, command, here)) as (folder, sampler):
                loaded = loaded or _load(runs, process, here)  # in the first run's time
                results.append(loaded.trainings[planned.name].run(folder, sampler))
            if isinstance(results[-1], InterruptedRun) or (results[-1] and process.ranks.count > 1):
                # what stopped this one stops the next; a rank that has ended does not come back
                break
    finally:
        if loaded:
            loaded.progress.close()
    return _outcome(results, len(runs), process)


def _folder(planned: PlannedRun, process: Process, command: list[str], here: Fields) -> RunFolder:
    folder = RunFolder.create(
        planned.folder,
        kind="train",
        config=planned.config.to_dict(),
        command=command,
        environment=here,
        folder_flag="--save_dir",
        overwrite=process.config.overwrite,
        resume=planned.config.resume is not None,
    )
    folder.save(data={"checks": planned.checks})
    return folder


def _load(runs: list[PlannedRun], process: Process, here: Fields) -> Loaded:
    phases = Phases()
    from lorabatch.train.load import load_runs

    phases.end("import_s")
    return load_runs(runs, process, here, phases)


def _outcome(results: list[LorabatchError | None], num_runs: int, process: Process) -> int:
    """The exit code when all runs are complete, else the error of the one, or of them all."""
    errors = [error for error in results if error]
    if not errors:
        return 0
    if isinstance(errors[-1], InterruptedRun) and process.config.jobs:
        raise InterruptedRun(errors[-1].what, where=process.folder, fix=errors[-1].fix)
    if num_runs == 1 or len(results) < num_runs:
        raise errors[-1]
    raise type(errors[0])(
        f"{len(errors)} of {num_runs} runs failed",
        where=process.folder,
        fix="their run.json says why; the others are complete",
    )


@contextmanager
def _begun(run: RunFolder) -> Iterator[tuple[RunFolder, SystemSampler]]:
    """A run while it runs; what ends it without its knowledge is recorded."""
    try:
        with SystemSampler(run.path / "system.jsonl") as sampler:
            yield run, sampler
    except BaseException as error:
        if run.record["status"] == "running":
            run.end_with(error)
        raise
