"""Expansion of a search, trials that share a process, kills, and a leaderboard computed by hand."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.commands import TEXTS, train_flags, write_lines

from lorabatch.cli import main
from lorabatch.cluster import child
from lorabatch.cluster.sweep import as_markdown, expand, grouped, leaderboard, read_sweep
from lorabatch.config import TrainConfig
from lorabatch.errors import LorabatchError
from lorabatch.records import write_json


def sweep_file(tmp_path, text):
    path = tmp_path / "sweep.toml"
    path.write_text(text)
    return path


def trials(tmp_path, text):
    return list(expand(read_sweep(sweep_file(tmp_path, text))))


def test_grid_is_the_product_in_the_order_of_the_file(tmp_path):
    found = trials(tmp_path, "[search]\nlr = [0.1, 0.2]\nlora-r = [4, 8]\n")
    assert found == [
        {"lr": 0.1, "lora_r": 4},
        {"lr": 0.1, "lora_r": 8},
        {"lr": 0.2, "lora_r": 4},
        {"lr": 0.2, "lora_r": 8},
    ]


def test_random_draws_within_bounds_the_same_each_time_and_repeats_over_seeds(tmp_path):
    text = (
        'method = "random"\nsamples = 50\n[search]\nlr = {min = 1e-5, max = 1e-2, log = '
        "true}\nlora_r = {min = 2, max = 9}\nseed = [1, 2]\n"
    )
    found = trials(tmp_path, text)
    assert (
        found
        == trials(tmp_path, text)
        != trials(tmp_path, text.replace("samples", "seed = 7\nsamples"))
    )
    assert len(found) == 100 and all(
        a | {"seed": 2} == b for a, b in zip(found[::2], found[1::2], strict=True)
    )
    assert all(
        1e-5 <= t["lr"] <= 1e-2 and 2 <= t["lora_r"] <= 9 and isinstance(t["lora_r"], int)
        for t in found
    )
    assert 10 < sum(t["lr"] < math.sqrt(1e-5 * 1e-2) for t in found[::2]) < 40, (
        "half of the draws lie below the geometric middle"
    )


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("[search]\nlr = 0.1\n", "lr"),
        ("methd = 'grid'\n[search]\nlr = [1]\n", "method"),
        ("method = 'best'\n[search]\nlr = [1]\n", "random"),
        ("[train]\nlr = 1.0\n", "search"),
        ("[search]\nlrr = [0.1]\n", "unknown key 'lrr' in [search]; did you mean 'lr'?"),
        ("[train]\nlorar = 3\n[search]\nlr = [0.1]\n", "unknown key 'lorar' in [train]"),
        ("[search]\nlr = [-0.1]\n", "--lr"),
        ("[search]\nlr = ['high']\n", "lr"),
        ("method = 'random'\n[search]\nlr = {min = 1}\n", "{min = A, max = B}"),
        ("[search\n", "TOML"),
        ("method = 'random'\nsamples = 'x'\n[search]\nlr = [1e-4]\n", "a whole number"),
        ("method = 'random'\nsamples = 0\n[search]\nlr = [1e-4]\n", "samples"),
        ("method = 'random'\n[search]\nlr = []\n", "lr"),
        ("method = 'random'\n[search]\nlr = [1e-4]\nseed = 3\n", "[search] seed"),
        ("[search]\nlr = []\n", "nothing to try"),
        ("train = 3\n[search]\nlr = [1e-4]\n", "a table"),
        ("search = [1, 2]\n", "a table"),
    ],
)
def test_a_wrong_file_is_one_line_before_anything_runs(tmp_path, capsys, text, word):
    code = main(["sweep", str(sweep_file(tmp_path, text)), "--output_dir", str(tmp_path / "out")])
    said = capsys.readouterr().err
    assert code in (64, 65) and said.count("\n") == 1 and word in said
    assert not (tmp_path / "out").exists()


def test_a_folder_of_another_sweep_is_refused_and_the_tasks_it_began_with_stand(tmp_path):
    from lorabatch.cluster.sweep import _kept_tasks

    plan = {"schema_version": 2, "sweep": {}, "trials": [{"lr": 1e-4}, {"lr": 2e-4}]}
    assert _kept_tasks(tmp_path, plan, [[0, 1]]) == [[0, 1]]
    assert _kept_tasks(tmp_path, plan, [[0], [1]]) == [[0, 1]]
    with pytest.raises(LorabatchError, match="contains another sweep"):
        _kept_tasks(tmp_path, plan | {"trials": [{"lr": 2e-4}]}, [[0]])
    write_json(tmp_path / "sweep.json", plan | {"tasks": [[0], [0]]})
    with pytest.raises(LorabatchError, match="do not hold every trial once"):
        _kept_tasks(tmp_path, plan, [[0, 1]])


# Tasks


@given(st.lists(st.sampled_from(["fp32", "bf16"]), min_size=1, max_size=20), st.integers(1, 6))
def test_tasks_hold_every_trial_once_alike_in_what_they_share_and_of_even_size(dtypes, most):
    settings = [
        TrainConfig(dtype=dtype, lr=1e-4 * (i + 1), train_path=(f"{i}.txt",))
        for i, dtype in enumerate(dtypes)
    ]
    tasks = grouped(settings, most)
    assert sorted(i for task in tasks for i in task) == list(range(len(dtypes)))
    assert all(len({dtypes[i] for i in task}) == 1 for task in tasks)
    for dtype in set(dtypes):
        sizes = [len(task) for task in tasks if dtypes[task[0]] == dtype]
        assert (
            max(sizes) <= most
            and max(sizes) - min(sizes) <= 1
            and len(sizes) == math.ceil(dtypes.count(dtype) / most)
        )


def sweep_of(tmp_path, model, search, **settings):
    data = str(write_lines(tmp_path / "train.txt", TEXTS))
    values = {
        "base_model": str(model),
        "train_path": data,
        "val_path": data,
        "data_checks": "off",
        "dtype": "fp32",
        "threads": 1,
        "batch_size": 3,
        "lora_r": 4,
    }
    text = "\n".join(f"{k} = {json.dumps(v)}" for k, v in (values | settings).items())
    return sweep_file(tmp_path, f"[train]\n{text}\n[search]\n{search}\n")


def sweep(file, folder, *more):
    """The command in a process group of its own, its output in a file beside the folder."""
    words = [sys.executable, "-m", "lorabatch", "sweep", file, "--output_dir", folder, *more]
    with open(f"{folder}.log", "ab") as log:
        return subprocess.Popen(
            list(map(str, words)),
            stdout=log,
            stderr=log,
            start_new_session=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )


def result_of(folder, trial):
    """(what the task recorded, the folder of its run)."""
    for path in folder.glob("tasks/*/DONE.json"):
        trials = json.loads(path.read_text())["trials"]
        if str(trial) in trials:
            return trials[str(trial)], folder / trials[str(trial)]["run"]
    raise AssertionError(f"no task recorded trial {trial}")


@pytest.mark.slow
def test_trials_of_a_task_are_their_runs_alone_and_one_that_breaks_is_failed_on_the_leaderboard(
    tiny_llama_dir, tmp_path, capsys
):
    file = sweep_of(
        tmp_path, tiny_llama_dir, "lr = [0.01, 1e30, 1e-6]\nlora_r = [4, 2]", max_steps=4
    )
    folder = tmp_path / "sweep"
    assert main(["sweep", str(file), "--output_dir", str(folder), "--runs_per_task", "4"]) == 0
    assert json.loads((folder / "sweep.json").read_text())["tasks"] == [[0, 2, 4], [1, 3, 5]]
    fixed = ["--batch_size", 3, "--max_steps", 4, "--lr", 0.01, "--lora_r", 2]
    alone = train_flags(tiny_llama_dir, tmp_path / "train.txt", tmp_path / "alone", *fixed)
    assert main(alone) == 0
    result, _ = result_of(folder, 1)
    assert result["value"] == pytest.approx(
        json.loads((tmp_path / "alone/metrics.json").read_text())["eval_loss"], rel=1e-6
    )
    assert (
        result_of(folder, 2)[0]["value"] is None
        and "is not finite" in result_of(folder, 2)[0]["error"]
    )
    board = json.loads((folder / "leaderboard.json").read_text())
    assert [row["point"]["lr"] for row in board["rows"]] == [0.01, 0.01, 1e-6, 1e-6, 1e30, 1e30]
    text = (folder / "LEADERBOARD.md").read_text()
    assert (
        text.count("failed") == 2
        and board["rows"][0]["folders"][0] in text
        and (folder / board["rows"][0]["folders"][0]).is_dir()
    )

    done = {p: p.stat().st_mtime for p in folder.glob("tasks/*/DONE.json")}
    assert main(["sweep", str(file), "--output_dir", str(folder), "--runs_per_task", "1"]) == 0
    assert len(done) == 2 and all(p.stat().st_mtime == t for p, t in done.items()), (
        "nothing is trained again"
    )


@pytest.mark.slow
@pytest.mark.parametrize(("kills", "fails"), [(1, False), (2, True)])
def test_a_trial_whose_process_was_killed_is_tried_once_more(
    kills, fails, tiny_llama_dir, tmp_path, monkeypatch
):
    real, left = child.spawn, [kills]

    def spawn(*args, **options):
        process = real(*args, **options)
        if left[0]:
            left[0] -= 1
            process.kill()
        return process

    monkeypatch.setattr(child, "spawn", spawn)
    file = sweep_of(tmp_path, tiny_llama_dir, "lr = [0.01]", max_steps=2)
    assert main(["sweep", str(file), "--output_dir", str(tmp_path / "sweep")]) == (
        65 if fails else 0
    )
    result = result_of(tmp_path / "sweep", 0)[0]
    assert (result["value"] is None) == fails and (result["error"] == "signal 9") == fails


@pytest.mark.slow
def test_trials_of_a_model_that_is_not_native_share_its_base_too(tiny_neox_dir, tmp_path):
    file = sweep_of(
        tmp_path,
        tiny_neox_dir,
        "lr = [0.01, 1e-6]",
        max_steps=2,
        target_modules=["query_key_value"],
    )
    assert main(["sweep", str(file), "--output_dir", str(tmp_path / "shared")]) == 0
    assert (
        main(["sweep", str(file), "--output_dir", str(tmp_path / "apart"), "--runs_per_task", "1"])
        == 0
    )
    shared, apart = (
        [
            json.loads(f.read_text())
            for f in sorted((tmp_path / name).glob("tasks/*/output-000/*/metrics.json"))
        ]
        for name in ("shared", "apart")
    )
    assert [m["eval_loss"] for m in shared] == [m["eval_loss"] for m in apart] and shared[0][
        "eval_loss"
    ] < shared[1]["eval_loss"]


@pytest.fixture(scope="module")
def whole_sweep(tiny_llama_dir, tmp_path_factory):
    """A sweep of four trials in one task that nothing stopped: (its file, its folder)."""
    place = tmp_path_factory.mktemp("whole")
    settings = {
        "epochs": 1000,
        "max_steps": 60,
        "save_every_steps": 5,
        "eval_every_steps": 50,
        "lora_dropout": 0.1,
    }
    file = sweep_of(place, tiny_llama_dir, "lr = [0.01, 0.001]\nseed = [1, 2]", **settings)
    assert sweep(file, place / "sweep").wait(timeout=480) == 0, (place / "sweep.log").read_text()
    return file, place / "sweep"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_sweep_stopped_in_the_middle_of_a_task_ends_with_the_same_bits(
    number, whole_sweep, tmp_path
):
    (file, whole), folder = whole_sweep, tmp_path / "sweep"
    with sweep(file, folder) as process:

        def checkpoints() -> int:
            return len(list(folder.glob("tasks/*/output-000/*/checkpoints/*/COMPLETE")))

        end = time.monotonic() + 240
        while checkpoints() < 8:  # two of each trial are kept: the last one is under way
            assert time.monotonic() < end and process.poll() is None, Path(
                f"{folder}.log"
            ).read_text()
            time.sleep(0.05)
        (os.killpg if number == signal.SIGKILL else os.kill)(process.pid, number)
        assert process.wait(timeout=240) == (75 if number == signal.SIGTERM else -number), Path(
            f"{folder}.log"
        ).read_text()
    assert not list(folder.glob("tasks/*/DONE.json"))
    assert sweep(file, folder).wait(timeout=480) == 0, Path(f"{folder}.log").read_text()
    for trial in range(4):
        (ours, run), (theirs, reference) = result_of(folder, trial), result_of(whole, trial)
        assert (
            "output-001" in str(run)
            and json.loads((run / "run.json").read_text())["resumed"][0]["step"] > 0
        )
        assert ours["value"] == theirs["value"]
        assert (run / "adapter_model.safetensors").read_bytes() == (
            reference / "adapter_model.safetensors"
        ).read_bytes()
    assert (folder / "LEADERBOARD.md").read_text() == (
        whole / "LEADERBOARD.md"
    ).read_text().replace("output-000", "output-001")


# The leaderboard


def done(value, error=None):
    return {"value": value, "error": error, "run": "tasks/0000/output-000/0000"}


def test_leaderboard_averages_over_seeds_with_student_s_interval_and_compares_seed_by_seed():
    points = [{"lr": lr, "seed": s} for lr in (0.1, 0.2, 0.3, 0.4) for s in (1, 2, 3)]
    values = [2.9, 2.0, 1.2, 1.0, 2.1, 1.4, 1.1, 2.15, 1.5, None, None, None]
    board = leaderboard(
        points, [done(v, None if v else "exit code 70: loss") for v in values], "eval_loss"
    )
    assert [row["point"]["lr"] for row in board["rows"]] == [0.2, 0.3, 0.1, 0.4]
    best, second = board["rows"][:2]
    assert best["mean"] == pytest.approx(1.5) and best["trials"] == [3, 4, 5]
    assert best["half_width"] == pytest.approx(4.3027 * math.sqrt(0.31) / math.sqrt(3))
    assert second["behind"] == pytest.approx(0.25 / 3)
    assert second["behind_half_width"] == pytest.approx(
        4.3027 * math.sqrt(0.0025 / 3) / math.sqrt(3)
    )
    text = as_markdown(board).splitlines()
    assert "| 1 | 0.2 | 1.5000 | 1.3831 |  | 3 |  |" in text
    assert "| 2 | 0.3 | 1.5833 | 1.3165 | 0.0833 ± 0.0717 | 3 |  |" in text, (
        "far within its own interval, and yet behind with every seed"
    )
    assert "not distinguishable" in text[4] and "failed" in text[5] and "exit code 70" in text[5]


def test_seeds_that_failed_are_left_out_of_the_comparison():
    points = [{"lr": lr, "seed": s} for lr in (0.1, 0.2) for s in (1, 2, 3)]
    board = leaderboard(
        points,
        [done(v, None if v else "lost") for v in (1.0, 2.0, 3.0, None, 2.5, 3.4)],
        "eval_loss",
    )
    second = board["rows"][1]
    assert (
        second["runs"] == 2
        and second["behind"] == pytest.approx(0.45)
        and second["errors"] == ["lost"]
    )


def test_a_trial_whose_record_has_no_value_has_failed():
    board = leaderboard([{"lr": 1}, {"lr": 2}], [{"run": "tasks/0"}, done(1.0)], "eval_loss")
    assert [row["mean"] for row in board["rows"]] == [1.0, None]
    assert "no reason was recorded" in as_markdown(board)


def test_one_seed_has_no_interval():
    board = leaderboard([{"lr": 1}, {"lr": 2}], [done(2.0), done(1.0)], "eval_loss")
    assert [row["half_width"] for row in board["rows"]] == [None, None]
    assert "needs two seeds" in as_markdown(board) and "not measured" in as_markdown(board)
