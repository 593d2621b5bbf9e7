"""The command line as a user meets it: two commands, every kind of bad input, resume, offline."""

import dataclasses
import json
import re
import signal
import subprocess
import sys
import time

import pytest
from support import commands
from support.commands import TEXTS, write_lines, write_rows
from support.models import NATIVE_TYPES
from support.paths import ROOT, SAMPLE
from support.processes import ENVIRONMENT, start, wait_for_lines

from lorabatch.cli import COMMANDS, main
from lorabatch.config import InferConfig
from lorabatch.metrics.schema import TrainMetrics
from lorabatch.train.figures import print_summary


def train_flags(model, corpus, save_dir, *more):
    fixed = ["--max_steps", 3, "--batch_size", 4, "--lr", 0.01]
    return commands.train_flags(model, corpus, save_dir, *fixed, *more)


def infer_flags(model, prompts, output_dir, *more):
    return commands.infer_flags(model, prompts, output_dir, "--max_new_tokens", 8, *more)


def completions(folder):
    return {record["id"]: record for record in commands.completions(folder)}


def without_times(folder):
    return {k: (r["text"], r["finish_reason"], r["error"]) for k, r in completions(folder).items()}


# The two commands


def test_train_then_infer_leave_complete_runs(tiny_llama_dir, corpus, tmp_path, capsys):
    run = tmp_path / "lora"
    assert main(train_flags(tiny_llama_dir, corpus, run)) == 0
    record, metrics = (
        json.loads((run / "run.json").read_text()),
        json.loads((run / "metrics.json").read_text()),
    )
    assert (
        record["status"] == "completed"
        and record["config"]["max_steps"] == 3
        and record["environment"]["packages"]["torch"]
    )
    steps = [
        e
        for e in map(json.loads, (run / "events.jsonl").read_text().splitlines())
        if e["event"] == "step"
    ]
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
    assert names | {
        "trainable_share",
        "peak_memory_bytes",
        "cold_share",
        "rss_bytes",
        "cpu_percent",
    } <= set(metrics)
    assert metrics["eval_loss"] < metrics["eval_loss_before"]
    for folder in (run, run / "best", run / "last"):
        assert (folder / "adapter_model.safetensors").exists() and (
            folder / "adapter_config.json"
        ).exists()
    output = tmp_path / "out"
    assert (
        main(
            infer_flags(
                tiny_llama_dir,
                corpus,
                output,
                "--adapter_dir",
                run,
                "--iters",
                2,
                "--output_order",
                "input",
            )
        )
        == 0
    )
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["completed"] == 24 and metrics["iterations"] == 2
    wanted = [
        f"{s}_{n}"
        for s in ("mean", "median", "std", "p50", "p90", "p95", "p99")
        for n in ("ttft_ms", "tpot_ms", "itl_ms", "e2el_ms")
    ]
    assert set(wanted) <= set(metrics)
    assert {
        "tokens_per_s",
        "batch_latency_p50_ms",
        "batch_latency_p95_ms",
        "request_throughput",
        "output_throughput",
    } <= set(metrics)
    assert list(completions(output)) == [str(i) for i in range(12)]
    said = capsys.readouterr().out
    assert (
        "12 completed, 0 failed of 12 (24 measured)" in said
        and "ms over 2 repetitions" in said
        and re.search(r"time per epoch +\d+:\d\d\n", said)
        and "output tokens/s" in said
    )


@pytest.mark.slow
def test_standard_error_holds_what_we_say_and_no_noise_of_libraries(
    tiny_llama_dir, corpus, tmp_path
):
    """transformers and peft warn each other of what they will change; bitsandbytes misses a
    package; TRANSFORMERS_CACHE is honoured, and we say so once."""
    flags = train_flags(tiny_llama_dir, corpus, tmp_path / "lora", "--backend", "hf")
    done = subprocess.run(
        [sys.executable, "-m", "lorabatch", *map(str, flags)],
        env=ENVIRONMENT | {"TRANSFORMERS_CACHE": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    told = "transformers 5 ignores TRANSFORMERS_CACHE: its folder is taken as HF_HUB_CACHE"
    assert lines.count(told) == 1
    ours = (told, "backend: transformers", "step ", "train: ")
    assert [line for line in lines if not line.startswith(ours)] == []


def test_an_epoch_that_was_not_completed_is_estimated_on_the_console(tmp_path, capsys):
    """16 steps at 3 s each."""
    for measured, shown in ((None, "about 0:48 at this rate (none completed)"), (75.0, "1:15")):
        metrics = TrainMetrics(steps=4, planned_steps=4, train_s=12.0, epoch_s=measured)
        print_summary(metrics, tmp_path, "best", epoch_steps=16)
        assert f"  {shown}\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    "command",
    [["src/train_lora.py"], ["src/infer_batch.py"], ["-m", "lorabatch"]],
    ids=["train", "infer", "module"],
)
def test_help_answers_in_a_second_without_torch(command):
    probe = (
        "import sys, runpy; sys.argv[1:] = {argv!r}\ntry: {run}\nexcept SystemExit as e: code = "
        "e.code\nprint('torch' in sys.modules, 'transformers' in sys.modules)"
    )
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
            [
                sys.executable,
                "-c",
                f"import sys; sys.path.insert(0, 'src')\n{probe.format(argv=argv, run=run)}",
            ],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        seconds.append(time.perf_counter() - start)
        assert "--base_model" in result.stdout and result.stdout.endswith("False False\n")
    assert min(seconds) < 1


def test_every_command_is_listed(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"  {name} " in out for name in COMMANDS)
    assert main(["trian"]) == 64 and "did you mean 'train'" in capsys.readouterr().err


@pytest.mark.parametrize("group", ["bench", "profile"])
def test_a_group_of_commands_lists_its_own(group, capsys):
    assert main([group, "--help"]) == main([group, "-h"]) == 0
    assert main([group]) == 64, "something is missing"
    shown = capsys.readouterr().out
    listed = {name for name in COMMANDS if f"  {name} " in shown}
    assert listed == {name for name in COMMANDS if name.startswith(f"{group} ")}


def test_help_shows_every_default_and_the_choices_of_a_flag(capsys):
    """Also defaults that are 0; a switch is off."""
    with pytest.raises(SystemExit):
        main(["infer", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "--temperature X 0: greedy [0.0]" in shown and "(0: all) [0]" in shown
    assert "--quantize {none,int8} int8: 8-bit" in shown and "--seed N seed of sampling" in shown
    assert "[False]" not in shown and "TEXT {" not in shown
    fields = [f for f in dataclasses.fields(InferConfig) if type(f.default) in (int, float, str)]
    assert len(fields) > 20 and all(f"[{f.default}]" in shown for f in fields)


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
    assert (
        main(train_flags(tiny_llama_dir, corpus, tmp_path / "b", "--target_modules", "q_porj"))
        == 64
    )
    assert "did you mean 'q_proj'" in capsys.readouterr().err
    assert main(train_flags(tiny_llama_dir, corpus, "/proc/nowhere/run")) == 69
    assert (
        "cannot write it (No such file or directory); choose another --save_dir"
        in capsys.readouterr().err
    )
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
        (b'{"prompt": "a"}\n{"id": 7}\n', "p.jsonl:2: no 'prompt', 'question' or 'messages'"),
        (
            b'{"prompt": "a"}\n{"prompt": "b", "seed": 1, "seed": 2}\n',
            "p.jsonl:2: not valid JSON (duplicate key 'seed')",
        ),
        (
            b'{"custom_id": "a", "body": {"prompt": "x", "n": 1, "n": 2}}\n',
            "p.jsonl:1: not valid JSON (duplicate key 'n')",
        ),
    ],
)
def test_bad_prompt_files(content, words, tiny_llama_dir, tmp_path, capsys):
    (tmp_path / "p.jsonl").write_bytes(content)
    assert main(infer_flags(tiny_llama_dir, tmp_path / "p.jsonl", tmp_path / "out")) == 65
    assert words in capsys.readouterr().err


def test_adapter_mistakes(tiny_llama_dir, tiny_gpt2_dir, corpus, tmp_path, capsys):
    assert (
        main(
            infer_flags(tiny_llama_dir, corpus, tmp_path / "a", "--adapter_dir", tmp_path / "none")
        )
        == 65
    )
    assert main(train_flags(tiny_llama_dir, corpus, tmp_path / "lora")) == 0
    capsys.readouterr()
    assert (
        main(infer_flags(tiny_gpt2_dir, corpus, tmp_path / "b", "--adapter_dir", tmp_path / "lora"))
        == 65
    )
    assert "another base model" in capsys.readouterr().err
    (tmp_path / "lora" / "adapter_model.safetensors").unlink()
    assert (
        main(
            infer_flags(tiny_llama_dir, corpus, tmp_path / "c", "--adapter_dir", tmp_path / "lora")
        )
        == 65
    )
    assert "no adapter_model.safetensors" in capsys.readouterr().err


def test_a_bad_request_is_an_error_record_and_the_rest_goes_on(tiny_llama_dir, tmp_path, capsys):
    rows = [
        {"id": "good", "prompt": "The patient", "max_new_tokens": 3, "ignore_eos": True},
        {"id": "empty", "prompt": " "},
        {"id": "long", "prompt": "fever " * 400},
        {"id": "odd", "prompt": "x", "temperature": -1},
    ]
    prompts = tmp_path / "p.jsonl"
    write_rows(prompts, rows)
    assert main(infer_flags(tiny_llama_dir, prompts, tmp_path / "out", "--max_len", 60)) == 0
    done = completions(tmp_path / "out")
    assert done["good"]["finish_reason"] == "length" and done["good"]["output_tokens"] == 3
    assert [done[i]["finish_reason"] for i in ("empty", "long", "odd")] == ["error"] * 3
    assert (
        "empty" in done["empty"]["error"]
        and "at most 59" in done["long"]["error"]
        and "temperature" in done["odd"]["error"]
    )
    assert (
        main(
            infer_flags(
                tiny_llama_dir,
                prompts,
                tmp_path / "cut",
                "--max_len",
                60,
                "--long_prompt",
                "truncate_left",
            )
        )
        == 0
    )
    cut = completions(tmp_path / "cut")["long"]
    assert (
        cut["truncated"] == "truncate_left" and cut["input_tokens"] == 59 and cut["error"] is None
    )
    prompts.write_text('{"prompt": " "}\n')
    capsys.readouterr()
    assert main(infer_flags(tiny_llama_dir, prompts, tmp_path / "all")) == 65
    assert "all 1 requests failed" in capsys.readouterr().err


def test_debug_shows_where(tmp_path):
    with pytest.raises(Exception, match="no such file"):
        main(["train", "--train_path", str(tmp_path / "none.txt"), "--debug"])


def test_empty_texts_are_counted(tiny_llama_dir, tmp_path, capsys):
    prompts = write_lines(tmp_path / "one.txt", ["The patient"])
    assert main(infer_flags(tiny_llama_dir, prompts, tmp_path / "free")) == 0
    first = completions(tmp_path / "free")["0"]["text"].lstrip()[0]
    rows = [{"prompt": "The patient"}, {"prompt": "The patient", "stop": [first]}]
    prompts = write_rows(tmp_path / "two.jsonl", rows)
    capsys.readouterr()
    assert main(infer_flags(tiny_llama_dir, prompts, tmp_path / "stopped")) == 0
    assert "2 completed (1 with an empty text), 0 failed of 2" in capsys.readouterr().out


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
    assert f"{len(TEXTS)} completed, 0 failed of {len(TEXTS)} (" in capsys.readouterr().out, (
        "all of the run; fewer were measured"
    )
    assert (
        main(
            infer_flags(
                tiny_llama_dir, corpus, tmp_path / "torn", "--resume", "--temperature", "0.5"
            )
        )
        == 64
    )
    assert "another prompt, parameters" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["SIGTERM", "SIGKILL"])
def test_a_killed_inference_is_finished_by_resume(number, tiny_llama_dir, tmp_path):
    prompts = tmp_path / "p.txt"
    write_lines(prompts, (f"Patient {i} reports" for i in range(300)))
    flags = infer_flags(
        tiny_llama_dir,
        prompts,
        tmp_path / "out",
        "--batch_size",
        2,
        "--ignore_eos",
        "--max_new_tokens",
        20,
    )
    process = start(flags, log=tmp_path / "log")
    wait_for_lines(tmp_path / "out" / "completions.jsonl", 6, process)
    process.send_signal(number)
    code = process.wait(timeout=60)
    assert code == (75 if number == signal.SIGTERM else -signal.SIGKILL), (
        tmp_path / "log"
    ).read_text()
    assert len(completions(tmp_path / "out")) < 300 or number == signal.SIGKILL
    assert main([*flags, "--resume"]) == 0
    assert sorted(completions(tmp_path / "out"), key=int) == [str(i) for i in range(300)]
    assert (tmp_path / "out" / "completions.jsonl").read_text(encoding="utf-8").count("\n") == 300


def test_an_interrupted_training_keeps_an_adapter(tiny_llama_dir, corpus, tmp_path):
    flags = train_flags(
        tiny_llama_dir,
        corpus,
        tmp_path / "run",
        "--max_steps",
        100000,
        "--epochs",
        100000,
        "--eval_every_steps",
        100000,
    )
    process = start(flags, log=tmp_path / "log")
    wait_for_lines(tmp_path / "run" / "events.jsonl", 4, process)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 75, (tmp_path / "log").read_text()
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "interrupted"
    assert (
        main(
            infer_flags(tiny_llama_dir, corpus, tmp_path / "out", "--adapter_dir", tmp_path / "run")
        )
        == 0
    )


def test_same_seed_same_adapter(tiny_gpt2_dir, corpus, tmp_path):
    for name in ("a", "b", "c"):
        assert (
            main(
                train_flags(
                    tiny_gpt2_dir,
                    corpus,
                    tmp_path / name,
                    "--lora_dropout",
                    0.1,
                    "--seed",
                    3 if name == "c" else 2,
                )
            )
            == 0
        )
    a, b, c = ((tmp_path / n / "adapter_model.safetensors").read_bytes() for n in "abc")
    assert a == b and a != c


# One batch, many batches


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "sampling",
    [[], ["--temperature", "0.9", "--top_p", "0.9", "--repetition_penalty", "1.2"]],
    ids=["greedy", "sampled"],
)
def test_a_requests_text_does_not_depend_on_the_batch(
    dtype, sampling, tiny_llama_dir, corpus, tmp_path
):
    seen = []
    for size in (1, 2, 5, 16):
        flags = infer_flags(
            tiny_llama_dir,
            corpus,
            tmp_path / str(size),
            "--batch_size",
            size,
            "--dtype",
            dtype,
            "--max_new_tokens",
            24,
            "--ignore_eos",
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
    lines = (SAMPLE / "prompts.txt").read_text(encoding="utf-8").splitlines()[:12]
    write_lines(prompts, lines)
    write_lines(tmp_path / "r.txt", reversed(lines))
    seen = []
    for name, path, size in (
        ("one", prompts, 1),
        ("five", tmp_path / "r.txt", 5),
        ("all", prompts, 12),
    ):
        assert (
            main(
                infer_flags(
                    "smollm2-135m",
                    path,
                    tmp_path / name,
                    *commands.ALL_CORES,
                    "--batch_size",
                    size,
                    "--dtype",
                    dtype,
                    "--max_new_tokens",
                    12,
                )
            )
            == 0
        )
        seen.append({r["prompt"]: r["text"] for r in completions(tmp_path / name).values()})
    assert seen[0] == seen[1] == seen[2] and len(seen[0]) == 12
