"""The quantised base against peft on bitsandbytes, and how much memory it takes."""

import builtins
import json

import pytest
import torch
from support.commands import train_flags
from support.models import randomise_b, save_model, tiny_model

from lorabatch.cli import main
from lorabatch.model.hf import HfModel
from lorabatch.model.lora import LoraSettings
from lorabatch.model.native import NativeModel
from lorabatch.model.spec import spec_from_config

CPU = torch.device("cpu")


def loss_and_gradients(model, adapters):
    ids = [torch.arange(5, 35), torch.arange(50, 61)]
    model.train()
    loss = model.loss_sum(ids, [1, 4])
    loss.backward()
    return float(loss.detach()), {
        path: (a.grad.clone(), b.grad.clone()) for path, (a, b) in adapters.pairs.items()
    }


def reference(folder, adapters_like, **options):
    """The same model in transformers with bitsandbytes' layers and peft's adapters, with the same
    adapter weights."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(**options)
    loaded = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=config, device_map={"": "cpu"}
    )
    loaded.requires_grad_(False)
    model = HfModel(loaded, CPU)
    adapters = model.attach(LoraSettings(r=4, alpha=8.0), seed=0)
    model.model.train()  # or bitsandbytes would take bf16 inference kernels for the first layer
    for path, (a, b) in adapters.pairs.items():
        a.data.copy_(adapters_like.pairs[path][0].data)
        b.data.copy_(adapters_like.pairs[path][1].data)
    return model, adapters


def quantised(folder, product):
    from transformers import AutoConfig

    model = NativeModel.load(
        folder,
        spec_from_config(AutoConfig.from_pretrained(folder)),
        dtype=torch.float32,
        device=CPU,
        product=product,
    )
    adapters = model.attach(LoraSettings(r=4, alpha=8.0), seed=0)
    randomise_b(adapters)
    return model, adapters


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_nf4_equals_peft_on_bitsandbytes(tmp_path):
    pytest.importorskip("bitsandbytes")
    from lorabatch.model.quantised import Nf4

    folder = save_model(tiny_model("llama"), tmp_path)
    model, adapters = quantised(folder, Nf4)
    loss, gradients = loss_and_gradients(model, adapters)
    nf4 = {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.float32,
    }
    expected_loss, expected = loss_and_gradients(*reference(folder, adapters, **nf4))
    dense_loss, _ = loss_and_gradients(*quantised(folder, None))
    assert abs(dense_loss - loss) > 0.01, "it is not the dense base"
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert gradients.keys() == expected.keys()
    for path, pair in gradients.items():
        for ours, theirs in zip(pair, expected[path], strict=True):
            torch.testing.assert_close(
                ours, theirs, rtol=1e-3, atol=1e-5 * float(theirs.abs().max()), msg=path
            )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_int8_equals_peft_on_bitsandbytes(tmp_path):
    """The same integers and scales, and the same arithmetic: on CPUs bitsandbytes leaves
    activations as they are, as we do everywhere."""
    pytest.importorskip("bitsandbytes")
    from lorabatch.model.quantised import Int8

    folder = save_model(tiny_model("llama"), tmp_path)
    model, adapters = quantised(folder, Int8)
    loss, gradients = loss_and_gradients(model, adapters)
    theirs, theirs_adapters = reference(folder, adapters, load_in_8bit=True)
    layers = {n: m for n, m in theirs.model.named_modules() if n.endswith("base_layer")}
    assert len(layers) == 7 * 3
    for layer in model.decoder.linears():
        rebuilt = layer.product.weight(torch.float32)
        for part in layer.parts:
            (name,) = (n for n in layers if n.endswith(f"{part.path}.base_layer"))
            weight = layers[name].weight
            expected = weight.CB.float() * weight.SCB[:, None] / 127
            torch.testing.assert_close(
                rebuilt[part.start : part.stop], expected, rtol=1e-6, atol=0, msg=part.path
            )
    expected_loss, expected = loss_and_gradients(theirs, theirs_adapters)
    _, dense = loss_and_gradients(*quantised(folder, None))
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    for path, pair in gradients.items():
        for ours, same, other in zip(pair, expected[path], dense[path], strict=True):
            assert (ours - same).norm() < 1e-4 * same.norm(), path
            assert (ours - other).norm() > 1e-2 * other.norm(), "it is not the dense base"


@pytest.mark.parametrize(("name", "bits", "error"), [("Nf4", 4.6, 0.13), ("Int8", 8.6, 0.01)])
def test_weights_are_small_and_near(name, bits, error):
    pytest.importorskip("bitsandbytes")
    from lorabatch.model import quantised as module

    weight = torch.randn(192, 64, generator=torch.Generator().manual_seed(0))
    product = getattr(module, name)(weight, [64, 128])
    rebuilt = product.weight(torch.float32)
    assert product.num_bytes * 8 / weight.numel() < bits
    assert 0 < float((rebuilt - weight).norm() / weight.norm()) < error
    x, grad = torch.randn(5, 64), torch.randn(5, 192)
    torch.testing.assert_close(product.forward(x, None), x @ rebuilt.t())
    torch.testing.assert_close(product.input_grad(grad), grad @ rebuilt)


@pytest.mark.parametrize("flag", ["--load_in_4bit", "--load_in_8bit"])
def test_training_on_a_quantised_base(flag, tiny_llama_dir, corpus, tmp_path):
    pytest.importorskip("bitsandbytes")
    fixed = ["--max_steps", 30, "--epochs", 30, "--batch_size", 4, "--lr", 0.01]
    assert main(train_flags(tiny_llama_dir, corpus, tmp_path / "run", flag, *fixed)) == 0
    steps = [
        e
        for e in map(json.loads, (tmp_path / "run" / "events.jsonl").read_text().splitlines())
        if e["event"] == "step"
    ]
    assert steps[-1]["loss"] < steps[0]["loss"] / 3
    model = json.loads((tmp_path / "run" / "run.json").read_text())["model"]
    assert model["base_bytes"] < model["base_params"] * 4


def test_without_the_package_it_is_one_line(tiny_llama_dir, corpus, tmp_path, monkeypatch, capsys):
    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name.split(".")[0] == "bitsandbytes":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    assert main(train_flags(tiny_llama_dir, corpus, tmp_path / "run", "--load_in_4bit")) == 69
    assert "pip install bitsandbytes" in capsys.readouterr().err.splitlines()[-1]
    assert (
        main(
            train_flags(
                tiny_llama_dir,
                corpus,
                tmp_path / "run",
                "--overwrite",
                "--load_in_4bit",
                "--load_in_8bit",
            )
        )
        == 64
    )
    assert (
        main(train_flags(tiny_llama_dir, corpus, tmp_path / "run", "--overwrite", "--shard_base"))
        == 64
    )
    assert "torchrun or srun" in capsys.readouterr().err
