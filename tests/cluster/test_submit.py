"""Submission without a Slurm: the commands against golden files, and the rules of sites."""

import shutil

import pytest
from support.paths import GOLDEN, ROOT

from lorabatch import slurm
from lorabatch.cli import main
from lorabatch.cluster import sites
from lorabatch.cluster.sites import load_site
from lorabatch.config import SubmitConfig

EXPERIMENT = (
    'base_model = "smollm2-135m"\n[train]\nmax_steps = 20\n[infer]\nprompts = '
    '"data_sample/prompts.txt"\n'
)


@pytest.fixture
def project(tmp_path, monkeypatch):
    """The parts of a checkout that submission reads; no Slurm on the PATH."""
    for folder in ("scripts", "configs"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    (tmp_path / "experiment.toml").write_text(EXPERIMENT)
    (tmp_path / "sweep file.toml").write_text("[search]\nlr = [1e-4, 2e-4]\nseed = [1, 2, 3, 4]\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/nonexistent")
    return tmp_path


PIPELINE = [
    "pipeline",
    "--site",
    "sdumont2nd-h100",
    "--config",
    "experiment.toml",
    "--array",
    "8",
    "--parallel",
    "4",
    "--time",
    "2:00:00",
]
CASES = {
    "submit_pipeline": [
        *PIPELINE,
        "--account",
        "proj",
        "--gpus",
        "2",
        "--nodes",
        "2",
        "--tasks_per_node",
        "2",
    ],
    "submit_infer_cpu": [
        "infer",
        "--device",
        "cpu",
        "--site",
        "sdumont-v100",
        "--shards",
        "3",
        "--time",
        "40",
        "--mem",
        "16G",
    ],
    "submit_train": ["train", "--config", "experiment.toml", "--time", "1-00", "--exclusive"],
    "submit_sweep": ["sweep", "--sweep_file", "sweep file.toml", "--array", "4", "--device", "cpu"],
}


@pytest.mark.parametrize("name", CASES)
def test_dry_run_prints_the_golden_commands_and_changes_nothing(project, capsys, name):
    before = sorted(project.rglob("*"))
    assert main(["submit", *CASES[name], "--run_dir", "results/run 1", "--dry_run"]) == 0
    assert capsys.readouterr().out == (GOLDEN / f"{name}.txt").read_text()
    assert sorted(project.rglob("*")) == before


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["train", "--time", "30:00:00"], "24:00:00"),
        (["train", "--time", "tomorrow"], "D-HH:MM:SS"),
        (["train", "--time", "0:30"], "minute"),
        (["train", "--partition", "lncc-h100_shred"], "lncc-h100_shared"),
        (["train", "--exclusive"], "shared"),
        (["train", "--gpus", "4"], "2 GPUs"),
        (["infer", "--array", "40"], "30 jobs"),
        (["train", "--device", "cpu", "--partition", "lncc-h100_shared"], "pend for ever"),
        (["trane"], "pipeline"),
        (["train", "--site", "sdumont"], "sdumont-v100"),
        (["sweep"], "--sweep_file"),
    ],
)
def test_rules_are_told_in_one_line_before_anything_is_submitted(project, capsys, flags, word):
    defaults = [] if "--site" in flags else ["--site", "sdumont2nd-h100"]
    assert main(["submit", *flags, *defaults, "--dry_run"]) == 64
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and word in said


def test_a_typo_in_the_experiment_is_found_before_the_night_in_the_queue(project, capsys):
    (project / "experiment.toml").write_text("[train]\nmax_stepz = 20\n")
    assert main(["submit", "train", "--config", "experiment.toml", "--dry_run"]) == 64
    assert "max_steps" in capsys.readouterr().err


def test_without_slurm_the_answer_is_69_and_how_to_look(project, capsys):
    assert main(["submit", "train", "--device", "cpu"]) == 69
    assert "--dry_run" in capsys.readouterr().err


def test_the_running_slurm_knows_better_than_the_file(project, monkeypatch):
    site = load_site("sdumont2nd-h100")
    assert site.limits_s()["lncc-h100_shared"] == 86400
    monkeypatch.setattr(slurm, "ask", lambda *words: "lncc-h100_shared 2-00:00:00\nmain infinite\n")
    assert site.limits_s() == {"lncc-h100_shared": 172800, "main": float("inf")}
    sites.check_rules(SubmitConfig("train", time="1-12"), site, "lncc-h100_shared", num_jobs=1)


def test_every_site_file_is_read_and_an_unknown_key_names_its_line(project):
    for path in (ROOT / "configs" / "sites").glob("*.env"):
        load_site(path.stem)
    (project / "mine.env").write_text("# mine\nSITE_PARTITION=gpu\n")
    with pytest.raises(Exception, match=r"mine.env:2.*SITE_PARTITION"):
        load_site("./mine.env")


def test_status_counts_states_and_fails_when_a_job_did(tmp_path, monkeypatch, capsys):
    (tmp_path / "jobs.json").write_text('{"jobs": {"train": "7", "infer": "8"}}')
    (tmp_path / "infer/shards/0000").mkdir(parents=True)
    (tmp_path / "infer/shards/0000/DONE.json").write_text("{}")
    (tmp_path / "infer/shards/0001").mkdir()
    answers = {
        ("sacct", "--jobs=7"): "7 COMPLETED\n",
        # behind the queue
        ("sacct", "--jobs=8"): "8_0 COMPLETED\n8_1 PENDING\n8_[2-3%2] PENDING\n",
        ("squeue", "--jobs=8"): "8_1 RUNNING\n8_2 RUNNING\n8_3 PENDING\n",
    }
    monkeypatch.setattr(
        slurm,
        "ask",
        lambda *words: answers.get((words[0], next(w for w in words if w.startswith("--jobs")))),
    )
    assert main(["status", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "train   job 7: COMPLETED",
        "infer   job 8: 1 COMPLETED, 2 RUNNING, 1 PENDING; 1 of 2 begun shards done",
    ]
    # nodes that boot are no failure
    answers["squeue", "--jobs=8"] = "8_1 RUNNING\n8_2 CONFIGURING\n8_3 SUSPENDED\n"
    assert main(["status", str(tmp_path)]) == 0
    answers["sacct", "--jobs=8"], answers["squeue", "--jobs=8"] = (
        "8_0 COMPLETED\n8_1 CANCELLED by 0\n8_[2-3%2] CANCELLED by 0\n",
        None,
    )
    assert main(["status", str(tmp_path)]) == 70
    assert "1 COMPLETED, 2 CANCELLED" in capsys.readouterr().out
