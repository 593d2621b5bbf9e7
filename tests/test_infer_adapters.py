"""Several adapters in one run: each request gets its own, the same as if it ran alone, and as if it were merged."""

import json

import pytest
from helpers import native, randomise_b, tiny_model

from lorabatch import kernels
from lorabatch.cli import main
from lorabatch.model.lora import LoraSettings, save_adapter
from lorabatch.records import read_jsonl

needs_kernels = pytest.mark.skipif(kernels.library("step") is None, reason="no CPU kernels on this machine")


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """Two adapter folders for ``tiny_llama_dir``."""
    folders = {}
    for seed, name in enumerate(("cardio", "onco")):
        model = native(tiny_model("llama"))
        adapter = model.attach(LoraSettings(r=4, alpha=16), seed=seed)
        randomise_b(adapter, seed=seed)
        folders[name] = tmp_path_factory.mktemp(name)
        save_adapter(folders[name], adapter.weights(), base_name="tiny", base_fingerprint=model.base_fingerprint, fan_in_fan_out=False)
    return folders


def infer(model, rows, folder, *more):
    """Completions by id of one run over the given rows."""
    folder.mkdir(exist_ok=True)
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    flags = ["--base_model", str(model), "--prompts", str(prompts), "--output_dir", str(folder / "out"), "--dtype", "fp32", "--no_cuda"]
    assert main(["infer", *flags, "--max_new_tokens", "12", "--ignore_eos", *more]) == 0
    return {record["id"]: record for record in read_jsonl(folder / "out" / "completions.jsonl")}


def rows_for(names):
    return [
        {"id": f"{name}-{i}", "prompt": f"The patient {i} has a fever", **({"adapter": name} if name else {})}
        for i in range(3)
        for name in names
    ]


@needs_kernels
def test_every_request_gets_its_adapter(tiny_llama_dir, tmp_path, adapters):
    bank = ["--adapters", *(f"{name}={folder}" for name, folder in adapters.items())]
    together = infer(
        tiny_llama_dir, [*rows_for(("cardio", None, "onco")), {"prompt": "x", "id": "bad", "adapter": "neuro"}], tmp_path / "all", *bank
    )
    assert together["bad"]["finish_reason"] == "error" and "unknown adapter 'neuro'" in together["bad"]["error"]
    assert {r["adapter"] for r in together.values()} == {"cardio", "onco", None, "neuro"}
    for name in ("cardio", None, "onco"):
        alone = infer(tiny_llama_dir, rows_for((name,)), tmp_path / f"{name}-alone", *bank, "--batch_size", "1")
        merged = infer(
            tiny_llama_dir, rows_for((None,)), tmp_path / f"{name}-merged", *(["--adapter_dir", str(adapters[name])] if name else [])
        )
        for i in range(3):
            text = together[f"{name}-{i}"]["text"]
            assert text == alone[f"{name}-{i}"]["text"] == merged[f"None-{i}"]["text"]
    assert len({together[f"{name}-0"]["text"] for name in ("cardio", None, "onco")}) == 3, "the adapters change the text"


def test_what_cannot_be_is_said_in_one_line(tiny_llama_dir, tmp_path, adapters, capsys):
    folder = adapters["cardio"]
    (tmp_path / "p.txt").write_text("a\n", encoding="utf-8")
    flags = ["infer", "--base_model", str(tiny_llama_dir), "--prompts", str(tmp_path / "p.txt"), "--output_dir", str(tmp_path / "out")]
    for more, code, words in (
        (["--adapters", "cardio"], 64, "is not NAME=DIR"),
        (["--adapters", f"a={folder}", f"a={folder}"], 64, "twice"),
        (["--adapters", f"a={tmp_path / 'none'}"], 65, "no such folder"),
        (["--adapters", f"a={folder}", "--adapter_dir", str(folder)], 64, "not both"),
        (["--adapters", f"a={folder}", "--backend", "hf"], 69, "not in one batch here"),
    ):
        assert main([*flags, *more, "--overwrite"]) == code
        assert words in capsys.readouterr().err
