"""Training on a real Slurm: the tasks of a step are ranks, and a job's end saves before it comes."""

import json

import pytest

pytestmark = pytest.mark.slow


def train(cluster, experiment, folder, *more):
    return [cluster.project / ".venv/bin/python", "-m", "lorabatch", "train", "--config", experiment, "--save_dir", folder, *more]


def losses(folder):
    events = map(json.loads, (folder / "events.jsonl").read_text().splitlines())
    return [e["loss"] for e in events if e["event"] == "step"]


def test_two_tasks_of_a_step_train_one_adapter(cluster, experiment):
    one, two = cluster.project / "results/ranks1", cluster.project / "results/ranks2"
    cluster.run("srun", "-n1", *train(cluster, experiment, one))
    done = cluster.run("srun", "-N1", "-n2", *train(cluster, experiment, two), GLOO_SOCKET_IFNAME="lo")
    assert "x 2 ranks" in done.stdout and done.stdout.count("trainable") == 1, done.stdout + done.stderr
    assert losses(two) == pytest.approx(losses(one), rel=1e-4) and len(losses(two)) == 6


def test_the_end_of_the_job_is_a_time_limit(cluster, experiment):
    """One minute is the shortest that Slurm grants; training learns it from Slurm and leaves before it."""
    folder = cluster.project / "results/wall"
    endless = ["--epochs", "1000000", "--max_steps", "1000000", "--eval_every_steps", "1000000"]
    done = cluster.run("srun", "-n1", "-t1", *train(cluster, experiment, folder, *endless), check=False)
    assert done.returncode == 75, done.stdout + done.stderr
    assert "stopped by the end of the Slurm job with everything saved" in done.stderr
    assert json.loads((folder / "run.json").read_text())["status"] == "interrupted"
