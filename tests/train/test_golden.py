"""Four steps and eight answers of the packaged model, bit for bit those of the golden file.

A change that is meant to change no figures changes nothing here. ``UPDATE_GOLDEN=1 pytest
tests/train/test_golden.py`` records anew; say in the commit why.
"""

import hashlib
import json
import os

import pytest
import torch
from safetensors.torch import load_file
from support.commands import completions, history, infer_flags, train_flags
from support.paths import GOLDEN, SAMPLE
from support.processes import python

from lorabatch import kernels
from lorabatch.processor import processor_name

FILE = GOLDEN / "train_and_infer.json"
THREADS = (1, 2)
# One variant of the kernels, which every processor with AVX-512 runs. A process of its own: a
# process keeps the variant that it loaded first.
PROGRAM = """
import os
os.environ["LORABATCH_KERNELS"] = "avx512"
from lorabatch.cli import main
for argv in {commands!r}:
    assert main(argv) == 0
"""
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        kernels.library("step") is None,
        reason="no CPU kernels on this machine (compiler or AVX-512 missing)",
    ),
]


def here():
    """What decides over the order of sums besides our kernels: torch's own products."""
    return {"torch": torch.__version__, "processor": processor_name()}


def adapter_sha256(folder):
    digest = hashlib.sha256()
    for name, tensor in sorted(load_file(folder / "adapter_model.safetensors").items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """{threads: what a training and the answers of its adapter are}"""
    home = tmp_path_factory.mktemp("golden")
    commands = []
    for threads in THREADS:
        lora, out = home / f"lora-{threads}", home / f"out-{threads}"
        same = ["--seed", 3, "--threads", threads]
        train = ["--val_path", "none", "--max_train_documents", 8, "--max_len", 96]
        train += ["--batch_size", 2, "--max_steps", 4, "--lora_r", 8, "--lr", 0.002]
        infer = ["--rows", "0:8", "--max_new_tokens", 8, "--ignore_eos", "--output_order", "input"]
        commands += [
            train_flags("smollm2-135m", SAMPLE / "train.txt", lora, *same, *train),
            infer_flags(
                "smollm2-135m", SAMPLE / "prompts.txt", out, *same, *infer, "--adapter_dir", lora
            ),
        ]
    done = python(PROGRAM.format(commands=commands))
    assert done.returncode == 0, done.stderr
    return {
        threads: {
            "adapter_sha256": adapter_sha256(home / f"lora-{threads}"),
            "losses": [e["loss"] for e in history(home / f"lora-{threads}")],
            "texts": [record["text"] for record in completions(home / f"out-{threads}")],
        }
        for threads in THREADS
    }


def test_the_number_of_threads_changes_no_bit(found):
    assert found[1] == found[2]


def test_the_adapter_and_the_texts_are_those_of_the_golden_file(found):
    if os.environ.get("UPDATE_GOLDEN"):
        record = {"recorded_on": here(), **found[1]}
        FILE.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    golden = json.loads(FILE.read_text(encoding="utf-8"))
    assert found[1]["losses"] == pytest.approx(golden["losses"], rel=1e-4)
    assert len(golden["losses"]) == 4 and len(golden["texts"]) == 8
    if here() != golden["recorded_on"]:
        pytest.skip(f"bits are those of {golden['recorded_on']}; here: {here()}")
    assert found[1]["adapter_sha256"] == golden["adapter_sha256"]
    assert found[1]["texts"] == golden["texts"]
