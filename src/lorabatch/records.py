"""What is written to disk: run folders, atomic JSON, and JSONL that survives a kill.

A run is a directory (``run.json``, ``events.jsonl``, ``completions.jsonl``, ``system.jsonl``,
``metrics.json``). Whole files are replaced by rename; JSONL is appended one flushed line at a
time, so a process killed at any instant leaves at most one torn last line, which the readers
skip and the writers cut off.

The last field of a record is the CRC-32 of all bytes before it, so that one flipped bit is found
wherever it is; records from before there was one are read without. What a record must hold to be
read says ``lorabatch.schema``.
"""

from __future__ import annotations

import os
import secrets
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import BinaryIO

from lorabatch.errors import DataError, UnavailableError
from lorabatch.schema import KINDS, RESTORE, Fields, NewerRecord, Record, dumps, parsed, sealed
from lorabatch.spans import spanned


def utc_now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


@contextmanager
def writing(
    path: Path, *, fix: str = "free some space; what was written before is intact"
) -> Iterator[None]:
    """The system's refusal to write (a full disk, a quota, permissions) as one line. Raises
    UnavailableError."""
    try:
        yield
    except OSError as error:
        raise UnavailableError(f"cannot write it ({error.strerror})", where=path, fix=fix) from None


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that takes the place of ``path`` when the block ends: readers see the old one or the
    new one, never half of it."""
    # in another container is a process of our number
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
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


def write_json(path: Path, record: Fields) -> None:
    """Replace the file. Records of ours have a ``schema_version`` and are sealed; what others read
    (peft's) stays as it is."""
    ours = "schema_version" in record
    with replacing(path) as file:
        file.write((sealed(record, indent=2) if ours else dumps(record, indent=2).encode()) + b"\n")


def read_json(path: Path, kind: str | None = None, *, fix: str = RESTORE) -> Record:
    """A record that is a file of its own. ``kind``: in ``schema.KINDS``, by default the file's
    name.

    Raises DataError when the file is missing, damaged, or not such a record; NewerRecord (a
    DataError) for one of a later version.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise DataError("no such file", where=path, fix="is this a run folder?") from None
    except (ValueError, OSError) as error:
        raise DataError(f"not readable as JSON ({error})", where=path, fix=fix) from None
    return parsed(content, kind or (path.name if path.name in KINDS else None), path, fix=fix)


def read_jsonl(path: Path, *, damaged: Callable[[bytes], None] | None = None) -> Iterator[Record]:
    """Yield the records of a JSONL file, of the kind of its name; a torn last line (the writer was
    killed) is skipped.

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
                record = parsed(
                    line,
                    kind,
                    f"{path}:{number}",
                    fix="restore the file or remove that line",
                    what="not a JSON line",
                )
            except NewerRecord:
                raise
            except DataError:
                if damaged:
                    damaged(line)
                elif line.endswith(b"\n"):
                    raise
            else:
                yield record


def set_damaged_aside(path: Path) -> None:
    """Move the damaged lines of a JSONL file into ``NAME.damaged`` beside it, and say so; the whole
    ones stay as they are."""
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
    print(
        f"warning: {path}: {len(spoilt)} damaged lines moved to {aside.name}; what they "
        "recorded is computed again",
        file=sys.stderr,
    )


class JsonlWriter:
    """Append records to a JSONL file: one ``write`` and one flush per line, fsync about once a
    second."""

    def __init__(self, path: Path, *, fsync_every_s: float = 1.0) -> None:
        self.path = path
        self._cut_torn_line()
        # a buffer would try its rest again after a full disk
        self._file = path.open("ab", buffering=0)
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

    @spanned("write")
    def write(self, record: Fields) -> bytes:
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
