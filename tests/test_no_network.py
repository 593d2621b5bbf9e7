"""Train and infer with every way to a network shut: no name is looked up, no socket but AF_UNIX connects."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src"
# An audit hook sees what Python code asks of the network before it happens, and cannot be removed again.
SHUT = """
import socket, sys
def guard(event, args):
    if event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.sendto") or (
        event in ("socket.connect", "socket.bind") and args[0].family != socket.AF_UNIX
    ):
        print("NETWORK", event, args[1:], file=sys.stderr)
        raise PermissionError(f"the network is shut: {event}")
sys.addaudithook(guard)
from lorabatch.cli import main
sys.exit(main(sys.argv[1:]))
"""


def run(words, home):
    environment = {"PYTHONPATH": str(SRC), "PATH": "/usr/bin:/bin", "HOME": str(home), "HF_HOME": str(home / "hf")}
    command = [sys.executable, "-c", SHUT, *map(str, words)]
    isolated = ["unshare", "--net", "--map-root-user"]  # no interface at all, where the system lets us
    if subprocess.run([*isolated, "true"], capture_output=True).returncode == 0:
        command = [*isolated, *command]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def test_the_guard_itself_shuts_the_network(tmp_path):
    probe = SHUT.replace("sys.exit(main(sys.argv[1:]))", "socket.create_connection(('127.0.0.1', 9))")
    done = subprocess.run([sys.executable, "-c", probe], env={"PYTHONPATH": str(SRC)}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "the network is shut" in done.stderr


@pytest.mark.slow
def test_train_infer_and_report_never_touch_the_network_although_nothing_says_offline(tiny_llama_dir, tmp_path):
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(f"The patient in bed {i} slept well." for i in range(8)) + "\n")
    common = ["--base_model", tiny_llama_dir, "--dtype", "fp32", "--threads", 1]
    data = ["--train_path", texts, "--val_path", texts, "--max_steps", 2, "--batch_size", 4]
    steps = {
        "train": ["train", *common, *data, "--save_dir", tmp_path / "lora"],
        "infer": [
            "infer",
            *common,
            "--adapter_dir",
            tmp_path / "lora",
            "--prompts",
            texts,
            "--output_dir",
            tmp_path / "out",
            "--max_new_tokens",
            4,
        ],
        "report": ["report", tmp_path / "lora", tmp_path / "out", "--output_dir", tmp_path / "report"],
    }
    for name, words in steps.items():
        done = run(words, tmp_path)
        assert done.returncode == 0 and "NETWORK" not in done.stderr, f"{name}: {done.stderr}"
    assert len((tmp_path / "out/completions.jsonl").read_text().splitlines()) == 8
    assert json.loads((tmp_path / "lora/run.json").read_text())["status"] == "completed"
