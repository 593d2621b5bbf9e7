"""The files of configs/examples do what their comments say, on a tiny model."""

import json

import pytest
from support.commands import completions
from support.paths import ROOT

from lorabatch.cli import main

EXAMPLES = ROOT / "configs" / "examples"
SHORT = ["--max_steps", "2", "--max_val_documents", "2", "--max_len", "32", "--no_cuda"]


@pytest.fixture(autouse=True)
def in_the_checkout(monkeypatch):
    monkeypatch.chdir(ROOT)


def test_an_experiment(tiny_llama_dir, tmp_path):
    config = ["--config", str(EXAMPLES / "experiment.toml"), "--base_model", str(tiny_llama_dir)]
    adapter, answers = tmp_path / "adapter", tmp_path / "answers"
    assert main(["train", *config, *SHORT, "--save_dir", str(adapter)]) == 0
    folders = ["--adapter_dir", str(adapter), "--output_dir", str(answers)]
    assert (
        main(
            ["infer", *config, *folders, "--max_new_tokens", "9", "--long_prompt", "truncate_left"]
        )
        == 0
    )
    records = completions(answers)
    # the tiny model has 128 positions: after a longer prompt there is no room for eight tokens
    roomy = [r["output_tokens"] for r in records if r["input_tokens"] <= 120]
    assert len(records) == 48 and len(roomy) > 24 and min(roomy) >= 8


def test_several_adapters_over_one_base(tiny_llama_dir, tmp_path):
    flags = ["--jobs", str(EXAMPLES / "jobs.jsonl"), "--save_dir", str(tmp_path / "grid")]
    assert main(["train", "--base_model", str(tiny_llama_dir), *flags, *SHORT]) == 0
    ranks = {
        path.parent.name: json.loads(path.read_text())["r"]
        for path in tmp_path.glob("grid/*/adapter_config.json")
    }
    assert ranks == {"english": 16, "portuguese": 16, "portuguese-r32": 32}


@pytest.mark.slow
def test_a_sweep(tiny_llama_dir, tmp_path):
    text = (EXAMPLES / "sweep.toml").read_text()
    text = text.replace('"smollm2-135m"', f'"{tiny_llama_dir}"').replace("= 30", "= 1")
    file = tmp_path / "sweep.toml"
    file.write_text(text)
    assert main(["sweep", str(file), "--output_dir", str(tmp_path / "out")]) == 0
    board = (tmp_path / "out" / "LEADERBOARD.md").read_text()
    assert all(rate in board for rate in ("0.0001", "0.0002", "0.0005"))
