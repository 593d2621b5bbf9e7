"""Sharded inference and sweeps on a throttled array: killed tasks, poison prompts, cancelled and resumed, exactly once."""

import json
import os
import signal

import pytest

pytestmark = pytest.mark.slow
POISON = "POISON the process that reads this dies"
# Read by the interpreter of every child: a prompt that takes its process down, as a faulty kernel or driver would.
SITECUSTOMIZE = f"""
import os, signal, sys
if "--rows" in sys.orig_argv:
    import lorabatch.infer.feed as feed
    true_prepare = feed.prepare
    def prepare(requests, *args, **kwargs):
        if any({POISON!r} in request.prompt for request in requests):
            os.kill(os.getpid(), signal.SIGKILL)
        return true_prepare(requests, *args, **kwargs)
    feed.prepare = prepare
"""


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_eight_shards_with_a_killed_task_and_a_poison_prompt_give_every_completion_once(cluster, experiment, environment_with, tmp_path):
    prompts = [f"The patient in bed {i} has a fever and" for i in range(24)]
    prompts[13] = POISON
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(prompts) + "\n")
    text = experiment.read_text().replace(str(cluster.project / "texts.txt"), str(path))
    mine = cluster.project / "sharded.toml"
    mine.write_text(text + "temperature = 0.8\n")
    reference = cluster.lorabatch("infer", "--config", mine, "--output_dir", tmp_path / "whole", "--output_order", "input")
    assert reference.returncode == 0, reference.stderr
    venv = environment_with(SITECUSTOMIZE, tmp_path / "venv")

    run = cluster.project / "results/sharded"
    flags = ["--config", mine, "--device", "cpu", "--array", 4, "--parallel", 2, "--shards", 8, "--cpus_per_task", 2, "--time", 20]
    done = cluster.lorabatch("submit", "infer", *flags, "--run_dir", run, VENV=venv)
    assert done.returncode == 0, done.stderr
    jobs = json.loads((run / "jobs.json").read_text())["jobs"]
    claims = lambda: [json.loads(p.read_text() or "{}") for p in (run / "infer/shards").glob("*/claim-000")]  # noqa: E731
    cluster.until(lambda: any(c.get("pid") for c in claims()), "a claim")
    victim = next(c for c in claims() if c.get("pid"))
    os.kill(victim["pid"], signal.SIGKILL)
    states = [state for _, state, _ in cluster.wait(jobs["infer"])]
    assert "FAILED" in states and "COMPLETED" in states, (states, cluster.logs())
    assert cluster.wait(jobs["merge"]) == [(jobs["merge"], "COMPLETED", "0:0")]

    merged, whole = records(run / "infer/completions.jsonl"), records(tmp_path / "whole/completions.jsonl")
    assert [r["id"] for r in merged] == [str(i) for i in range(24)]
    assert "quarantined" in merged[13]["error"] and "signal 9" in merged[13]["error"]
    assert [(r["text"], r["seed"], r["key"]) for r in merged if r["id"] != "13"] == [
        (r["text"], r["seed"], r["key"]) for r in whole if r["id"] != "13"
    ]
    metrics = json.loads((run / "infer/metrics.json").read_text())
    assert (metrics["completed"], metrics["failed"], metrics["quarantined"]) == (23, 1, ["13"])
    assert json.loads((run / "infer/run.json").read_text())["status"] == "completed"
    status = cluster.lorabatch("status", run)
    assert status.returncode == 70 and "8 of 8 begun shards done" in status.stdout and "FAILED" in status.stdout
