"""A process that has imported everything once and forks a fresh one per attempt: cheap real
processes to kill.

Reads one JSON object a line: argv, and optionally ``kill_after_s``, or ``kill_at_lines`` (a file and
how many lines it then has), with the signal's ``number``, or ``kill_at_write`` (SIGKILL at the n-th
fsync, rename, unlink or rmtree). Answers with the exit code a line (negative: the signal).
``dies_on``: what the process that it has complete ranges of prompts dies on, see forked.py.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import torch

from lorabatch.cli import main
from lorabatch.cluster import child
from support.forked import spawn_that_dies_on

PATHS = [
    (os, "fsync"),
    (os, "rmdir"),
    (Path, "rename"),
    (Path, "replace"),
    (Path, "unlink"),
    (Path, "mkdir"),
]


def die_at_write(number):
    left = number

    def counted(original):
        def call(*args, **kwargs):
            nonlocal left
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        return call

    for owner, name in PATHS:
        setattr(owner, name, counted(getattr(owner, name)))


def attempt(argv, *, log, kill_at_write=None, dies_on=None, number=signal.SIGKILL, **when):
    pid = os.fork()
    if pid == 0:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        torch.set_num_threads(1)
        if kill_at_write is not None:
            die_at_write(kill_at_write)
        if dies_on is not None:
            child.spawn = spawn_that_dies_on(**dies_on)
        os._exit(main(argv))
    if when:
        wait(pid, **when)
        os.kill(pid, number)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def wait(pid, kill_after_s=0, kill_at_lines=None):
    """Until it is time to kill the process, or it has ended."""
    time.sleep(kill_after_s)
    while kill_at_lines is not None:
        path, count = Path(kill_at_lines[0]), kill_at_lines[1]
        if path.exists() and path.read_bytes().count(b"\n") >= count:
            return
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return
        time.sleep(0.001)


if __name__ == "__main__":
    print("ready", flush=True)
    for line in sys.stdin:
        print(attempt(**json.loads(line)), flush=True)
