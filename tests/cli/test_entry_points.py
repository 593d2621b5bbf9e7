"""The scripts of the specification, typed in a shell without an active environment."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BARE = getattr(sys, "_base_executable", sys.executable)


def run(script, *words, venv, python=BARE):
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return subprocess.run(
        [python, str(ROOT / "src" / script), *words],
        env=environment | {"VENV": str(venv)},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture(scope="module", autouse=True)
def bare_python():
    found = subprocess.run([BARE, "-c", "import torch"], capture_output=True, timeout=120)
    if found.returncode == 0:
        pytest.skip("the Python below the environment has torch itself")


@pytest.mark.parametrize("script", ["train_lora.py", "infer_batch.py"])
def test_they_find_the_projects_environment(script):
    done = run(script, "--threads", "none at all", venv=sys.prefix)
    first, last = done.stderr.splitlines()
    assert first == f"lorabatch: this Python has no torch: using {sys.prefix}/bin/python"
    assert "'none at all' is not a whole number" in last and done.returncode == 64


def test_without_an_environment_they_name_the_command_that_makes_it(tmp_path):
    done = run("train_lora.py", "--lr", "1e-3", venv=tmp_path)
    assert done.returncode == 69 and done.stdout == ""
    assert done.stderr == (
        f"lorabatch: this Python ({BARE}) has no torch; run: bash {ROOT}/scripts/build.sh\n"
    )
