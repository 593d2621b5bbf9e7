"""``lorabatch export --to gguf``: the file adds to a base's GGUF what peft's files add to the base."""

import gguf
import numpy as np
import pytest
import torch
from support.models import native, random_adapter, save_model, tiny_gguf, tiny_model

from lorabatch.cli import main
from lorabatch.model.lora import save_adapter
from lorabatch.model.lora_settings import LoraSettings

RANK = 3


def adapter_folder(model, folder, **changes):
    weights = random_adapter(native(model), r=RANK, seed=4)
    if changes:  # the same pairs under other scales
        settings = LoraSettings(r=RANK, alpha=6.0, target_modules=("all-linear",), **changes)
        weights = type(weights)(settings, weights.pairs)
    fan = model.config.model_type == "gpt2"
    save_adapter(folder, weights, base_name="x", base_fingerprint=None, fan_in_fan_out=fan)
    return weights


def tensors(path):
    return {t.name: np.array(t.data) for t in gguf.GGUFReader(path).tensors}


@pytest.mark.parametrize(
    "changes", [{}, {"use_rslora": True}, {"alpha_pattern": {"q_proj": 1.0, "down_proj": 9.0}}]
)
def test_base_plus_adapter_is_the_merged_model(tmp_path, changes):
    model = tiny_model("llama")
    save_model(model, tmp_path / "base")
    weights = adapter_folder(model, tmp_path / "adapter", **changes)
    words = ["export", str(tmp_path / "adapter"), "--base_model", str(tmp_path / "base")]
    assert main(words) == 0
    tiny_gguf(model, tmp_path / "base.gguf")
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for layer in weights.pairs:
            parameters[f"{layer}.weight"] += weights.delta(layer)
    tiny_gguf(model, tmp_path / "merged.gguf")

    base, merged = tensors(tmp_path / "base.gguf"), tensors(tmp_path / "merged.gguf")
    file = tmp_path / "adapter/adapter.gguf"
    adapter = tensors(file)
    values = {k: f.contents() for k, f in gguf.GGUFReader(file).fields.items()}
    assert (values["general.type"], values["adapter.type"]) == ("adapter", "lora")
    scale = values["adapter.lora.alpha"] / RANK
    assert len(adapter) == 2 * len(weights.pairs)
    for name in {n.rpartition(".")[0] for n in adapter}:
        delta = scale * adapter[f"{name}.lora_b"] @ adapter[f"{name}.lora_a"]
        assert np.abs(delta).max() > 0.01
        np.testing.assert_allclose(base[name] + delta, merged[name], atol=2e-5)


def test_gpt2_keeps_its_fused_attention_and_its_names(tmp_path):
    model = tiny_model("gpt2")
    save_model(model, tmp_path / "base")
    weights = adapter_folder(model, tmp_path / "adapter")
    output = tmp_path / "out.gguf"
    words = ["export", str(tmp_path / "adapter"), "--base_model", str(tmp_path / "base")]
    assert main([*words, "--output", str(output)]) == 0
    found = tensors(output)
    a, b = weights.pairs["transformer.h.1.attn.c_attn"]
    np.testing.assert_array_equal(found["blk.1.attn_qkv.weight.lora_a"], a)
    np.testing.assert_allclose(found["blk.1.attn_qkv.weight.lora_b"], b, rtol=1e-6)


def test_refusals(tmp_path, tiny_llama_dir, tiny_neox_dir, capsys):
    adapter_folder(tiny_model("gpt2"), tmp_path / "adapter")
    for words, code, said in (
        (["--base_model", str(tiny_llama_dir)], 65, "unexpected key"),
        (["--base_model", str(tiny_neox_dir)], 69, "native architectures only"),
        ([str(tmp_path), "--base_model", str(tiny_llama_dir)], 64, "takes one adapter"),
    ):
        assert main(["export", str(tmp_path / "adapter"), *words]) == code
        assert said in capsys.readouterr().err
    assert not (tmp_path / "adapter/adapter.gguf").exists()
