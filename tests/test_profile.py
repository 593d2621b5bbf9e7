"""lorabatch profile: what it wraps exists, its phases add up, and the hot path is clean afterwards."""

import gzip
import json
import time

import pytest

from lorabatch.cli import main
from lorabatch.measure.profile import SPANS, Spans, grouped, resolve, summary, wrapped

TEXTS = [f"The patient in bed {i} slept well and the monitor showed a steady rhythm {i}." for i in range(12)]


def test_every_wrapped_function_exists():
    for place in [place for kind in SPANS.values() for places in kind.values() for place in places]:
        owner, attribute = resolve(place)
        assert callable(getattr(owner, attribute)), place


class Work:
    def outer(self):
        time.sleep(0.02)
        self.inner()

    def inner(self):
        time.sleep(0.03)


def test_a_span_does_not_count_the_spans_inside_it(monkeypatch):
    spans, ends = Spans(), []
    monkeypatch.setattr("lorabatch.measure.profile.resolve", lambda place: (Work, place))
    original = Work.inner
    with wrapped({"step": ("outer",), "inside": ("inner",)}, spans, lambda: ends.append(1)):
        Work().outer()
        Work().outer()
    assert Work.inner is original and ends == [1, 1] and spans.calls == {"inside": 2, "step": 2}
    phases = spans.phases()
    assert phases["inside"] >= 0.06 and phases["step"] >= 0.04
    assert phases["step"] < phases["step"] + phases["inside"] <= sum(phases.values()) - phases["outside spans"] + 1e-9
    assert all(size > 10**6 for _, _, size in spans.memory)


def test_operators_are_grouped_and_the_summary_names_the_two_largest_costs():
    operators = {
        "lorabatch: decode": 2.0,
        "aten::addmm": 3.0,
        "mkldnn::_linear_pointwise": 1.0,
        "aten::copy_": 0.5,
        "aten::_fused_adamw_": 0.25,
        "aten::mul": 0.25,
    }
    groups = {
        "own kernels and plain Python": 2.0,
        "matrix products": 4.0,
        "copies and type conversions": 0.5,
        "optimiser": 0.25,
        "element-wise and norms": 0.25,
        "attention": 0.0,
        "everything else": 0.0,
    }
    assert grouped(operators) == groups
    lines = summary("train", {"evaluate": 6.0, "backward": 3.0, "load": 1.0}, operators, {"mfu": 0.5, "measured_flops_per_s": 4e11})
    assert lines[0].startswith("10.0 s") and "60.0%" in lines[1]
    assert "200.0 of 400.0 Gflop/s" in " ".join(lines) and "start-up: 1.0 s" in " ".join(lines)
    assert "--eval_every_steps" in lines[-2] and "[evaluate: 6.00 s, 60%]" in lines[-2] and "backward" in lines[-1]
    assert not any("Gflop" in line for line in summary("train", {"load": 1.0}, {}, {"mfu": None}))


@pytest.mark.parametrize("kind", ["train", "infer"])
def test_the_command(kind, tiny_llama_dir, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS) + "\n", encoding="utf-8")
    flags = {
        "train": ["--train_path", "texts.txt", "--val_path", "texts.txt", "--batch_size", "2", "--profile_steps", "2"],
        "infer": ["--prompts", "texts.txt", "--max_new_tokens", "6", "--profile_steps", "3"],
    }[kind]
    assert main(["profile", kind, "--base_model", str(tiny_llama_dir), "--dtype", "fp32", *flags]) == 0
    folder = tmp_path / "results" / f"profile-{kind}"
    profile = json.loads((folder / "profile.json").read_text())
    expected = {
        "train": {"forward", "backward", "optimiser", "evaluate", "pack", "save"},
        "infer": {"prefill", "decode", "choose token", "write"},
    }
    assert expected[kind] | {"load", "tokenise", "step"} <= set(profile["calls"]) and all(v > 0 for v in profile["phases"].values())
    assert profile["calls"]["step"] == {"train": 4, "infer": 6}[kind]
    trace = json.loads(gzip.decompress((folder / "trace.json.gz").read_bytes()))
    names = {event.get("name") for event in trace["traceEvents"]}
    assert {"train": {"lorabatch: forward"}, "infer": {"lorabatch: decode"}}[kind] <= names
    assert "what to change first" in capsys.readouterr().out and (folder / "memory.svg").read_text().startswith("<?xml")
    assert sorted(p.name for p in (tmp_path / "results").iterdir()) == [f"profile-{kind}"], "nothing else is written"
