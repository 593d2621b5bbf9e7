"""Adapters: what they change and what they leave alone, packed gradients, and peft's files both
ways."""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.models import (
    NATIVE_VARIANTS,
    assert_same_logits,
    native,
    packed_logits,
    random_ids,
    randomise_b,
    tiny_model,
)

from lorabatch.errors import DataError, UsageError
from lorabatch.kernels.onednn import Prepacked
from lorabatch.model.lora import LoraSettings, LoraWeights, load_adapter, save_adapter, select
from lorabatch.model.native import NativeModel
from lorabatch.model.spec import spec_from_config

LENGTHS = [5, 2, 40, 17]
FIRST_TARGETS = [1, 1, 30, 4]
CPU = torch.device("cpu")
both = pytest.mark.parametrize("variant", ["gpt2", "llama"])
variants = pytest.mark.parametrize("variant", NATIVE_VARIANTS)


def adapted(variant="llama", *, seed=0, **settings):
    """(our model, its adapters with a non-zero B)."""
    model = native(tiny_model(variant))
    adapters = model.attach(LoraSettings(**{"r": 4, "alpha": 8.0} | settings), seed=seed)
    randomise_b(adapters)
    return model, adapters


def save(model, adapters, folder):
    save_adapter(
        folder,
        adapters.weights(),
        base_name="tiny",
        base_fingerprint=model.base_fingerprint,
        fan_in_fan_out=model.fan_in_fan_out,
    )
    return folder


# What an adapter changes


@variants
def test_fresh_adapter_changes_nothing(variant):
    reference = tiny_model(variant)
    documents = random_ids(LENGTHS)
    model = native(reference)
    before = torch.cat(packed_logits(model, documents))
    adapters = model.attach(LoraSettings(r=4), seed=0)
    assert torch.equal(torch.cat(packed_logits(model, documents)), before)
    randomise_b(adapters)
    assert (torch.cat(packed_logits(model, documents)) - before).abs().max() > 0.1


@variants
def test_unmerged_equals_merged(variant):
    model, adapters = adapted(variant)
    documents = random_ids(LENGTHS)
    merged = native(tiny_model(variant), merge=adapters.weights().delta)
    for ours, theirs in zip(
        packed_logits(model, documents), packed_logits(merged, documents), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("variant", "targets"),
    [
        ("llama", ("all-linear",)),
        ("llama", ("attn",)),
        ("llama", ("q_proj", "down_proj")),
        ("gpt2", ("all-linear",)),
        ("gpt2", ("c_proj",)),
    ],
)
def test_trainable_parameters_are_r_times_in_plus_out(variant, targets):
    model = native(tiny_model(variant))
    shapes = model.linear_shapes
    chosen = {
        ("all-linear",): ("",),
        ("attn",): ("self_attn.",),
        ("q_proj", "down_proj"): ("q_proj", "down_proj"),
        ("c_proj",): ("attn.c_proj", "mlp.c_proj"),
    }[targets]
    expected = {
        path: 4 * (o + i) for path, (o, i) in shapes.items() if any(part in path for part in chosen)
    }
    adapters = model.attach(LoraSettings(r=4, target_modules=targets), seed=0)
    assert set(adapters.pairs) == set(expected)
    assert adapters.num_params == sum(expected.values()) > 0


def test_initialisation_is_uniform_in_a_zero_in_b_and_follows_the_seed():
    sets = [native(tiny_model()).attach(LoraSettings(r=16), seed=seed) for seed in (7, 7, 8)]
    assert torch.equal(sets[0].flat, sets[1].flat)
    assert not torch.equal(sets[0].flat, sets[2].flat)
    for a, b in sets[0].pairs.values():
        bound = a.shape[1] ** -0.5
        assert a.abs().max() <= bound
        assert float(a.detach().std()) == pytest.approx(bound / 3**0.5, rel=0.1)
        assert not b.any()


def test_all_parameters_and_gradients_are_views_of_one_buffer():
    _, adapters = adapted()
    adapters.flat.data.fill_(2.0)
    adapters.grad.fill_(3.0)
    for pair in adapters.pairs.values():
        for half in pair:
            assert (half == 2).all() and (half.grad == 3).all()
    kept = adapters.weights()
    adapters.flat.data.fill_(5.0)
    assert all((half == 2).all() for pair in kept.pairs.values() for half in pair)


# Gradients


@variants
def test_packed_gradient_is_the_sum_of_the_documents_own(variant):
    model, adapters = adapted(variant)
    documents = random_ids(LENGTHS)
    total = torch.zeros_like(adapters.grad)
    for ids, first in zip(documents, FIRST_TARGETS, strict=True):
        adapters.zero_grad()
        model.loss_sum([ids], [first]).backward()
        total += adapters.grad
    adapters.zero_grad()
    model.loss_sum(documents, FIRST_TARGETS).backward()
    assert (adapters.grad - total).norm() <= 1e-5 * total.norm()
    assert total.norm() > 1
    for path, (a, b) in adapters.pairs.items():
        assert a.grad.abs().max() > 0, path
        assert b.grad.abs().max() > 0, path


@variants
def test_gradient_equals_transformers_and_peft(variant, tmp_path):
    """The whole chain, decoder and adapters and loss, against autograd over their modules."""
    import peft

    model, adapters = adapted(variant)
    theirs = peft.PeftModel.from_pretrained(
        tiny_model(variant), save(model, adapters, tmp_path), is_trainable=True
    )
    documents = random_ids(LENGTHS)
    model.loss_sum(documents, FIRST_TARGETS).backward()
    for ids, first in zip(documents, FIRST_TARGETS, strict=True):
        logits = theirs(input_ids=ids[None], use_cache=False).logits[0]
        torch.nn.functional.cross_entropy(
            logits[first - 1 : -1], ids[first:], reduction="sum"
        ).backward()
    expected = {name: p.grad for name, p in theirs.named_parameters() if p.requires_grad}
    assert len(expected) == 2 * len(adapters.pairs)
    for path, pair in adapters.pairs.items():
        for letter, half in zip("AB", pair, strict=True):
            reference = expected[f"base_model.model.{path}.lora_{letter}.default.weight"]
            assert (half.grad - reference).norm() <= 1e-4 * reference.norm(), (path, letter)


@both
def test_only_adapters_receive_gradients(variant):
    model, adapters = adapted(variant)
    model.loss_sum(random_ids(LENGTHS), FIRST_TARGETS).backward()
    trained = {id(half) for pair in adapters.pairs.values() for half in pair}
    assert {id(p) for p in model.decoder.parameters() if p.requires_grad} == trained
    decoder = model.decoder
    weights = [layer.product.weight for layer in (*decoder.linears(), decoder.head)] + [
        decoder.embedding,
        decoder.norm.weight,
    ]
    assert all(w.grad is None and not w.requires_grad for w in weights)


def test_layers_below_the_lowest_adapter_are_not_differentiated():
    model = native(tiny_model())
    adapters = model.attach(LoraSettings(r=4, target_modules=("layers.2.mlp.down_proj",)), seed=0)
    randomise_b(adapters)
    model.loss_sum(random_ids(LENGTHS), FIRST_TARGETS).backward()
    assert list(adapters.pairs) == ["model.layers.2.mlp.down_proj"]
    assert adapters.grad.norm() > 0
    packs = [layer.product._packed_transposed is not None for layer in model.decoder.linears()]
    assert isinstance(model.decoder.head.product, Prepacked) and not any(packs)


def test_dropout_changes_the_loss_in_training_only():
    model, _ = adapted(dropout=0.5)
    documents = random_ids(LENGTHS)
    losses = []
    for seed, training in ((1, True), (1, True), (2, True), (1, False), (2, False)):
        model.train(training)
        torch.manual_seed(seed)
        losses.append(float(model.loss_sum(documents, FIRST_TARGETS).detach()))
    assert losses[0] == losses[1] != losses[2]
    assert losses[3] == losses[4] not in losses[:3]


# From us to peft


@variants
@pytest.mark.parametrize(
    "settings",
    [{}, {"use_rslora": True, "target_modules": ("attn",)}],
    ids=["plain", "rslora-attn"],
)
def test_our_adapter_loads_in_peft(variant, settings, tmp_path):
    import peft

    model, adapters = adapted(variant, **settings)
    theirs = peft.PeftModel.from_pretrained(tiny_model(variant), save(model, adapters, tmp_path))
    assert_same_logits(model, theirs.eval(), random_ids(LENGTHS))
    loaded = load_adapter(tmp_path, model.linear_shapes, base_fingerprint=model.base_fingerprint)
    assert loaded.digest() == adapters.weights().digest()


def test_rslora_divides_by_the_square_root():
    assert LoraSettings(r=16, alpha=32.0).scale("x", 16) == 2.0
    assert LoraSettings(r=16, alpha=32.0, use_rslora=True).scale("x", 16) == 8.0


# From peft to us


PEFT_CONFIGS = {
    "all-linear": {"target_modules": "all-linear"},
    "rslora": {"target_modules": "all-linear", "use_rslora": True},
    "patterns-llama": {
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        "rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 6},
        "alpha_pattern": {"v_proj": 20, r".*\.2\.mlp\.down_proj": 3},
    },
    "patterns-gpt2": {
        "target_modules": ["c_attn", "c_proj"],
        "rank_pattern": {"attn.c_proj": 2},
        "alpha_pattern": {"c_attn": 20},
    },
    "regex": {"target_modules": r".*layers\.[12]\.self_attn\.[qk]_proj"},
    "some-layers": {"target_modules": ["q_proj"], "layers_to_transform": [1]},
    "excluded": {
        "target_modules": ["q_proj", "k_proj"],
        "exclude_modules": ["layers.0.self_attn.q_proj"],
    },
}


def peft_adapter(variant, folder, **config):
    """(peft's model with a random adapter, the folder it was saved to)."""
    import peft

    gpt2 = variant.startswith("gpt2")
    settings = peft.LoraConfig(
        **{"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", "fan_in_fan_out": gpt2} | config
    )
    model = peft.get_peft_model(tiny_model(variant), settings)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder, save_embedding_layers=False)
    return model.eval(), folder


@pytest.mark.parametrize(
    ("variant", "config"),
    [
        *(("llama", c) for c in PEFT_CONFIGS if c != "patterns-gpt2"),
        *(("gpt2", c) for c in ("all-linear", "rslora", "patterns-gpt2")),
        ("llama-biases-tied", "all-linear"),
        ("qwen3", "all-linear"),
    ],
)
def test_adapter_made_by_peft_loads_here(variant, config, tmp_path):
    theirs, folder = peft_adapter(variant, tmp_path, **PEFT_CONFIGS[config])
    base = native(tiny_model(variant))
    weights = load_adapter(folder, base.linear_shapes, base_fingerprint=base.base_fingerprint)
    merged = native(tiny_model(variant), merge=weights.delta)
    documents = random_ids(LENGTHS)
    assert_same_logits(merged, theirs, documents)
    assert (
        torch.cat(packed_logits(merged, documents)) - torch.cat(packed_logits(base, documents))
    ).abs().max() > 0.01


def test_merging_at_load_equals_peft(tiny_llama_dir, tmp_path):
    theirs, folder = peft_adapter("llama", tmp_path, target_modules="all-linear")
    model = NativeModel.load(
        tiny_llama_dir,
        spec_from_config(theirs.config),
        dtype=torch.float32,
        device=CPU,
        adapter_dir=folder,
    )
    assert_same_logits(model, theirs, random_ids(LENGTHS))


def test_patterns_survive_being_saved_again(tmp_path):
    """An adapter that was loaded and saved is the same adapter, its per-layer alphas included."""
    _, folder = peft_adapter("llama", tmp_path / "theirs", **PEFT_CONFIGS["patterns-llama"])
    shapes = native(tiny_model()).linear_shapes
    weights = load_adapter(folder, shapes)
    save_adapter(
        tmp_path / "ours", weights, base_name="tiny", base_fingerprint=None, fan_in_fan_out=False
    )
    assert load_adapter(tmp_path / "ours", shapes).digest() == weights.digest()


@pytest.mark.parametrize(
    ("variant", "targets"),
    [
        ("llama", ("layers.1.self_attn.q_proj",)),
        ("gpt2", ("h.0.attn.c_attn", "mlp.c_proj")),
        ("llama", ("mlp.up_proj",)),
    ],
)
def test_targets_of_single_layers_survive_a_round_trip(variant, targets, tmp_path):
    """What was trained with --target_modules layers.1.self_attn.q_proj must load here and,
    complete, in peft."""
    import peft

    model, adapters = adapted(variant, target_modules=targets)
    save(model, adapters, tmp_path)
    assert load_adapter(tmp_path, model.linear_shapes).digest() == adapters.weights().digest()
    assert_same_logits(
        model,
        peft.PeftModel.from_pretrained(tiny_model(variant), tmp_path).eval(),
        random_ids(LENGTHS),
    )


# Errors


def test_unknown_target_names_the_nearest():
    paths = native(tiny_model()).linear_shapes
    with pytest.raises(
        UsageError,
        match=r"--target_modules q_prj: matches no linear layer of this model; did you mean 'q_proj'\?",
    ):
        select(paths, ("v_proj", "q_prj"))
    with pytest.raises(UsageError, match="known: all-linear, attn, down_proj, gate_proj"):
        select(paths, ("zzz",))
    with pytest.raises(
        UsageError, match=r"matches no linear layer of this model; did you mean '\w_proj'"
    ):
        select(paths, ("proj",))  # part of a name is not a name
    assert UsageError.exit_code == 64


@pytest.fixture(scope="module")
def saved_adapter(tmp_path_factory):
    """(folder, shapes, fingerprint) of an adapter for the tiny Llama."""
    model, adapters = adapted("llama", target_modules=("q_proj", "down_proj"))
    return (
        save(model, adapters, tmp_path_factory.mktemp("adapter")),
        model.linear_shapes,
        model.base_fingerprint,
    )


@pytest.fixture
def broken(saved_adapter, tmp_path):
    """A copy of the adapter to damage."""
    shutil.copytree(saved_adapter[0], tmp_path / "adapter")
    return tmp_path / "adapter"


def edit_config(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder, change):
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


KEY = "base_model.model.model.layers.1.self_attn.q_proj.lora_{}.weight"


def test_the_untouched_copy_loads(broken, saved_adapter):
    assert len(load_adapter(broken, saved_adapter[1], base_fingerprint=saved_adapter[2]).pairs) == 6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.pop(KEY.format("B")),
            r"weights for 'model.layers.1.self_attn.q_proj' are missing",
        ),
        (
            lambda t: [t.pop(KEY.format(x)) for x in "AB"],
            r"weights for 'model.layers.1.self_attn.q_proj' are missing",
        ),
        (
            lambda t: t.update({KEY.format("A").replace("q_proj", "z_proj"): torch.zeros(4, 64)}),
            r"unexpected key '.*z_proj.lora_A.weight'",
        ),
        (lambda t: t.update({"x": torch.zeros(1)}), "unexpected key 'x'"),
        (
            lambda t: t.update({KEY.format("A").replace("q_proj", "k_proj"): torch.zeros(4, 64)}),
            "only one half of '.*k_proj' is there",
        ),
        (
            lambda t: t.update({KEY.format("A"): torch.zeros(4, 63)}),
            r"has shapes A \(4, 63\), B \(64, 4\) and the base \[64, 64\]",
        ),
        (lambda t: t.update({KEY.format("B"): torch.zeros(32, 4)}), r"B \(32, 4\)"),
        (lambda t: t.update({KEY.format("B"): torch.zeros(64, 5)}), r"B \(64, 5\)"),
    ],
)
def test_wrong_tensors_are_named(broken, saved_adapter, change, message):
    edit_tensors(broken, change)
    with pytest.raises(DataError, match=message):
        load_adapter(broken, saved_adapter[1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "uses use_dora, which is not supported"),
        ({"modules_to_save": ["lm_head"]}, "uses modules_to_save"),
        ({"lora_bias": True}, "uses lora_bias"),
        ({"trainable_token_indices": [1]}, "uses trainable_token_indices"),
        ({"layer_replication": [[0, 2]]}, "uses layer_replication"),
        ({"bias": "lora_only"}, "bias=lora_only"),
        ({"peft_type": "IA3"}, "peft_type is IA3, not LORA"),
        ({"r": 8}, "has rank 4 and adapter_config.json says 8"),
        (
            {"rank_pattern": {"layers.1.self_attn.q_proj": 2}},
            "'model.layers.1.self_attn.q_proj' has rank 4 and adapter_config.json says 2",
        ),
        (
            {"target_modules": ["q_proj", "down_proj", "up_proj"]},
            "'model.layers.0.mlp.up_proj' are missing",
        ),
    ],
)
def test_what_cannot_be_applied_faithfully_is_refused(broken, saved_adapter, changes, message):
    edit_config(broken, **changes)
    with pytest.raises(DataError, match=message):
        load_adapter(broken, saved_adapter[1])


def test_adapter_of_another_base_is_refused(saved_adapter):
    folder, shapes, _ = saved_adapter
    other = native(tiny_model("llama", seed=5)).base_fingerprint
    with pytest.raises(DataError, match="trained on another base model; use --base_model tiny"):
        load_adapter(folder, shapes, base_fingerprint=other)
    assert DataError.exit_code == 65


def test_adapter_of_another_architecture_is_refused(saved_adapter):
    with pytest.raises(DataError, match="the adapter is for another model"):
        load_adapter(saved_adapter[0], native(tiny_model("gpt2")).linear_shapes)


def test_missing_files_are_named(broken, saved_adapter):
    (broken / "adapter_model.safetensors").rename(broken / "adapter_model.bin")
    with pytest.raises(DataError, match=r"no adapter_model.safetensors .*pickle"):
        load_adapter(broken, saved_adapter[1])
    (broken / "adapter_config.json").unlink()
    with pytest.raises(DataError, match=r"no adapter_config.json"):
        load_adapter(broken, saved_adapter[1])


@pytest.mark.parametrize("content", [b"", b"\0" * 64, b"not a tensor file at all"])
def test_corrupt_weights_are_a_data_error(broken, saved_adapter, content):
    (broken / "adapter_model.safetensors").write_bytes(content)
    with pytest.raises(DataError, match="not a readable safetensors file"):
        load_adapter(broken, saved_adapter[1])


def test_truncated_weights_are_a_data_error(broken, saved_adapter):
    path = broken / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match="not a readable safetensors file"):
        load_adapter(broken, saved_adapter[1])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("r", None),
        ("r", 0),
        ("lora_alpha", None),
        ("lora_alpha", math.inf),
        ("target_modules", [1, 2]),
        ("target_modules", {"q_proj": 1}),
    ],
)
def test_config_without_a_needed_field_is_a_data_error(broken, saved_adapter, field, value):
    path = broken / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {field: value}))
    with pytest.raises(DataError, match="Infinity" if value == math.inf else f"'{field}' "):
        load_adapter(broken, saved_adapter[1])


def test_digest_is_of_the_content():
    a, b = torch.ones(2, 3), torch.ones(4, 2)
    one = LoraWeights(LoraSettings(r=2, alpha=4.0), {"x": (a, b)})
    assert (
        one.digest()
        == LoraWeights(LoraSettings(r=2, alpha=4.0, dropout=0.3), {"x": (a.clone(), b)}).digest()
    )
    for other in (
        LoraWeights(LoraSettings(r=2, alpha=5.0), {"x": (a, b)}),
        LoraWeights(LoraSettings(r=2, alpha=4.0), {"y": (a, b)}),
        LoraWeights(LoraSettings(r=2, alpha=4.0), {"x": (2 * a, b)}),
    ):
        assert other.digest() != one.digest()
    # 4 / 2 * (ones [4, 2] @ ones [2, 3])
    assert torch.equal(one.delta("x"), torch.full((4, 3), 4.0))
    assert one.delta("y") is None
