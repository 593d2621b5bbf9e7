"""Training on a real Slurm: the tasks of a step are ranks, and the end of the job is known."""

import json

import pytest

pytestmark = pytest.mark.slow


def train(cluster, experiment, folder, *more):
    return [
        cluster.project / ".venv/bin/python",
        "-m",
        "lorabatch",
        "train",
        "--config",
        experiment,
        "--save_dir",
        folder,
        *more,
    ]


def losses(folder):
    events = map(json.loads, (folder / "events.jsonl").read_text().splitlines())
    return [e["loss"] for e in events if e["event"] == "step"]


def test_two_tasks_of_a_step_train_one_adapter(cluster, experiment):
    one, two = cluster.project / "results/ranks1", cluster.project / "results/ranks2"
    cluster.run("srun", "-n1", *train(cluster, experiment, one))
    done = cluster.run(
        "srun", "-N1", "-n2", *train(cluster, experiment, two), GLOO_SOCKET_IFNAME="lo"
    )
    assert "x 2 ranks" in done.stdout and done.stdout.count("trainable") == 1, (
        done.stdout + done.stderr
    )
    assert losses(two) == pytest.approx(losses(one), rel=1e-4) and len(losses(two)) == 6


def test_the_end_of_the_job_is_known(cluster):
    """Also where Slurm does not set SLURM_JOB_END_TIME, as 22.05 does not."""
    code = (
        "import time; from lorabatch.signals import Deadline as D; d = "
        "D.from_flag_and_slurm(None); print(d.at_s - time.time(), d.source)"
    )
    left_s, source = cluster.run(
        "srun", "-n1", "-t3", cluster.project / ".venv/bin/python", "-c", code
    ).stdout.split(maxsplit=1)
    assert source.strip() == "the end of the Slurm job" and 0 < float(left_s) <= 181
