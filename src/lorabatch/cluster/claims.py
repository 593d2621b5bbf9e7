"""Work shared between processes on many nodes through a folder, without file locks.

File locks are silently missing on many Lustre, GPFS and NFS mounts; creating a file that must not exist
yet is atomic on all of them. So a claim is a file ``claim-000`` with its owner in it. Its time stamp is the
owner's heartbeat. When that stands still, another process takes over by creating ``claim-001``: exactly one
thief succeeds, and nothing is ever removed or renamed. An owner that was only slow does no harm: each claim
writes into a folder of its own.

    items/0007/claim-000   claim-001   DONE.json        taken over once, finished
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from lorabatch.errors import LorabatchError
from lorabatch.records import dumps, read_json, utc_now, write_json

HEARTBEATS_PER_TIMEOUT = 6
DONE = "DONE.json"
RELEASED = "released"


class Claim:
    """Ownership of ``folder`` by this process. While entered, a thread keeps the heartbeat going."""

    def __init__(self, folder: Path, generation: int, timeout_s: float) -> None:
        self.folder, self.generation = folder, generation
        self.path = folder / f"claim-{generation:03d}"
        self._interval_s = timeout_s / HEARTBEATS_PER_TIMEOUT
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def _beat(self) -> None:
        while not self._ended.wait(self._interval_s):
            with suppress(OSError):  # a file system that fails for a moment must not end the heartbeat for good
                os.utime(self.path)

    def __enter__(self) -> Claim:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def finish(self, record: dict[str, Any]) -> None:
        write_json(self.folder / DONE, record)

    @property
    def outputs(self) -> Path:
        """A folder that no other claim writes to."""
        return self.folder / f"output-{self.generation:03d}"

    def release(self) -> None:
        """Give the item back unfinished, so that nobody has to wait for our heartbeat to age."""
        self.path.with_suffix(f".{RELEASED}").touch()


def _latest(folder: Path) -> int:
    """Number of the newest claim; -1 without one."""
    return max((int(p.name[6:]) for p in folder.glob("claim-[0-9][0-9][0-9]")), default=-1)


def died(folder: Path, generation: int) -> bool:
    """Whether this earlier claim ended without giving the item back."""
    return not (folder / f"claim-{generation:03d}.{RELEASED}").exists()


def is_done(folder: Path) -> bool:
    return (folder / DONE).exists()


def try_claim(folder: Path, *, timeout_s: float) -> Claim | None:
    """Claim an item that is neither done nor in living hands; None otherwise."""
    folder.mkdir(parents=True, exist_ok=True)
    newest = _latest(folder)
    if is_done(folder) or (newest >= 0 and not _abandoned(folder, newest, timeout_s)):
        return None
    path = folder / f"claim-{newest + 1:03d}"
    owner = {"host": socket.gethostname(), "pid": os.getpid(), "job": os.environ.get("SLURM_JOB_ID"), "claimed_at": utc_now()}
    try:
        handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:  # another one was faster
        return None
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(dumps(owner) + "\n")
    return Claim(folder, newest + 1, timeout_s)


def _abandoned(folder: Path, generation: int, timeout_s: float) -> bool:
    """Released, or its process is gone (seen from the same host), or its heartbeat is too old.

    Both times come from the file system's clock, so that nodes whose clocks differ agree.
    """
    path = folder / f"claim-{generation:03d}"
    if path.with_suffix(f".{RELEASED}").exists():
        return True
    try:
        owner = json.loads(path.read_text(encoding="utf-8"))
        if owner["host"] == socket.gethostname():
            os.kill(int(owner["pid"]), 0)
    except ProcessLookupError:
        return True
    except (OSError, ValueError, KeyError):  # being written just now, or another user's process: its age decides
        pass
    probe = folder / f".now-{socket.gethostname()}-{os.getpid()}-{threading.get_ident()}"
    probe.touch()
    now = probe.stat().st_mtime
    probe.unlink()
    return now - path.stat().st_mtime > timeout_s


def work_through(
    folders: Sequence[Path],
    work: Callable[[int, Claim], None],
    *,
    timeout_s: float,
    wait: bool,
    stop_requested: Callable[[], bool],
    poll_s: float = 1.0,
) -> int:
    """Claim and do items until none is left; returns how many are not done.

    ``work(index, claim)`` does one item and calls ``claim.finish``; if it raises, the item is free again at once. With ``wait``
    we stay until the items of others are done too, and take over those that are abandoned; without, we leave when nothing is free.
    """
    while True:
        worked = False
        for index, folder in enumerate(folders):
            if stop_requested():
                break
            claim = try_claim(folder, timeout_s=timeout_s)
            if claim is not None:
                worked = True
                with claim:
                    try:
                        work(index, claim)
                    except BaseException:
                        claim.release()
                        raise
        left = sum(not is_done(folder) for folder in folders)
        if left == 0 or stop_requested() or not (worked or wait):
            return left
        if not worked:
            time.sleep(poll_s)


def owners(folders: Sequence[Path]) -> list[str]:
    """ "host:pid (job)" of the claims on items that are not done."""
    found = set()
    for folder in folders:
        newest = _latest(folder)
        if newest >= 0 and not is_done(folder):
            try:
                owner = read_json(folder / f"claim-{newest:03d}")
                found.add(f"{owner['host']}:{owner['pid']}" + (f" (job {owner['job']})" if owner.get("job") else ""))
            except (LorabatchError, KeyError):  # being written just now
                continue
    return sorted(found)
