"""``--dry_run``: the counts are those of the run, sizes those of the loaded model, and nothing is
written."""

import pytest
import torch
from support.commands import infer_flags, train_flags, write_lines, write_rows
from support.models import native, tiny_model

from lorabatch.cli import main
from lorabatch.config import TrainConfig
from lorabatch.machine.ceilings import cache_file, keep, note_reached
from lorabatch.model import forecast
from lorabatch.model.lora_settings import LoraSettings
from lorabatch.records import read_json, read_jsonl
from lorabatch.train.forecast import num_evaluations, work_of

CPU = torch.device("cpu")


def shown(capsys):
    """{first column: the rest} of what was printed."""
    lines = [line.strip().split("  ", 1) for line in capsys.readouterr().out.splitlines()]
    return {line[0].strip(): line[1].strip() for line in lines if len(line) == 2}


@pytest.fixture
def rate(monkeypatch):
    monkeypatch.setenv("SITE_FLOPS_PER_S", "1e9")


def test_training_says_what_the_run_then_does(tiny_llama_dir, tmp_path, capsys, rate, monkeypatch):
    rows = [{"prompt": f"Patient {i}", "completion": " sleeps. " * (i + 1)} for i in range(11)]
    data, folder = write_rows(tmp_path / "data.jsonl", rows), tmp_path / "run"
    flags = ["--epochs", "2", "--batch_size", "4", "--lora_r", "4", "--eval_every_steps", "2"]
    command = train_flags(tiny_llama_dir, data, folder, *flags)
    seen = []
    real = work_of
    monkeypatch.setattr(
        "lorabatch.train.forecast.work_of", lambda *a: seen.append(real(*a)) or seen[-1]
    )
    assert main([*command, "--dry_run"]) == 0
    forecast_ = shown(capsys)
    assert not folder.exists()
    assert main(command) == 0
    metrics, record = read_json(folder / "metrics.json"), read_json(folder / "run.json")
    train = record["data"]["train"]
    assert forecast_["steps"] == f"{metrics['steps']}, of 4 documents each"
    assert f"{train['target_tokens']:,} of {train['tokens']:,} tokens" in forecast_["supervised"]
    assert forecast_["trainable"] == f"{metrics['trainable_params']:,} parameters"
    assert (seen[0].tokens, seen[0].targets) == (metrics["total_tokens"], metrics["target_tokens"])
    steps = [e for e in read_jsonl(folder / "events.jsonl") if e["event"] == "step"]
    assert sum(e["tokens"] for e in steps) == seen[0].tokens
    assert "SITE_FLOPS_PER_S" in forecast_["time"]
    assert forecast_["ask Slurm for"].startswith("--mem=")
    evaluations = [e for e in read_jsonl(folder / "events.jsonl") if e["event"] == "eval"]
    config = TrainConfig(epochs=2, batch_size=4, eval_every_steps=2)
    assert num_evaluations(config, metrics["steps"]) == len(evaluations)


def test_inference_counts_prompts_and_tokens(tiny_llama_dir, tmp_path, capsys, rate):
    prompts = write_lines(tmp_path / "p.txt", ["one", "two and three", "z" * 5000])
    command = infer_flags(tiny_llama_dir, prompts, tmp_path / "out", "--max_new_tokens", "7")
    assert main([*command, "--dry_run"]) == 0
    rows = shown(capsys)
    assert not (tmp_path / "out").exists()
    assert rows["requests"] == "3, 1 of them cannot run"
    assert rows["new tokens"] == "14 at most"
    assert main([*command, "--ignore_eos"]) == 0
    records = read_jsonl(tmp_path / "out" / "completions.jsonl")
    assert rows["prompt tokens"] == str(sum(r["input_tokens"] for r in records if not r["error"]))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("targets", [("all-linear",), ("attn",)])
def test_sizes_are_those_of_the_loaded_model(name, targets):
    reference = tiny_model(name)
    model = native(reference)
    spec = model.spec
    adapters = model.attach(LoraSettings(r=4, target_modules=targets), seed=0)
    assert forecast.lora_params(spec, r=4, targets=targets) == adapters.num_params
    assert set(forecast.linear_shapes(spec)) == set(model.linear_shapes)
    norms = 0.02 * model.num_base_params
    assert abs(forecast.base_bytes(spec, 1, 1) - model.num_base_params) <= norms


def test_rates_are_stated_or_reached_or_usual(monkeypatch):
    monkeypatch.delenv("SITE_FLOPS_PER_S", raising=False)
    keep(cache_file(CPU), {"schema_version": 1, "fp32_cold_flops_per_s": 1e10,
                           "measurements": {"fp32_cold_flops_per_s": 3}})  # fmt: skip
    usual = forecast.rates("train", torch.float32, CPU)
    assert usual.flops_per_s == pytest.approx(0.3 * 1e10) and "30%" in usual.source
    for value in (4e9, 2e9):  # the second run was disturbed
        note_reached(forecast.reached_name("train", torch.float32), CPU, value)
    reached = forecast.rates("train", torch.float32, CPU)
    assert reached.flops_per_s == 4e9 and "earlier train" in reached.source
    monkeypatch.setenv("SITE_FLOPS_PER_S", "7e11")
    assert forecast.rates("train", torch.float32, CPU).flops_per_s == 7e11
    cache_file(CPU).unlink()


def test_a_request_has_a_reserve():
    assert forecast.request(3 * 2**30, 1000) == "--mem=4G --time=0:25:00"
    assert forecast.request(1, 3 * 3600) == "--mem=1G --time=4:30:00"


@pytest.mark.parametrize(
    ("flags", "environment", "code", "text"),
    [
        (["--target_modules", "q_prj"], {}, 64, "did you mean 'q_proj'"),
        ([], {"SITE_FLOPS_PER_S": "fast"}, 64, "SITE_FLOPS_PER_S: 'fast' is not a rate"),
    ],
)
def test_mistakes_are_found(
    tiny_llama_dir, corpus, tmp_path, capsys, monkeypatch, flags, environment, code, text
):
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    command = train_flags(tiny_llama_dir, corpus, tmp_path / "run", "--dry_run", *flags)
    assert main(command) == code
    assert text in capsys.readouterr().err


@pytest.mark.slow
def test_memory_is_within_15_percent_of_what_the_packaged_model_takes(
    tmp_path, corpus, real_model_dir
):
    """``real_model_dir``: its GGUF file was converted before, which takes more than training."""
    from support.processes import python

    folder = tmp_path / "run"
    words = ["train", "--train_path", str(corpus), "--val_path", "none", "--max_steps", "1"]
    words += ["--base_model", "smollm2-135m", "--save_dir", str(folder), "--dtype", "bf16"]
    done = python(f"from lorabatch.cli import main; raise SystemExit(main({words}))")
    assert done.returncode == 0, done.stderr
    dry = python(f"from lorabatch.cli import main; raise SystemExit(main({[*words, '--dry_run']}))")
    (line,) = (x for x in dry.stdout.splitlines() if x.strip().startswith("memory"))
    peak = read_json(folder / "metrics.json")["peak_memory_bytes"]
    assert float(line.split()[1]) * 2**30 == pytest.approx(peak, rel=0.15)
