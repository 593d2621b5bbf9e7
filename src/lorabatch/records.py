"""What is written to disk: run folders, atomic JSON, and JSONL that survives a kill.

A run is a directory (``run.json``, ``events.jsonl``, ``completions.jsonl``, ``system.jsonl``,
``metrics.json``). Whole files are replaced by rename; JSONL is appended one flushed line at a
time, so a process killed at any instant leaves at most one torn last line, which the readers
skip and the writers cut off.

The last field of a record is the CRC-32 of all bytes before it, so that one flipped bit is found wherever it is; records
from before there was one are read without. What a record must hold to be read says ``lorabatch.schema``.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, BinaryIO

from lorabatch.errors import DataError, InterruptedRun, LorabatchError, UnavailableError, UsageError
from lorabatch.schema import KINDS, RESTORE, SCHEMA_VERSION, NewerRecord, dumps, parsed, sealed

RUN_FILES = ("run.json", "events.jsonl", "completions.jsonl", "system.jsonl", "metrics.json")
# What else a run leaves in its folder, by its kind: --overwrite removes it, and nothing of the user's.
RUN_OUTPUTS = {
    "train": ("adapter_config.json", "adapter_model.safetensors", "lorabatch.json"),
    "infer": ("batch_output.jsonl", "completions.jsonl.damaged", "plan.json"),
}
RUN_FOLDERS = {"train": ("best", "last", "checkpoints"), "infer": ("shards",)}


def utc_now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


@contextmanager
def writing(path: Path, *, fix: str = "make room there; what was written before is intact") -> Iterator[None]:
    """The system's refusal to write (a full disk, a quota, permissions) as one line. Raises UnavailableError."""
    try:
        yield
    except OSError as error:
        raise UnavailableError(f"cannot write it ({error.strerror})", where=path, fix=fix) from None


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that takes the place of ``path`` when the block ends: readers see the old one or the new one, never half of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")  # in another container is a process of our number
    try:
        with writing(path):
            with temporary.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
    finally:
        with suppress(OSError):  # what refused to write refuses this too
            temporary.unlink(missing_ok=True)


def write_json(path: Path, record: Mapping[str, Any]) -> None:
    """Replace the file. Records of ours have a ``schema_version`` and are sealed; what others read (peft's) stays as it is."""
    ours = "schema_version" in record
    with replacing(path) as file:
        file.write((sealed(record, indent=2) if ours else dumps(record, indent=2).encode()) + b"\n")


def read_json(path: Path, kind: str | None = None, *, fix: str = RESTORE) -> dict[str, Any]:
    """A record that is a file of its own. ``kind``: in ``schema.KINDS``, by default the file's name.

    Raises DataError when the file is missing, damaged, or not such a record; NewerRecord (a DataError) for one of a later version.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise DataError("no such file", where=path, fix="is this a run folder?") from None
    except (ValueError, OSError) as error:
        raise DataError(f"not readable as JSON ({error})", where=path, fix=fix) from None
    return parsed(content, kind or (path.name if path.name in KINDS else None), path, fix=fix)


def read_jsonl(path: Path, *, damaged: Callable[[bytes], None] | None = None) -> Iterator[dict[str, Any]]:
    """Yield the records of a JSONL file, of the kind of its name; a torn last line (the writer was killed) is skipped.

    Raises DataError for a damaged line, unless ``damaged`` takes it.
    """
    if not path.exists():
        return
    kind = path.name if path.name in KINDS else None
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                if not line.endswith(b"\n"):
                    raise DataError("torn")
                record = parsed(line, kind, f"{path}:{number}", fix="restore the file or remove that line", what="not a JSON line")
            except NewerRecord:
                raise
            except DataError:
                if damaged:
                    damaged(line)
                elif line.endswith(b"\n"):
                    raise
            else:
                yield record


def mend(path: Path) -> None:
    """Move the damaged lines of a JSONL file into ``NAME.damaged`` beside it, and say so; the whole ones stay as they are."""
    spoilt: list[bytes] = []
    for _ in read_jsonl(path, damaged=spoilt.append):
        pass
    if not any(line.endswith(b"\n") for line in spoilt):  # a torn end is cut by whoever writes on
        return
    aside, bad = path.with_name(f"{path.name}.damaged"), set(spoilt)
    with writing(aside), aside.open("ab") as kept:
        kept.writelines(line.rstrip(b"\n") + b"\n" for line in spoilt)
    with path.open("rb") as lines, replacing(path) as file:
        file.writelines(line for line in lines if line not in bad)
    print(f"warning: {path}: {len(spoilt)} damaged lines moved to {aside.name}; what they recorded is done again", file=sys.stderr)


class JsonlWriter:
    """Append records to a JSONL file: one ``write`` and one flush per line, fsync about once a second."""

    def __init__(self, path: Path, *, fsync_every_s: float = 1.0) -> None:
        self.path = path
        self._cut_torn_line()
        self._file = path.open("ab", buffering=0)  # a buffer would try its rest again after a full disk
        self._fsync_every_s = fsync_every_s
        self._last_fsync = time.perf_counter()

    def _cut_torn_line(self) -> None:
        if not self.path.exists():
            return
        with self.path.open("rb+") as file:
            content_end = file.seek(0, os.SEEK_END)
            position = content_end
            while position > 0:  # backwards in 64 KiB steps until a line end
                step = min(65536, position)
                file.seek(position - step)
                newline = file.read(step).rfind(b"\n")
                if newline >= 0:
                    position = position - step + newline + 1
                    break
                position -= step
            if position != content_end:
                file.truncate(position)

    def write(self, record: Mapping[str, Any]) -> bytes:
        """Returns the line as it was written."""
        line = sealed(record) + b"\n"
        left = memoryview(line)
        with writing(self.path):
            while left:  # one system call, unless the disk is nearly full
                left = left[self._file.write(left) :]
            now = time.perf_counter()
            if now - self._last_fsync >= self._fsync_every_s:
                os.fsync(self._file.fileno())
                self._last_fsync = now
        return line

    def sync(self) -> int:
        """Flush to the disk itself; returns the length of the file in bytes."""
        with writing(self.path):
            os.fsync(self._file.fileno())
        self._last_fsync = time.perf_counter()
        return os.fstat(self._file.fileno()).st_size

    def close(self) -> None:
        if not self._file.closed:
            with writing(self.path), self._file:
                os.fsync(self._file.fileno())

    def __enter__(self) -> JsonlWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _locked(folder: Path, folder_flag: str) -> BinaryIO | None:
    """A lock that the kernel takes back when this process ends, however it ends; None on file systems that know none.

    Raises UnavailableError where another process has it: two writers would mix their lines. The file says whose it is,
    because a server of files may keep a lock for a while after the node that had it died.
    """
    path = folder / ".lock"
    file = path.open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        fix = f"wait for its end, choose another {folder_flag}, or remove {path} if it is gone"
        owner = path.read_text(encoding="utf-8", errors="replace")
        raise UnavailableError(f"another process is at work in this run folder ({owner})", where=folder, fix=fix) from None
    except OSError:
        file.close()
        return None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {os.uname().nodename}".encode())
    file.flush()
    return file


class RunFolder:
    """One run on disk. ``run.json`` always tells the state: running, completed, failed or interrupted."""

    def __init__(self, path: Path, record: dict[str, Any], lock: BinaryIO | None = None, earlier: bytes | None = None) -> None:
        self.path, self.record, self._lock = path, record, lock
        self._earlier = earlier  # run.json before this attempt to go on

    @staticmethod
    def check(path: Path, *, kind: str, folder_flag: str, overwrite: bool = False, resume: bool = False) -> dict[str, Any]:
        """The record of the run that is there, empty if there is none. UsageError if it may not be touched."""
        if overwrite and resume:
            raise UsageError("either go on or begin anew", where="--resume --overwrite", fix="leave one out")
        if not (path / "run.json").exists():
            return {}
        found = read_json(path / "run.json")
        if found.get("kind") != kind:
            raise UsageError(f"holds a run of another kind ({found.get('kind')})", where=path, fix=f"choose another {folder_flag}")
        if not (overwrite or resume):
            ways = f"--resume{' auto' if kind == 'train' else ''} to go on, --overwrite to replace it,"
            raise UsageError(f"holds an earlier run ({found.get('status')})", where=path, fix=f"add {ways} or choose another {folder_flag}")
        return found

    @classmethod
    def create(
        cls,
        path: Path,
        *,
        kind: str,
        config: Mapping[str, Any],
        command: list[str],
        environment: Mapping[str, Any],
        folder_flag: str,
        overwrite: bool = False,
        resume: bool = False,
        shared: bool = False,
    ) -> RunFolder:
        """Make or reopen the folder, for this process alone unless ``shared``.

        UsageError if it holds another run, UnavailableError if it is not writable or another process is at work in it.
        """
        found = cls.check(path, kind=kind, folder_flag=folder_flag, overwrite=overwrite, resume=resume)
        earlier = (path / "run.json").read_bytes() if resume and found else None
        with writing(path, fix=f"choose another {folder_flag}"):
            path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=path):
                pass
        lock = None if shared else _locked(path, folder_flag)
        if overwrite and not resume:
            for name in (*RUN_FILES, *RUN_OUTPUTS[kind]):
                (path / name).unlink(missing_ok=True)
            for name in RUN_FOLDERS[kind]:
                shutil.rmtree(path / name, ignore_errors=True)
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
            mend(path / "completions.jsonl")
        if resume and found:  # one run, however many attempts it takes
            record |= {k: found[k] for k in ("run_id", "started_at", "resumed") if k in found}
        run = cls(path, record, lock, earlier)
        run.save()
        return run

    def save(self, **changes: Any) -> None:
        self.record.update(changes)
        write_json(self.path / "run.json", self.record)

    def finish(self, status: str, **changes: Any) -> None:
        self.save(status=status, finished_at=utc_now(), **changes)
        self._unlock()

    def _unlock(self) -> None:
        if self._lock is not None:
            self._lock.close()

    def end_with(self, error: BaseException) -> None:
        """Record what ended the run; a refusal to go on changes nothing."""
        status = "interrupted" if isinstance(error, (InterruptedRun, KeyboardInterrupt)) else "failed"
        with suppress(OSError, UnavailableError):  # a full disk must not hide what filled it
            if self._earlier is not None and isinstance(error, (UsageError, DataError)):
                with replacing(self.path / "run.json") as file:
                    file.write(self._earlier)
            else:
                self.finish(status, error=str(error) if isinstance(error, LorabatchError) else repr(error))
        self._unlock()

    def jsonl(self, name: str) -> JsonlWriter:
        return JsonlWriter(self.path / name)
