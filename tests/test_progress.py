"""Progress on terminals of any width: one bar, and no line inside it. In a process of its own, whose
standard error is a terminal that the test made."""

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios

import pytest
from support.processes import ENVIRONMENT

from lorabatch.progress import clock, counted, rounded

WORK = """
import sys
from lorabatch.progress import Progress, note
progress = Progress(4, unit="step", description="train")
print("data of 3 documents", file=sys.stderr)
for step in range(4):
    progress.update(loss="1.5")
    note(f"evaluation {step}")
note("on standard output", sys.stdout)
progress.close()
note("after the end")
"""


def lines_of_terminal(columns):
    """What a terminal of that width shows, a line for each line end and each return."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    command = [sys.executable, "-c", WORK]
    with subprocess.Popen(command, stdout=theirs, stderr=theirs, env=ENVIRONMENT) as process:
        os.close(theirs)
        shown = b""
        while True:
            try:
                shown += os.read(ours, 4096)
            except OSError:  # it ended
                break
    os.close(ours)
    assert process.returncode == 0
    return shown.decode().replace("\r", "\n").split("\n")


@pytest.mark.parametrize("columns", [0, 60, 100])
def test_lines_stand_above_the_bar_and_the_bar_fits_in(columns):
    lines = lines_of_terminal(columns)
    whole = ["data of 3 documents", *(f"evaluation {n}" for n in range(4)), "on standard output"]
    assert [line for line in lines if line in whole] == whole
    assert "after the end" in lines
    bars = [line for line in lines if line.startswith("train:")]
    assert bars and all(len(bar) <= (columns or 80) for bar in bars)
    assert "4/4" in bars[-1] and "loss=1.5" in bars[-1] and "█" in bars[-1]
    others = [line for line in lines if line.strip() and line not in (*bars, *whole)]
    assert others == ["after the end"]


def test_numbers_as_people_read_them():
    assert [counted(n, "adapter") for n in (0, 1, 2)] == ["0 adapters", "1 adapter", "2 adapters"]
    shown = [rounded(rate) for rate in (0.0, 0.004, 0.43, 1.0, 9.96, 12.4, 1865.2)]
    assert shown == ["0", "0.004", "0.43", "1", "10", "12", "1865"]
    assert clock(3725) == "1:02:05" and clock(59.6) == "1:00"
