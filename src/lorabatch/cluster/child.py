"""A lorabatch command as a child process: what kills it does not kill us."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from lorabatch.errors import InterruptedRun, LorabatchError
from lorabatch.signals import StopSignals

AGAIN = 75
USER_MISTAKES = (64, 65, 69)
POLL_S = 0.1


@dataclass(frozen=True)
class Ended:
    """``code``: exit code, negative for a signal. ``last_line`` of its output."""

    code: int
    last_line: str

    @property
    def reason(self) -> str:
        return f"signal {-self.code}" if self.code < 0 else f"exit code {self.code}: {self.last_line}"

    def raise_mistake(self) -> None:
        """The child's report of the user's mistake as our own."""
        if self.code in USER_MISTAKES:
            error = LorabatchError(self.last_line.partition(": ")[2] or self.last_line)
            error.exit_code = self.code
            raise error


def run_child(words: Sequence[str | Path], log: Path, signals: StopSignals, *, cores: Sequence[int] | None = None, place: int = 0) -> Ended:
    """Run ``lorabatch WORDS...`` with its output in ``log``. A signal to us is passed on as SIGTERM.

    ``cores``: the only ones it may use, as the ``place``-th of several children; that one also chooses its GPU by its place.

    Raises InterruptedRun when it stopped because of a signal, with its work saved.
    """
    environment = os.environ | ({} if cores is None else {"LOCAL_RANK": str(place)})
    with log.open("ab") as file:
        command = [sys.executable, "-m", "lorabatch", *map(str, words)]
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=environment)
        if cores is not None:
            with suppress(ProcessLookupError):
                os.sched_setaffinity(child.pid, cores)  # before it has a second thread
        asked = False
        while child.poll() is None:
            if signals and not asked:
                child.terminate()
                asked = True
            time.sleep(POLL_S)
    code = child.returncode
    if code and (signals or code == AGAIN):
        raise InterruptedRun("stopped with everything saved", where=log.parent, fix="run the same command again")
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return Ended(code, lines[-1] if lines else "no output")
