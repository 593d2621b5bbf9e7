"""Runs of inference as jobs: what goes in and out, what a kill, a full disk or too little memory leaves behind."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import LLAMA, VOCAB, native, save_model, tiny_model, tiny_tokenizer, variant_config

from lorabatch.cli import main
from lorabatch.infer.bench import ceiling_seconds
from lorabatch.infer.program import unsupported
from lorabatch.model.spec import spec_from_config
from lorabatch.records import read_jsonl

ROOT = Path(__file__).parents[1]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}


def write_rows(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return path


def flags(model, prompts, output_dir, *more):
    return ["infer", *map(str, ["--base_model", model, "--prompts", prompts, "--output_dir", output_dir, "--dtype", "fp32", *more])]


def texts(folder):
    """{(id, sample): what does not depend on time}; a completion that is there twice is an error."""
    records = list(read_jsonl(Path(folder) / "completions.jsonl"))
    found = {(r["id"], r["sample"]): (r["text"], r["finish_reason"], r["output_tokens"], r["error"]) for r in records}
    assert len(found) == len(records)
    return found


def python(code, **options):
    return subprocess.run(
        [sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, timeout=900, check=False, **options
    )


# In and out


def test_openai_lines_in_and_out(tiny_llama_dir, tmp_path, capsys):
    chat = {"messages": [{"role": "user", "content": "fever?"}], "max_tokens": 4, "ignore_eos": True}
    bodies = {
        "chat": ("chat/completions", chat | {"n": 2, "temperature": 0.9, "seed": 7, "logprobs": True, "top_logprobs": 2, "user": None}),
        "text": ("completions", {"prompt": "The patient", "max_tokens": 3, "logprobs": 1, "model": "any", "ignore_eos": True}),
        "hot": ("completions", {"prompt": "x", "temperature": -1, "stream": False}),
        "vectors": ("embeddings", {"input": "x"}),
        "image": ("completions", {"prompt": {"image": 1}}),
    }
    rows = [{"custom_id": k, "method": "POST", "url": f"/v1/{url}", "body": body} for k, (url, body) in bodies.items()]
    prompts = write_rows(tmp_path / "p.jsonl", rows)
    assert main(flags(tiny_llama_dir, prompts, tmp_path / "out", "--output_format", "openai")) == 0
    assert "ignored fields of the prompts: input, model, stream\n" in capsys.readouterr().out
    lines = list(read_jsonl(tmp_path / "out" / "batch_output.jsonl"))
    assert [line["custom_id"] for line in lines] == list(bodies)
    assert all(set(line) == {"id", "custom_id", "response", "error"} for line in lines)
    body = lines[0]["response"]["body"]
    assert lines[0]["response"]["status_code"] == 200 and body["object"] == "chat.completion"
    first, second = body["choices"]
    assert (first["index"], second["index"], first["finish_reason"], first["message"]["role"]) == (0, 1, "length", "assistant")
    assert first["message"]["content"] != second["message"]["content"]
    entries = first["logprobs"]["content"]
    assert len(entries) == 4 and len(entries[0]["top_logprobs"]) == 2 and entries[0]["logprob"] < 0
    assert body["usage"]["completion_tokens"] == 8 and body["usage"]["total_tokens"] == 8 + body["usage"]["prompt_tokens"]
    text = lines[1]["response"]["body"]["choices"][0]
    assert lines[1]["response"]["body"]["object"] == "text_completion" and len(text["logprobs"]["token_logprobs"]) == 3
    errors = [line["error"]["message"] for line in lines[2:]]
    assert "temperature" in errors[0] and "/v1/embeddings" in errors[1] and "'prompt' is dict" in errors[2]
    assert [line["response"] for line in lines[2:]] == [None] * 3


def test_our_rows_mean_the_same_as_openais(tiny_llama_dir, tmp_path):
    settings = {"temperature": 0.8, "top_p": 0.9, "seed": 5, "presence_penalty": 0.5, "stop": ["a"]}
    ours = [{"id": str(i), "prompt": f"bed {i}", "max_new_tokens": 9, **settings} for i in range(6)]
    theirs = [{"custom_id": str(i), "body": {"prompt": f"bed {i}", "max_completion_tokens": 9, **settings}} for i in range(6)]
    for name, rows in (("ours", ours), ("theirs", theirs)):
        assert main(flags(tiny_llama_dir, write_rows(tmp_path / f"{name}.jsonl", rows), tmp_path / name)) == 0
    assert texts(tmp_path / "ours") == texts(tmp_path / "theirs") and len(set(texts(tmp_path / "ours").values())) > 3


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
    assert main(flags(tiny_llama_dir, prompts, tmp_path / "a", "--max_new_tokens", 9, "--ignore_eos", "--logprobs", 0)) == 0
    found = texts(tmp_path / "a")
    assert len({found["sampled", i][0] for i in range(3)}) == 3 and len(found) == 9
    assert {("5", 0), ("6", 0)} <= found.keys(), "without an id, its place"
    assert "surrogate" in found["half", 0][3] and "stop_token_ids" in found["list", 0][3] and "--n 0" in found["many", 0][3]
    record = next(r for r in read_jsonl(tmp_path / "a" / "completions.jsonl") if r["id"] == "greedy")
    tokens = [entry["token"] for entry in record["logprobs"]]
    assert len(tokens) == 9 and "".join(tokens[:2]) in record["text"]
    ids = [str(i) for i in range(VOCAB)]
    assert main(flags(tiny_llama_dir, prompts, tmp_path / "b", "--ignore_eos", "--stop_token_ids", *ids)) == 0
    assert texts(tmp_path / "b")["greedy", 0] == ("", "stop", 1, None)


def test_input_order_and_a_longer_request_than_the_first_window(tiny_llama_dir, tmp_path, monkeypatch):
    """Windows of 8 requests: the 30th needs more positions than the first ones let expect."""
    monkeypatch.setattr("lorabatch.infer.feed.WINDOW", 8)
    rows = [
        {"id": f"r{i}", "prompt": "fever " * 3 if i == 29 else "abcdefghijklmnopqrstuvw", "max_new_tokens": 3 + i % 5} for i in range(40)
    ]
    rows[29] = {"id": "r29", "prompt": "éçãõ" * 12, "max_new_tokens": 7}
    prompts = write_rows(tmp_path / "p.jsonl", rows)
    for size in (3, 40):
        assert main(flags(tiny_llama_dir, prompts, tmp_path / str(size), "--batch_size", size, "--output_order", "input")) == 0
        assert [r["id"] for r in read_jsonl(tmp_path / str(size) / "completions.jsonl")] == [r["id"] for r in rows]
    assert texts(tmp_path / "3") == texts(tmp_path / "40")
    metrics = json.loads((tmp_path / "3" / "metrics.json").read_text())
    assert metrics["completed"] == 40 and metrics["max_running"] == 3
    phases = [metrics[f"startup_{name}_s"] for name in ("check", "load", "tokenise", "pack")]
    assert metrics["startup_s"] == pytest.approx(sum(phases)) and min(phases) > 0
    for name in ("queue_ms", "ttft_ms", "tpot_ms", "itl_ms", "e2el_ms"):
        assert metrics[f"p50_{name}"] <= metrics[f"p99_{name}"]


def test_deterministic_says_what_it_costs(tiny_llama_dir, tiny_neox_dir, tmp_path, capsys):
    prompts = write_rows(tmp_path / "p.jsonl", [{"prompt": f"bed {i}", "max_new_tokens": 2} for i in range(5)])
    for model, name, words, at_once in ((tiny_llama_dir, "a", "always is", 5), (tiny_neox_dir, "b", "one request at a time", 1)):
        assert main(flags(model, prompts, tmp_path / name, "--deterministic")) == 0
        assert words in capsys.readouterr().out
        assert json.loads((tmp_path / name / "metrics.json").read_text())["max_running"] == at_once


# What survives


KILLER = """
import os, random, signal, sys, time
import torch
from transformers import AutoTokenizer
from lorabatch.cli import main
from lorabatch.infer.bench import ceiling_seconds
from lorabatch.infer.program import unsupported
from lorabatch.model.spec import spec_from_config
import lorabatch.infer.session, lorabatch.infer.sink

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
        {"id": f"r{i}", "prompt": f"Patient {i} reports", "temperature": 0.8 * (i % 2), "max_new_tokens": 1 + i % 7} for i in range(count)
    ]
    rows[700]["prompt"] = ""
    prompts = write_rows(tmp_path / "p.jsonl", rows)
    argv = flags(tiny_llama_dir, prompts, tmp_path / "killed", "--batch_size", 16)
    code = KILLER.format(argv=argv, path=str(tmp_path / "killed" / "completions.jsonl"), count=count, kills=20)
    result = python(code)
    assert result.returncode == 0, result.stderr + result.stdout
    assert main(flags(tiny_llama_dir, prompts, tmp_path / "whole", "--batch_size", 16)) == 0
    assert texts(tmp_path / "killed") == texts(tmp_path / "whole") and len(texts(tmp_path / "whole")) == count
    assert json.loads((tmp_path / "killed" / "metrics.json").read_text())["failed"] == 1


@pytest.mark.slow
def test_a_kill_of_the_real_model(tmp_path):
    lines = (ROOT / "data_sample" / "prompts.txt").read_text(encoding="utf-8").splitlines()[:16]
    (tmp_path / "p.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    argv = flags("smollm2-135m", tmp_path / "p.txt", tmp_path / "killed", "--batch_size", 4, "--max_new_tokens", 12)
    code = KILLER.format(argv=argv, path=str(tmp_path / "killed" / "completions.jsonl"), count=16, kills=1).replace("count - 200", "4, 9")
    result = python(code)
    assert result.returncode == 0, result.stderr + result.stdout
    assert main(flags("smollm2-135m", tmp_path / "p.txt", tmp_path / "whole", "--batch_size", 16, "--max_new_tokens", 12)) == 0
    assert texts(tmp_path / "killed") == texts(tmp_path / "whole") and len(texts(tmp_path / "whole")) == 16


def test_resume_after_a_change_of_policy_is_refused(tiny_llama_dir, tmp_path, capsys):
    prompts = write_rows(tmp_path / "p.jsonl", [{"prompt": "fever " * 60}, {"prompt": "cough"}])
    assert main(flags(tiny_llama_dir, prompts, tmp_path / "a", "--max_len", 40)) == 0
    assert main(flags(tiny_llama_dir, prompts, tmp_path / "a", "--max_len", 40, "--resume")) == 0
    assert len(texts(tmp_path / "a")) == 2
    assert main(flags(tiny_llama_dir, prompts, tmp_path / "a", "--max_len", 40, "--long_prompt", "truncate_left", "--resume")) == 64
    write_rows(prompts, [{"prompt": "cough"}])
    assert main(flags(tiny_llama_dir, prompts, tmp_path / "a", "--max_len", 40, "--resume")) == 64
    assert "another prompt" in capsys.readouterr().err


@pytest.mark.skipif(subprocess.run(["unshare", "-rm", "true"], check=False).returncode != 0, reason="mounting needs user namespaces")
def test_a_full_disk_is_one_line_and_keeps_what_was_written(tiny_llama_dir, tmp_path):
    prompts = write_rows(tmp_path / "p.jsonl", [{"prompt": f"Patient {i} reports"} for i in range(400)])
    disk, kept = tmp_path / "disk", tmp_path / "kept"
    disk.mkdir()
    argv = [sys.executable, "-m", "lorabatch", *flags(tiny_llama_dir, prompts, disk / "run", "--max_new_tokens", 4)]
    script = 'mount -t tmpfs -o size=96k tmpfs "$0" && { "${@:2}"; code=$?; cp -r "$0/run" "$1"; exit $code; }'
    result = subprocess.run(
        ["unshare", "-rm", "bash", "-c", script, disk, kept, *argv], env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 69, result.stderr
    last = result.stderr.splitlines()[-1]
    assert "completions.jsonl: cannot write it (No space left on device); make room there" in last and "Traceback" not in result.stderr
    done = texts(kept)
    assert 20 < len(done) < 400
    shutil.rmtree(disk)
    assert main([*flags(tiny_llama_dir, prompts, kept, "--max_new_tokens", 4), "--resume"]) == 0
    assert len(texts(kept)) == 400 and done.items() <= texts(kept).items()


OUT_OF_MEMORY = """
import resource, sys
import lorabatch.infer.session, lorabatch.infer.sink
from lorabatch.cli import main
from lorabatch.infer.bench import ceiling_seconds
from lorabatch.infer.program import unsupported
from lorabatch.model.spec import spec_from_config
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
    argv = flags(model, prompts, tmp_path / "out", "--batch_size", 80, "--max_new_tokens", 8000, "--ignore_eos", "--stop_token_ids", *ids)
    result = python(OUT_OF_MEMORY.format(argv=argv, spare=60 * slot_bytes))
    assert result.returncode == 0, result.stderr
    assert "out of memory: going on with 40 requests at once" in result.stderr
    assert len(texts(tmp_path / "out")) == 100
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["max_running"] <= 40


# Memory


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_prompts(tiny_llama_dir, tmp_path):
    peak = {}
    for count in (2_000, 100_000):
        (tmp_path / f"{count}.txt").write_text("".join(f"bed {i}\n" for i in range(count)), encoding="utf-8")
        argv = flags(tiny_llama_dir, tmp_path / f"{count}.txt", tmp_path / str(count), "--batch_size", 256, "--max_new_tokens", 1)
        result = subprocess.run([sys.executable, "-m", "lorabatch", *argv], env=ENVIRONMENT, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        metrics = json.loads((tmp_path / str(count) / "metrics.json").read_text())
        assert metrics["completed"] == count
        peak[count] = metrics["peak_memory_bytes"]
    assert peak[100_000] - peak[2_000] < 98_000 * 400, peak


# The batch sweep


def test_bench_infer_holds_each_batch_size_against_the_ceiling(tiny_llama_dir, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("LORABATCH_CEILINGS", str(tmp_path))
    output = tmp_path / "new" / "bench.json"
    sizes = ["--batch_sizes", "1", "3", "--repeats", "2", "--input_tokens", "5", "--max_new_tokens", "4", "--dtype", "fp32"]
    assert main(["bench", "infer", "--base_model", str(tiny_llama_dir), *sizes, "--output", str(output)]) == 0
    record = json.loads(output.read_text())
    table = capsys.readouterr().out
    assert [point["batch_size"] for point in record["points"]] == [1, 3] and record["config"]["repeats"] == 2
    assert record["knee"] is None and "too few values" in record["no_conclusion"] and record["no_conclusion"] in table
    for point in record["points"]:
        rates, times = point["tokens_per_s"]["values"], point["batch_latency_ms"]["values"]
        assert rates == pytest.approx([point["batch_size"] * 4 / ms * 1e3 for ms in times]) and len(rates) == 2
        assert point["share_of_ceiling"] == pytest.approx(point["tokens_per_s"]["median"] / point["ceiling_tokens_per_s"])
        assert f"{point['ceiling_tokens_per_s']:.0f}" in table
    assert main(["bench", "infer", "--base_model", str(tiny_llama_dir), *sizes, "--threads_sweep", "1", "2", "--output", str(output)]) == 0
    record = json.loads(output.read_text())
    assert [point["threads"] for point in record["points"]] == [1, 2] and record["serial_share"] is None
    assert torch.get_num_threads() == record["threads"], "as before"
    assert main(["report", str(output), "--output_dir", str(tmp_path / "report")]) == 0
    assert main(["bench", "infer", "--base_model", str(tiny_llama_dir), "--input_tokens", "200"]) == 64
    assert main(["bench", "infer", "--batch_sizes", "0"]) == 64


def test_ceiling_by_hand():
    spec = spec_from_config(variant_config("llama"))
    head, params, kv = 64 * VOCAB, spec.num_matmul_params, spec.kv_elements_per_token
    prefill = 2 * 10 * ((params - head) * 5 + head)
    seconds, bound = ceiling_seconds(spec, 10, 5, 3, (1.0, 1e12), (4, 2))  # arithmetic is all that takes time
    assert (bound, seconds) == ("compute", pytest.approx(prefill + 2 * 2 * 10 * params))
    seconds, bound = ceiling_seconds(spec, 10, 5, 3, (1e15, 1.0), (4, 2))  # memory is
    assert (bound, seconds) == ("memory", pytest.approx(4 * params + 4 * 2 * params + 2 * 10 * (5 + 6) * kv))


def test_quality_of_int8_is_measured_on_the_true_tokens(tiny_llama_dir, tmp_path, capsys):
    reference = native(tiny_model("llama"))
    if why := unsupported(reference.spec, torch.float32, torch.device("cpu")):
        pytest.skip(why)
    texts = ["The patient has a fever and a cough.", "O paciente tem febre; a pressão está alta."]
    (tmp_path / "d.txt").write_text("\n".join(texts) + "\n", encoding="utf-8")
    command = ["bench", "infer", "--base_model", tiny_llama_dir, "--quality", tmp_path / "d.txt", "--dtype", "fp32"]
    assert main([*map(str, command), "--output", str(tmp_path / "q.json")]) == 0
    record = json.loads((tmp_path / "q.json").read_text())
    ids = [torch.tensor(tiny_tokenizer()(text)["input_ids"]) for text in texts]
    with torch.no_grad():
        nll = float(reference.loss_sum(ids, [1, 1]))
    assert record["bits_per_byte"] == pytest.approx(nll / math.log(2) / record["bytes"], rel=1e-4)
    assert record["tokens"] == sum(len(i) - 1 for i in ids) and record["documents"] == 2
    assert 0 < abs(record["int8_bits_per_byte"] / record["bits_per_byte"] - 1) < 0.05
    assert 0.5 < record["greedy_agreement"] <= 1 and f"{record['greedy_agreement']:.2%}" in capsys.readouterr().out
