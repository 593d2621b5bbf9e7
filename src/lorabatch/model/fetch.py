"""``lorabatch fetch`` and ``lorabatch stage``: a model on disk as a folder that stands alone, and
whether its files are still what was fetched."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from pathlib import Path

from lorabatch.config import FetchConfig, StageConfig
from lorabatch.errors import DataError, UsageError
from lorabatch.model.hub import (
    MANIFEST,
    ModelSource,
    file_sha256,
    find_model,
    name_in,
    prepare_environment,
    write_manifest,
)
from lorabatch.records import read_json

PARTIAL = ".lorabatch-partial"  # a copy that is not finished


def run_fetch(config: FetchConfig, command: list[str]) -> int:
    prepare_environment()
    source = fetch(
        config.name,
        to=Path(config.to) if config.to else None,
        revision=config.revision,
        offline=config.offline,
    )
    if config.verify:
        files, size = verify(source.path)
        print(f"{files} files, {size / 1e6:.1f} MB, all as they were fetched")
    revision = f" (revision {source.revision})" if source.revision else ""
    print(f"{source.name}: {source.path}{revision}")
    return 0


def run_stage(config: StageConfig, command: list[str]) -> int:
    fetched = FetchConfig(config.name, to=config.to, offline=True, verify=config.verify)
    return run_fetch(fetched, command)


def fetch(
    name: str, *, to: Path | None, revision: str | None, offline: bool = False
) -> ModelSource:
    """Make a model available offline. With ``to``: a self-contained copy there, with MANIFEST.json.

    Safe to repeat: files that are there already stay, so an interrupted copy is continued, and
    several jobs on one node may stage the same copy. Raises UsageError if ``to`` already holds
    something else, UnavailableError if the model cannot be had.
    """
    source = find_model(name, revision=revision, download=not offline)
    if to is None:
        return source
    theirs = to.exists() and any(to.glob("*")) and name_in(to) not in (name, source.name)
    if theirs and not (to / PARTIAL).exists():
        raise UsageError("is not empty", where=f"--to {to}", fix="choose another folder")
    to.mkdir(parents=True, exist_ok=True)
    if name_in(to) is None:
        (to / PARTIAL).touch()
    for file in source.path.iterdir():
        if file.is_file() and file.name != MANIFEST:
            _copy(file, to / file.name)
    (to / PARTIAL).unlink(missing_ok=True)
    write_manifest(to, name=source.name, revision=source.revision, origin=str(source.name))
    return ModelSource(source.name, to, source.revision)


def _copy(file: Path, target: Path) -> None:
    """Follows the hub's links, so that the copy stands alone; a target that is equal stays."""
    if target.exists() and file_sha256(target) == file_sha256(file):
        return
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    shutil.copyfile(file, temporary)
    temporary.replace(target)


def verify(folder: Path) -> tuple[int, int]:
    """(files, bytes) that are what they were when they were fetched, without the network.

    Against MANIFEST.json; in a hub cache, whose files are links to blobs that are named by their
    hash, against those names. Raises DataError that lists the files that differ, UsageError if
    there is nothing to compare with.
    """
    expected = _recorded_digests(folder)
    wrong = [
        name
        for name, digest in expected.items()
        if not (folder / name).is_file() or _digest(folder / name, len(digest)) != digest
    ]
    if wrong:
        raise DataError(
            f"missing or changed: {', '.join(sorted(wrong))}",
            where=folder,
            fix="fetch again into an empty folder",
        )
    return len(expected), sum((folder / name).stat().st_size for name in expected)


def _recorded_digests(folder: Path) -> dict[str, str]:
    if (folder / MANIFEST).exists():
        digests = _manifest_digests(folder / MANIFEST)
    else:
        blobs = {p.name: p.resolve().name for p in folder.iterdir()}
        digests = {n: d for n, d in blobs.items() if re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", d)}
    if not digests:
        raise UsageError(
            "neither MANIFEST.json nor the hub's blobs to compare with",
            where=folder,
            fix="make a copy with lorabatch fetch --to",
        )
    return digests


def _manifest_digests(manifest: Path) -> dict[str, str]:
    entries = read_json(manifest).get("files")
    if not isinstance(entries, dict) or not all(
        isinstance(e, dict) and isinstance(e.get("sha256"), str) for e in entries.values()
    ):
        raise DataError(
            "lists no files with their hashes",
            where=manifest,
            fix="fetch again into an empty folder",
        )
    return {name: entry["sha256"] for name, entry in entries.items()}


def _digest(path: Path, length: int) -> str:
    """SHA-256, or for 40 digits git's SHA-1 of a blob, which the hub uses for small files."""
    if length == 64:
        return file_sha256(path)
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
