"""The decoder and both backends against transformers: logits, greedy tokens, isolation, loading,
what is refused."""

import shutil
from types import SimpleNamespace

import pytest
import torch
from support.models import (
    EOS_ID,
    GPT2,
    LLAMA,
    NATIVE_VARIANTS,
    VOCAB,
    assert_same_logits,
    engine_greedy,
    native,
    packed_logits,
    random_ids,
    reference_greedy,
    reference_logits,
    tiny_model,
    variant_config,
)

from lorabatch.errors import DataError, UnavailableError, UsageError
from lorabatch.infer.runners.eager import NativeRunner
from lorabatch.infer.runners.hf import HfRunner
from lorabatch.kernels.onednn import Dense, Prepacked
from lorabatch.model.hf import HfModel
from lorabatch.model.hub import ModelSource
from lorabatch.model.load import load_config, load_model, load_tokenizer
from lorabatch.model.lora import LoraSettings, save_adapter
from lorabatch.model.native import NativeModel
from lorabatch.model.spec import spec_from_config
from lorabatch.model.weights import build_decoder, fingerprint, normalised, read_checkpoint

LENGTHS = [5, 1, 40, 17]  # the longest is five times the sliding windows
CPU = torch.device("cpu")
variants = pytest.mark.parametrize("variant", NATIVE_VARIANTS)


# Logits


@variants
@pytest.mark.parametrize("prepack", [True, False])
def test_packed_logits_equal_transformers_one_by_one(variant, prepack):
    reference = tiny_model(variant)
    model = native(reference, prepack=prepack)
    assert {type(layer.product) for layer in model.decoder.linears()} == {
        Prepacked if prepack else Dense
    }
    documents = random_ids(LENGTHS)
    assert_same_logits(model, reference, documents)
    assert torch.cat(packed_logits(model, documents)).std() > 0.5, "flat logits would hide errors"


@pytest.mark.parametrize("variant", ["gpt2", "llama", "qwen3"])
def test_bf16_logits_stay_near_fp32(variant):
    reference = tiny_model(variant)
    documents = random_ids(LENGTHS)
    exact = torch.cat(packed_logits(native(reference), documents))
    rounded = torch.cat(packed_logits(native(reference, dtype=torch.bfloat16), documents))
    assert rounded.dtype == torch.bfloat16
    error = (rounded.float() - exact).norm() / exact.norm()
    assert 0 < error < 0.03


@pytest.mark.slow
def test_distilgpt2_shape_equals_transformers():
    reference = tiny_model("distilgpt2", seed=3)
    spec = spec_from_config(reference.config)
    assert (
        spec.num_layers,
        spec.num_heads,
        spec.hidden_size,
        spec.vocab_size,
        spec.max_positions,
    ) == (6, 12, 768, 50257, 1024)
    with torch.no_grad():  # 768 inputs: back to the scale of the published weights
        for parameter in reference.parameters():
            if parameter.dim() == 2:
                parameter.mul_(0.2)
    assert_same_logits(native(reference), reference, random_ids([7, 1, 120, 33], vocab=50257))


@pytest.fixture(scope="module")
def real_pair(real_model_dir):
    """(transformers' SmolLM2 and ours in fp32, tokenizer)."""
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(
        real_model_dir, dtype=torch.float32, local_files_only=True
    ).eval()
    config = load_config(real_model_dir)
    ours = NativeModel.load(
        real_model_dir, spec_from_config(config), dtype=torch.float32, device=CPU
    )
    return reference, ours, load_tokenizer(real_model_dir)


REAL_TEXTS = [
    "The capital of Brazil is",
    "Question: What are the symptoms of asthma?\nAnswer:",
    "def fibonacci(n):",
    "A",
    "Once upon a time, in a small village by the sea, there lived",
    "Hypertension is treated with",
    "O paciente chegou ao hospital com febre e",
    "1, 1, 2, 3, 5, 8,",
]


@pytest.mark.slow
def test_real_model_logits_equal_transformers(real_pair):
    reference, ours, tokenizer = real_pair
    documents = [torch.tensor(tokenizer(text)["input_ids"]) for text in REAL_TEXTS]
    for got, ids in zip(packed_logits(ours, documents), documents, strict=True):
        # 2e-4 of logits up to 17 after 30 layers: 1.2e-4 measured, because prepacked sums are
        # ordered otherwise
        torch.testing.assert_close(got, reference_logits(reference, ids), rtol=0, atol=2e-4)


@pytest.mark.slow
def test_real_model_greedy_tokens_equal_transformers(real_pair):
    reference, ours, tokenizer = real_pair
    prompts = [torch.tensor(tokenizer(text)["input_ids"]) for text in REAL_TEXTS]
    expected = [reference_greedy(reference, ids, 16) for ids in prompts]
    runner = NativeRunner(ours, num_slots=8, capacity=64)
    assert (
        engine_greedy(
            runner, prompts, [16] * 8, num_slots=8, prefill_tokens=2048, tokenizer=tokenizer
        )
        == expected
    )


# Generation

PROMPT_LENGTHS = [3, 19, 1, 50, 9]
# different ends: slots are freed, moved and refilled; 50 + 26 crosses a page of the cache
NEW_TOKENS = [24, 28, 24, 26, 25]


@variants
def test_batched_greedy_tokens_equal_transformers_one_by_one(variant):
    reference = tiny_model(variant)
    prompts = random_ids(PROMPT_LENGTHS, seed=1)
    expected = [
        reference_greedy(reference, ids, n) for ids, n in zip(prompts, NEW_TOKENS, strict=True)
    ]
    assert len({token for row in expected for token in row}) > 10, (
        "a constant output would prove little"
    )
    runner = NativeRunner(native(reference), num_slots=3, capacity=96)
    assert engine_greedy(runner, prompts, NEW_TOKENS, num_slots=3) == expected


# Isolation


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", ["gpt2", "llama", "mistral-window"])
@pytest.mark.parametrize("prepack", [True, False])
def test_other_documents_do_not_change_a_bit(variant, dtype, prepack):
    model = native(tiny_model(variant), dtype=dtype, prepack=prepack)
    first, middle, last = random_ids([9, 21, 14])
    before = packed_logits(model, [first, middle, last])
    after = packed_logits(model, [first, random_ids([21], seed=9)[0], last])
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[2], after[2])
    assert not torch.equal(before[1], after[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_neighbours_of_any_length_do_not_change_a_bit(dtype):
    model = native(tiny_model("llama"), dtype=dtype)
    document, long, short = random_ids([9, 60, 2])
    alone = packed_logits(model, [document])[0]
    assert torch.equal(alone, packed_logits(model, [long, document])[1])
    assert torch.equal(alone, packed_logits(model, [short, document, long])[1])


# What the specification says of a configuration


@variants
def test_base_parameters_are_counted_as_transformers_counts_them(variant):
    reference = tiny_model(variant)
    assert native(reference).num_base_params == sum(p.numel() for p in reference.parameters())


def test_window_layers_follow_max_window_layers():
    spec = spec_from_config(variant_config("qwen2-window"))
    assert (spec.sliding_window, spec.window_layers) == (8, (1, 2))
    assert spec_from_config(variant_config("qwen2")).window_layers == ()
    assert spec_from_config(variant_config("mistral-window")).window_layers == (0, 1, 2)


@pytest.mark.parametrize("kind", ["llama3", "yarn", "linear"])
def test_scaled_rope_differs_from_plain_rope(kind):
    plain = spec_from_config(variant_config("llama")).rope_inv_freq
    spec = spec_from_config(variant_config(f"llama-rope-{kind}"))
    assert len(spec.rope_inv_freq) == len(plain) == 8
    assert spec.rope_inv_freq != plain
    assert (spec.rope_scale != 1.0) == (kind == "yarn")


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("GPT2Config", GPT2 | {"scale_attn_by_inverse_layer_idx": True}),
        ("GPT2Config", GPT2 | {"scale_attn_weights": False}),
        ("GPT2Config", GPT2 | {"add_cross_attention": True}),
        ("GPT2Config", GPT2 | {"activation_function": "relu"}),
        ("LlamaConfig", LLAMA | {"hidden_act": "gelu"}),
        (
            "LlamaConfig",
            LLAMA | {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
        ),
        ("GPTNeoXConfig", {}),
    ],
)
def test_what_the_decoder_cannot_do_is_left_to_the_hf_backend(kind, changes):
    import transformers

    assert spec_from_config(getattr(transformers, kind)(**changes)) is None


# Checkpoints


def test_folder_loads_to_the_same_logits(tiny_llama_dir, tiny_gpt2_dir):
    for folder, variant in ((tiny_llama_dir, "llama"), (tiny_gpt2_dir, "gpt2")):
        model = load_model(
            ModelSource("tiny", folder),
            load_config(folder),
            backend="auto",
            dtype=torch.float32,
            device=CPU,
        )
        assert model.backend == "native"
        assert_same_logits(model, tiny_model(variant), random_ids(LENGTHS))


def test_gpt2_checkpoint_without_prefix_and_with_mask_buffers_is_the_same_base():
    reference = tiny_model("gpt2")
    spec, tensors = spec_from_config(reference.config), reference.state_dict()
    bare = {k.removeprefix("transformer."): v for k, v in tensors.items() if k != "lm_head.weight"}
    for i in range(spec.num_layers):
        bare[f"h.{i}.attn.bias"] = torch.ones(1, 1, 4, 4)
        bare[f"h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    model = NativeModel(spec, build_decoder(spec, bare), "")
    assert_same_logits(model, reference, random_ids(LENGTHS))
    assert fingerprint(spec, normalised(spec, bare)) == fingerprint(spec, normalised(spec, tensors))


def test_sharded_and_pickled_checkpoints_read_the_same_tensors(tmp_path):
    model = tiny_model("llama")
    expected = {k: v.clone() for k, v in model.state_dict().items()}
    (tmp_path / "bin").mkdir()
    torch.save(expected, tmp_path / "bin" / "pytorch_model.bin")
    model.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    shards = sorted((tmp_path / "shards").glob("model-*.safetensors"))
    assert len(shards) > 1
    for folder in ("bin", "shards"):
        tensors = read_checkpoint(tmp_path / folder)
        assert set(tensors) == set(expected)
        assert all(torch.equal(tensors[k], expected[k]) for k in expected)
    shards[1].unlink()
    with pytest.raises(
        DataError, match=rf"1 of {len(shards)} weight files are missing \({shards[1].name}\)"
    ):
        read_checkpoint(tmp_path / "shards")


def test_checkpoint_problems_are_named(tmp_path):
    reference = tiny_model("llama")
    spec, tensors = spec_from_config(reference.config), dict(reference.state_dict())
    with pytest.raises(DataError, match="no weights"):
        read_checkpoint(tmp_path)
    with pytest.raises(
        DataError,
        match=r"1 tensors that this architecture does not have \(model.layers.0.self_attn.sinks\)",
    ):
        build_decoder(spec, tensors | {"model.layers.0.self_attn.sinks": torch.zeros(4)})
    del tensors["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(DataError, match=r"lacks 'model.layers.1.mlp.up_proj.weight'"):
        build_decoder(spec, tensors)


def test_pickled_code_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (pytest.fail, ("the checkpoint's code ran",))

    torch.save({"x": Evil()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(Exception, match=r"(?i)weights.only"):
        read_checkpoint(tmp_path)


def test_fingerprint_ignores_the_type_but_not_the_values():
    reference = tiny_model("llama")
    spec, tensors = spec_from_config(reference.config), reference.state_dict()
    original = {k: v.to(torch.bfloat16) for k, v in tensors.items()}
    assert fingerprint(spec, original) == fingerprint(
        spec, {k: v.float() for k, v in original.items()}
    )
    assert fingerprint(spec, original) != fingerprint(
        spec, tiny_model("llama", seed=1).state_dict()
    )
    other = spec_from_config(variant_config("llama-rope-linear"))
    assert fingerprint(spec, original) != fingerprint(other, original)


# The hf backend


def hf_model(folder, **options):
    return HfModel.load(folder, dtype=torch.float32, device=CPU, **options)


def reference_loss(model, documents, first_targets):
    """Sum of the supervised tokens' losses, one document at a time."""
    total = 0.0
    for ids, first in zip(documents, first_targets, strict=True):
        logits = model(input_ids=ids[None], use_cache=False).logits[0]
        total = total + torch.nn.functional.cross_entropy(
            logits[first - 1 : -1], ids[first:], reduction="sum"
        )
    return total


FIRST_TARGETS = [1, 2, 30, 1]
SPANS = [((2, 4),), 2, ((3, 9), (20, 21), (38, 40)), 1]  # of conversations, among others
HF_LENGTHS = [5, 3, 40, 17]


def test_hf_makes_logits_where_a_supervised_token_follows(tiny_neox_dir):
    model, shapes = hf_model(tiny_neox_dir), []
    head = model.model.get_output_embeddings()
    head.register_forward_hook(lambda module, inputs, output: shapes.append(output.shape[:2]))
    ids = random_ids([12, 20, 9])
    got = model.loss_sum(ids, [10, 17, 8])
    assert shapes == [(3, 6)], "places 9, 10, 16, 17, 18 and 7 of 20: those that some row needs"
    model._takes_few_logits = False
    torch.testing.assert_close(got, model.loss_sum(ids, [10, 17, 8]))
    assert shapes[1] == (3, 20)


def test_hf_loss_and_gradient_equal_a_reference(tiny_neox_dir):
    model = hf_model(tiny_neox_dir)
    adapters = model.attach(LoraSettings(r=4, alpha=8.0, target_modules=("all-linear",)), seed=0)
    assert len(adapters.pairs) == 2 * 4
    generator = torch.Generator().manual_seed(1)
    adapters.flat.data.copy_(0.1 * torch.randn(adapters.flat.shape, generator=generator))
    documents = random_ids(HF_LENGTHS)
    loss = model.loss_sum(documents, FIRST_TARGETS)
    loss.backward()
    ours = adapters.grad.clone()
    adapters.zero_grad()
    expected = reference_loss(model.model, documents, FIRST_TARGETS)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    assert ours.norm() > 1
    assert (ours - adapters.grad).norm() <= 1e-5 * ours.norm()
    assert [
        n for n, p in model.model.named_parameters() if p.grad is not None and ".lora_" not in n
    ] == []


@pytest.mark.parametrize("folder", ["tiny_llama_dir", "tiny_gpt2_dir"])
@pytest.mark.parametrize("training", [False, True])
def test_both_backends_have_the_same_loss(folder, training, request):
    """Without LoRA dropout; a GPT-2 configuration has dropout of its own, which the native decoder
    never applies."""
    folder = request.getfixturevalue(folder)
    documents = random_ids(HF_LENGTHS)
    losses = []
    for model in (
        hf_model(folder),
        NativeModel.load(
            folder, spec_from_config(load_config(folder)), dtype=torch.float32, device=CPU
        ),
    ):
        model.attach(LoraSettings(r=4), seed=0)
        model.train(training)
        losses.append(float(model.loss_sum(documents, FIRST_TARGETS).detach()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("backend", ["native", "hf"])
def test_only_the_tokens_of_the_spans_count(backend, tiny_llama_dir):
    """The loss of spans is what supervision from a on has more than supervision from b on."""
    documents, spec = random_ids(HF_LENGTHS), spec_from_config(load_config(tiny_llama_dir))
    native = NativeModel.load(tiny_llama_dir, spec, dtype=torch.float32, device=CPU)
    model = native if backend == "native" else hf_model(tiny_llama_dir)
    expected = 0.0
    for ids, spans in zip(documents, SPANS, strict=True):
        for a, b in ((spans, len(ids)),) if isinstance(spans, int) else spans:
            expected += float(native.loss_sum([ids], [a]))
            expected -= float(native.loss_sum([ids], [b])) if b < len(ids) else 0.0
    assert float(model.loss_sum(documents, SPANS)) == pytest.approx(expected, rel=1e-5)


def test_hf_batched_greedy_tokens_equal_transformers_one_by_one(tiny_neox_dir):
    prompts = random_ids(PROMPT_LENGTHS, seed=1)
    reference = tiny_model("neox")
    expected = [
        reference_greedy(reference, ids, n) for ids, n in zip(prompts, NEW_TOKENS, strict=True)
    ]
    assert len({token for row in expected for token in row}) > 10
    runner = HfRunner(hf_model(tiny_neox_dir))
    assert engine_greedy(runner, prompts, NEW_TOKENS, num_slots=3) == expected


@pytest.mark.parametrize("variant", ["gpt2", "llama"])
def test_hf_backend_merges_our_adapter(variant, request, tmp_path):
    from support.models import randomise_b

    folder = request.getfixturevalue(f"tiny_{variant}_dir")
    ours = native(tiny_model(variant))
    adapters = ours.attach(LoraSettings(r=4, alpha=8.0), seed=0)
    randomise_b(adapters)
    save_adapter(
        tmp_path,
        adapters.weights(),
        base_name="tiny",
        base_fingerprint=None,
        fan_in_fan_out=ours.fan_in_fan_out,
    )
    assert_same_logits(ours, hf_model(folder, adapter_dir=tmp_path).model, random_ids(LENGTHS))


def test_hf_backend_is_chosen_and_announced(tiny_neox_dir, tiny_llama_dir, capsys):
    config = load_config(tiny_neox_dir)
    model = load_model(
        ModelSource("tiny", tiny_neox_dir), config, backend="auto", dtype=torch.float32, device=CPU
    )
    assert model.backend == "hf"
    assert "'gpt_neox' is not a native architecture" in capsys.readouterr().err
    with pytest.raises(UnavailableError, match="does not know this kind of gpt_neox model"):
        load_model(
            ModelSource("tiny", tiny_neox_dir),
            config,
            backend="native",
            dtype=torch.float32,
            device=CPU,
        )
    llama = load_model(
        ModelSource("tiny", tiny_llama_dir),
        load_config(tiny_llama_dir),
        backend="hf",
        dtype=torch.float32,
        device=CPU,
    )
    assert llama.backend == "hf"


def test_hf_targets(tiny_neox_dir):
    adapters = hf_model(tiny_neox_dir).attach(LoraSettings(r=2, target_modules=("attn",)), seed=0)
    assert {path.rsplit(".", 1)[-1] for path in adapters.pairs} == {"query_key_value", "dense"}
    with pytest.raises(UsageError, match="q_prjo: matches no layer"):
        hf_model(tiny_neox_dir).attach(LoraSettings(target_modules=("q_prjo",)), seed=0)


def test_hf_backend_refuses_a_checkpoint_that_lacks_tensors(tiny_neox_dir, tmp_path):
    """transformers would fill the hole with random numbers and go on."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(tiny_neox_dir, tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["gpt_neox.layers.1.mlp.dense_h_to_4h.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DataError, match="dense_h_to_4h"):
        hf_model(tmp_path)


def test_hf_backend_reports_a_broken_adapter_file(tiny_llama_dir, tmp_path):
    ours = native(tiny_model("llama"))
    weights = ours.attach(LoraSettings(r=2), seed=0).weights()
    save_adapter(tmp_path, weights, base_name="tiny", base_fingerprint=None, fan_in_fan_out=False)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"\0" * 64)
    with pytest.raises(DataError):
        hf_model(tiny_llama_dir, adapter_dir=tmp_path)


def test_vocabulary_of_the_tiny_models_is_the_tokenizers(tiny_llama_dir):
    tokenizer = load_tokenizer(tiny_llama_dir)
    assert (len(tokenizer), tokenizer.eos_token_id) == (VOCAB, EOS_ID)
    text = "The patient  has\nfebre: 38,5 °C 🙂"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_a_long_hf_batch_outgrows_its_mask(tiny_neox_dir, monkeypatch):
    monkeypatch.setattr("lorabatch.infer.runners.hf.MASK_STEPS", 4)
    prompts = random_ids((3, 9), seed=1)
    expected = [reference_greedy(tiny_model("neox"), ids, 12) for ids in prompts]
    runner = HfRunner(hf_model(tiny_neox_dir))
    assert engine_greedy(runner, prompts, [12, 12], num_slots=2) == expected


def test_the_hf_backends_loss_asks_the_device_for_no_number_of_rows(tiny_neox_dir):
    """On the meta device, which has no numbers, an index by a mask fails. (transformers itself asks
    whether anything is masked.)"""
    model = hf_model(tiny_neox_dir)
    model.device = torch.device("meta")

    def network(input_ids, **inputs):
        assert input_ids.device.type == "meta" and inputs["attention_mask"].device.type == "meta"
        return SimpleNamespace(logits=torch.empty(*input_ids.shape, VOCAB, device="meta"))

    model.model = network
    loss = model.loss_sum(random_ids((5, 9)), [1, 3])
    assert loss.device.type == "meta" and loss.shape == ()
