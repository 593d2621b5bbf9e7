"""The file of ``lorabatch train --jobs``: one run a line, as a name and the settings in which it
differs from the flags.

{"name": "small", "lora_r": 8, "lr": 1e-4}
{"name": "large", "lora_r": 32, "train_path": "other.jsonl", "max_steps": 500}
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from lorabatch.config import TrainConfig
from lorabatch.corpus.readers import check_file, jsonl_rows
from lorabatch.errors import DataError, UsageError
from lorabatch.runs import RUN_FILES
from lorabatch.schema import Fields
from lorabatch.settings import typed_values

# Of the process and its one base, or of all folders at once.
SHARED = (
    *(
        "base_model",
        "dtype",
        "load_in_4bit",
        "load_in_8bit",
        "backend",
        "no_cuda",
        "threads",
        "block_tokens",
        "checkpointing",
    ),
    *(
        "jobs",
        "save_dir",
        "overwrite",
        "resume_anyway",
        "time_limit",
        "shard_base",
        "rank_timeout",
        "dry_run",
    ),
)


def read_jobs(path: Path, config: TrainConfig, save_dir: Path) -> dict[str, TrainConfig]:
    """Name -> settings of each run, in the file's order. UsageError or DataError that names the
    line."""
    if config.resume not in (None, "auto"):
        what = "cannot be combined with --jobs: each run resumes from its own folder"
        raise UsageError(what, where=f"--resume {config.resume}", fix="use --resume auto")
    check_file(path)
    jobs: dict[str, TrainConfig] = {}
    for where, values in jsonl_rows(path):
        name = _name(values.pop("name", None), where)
        if name in jobs:
            raise DataError(
                f"duplicate name '{name}'",
                where=where,
                fix="give each run a name of its own",
            )
        jobs[name] = _settings(
            values, replace(config, jobs=None, save_dir=str(save_dir / name)), where
        )
    if not jobs:
        raise DataError("contains no runs", where=path, fix="write one JSON object a line")
    return jobs


def _name(name: object, where: str) -> str:
    if not isinstance(name, str):
        raise DataError(
            "no 'name'", where=where, fix='write {"name": "a", ...}: its folder under --save_dir'
        )
    if not re.fullmatch(r"[\w][\w.+=-]*", name) or name in RUN_FILES:
        raise DataError(
            f"'{name}' cannot be a folder's name",
            where=where,
            fix="use letters, digits, . _ + = and -",
        )
    return name


def _settings(values: Fields, config: TrainConfig, where: str) -> TrainConfig:
    for key in values:
        if key in SHARED:
            raise UsageError(
                f"'{key}' is the same for all runs", where=where, fix=f"give it as --{key}"
            )
    given = typed_values(TrainConfig, values, where)
    try:
        return replace(config, **given)
    except UsageError as error:  # out of bounds: it names the flag
        raise UsageError(error.what, where=f"{where}: {error.where}", fix=error.fix) from None
