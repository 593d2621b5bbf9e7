"""Several adapters over one base, one after another (``--jobs``): each is what its run alone would
have made, and none disturbs another."""

import json
import random
import shutil
import signal
from pathlib import Path

import pytest
from support.commands import TEXTS, history, train_flags, write_lines, write_rows
from support.processes import Group
from support.training import finish

from lorabatch.cli import main
from lorabatch.config import TrainConfig
from lorabatch.kernels import library
from lorabatch.train import checkpoint
from lorabatch.train.jobfile import read_jobs

FLAGS = (
    "--batch_size 3 --epochs 2 --lr 0.01 --lora_r 4 --eval_every_steps 3 --save_every_steps 1 "
    "--block_tokens 100"
)
# Ranks, rates, seeds, layers, data and lengths of their own.
JOBS = {
    "plain": {"seed": 1},
    "wide": {
        "lora_r": 7,
        "lora_alpha": 3.0,
        "lr": 0.003,
        "seed": 2,
        "train_path": "other.txt",
        "lora_dropout": 0.2,
        "use_rslora": True,
    },
    "short": {
        "max_steps": 2,
        "target_modules": ["q_proj", "layers.2.mlp.down_proj"],
        "val_path": None,
        "scheduler": "linear",
    },
    "slow": {
        "batch_size": 1,
        "lora_plus_ratio": 4.0,
        "weight_decay": 0.1,
        "label_smoothing": 0.1,
        "max_len": 20,
        "max_steps": 14,
    },
}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with two files of documents and the jobs file, as the working directory."""
    monkeypatch.chdir(tmp_path)
    write_lines(Path("train.txt"), TEXTS)
    write_lines(Path("other.txt"), reversed([text.upper() for text in TEXTS[:7]]))
    rows = [{"name": name, **values} for name, values in JOBS.items()]
    for row in rows:
        if row["name"] == "wide":
            row["train_path"] = str(tmp_path / "other.txt")
    write_rows(Path("jobs.jsonl"), rows)
    return tmp_path


def flags(model, save_dir, *more):
    corpus = Path("train.txt").resolve()
    more = [Path(w).resolve() if str(w) == "jobs.jsonl" else w for w in more]
    return train_flags(model, corpus, Path(save_dir).resolve(), *FLAGS.split(), *more)


def words(values):
    """A job's settings as flags."""
    return [w for k, v in values.items() for w in (f"--{k}", *(v if isinstance(v, list) else [v]))]


def train_alone(model, name, *more):
    assert main([*flags(model, f"alone/{name}", *words(JOBS[name])), *more]) == 0


def assert_as_alone(name):
    ours, theirs = Path("grid", name), Path("alone", name)
    assert history(ours) == history(theirs)
    for folder in (".", "last"):
        assert (ours / folder / "adapter_model.safetensors").read_bytes() == (
            theirs / folder / "adapter_model.safetensors"
        ).read_bytes()
    assert json.loads((ours / "run.json").read_text())["status"] == "completed"
    mine, its = (json.loads((folder / "metrics.json").read_text()) for folder in (ours, theirs))
    assert (
        mine["steps"] == its["steps"]
        and mine["total_tokens"] == its["total_tokens"]
        and mine["rss_bytes"]
    )


def test_each_run_is_what_it_would_have_been_alone(place, tiny_llama_dir, capsys):
    assert main(flags(tiny_llama_dir, "grid", "--jobs", "jobs.jsonl")) == 0
    out = capsys.readouterr()
    assert "in 4 runs" in out.out and "short: 2 of 2 steps" in out.err
    slower = (
        "wide: torch's operators are used, slower than our kernels, for adapters (--lora_dropout), "
        "attention (heads have 16 features"
    )
    assert (slower in out.err) == (library("train") is not None)
    for name in JOBS:
        train_alone(tiny_llama_dir, name)
        assert_as_alone(name)
    losses = {
        name: [e["loss"] for e in history(f"grid/{name}") if e["event"] == "step"] for name in JOBS
    }
    assert {name: len(values) for name, values in losses.items()} == {
        "plain": 8,
        "wide": 6,
        "short": 2,
        "slow": 14,
    }
    assert all(values[-1] < values[0] for values in losses.values())
    assert main(flags(tiny_llama_dir, "grid", "--jobs", "jobs.jsonl", "--resume", "auto")) == 0
    assert capsys.readouterr().out.count("this run is complete; nothing to do") == 4


def test_loading_belongs_to_the_first_run(place, tiny_llama_dir):
    Path("jobs.jsonl").write_text('{"name": "one"}\n{"name": "two"}\n')
    assert main(flags(tiny_llama_dir, "grid", "--jobs", "jobs.jsonl", "--max_steps", 1)) == 0
    one, two = (
        json.loads(Path("grid", name, "metrics.json").read_text())["phases"]
        for name in ("one", "two")
    )
    assert one["load_s"] > 0 and "load_s" not in two and two["loop_s"] > 0
    assert Path("grid/two/system.jsonl").exists()


@pytest.mark.parametrize("backend", ["native", "hf"])
def test_a_backend_gives_each_run_a_fresh_adapter(backend, place, tiny_gpt2_dir):
    more = (
        ["--backend", backend, "--checkpointing", "full"]
        if backend == "native"
        else ["--backend", backend]
    )
    Path("jobs.jsonl").write_text(
        '{"name": "short", "max_steps": 2, "lora_dropout": 0.1}\n{"name": "plain", "seed": 1, '
        '"max_steps": 3}\n'
    )
    assert main(flags(tiny_gpt2_dir, "grid", "--jobs", "jobs.jsonl", *more)) == 0
    assert (
        main(flags(tiny_gpt2_dir, "alone/short", "--max_steps", 2, "--lora_dropout", 0.1, *more))
        == 0
    )
    assert main(flags(tiny_gpt2_dir, "alone/plain", "--seed", 1, "--max_steps", 3, *more)) == 0
    for name in ("short", "plain"):
        assert_as_alone(name)


@pytest.mark.slow
def test_several_ranks_train_one_run_after_the_other(place, tiny_llama_dir):
    Path("jobs.jsonl").write_text(
        '{"name": "plain", "seed": 1}\n{"name": "short", "max_steps": 2}\n'
    )
    group = Group(2, flags(tiny_llama_dir, "grid", "--jobs", "jobs.jsonl"), place)
    assert group.wait() == [0, 0], group.text()
    (place / "alone").mkdir()
    for name, words in (("plain", ["--seed", 1]), ("short", ["--max_steps", 2])):
        group = Group(2, flags(tiny_llama_dir, f"alone/{name}", *words), place / "alone")
        assert group.wait() == [0, 0], group.text()
        assert_as_alone(name)


def test_a_run_that_breaks_does_not_take_the_others_along(place, tiny_llama_dir, capsys):
    Path("jobs.jsonl").write_text(
        '{"name": "plain", "seed": 1}\n{"name": "broken", "lr": 1e30, "val_path": "none"}\n'
    )
    assert main(flags(tiny_llama_dir, "grid", "--jobs", "jobs.jsonl")) == 70
    err = capsys.readouterr().err
    assert "broken: failed: step " in err and "grid: 1 of 2 runs failed" in err.splitlines()[-1]
    assert json.loads(Path("grid/broken/run.json").read_text())["status"] == "failed"
    assert checkpoint.newest(Path("grid/broken/checkpoints")).step >= 1
    train_alone(tiny_llama_dir, "plain")
    assert_as_alone("plain")


@pytest.mark.slow
def test_killed_at_random_instants_each_ends_with_the_same_bits(attempts, place, tiny_llama_dir):
    argv = flags(tiny_llama_dir, "grid", "--jobs", "jobs.jsonl", "--resume", "auto")
    codes = finish(attempts, argv, place / "log", seed=11, kills=5)
    assert codes.count(-signal.SIGKILL) >= 5
    for name in JOBS:
        train_alone(tiny_llama_dir, name)
        assert_as_alone(name)


@pytest.mark.slow
def test_a_signal_stops_them_and_one_may_go_on_alone(attempts, place, tiny_llama_dir):
    argv, log = (
        flags(tiny_llama_dir, "grid", "--jobs", "jobs.jsonl", "--resume", "auto"),
        place / "log",
    )
    code = None
    while code != 75:
        shutil.rmtree("grid", ignore_errors=True)
        code = attempts(argv, log, kill_after_s=random.uniform(0.2, 1.5), number=signal.SIGUSR1)
        assert code in (0, 75, -signal.SIGUSR1), log.read_text()
    assert (
        "grid: stopped by SIGUSR1 with everything saved; resume with --resume auto"
        in log.read_text()
    )
    begun = {
        name: json.loads(record.read_text())["status"]
        for name in JOBS
        if (record := Path("grid", name, "run.json")).exists()
    }
    assert [*begun.values()] == ["completed"] * (len(begun) - 1) + ["interrupted"] and [*begun] == [
        *JOBS
    ][: len(begun)]
    assert (
        attempts(
            [*flags(tiny_llama_dir, "grid/slow", *words(JOBS["slow"])), "--resume", "auto"], log
        )
        == 0
    ), log.read_text()
    assert attempts(argv, log) == 0, log.read_text()
    assert f"{Path('grid/slow').resolve()}: this run is complete; nothing to do" in log.read_text()
    for name in JOBS:
        train_alone(tiny_llama_dir, name)
        assert_as_alone(name)


# Mistakes


@pytest.mark.parametrize(
    ("content", "code", "words"),
    [
        (
            '{"name": "a"}\n{"name": "b", "lora_rank": 4}\n',
            64,
            "jobs.jsonl:2: unknown key 'lora_rank'; ",
        ),
        ('{"name": "a", "learning_rate": 4}\n', 64, "unknown key"),
        ('{"name": "a"}\n\n{"name": "a"}\n', 65, "jobs.jsonl:3: duplicate name 'a'"),
        ('{"lr": 1e-3}\n', 65, "jobs.jsonl:1: no 'name'"),
        ('["a"]\n', 65, "jobs.jsonl:1: not a JSON object"),
        ('{"name": "../a"}\n', 65, "cannot be a folder's name"),
        ('{"name": "run.json"}\n', 65, "cannot be a folder's name"),
        ('{"name": "a", \n', 65, "jobs.jsonl:1: not valid JSON"),
        ('{"name": "a", "lr": "fast"}\n', 64, "jobs.jsonl:1: 'lr' must be of type float"),
        ('{"name": "a", "lr": -1}\n', 64, "jobs.jsonl:1: --lr -1.0: out of range"),
        (
            '{"name": "a", "dtype": "bf16"}\n',
            64,
            "jobs.jsonl:1: 'dtype' is the same for all runs; give it as --dtype",
        ),
        (
            '{"name": "a"}\n{"name": "b", "train_path": "nowhere.txt"}\n',
            65,
            "nowhere.txt: no such file",
        ),
        ("\n", 65, "contains no runs"),
    ],
)
def test_mistakes_in_the_file_are_told_before_anything_happens(
    content, code, words, place, tmp_path, capsys
):
    Path("jobs.jsonl").write_text(content)
    assert main(flags("no-such-model", "grid", "--jobs", "jobs.jsonl")) == code
    error = capsys.readouterr().err.strip()
    assert words in error and "\n" not in error
    assert not Path("grid").exists()


def test_the_file_is_read_like_any_jsonl(tmp_path):
    """With the mark that Windows puts first, and lines that end at line feeds alone."""
    path = tmp_path / "jobs.jsonl"
    path.write_text(
        '{"name": "a", "text_field": "x\u2028y"}\r\n\r\n{"name": "b"}\r\n',
        encoding="utf-8-sig",
        newline="",
    )
    jobs = read_jobs(path, TrainConfig(), tmp_path)
    assert [*jobs] == ["a", "b"] and jobs["a"].text_field == "x\u2028y"


def test_mistakes_are_told_before_the_first_run_begins(place, tiny_llama_dir, capsys):
    def refused(code, words, *more):
        assert main(flags(tiny_llama_dir, "grid", "--jobs", "jobs.jsonl", *more)) == code
        assert words in capsys.readouterr().err.splitlines()[-1]

    refused(64, "use --resume auto", "--resume", "grid")
    refused(65, "nowhere.jsonl: no such file", "--jobs", "nowhere.jsonl")
    assert not Path("grid").exists()
    assert (
        main(
            [
                "profile",
                *flags(tiny_llama_dir, "grid", "--jobs", "jobs.jsonl"),
                "--profile_dir",
                "profile",
            ]
        )
        == 64
    )
    assert "--jobs: profiles one run" in capsys.readouterr().err and not Path("profile").exists()
    Path("jobs.jsonl").write_text(
        '{"name": "fine"}\n{"name": "wrong", "target_modules": "q_porj"}\n'
    )
    refused(64, "--target_modules q_porj: matches no linear layer")
    assert not Path("grid/fine/events.jsonl").exists() and not Path("grid/wrong").exists()


def test_another_run_in_the_last_folder_is_seen_before_the_first_begins(
    place, tiny_llama_dir, capsys
):
    train_alone(tiny_llama_dir, "short")
    Path("grid").mkdir()
    Path("alone/short").rename("grid/short")
    record = json.loads(Path("grid/short/run.json").read_text())
    assert record["status"] == "completed"
    Path("jobs.jsonl").write_text('{"name": "plain"}\n{"name": "short", "lora_r": 2}\n')
    assert main(flags(tiny_llama_dir, "grid", "--jobs", "jobs.jsonl", "--resume", "auto")) == 64
    assert "was saved by a run with other settings" in capsys.readouterr().err
    assert not Path("grid/plain/events.jsonl").exists()


def test_a_folder_of_another_run_is_refused_and_nothing_is_touched(place, tiny_llama_dir, capsys):
    train_alone(tiny_llama_dir, "short")
    Path("alone").rename("grid")
    before = Path("grid/short/run.json").read_bytes()
    assert main(flags(tiny_llama_dir, "grid", "--jobs", "jobs.jsonl")) == 64
    assert "grid/short: contains an earlier run (completed)" in capsys.readouterr().err
    assert Path("grid/short/run.json").read_bytes() == before and not Path("grid/plain").exists()
