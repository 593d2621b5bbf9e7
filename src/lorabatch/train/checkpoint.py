"""Checkpoints that a kill at any instant cannot spoil, and the rules for resuming from one.

A checkpoint is a folder ``checkpoints/step-00000120``: ``state.safetensors`` (adapters, optimiser
moments, best adapter), ``state.json`` (counters, identity, versions) and ``COMPLETE`` with size and
SHA-256 of both. It is written under a hidden name, flushed to disk, then renamed. A folder without
a ``COMPLETE`` that its files agree with is not a checkpoint.

No random state is stored: order, dropout and initialisation are functions of the seed and the
step (and the rank), so every rank's generators are known from the counters.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from lorabatch.errors import DataError, UnavailableError, UsageError
from lorabatch.records import read_json
from lorabatch.schema import SCHEMA_VERSION, Fields, NewerRecord, Record, dumps, parsed
from lorabatch.spans import spanned

TENSORS_FILE, STATE_FILE, COMPLETE_FILE = "state.safetensors", "state.json", "COMPLETE"


@dataclass(frozen=True)
class Checkpoint:
    path: Path
    state: Record  # the record of state.json
    tensors: dict[str, Tensor]

    @property
    def step(self) -> int:
        return int(self.state["step"])


@dataclass(frozen=True)
class Saved:
    num_bytes: int
    seconds: float


def folder_name(step: int) -> str:
    return f"step-{step:08d}"


@spanned("save")
def write(
    folder: Path, step: int, state: Fields, tensors: Mapping[str, Tensor], *, keep: int
) -> Saved:
    """Save, then delete all but the ``keep`` newest. UnavailableError if the disk refuses; older
    checkpoints stay as they are."""
    from safetensors.torch import save

    start = time.perf_counter()
    files = {
        TENSORS_FILE: save({k: v.detach().cpu().contiguous() for k, v in tensors.items()}),
        STATE_FILE: dumps({"schema_version": SCHEMA_VERSION, "step": step, **state}).encode(),
    }
    files[COMPLETE_FILE] = dumps(
        {name: {"bytes": len(b), "sha256": _sha256(b)} for name, b in files.items()}
    ).encode()
    temporary = folder / f".{folder_name(step)}.tmp"
    try:
        _write_folder(temporary, folder / folder_name(step), files)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        older = [p.name for p in listed(folder)]
        fix = "free some space"
        if older:
            fix += f" and run again with --resume auto; {older[-1]} is intact"
        raise UnavailableError(
            f"cannot save step {step} ({error.strerror})", where=folder, fix=fix
        ) from None
    for old in listed(folder)[:-keep]:
        _remove(old)
    return Saved(sum(map(len, files.values())), time.perf_counter() - start)


def _write_folder(temporary: Path, target: Path, files: Mapping[str, bytes]) -> None:
    """All files on the disk under a hidden name, then the rename."""
    target.parent.mkdir(exist_ok=True)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    for name, content in files.items():
        with (temporary / name).open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    _fsync_folder(temporary)
    # saved at this step before: by an earlier attempt, or before its evaluation
    _remove(target)
    temporary.rename(target)
    _fsync_folder(target.parent)


def listed(folder: Path) -> list[Path]:
    """Checkpoint folders, oldest first, whether usable or not."""
    return sorted(p for p in folder.glob("step-*") if p.is_dir())


def discard_after(folder: Path, step: int) -> None:
    """Remove the checkpoints of a future that is being replaced, and what a killed save left
    behind."""
    for path in listed(folder):
        if path.name > folder_name(step):
            _remove(path)
    for path in folder.glob(".step-*"):
        shutil.rmtree(path, ignore_errors=True)


def load(path: Path) -> Checkpoint:
    """Read a checkpoint whose files have the sizes and SHA-256 of its COMPLETE mark, else
    DataError."""
    fix = "use an older checkpoint"
    if not (path / COMPLETE_FILE).exists():
        raise DataError(f"not a complete checkpoint (no {COMPLETE_FILE})", where=path, fix=fix)
    content = {}
    for name, expected in read_json(path / COMPLETE_FILE, fix=fix).items():
        if name not in (TENSORS_FILE, STATE_FILE):
            raise DataError(
                "does not name the files of a checkpoint", where=path / COMPLETE_FILE, fix=fix
            )
        content[name] = _content(path / name, expected, fix)
    state = parsed(content[STATE_FILE], STATE_FILE, path / STATE_FILE, fix=fix)
    return Checkpoint(path, state, _tensors(content[TENSORS_FILE], path / TENSORS_FILE, fix))


def _content(path: Path, expected: Fields, fix: str) -> bytes:
    """expected: its size and SHA-256."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror})", where=path, fix=fix) from None
    if len(content) != expected["bytes"]:
        raise DataError(f"has {len(content)} of {expected['bytes']} bytes", where=path, fix=fix)
    if _sha256(content) != expected["sha256"]:
        raise DataError("does not have the SHA-256 it was written with", where=path, fix=fix)
    return content


def _tensors(content: bytes, where: Path, fix: str) -> dict[str, Tensor]:
    """Those of ``Trainable.tensors``; DataError if they are not of one run."""
    from safetensors.torch import load as parse

    try:
        found: dict[str, Tensor] = parse(content)
    except Exception as error:  # it raises its own classes
        raise DataError(
            f"not a readable safetensors file ({error})", where=where, fix=fix
        ) from None
    like = [name for name in found if name not in ("step_ms", "adam.step")]
    if (
        not {"adapters", "step_ms"} <= found.keys()
        or len({found[name].shape for name in like}) != 1
    ):
        raise DataError("does not hold the tensors of one checkpoint", where=where, fix=fix)
    return found


def newest(folder: Path) -> Checkpoint | None:
    """The newest usable checkpoint; unusable ones are named on stderr. None if there is none;
    DataError if none is usable."""
    found = listed(folder)
    for path in reversed(found):
        try:
            return load(path)
        except NewerRecord:  # an older checkpoint would silently lose what was done since
            raise
        except DataError as error:
            print(f"warning: skipped a damaged checkpoint: {error}", file=sys.stderr)
    if found:
        raise DataError(
            f"none of {len(found)} checkpoints is usable",
            where=folder,
            fix="restart with --overwrite",
        )
    return None


def find(resume: str, save_dir: Path) -> Checkpoint | None:
    """What ``--resume`` means: auto (newest in --save_dir, None if there is none yet), a
    checkpoint, or a run folder."""
    if resume == "auto":
        return newest(save_dir / "checkpoints")
    path = Path(resume)
    if path.name.startswith("step-"):
        return load(path)
    checkpoint = newest(path / "checkpoints")
    if checkpoint is None:
        raise UsageError(
            "contains no checkpoint",
            where=f"--resume {resume}",
            fix="give auto, a run folder or one of its checkpoints",
        )
    return checkpoint


def differences(saved: Fields, now: Fields) -> list[str]:
    """``["lr 0.0002 -> 0.001"]``: entries that differ between two flat records; long values are
    shortened."""

    def shown(record: Fields, name: str) -> str:
        text = str(record.get(name, "not recorded"))
        return text if len(text) <= 24 else f"{text[:12]}…"

    return [
        f"{k} {shown(saved, k)} -> {shown(now, k)}"
        for k in sorted({*saved, *now})
        if saved.get(k) != now.get(k)
    ]


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _fsync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    """Delete a checkpoint; its mark goes first, so that a half-deleted one is never taken for a
    whole one."""
    (path / COMPLETE_FILE).unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)
