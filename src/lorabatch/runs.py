"""A run on disk: its folder, its state in ``run.json``, and the lock that keeps a second writer
out."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import BinaryIO

from lorabatch.errors import DataError, InterruptedRun, LorabatchError, UnavailableError, UsageError
from lorabatch.records import (
    JsonlWriter,
    read_json,
    replacing,
    set_damaged_aside,
    utc_now,
    write_json,
    writing,
)
from lorabatch.schema import SCHEMA_VERSION, Fields, Record

RUN_FILES = ("run.json", "events.jsonl", "completions.jsonl", "system.jsonl", "metrics.json")
# What else a run leaves in its folder, by its kind: --overwrite removes it, and nothing of the
# user's.
RUN_OUTPUTS = {
    "train": ("adapter_config.json", "adapter_model.safetensors", "lorabatch.json"),
    "infer": ("batch_output.jsonl", "completions.jsonl.damaged", "plan.json"),
    "eval": ("items.jsonl", "items.jsonl.damaged", "eval.json"),
}
RUN_FOLDERS = {"train": ("best", "last", "checkpoints"), "infer": ("shards",), "eval": ()}


CARD, CARD_MARK = "README.md", "<!-- lorabatch: card -->"  # of an adapter; others' have no mark


def is_card(path: Path) -> bool:
    """Whether a file is a model card that training wrote."""
    try:
        return CARD_MARK in path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return False


def _locked(folder: Path, folder_flag: str) -> BinaryIO | None:
    """A lock that the kernel takes back when this process ends, however it ends; None on file
    systems that know none.

    Raises UnavailableError where another process has it: two writers would mix their lines. The
    file says whose it is, because a server of files may keep a lock for a while after the node that
    had it died.
    """
    path = folder / ".lock"
    file = path.open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        fix = f"wait until it ends, choose another {folder_flag}, or remove {path} if it has ended"
        owner = path.read_text(encoding="utf-8", errors="replace")
        raise UnavailableError(
            f"another process is using this run folder ({owner})", where=folder, fix=fix
        ) from None
    except OSError:
        file.close()
        return None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {os.uname().nodename}".encode())
    file.flush()
    return file


def _remove_run(path: Path, kind: str) -> None:
    for name in (*RUN_FILES, *RUN_OUTPUTS[kind]):
        (path / name).unlink(missing_ok=True)
    if is_card(path / CARD):
        (path / CARD).unlink()
    for name in RUN_FOLDERS[kind]:
        shutil.rmtree(path / name, ignore_errors=True)


class RunFolder:
    """One run on disk. ``run.json`` always tells the state: running, completed, failed or
    interrupted."""

    def __init__(
        self,
        path: Path,
        record: Record,
        lock: BinaryIO | None = None,
        earlier: bytes | None = None,
    ) -> None:
        self.path, self.record, self._lock = path, record, lock
        self._earlier = earlier  # run.json before this attempt to resume

    @staticmethod
    def check(
        path: Path, *, kind: str, folder_flag: str, overwrite: bool = False, resume: bool = False
    ) -> Record:
        """The record of the run that is there, empty if there is none. UsageError if it may not be
        touched."""
        if overwrite and resume:
            raise UsageError(
                "mutually exclusive", where="--resume --overwrite", fix="leave one out"
            )
        if not (path / "run.json").exists():
            return {}
        found = read_json(path / "run.json")
        if found.get("kind") != kind:
            raise UsageError(
                f"contains a run of another kind ({found.get('kind')})",
                where=path,
                fix=f"choose another {folder_flag}",
            )
        if not (overwrite or resume):
            resume_flag = "--resume auto" if kind == "train" else "--resume"
            ways = f"{resume_flag} to continue it, --overwrite to replace it,"
            raise UsageError(
                f"contains an earlier run ({found.get('status')})",
                where=path,
                fix=f"add {ways} or choose another {folder_flag}",
            )
        return found

    @classmethod
    def create(
        cls,
        path: Path,
        *,
        kind: str,
        config: Fields,
        command: list[str],
        environment: Fields,
        folder_flag: str,
        overwrite: bool = False,
        resume: bool = False,
        shared: bool = False,
    ) -> RunFolder:
        """Make or reopen the folder, for this process alone unless ``shared``.

        UsageError if it holds another run, UnavailableError if it is not writable or another
        process is using it.
        """
        found = cls.check(
            path, kind=kind, folder_flag=folder_flag, overwrite=overwrite, resume=resume
        )
        earlier = (path / "run.json").read_bytes() if resume and found else None
        with writing(path, fix=f"choose another {folder_flag}"):
            path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=path):
                pass
        lock = None if shared else _locked(path, folder_flag)
        if overwrite and not resume:
            _remove_run(path, kind)
        record = {
            "schema_version": SCHEMA_VERSION,
            "run_id": f"{datetime.now(timezone.utc):%Y%m%dT%H%M%S}-{os.getpid()}",
            "kind": kind,
            "status": "running",
            "started_at": utc_now(),
            "finished_at": None,
            "command": command,
            "config": dict(config),
            "environment": dict(environment),
        }
        if resume:
            set_damaged_aside(path / "completions.jsonl")
        if resume and found:  # one run, however many attempts it takes
            record |= {k: found[k] for k in ("run_id", "started_at", "resumed") if k in found}
        run = cls(path, record, lock, earlier)
        run.save()
        return run

    def save(self, **changes: object) -> None:
        self.record.update(changes)
        write_json(self.path / "run.json", self.record)

    def finish(self, status: str, **changes: object) -> None:
        self.save(status=status, finished_at=utc_now(), **changes)
        self._unlock()

    def _unlock(self) -> None:
        if self._lock is not None:
            self._lock.close()

    def end_with(self, error: BaseException) -> None:
        """Record what ended the run; a refusal to resume changes nothing."""
        status = (
            "interrupted" if isinstance(error, (InterruptedRun, KeyboardInterrupt)) else "failed"
        )
        with suppress(OSError, UnavailableError):  # a full disk must not hide what filled it
            if self._earlier is not None and isinstance(error, (UsageError, DataError)):
                with replacing(self.path / "run.json") as file:
                    file.write(self._earlier)
            else:
                self.finish(
                    status, error=str(error) if isinstance(error, LorabatchError) else repr(error)
                )
        self._unlock()

    def jsonl(self, name: str) -> JsonlWriter:
        return JsonlWriter(self.path / name)
