"""The stages for the first minutes on a GPU, with tiny models on the CPU: they run, each within its
limit, and what goes wrong in one is told and does not stop the others."""

import json
import subprocess
import sys

import pytest
from support.paths import ROOT
from support.processes import ENVIRONMENT

FOLDER = ROOT / "benchmarks" / "gpu"


def run(code_or_words, *, code=False):
    head = [sys.executable, "-c"] if code else [sys.executable, str(FOLDER / "check.py")]
    environment = ENVIRONMENT | {"PYTHONPATH": f"{ENVIRONMENT['PYTHONPATH']}:{FOLDER}"}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    words = [code_or_words] if code else code_or_words
    return subprocess.run(
        head + words, env=environment, capture_output=True, text=True, timeout=600
    )


@pytest.mark.slow
def test_every_stage_runs_on_a_cpu_and_its_checks_hold(tmp_path):
    pytest.importorskip("peft")
    done = run(["--out", str(tmp_path), "--stages", "first", "second", "--dtype", "bf16"])
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.startswith("no GPU here")
    lines = [json.loads(line) for line in (tmp_path / "check.jsonl").read_text().splitlines()]
    ends = [line for line in lines if line["what"] == "stage"]
    asked = ("probe", "attention", "correct", "decode", "train", "trace")
    more = ("invariance", "sampled", "adapters", "seven", "long")
    assert {line["stage"] for line in ends} == {*asked, *more}
    assert not [line for line in ends if "ended" in line or "error" in line]
    checks = [line for line in lines if "ok" in line]
    assert all(line["ok"] for line in checks)
    assert sum(line["stage"] == "correct" for line in checks) == 2 * 2 * 3
    assert sum(line["stage"] == "attention" for line in checks) == 3 * 6 + 3 * 6
    assert all(line["clear"] > 3 for line in checks if line["what"] == "greedy tokens")
    rates = [line["tokens_per_s"] for line in lines if "tokens_per_s" in line]
    assert len(rates) > 10 and min(rates) > 0
    assert (tmp_path / "trace.json.gz").stat().st_size > 1000
    assert "FAILED" not in done.stdout and "ERROR" not in done.stdout


FAULTS = """
import sys, time
import check
def endless(setup):
    yield {"what": "first"}
    while True:
        time.sleep(0.01)
def broken(setup):
    yield {"what": "first"}
    raise ValueError("no such operator")
def wrong(setup):
    yield {"what": "answer", "ok": False}
check.STAGES |= {"endless": endless, "broken": broken, "wrong": wrong}
check.LIMITS_S |= {"endless": 0.3, "broken": 9, "wrong": 9}
sys.argv = ["check.py", "--out", sys.argv[1] if len(sys.argv) > 1 else "OUT", "--stages", *STAGES]
sys.exit(check.main())
"""


@pytest.mark.parametrize(
    ("stages", "code", "words"),
    [
        (["endless"], 0, ["ended stopped after 0 s"]),
        (["broken", "wrong"], 1, ["error ValueError: no such operator", "FAILED"]),
    ],
)
def test_a_stage_that_fails_or_hangs_is_told_and_the_next_one_runs(stages, code, words, tmp_path):
    text = FAULTS.replace("*STAGES", repr(stages)[1:-1]).replace('"OUT"', repr(str(tmp_path)))
    done = run(text, code=True)
    assert done.returncode == code, done.stdout + done.stderr
    assert all(word in done.stdout for word in words)
    lines = [json.loads(line) for line in (tmp_path / "check.jsonl").read_text().splitlines()]
    assert [line["stage"] for line in lines if line["what"] == "stage"] == stages
