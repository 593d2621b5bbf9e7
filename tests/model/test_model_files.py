"""Model folders, adapters and GGUF files from anywhere: what does not fit is one line and 65,
before anything computes."""

import json
import os
import re
import shutil
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.commands import completions, infer_flags, train_flags, write_lines
from support.models import randomise_b, save_model, tiny_gguf, tiny_model

from lorabatch.cli import main
from lorabatch.model import hub
from lorabatch.model.load import load_model
from lorabatch.model.lora import LoraSettings, save_adapter

WEIGHTS = "model.safetensors"
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LORABATCH_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def prompts(tmp_path):
    return write_lines(tmp_path / "prompts.txt", ["The patient has a fever", "chest pain"])


@pytest.fixture
def model(tiny_llama_dir, tmp_path):
    """A copy of the tiny Llama to damage."""
    return shutil.copytree(tiny_llama_dir, tmp_path / "model")


@pytest.fixture(scope="module")
def saved_adapter(tiny_llama_dir, tmp_path_factory):
    """Folder of an adapter for the tiny Llama that changes its texts. Read it only."""
    from lorabatch.model.hub import ModelSource
    from lorabatch.model.load import load_config

    options = {"backend": "native", "dtype": torch.float32, "device": torch.device("cpu")}
    base = load_model(ModelSource("tiny", tiny_llama_dir), load_config(tiny_llama_dir), **options)
    adapters = base.attach(
        LoraSettings(r=4, alpha=8.0, target_modules=("q_proj", "down_proj")), seed=0
    )
    randomise_b(adapters)
    folder = tmp_path_factory.mktemp("adapter")
    save_adapter(
        folder,
        adapters.weights(),
        base_name="tiny",
        base_fingerprint=base.base_fingerprint,
        fan_in_fan_out=False,
    )
    return folder


@pytest.fixture
def adapter(saved_adapter, tmp_path):
    """A copy of it to damage."""
    return shutil.copytree(saved_adapter, tmp_path / "adapter")


def infer(base, prompts, *more):
    """Exit code of a short greedy run into ``out`` beside the prompts."""
    fixed = ["--max_new_tokens", 4, "--ignore_eos", "--no_cuda", "--output_order", "input"]
    overwrite = [] if "--resume" in more else ["--overwrite"]
    return main(infer_flags(base, prompts, prompts.parent / "out", *fixed, *overwrite, *more))


def train(base, corpus, save_dir, *more):
    fixed = ["--val_path", "none", "--no_cuda", "--max_steps", 1]
    return main(train_flags(base, corpus, save_dir, *fixed, *more))


def texts(prompts):
    return [record["text"] for record in completions(prompts.parent / "out")]


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def said(capsys):
    """What stderr holds, which is one line besides the announcement of the hf backend."""
    lines = [
        line for line in capsys.readouterr().err.splitlines() if not line.startswith("backend: ")
    ]
    assert len(lines) == 1, lines
    return lines[0]


# Weights against config.json


@pytest.mark.parametrize("backend", ["native", pytest.param("hf", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda t: t.update({Q_PROJ: torch.zeros(64, 65)}),
            rf"'{Q_PROJ}' is \[64, 65\] and by config.json \[64, 64\]",
        ),
        (lambda t: t.update({Q_PROJ: t[Q_PROJ].reshape(-1)}), rf"'{Q_PROJ}' is \[4096\]"),
        (lambda t: t.pop(Q_PROJ), f"the checkpoint lacks '{Q_PROJ}'"),
        (
            lambda t: t.update({Q_PROJ.replace("1", "3"): t[Q_PROJ].clone()}),
            "1 tensors that this architecture does not have",
        ),
        (
            lambda t: t.update({Q_PROJ.replace("weight", "bias"): torch.zeros(64)}),
            "1 tensors that this architecture does not have",
        ),
        (
            lambda t: t.update({Q_PROJ: t[Q_PROJ].to(torch.int32)}),
            "holds torch.int32, not real numbers",
        ),
        (
            lambda t: t["model.norm.weight"].fill_(torch.nan),
            "'model.norm.weight' holds values that are not finite",
        ),
        (
            lambda t: t[Q_PROJ].view(-1)[7:8].fill_(-torch.inf),
            f"'{Q_PROJ}' holds values that are not finite",
        ),
    ],
    ids=["shape", "axes", "missing", "layer too many", "bias too many", "integers", "nan", "inf"],
)
def test_weights_are_compared_with_the_configuration(
    model, prompts, capsys, change, words, backend
):
    edit_tensors(model / WEIGHTS, change)
    assert infer(model, prompts, "--backend", backend) == 65
    assert re.search(words, line := said(capsys)) and str(model) in line


@pytest.mark.parametrize("variant", ["gpt2", "llama-biases-tied", "qwen2-window", "qwen3"])
def test_every_bias_and_norm_is_needed(variant, tmp_path):
    """A missing one was a zero, or a norm of another kind."""
    from safetensors import safe_open

    from lorabatch.errors import DataError
    from lorabatch.model.load import load_config
    from lorabatch.model.spec import spec_from_config
    from lorabatch.model.weights import checked, read_checkpoint

    folder = save_model(tiny_model(variant), tmp_path)
    spec = spec_from_config(load_config(folder))
    with safe_open(folder / WEIGHTS, "pt") as file:
        names = set(file.keys())
    tensors = read_checkpoint(folder)
    assert names == checked(spec, tensors).keys()
    for name in names:
        with pytest.raises(DataError, match=f"lacks '{re.escape(name)}'"):
            checked(spec, {k: v for k, v in tensors.items() if k != name})


def test_gguf_files_are_compared_with_their_own_header(tiny_llama_dir, prompts, capsys):
    tiny_gguf(tiny_model("llama"), prompts.parent / "good.gguf")
    assert infer(prompts.parent / "good.gguf", prompts) == 0
    converted = texts(prompts)
    assert infer(tiny_llama_dir, prompts) == 0
    assert texts(prompts) == converted
    capsys.readouterr()
    for blocks, words in (
        (4, r"the checkpoint lacks 9 tensors, 'blk.3.attn_q.weight'"),
        (2, r"9 tensors that this architecture does not have \(blk.2"),
        (10**6, "llama.block_count is 1000000, not a whole number up to 1,024"),
        (0, "llama.block_count is 0"),
    ):
        tiny_gguf(tiny_model("llama"), prompts.parent / f"{blocks}.gguf", blocks=blocks)
        assert infer(prompts.parent / f"{blocks}.gguf", prompts) == 65
        assert re.search(words, said(capsys))


@pytest.mark.parametrize("place", [8, 16], ids=["tensors", "values"])
def test_gguf_counts_end_with_the_file(place, prompts, capsys):
    """The library would count to 2^60."""
    path = prompts.parent / "model.gguf"
    tiny_gguf(tiny_model("llama"), path)
    content = bytearray(path.read_bytes())
    content[place : place + 8] = (2**60).to_bytes(8, "little")
    path.write_bytes(content)
    assert infer(path, prompts) == 65
    assert "cannot be converted" in (line := said(capsys)) or "within its header" in line


# Numbers of config.json


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 10**9},
        {"num_hidden_layers": -1},
        {"num_hidden_layers": 0},
        {"num_hidden_layers": 3.0},
        {"num_hidden_layers": "3"},
        {"num_hidden_layers": True},
        {"vocab_size": 10**12},
        {"num_key_value_heads": 3},
        {"num_attention_heads": 0},
        {"head_dim": 2**40},
        {"rms_norm_eps": float("nan")},
        {"rope_parameters": {"rope_type": "default", "rope_theta": "x"}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 0}},
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 500.0}},
        {"rope_parameters": {"rope_type": "linear", "factor": float("inf")}},
        {"max_position_embeddings": [128]},
        {"eos_token_id": "x"},
        {"model_type": 5},
        {"hidden_act": 5},
        {"layer_types": 5},
    ],
    ids=str,
)
def test_numbers_that_no_model_has(model, prompts, capsys, changes):
    edit_json(model / "config.json", **changes)
    assert infer(model, prompts) == 65
    assert str(model) in said(capsys)


def test_a_tokenizer_is_tried_before_anything_is_loaded(model, prompts, capsys):
    edit_json(model / "tokenizer_config.json", model_max_length=[])
    assert infer(model, prompts) == 65
    assert "no usable tokenizer (TypeError" in said(capsys)


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("kind", ["native type", "unknown type"])
def test_code_of_a_model_never_runs_and_nobody_is_asked(
    file, kind, model, prompts, capsys, monkeypatch
):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question was asked"))
    (model / "evil.py").write_text(
        "import pathlib\npathlib.Path(__file__).with_name('ran').touch()\n"
    )
    maps = {
        "AutoConfig": "evil.Config",
        "AutoModelForCausalLM": "evil.Model",
        "AutoTokenizer": ["evil.Tokenizer", None],
    }
    other = {
        "config.json": {"model_type": "evil"},
        "tokenizer_config.json": {"tokenizer_class": "EvilTokenizer"},
    }[file]
    edit_json(model / file, auto_map=maps, **(other if kind == "unknown type" else {}))
    code = infer(model, prompts)
    assert not (model / "ran").exists()
    if kind == "unknown type" and file == "config.json":
        assert code == 65
        assert "needs code of its own to run (auto_map), which is never run here" in said(capsys)
    else:
        assert code in (0, 65)


# Tokens and the embedding


def test_tokens_that_the_model_does_not_have(model, prompts, capsys):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens(["fever"])  # its number is the first beyond the embedding
    tokenizer.save_pretrained(model)
    for backend in ("native", "hf"):
        assert infer(model, prompts, "--backend", backend) == 0
        errors = [record["error"] for record in completions(prompts.parent / "out")]
        assert errors == [
            "the tokenizer writes token 300, and the model's vocabulary ends at 299",
            None,
        ]
    capsys.readouterr()
    assert train(model, prompts, prompts.parent / "lora") == 65
    assert f"{prompts}:1: the tokenizer writes token 300" in said(capsys)


# Adapters


@pytest.mark.parametrize(
    "changes",
    [
        {"r": 10**9},
        {"r": "4"},
        {"r": 4.0},
        {"r": True},
        {"lora_alpha": float("nan")},
        {"lora_alpha": "8"},
        {"lora_alpha": 10**400},
        {"lora_dropout": "x"},
        {"use_rslora": "false"},
        {"target_modules": 5},
        {"rank_pattern": [1]},
        {"rank_pattern": {"q_proj": "4"}},
        {"alpha_pattern": {"q_proj": float("inf")}},
        {"alpha_pattern": {"(": 8}},
        {"alora_invocation_tokens": [1]},
        {"init_lora_weights": "pissa_niter_4"},
    ],
    ids=str,
)
def test_adapter_configurations_that_cannot_be(tiny_llama_dir, adapter, prompts, capsys, changes):
    edit_json(adapter / "adapter_config.json", **changes)
    assert infer(tiny_llama_dir, prompts, "--adapter_dir", adapter) == 65
    assert str(adapter) in said(capsys)


@pytest.mark.parametrize("backend", ["native", "hf"])
def test_patterns_do_not_run_away(tiny_llama_dir, adapter, prompts, capsys, backend):
    """Python's own matcher, and so peft, would need longer than anybody waits for each of these."""
    assert infer(tiny_llama_dir, prompts, "--adapter_dir", adapter) == 0
    expected = texts(prompts)
    edit_json(
        adapter / "adapter_config.json",
        alpha_pattern={r"(\w|\w|\.)+!": 1},
        target_modules=r"((\w|\.)+)+!|.*(q|down)_proj",
    )
    assert infer(tiny_llama_dir, prompts, "--adapter_dir", adapter, "--backend", backend) == 0
    assert texts(prompts) == expected
    capsys.readouterr()
    edit_json(
        adapter / "adapter_config.json",
        alpha_pattern={r"(.*)(.*)(.*)(.*)(.*)(.*)(.*)\3\4\5\6\7\8\9[QZ]": 1},
    )
    assert infer(tiny_llama_dir, prompts, "--adapter_dir", adapter, "--backend", backend) == 65
    assert "TimeoutError" in said(capsys)


@pytest.mark.parametrize("backend", ["native", "hf"])
def test_an_adapter_of_another_base_is_refused(tmp_path, saved_adapter, prompts, capsys, backend):
    other = save_model(tiny_model("llama", seed=5), tmp_path / "other")
    assert infer(other, prompts, "--adapter_dir", saved_adapter, "--backend", backend) == 65
    assert "the adapter was trained on another base model; use --base_model tiny" in said(capsys)


def test_adapters_trained_on_the_hf_backend_know_their_base(
    tiny_neox_dir, tmp_path, prompts, capsys
):
    assert train(tiny_neox_dir, prompts, tmp_path / "lora") == 0
    assert infer(tiny_neox_dir, prompts, "--adapter_dir", tmp_path / "lora") == 0
    other = save_model(tiny_model("neox", seed=5), tmp_path / "other")
    capsys.readouterr()
    assert infer(other, prompts, "--adapter_dir", tmp_path / "lora") == 65
    assert "trained on another base model" in said(capsys)


# What a resume goes on with


def scale_head(folder):
    edit_tensors(folder / WEIGHTS, lambda t: t["lm_head.weight"].mul_(1.01))


def add_template(folder):
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    )


def swap_tokens(folder):
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    path.write_text(json.dumps(tokenizer), encoding="utf-8")


@pytest.mark.parametrize(
    "change",
    [
        scale_head,
        add_template,
        swap_tokens,
        lambda folder: (folder / "generation_config.json").write_text('{"eos_token_id": [0, 7]}'),
        lambda folder: edit_json(folder / "tokenizer_config.json", add_bos_token=True),
    ],
    ids=["head", "chat template", "tokenizer", "generation defaults", "tokenizer settings"],
)
def test_a_resume_does_not_mix_models(model, prompts, capsys, change):
    assert infer(model, prompts) == 0
    assert infer(model, prompts, "--resume") == 0
    capsys.readouterr()
    change(model)
    assert infer(model, prompts, "--resume") == 64
    assert "another prompt, parameters, model or adapter" in said(capsys)


def test_a_resume_of_the_hf_backend_knows_all_weights(tiny_neox_dir, tmp_path, prompts):
    model = shutil.copytree(tiny_neox_dir, tmp_path / "model")
    assert infer(model, prompts) == 0
    edit_tensors(
        model / WEIGHTS,
        lambda t: t["gpt_neox.layers.1.mlp.dense_h_to_4h.weight"].view(-1)[1:2].add_(0.5),
    )
    assert infer(model, prompts, "--resume") == 64


@pytest.mark.slow
def test_shards_of_one_run_are_of_one_model(model, prompts, capsys):
    (prompts.parent / "out").mkdir()
    more = ["--shards", 2, "--max_new_tokens", 2, "--no_cuda"]
    flags = infer_flags(model, prompts, prompts.parent / "out", *more)
    (model / "tokenizer.json").rename(model / "away.txt")
    assert main(flags) == 65, "nothing can run without a tokenizer, but the plan stands"
    (model / "away.txt").rename(model / "tokenizer.json")
    capsys.readouterr()
    assert main(flags) == 64
    assert "base_sha256 differ" in said(capsys)


def test_training_does_not_go_on_over_another_head(model, prompts, capsys):
    more = ["--resume", "auto", "--save_every_steps", 1]
    assert train(model, prompts, prompts.parent / "lora", *more) == 0
    scale_head(model)
    capsys.readouterr()
    assert train(model, prompts, prompts.parent / "lora", *more, "--max_steps", 2) == 64
    assert "base" in said(capsys)


def test_a_file_is_hashed_once_for_each_of_its_versions(tmp_path, monkeypatch):
    path = tmp_path / "weights"
    path.write_bytes(b"a" * 100)
    first, real = hub.known_sha256(path), hub.file_sha256
    monkeypatch.setattr(
        hub, "time", type("later", (), {"time": staticmethod(lambda: time.time() + 10)})
    )
    assert hub.known_sha256(path) == first == real(path)
    monkeypatch.setattr(hub, "file_sha256", lambda path: pytest.fail("read again"))
    assert hub.known_sha256(path) == first
    monkeypatch.setattr(hub, "file_sha256", real)
    before = path.stat()
    path.write_bytes(b"b" * 100)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # as rsync and tar do
    assert hub.known_sha256(path) == real(path) != first
    kept = next((tmp_path / "cache" / "sha256").iterdir())
    kept.write_bytes(b"\xff damaged")
    assert hub.known_sha256(path) == real(path)
