"""Runs of inference as jobs: what goes in and out, what a kill, a full disk or too little memory
leaves behind."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.commands import ALL_CORES, infer_flags, write_lines, write_rows
from support.models import (
    LLAMA,
    VOCAB,
    native,
    save_model,
    tiny_model,
)
from support.paths import SAMPLE
from support.processes import ENVIRONMENT, python
from support.tape import Tape

from lorabatch.cli import main
from lorabatch.infer import passes
from lorabatch.infer.runners.fixed import FixedRunner
from lorabatch.infer.runners.graph import GraphRunner
from lorabatch.infer.runners.program import unsupported
from lorabatch.records import read_jsonl


def texts(folder):
    """{(id, sample): what does not depend on time}; a completion that is there twice is an
    error."""
    records = list(read_jsonl(Path(folder) / "completions.jsonl"))
    found = {
        (r["id"], r["sample"]): (r["text"], r["finish_reason"], r["output_tokens"], r["error"])
        for r in records
    }
    assert len(found) == len(records)
    return found


# In and out


def test_least_lengths_agree_with_transformers(tiny_llama_dir, tmp_path):
    """Of a model whose head makes its end-of-text token the likeliest one after every prompt."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_dir)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.config.tie_word_embeddings = False
    ids = tokenizer(["The patient has"], return_tensors="pt")
    with torch.no_grad():
        hidden = model.model(**ids).last_hidden_state[0, -1]
        model.lm_head.weight[tokenizer.eos_token_id] = hidden
    folder = tmp_path / "ends-at-once"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    prompts = write_rows(tmp_path / "p.jsonl", [{"prompt": "The patient has"}])
    for least in (0, 5):
        out = tmp_path / f"out-{least}"
        words = ["--min_new_tokens", str(least), "--max_new_tokens", "9"]
        assert main(infer_flags(folder, prompts, out, *words)) == 0
        (record,) = read_jsonl(out / "completions.jsonl")
        expected = model.generate(
            **ids, min_new_tokens=least, max_new_tokens=9, do_sample=False, pad_token_id=0
        )[0, ids["input_ids"].shape[1] :]
        text = tokenizer.decode(expected, skip_special_tokens=True)
        assert record["text"] == text and record["output_tokens"] == len(expected) > least - 1
        assert (record["output_tokens"] == 1) == (least == 0)


def test_parts_of_a_message_are_joined_and_what_is_no_text_is_said(
    tiny_llama_dir, tmp_path, capsys
):
    def row(id, *parts):
        return {"id": id, "messages": [{"role": "user", "content": list(parts)}]}

    text = {"type": "text", "text": "fever"}
    rows = [
        row("joined", text, {"type": "text", "text": "?"}),
        row("picture", text, {"type": "image_url", "image_url": {"url": "x"}}),
        row("picture 2", {"type": "image_url", "image_url": {"url": "x"}}),
        {"id": "plain", "messages": [{"role": "user", "content": "fever?"}]},
        {"id": "empty", "prompt": ""},
    ]
    out = tmp_path / "out"
    words = infer_flags(tiny_llama_dir, write_rows(tmp_path / "p.jsonl", rows), out)
    assert main(words) == 0
    found = {r["id"]: r for r in read_jsonl(out / "completions.jsonl")}
    assert found["joined"]["prompt"] == found["plain"]["prompt"]
    assert found["picture"]["error"] == (
        "a part of a message's content is of type 'image_url'; only text is read"
    )
    said = capsys.readouterr().err
    assert "warning: 3 requests failed; most often (2 times): a part of a message's content" in said
    assert main([*words, "--overwrite", "--fail_on_error"]) == 65
    assert "3 requests failed, 2 completed (--fail_on_error)" in capsys.readouterr().err


def test_openai_lines_in_and_out(tiny_llama_dir, tmp_path, capsys):
    chat = {
        "messages": [{"role": "user", "content": "fever?"}],
        "max_tokens": 4,
        "ignore_eos": True,
    }
    bodies = {
        "chat": (
            "chat/completions",
            chat
            | {
                "n": 2,
                "temperature": 0.9,
                "seed": 7,
                "logprobs": True,
                "top_logprobs": 2,
                "user": None,
            },
        ),
        "text": (
            "completions",
            {
                "prompt": "The patient",
                "max_tokens": 3,
                "logprobs": 1,
                "model": "any",
                "ignore_eos": True,
            },
        ),
        "hot": ("completions", {"prompt": "x", "temperature": -1, "stream": False}),
        "vectors": ("embeddings", {"input": "x"}),
        "image": ("completions", {"prompt": {"image": 1}}),
    }
    rows = [
        {"custom_id": k, "method": "POST", "url": f"/v1/{url}", "body": body}
        for k, (url, body) in bodies.items()
    ]
    prompts = write_rows(tmp_path / "p.jsonl", rows)
    assert (
        main(infer_flags(tiny_llama_dir, prompts, tmp_path / "out", "--output_format", "openai"))
        == 0
    )
    assert "ignored fields of the prompts: input, model, stream\n" in capsys.readouterr().out
    lines = list(read_jsonl(tmp_path / "out" / "batch_output.jsonl"))
    assert [line["custom_id"] for line in lines] == list(bodies)
    assert all(set(line) == {"id", "custom_id", "response", "error"} for line in lines)
    body = lines[0]["response"]["body"]
    assert lines[0]["response"]["status_code"] == 200 and body["object"] == "chat.completion"
    first, second = body["choices"]
    assert (first["index"], second["index"], first["finish_reason"], first["message"]["role"]) == (
        0,
        1,
        "length",
        "assistant",
    )
    assert first["message"]["content"] != second["message"]["content"]
    entries = first["logprobs"]["content"]
    assert len(entries) == 4 and len(entries[0]["top_logprobs"]) == 2 and entries[0]["logprob"] < 0
    assert (
        body["usage"]["completion_tokens"] == 8
        and body["usage"]["total_tokens"] == 8 + body["usage"]["prompt_tokens"]
    )
    text = lines[1]["response"]["body"]["choices"][0]
    assert (
        lines[1]["response"]["body"]["object"] == "text_completion"
        and len(text["logprobs"]["token_logprobs"]) == 3
    )
    errors = [line["error"]["message"] for line in lines[2:]]
    assert (
        "temperature" in errors[0]
        and "/v1/embeddings" in errors[1]
        and "'prompt' is dict" in errors[2]
    )
    assert [line["response"] for line in lines[2:]] == [None] * 3


def test_our_rows_mean_the_same_as_openais(tiny_llama_dir, tmp_path):
    settings = {"temperature": 0.8, "top_p": 0.9, "seed": 5, "presence_penalty": 0.5, "stop": ["a"]}
    ours = [{"id": str(i), "prompt": f"bed {i}", "max_new_tokens": 9, **settings} for i in range(6)]
    theirs = [
        {
            "custom_id": str(i),
            "body": {"prompt": f"bed {i}", "max_completion_tokens": 9, **settings},
        }
        for i in range(6)
    ]
    for name, rows in (("ours", ours), ("theirs", theirs)):
        assert (
            main(
                infer_flags(
                    tiny_llama_dir, write_rows(tmp_path / f"{name}.jsonl", rows), tmp_path / name
                )
            )
            == 0
        )
    assert (
        texts(tmp_path / "ours") == texts(tmp_path / "theirs")
        and len(set(texts(tmp_path / "ours").values())) > 3
    )


def test_samples_stop_ids_and_bad_characters(tiny_llama_dir, tmp_path):
    rows = [
        {"id": "sampled", "prompt": "fever", "n": 3, "temperature": 1.0},
        {"id": "greedy", "prompt": "fever"},
        {"id": "half", "prompt": "\ud800 fever"},
        {"id": "list", "prompt": "x", "stop_token_ids": ["a"]},
        {"id": "many", "prompt": "x", "n": 0},
        {"id": None, "prompt": "x"},
        {"id": None, "prompt": "y"},
    ]
    prompts = write_rows(tmp_path / "p.jsonl", rows)
    assert (
        main(
            infer_flags(
                tiny_llama_dir,
                prompts,
                tmp_path / "a",
                "--max_new_tokens",
                9,
                "--ignore_eos",
                "--logprobs",
                0,
            )
        )
        == 0
    )
    found = texts(tmp_path / "a")
    assert len({found["sampled", i][0] for i in range(3)}) == 3 and len(found) == 9
    assert {("5", 0), ("6", 0)} <= found.keys(), "without an id, its place"
    assert (
        "surrogate" in found["half", 0][3]
        and "stop_token_ids" in found["list", 0][3]
        and "--n 0" in found["many", 0][3]
    )
    record = next(
        r for r in read_jsonl(tmp_path / "a" / "completions.jsonl") if r["id"] == "greedy"
    )
    tokens = [entry["token"] for entry in record["logprobs"]]
    assert len(tokens) == 9 and "".join(tokens[:2]) in record["text"]
    ids = [str(i) for i in range(VOCAB)]
    assert (
        main(
            infer_flags(
                tiny_llama_dir, prompts, tmp_path / "b", "--ignore_eos", "--stop_token_ids", *ids
            )
        )
        == 0
    )
    assert texts(tmp_path / "b")["greedy", 0] == ("", "stop", 1, None)


def test_input_order_and_a_longer_request_than_the_first_window(
    tiny_llama_dir, tmp_path, monkeypatch
):
    """Windows of 8 requests: the 30th needs more positions than the first ones let expect."""
    monkeypatch.setattr("lorabatch.infer.feed.WINDOW", 8)
    rows = [
        {
            "id": f"r{i}",
            "prompt": "fever " * 3 if i == 29 else "abcdefghijklmnopqrstuvw",
            "max_new_tokens": 3 + i % 5,
        }
        for i in range(40)
    ]
    rows[29] = {"id": "r29", "prompt": "éçãõ" * 12, "max_new_tokens": 7}
    prompts = write_rows(tmp_path / "p.jsonl", rows)
    for size in (3, 40):
        assert (
            main(
                infer_flags(
                    tiny_llama_dir,
                    prompts,
                    tmp_path / str(size),
                    "--batch_size",
                    size,
                    "--output_order",
                    "input",
                )
            )
            == 0
        )
        assert [r["id"] for r in read_jsonl(tmp_path / str(size) / "completions.jsonl")] == [
            r["id"] for r in rows
        ]
    assert texts(tmp_path / "3") == texts(tmp_path / "40")
    metrics = json.loads((tmp_path / "3" / "metrics.json").read_text())
    assert metrics["completed"] == 40 and metrics["max_running"] == 3
    phases = [metrics[f"startup_{name}_s"] for name in ("check", "load", "tokenise", "pack")]
    assert metrics["startup_s"] == pytest.approx(sum(phases)) and min(phases) > 0
    for name in ("queue_ms", "ttft_ms", "tpot_ms", "itl_ms", "e2el_ms"):
        assert metrics[f"p50_{name}"] <= metrics[f"p99_{name}"]


def test_deterministic_says_what_it_costs(tiny_llama_dir, tiny_neox_dir, tmp_path, capsys):
    prompts = write_rows(
        tmp_path / "p.jsonl", [{"prompt": f"bed {i}", "max_new_tokens": 2} for i in range(5)]
    )
    for model, name, words, at_once in (
        (tiny_llama_dir, "a", "always is", 5),
        (tiny_neox_dir, "b", "one request at a time", 1),
    ):
        assert main(infer_flags(model, prompts, tmp_path / name, "--deterministic")) == 0
        assert words in capsys.readouterr().out
        assert json.loads((tmp_path / name / "metrics.json").read_text())["max_running"] == at_once


@pytest.mark.parametrize("alike", [True, False])
def test_deterministic_on_a_gpu_keeps_shapes(alike, tiny_llama_dir, tmp_path, capsys, monkeypatch):
    """On a tape, with everything that makes a CPU deterministic by itself denied."""
    made = []

    def recorded(model, *, fixed, quantize, max_tokens, **sizes):
        more = {"max_tokens": max_tokens} if fixed else {}
        kind = FixedRunner if fixed else GraphRunner
        made.append(kind(model, record=Tape, **sizes, **more))
        return made[-1]

    monkeypatch.setattr("lorabatch.kernels.train_ops._train_ops", lambda dtype: None)
    monkeypatch.setattr(passes, "unsupported", lambda *_: "denied")
    monkeypatch.setattr(passes, "rows_are_independent", lambda _: False)
    monkeypatch.setattr(passes, "records_steps", lambda _: True)
    monkeypatch.setattr(passes, "make_runner", recorded)
    if not alike:
        monkeypatch.setattr(FixedRunner, "rows_are_alike", lambda _: False)
    prompts = write_rows(tmp_path / "p.jsonl", [{"prompt": f"bed {i}"} for i in range(5)])
    flags = infer_flags(tiny_llama_dir, prompts, tmp_path / "o", "--deterministic")
    assert main([*flags, "--max_new_tokens", "4"]) == 0
    said = capsys.readouterr()
    assert "the shapes of a full one" in said.out
    assert ("equal rows differ on this GPU" in said.err) == (not alike)
    assert type(made[-1]) is (FixedRunner if alike else GraphRunner)
    metrics = json.loads((tmp_path / "o" / "metrics.json").read_text())
    assert metrics["completed"] == 5 and metrics["max_running"] == (5 if alike else 1)


# What survives


KILLER = """
import os, random, signal, sys, time
import support.forked
import torch
from lorabatch.cli import main

argv, path, count, kills = {argv!r}, {path!r}, {count}, {kills}
torch.set_num_threads(1)
rng = random.Random(11)

def lines():
    return open(path, "rb").read().count(b"\\n") if os.path.exists(path) else 0

def start():
    pid = os.fork()
    if pid == 0:
        os._exit(main([*argv, "--resume"]))
    return pid

for number, target in enumerate(sorted(rng.sample(range(count - 200), kills))):
    pid = start()
    while lines() < target:
        assert os.waitpid(pid, os.WNOHANG) == (0, 0), "ended before it was killed"
        time.sleep(0.001)
    time.sleep(rng.random() * 0.02)
    os.kill(pid, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    if number % 3 == 0 and lines():
        os.truncate(path, os.path.getsize(path) - rng.randrange(1, 40))  # as a power cut in the middle of a write
assert lines() < count
assert os.waitstatus_to_exitcode(os.waitpid(start(), 0)[1]) == 0
"""


@pytest.mark.slow
def test_twenty_kills_lose_nothing_and_repeat_nothing(tiny_llama_dir, tmp_path):
    count = 2000
    rows = [
        {
            "id": f"r{i}",
            "prompt": f"Patient {i} reports",
            "temperature": 0.8 * (i % 2),
            "max_new_tokens": 1 + i % 7,
        }
        for i in range(count)
    ]
    rows[700]["prompt"] = ""
    prompts = write_rows(tmp_path / "p.jsonl", rows)
    argv = infer_flags(tiny_llama_dir, prompts, tmp_path / "killed", "--batch_size", 16)
    code = KILLER.format(
        argv=argv, path=str(tmp_path / "killed" / "completions.jsonl"), count=count, kills=20
    )
    result = python(code)
    assert result.returncode == 0, result.stderr + result.stdout
    assert main(infer_flags(tiny_llama_dir, prompts, tmp_path / "whole", "--batch_size", 16)) == 0
    assert (
        texts(tmp_path / "killed") == texts(tmp_path / "whole")
        and len(texts(tmp_path / "whole")) == count
    )
    assert json.loads((tmp_path / "killed" / "metrics.json").read_text())["failed"] == 1


ON_A_TAPE = """
from pathlib import Path
from support.tape import Tape
from lorabatch.infer import passes
from lorabatch.infer.runners.graph import GraphRunner
from lorabatch.kernels import train_ops
from lorabatch.kernels.onednn import Dense
from lorabatch.model import linear

class Counted(Tape):
    def replay(self):
        super().replay()
        Path({marks!r}).open("a").write(".")

def recorded(model, *, num_slots, capacity, adapters, **_):
    return GraphRunner(
        model, num_slots=num_slots, capacity=capacity, adapters=adapters, record=Counted
    )

train_ops._train_ops, passes.make_runner = lambda dtype: None, recorded
linear.packed_product = Dense  # a tape cannot see oneDNN's memory
"""


@pytest.mark.slow
def test_kills_of_recorded_steps_lose_nothing_either(tiny_llama_dir, tmp_path):
    """Against a whole run of this machine's own runner."""
    count = 240
    rows = [
        {
            "id": f"r{i}",
            "prompt": f"Patient {i} reports",
            "temperature": 0.8 * (i % 2),
            "frequency_penalty": 0.5 * (i % 3),
            "max_new_tokens": 1 + i % 23,
        }
        for i in range(count)
    ]
    prompts = write_rows(tmp_path / "p.jsonl", rows)
    argv = infer_flags(tiny_llama_dir, prompts, tmp_path / "killed", "--batch_size", 16)
    path = str(tmp_path / "killed" / "completions.jsonl")
    before = ON_A_TAPE.format(marks=str(tmp_path / "marks"))
    result = python(before + KILLER.format(argv=argv, path=path, count=count, kills=3))
    assert result.returncode == 0, result.stderr + result.stdout
    assert (tmp_path / "marks").stat().st_size > 100, "steps were recorded"
    assert main(infer_flags(tiny_llama_dir, prompts, tmp_path / "whole", "--batch_size", 16)) == 0
    assert texts(tmp_path / "killed") == texts(tmp_path / "whole")
    assert len(texts(tmp_path / "whole")) == count


@pytest.mark.slow
def test_a_kill_of_the_real_model(tmp_path):
    lines = (SAMPLE / "prompts.txt").read_text(encoding="utf-8").splitlines()[:16]
    write_lines(tmp_path / "p.txt", lines)
    argv = infer_flags(
        "smollm2-135m",
        tmp_path / "p.txt",
        tmp_path / "killed",
        *ALL_CORES,
        "--batch_size",
        4,
        "--max_new_tokens",
        12,
    )
    code = KILLER.format(
        argv=argv, path=str(tmp_path / "killed" / "completions.jsonl"), count=16, kills=1
    ).replace("count - 200", "4, 9")
    result = python(code)
    assert result.returncode == 0, result.stderr + result.stdout
    assert (
        main(
            infer_flags(
                "smollm2-135m",
                tmp_path / "p.txt",
                tmp_path / "whole",
                *ALL_CORES,
                "--batch_size",
                16,
                "--max_new_tokens",
                12,
            )
        )
        == 0
    )
    assert (
        texts(tmp_path / "killed") == texts(tmp_path / "whole")
        and len(texts(tmp_path / "whole")) == 16
    )


def test_resume_after_a_change_of_policy_is_refused(tiny_llama_dir, tmp_path, capsys):
    prompts = write_rows(tmp_path / "p.jsonl", [{"prompt": "fever " * 60}, {"prompt": "cough"}])
    assert main(infer_flags(tiny_llama_dir, prompts, tmp_path / "a", "--max_len", 40)) == 0
    assert (
        main(infer_flags(tiny_llama_dir, prompts, tmp_path / "a", "--max_len", 40, "--resume")) == 0
    )
    assert len(texts(tmp_path / "a")) == 2
    assert (
        main(
            infer_flags(
                tiny_llama_dir,
                prompts,
                tmp_path / "a",
                "--max_len",
                40,
                "--long_prompt",
                "truncate_left",
                "--resume",
            )
        )
        == 64
    )
    write_rows(prompts, [{"prompt": "cough"}])
    assert (
        main(infer_flags(tiny_llama_dir, prompts, tmp_path / "a", "--max_len", 40, "--resume"))
        == 64
    )
    assert "another prompt" in capsys.readouterr().err


@pytest.mark.skipif(
    subprocess.run(["unshare", "-rm", "true"], check=False).returncode != 0,
    reason="mounting needs user namespaces",
)
def test_a_full_disk_is_one_line_and_keeps_what_was_written(tiny_llama_dir, tmp_path):
    prompts = write_rows(
        tmp_path / "p.jsonl", [{"prompt": f"Patient {i} reports"} for i in range(400)]
    )
    disk, kept = tmp_path / "disk", tmp_path / "kept"
    disk.mkdir()
    argv = [
        sys.executable,
        "-m",
        "lorabatch",
        *infer_flags(tiny_llama_dir, prompts, disk / "run", "--max_new_tokens", 4),
    ]
    script = (
        'mount -t tmpfs -o size=96k tmpfs "$0" && { "${@:2}"; code=$?; cp -r "$0/run" "$1"; exit '
        "$code; }"
    )
    result = subprocess.run(
        ["unshare", "-rm", "bash", "-c", script, disk, kept, *argv],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 69, result.stderr
    last = result.stderr.splitlines()[-1]
    assert (
        "completions.jsonl: cannot write it (No space left on device); free some space" in last
        and "Traceback" not in result.stderr
    )
    done = texts(kept)
    assert 20 < len(done) < 400
    shutil.rmtree(disk)
    assert (
        main([*infer_flags(tiny_llama_dir, prompts, kept, "--max_new_tokens", 4), "--resume"]) == 0
    )
    assert len(texts(kept)) == 400 and done.items() <= texts(kept).items()


OUT_OF_MEMORY = """
import resource, sys
from lorabatch.cli import main
assert main({small!r}) == 0  # what a run loads into the process is not what this test is about
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + {spare}, used + {spare}))
sys.exit(main({argv!r}))
"""


def test_out_of_memory_halves_the_slots_and_goes_on(tmp_path):
    if why := unsupported(native(tiny_model("llama")).spec, torch.float32, torch.device("cpu")):
        pytest.skip(f"{why}: oneDNN, which serves then, ends the process where malloc fails")
    model = save_model(tiny_model("llama", max_position_embeddings=8192), tmp_path / "model")
    slot_bytes = 8100 * 2 * LLAMA["num_hidden_layers"] * LLAMA["num_key_value_heads"] * 16 * 4
    prompts = write_rows(tmp_path / "p.jsonl", [{"prompt": f"bed {i}"} for i in range(100)])
    ids = [str(i) for i in range(VOCAB)]
    argv = infer_flags(
        model,
        prompts,
        tmp_path / "out",
        "--batch_size",
        80,
        "--max_new_tokens",
        8000,
        "--ignore_eos",
        "--stop_token_ids",
        *ids,
    )
    one = write_rows(tmp_path / "one.jsonl", [{"prompt": "bed"}])
    small = infer_flags(model, one, tmp_path / "small", "--max_new_tokens", 1)
    result = python(OUT_OF_MEMORY.format(small=small, argv=argv, spare=60 * slot_bytes))
    assert result.returncode == 0, result.stderr
    assert "out of memory: continuing with 40 requests at once" in result.stderr
    assert len(texts(tmp_path / "out")) == 100
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["max_running"] <= 40


# Memory


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_prompts(tiny_llama_dir, tmp_path):
    peak = {}
    for count in (2_000, 50_000):
        write_lines(tmp_path / f"{count}.txt", (f"bed {i}" for i in range(count)))
        argv = infer_flags(
            tiny_llama_dir,
            tmp_path / f"{count}.txt",
            tmp_path / str(count),
            "--batch_size",
            256,
            "--max_new_tokens",
            1,
        )
        result = subprocess.run(
            [sys.executable, "-m", "lorabatch", *argv],
            env=ENVIRONMENT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, result.stderr
        metrics = json.loads((tmp_path / str(count) / "metrics.json").read_text())
        assert metrics["completed"] == count
        peak[count] = metrics["peak_memory_bytes"]
    assert peak[50_000] - peak[2_000] < 48_000 * 400, peak
