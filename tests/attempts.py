"""A process that has imported everything once and forks a fresh one per attempt: cheap real processes to kill.

Reads one JSON object a line: argv, and optionally ``kill_after_s`` with ``signal``, or ``kill_at_write`` (SIGKILL at the
n-th fsync, rename, unlink or rmtree). Answers with the exit code a line (negative: the signal).
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import safetensors.torch  # noqa: F401
import torch
import transformers  # noqa: F401

from lorabatch.cli import main

PATHS = [(os, "fsync"), (os, "rmdir"), (Path, "rename"), (Path, "replace"), (Path, "unlink"), (Path, "mkdir")]


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


def attempt(argv, *, log, kill_after_s=None, kill_at_write=None, number=signal.SIGKILL):
    pid = os.fork()
    if pid == 0:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        torch.set_num_threads(1)
        if kill_at_write is not None:
            die_at_write(kill_at_write)
        os._exit(main(argv))
    if kill_after_s is not None:
        time.sleep(kill_after_s)
        os.kill(pid, number)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


if __name__ == "__main__":
    print("ready", flush=True)
    for line in sys.stdin:
        print(attempt(**json.loads(line)), flush=True)
