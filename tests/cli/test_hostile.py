"""What users do without meaning harm: readers that leave, two runs in one folder, damaged models,
names that are no UTF-8."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import commands
from support.commands import completions, write_lines
from support.processes import ENVIRONMENT

from lorabatch.cli import main

HOLD = """
import sys
from pathlib import Path
from lorabatch.runs import RunFolder
run = RunFolder.create(Path(sys.argv[1]), kind="train", config={}, command=[], environment={}, folder_flag="--save_dir")
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def prompts(tmp_path):
    return write_lines(tmp_path / "prompts.txt", ["The patient has a fever", "chest pain", "rest"])


def infer_flags(model, prompts, output_dir, *more):
    return commands.infer_flags(model, prompts, output_dir, "--max_new_tokens", 4, *more)


def train_flags(model, corpus, save_dir, *more):
    fixed = ["--val_path", "none", "--max_steps", 1]
    return commands.train_flags(model, corpus, save_dir, *fixed, *more)


@pytest.mark.slow
def test_a_reader_that_leaves_does_not_end_the_run(tiny_llama_dir, prompts, tmp_path):
    """Like ``lorabatch infer ... 2>&1 | head -0``: nobody reads, from the first word on."""
    read, write = os.pipe()
    os.close(read)
    command = [
        sys.executable,
        "-m",
        "lorabatch",
        *infer_flags(tiny_llama_dir, prompts, tmp_path / "out"),
    ]
    code = subprocess.run(
        command, env=ENVIRONMENT, stdout=write, stderr=write, timeout=600, check=False
    ).returncode
    os.close(write)
    assert code == 0
    assert json.loads((tmp_path / "out" / "run.json").read_text())["status"] == "completed"
    assert len(completions(tmp_path / "out")) == 3


def test_a_run_folder_has_one_writer_until_it_is_gone(tiny_llama_dir, prompts, tmp_path, capsys):
    run = tmp_path / "run"
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run)],
        env=ENVIRONMENT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout.readline() == "ready\n"
        before = (run / "run.json").read_bytes()
        for flags in (["--resume", "auto"], ["--overwrite"]):
            assert main(train_flags(tiny_llama_dir, prompts, run, *flags)) == 69
            words = (
                f"another process is using this run folder (process {other.pid} on "
                f"{os.uname().nodename}); wait until it ends"
            )
            assert words in capsys.readouterr().err
            assert (run / "run.json").read_bytes() == before
        other.send_signal(signal.SIGKILL)
        other.wait()
    # what it left does not stand in the way
    assert main(train_flags(tiny_llama_dir, prompts, run, "--resume", "auto")) == 0
    assert main(train_flags(tiny_llama_dir, prompts, run, "--overwrite")) == 0


def test_a_refused_resume_changes_nothing(tiny_llama_dir, prompts, tmp_path, capsys):
    flags = infer_flags(tiny_llama_dir, prompts, tmp_path / "out")
    assert main(flags) == 0
    before = (tmp_path / "out" / "run.json").read_bytes()
    assert main([*flags, "--resume", "--temperature", "1"]) == 64
    assert "another prompt, parameters, model or adapter" in capsys.readouterr().err
    assert (tmp_path / "out" / "run.json").read_bytes() == before
    assert main([*flags, "--resume", "--overwrite"]) == 64
    assert "--resume --overwrite: mutually exclusive; leave one out" in capsys.readouterr().err


def test_names_that_are_no_utf8(tiny_llama_dir, prompts, tmp_path):
    """Linux allows any bytes; Python holds them as half surrogate pairs, which neither JSON files
    nor terminals take as they are."""
    named = Path(os.fsdecode(os.fsencode(tmp_path) + b"/pr\xffmpts.txt"))
    shutil.copy(prompts, named)
    out = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xe9"))
    assert main(infer_flags(tiny_llama_dir, named, out)) == 0
    assert json.loads((out / "run.json").read_text())["config"]["prompts"] == str(named)
    assert main(["report", str(out), "--output_dir", str(tmp_path / "report")]) == 0
    assert r"\udce9" in (tmp_path / "report" / "RELATORIO.md").read_text(encoding="utf-8").replace(
        "\\\\", "\\"
    )


@pytest.mark.parametrize(
    ("file", "damage", "words"),
    [
        ("model.safetensors", lambda b: b[: len(b) // 2], "not a readable safetensors file"),
        ("model.safetensors", lambda b: b"", "not a readable safetensors file"),
        (
            "config.json",
            lambda b: b'{"model_type": "llama", "hidden_size": "x"}',
            "config.json cannot be used",
        ),
        ("tokenizer.json", lambda b: b'{"model": 1}', "no usable tokenizer"),
        ("generation_config.json", lambda b: b"{", "generation_config.json: not readable"),
    ],
)
def test_a_damaged_model_is_one_line(file, damage, words, tiny_llama_dir, prompts, tmp_path, capfd):
    model = tmp_path / "model"
    shutil.copytree(tiny_llama_dir, model)
    (model / file).write_bytes(damage((model / file).read_bytes()))
    assert main(infer_flags(model, prompts, tmp_path / "out")) == 65
    error = capfd.readouterr().err
    assert words in error and error.count("\n") == 1


def test_old_weights_that_are_damaged_or_could_run_code(tiny_llama_dir, prompts, tmp_path, capsys):
    model = tmp_path / "model"
    shutil.copytree(tiny_llama_dir, model)
    (model / "model.safetensors").unlink()
    # the second is a pickle that calls os.system
    for content in (b"garbage", b"cos\nsystem\n(S'true'\ntR."):
        (model / "pytorch_model.bin").write_bytes(content)
        assert main(infer_flags(model, prompts, tmp_path / "out", "--overwrite")) == 65
        assert "pytorch_model.bin: not readable as weights alone" in capsys.readouterr().err


def test_an_adapter_that_diverged_is_refused(tiny_llama_dir, prompts, tmp_path, capsys):
    run = tmp_path / "lora"
    assert main(train_flags(tiny_llama_dir, prompts, run)) == 0
    path = run / "adapter_model.safetensors"
    tensors = load_file(path)
    first = min(tensors)
    tensors[first][0, 0] = torch.nan
    save_file(tensors, path)
    assert main(infer_flags(tiny_llama_dir, prompts, tmp_path / "out", "--adapter_dir", run)) == 65
    assert "holds values that are not finite" in capsys.readouterr().err


def test_almost_no_temperature_is_greedy(tiny_llama_dir, prompts, tmp_path):
    found = []
    for value in ("0", "1e-300"):
        flags = infer_flags(
            tiny_llama_dir,
            prompts,
            tmp_path / value,
            "--temperature",
            value,
            "--output_order",
            "input",
            "--ignore_eos",
        )
        assert main(flags) == 0
        found.append([record["text"] for record in completions(tmp_path / value)])
    assert found[0] == found[1] and len(found[0]) == 3


@pytest.mark.parametrize(
    "make", [os.mkfifo, lambda path: path.symlink_to(os.devnull)], ids=["pipe", "device"]
)
def test_prompts_must_be_a_file(make, tmp_path, capsys):
    make(tmp_path / "p.txt")
    assert main(infer_flags("any", tmp_path / "p.txt", tmp_path / "out")) == 65
    assert "not a regular file; write it to a file first" in capsys.readouterr().err


def test_a_diverged_evaluation_is_never_the_best(tiny_llama_dir, prompts, tmp_path, capsys):
    flags = train_flags(
        tiny_llama_dir,
        prompts,
        tmp_path / "run",
        "--val_path",
        prompts,
        "--max_steps",
        3,
        "--batch_size",
        1,
    )
    assert main([*flags, "--eval_every_steps", "1", "--lr", "1e30"]) == 70
    error = capsys.readouterr().err
    assert "eval loss nan" in error and "(best)" not in error
    assert not (tmp_path / "run" / "best").exists()


def test_what_the_system_refuses_is_one_line_and_69(tiny_llama_dir, prompts, tmp_path, capsys):
    for words in (
        ["fetch", str(tiny_llama_dir), "--to", str(prompts)],
        ["doctor", "--output_dir", str(prompts / "x"), "--json"],
    ):
        assert main(words) == 69
    assert f"lorabatch fetch: {prompts}: File exists; check the path" in capsys.readouterr().err
