"""Child processes that compute: what kills them does not kill us, and they do not outlive us.

``run_child`` runs one lorabatch command. ``RangeChild`` keeps one process that has loaded the model
and completes one range of prompts after another (``lorabatch.infer.ranges``); after a death the
next range is begun by a new one.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from lorabatch.errors import InterruptedRun, LorabatchError
from lorabatch.schema import Fields, Record
from lorabatch.signals import StopSignals

AGAIN = 75
USER_MISTAKES = (64, 65, 69)
# nobody's fault: we are asked to stop too, or soon
FROM_OUTSIDE = (-signal.SIGTERM, -signal.SIGINT, -signal.SIGHUP, -signal.SIGUSR1)
POLL_S = 0.1
# who kills a job kills its processes one after another: only a death that we outlive by this is the
# child's own
GRACE_S = 0.5
STARTS = 3  # processes in a row that may die before they have begun


@dataclass(frozen=True)
class Ended:
    """``code``: exit code, negative for a signal. ``last_line`` of its output."""

    code: int
    last_line: str

    @property
    def reason(self) -> str:
        return (
            f"signal {-self.code}" if self.code < 0 else f"exit code {self.code}: {self.last_line}"
        )

    def raise_mistake(self) -> None:
        """The child's report of the user's mistake as our own."""
        if self.code in USER_MISTAKES:
            error = LorabatchError(self.last_line.partition(": ")[2] or self.last_line)
            error.exit_code = self.code
            raise error


def spawn(
    module: str,
    arguments: Sequence[str],
    *,
    stdin: int,
    log: BinaryIO,
    pass_fds: tuple[int, ...] = (),
) -> subprocess.Popen[str]:
    """A Python module as a process that dies with this thread. log: for all of its output."""
    command = [
        sys.executable,
        "-m",
        "lorabatch.cluster.leash",
        str(os.getpid()),
        module,
        *arguments,
    ]
    return subprocess.Popen(
        command, text=True, stdin=stdin, stdout=log, stderr=log, pass_fds=pass_fds
    )


def last_line(log: Path) -> str:
    lines = (
        log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        if log.exists()
        else []
    )
    return lines[-1] if lines else "no output"


def run_child(arguments: Sequence[str | Path], log: Path, signals: StopSignals) -> Ended:
    """Run ``lorabatch ARGUMENTS...`` with its output in ``log``. A signal to us is passed on as
    SIGTERM.

    Raises InterruptedRun when it stopped because of a signal, with its work saved.
    """
    with log.open("ab") as file:
        child = spawn(
            "lorabatch",
            [str(argument) for argument in arguments],
            stdin=subprocess.DEVNULL,
            log=file,
        )
        asked = False
        while child.poll() is None:
            if signals and not asked:
                child.terminate()
                asked = True
            time.sleep(POLL_S)
    _raise_if_stopped(child.returncode, log, signals)
    return Ended(child.returncode, last_line(log))


def _raise_if_stopped(code: int, log: Path, signals: StopSignals) -> None:
    if code < 0 and code not in FROM_OUTSIDE:
        time.sleep(GRACE_S)
    if code and (signals or code == AGAIN or code in FROM_OUTSIDE):
        raise InterruptedRun(
            "stopped with everything saved", where=log.parent, fix="run the same command again"
        )


class RangeChild:
    """One process at a time that completes ranges of prompts. While entered, it is kept from range
    to range."""

    def __init__(self, settings: Fields, signals: StopSignals) -> None:
        """settings: of InferConfig."""
        self._settings, self._signals = settings, signals
        self._process: subprocess.Popen[str] | None = None
        self._answers, self._read = -1, b""
        # what completions depend on beside their requests, as the latest process said
        self.work_key: str | None = None

    def __enter__(self) -> RangeChild:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._forget(wait_s=10)

    def complete(self, folder: Path, *, rows: str, earlier: list[str]) -> Ended:
        """Have a range completed in ``folder``; earlier: files with completions of it.

        An end with a negative code, or one that is not the user's mistake, is that of a process
        that had begun on this range. Raises InterruptedRun after a signal, LorabatchError when no
        process comes so far.
        """
        folder.mkdir(exist_ok=True)
        log = folder / "log.txt"
        for _ in range(STARTS):
            begun, ended = self._one_try(
                log, {"folder": str(folder), "rows": rows, "earlier": earlier}
            )
            if begun or ended.code in USER_MISTAKES:
                return ended
        fix = f"fix the cause ({log}) and run the same command again"
        raise LorabatchError(
            f"every process dies before it has loaded the model ({ended.reason})",
            where=folder,
            fix=fix,
        )

    def _one_try(self, log: Path, job: Fields) -> tuple[bool, Ended]:
        """(whether it had begun on the job, how that ended)."""
        if self._process is None:
            self._start(log)
        self._tell(job)
        begun = False
        while (answer := self._answer()) is not None:
            if "begun" in answer:
                begun, self.work_key = True, answer["begun"]
                continue
            if answer["code"] not in (0, *USER_MISTAKES):  # it may not be what it was
                self._forget()
            _raise_if_stopped(answer["code"], log, self._signals)
            return begun, Ended(answer["code"], answer["line"])
        code = self._forget(wait_s=10)  # its answers end a moment before it does
        _raise_if_stopped(code, log, self._signals)
        return begun, Ended(code or 70, last_line(log))  # an end without an answer is none in order

    def _start(self, log: Path) -> None:
        self._answers, writer = os.pipe()
        self._read = b""
        try:
            with log.open("ab") as file:
                self._process = spawn(
                    "lorabatch.infer.ranges",
                    [str(writer)],
                    stdin=subprocess.PIPE,
                    log=file,
                    pass_fds=(writer,),
                )
        finally:
            os.close(writer)
        self._tell(self._settings)

    def _tell(self, record: Fields) -> None:
        assert self._process is not None and self._process.stdin is not None
        with suppress(BrokenPipeError):  # it died while it was idle: it gives no answer
            self._process.stdin.write(json.dumps(record) + "\n")
            self._process.stdin.flush()

    def _answer(self) -> Record | None:
        """Its next answer; None when it has ended. A signal to us is passed on as SIGTERM
        meanwhile."""
        assert self._process is not None
        asked = False
        while b"\n" not in self._read:
            if select.select([self._answers], [], [], POLL_S)[0]:
                new = os.read(self._answers, 1 << 16)
                self._read += new
                if not new:
                    return None
            elif self._process.poll() is not None:
                # although something that it started still holds the pipe
                return None
            if self._signals and not asked:
                self._process.terminate()
                asked = True
        line, _, self._read = self._read.partition(b"\n")
        return dict(json.loads(line))

    def _forget(self, *, wait_s: float = 0) -> int:
        """End the process if it still runs after ``wait_s``; its exit code."""
        process, self._process = self._process, None
        assert process is not None and process.stdin is not None
        with suppress(OSError):
            process.stdin.close()  # asks it to end
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=wait_s)
        process.kill()
        os.close(self._answers)
        return process.wait()
