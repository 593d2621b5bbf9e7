"""``lorabatch eval``: read and check the items, load, score, record each score as it is known, and
say what differs."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from lorabatch.config_trust import EvalConfig
from lorabatch.errors import DataError, InterruptedRun, UsageError
from lorabatch.evaluate import cautions, summary
from lorabatch.evaluate.figures import BASE, evaluation
from lorabatch.evaluate.items import Task, read_tasks
from lorabatch.evaluate.results import ITEMS, RESULT, read_items
from lorabatch.infer.adapters import AdapterNames
from lorabatch.machine.environment import environment
from lorabatch.model import hub
from lorabatch.model.card import write_evaluation
from lorabatch.records import read_jsonl, set_damaged_aside, write_json
from lorabatch.runs import RunFolder
from lorabatch.schema import Record
from lorabatch.signals import StopSignals

if TYPE_CHECKING:
    from lorabatch.evaluate.work import Work


def run_eval(config: EvalConfig, command: list[str]) -> int:
    """Returns the exit code; raises LorabatchError for what the user can fix."""
    hub.prepare_environment()
    folders = _adapter_folders(config)
    tasks = read_tasks(config)
    source = hub.find_model(config.base_model)
    output_dir = Path(config.output_dir or f"results/eval-{datetime.now():%Y%m%d-%H%M%S}")
    run = RunFolder.create(
        output_dir,
        kind="eval",
        config=config.to_dict(),
        command=command,
        environment=environment(),
        folder_flag="--output_dir",
        overwrite=config.overwrite,
        resume=config.resume,
    )
    try:
        with StopSignals() as signals:
            from lorabatch.evaluate.work import load_work

            work = load_work(config, source, tasks, folders)
            run.save(**work.facts)
            _score(run, work, signals)
        record = _result(run.path, config, tasks, folders, work)
        write_json(run.path / RESULT, record)
        for name, folder in folders.items():
            write_evaluation(folder, name, list(summary.of_model(record, name)), record)
        run.finish("completed")
    except BaseException as error:
        run.end_with(error)
        raise
    print("\n".join(summary.lines(record)))
    print(run.path / RESULT)
    return 0


def _adapter_folders(config: EvalConfig) -> dict[str, Path]:
    """By name. UsageError for a name that is taken, DataError for a folder that is not there."""
    if config.resume and not config.output_dir:
        raise UsageError("needs to know which run", where="--resume", fix="add --output_dir")
    folders = dict(AdapterNames.parse(config.adapters).folders)
    if config.adapter_dir is not None:
        path = Path(config.adapter_dir)
        if not path.is_dir():
            raise DataError("no such folder", where=f"--adapter_dir {path}", fix="train first")
        folders[path.resolve().name] = path
    if BASE in folders or len(folders) < len(config.adapters) + (config.adapter_dir is not None):
        raise UsageError(
            f"adapters need different names, none of them '{BASE}'",
            where="--adapters",
            fix="name them: --adapters NAME=DIR",
        )
    return folders


def _score(run: RunFolder, work: Work, signals: StopSignals) -> None:
    """Append what items.jsonl does not have yet. InterruptedRun on a signal."""
    set_damaged_aside(run.path / ITEMS)
    done = _done(run.path / ITEMS, work)
    with run.jsonl(ITEMS) as writer:
        for line in work.lines(done):
            writer.write(line)
            if signals.received:
                raise InterruptedRun(
                    f"stopped by {signals.received.name}; what was scored is saved",
                    where=run.path,
                    fix="run the same command with --resume and this --output_dir to continue",
                )


def _done(path: Path, work: Work) -> set[str]:
    """Keys of what an earlier attempt scored. UsageError if that was something else."""
    done = {str(line["key"]) for line in read_jsonl(path)}
    if not done <= work.keys:
        raise UsageError(
            "holds scores of other items, adapters or settings",
            where=path,
            fix="resume with those of its run.json, or choose another --output_dir",
        )
    return done


def _result(
    path: Path, config: EvalConfig, tasks: list[Task], folders: Mapping[str, Path], work: Work
) -> Record:
    """eval.json."""
    general = Path(config.general).stem if config.general else None
    figures = evaluation(read_items(path), seed=config.seed, general=general)
    warnings = [
        *work.warnings,
        *cautions.of_training(tasks, folders),
        *cautions.of_figures(figures),
    ]
    return {
        "schema_version": 1,
        "kind": "eval",
        "base": work.facts["model"],
        "adapters": work.digests,
        "files": [{"path": str(t.path), "sha256": hub.file_sha256(t.path)} for t in tasks],
        **figures,
        "warnings": warnings,
    }
