"""Sharded inference without a cluster: the same completions as in one run, from whoever computes them."""

import json
import subprocess
import sys

import pytest

from lorabatch.cli import main
from lorabatch.cluster import child

pytestmark = pytest.mark.slow


@pytest.fixture
def words(tiny_llama_dir, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    rows = [{"id": f"p{i}", "prompt": f"The patient in bed {i} has a fever"} for i in range(9)]
    rows[4] = {"id": "bad", "prompt": ""}
    rows[7]["n"] = 2
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--base_model", tiny_llama_dir, "--prompts", prompts, "--dtype", "fp32", "--threads", 1, "--max_new_tokens", 6]
    return ["infer", *map(str, flags), "--temperature", "0.9", "--output_order", "input"]


def completions(folder):
    lines = [json.loads(line) for line in (folder / "completions.jsonl").read_text().splitlines()]
    return [(r["id"], r["sample"], r["index"], r["seed"], r["text"], r["error"], r["key"]) for r in lines]


def test_two_processes_give_what_one_run_gives_and_doing_it_again_changes_nothing(words, tmp_path, capsys):
    whole, shared = tmp_path / "whole", tmp_path / "shared"
    assert main([*words, "--output_dir", str(whole)]) == 0
    sharded = [*words, "--output_dir", str(shared), "--shards", "3"]
    other = subprocess.Popen([sys.executable, "-m", "lorabatch", *sharded, "--leave_early"])
    assert main(sharded) == 0
    assert other.wait(timeout=300) == 0
    assert completions(shared) == completions(whole) and len(completions(whole)) == 10
    metrics, reference = (json.loads((f / "metrics.json").read_text()) for f in (shared, whole))
    for name in ("completed", "failed", "total_input_tokens", "total_output_tokens"):
        assert metrics[name] == reference[name], name
    before = sorted(p for p in shared.rglob("*") if p.is_file())
    assert main(sharded) == 0
    assert sorted(p for p in shared.rglob("*") if p.is_file()) == before and completions(shared) == completions(whole)
    assert main(["report", str(whole), str(shared), "--output_dir", str(tmp_path / "report")]) == 0

    capsys.readouterr()
    assert main([*sharded, "--max_new_tokens", "7"]) == 64
    assert "max_new_tokens" in capsys.readouterr().err
    assert main([*words, "--output_dir", str(whole), "--shards", "3"]) == 64


def test_a_mistake_that_every_shard_would_make_ends_the_work_with_its_code(words, tmp_path, capsys):
    flags = [*words, "--output_dir", str(tmp_path / "out"), "--shards", "2", "--base_model", "no/such-model"]
    assert main(flags) == 69
    assert "no/such-model" in capsys.readouterr().err
    assert not list((tmp_path / "out").rglob("DONE.json"))


def test_another_adapter_in_the_same_folder_is_other_work(words, tmp_path, capsys):
    weights = tmp_path / "adapter/adapter_model.safetensors"
    weights.parent.mkdir()
    weights.write_bytes(b"one")
    sharded = [*words, f"--adapters=a={weights.parent}", "--output_dir", str(tmp_path / "out"), "--shards", "2"]
    assert main(sharded) == 65, "these weights are none, but the plan stands"
    for changed in (weights, weights.with_name("adapter_config.json")):
        before = changed.read_bytes() if changed.exists() else None
        changed.write_bytes(b"two")
        assert main(sharded) == 64 and "adapters_sha256" in capsys.readouterr().err
        changed.write_bytes(before) if before else changed.unlink()


def test_when_every_process_dies_nothing_is_blamed_on_the_prompts(words, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(child.sys, "executable", "/bin/false")
    assert main([*words, "--output_dir", str(tmp_path / "out"), "--shards", "2"]) == 70
    assert "every process dies" in capsys.readouterr().err
    assert not list((tmp_path / "out").rglob("DONE.json"))


@pytest.mark.parametrize("rows", ["3", "5:2", "a:b", "-1:4", "4:4"])
def test_ranges_that_are_none(words, tmp_path, rows):
    assert main([*words, "--output_dir", str(tmp_path / "out"), f"--rows={rows}"]) == 64
