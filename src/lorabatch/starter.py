"""``lorabatch init``: the project's files that are not Python, for whoever installed the package
and has no checkout."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from lorabatch.config import InitConfig
from lorabatch.errors import UsageError
from lorabatch.records import writing

# Links into the checkout; files of their own in the wheel.
SOURCE = Path(__file__).parent / "project"


def run_init(config: InitConfig, command: list[str]) -> int:
    """Lay the files and say what to type next. Returns 0."""
    folder = Path(config.folder)
    print(f"{len(lay(folder))} files written to {folder.resolve()}")
    print("sample texts: data_sample/; a training and a sweep as files: configs/examples/")
    print("try:    lorabatch train --base_model smollm2-135m --train_path data_sample/train.txt")
    print("submit: lorabatch submit train --config configs/examples/experiment.toml --dry_run")
    return 0


def lay(folder: Path) -> list[Path]:
    """Copy the files and return the new ones; one that is there with the same content stays.

    UsageError before anything is written if one is there with another content; UnavailableError if
    the folder cannot be written.
    """
    sources = [
        Path(place, name) for place, _, names in os.walk(SOURCE, followlinks=True) for name in names
    ]
    pairs = [(source, folder / source.relative_to(SOURCE)) for source in sorted(sources)]
    new = [(source, target) for source, target in pairs if not target.exists()]
    for source, target in pairs:
        if target.exists() and target.read_bytes() != source.read_bytes():
            raise UsageError(
                "exists and differs",
                where=target,
                fix="move it, or choose another folder",
            )
    with writing(folder, fix="choose another folder"):
        for source, target in new:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
    return [target for _, target in new]


def environment_of_jobs() -> dict[str, str]:
    """What tells the job scripts of a folder without a checkout which Python has lorabatch."""
    return {} if Path("scripts/build.sh").is_file() else {"VENV": sys.prefix}
