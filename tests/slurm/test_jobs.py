"""The job scripts on a real Slurm: they finish, they fail with the true code, they refuse, they
survive the wall."""

import json

import pytest
from support.wheels import wheel_environment

pytestmark = pytest.mark.slow


def test_cpu_job_leaves_adapter_completions_and_report(cluster, experiment):
    job = cluster.submit("scripts/job_cpu.slurm", "--config", experiment)
    assert cluster.wait(job) == [(job, "COMPLETED", "0:0")], cluster.logs(job)
    run = cluster.project / f"results/lorabatch-cpu-{job}"
    assert (run / "train/adapter_model.safetensors").exists()
    lines = [
        json.loads(line) for line in (run / "infer/completions.jsonl").read_text().splitlines()
    ]
    assert len({line["id"] for line in lines}) == 24 and all(
        line["error"] is None for line in lines
    )
    assert (run / "report/RELATORIO.md").exists() and (run / "report/report.html").exists()
    record = json.loads((run / "train/run.json").read_text())
    assert record["environment"]["slurm"]["job_id"] == job and record["status"] == "completed"
    log = cluster.logs(job)
    assert f"run folder results/lorabatch-cpu-{job}" in log and "matrix product exact" in log
    assert log.index("matrix product exact") < log.index("check begins") < log.index("train begins")
    assert f"JobId={job}" in (run / f"provenance-{job}.txt").read_text()


def test_a_job_of_a_folder_without_a_checkout(cluster, experiment, tmp_path):
    installed, folder = wheel_environment(tmp_path), tmp_path / "folder"
    folder.mkdir()

    def lorabatch(*words):
        python = installed / "bin/python"
        done = cluster.run(python, "-m", "lorabatch", *words, check=False, cwd=folder)
        assert done.returncode == 0, done.stderr
        return done.stdout

    lorabatch("init")
    said = lorabatch("submit", "train", "--config", experiment, "--device", "cpu", "--time", "9",
                     "--cpus_per_task", "1", "--mem", "1G", "--run_dir", "run")  # fmt: skip
    job = json.loads((folder / "run/jobs.json").read_text())["jobs"]["train"]
    log = folder / f"run/logs/train-{job}.out"
    assert cluster.wait(job) == [(job, "COMPLETED", "0:0")], said + log.read_text()
    record = json.loads((folder / "run/train/run.json").read_text())
    assert record["status"] == "completed"


def test_a_site_where_jobs_see_neither_the_home_nor_our_environment(cluster):
    """Submitted from elsewhere, too: what the script exports reaches the tasks, and caches go
    beside the project."""
    home = cluster.project / "pyproject.toml" / "home"  # nobody can make that
    flags = [f"--chdir={cluster.project}", f"--export=HOME={home}"]
    job = cluster.submit(*flags, cluster.project / "scripts/job_cpu.slurm", "doctor", cwd="/")
    assert cluster.wait(job) == [(job, "COMPLETED", "0:0")], cluster.logs(job)
    assert f"no network; cache HF_HOME={cluster.project}/.cache/huggingface/hub" in cluster.logs(
        job
    )


def test_a_failing_step_is_a_failed_job_with_its_code(cluster, experiment):
    job = cluster.submit(
        "scripts/job_cpu.slurm", "train", "--config", experiment, "--train_path", "nothing.txt"
    )
    assert cluster.wait(job) == [(job, "FAILED", "65:0")], cluster.logs(job)
    assert "nothing.txt" in cluster.logs(job) and "all done" not in cluster.logs(job)


def test_a_warning_that_always_comes_too_early_does_not_requeue_for_ever(cluster, experiment):
    """Slurm warns 300 s before the end (the script's --signal), and the job has no more: it would
    never get to its work."""
    words = [
        "train",
        "--config",
        experiment,
        "--save_dir",
        "results/short",
        "--epochs",
        10**6,
        "--max_steps",
        10**6,
    ]
    job = cluster.submit("--time=5", "scripts/job_cpu.slurm", *words)
    rows = cluster.wait(job)
    log = cluster.logs(job)
    assert (
        rows == [(job, "FAILED", "75:0")]
        and "is stopped, not requeued: the warning came" in log
        and "--signal=B:USR1@20" in log
    ), log


def test_what_a_node_lacks_is_one_line_before_the_work(cluster, experiment):
    file = cluster.project / "pyproject.toml"
    for said, variables in (
        ("cannot make RUN=", {"RUN": f"{file}/run"}),
        ("this node has no 'module' command", {"MODULES": "cuda"}),
    ):
        job = cluster.submit("scripts/job_cpu.slurm", "--config", experiment, **variables)
        assert cluster.wait(job) == [(job, "FAILED", "69:0")], cluster.logs(job)
        assert f"job_cpu.slurm: {said}" in cluster.logs(job)


def test_gpu_job_without_a_usable_gpu_refuses_before_it_loads_anything(cluster, experiment):
    """The cluster schedules GPUs that are links to /dev/null, as a node with a broken driver
    would."""
    job = cluster.submit("scripts/job_gpu.slurm", "--config", experiment)
    assert cluster.wait(job) == [(job, "FAILED", "69:0")], cluster.logs(job)
    log = cluster.logs(job)
    assert "FAIL  gpu" in log and "the job has 1 GPUs, torch sees 0" in log and "CPU build" in log
    assert not (cluster.project / f"results/lorabatch-gpu-{job}/train").exists()
