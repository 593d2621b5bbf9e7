"""Pipelines and sweeps on a throttled array: killed tasks, poison prompts, cancelled and resumed,
exactly once."""

import json
import os
import signal
from collections import Counter

import pytest

pytestmark = pytest.mark.slow
POISON = "POISON the process that reads this dies"
# Read by the interpreter of every child: a prompt that takes its process down, as a faulty kernel
# or driver would.
SITECUSTOMIZE = f"""
import os, signal, sys
if "lorabatch.infer.ranges" in sys.orig_argv:
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


def test_a_pipeline_outlives_a_killed_array_task_and_a_poison_prompt(
    cluster, experiment, environment_with, tmp_path
):
    prompts = [f"The patient in bed {i} has a fever and" for i in range(24)]
    prompts[13] = POISON
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(prompts) + "\n")
    text = experiment.read_text()
    mine = cluster.project / "pipeline.toml"
    mine.write_text(
        text.replace(
            f'prompts = "{cluster.project}/texts.txt"', f'prompts = "{path}"\ntemperature = 0.8'
        )
    )
    venv = environment_with(SITECUSTOMIZE, tmp_path / "venv")

    run = cluster.project / "results/pipeline"
    flags = [
        "--config",
        mine,
        "--device",
        "cpu",
        "--array",
        4,
        "--parallel",
        2,
        "--shards",
        8,
        "--cpus_per_task",
        2,
        "--time",
        20,
    ]
    done = cluster.lorabatch("submit", "pipeline", *flags, "--run_dir", run, VENV=venv)
    assert done.returncode == 0, done.stderr
    jobs = json.loads((run / "jobs.json").read_text())["jobs"]
    assert list(jobs) == ["train", "infer", "merge", "report"] and all(
        f"job {job}" in done.stdout for job in jobs.values()
    )

    def claims():
        return [
            json.loads(p.read_text() or "{}") for p in (run / "infer/shards").glob("*/claim-000")
        ]

    cluster.until(lambda: any(c.get("pid") for c in claims()), "a claim")
    during = cluster.lorabatch("status", run)
    assert (
        during.returncode == 0
        and f"train   job {jobs['train']}: COMPLETED; train completed; step 6 of 6" in during.stdout
        and "RUNNING" in during.stdout
    )
    os.kill(next(c for c in claims() if c.get("pid"))["pid"], signal.SIGKILL)
    states = Counter(state for _, state, _ in cluster.wait(jobs["infer"]))
    assert states == {"FAILED": 1, "COMPLETED": 3}, (states, cluster.logs())
    for name in ("merge", "report"):
        assert cluster.wait(jobs[name]) == [(jobs[name], "COMPLETED", "0:0")], cluster.logs()

    command = [
        "infer",
        "--config",
        mine,
        "--adapter_dir",
        run / "train",
        "--output_dir",
        tmp_path / "whole",
        "--output_order",
        "input",
    ]
    reference = cluster.lorabatch(*command)
    assert reference.returncode == 0, reference.stderr
    merged, whole = (
        records(run / "infer/completions.jsonl"),
        records(tmp_path / "whole/completions.jsonl"),
    )
    assert [r["id"] for r in merged] == [str(i) for i in range(24)]
    assert "quarantined" in merged[13]["error"] and "signal 9" in merged[13]["error"]
    assert [(r["text"], r["seed"], r["key"]) for r in merged if r["id"] != "13"] == [
        (r["text"], r["seed"], r["key"]) for r in whole if r["id"] != "13"
    ]
    metrics = json.loads((run / "infer/metrics.json").read_text())
    assert (metrics["completed"], metrics["failed"], metrics["quarantined"]) == (23, 1, ["13"])
    assert json.loads((run / "infer/run.json").read_text())["status"] == "completed"
    assert (run / "report/report.html").exists() and "tiny-llama" in (
        run / "report/RELATORIO.md"
    ).read_text()
    status = cluster.lorabatch("status", run)
    assert status.returncode == 70 and f"infer   job {jobs['infer']}: " in status.stdout
    assert (
        "3 COMPLETED" in status.stdout
        and "1 FAILED" in status.stdout
        and "8 of 8 begun shards done" in status.stdout
    )


def test_sweep_of_four_is_cancelled_in_the_middle_goes_on_and_ranks_what_it_trained(
    cluster, experiment, tiny_llama_dir
):
    """Two array tasks, of two trials each over one base. One at a time, so that the cancellation
    finds one done and one not."""
    run, data = cluster.project / "results/sweep", cluster.project / "texts.txt"
    file = cluster.project / "sweep.toml"
    file.write_text(
        f'[train]\nbase_model = "{tiny_llama_dir}"\ntrain_path = "{data}"\nval_path = '
        f'"{data}"\ndata_checks = "off"\ndtype = "fp32"\nthreads = 1\n'
        "batch_size = 4\nmax_steps = 4\nlora_r = 2\n[search]\nlr = [1e-6, 0.02]\nseed = [1, 2]\n"
    )
    flags = [
        "--sweep_file",
        file,
        "--device",
        "cpu",
        "--array",
        2,
        "--parallel",
        1,
        "--cpus_per_task",
        2,
        "--time",
        20,
        "--run_dir",
        run,
    ]
    assert cluster.lorabatch("submit", "sweep", *flags).returncode == 0
    first = json.loads((run / "jobs.json").read_text())["jobs"]
    cluster.until(lambda: list(run.glob("tasks/*/DONE.json")), "a finished task")
    cluster.run("scancel", *first.values())
    states = [state for _, state, _ in cluster.wait(first["sweep"])]
    assert states == ["CANCELLED by 0"] * 2 and "and Slurm ends this job" in cluster.logs(), (
        states,
        cluster.logs(),
    )
    before = {p: p.stat().st_mtime for p in run.glob("tasks/*/DONE.json")}
    assert len(before) == 1 and not (run / "LEADERBOARD.md").exists()
    assert json.loads((run / "sweep.json").read_text())["tasks"] == [[0, 2], [1, 3]]

    assert cluster.lorabatch("submit", "sweep", *flags).returncode == 0
    again = json.loads((run / "jobs.json").read_text())["jobs"]
    assert cluster.wait(again["merge"]) == [(again["merge"], "COMPLETED", "0:0")]
    assert all(p.stat().st_mtime == t for p, t in before.items()), (
        "a finished task was trained again"
    )
    status = cluster.lorabatch("status", run)
    assert status.returncode == 0 and "2 COMPLETED; 2 of 2 begun tasks done" in status.stdout, (
        status.stdout
    )
    board = json.loads((run / "leaderboard.json").read_text())
    assert [row["point"]["lr"] for row in board["rows"]] == [0.02, 1e-6]
    for row in board["rows"]:
        losses = [
            json.loads((run / folder / "metrics.json").read_text())["eval_loss"]
            for folder in row["folders"]
        ]
        assert row["runs"] == 2 and row["mean"] == pytest.approx(sum(losses) / 2)
        assert row["half_width"] == pytest.approx(12.7062 * abs(losses[0] - losses[1]) / 2)
