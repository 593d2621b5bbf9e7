"""The FLOPs and bytes that we claim, against torch's own count of what the operators do."""

import pytest
import torch
from support.models import native, random_ids, randomise_b, tiny_model
from torch.utils.flop_counter import FlopCounterMode

from lorabatch.model.cost import decode_bytes, decode_flops, element_bytes, training_flops
from lorabatch.model.lora import LoraSettings
from lorabatch.model.spec import spec_from_config

SMOLLM2 = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}


def published_config(name):
    from transformers import GPT2Config, LlamaConfig

    return LlamaConfig(**SMOLLM2) if name == "smollm2" else GPT2Config()


@pytest.mark.parametrize("name", ["smollm2", "gpt2"])
def test_forward_products_equal_torchs_count(name):
    """On the meta device nothing is computed; torch counts attention over all L² pairs, we over the
    causal half."""
    from transformers import AutoModelForCausalLM

    config, length = published_config(name), 100
    spec = spec_from_config(config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        with FlopCounterMode(display=False) as counter:
            # given ready-made, because making it looks at values
            mask = torch.zeros(1, 1, length, length)
            model(
                input_ids=torch.zeros(1, length, dtype=torch.long),
                attention_mask=mask,
                use_cache=False,
            )
    products = 2 * spec.num_matmul_params * length
    attention = 4 * length**2 * spec.num_layers * spec.num_heads * spec.head_dim
    assert counter.get_total_flops() == pytest.approx(products + attention, rel=0.02)
    assert attention < 0.1 * products, "else the products would not be what is compared"


def in_place_flops(out, left, right, **unused):
    """torch counts ``addmm`` but not ``addmm_``; the arguments are shapes."""
    return 2 * left[0] * left[1] * right[1]


def counted_training_flops(model, documents, first_targets):
    """FLOPs of all matrix products of forward and backward outside attention, as torch counts
    them."""
    with FlopCounterMode(
        display=False, custom_mapping={torch.ops.aten.addmm_: in_place_flops}
    ) as counter:
        model.loss_sum(documents, first_targets).backward()
    return sum(
        flops
        for op, flops in counter.get_flop_counts()["Global"].items()
        if "attention" not in str(op) and "bmm" not in str(op)
    )


@pytest.mark.parametrize("variant", ["llama", "gpt2", "qwen3"])
def test_training_step_does_the_work_that_is_claimed(variant, monkeypatch):
    """4 FLOPs a frozen parameter and token, 6 an adapter's; but the lowest layer's input needs no
    gradient."""
    # torch does not count our kernels
    monkeypatch.setattr("lorabatch.model.linear.train_ops", lambda x: None)
    # torch does not count oneDNN's private operators
    model = native(tiny_model(variant), prepack=False)
    for layer in model.decoder.layers:
        # torch's counter cannot follow a gradient within a gradient; recomputing adds no product
        layer.checkpointing = "none"
    adapters = model.attach(LoraSettings(r=4), seed=0)
    randomise_b(adapters)
    lengths, first_targets = [30, 12, 50], [1, 7, 40]
    tokens, targets = sum(lengths), sum(n - f for n, f in zip(lengths, first_targets, strict=True))
    claimed = training_flops(
        model.spec,
        tokens=tokens,
        targets=targets,
        squared_lengths=0,
        lora_params=adapters.num_params,
    )
    lowest = next(model.decoder.linears())
    rank = sum(a.a.shape[0] for a in lowest.adapters.values())
    not_done = 2 * tokens * lowest.in_features * (lowest.out_features + rank)
    assert counted_training_flops(model, random_ids(lengths), first_targets) == claimed - not_done


def test_attention_counts_the_causal_half():
    """Per layer and pair of positions: two products forward, four backward, 2 FLOPs each, half of
    the pairs."""
    spec = spec_from_config(published_config("smollm2"))
    one, both = (
        training_flops(spec, tokens=0, targets=0, squared_lengths=n, lora_params=0)
        for n in (50**2, 50**2 + 20**2)
    )
    assert one == (2 + 4) * 2 * (50**2 / 2) * 30 * 9 * 64
    assert both / one == pytest.approx((2500 + 400) / 2500)


def test_matmul_parameters_of_the_published_models():
    smollm2, gpt2 = (spec_from_config(published_config(name)) for name in ("smollm2", "gpt2"))
    assert (
        smollm2.num_matmul_params
        == 30 * (576 * (576 + 192 + 192) + 576 * 576 + 3 * 576 * 1536) + 576 * 49152
    )
    assert gpt2.num_matmul_params == 12 * 12 * 768 * 768 + 768 * 50257


def test_decode_bytes():
    spec = spec_from_config(published_config("smollm2"))
    assert spec.kv_elements_per_token == 2 * 30 * 3 * 64
    assert (
        decode_bytes(spec, steps=3, kv_tokens=0, element_bytes=(2, 4))
        == 2 * 3 * spec.num_matmul_params
    )
    assert decode_bytes(spec, steps=0, kv_tokens=7, element_bytes=(2, 4)) == 4 * 7 * 2 * 30 * 3 * 64


def test_int8_weights_are_one_byte_and_the_cache_stays_as_it_is():
    assert element_bytes("int8", 2) == (1, 2) and element_bytes("none", 4) == (4, 4)


def test_decode_flops():
    """Two per weight and token; per cached position two products with 9 query heads of 64, in 30
    layers."""
    spec = spec_from_config(published_config("smollm2"))
    assert decode_flops(spec, tokens=5, kv_tokens=0) == 2 * 5 * spec.num_matmul_params
    assert decode_flops(spec, tokens=0, kv_tokens=7) == 7 * 30 * 2 * 2 * 9 * 64
