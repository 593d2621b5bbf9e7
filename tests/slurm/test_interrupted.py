"""Training on a real Slurm that is stopped by the time limit, spread over two nodes, or loses a
rank."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.slow
# Half a second a step, however busy the machine is; job.sh clears PYTHONPATH, so the environment's
# Python is a script.
SLOW_STEPS = """
import sys, time
if "train" in sys.orig_argv:
    import lorabatch.records as records
    true_write = records.JsonlWriter.write
    def write(self, record):
        if record.get("event") == "step":
            time.sleep(0.5)
        true_write(self, record)
    records.JsonlWriter.write = write
"""
STEPS = 120  # a minute of them: the one-minute limit comes first


def adapter(folder):
    return load_file(Path(folder) / "last/adapter_model.safetensors")


def train_words(cluster, experiment, folder, *more):
    """The data is small: only --max_steps ends these runs."""
    return [
        "train",
        "--config",
        experiment,
        "--save_dir",
        cluster.project / folder,
        "--resume",
        "auto",
        "--epochs",
        1000,
        *more,
    ]


@pytest.fixture(scope="module")
def slow_environment(cluster, environment_with, tmp_path_factory):
    return environment_with(SLOW_STEPS, tmp_path_factory.mktemp("slow") / "venv")


@pytest.fixture(scope="module", autouse=True)
def timed_job(cluster, experiment, slow_environment):
    """Runs into its limit while the other tests of this file run."""
    words = train_words(cluster, experiment, "results/timed", "--max_steps", STEPS)
    return cluster.submit(
        "--time=1", "--signal=B:USR1@20", "scripts/job_cpu.slurm", *words, VENV=slow_environment
    )


def test_two_ranks_on_two_nodes_train_what_one_process_trains(cluster, experiment, named_nodes):
    words = train_words(cluster, experiment, "results/two", "--max_steps", 6)
    job = cluster.submit("--nodes=2", "--cpus-per-task=1", "scripts/job_cpu.slurm", *words)
    assert cluster.wait(job) == [(job, "COMPLETED", "0:0")], cluster.logs(job)
    alone = cluster.lorabatch(*train_words(cluster, experiment, "results/one", "--max_steps", 6))
    assert alone.returncode == 0, alone.stderr
    one, two = (adapter(cluster.project / f"results/{name}") for name in ("one", "two"))
    assert one.keys() == two.keys() and any(
        float(t.abs().max()) > 0 for name, t in one.items() if "lora_B" in name
    )
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=1e-6)
    assert "(2 tasks)" in cluster.logs(job)


def rank_process(job, rank):
    """PID of a rank's Python, by what Slurm put into its environment."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            variables = set((path / "environ").read_bytes().split(b"\0"))
            words = (path / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if (
            {f"SLURM_JOB_ID={job}".encode(), f"SLURM_PROCID={rank}".encode()} <= variables
            and b"train" in words
            and b"lorabatch" in words
        ):
            return int(path.name)
    return None


def test_a_killed_rank_ends_the_job_within_a_minute(
    cluster, experiment, slow_environment, named_nodes
):
    words = train_words(cluster, experiment, "results/killed", "--max_steps", 1000)
    job = cluster.submit(
        "--nodes=2", "--cpus-per-task=1", "scripts/job_cpu.slurm", *words, VENV=slow_environment
    )
    events = cluster.project / "results/killed/events.jsonl"
    cluster.until(
        lambda: events.exists() and events.read_text().count('"step"') > 2, "the first steps"
    )
    victim = rank_process(job, 1)
    assert victim is not None, cluster.logs(job)
    os.kill(victim, signal.SIGKILL)
    begin = time.monotonic()
    # the machine may be frozen meanwhile; Slurm's own clock is checked below
    rows = cluster.wait(job, timeout_s=150)
    assert rows[0][1] == "FAILED" and rows[0][2] != "0:0", (rows, cluster.logs(job))
    assert time.monotonic() - begin < 60, cluster.logs(job)


def test_the_time_limit_saves_requeues_and_ends_with_the_same_adapter(
    cluster, experiment, timed_job
):
    events = cluster.project / "results/timed/events.jsonl"

    def steps():
        return events.read_text().count('"event": "step"') if events.exists() else 0

    cluster.until(
        lambda: steps() and "is requeued" in cluster.logs(timed_job).rpartition("train begins")[2],
        "the requeue",
    )
    assert "got SIGUSR1" in cluster.logs(timed_job) and steps() < STEPS, cluster.logs(timed_job)
    cluster.run("scontrol", "update", f"JobId={timed_job}", "TimeLimit=20")  # once is enough
    assert cluster.wait(timed_job) == [(timed_job, "COMPLETED", "0:0")], cluster.logs(timed_job)
    states = [row[1] for row in cluster.sacct(timed_job, "--duplicates")]
    assert states[-1] == "COMPLETED" and set(states[:-1]) == {"REQUEUED"}
    record = json.loads((cluster.project / "results/timed/run.json").read_text())
    assert record["environment"]["slurm"]["restart_count"] == str(len(states) - 1)

    whole = cluster.lorabatch(
        *train_words(cluster, experiment, "results/whole", "--max_steps", STEPS)
    )
    assert whole.returncode == 0, whole.stderr
    one, two = (
        adapter(cluster.project / "results/whole"),
        adapter(cluster.project / "results/timed"),
    )
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one), (
        "bitwise"
    )
