"""Every command of a cluster's day with every way to a network shut: no name is looked up, no
socket but AF_UNIX connects."""

import json
import subprocess
import sys

import pytest
from support.commands import completions, infer_flags, train_flags, write_lines
from support.paths import SRC

# An audit hook sees what Python code asks of the network before it happens, and cannot be removed
# again.
GUARD = """
import socket, sys
def guard(event, args):
    if event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.sendto") or (
        event in ("socket.connect", "socket.bind") and args[0].family != socket.AF_UNIX
    ):
        print("NETWORK", event, args[1:], file=sys.stderr)
        raise PermissionError(f"the network is shut: {event}")
sys.addaudithook(guard)
"""


def python(words, home):
    """Python with a sitecustomize that shuts off it and its children."""
    (home / "shut").mkdir(exist_ok=True)
    (home / "shut/sitecustomize.py").write_text(GUARD)
    environment = {
        "PYTHONPATH": f"{home / 'shut'}:{SRC}",
        "PATH": "/usr/bin:/bin",
        "HOME": str(home),
        "HF_HOME": str(home / "hf"),
    }
    command = [sys.executable, *map(str, words)]
    # no interface at all, where the system lets us
    isolated = ["unshare", "--net", "--map-root-user"]
    if subprocess.run([*isolated, "true"], capture_output=True).returncode == 0:
        command = [*isolated, *command]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def test_the_guard_itself_shuts_the_network_for_children_too(tmp_path):
    child = "import socket; socket.create_connection(('127.0.0.1', 9))"
    done = python(
        [
            "-c",
            (
                "import subprocess, sys; sys.exit(subprocess.run([sys.executable, '-c', "
                f"{child!r}]).returncode)"
            ),
        ],
        tmp_path,
    )
    assert done.returncode == 1 and "the network is shut" in done.stderr


@pytest.mark.slow
def test_the_whole_path_never_touches_the_network_although_nothing_says_offline(
    tiny_llama_dir, tmp_path
):
    texts, lora, out = tmp_path / "texts.txt", tmp_path / "lora", tmp_path / "out"
    write_lines(texts, (f"The patient in bed {i} slept well." for i in range(8)))
    settings = {
        "base_model": str(tiny_llama_dir),
        "train_path": str(texts),
        "val_path": str(texts),
        "data_checks": "off",
        "dtype": "fp32",
        "threads": 1,
    }
    file = tmp_path / "sweep.toml"
    file.write_text(
        "[train]\nmax_steps = 1\n"
        + "".join(f"{k} = {json.dumps(v)}\n" for k, v in settings.items())
        + "[search]\nseed = [1, 2]\n"
    )
    train = ["--max_steps", 2, "--batch_size", 4]
    infer = ["--adapter_dir", lora, "--max_new_tokens", 4]
    steps = {
        "doctor": ["doctor", "--no_cuda", "--output_dir", tmp_path, "--base_model", tiny_llama_dir],
        "check": ["check", texts, "--base_model", tiny_llama_dir, "--output_dir", tmp_path / "c"],
        "split": ["split", texts, "--val_fraction", 0.3, "--output_dir", tmp_path / "split"],
        "train": train_flags(tiny_llama_dir, texts, lora, *train),
        "infer": infer_flags(tiny_llama_dir, texts, out, *infer),
        "eval": [
            "eval",
            texts,
            "--base_model",
            tiny_llama_dir,
            "--adapter_dir",
            lora,
            "--output_dir",
            tmp_path / "eval",
        ],
        "shards and their merge": infer_flags(
            tiny_llama_dir, texts, tmp_path / "sharded", *infer, "--shards", 2
        ),
        "sweep": ["sweep", file, "--output_dir", tmp_path / "sweep"],
        "merge": [
            "merge",
            "--base_model",
            tiny_llama_dir,
            "--adapter_dir",
            lora,
            "--output_dir",
            tmp_path / "merged",
        ],
        "stage": ["stage", tiny_llama_dir, tmp_path / "staged", "--verify"],
        "report": ["report", lora, out, tmp_path / "sharded", "--output_dir", tmp_path / "report"],
    }
    for name, words in steps.items():
        done = python(["-m", "lorabatch", *words], tmp_path)
        assert done.returncode == 0 and "NETWORK" not in done.stderr, (
            f"{name}: {done.stdout}{done.stderr}"
        )
    assert json.loads((lora / "run.json").read_text())["status"] == "completed"
    whole, sharded = completions(out), completions(tmp_path / "sharded")
    assert len(whole) == 8 and {r["id"]: r["text"] for r in whole} == {
        r["id"]: r["text"] for r in sharded
    }
    assert json.loads((tmp_path / "sweep/leaderboard.json").read_text())["rows"][0]["runs"] == 2
    logs = [p.read_text() for p in tmp_path.rglob("log.txt")]
    assert len(logs) == 3 and not any("NETWORK" in log for log in logs), (
        "of the processes that shards and tasks run in"
    )
