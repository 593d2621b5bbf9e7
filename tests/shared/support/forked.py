"""Cheap real processes: forks of one that has imported everything.

A model's configuration in transformers imports sympy and torch's compiler, seconds of processor
time: here once, not in every process.
"""

import os
import signal
import subprocess
import time
from pathlib import Path

import safetensors.torch
from transformers import AutoTokenizer, GPTNeoXConfig, LlamaConfig, PreTrainedTokenizerFast

from lorabatch.cluster.leash import die_with
from lorabatch.infer import metrics, passes, ranges
from lorabatch.train import run, training

IMPORTED = (
    *(safetensors.torch, AutoTokenizer, GPTNeoXConfig, LlamaConfig, PreTrainedTokenizerFast),
    *(metrics, passes, run, training),
)


class Forked:
    """What ``child`` needs of a Popen, for a process forked from this one."""

    def __init__(self, run, *, stdin, log, **_):
        reader, writer = os.pipe()
        self.returncode, parent = None, os.getpid()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                die_with(parent)
                for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
                    signal.signal(number, signal.SIG_DFL)
                os.close(writer)
                for source, target in ((reader, 0), (log.fileno(), 1), (log.fileno(), 2)):
                    os.dup2(source, target)
                run()
                os._exit(0)
            finally:
                os._exit(1)
        os.close(reader)
        self.stdin = os.fdopen(writer, "w")

    def poll(self):
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout=None):
        end = time.monotonic() + (1e9 if timeout is None else timeout)
        while self.poll() is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired("forked", timeout)
            time.sleep(0.005)
        return self.returncode

    def terminate(self):
        os.kill(self.pid, signal.SIGTERM)

    def kill(self):
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)


def spawn_that_dies_on(prompt, times, tried):
    """In place of ``child.spawn``: the process kills itself when it begins on a range with this
    prompt, so many times; what it does else is real. ``tried``: a file of the ranges begun."""
    complete, tried = ranges._complete, Path(tried)

    def begin(config, job, passes):
        with tried.open("a") as file:
            file.write(job["rows"] + "\n")
        begun = [range(*map(int, rows.split(":"))) for rows in tried.read_text().split()]
        if prompt in begun[-1] and sum(prompt in rows for rows in begun) <= times:
            os.kill(os.getpid(), signal.SIGSEGV)
        return complete(config, job, passes)

    def spawn(module, words, **options):
        assert module == "lorabatch.infer.ranges"

        def run():
            ranges._complete = begin
            ranges.serve(int(words[0]))

        return Forked(run, **options)

    return spawn
