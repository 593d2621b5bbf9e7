"""The command line as a user meets it: two commands, every kind of bad input, resume, offline."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import NATIVE_TYPES

from lorabatch.cli import COMMANDS, main
from lorabatch.config import InferConfig, TrainConfig
from lorabatch.errors import UsageError
from lorabatch.settings import parse

ROOT = Path(__file__).parents[1]
TEXTS = [f"The patient in bed {i} slept well and the monitor showed a steady rhythm {i}." for i in range(12)]


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "train.txt"
    path.write_text("\n".join(TEXTS) + "\n", encoding="utf-8")
    return path


def train_flags(model, corpus, save_dir, *more):
    flags = [
        "--base_model",
        model,
        "--train_path",
        corpus,
        "--val_path",
        corpus,
        "--save_dir",
        save_dir,
        "--max_steps",
        3,
        "--batch_size",
        4,
    ]
    return ["train", *map(str, [*flags, "--dtype", "fp32", "--lr", 0.01, *more])]


def infer_flags(model, prompts, output_dir, *more):
    flags = ["--base_model", model, "--prompts", prompts, "--output_dir", output_dir, "--max_new_tokens", 8, "--dtype", "fp32"]
    return ["infer", *map(str, [*flags, *more])]


def completions(folder):
    return {r["id"]: r for r in map(json.loads, (Path(folder) / "completions.jsonl").read_text(encoding="utf-8").splitlines())}


def without_times(folder):
    return {k: (r["text"], r["finish_reason"], r["error"]) for k, r in completions(folder).items()}


# The two commands


def test_train_then_infer_leave_complete_runs(tiny_llama_dir, corpus, tmp_path, capsys):
    run = tmp_path / "lora"
    assert main(train_flags(tiny_llama_dir, corpus, run)) == 0
    record, metrics = json.loads((run / "run.json").read_text()), json.loads((run / "metrics.json").read_text())
    assert record["status"] == "completed" and record["config"]["max_steps"] == 3 and record["environment"]["packages"]["torch"]
    steps = [e for e in map(json.loads, (run / "events.jsonl").read_text().splitlines()) if e["event"] == "step"]
    assert [e["step"] for e in steps] == [1, 2, 3]
    assert {"step", "loss", "lr", "grad_norm", "tokens", "tokens_per_s", "step_ms"} <= set(steps[0])
    names = {
        "loss",
        "eval_loss",
        "perplexity",
        "bits_per_byte",
        "epoch_s",
        "steps_per_min",
        "tokens_per_s",
        "padding_share",
        "trainable_params",
    }
    assert names | {"trainable_share", "peak_memory_bytes", "cold_share", "rss_bytes", "cpu_percent"} <= set(metrics)
    assert metrics["eval_loss"] < metrics["eval_loss_before"]
    for folder in (run, run / "best", run / "last"):
        assert (folder / "adapter_model.safetensors").exists() and (folder / "adapter_config.json").exists()
    output = tmp_path / "out"
    assert main(infer_flags(tiny_llama_dir, corpus, output, "--adapter_dir", run, "--iters", 2, "--output_order", "input")) == 0
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["completed"] == 24 and metrics["iterations"] == 2
    wanted = [
        f"{s}_{n}" for s in ("mean", "median", "std", "p50", "p90", "p95", "p99") for n in ("ttft_ms", "tpot_ms", "itl_ms", "e2el_ms")
    ]
    assert set(wanted) <= set(metrics)
    assert {"tokens_per_s", "batch_latency_p50_ms", "batch_latency_p95_ms", "request_throughput", "output_throughput"} <= set(metrics)
    assert list(completions(output)) == [str(i) for i in range(12)]
    said = capsys.readouterr().out
    assert "12 completed, 0 failed of 12 (24 measured)" in said and "ms over 2 repetitions" in said and "output tokens/s" in said


@pytest.mark.parametrize("command", [["src/train_lora.py"], ["src/infer_batch.py"], ["-m", "lorabatch"]], ids=["train", "infer", "module"])
def test_help_answers_in_a_second_without_torch(command):
    probe = "import sys, runpy; sys.argv[1:] = {argv!r}\ntry: {run}\nexcept SystemExit as e: code = e.code\nprint('torch' in sys.modules, 'transformers' in sys.modules)"
    run = (
        f"runpy.run_path({command[0]!r}, run_name='__main__')"
        if command[0] != "-m"
        else "runpy.run_module('lorabatch', run_name='__main__')"
    )
    argv = ["--help"] if command[0] != "-m" else ["train", "--help"]
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        result = subprocess.run(
            [sys.executable, "-c", f"import sys; sys.path.insert(0, 'src')\n{probe.format(argv=argv, run=run)}"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        seconds.append(time.perf_counter() - start)
        assert "--base_model" in result.stdout and result.stdout.endswith("False False\n")
    assert min(seconds) < 1


def test_the_specs_commands_parse_as_shown():
    train = "--base_model distilgpt2 --train_path data_sample/train.txt --val_path data_sample/val.txt --save_dir results/lora-custom --epochs 2 --max_steps 100 --lr 2e-4 --lora_r 16 --lora_alpha 32"
    config, _ = parse(TrainConfig, train.split(), prog="train_lora.py")
    assert (config.epochs, config.max_steps, config.lr, config.lora_r, config.lora_alpha) == (2, 100, 2e-4, 16, 32.0)
    infer = "--base_model distilgpt2 --adapter_dir results/lora-distilgpt2 --prompts data_sample/prompts.txt --batch_size 16 --max_new_tokens 64 --iters 20"
    config, _ = parse(InferConfig, infer.split(), prog="infer_batch.py")
    assert (config.batch_size, config.max_new_tokens, config.iters) == (16, 64, 20)
    config, _ = parse(TrainConfig, ["--no_cuda", "--batch-size", "4"], prog="x")
    assert config.no_cuda and config.batch_size == 4


# Settings


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_its_table_in_a_settings_file(name, tmp_path):
    path = tmp_path / "experiment.toml"
    path.write_text("".join(f"[{other.replace(' ', '.')}]\n" for other in COMMANDS), encoding="utf-8")
    config_class, _, positionals = COMMANDS[name]
    words = ["x"] * len(positionals)
    assert parse(config_class, [*words, "--config", str(path)], prog="x", positionals=positionals)[0] == config_class()
    path.write_text("[trian]\n", encoding="utf-8")
    with pytest.raises(UsageError, match=r"unknown table \[trian\]"):
        parse(config_class, [*words, "--config", str(path)], prog="x", positionals=positionals)


@pytest.mark.parametrize("config_class", [TrainConfig, InferConfig])
def test_printed_settings_read_back_to_the_same_object(config_class, tmp_path, capsys):
    command = "train" if config_class is TrainConfig else "infer"
    odd = ["--seed", "7", "--no-cuda"] + (
        ["--val_path", "none", "--target_modules", "q_proj", "v_proj"] if command == "train" else ["--stop", "a b", '"']
    )
    config, _ = parse(config_class, odd, prog="x")
    (tmp_path / "a.toml").write_text(config.to_toml(), encoding="utf-8")
    again, _ = parse(config_class, ["--config", str(tmp_path / "a.toml")], prog="x")
    assert again == config
    over, _ = parse(config_class, ["--config", str(tmp_path / "a.toml"), "--seed", "8"], prog="x")
    assert over.seed == 8
    with pytest.raises(SystemExit):
        parse(config_class, [*odd, "--print_config"], prog="x")
    assert capsys.readouterr().out == config.to_toml()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--lora_rank", "4"], "did you mean"),
        (["--lora_r", "0"], "--lora_r 0: out of range"),
        (["--lora_alpha", "-1"], "--lora_alpha"),
        (["--lr", "nan"], "finite"),
        (["--lr", "fast"], "not a number"),
        (["--batch_size", "2.5"], "not a whole number"),
        (["--scheduler", "cosin"], "did you mean 'cosine'"),
        (["stray"], "unexpected argument 'stray'"),
        (["--config", "/nonexistent.toml"], "no such file"),
    ],
)
def test_wrong_settings_are_one_line_and_64(flags, words, capsys):
    assert main(["train", *flags]) == 64
    error = capsys.readouterr().err.strip()
    assert words in error and "\n" not in error


def test_unknown_keys_and_tables_of_a_file(tmp_path):
    path = tmp_path / "a.toml"
    for text, words in (
        ("[train]\nbatchsize = 4\n", "did you mean 'batch_size'"),
        ("[trian]\n", "did you mean 'train'"),
        ("[train]\nlr = 'a'\n", "'lr' must be"),
    ):
        path.write_text(text)
        with pytest.raises(UsageError, match=words):
            parse(TrainConfig, ["--config", str(path)], prog="x")
    path.write_text("[train]\nlr = 1e-3\n[infer]\nbatch_size = 3\n")
    assert parse(TrainConfig, ["--config", str(path)], prog="x")[0].lr == 1e-3
    assert parse(InferConfig, ["--config", str(path)], prog="x")[0].batch_size == 3


def test_every_command_is_listed(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"  {name} " in out for name in COMMANDS)
    assert main(["trian"]) == 64 and "did you mean 'train'" in capsys.readouterr().err


# Bad input


@pytest.mark.parametrize(
    ("name", "content", "code", "words"),
    [
        ("missing.txt", None, 65, "no such file"),
        ("a.txt", b"", 65, "empty"),
        ("a.txt", b"ab\0cd", 65, "binary"),
        ("a.txt", "ok\nol\u00e1\n".encode("latin-1"), 65, "a.txt:2: byte 0xe1 is not UTF-8"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', 65, "a.jsonl:2: not valid JSON"),
        ("a.jsonl", b'{"text": "a"}\n{"body": "b"}\n', 65, "a.jsonl:2: no 'text'"),
        ("a.docx", b"x", 65, "unknown kind of file"),
    ],
)
def test_bad_training_files(name, content, code, words, tiny_llama_dir, tmp_path, capsys):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    assert main(train_flags(tiny_llama_dir, path, tmp_path / "run")) == code
    error = capsys.readouterr().err.strip()
    assert words in error and "\n" not in error and "Traceback" not in error
    assert not (tmp_path / "run").exists()


def test_other_mistakes_before_training(tiny_llama_dir, corpus, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(train_flags("no-such-model", corpus, tmp_path / "a")) == 69
    error = capsys.readouterr().err
    assert "HF_HOME" in error and "lorabatch fetch no-such-model" in error
    assert main(train_flags(tiny_llama_dir, corpus, tmp_path / "b", "--target_modules", "q_porj")) == 64
    assert "did you mean 'q_proj'" in capsys.readouterr().err
    assert main(train_flags(tiny_llama_dir, corpus, "/proc/nowhere/run")) == 69
    assert "cannot write it (No such file or directory); choose another --save_dir" in capsys.readouterr().err
    assert main(train_flags(tiny_llama_dir, corpus, tmp_path / "c")) == 0
    assert main(train_flags(tiny_llama_dir, corpus, tmp_path / "c")) == 64
    assert "--overwrite" in capsys.readouterr().err
    assert main(infer_flags(tiny_llama_dir, corpus, tmp_path / "c")) == 64
    assert "another kind" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty"),
        (b'{"id": 1, "prompt": "a"}\n{"id": "1", "prompt": "b"}\n', "occurs twice"),
        (b"{\n", "not valid JSON"),
        (b'{"promt": "a"}\n', "did you mean 'promt'"),
        (b'{"prompt": "a"}\n{"prompt": "b", "seed": 1, "seed": 2}\n', "p.jsonl:2: not valid JSON (the key 'seed' is there twice)"),
        (b'{"custom_id": "a", "body": {"prompt": "x", "n": 1, "n": 2}}\n', "p.jsonl:1: not valid JSON (the key 'n' is there twice)"),
    ],
)
def test_bad_prompt_files(content, words, tiny_llama_dir, tmp_path, capsys):
    (tmp_path / "p.jsonl").write_bytes(content)
    assert main(infer_flags(tiny_llama_dir, tmp_path / "p.jsonl", tmp_path / "out")) == 65
    assert words in capsys.readouterr().err


def test_adapter_mistakes(tiny_llama_dir, tiny_gpt2_dir, corpus, tmp_path, capsys):
    assert main(infer_flags(tiny_llama_dir, corpus, tmp_path / "a", "--adapter_dir", tmp_path / "none")) == 65
    assert main(train_flags(tiny_llama_dir, corpus, tmp_path / "lora")) == 0
    capsys.readouterr()
    assert main(infer_flags(tiny_gpt2_dir, corpus, tmp_path / "b", "--adapter_dir", tmp_path / "lora")) == 65
    assert "another base model" in capsys.readouterr().err
    (tmp_path / "lora" / "adapter_model.safetensors").unlink()
    assert main(infer_flags(tiny_llama_dir, corpus, tmp_path / "c", "--adapter_dir", tmp_path / "lora")) == 65
    assert "no adapter_model.safetensors" in capsys.readouterr().err


def test_a_bad_request_is_an_error_record_and_the_rest_goes_on(tiny_llama_dir, tmp_path, capsys):
    rows = [
        {"id": "good", "prompt": "The patient", "max_new_tokens": 3, "ignore_eos": True},
        {"id": "empty", "prompt": " "},
        {"id": "long", "prompt": "fever " * 400},
        {"id": "odd", "prompt": "x", "temperature": -1},
    ]
    prompts = tmp_path / "p.jsonl"
    prompts.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    assert main(infer_flags(tiny_llama_dir, prompts, tmp_path / "out", "--max_len", 60)) == 0
    done = completions(tmp_path / "out")
    assert done["good"]["finish_reason"] == "length" and done["good"]["output_tokens"] == 3
    assert [done[i]["finish_reason"] for i in ("empty", "long", "odd")] == ["error"] * 3
    assert "empty" in done["empty"]["error"] and "at most 59" in done["long"]["error"] and "temperature" in done["odd"]["error"]
    assert main(infer_flags(tiny_llama_dir, prompts, tmp_path / "cut", "--max_len", 60, "--long_prompt", "truncate_left")) == 0
    cut = completions(tmp_path / "cut")["long"]
    assert cut["truncated"] == "truncate_left" and cut["input_tokens"] == 59 and cut["error"] is None
    prompts.write_text('{"prompt": " "}\n')
    capsys.readouterr()
    assert main(infer_flags(tiny_llama_dir, prompts, tmp_path / "all")) == 65
    assert "all 1 requests failed" in capsys.readouterr().err


def test_debug_shows_where(tmp_path):
    with pytest.raises(Exception, match="no such file"):
        main(["train", "--train_path", str(tmp_path / "none.txt"), "--debug"])


# Never losing a result


def test_a_torn_run_resumes_to_the_same_completions(tiny_llama_dir, corpus, tmp_path, capsys):
    assert main(infer_flags(tiny_llama_dir, corpus, tmp_path / "whole")) == 0
    assert main(infer_flags(tiny_llama_dir, corpus, tmp_path / "torn")) == 0
    path = tmp_path / "torn" / "completions.jsonl"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    assert main(infer_flags(tiny_llama_dir, corpus, tmp_path / "torn", "--resume")) == 0
    assert without_times(tmp_path / "torn") == without_times(tmp_path / "whole")
    assert len(path.read_text(encoding="utf-8").splitlines()) == len(TEXTS)
    assert f"{len(TEXTS)} completed, 0 failed of {len(TEXTS)} (" in capsys.readouterr().out, "all of the run; fewer were measured"
    assert main(infer_flags(tiny_llama_dir, corpus, tmp_path / "torn", "--resume", "--temperature", "0.5")) == 64
    assert "another prompt, parameters" in capsys.readouterr().err


def start(command, *, log):
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with log.open("w") as output:
        return subprocess.Popen([sys.executable, "-m", "lorabatch", *command], env=environment, stdout=output, stderr=subprocess.STDOUT)


def wait_for_lines(path, count, process):
    for _ in range(1200):
        if path.exists() and path.read_bytes().count(b"\n") >= count:
            return
        assert process.poll() is None, "ended too early"
        time.sleep(0.05)
    raise AssertionError(f"{path} did not reach {count} lines")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["SIGTERM", "SIGKILL"])
def test_a_killed_inference_is_finished_by_resume(number, tiny_llama_dir, tmp_path):
    prompts = tmp_path / "p.txt"
    prompts.write_text("".join(f"Patient {i} reports\n" for i in range(300)), encoding="utf-8")
    flags = infer_flags(tiny_llama_dir, prompts, tmp_path / "out", "--batch_size", 2, "--ignore_eos", "--max_new_tokens", 20)
    process = start(flags, log=tmp_path / "log")
    wait_for_lines(tmp_path / "out" / "completions.jsonl", 6, process)
    process.send_signal(number)
    code = process.wait(timeout=60)
    assert code == (75 if number == signal.SIGTERM else -signal.SIGKILL), (tmp_path / "log").read_text()
    assert len(completions(tmp_path / "out")) < 300 or number == signal.SIGKILL
    assert main([*flags, "--resume"]) == 0
    assert sorted(completions(tmp_path / "out"), key=int) == [str(i) for i in range(300)]
    assert (tmp_path / "out" / "completions.jsonl").read_text(encoding="utf-8").count("\n") == 300


def test_an_interrupted_training_keeps_an_adapter(tiny_llama_dir, corpus, tmp_path):
    flags = train_flags(tiny_llama_dir, corpus, tmp_path / "run", "--max_steps", 100000, "--epochs", 100000, "--eval_every_steps", 100000)
    process = start(flags, log=tmp_path / "log")
    wait_for_lines(tmp_path / "run" / "events.jsonl", 4, process)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 75, (tmp_path / "log").read_text()
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "interrupted"
    assert main(infer_flags(tiny_llama_dir, corpus, tmp_path / "out", "--adapter_dir", tmp_path / "run")) == 0


def test_same_seed_same_adapter(tiny_gpt2_dir, corpus, tmp_path):
    for name in ("a", "b", "c"):
        assert main(train_flags(tiny_gpt2_dir, corpus, tmp_path / name, "--lora_dropout", 0.1, "--seed", 3 if name == "c" else 2)) == 0
    a, b, c = ((tmp_path / n / "adapter_model.safetensors").read_bytes() for n in "abc")
    assert a == b and a != c


# One batch, many batches


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "sampling", [[], ["--temperature", "0.9", "--top_p", "0.9", "--repetition_penalty", "1.2"]], ids=["greedy", "sampled"]
)
def test_a_requests_text_does_not_depend_on_the_batch(dtype, sampling, tiny_llama_dir, corpus, tmp_path):
    seen = []
    for size in (1, 2, 5, 16):
        flags = infer_flags(
            tiny_llama_dir, corpus, tmp_path / str(size), "--batch_size", size, "--dtype", dtype, "--max_new_tokens", 24, "--ignore_eos"
        )
        assert main([*flags, *sampling]) == 0
        seen.append({k: text for k, (text, _, _) in without_times(tmp_path / str(size)).items()})
    assert seen[0] == seen[1] == seen[2] == seen[3]
    assert len(set(seen[0].values())) > 1


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_real_model_gives_the_same_text_alone_and_in_any_batch(dtype, tmp_path):
    if dtype not in NATIVE_TYPES:
        pytest.skip(f"{dtype} is emulated here")
    prompts = tmp_path / "p.txt"
    lines = (ROOT / "data_sample" / "prompts.txt").read_text(encoding="utf-8").splitlines()[:24]
    prompts.write_text("\n".join(lines) + "\n", encoding="utf-8")
    (tmp_path / "r.txt").write_text("\n".join(reversed(lines)) + "\n", encoding="utf-8")
    seen = []
    for name, path, size in (("one", prompts, 1), ("seven", tmp_path / "r.txt", 7), ("all", prompts, 24)):
        assert main(infer_flags("smollm2-135m", path, tmp_path / name, "--batch_size", size, "--dtype", dtype, "--max_new_tokens", 20)) == 0
        seen.append({r["prompt"]: r["text"] for r in completions(tmp_path / name).values()})
    assert seen[0] == seen[1] == seen[2] and len(seen[0]) == 24


# Offline

GUARD = """
import socket
def refuse(*a, **k): raise AssertionError("NETWORK CALL")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
import sys; sys.path.insert(0, {src!r})
from lorabatch.cli import main
sys.exit(main({argv!r}))
"""


@pytest.mark.slow
def test_training_and_inference_make_no_network_call(tiny_llama_dir, corpus, tmp_path):
    environment = {k: v for k, v in os.environ.items() if "OFFLINE" not in k}
    lora = tmp_path / "lora"
    for argv in (train_flags(tiny_llama_dir, corpus, lora), infer_flags(tiny_llama_dir, corpus, tmp_path / "out", "--adapter_dir", lora)):
        code = GUARD.format(src=str(ROOT / "src"), argv=argv)
        result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300, check=False)
        assert result.returncode == 0 and "NETWORK CALL" not in result.stderr + result.stdout, result.stderr
    assert len(completions(tmp_path / "out")) == len(TEXTS)


@pytest.mark.parametrize(("name", "instead"), [("adapter_mode", "--adapter_dir merges one"), ("processes", "--shards N")])
def test_a_setting_that_is_gone_is_refused_with_what_serves_in_its_place(name, instead, tmp_path, capsys):
    (tmp_path / "old.toml").write_text(f'[infer]\n{name} = "1"\n')
    for flags in ([f"--{name}", "1"], ["--config", str(tmp_path / "old.toml")]):
        assert main(["infer", *flags]) == 64
        assert instead in capsys.readouterr().err
