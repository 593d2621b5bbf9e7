"""Work shared between processes on many nodes through a folder, without file locks.

File locks are silently missing on many Lustre, GPFS and NFS mounts; creating a file that must not
exist yet is atomic on all of them. So a claim is a file ``claim-000`` with its owner in it. Its
time stamp is the owner's heartbeat. When that stands still, another process takes over by creating
``claim-001``: exactly one thief succeeds, and nothing is ever removed or renamed. An owner that was
only slow does no harm: each claim writes into a folder of its own. Only who can prove that the
owner is gone (the same boot, the same namespace of process numbers) does not wait for the heartbeat
to age: in another container the same number means nothing.

    items/0007/claim-000   claim-001   DONE.json        taken over once, finished
"""

from __future__ import annotations

import os
import re
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from lorabatch.errors import LorabatchError
from lorabatch.records import read_json, utc_now, write_json, writing
from lorabatch.schema import SCHEMA_VERSION, Fields, Record, sealed

HEARTBEATS_PER_TIMEOUT = 6
DONE = "DONE.json"
RELEASED = "released"


class Claim:
    """Ownership of ``folder`` by this process. While entered, a thread keeps the heartbeat
    going."""

    def __init__(self, folder: Path, generation: int, timeout_s: float) -> None:
        self.folder, self.generation = folder, generation
        self.path = folder / f"claim-{generation:03d}"
        self._interval_s = timeout_s / HEARTBEATS_PER_TIMEOUT
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def _beat(self) -> None:
        while not self._ended.wait(self._interval_s):
            # a file system that fails for a moment must not end the heartbeat for good
            with suppress(OSError):
                os.utime(self.path)

    def __enter__(self) -> Claim:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def finish(self, record: Record) -> None:
        write_json(self.folder / DONE, {"schema_version": SCHEMA_VERSION, **record})

    @property
    def outputs(self) -> Path:
        """A folder that no other claim writes to."""
        return self.folder / f"output-{self.generation:03d}"

    def release(self) -> None:
        """Give the item back unfinished, so that nobody has to wait for our heartbeat to age."""
        self.path.with_suffix(f".{RELEASED}").touch()


def _latest(folder: Path) -> int:
    """Number of the newest claim; -1 without one."""
    found = (re.fullmatch(r"claim-(\d+)", path.name) for path in folder.iterdir())
    return max((int(match[1]) for match in found if match), default=-1)


def abandoned_earlier(folder: Path, generation: int) -> bool:
    """Whether this earlier claim ended without giving the item back."""
    return not (folder / f"claim-{generation:03d}.{RELEASED}").exists()


def is_done(folder: Path) -> bool:
    return (folder / DONE).exists()


def try_claim(folder: Path, *, timeout_s: float) -> Claim | None:
    """Claim an item that is neither done nor owned by a living process, else None. UnavailableError
    where nothing can be written."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    newest = _latest(folder)
    if is_done(folder) or (newest >= 0 and not _abandoned(folder, newest, timeout_s)):
        return None
    path = folder / f"claim-{newest + 1:03d}"
    with writing(path):
        try:
            handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:  # another one was faster
            return None
        with os.fdopen(handle, "wb") as file:
            file.write(sealed(_this_process()) + b"\n")
    return Claim(folder, newest + 1, timeout_s)


def _this_process() -> Record:
    """Who owns a claim, with what another process needs to see that it is gone."""
    known = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "job": os.environ.get("SLURM_JOB_ID"),
        "claimed_at": utc_now(),
    }
    return known | {"where": _namespace(), "started": _start_time(os.getpid())}


def _namespace() -> str | None:
    """Where a process number of ours means the same process: this boot of this kernel and its
    namespace; None if it cannot be known."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} pid:{Path('/proc/self/ns/pid').stat().st_ino}"
    except (OSError, ValueError):
        return None


def _start_time(pid: int) -> int | None:
    """Clock ticks from boot to its start, which tell it from a later process of the same number; 0
    if it has ended; None if not visible."""
    try:
        state, *fields = (
            Path(f"/proc/{pid}/stat")
            .read_text(encoding="utf-8", errors="replace")
            .rpartition(")")[2]
            .split()
        )
        return 0 if state in "ZX" else int(fields[18])
    except (OSError, ValueError, IndexError):
        return None


def _proven_dead(owner: Fields) -> bool:
    """Whether the process of this claim is certainly gone. What cannot be seen from here is not."""
    if owner.get("where") is None or (owner["host"], owner["where"]) != (
        socket.gethostname(),
        _namespace(),
    ):
        return False
    try:
        os.kill(int(owner["pid"]), 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # another user's process
        pass
    started = _start_time(int(owner["pid"]))
    return None not in (started, owner.get("started")) and started != owner["started"]


def _abandoned(folder: Path, generation: int, timeout_s: float) -> bool:
    """Released, or its process is proven dead, or its heartbeat is too old.

    Both times come from the file system's clock, so that nodes whose clocks differ agree.
    """
    path = folder / f"claim-{generation:03d}"
    if path.with_suffix(f".{RELEASED}").exists():
        return True
    with suppress(LorabatchError):  # being written just now, or damaged: its age decides
        if _proven_dead(read_json(path, "claim")):
            return True
    with writing(folder), tempfile.TemporaryFile(dir=folder) as probe:
        return os.fstat(probe.fileno()).st_mtime - path.stat().st_mtime > timeout_s


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

    ``work(index, claim)`` does one item and calls ``claim.finish``; if it raises, the item is free
    again at once. With ``wait`` we stay until the items of others are done too, and take over those
    that are abandoned; without, we leave when nothing is free.
    """
    # what is done stays done and is not looked at again: there may be thousands
    open_items = dict(enumerate(folders))
    while True:
        worked = False
        for index, folder in list(open_items.items()):
            if stop_requested():
                break
            claim = try_claim(folder, timeout_s=timeout_s)
            if claim is not None:
                worked = True
                _do(work, index, claim)
        open_items = {index: folder for index, folder in open_items.items() if not is_done(folder)}
        if not open_items or stop_requested() or not (worked or wait):
            return len(open_items)
        if not worked:
            time.sleep(poll_s)


def _do(work: Callable[[int, Claim], None], index: int, claim: Claim) -> None:
    with claim:
        try:
            work(index, claim)
        except BaseException:
            claim.release()
            raise


def owners(folders: Sequence[Path]) -> list[str]:
    """ "host:pid (job)" of the claims on items that are not done."""
    found = set()
    for folder in folders:
        newest = _latest(folder)
        if newest >= 0 and not is_done(folder):
            try:
                owner = read_json(folder / f"claim-{newest:03d}", "claim")
                found.add(
                    f"{owner['host']}:{owner['pid']}"
                    + (f" (job {owner['job']})" if owner.get("job") else "")
                )
            except LorabatchError:  # being written just now
                continue
    return sorted(found)
