"""Several adapters over one base (``--jobs``): each is what its run alone would have made, and none disturbs another."""

import json
import os
import random
import shutil
import signal
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_cli import TEXTS
from test_resume import attempts, finish, history  # noqa: F401

from lorabatch.cli import main
from lorabatch.config import TrainConfig
from lorabatch.corpus.packing import share
from lorabatch.model.linear import can_prepack
from lorabatch.train import checkpoint
from lorabatch.train.jobfile import read_jobs

FLAGS = (
    "--batch_size 3 --epochs 2 --lr 0.01 --lora_r 4 --eval_every_steps 3 --save_every_steps 1 --block_tokens 100 --dtype fp32 --threads 1"
)
# Ranks, rates, seeds, layers, data and lengths of their own; with 100 tokens a pass, some passes are shared and some steps take several.
JOBS = {
    "plain": {"seed": 1},
    "wide": {"lora_r": 7, "lora_alpha": 3.0, "lr": 0.003, "seed": 2, "train_path": "other.txt", "lora_dropout": 0.2, "use_rslora": True},
    "short": {"max_steps": 2, "target_modules": ["q_proj", "layers.2.mlp.down_proj"], "val_path": None, "scheduler": "linear"},
    "slow": {"batch_size": 1, "lora_plus_ratio": 4.0, "weight_decay": 0.1, "label_smoothing": 0.1, "max_len": 20, "max_steps": 14},
}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with two files of documents and the jobs file, as the working directory."""
    monkeypatch.chdir(tmp_path)
    Path("train.txt").write_text("\n".join(TEXTS) + "\n", encoding="utf-8")
    Path("other.txt").write_text("\n".join(reversed([text.upper() for text in TEXTS[:7]])) + "\n", encoding="utf-8")
    lines = [
        json.dumps({"name": name, **values, **({"train_path": str(tmp_path / "other.txt")} if name == "wide" else {})})
        for name, values in JOBS.items()
    ]
    Path("jobs.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return tmp_path


def flags(model, save_dir, *more):
    corpus = Path("train.txt").resolve()
    words = ["train", "--base_model", model, "--train_path", corpus, "--val_path", corpus, "--save_dir", Path(save_dir).resolve()]
    return [str(w) for w in (*words, *FLAGS.split(), *(Path(w).resolve() if str(w) == "jobs.jsonl" else w for w in more))]


def words(values):
    """A job's settings as flags."""
    return [w for k, v in values.items() for w in (f"--{k}", *(v if isinstance(v, list) else [v]))]


def train_alone(model, name, *more):
    assert main([*flags(model, f"alone/{name}", *words(JOBS[name])), *more]) == 0


def assert_as_alone(name, together="together"):
    """To the bit where a product's rows do not depend on their number; within rounding anywhere."""
    ours, theirs = Path(together, name), Path("alone", name)
    a, b = (load_file(folder / "adapter_model.safetensors") for folder in (ours, theirs))
    assert a.keys() == b.keys()
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=1e-4, atol=1e-6, msg=f"{name} {key}")
    if can_prepack(torch.float32):
        assert history(ours) == history(theirs)
        assert (ours / "last" / "adapter_model.safetensors").read_bytes() == (theirs / "last" / "adapter_model.safetensors").read_bytes()
    assert json.loads((ours / "run.json").read_text())["status"] == "completed"
    mine, its = (json.loads((folder / "metrics.json").read_text()) for folder in (ours, theirs))
    assert mine["steps"] == its["steps"] and mine["total_tokens"] == its["total_tokens"] and mine["rss_bytes"]


def test_each_run_is_what_it_would_have_been_alone(place, tiny_llama_dir, capsys):
    assert main(flags(tiny_llama_dir, "together", "--jobs", "jobs.jsonl")) == 0
    out = capsys.readouterr()
    assert "in 4 runs" in out.out and "short: 2 of 2 steps" in out.err
    for name in JOBS:
        train_alone(tiny_llama_dir, name)
        assert_as_alone(name)
    losses = {name: [e["loss"] for e in history(f"together/{name}") if e["event"] == "step"] for name in JOBS}
    assert {name: len(values) for name, values in losses.items()} == {"plain": 8, "wide": 6, "short": 2, "slow": 14}
    assert all(values[-1] < values[0] for values in losses.values())
    assert main(flags(tiny_llama_dir, "together", "--jobs", "jobs.jsonl", "--resume", "auto")) == 0
    assert capsys.readouterr().out.count("this run is complete; nothing to do") == 4


def test_runs_over_gpt2_share_full_checkpointing(place, tiny_gpt2_dir):
    Path("jobs.jsonl").write_text('{"name": "plain", "seed": 1}\n{"name": "short", "max_steps": 2, "val_path": "none"}\n')
    assert main(flags(tiny_gpt2_dir, "together", "--jobs", "jobs.jsonl", "--checkpointing", "full")) == 0
    assert main(flags(tiny_gpt2_dir, "alone/plain", "--seed", 1, "--checkpointing", "full")) == 0
    a, b = (load_file(Path(f, "plain", "adapter_model.safetensors")) for f in ("together", "alone"))
    assert all(torch.allclose(a[k], b[k], rtol=1e-4, atol=1e-6) for k in a)


def test_a_run_that_breaks_does_not_take_the_others_along(place, tiny_llama_dir, capsys):
    Path("jobs.jsonl").write_text('{"name": "plain", "seed": 1}\n{"name": "broken", "lr": 1e30, "val_path": "none"}\n')
    assert main(flags(tiny_llama_dir, "together", "--jobs", "jobs.jsonl")) == 70
    err = capsys.readouterr().err
    assert "broken: failed: step " in err and "together: 1 of 2 runs failed" in err.splitlines()[-1]
    assert json.loads(Path("together/broken/run.json").read_text())["status"] == "failed"
    assert checkpoint.newest(Path("together/broken/checkpoints")).step >= 1
    train_alone(tiny_llama_dir, "plain")
    assert_as_alone("plain")


@pytest.mark.slow
def test_killed_at_random_instants_each_ends_with_the_same_bits(attempts, place, tiny_llama_dir):  # noqa: F811
    """Also where the runs were at different steps when they died."""
    argv = flags(tiny_llama_dir, "together", "--jobs", "jobs.jsonl", "--resume", "auto")
    codes = finish(attempts, argv, place / "log", seed=11, kills=8)
    assert codes.count(-signal.SIGKILL) >= 8
    for name in JOBS:
        train_alone(tiny_llama_dir, name)
        assert_as_alone(name)


@pytest.mark.slow
def test_a_signal_stops_all_and_one_may_go_on_alone(attempts, place, tiny_llama_dir):  # noqa: F811
    argv, log = flags(tiny_llama_dir, "together", "--jobs", "jobs.jsonl", "--resume", "auto"), place / "log"
    code = None
    while code != 75:
        shutil.rmtree("together", ignore_errors=True)
        code = attempts(argv, log, kill_after_s=random.uniform(0.3, 2.0), number=signal.SIGUSR1)
        assert code in (0, 75, -signal.SIGUSR1), log.read_text()
    assert "together: stopped by SIGUSR1 with everything saved; go on with --resume auto" in log.read_text()
    status = {name: json.loads(Path("together", name, "run.json").read_text())["status"] for name in JOBS}
    assert status["slow"] == "interrupted" and set(status.values()) <= {"interrupted", "completed"}
    assert attempts([*flags(tiny_llama_dir, "together/slow", *words(JOBS["slow"])), "--resume", "auto"], log) == 0, log.read_text()
    assert attempts(argv, log) == 0, log.read_text()
    assert f"{Path('together/slow').resolve()}: this run is complete; nothing to do" in log.read_text()
    for name in JOBS:
        train_alone(tiny_llama_dir, name)
        assert_as_alone(name)


# The file and what does not go together


@pytest.mark.parametrize(
    ("content", "code", "words"),
    [
        ('{"name": "a"}\n{"name": "b", "lora_rank": 4}\n', 64, "jobs.jsonl:2: unknown key 'lora_rank'; "),
        ('{"name": "a", "learning_rate": 4}\n', 64, "unknown key"),
        ('{"name": "a"}\n\n{"name": "a"}\n', 65, "jobs.jsonl:3: the name 'a' occurs twice"),
        ('{"lr": 1e-3}\n', 65, "jobs.jsonl:1: no 'name'"),
        ('["a"]\n', 65, "jobs.jsonl:1: not a JSON object"),
        ('{"name": "../a"}\n', 65, "cannot be a folder's name"),
        ('{"name": "run.json"}\n', 65, "cannot be a folder's name"),
        ('{"name": "a", \n', 65, "jobs.jsonl:1: not valid JSON"),
        ('{"name": "a", "lr": "fast"}\n', 64, "jobs.jsonl:1: 'lr' must be of type float"),
        ('{"name": "a", "lr": -1}\n', 64, "jobs.jsonl:1: --lr -1.0: out of range"),
        ('{"name": "a", "dtype": "bf16"}\n', 64, "jobs.jsonl:1: 'dtype' is the same for all runs; give it as --dtype"),
        ('{"name": "a"}\n{"name": "b", "train_path": "nowhere.txt"}\n', 65, "nowhere.txt: no such file"),
        ("\n", 65, "no runs in it"),
    ],
)
def test_mistakes_in_the_file_are_told_before_anything_happens(content, code, words, place, tmp_path, capsys):
    Path("jobs.jsonl").write_text(content)
    assert main(flags("no-such-model", "together", "--jobs", "jobs.jsonl")) == code
    error = capsys.readouterr().err.strip()
    assert words in error and "\n" not in error
    assert not Path("together").exists()


def test_the_file_is_read_like_any_jsonl(tmp_path):
    """With the mark that Windows puts first, and lines that end at line feeds alone."""
    path = tmp_path / "jobs.jsonl"
    path.write_text('{"name": "a", "text_field": "x\u2028y"}\r\n\r\n{"name": "b"}\r\n', encoding="utf-8-sig", newline="")
    jobs = read_jobs(path, TrainConfig(), tmp_path)
    assert [*jobs] == ["a", "b"] and jobs["a"].text_field == "x\u2028y"


def test_what_does_not_go_together_is_refused(place, tiny_llama_dir, tiny_neox_dir, monkeypatch, capsys):
    def refused(code, words, *more, model=tiny_llama_dir):
        assert main(flags(model, "together", "--jobs", "jobs.jsonl", *more)) == code
        assert words in capsys.readouterr().err.splitlines()[-1]

    refused(64, "not together with --jobs: only the native decoder", "--backend", "hf")
    refused(64, "its own adapter; leave it out, or train them", "--backend", "hf", "--resume", "together")
    refused(64, "--shard_base: not together with --jobs", "--shard_base")
    refused(64, "use --resume auto", "--resume", "together")
    refused(65, "nowhere.jsonl: no such file", "--jobs", "nowhere.jsonl")
    refused(64, "--lora_dropout and --checkpointing full", "--checkpointing", "full")
    assert not Path("together").exists()
    assert main(["profile", *flags(tiny_llama_dir, "together", "--jobs", "jobs.jsonl"), "--profile_dir", "profile"]) == 64
    assert "--jobs: profiles one run" in capsys.readouterr().err and not Path("profile").exists()
    refused(69, "does not know this kind of gpt_neox model", model=tiny_neox_dir)
    monkeypatch.setattr(os, "environ", os.environ | {"WORLD_SIZE": "2"} | dict.fromkeys(("RANK", "LOCAL_RANK"), "0"))
    monkeypatch.setattr(os, "environ", os.environ | {"MASTER_ADDR": "localhost", "MASTER_PORT": "1"})
    refused(64, "several ranks: not together with --jobs")


def test_a_folder_of_another_run_is_refused_and_nothing_is_touched(place, tiny_llama_dir, capsys):
    train_alone(tiny_llama_dir, "short")
    Path("alone").rename("together")
    before = Path("together/short/run.json").read_bytes()
    assert main(flags(tiny_llama_dir, "together", "--jobs", "jobs.jsonl")) == 64
    assert "together/short: holds an earlier run (completed)" in capsys.readouterr().err
    assert Path("together/short/run.json").read_bytes() == before and not Path("together/plain").exists()


# Which blocks share a pass


@given(st.lists(st.lists(st.integers(1, 150), max_size=5), max_size=5))
def test_blocks_share_passes_in_order_and_within_bounds(blocks):
    passes = share(blocks, 100)
    assert sorted(place for each in passes for place in each) == [(r, i) for r, sizes in enumerate(blocks) for i in range(len(sizes))]
    for run in range(len(blocks)):
        assert [i for each in passes for r, i in each if r == run] == list(range(len(blocks[run]))), "each run's order is kept"
    for each in passes:
        assert len({r for r, _ in each}) == len(each), "one block of a run"
        assert len(each) == 1 or sum(blocks[r][i] for r, i in each) <= 100


def test_small_blocks_do_share():
    assert share([[30], [40, 90], [30], [50]], 100) == [[(0, 0), (1, 0), (2, 0)], [(3, 0)], [(1, 1)]]
    assert share([], 100) == []
