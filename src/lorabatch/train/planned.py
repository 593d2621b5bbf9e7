"""The runs that a command asks for, before anything is loaded."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

from lorabatch.config import TrainConfig
from lorabatch.corpus.readers import Document, read_documents
from lorabatch.corpus.weights import weighted_paths
from lorabatch.model.hub import ModelSource
from lorabatch.records import read_json
from lorabatch.schema import Record
from lorabatch.signals import Deadline, StopSignals
from lorabatch.train.jobfile import read_jobs
from lorabatch.train.ranks import Ranks


@dataclass(frozen=True)
class PlannedRun:
    """``name`` is empty for a run on its own."""

    name: str
    config: TrainConfig
    folder: Path
    train: tuple[tuple[list[Document], float], ...]  # of each file, with its weight in an epoch
    val_documents: list[Document] | None
    checks: Record | None = None  # what was found in its documents


@dataclass(frozen=True)
class Process:
    """What the runs of this process have in common. ``folder``: of all of them."""

    config: TrainConfig
    folder: Path
    source: ModelSource
    signals: StopSignals
    deadline: Deadline
    ranks: Ranks


def planned_runs(config: TrainConfig, folder: Path) -> list[PlannedRun]:
    """The run, or those of ``--jobs``, with their documents; a file that several name is read
    once."""
    configs = read_jobs(Path(config.jobs), config, folder) if config.jobs else {"": config}
    read = functools.cache(
        lambda path, txt_format, field, group: read_documents(
            Path(path), txt_format=txt_format, text_field=field, group_field=group
        )
    )
    return [
        PlannedRun(
            name,
            c,
            folder / name,
            tuple(
                (read(path, c.txt_format, c.text_field, c.group_field), weight)
                for path, weight in weighted_paths(c.train_path)
            ),
            read(c.val_path, c.txt_format, c.text_field, c.group_field) if c.val_path else None,
        )
        for name, c in configs.items()
    ]


def is_done(run: PlannedRun) -> bool:
    """Whether ``--resume auto`` finds the run that was asked for already complete."""
    config, record_path = run.config, run.folder / "run.json"
    if config.resume != "auto" or config.overwrite or not record_path.exists():
        return False
    record = read_json(record_path)
    earlier, now = dict(record.get("config", {})), config.to_dict()
    if isinstance(earlier.get("train_path"), str):  # of a run when there could be one only
        earlier["train_path"] = [earlier["train_path"]]
    same = (*config.fixed(), "base_model", "train_path", "val_path", "turns")
    return record.get("status") == "completed" and all(earlier.get(k) == now[k] for k in same)
