"""``lorabatch init``: what it lays, that it writes nothing over, and that a wheel carries it all."""

import json
import os
import subprocess
import sys

import pytest
from support.paths import ROOT
from support.wheels import wheel_environment

from lorabatch.cli import main
from lorabatch.kernels import build, variant
from lorabatch.starter import environment_of_jobs

JOB_SCRIPTS = ("scripts/job.sh", "scripts/lib.sh", "scripts/job_cpu.slurm", "scripts/job_gpu.slurm")


def files(folder):
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


def test_the_files_are_those_of_the_project_and_a_second_time_nothing_happens(tmp_path, capsys):
    assert main(["init", str(tmp_path)]) == 0
    laid = files(tmp_path)
    expected = {*JOB_SCRIPTS, "configs/sites/generic.env", "configs/examples/sweep.toml"}
    assert laid > expected | {"data_sample/train.txt", "data_sample/pt/prompts.txt"}
    assert all((tmp_path / f).read_bytes() == (ROOT / f).read_bytes() for f in laid)
    assert f"{len(laid)} files" in capsys.readouterr().out
    assert main(["init", str(tmp_path)]) == 0
    assert "0 files" in capsys.readouterr().out


def test_a_changed_file_stays_and_nothing_is_written(tmp_path, capsys):
    changed = tmp_path / "configs/sites/generic.env"
    changed.parent.mkdir(parents=True)
    changed.write_text("SITE_CPU_PARTITION=mine\n")
    assert main(["init", str(tmp_path)]) == 64
    assert "generic.env: exists and differs" in capsys.readouterr().err
    assert files(tmp_path) == {"configs/sites/generic.env"}


def test_jobs_of_such_a_folder_are_told_their_python(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["submit", "train", "--dry_run"]) == 69
    assert "lorabatch init" in capsys.readouterr().err
    assert main(["init"]) == 0
    assert environment_of_jobs() == {"VENV": sys.prefix}
    assert main(["submit", "train", "--device", "cpu", "--dry_run"]) == 0
    assert f"VENV={sys.prefix} sbatch " in capsys.readouterr().out
    monkeypatch.chdir(ROOT)
    assert environment_of_jobs() == {}


@pytest.mark.slow
def test_a_wheel_in_an_empty_folder_trains_and_infers(tmp_path, tiny_llama_dir):
    installed = wheel_environment(tmp_path)
    folder = tmp_path / "empty"
    folder.mkdir()
    without_compiler = {"CXX": "no-such-compiler", "XDG_CACHE_HOME": str(tmp_path / "cache")}

    def lorabatch(*words):
        command = [installed / "bin/python", "-m", "lorabatch", *words]
        variables = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | without_compiler
        done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert str(folder) in lorabatch("init")
    model = ("--base_model", tiny_llama_dir, "--no_cuda")
    data = ("--train_path", "data_sample/train.txt", "--val_path", "none")
    lorabatch("train", *model, *data, "--save_dir", "adapter", "--max_steps", "1")
    prompts = ("--prompts", "data_sample/chat.jsonl", "--max_new_tokens", "4")
    lorabatch("infer", *model, *prompts, "--adapter_dir", "adapter", "--output_dir", "answers")
    assert len((folder / "answers/completions.jsonl").read_text().splitlines()) == 6
    kernels = json.loads((folder / "answers/run.json").read_text())["kernel_variant"]
    assert kernels == variant() or not list(build.PREBUILT.glob("*.so"))  # what build.sh compiled
    assert f"VENV={installed}" in lorabatch("submit", "train", "--device", "cpu", "--dry_run")
