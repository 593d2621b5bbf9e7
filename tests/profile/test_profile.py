"""lorabatch profile: what it wraps exists, its phases add up, its advice follows from figures, and
the hot path is clean afterwards."""

import gzip
import json
import time
from pathlib import Path

import pytest
import torch
from support.commands import TEXTS, infer_flags, train_flags, write_lines
from support.run_folders import infer_run, train_run

from lorabatch.cli import main
from lorabatch.infer.runners.program import unsupported
from lorabatch.kernels.step import kinds
from lorabatch.model.load import load_config
from lorabatch.model.spec import spec_from_config
from lorabatch.profile.explain import Facts, explain
from lorabatch.profile.run import Spans
from lorabatch.spans import operation, recorder, recording, spanned


def test_the_kernels_operations_have_the_names_that_advice_knows():
    assert {"products", "adapters", "attention", "norms", "activation"} <= set(kinds())


class Work:
    @spanned("step")
    def outer(self):
        time.sleep(0.02)
        self.inner()

    @spanned("inside")
    def inner(self):
        time.sleep(0.03)
        self.product()

    def product(self):
        with operation("products"):
            time.sleep(0.01)


def test_a_span_does_not_count_the_spans_inside_it_but_says_what_they_did():
    ends = []
    spans = Spans(on_step=lambda: ends.append(1))
    Work().outer()  # nobody listens
    with recording(spans):
        Work().outer()
        Work().outer()
        Work().product()  # in no span
    Work().outer()
    assert recorder() is None and ends == [1, 1] and spans.calls == {"inside": 2, "step": 2}
    phases = spans.phases()
    assert (
        phases["inside"] >= 0.08
        and 0.04 <= phases["step"] < phases["outside spans"] + phases["step"]
    )
    assert (
        list(spans.inside) == ["inside"]
        and 0.02 <= spans.inside["inside"]["products"] <= phases["inside"]
    )
    assert spans.memory and all(size > 10**6 for _, _, size in spans.memory)


def test_an_evaluation_is_one_span_and_first_steps_are_forgotten():
    spans = Spans()
    for name in ("load", "step"):
        with spans.span(name):
            pass
    spans.forget()
    with spans.span("evaluate"), spans.span("forward"):
        spans.add("products", 0.5)
    assert spans.calls == {"load": 1, "evaluate": 1} and spans.inside == {
        "evaluate": {"products": 0.5}
    }


def facts(kind, *, phases, inside=None, metrics=None, able=(), config=None, **record):
    """Of four steps; a CPU with two cores that both worked, unless ``record`` says otherwise."""
    counts = {name: count for name, count in (("evaluate", 2), ("save", 4)) if name in phases}
    record = {
        "device": "cpu",
        "dtype": "bf16",
        "threads": 2,
        "environment": {"usable_cores": 2},
        "config": config or {},
    } | record
    return Facts(
        kind, phases, {"step": 4, **counts}, inside or {}, record, metrics or {}, frozenset(able)
    )


def test_the_lines_of_a_training():
    """10 s of work, 2.5 s a step, where all steps took 5 s: twice their share of the ceiling; of 6
    s of backward 3 s in products and 1.5 s in adapters, so 1.5 s of torch and Python; start-up and
    evaluation apart."""
    phases = {
        "backward": 6.0,
        "forward": 4.0,
        "load": 1.0,
        "outside spans": 0.5,
        "evaluate": 3.0,
        "save": 1.0,
    }
    inside = {"backward": {"products": 3.0, "adapters": 1.5}, "forward": {"products": 4.0}}
    metrics = {
        "total_tokens": 4000,
        "steps": 4,
        "train_s": 20.0,
        "cold_share": 0.25,
        "cold_flops_per_s": 4e11,
    }
    lines = explain(facts("train", phases=phases, inside=inside, metrics=metrics))
    assert lines[0] == (
        "4 optimiser steps of 1000 tokens, 2.50 s each (bf16 on cpu, 2 threads; profiling "
        "slows it):"
    )
    assert (
        lines[1]
        == "  backward         6.00 s   60%   products 50%, adapters 25%, torch and Python 25%"
    )
    assert lines[2] == "  forward          4.00 s   40%   products 100%"
    assert lines[3] == "besides: an evaluation 1.50 s (2 times), a save 0.25 s (4 times)"
    assert (
        lines[4].endswith("1.5 s, paid once per process")
        and "200.0 of 400.0 Gflop/s measured on this machine with cold weights (50%)" in lines[5]
    )
    assert lines[6:] == [
        "what to change first:",
        "  1. the adapters take 15%: a smaller --lora_r, or fewer layers (--target_modules attn)",
    ]


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (
            facts("train", phases={"forward": 1.0}, metrics={"total_tokens": 2560, "steps": 10}),
            "products of 256 rows",
        ),
        (
            facts(
                "train",
                phases={"forward": 1.0},
                metrics={"total_tokens": 8000, "steps": 4},
                config={"block_tokens": 128},
            ),
            "--block_tokens",
        ),
        (
            facts(
                "train",
                phases={"forward": 1.0},
                dtype="fp32",
                able={"bf16"},
                metrics={"total_tokens": 8000, "steps": 4},
            ),
            "--dtype bf16",
        ),
        (
            facts(
                "train",
                phases={"forward": 1.0},
                threads=1,
                metrics={"total_tokens": 8000, "steps": 4},
            ),
            "--threads 2: only 1 of 2",
        ),
        (
            facts(
                "infer", phases={"decode": 1.0}, metrics={"mean_running": 4.0, "max_running": 16}
            ),
            "4.0 of 16 places",
        ),
        (
            facts(
                "infer",
                phases={"decode": 1.0},
                metrics={"mean_running": 15.0, "max_running": 16, "completed": 50},
            ),
            "--batch_size 32",
        ),
        (
            facts("infer", phases={"decode": 1.0}, able={"int8"}, config={"quantize": "none"}),
            "--quantize int8",
        ),
        (facts("infer", phases={"prefill": 1.0}), "prefill takes 100%"),
        (
            facts("infer", phases={"choose token": 1.0}, config={"temperature": 1.0}),
            "greedy (--temperature 0)",
        ),
    ],
)
def test_advice_follows_from_the_figures(made, words):
    advice = explain(made)
    assert words in advice[advice.index("what to change first:") + 1]


def test_a_run_with_nothing_to_change_is_told_so():
    metrics = {"mean_running": 60.0, "max_running": 64, "completed": 64, "mbu": None}
    lines = explain(
        facts(
            "infer",
            phases={"decode": 1.0},
            metrics=metrics,
            config={"quantize": "int8"},
            able={"int8", "bf16"},
        )
    )
    assert lines[-1].endswith("nothing in these figures asks for a change") and not any(
        "GB/s" in line for line in lines
    )
    assert explain(Facts("train", {"load": 1.0}, {}, {}, {}, {}, frozenset())) == [
        "no step was made: nothing to explain"
    ]


def test_steps_that_read_guesses_are_decoding(tiny_llama_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts.txt").write_text("of of of of of\nab ab ab ab ab\n", encoding="utf-8")
    fixed = ["--max_new_tokens", 90, "--ignore_eos", "--profile_steps", 99]
    for guesses in ("0", "4"):
        folder = f"profile-{guesses}"
        flags = infer_flags(tiny_llama_dir, "texts.txt", "unused", *fixed, "--speculate", guesses)
        assert main(["profile", *flags, "--profile_dir", folder]) == 0
        calls = json.loads(Path(folder, "profile.json").read_text())["calls"]
        assert (calls["prefill"], calls["step"]) == (1, 1 + calls["decode"])


@pytest.mark.parametrize("kind", ["train", "infer"])
def test_the_command(kind, tiny_llama_dir, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_lines(tmp_path / "texts.txt", TEXTS)
    flags = {
        "train": train_flags(tiny_llama_dir, "texts.txt", "unused", "--batch_size", 2),
        "infer": infer_flags(tiny_llama_dir, "texts.txt", "unused", "--max_new_tokens", 6),
    }[kind]
    steps = {"train": 2, "infer": 3}[kind]
    assert main(["profile", *flags, "--profile_steps", str(steps)]) == 0
    folder = tmp_path / "results" / f"profile-{kind}"
    profile = json.loads((folder / "profile.json").read_text())
    expected = {
        "train": {"forward", "backward", "optimiser", "evaluate", "pack", "save"},
        "infer": {"prefill", "decode", "choose token", "write"},
    }
    assert expected[kind] | {"load", "tokenise", "step"} <= set(profile["calls"]) and all(
        v > 0 for v in profile["phases"].values()
    )
    assert profile["calls"]["step"] == {"train": 2, "infer": 6}[kind], (
        "a training's first two steps warm up"
    )
    inside = profile["inside"][{"train": "backward", "infer": "decode"}[kind]]
    assert (
        "products" in inside
        and sum(inside.values())
        <= profile["phases"][{"train": "backward", "infer": "decode"}[kind]]
    )
    if (
        kind == "infer"
        and unsupported(
            spec_from_config(load_config(tiny_llama_dir)), torch.float32, torch.device("cpu")
        )
        is None
    ):
        assert {"attention", "norms", "cache writes"} <= set(inside)
    trace = json.loads(gzip.decompress((folder / "trace.json.gz").read_bytes()))
    names = {event.get("name") for event in trace["traceEvents"]}
    assert {"train": {"lorabatch: forward"}, "infer": {"lorabatch: decode"}}[kind] <= names
    assert "what to change first" in capsys.readouterr().out and (
        folder / "memory.svg"
    ).read_text().startswith("<?xml")
    assert sorted(p.name for p in (tmp_path / "results").iterdir()) == [f"profile-{kind}"], (
        "nothing else is written"
    )


@pytest.mark.parametrize("kind", ["train", "infer"])
def test_a_folder_of_another_run_is_refused_with_the_profiles_own_flag(
    kind, tiny_llama_dir, tmp_path, capsys
):
    write_lines(tmp_path / "texts.txt", TEXTS)
    other = {"train": lambda path: infer_run(path, []), "infer": train_run}[kind]
    other(tmp_path / "profile" / "run")
    make = {"train": train_flags, "infer": infer_flags}[kind]
    flags = make(tiny_llama_dir, tmp_path / "texts.txt", "unused")
    assert main(["profile", *flags, "--profile_dir", str(tmp_path / "profile")]) == 64
    assert capsys.readouterr().err.strip().endswith("choose another --profile_dir")


def test_a_run_too_short_for_a_timeline_says_so_and_names_no_old_one(
    tiny_llama_dir, tmp_path, capsys
):
    write_lines(tmp_path / "texts.txt", TEXTS[:1])
    folder = tmp_path / "profile"
    folder.mkdir()
    (folder / "trace.json.gz").write_bytes(b"of an earlier profile")
    flags = infer_flags(tiny_llama_dir, tmp_path / "texts.txt", "unused", "--max_new_tokens", 1)
    assert main(["profile", *flags, "--profile_dir", str(folder)]) == 0
    said = capsys.readouterr().out
    assert "trace.json.gz" not in said and not (folder / "trace.json.gz").exists()
    assert "no timeline, no operators: the run ended within its first 2 steps" in said
    assert str(folder / "profile.json") in said


def test_a_span_waits_for_the_work_that_it_started():
    """On a GPU calls return before the work is done: what is still running when a span ends is the
    span's, and what ran before it is not."""
    running = [0.0]  # seconds of work that the device was given

    def wait():
        time.sleep(running[0])
        running[0] = 0.0

    spans = Spans(wait=wait)
    running[0] = 0.3
    with spans.span("forward"):
        running[0] = 0.02
    assert 0.02 <= spans.self_s["forward"] < 0.3
