"""Damaged model folders, adapters and GGUF files through the command line: one of four exit codes,
and never another model's texts unsaid."""

import contextlib
import io
import json
import os
import random
import shutil
import struct

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.commands import completions, infer_flags
from support.models import randomise_b, save_model, tiny_gguf, tiny_model

from lorabatch.cli import main
from lorabatch.model.gguf_files import read_header
from lorabatch.model.hub import ModelSource
from lorabatch.model.load import load_config, load_model
from lorabatch.model.lora import LoraSettings, save_adapter

CODES = {0, 64, 65, 69, 70}
ODD = [
    0,
    -1,
    1,
    2,
    3,
    10**9,
    2**63,
    1e9,
    0.5,
    -0.5,
    float("nan"),
    float("inf"),
    "8",
    "",
    "(a+)+$",
    None,
    True,
    False,
    [],
    [1],
    [None],
    {},
    {"a": 1},
]
HUGE = [0, 1, 2, 2**16, 2**31, 2**32, 2**60, 2**64 - 1]
FILES = {  # kind of model -> the files that are damaged
    "llama": (
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "model.safetensors",
    ),
    "gpt2": ("config.json", "model.safetensors"),
    "adapter": ("adapter_config.json", "adapter_model.safetensors", "lorabatch.json"),
    "gguf": ("model.gguf",),
}
TARGETS = [(kind, file) for kind, files in FILES.items() for file in files]


class Victims:
    """One folder of each kind, its prompts, and what an undamaged run writes."""

    def __init__(self, root):
        self.root, self._runs = root, 0
        (root / "prompts.txt").write_text("The patient has a fever\n", encoding="utf-8")
        for name in ("llama", "gpt2"):
            save_model(tiny_model(name), root / name)
        (root / "gguf").mkdir()
        tiny_gguf(tiny_model("llama"), root / "gguf" / "model.gguf")
        options = {"backend": "native", "dtype": torch.float32, "device": torch.device("cpu")}
        base = load_model(
            ModelSource("tiny", root / "llama"), load_config(root / "llama"), **options
        )
        adapters = base.attach(LoraSettings(r=4, alpha=8.0), seed=0)
        randomise_b(adapters)
        save_adapter(
            root / "adapter",
            adapters.weights(),
            base_name="t",
            base_fingerprint=base.base_fingerprint,
            fan_in_fan_out=False,
        )
        self.good = {kind: self.run(kind) for kind in FILES}
        assert all(code == 0 and texts for code, texts, _ in self.good.values())
        assert self.good["adapter"][1] != self.good["llama"][1]

    def run(self, kind, *more):
        """(exit code, texts, stderr)"""
        self._runs += 1
        base = {"gguf": "gguf/model.gguf", "adapter": "llama"}.get(kind, kind)
        adapter = ["--adapter_dir", self.root / "adapter"] if kind == "adapter" else []
        out = self.root / "out"
        fixed = ["--max_new_tokens", 6, "--ignore_eos", "--no_cuda", "--overwrite"]
        prompts = self.root / "prompts.txt"
        argv = infer_flags(self.root / base, prompts, out, *adapter, *more, *fixed)
        shutil.rmtree(out, ignore_errors=True)
        with (
            contextlib.redirect_stderr(io.StringIO()) as err,
            contextlib.redirect_stdout(io.StringIO()),
        ):
            code = main(argv)
        texts = [record["text"] for record in completions(out)] if code == 0 else []
        return code, texts, err.getvalue()


@pytest.fixture(scope="module")
def victims(tmp_path_factory):
    root = tmp_path_factory.mktemp("victims")
    before = os.environ.get("LORABATCH_CACHE")
    os.environ["LORABATCH_CACHE"] = str(root / "cache")
    yield Victims(root)
    os.environ.pop("LORABATCH_CACHE") if before is None else os.environ.update(
        LORABATCH_CACHE=before
    )


def damaged_json(text, rng):
    """Another value for a key anywhere, a key less, or one more."""
    document = json.loads(text)
    places = []

    def walk(value):
        for key in value if isinstance(value, dict) else range(min(len(value), 20)):
            places.append((value, key))
            if isinstance(value[key], (dict, list)):
                walk(value[key])

    walk(document)
    place, key = rng.choice(
        [p for p in places if p[0] is document] if rng.random() < 0.6 else places
    )
    if rng.random() < 0.2:
        del place[key]
    else:
        place[key] = rng.choice(ODD)
    return json.dumps(document)


def damaged_bytes(content, rng, *, head):
    """Flipped bits, a huge number or a cut, mostly in the first ``head`` bytes."""
    content = bytearray(content)
    end = min(len(content), head if rng.random() < 0.8 else len(content))
    kind = rng.choice(["flip", "flip", "number", "cut"])
    if kind == "flip":
        for _ in range(rng.choice([1, 1, 4])):
            content[rng.randrange(end)] ^= 1 << rng.randrange(8)
    elif kind == "number":
        at = rng.randrange(max(1, end - 8))
        content[at : at + 8] = struct.pack("<Q", rng.choice(HUGE))
    else:
        del content[rng.randrange(len(content)) :]
    return bytes(content)


def damaged_safetensors(content, rng):
    """The header as JSON with another value in it, or bytes."""
    (size,) = struct.unpack("<Q", content[:8])
    if rng.random() < 0.4:
        return damaged_bytes(content, rng, head=8 + size)
    header = damaged_json(content[8 : 8 + size].decode(), rng).encode()
    return struct.pack("<Q", len(header)) + header + content[8 + size :]


def damaged(path, content, rng):
    if path.suffix == ".safetensors":
        return damaged_safetensors(content, rng)
    if path.suffix == ".json" and rng.random() < 0.8:
        return damaged_json(content.decode(), rng).encode()
    return damaged_bytes(content, rng, head=len(content) if path.suffix == ".json" else 12_000)


def is_another_model(victims, kind, path, content, texts):
    """Whether other texts are right: the damage made another valid model, and not one that is half
    the old one."""
    if kind in ("llama", "gpt2"):
        # transformers reads the folder in the same way
        return victims.run(kind, "--backend", "hf")[:2] == (0, texts)
    if path.name == "adapter_config.json":
        before, after = json.loads(content), json.loads(path.read_text())
        return any(
            before.get(k) != after.get(k)
            for k in ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")
        )
    if kind == "adapter":
        (size,) = struct.unpack("<Q", content[:8])
        # the values of the weights alone
        return content[: 8 + size] == path.read_bytes()[: 8 + size]
    other = path.with_name("before.gguf")
    other.write_bytes(content)
    return read_header(other).shapes == read_header(path).shapes


def check(victims, seed):
    rng = random.Random(seed)
    kind, file = rng.choice(TARGETS)
    path = victims.root / kind / file
    content = path.read_bytes()
    path.write_bytes(damaged(path, content, rng))
    try:
        code, texts, error = victims.run(kind)
        assert code in CODES, error
        assert "Traceback" not in error
        assert code == 0 or [
            line for line in error.splitlines() if line.startswith("lorabatch infer: ")
        ], "a failure says why"
        if code == 0 and texts != victims.good[kind][1]:
            assert is_another_model(victims, kind, path, content, texts), (kind, file)
    finally:
        path.write_bytes(content)


PROFILE = {
    "deadline": None,
    "database": None,
    "derandomize": True,
    "suppress_health_check": list(HealthCheck),
}


@settings(max_examples=40, **PROFILE)
@given(seed=st.integers(0, 2**32 - 1))
def test_damage_is_said_or_harmless(victims, seed):
    check(victims, seed)


@pytest.mark.slow
@settings(max_examples=250, **PROFILE)
@given(seed=st.integers(0, 2**32 - 1))
def test_damage_is_said_or_harmless_often(victims, seed):
    check(victims, seed)
