"""Ctrl-C while the program is imported: one line, no traceback. What Python does before our first
line is its own."""

import signal
import subprocess
import sys
import time

import pytest
from support.paths import ROOT
from support.processes import ENVIRONMENT

ENTRIES = {"module": ["-m", "lorabatch", "infer"], "script": [str(ROOT / "src" / "infer_batch.py")]}


def started(entry, *options):
    command = [
        sys.executable,
        *options,
        *ENTRIES[entry],
        "--base_model",
        "/no/such/model",
        "--prompts",
        str(ROOT / "README.md"),
    ]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=ENVIRONMENT, preexec_fn=heard, **pipes)


def heard():
    """A shell that starts the tests in the background lets its children ignore Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("module", ["lorabatch.errors", "argparse", "lorabatch.settings"])
def test_a_signal_in_the_middle_of_an_import_is_one_line(module, entry):
    with started(entry, "-X", "importtime") as process:
        while not process.stderr.readline().rstrip().endswith(f" {module}"):
            assert process.poll() is None, "the module is imported by the command"
        process.send_signal(signal.SIGINT)
        said = [
            line
            for line in process.stderr.read().splitlines()
            if not line.startswith("import time:")
        ]
        assert process.wait() == 130 and said == ["lorabatch: interrupted"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_at_any_time_of_the_start_shows_no_traceback_of_ours(number):
    for step in range(11):
        with started("module") as process:
            time.sleep(step / 20)
            process.send_signal(number)
            said = process.stderr.read()
            code = process.wait()
        assert "lorabatch/__main__" not in said, said
        if number == signal.SIGTERM:
            # 65: it was done: a README is no file of prompts
            assert code in (-signal.SIGTERM, 65), said
        elif "interrupted" in said:
            assert code == 130 and said.count("\n") == 1
