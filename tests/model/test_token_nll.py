"""The nats of every supervised token: equal to transformers' in all backends, and the same bits
whatever stands beside a document."""

import pytest
import torch
from support.models import native, random_adapter, random_ids, tiny_model
from torch.nn import functional as F

from lorabatch.infer.runners import make_runner
from lorabatch.infer.runners.eager import NativeRunner
from lorabatch.model import loss
from lorabatch.model.hf import HfModel

LENGTHS = [5, 3, 40, 17, 12]
FIRST_TARGETS = [1, 2, 30, 1, 11]
CPU = torch.device("cpu")


def expected(documents, first_targets):
    reference = tiny_model("llama")
    with torch.no_grad():
        for ids, first in zip(documents, first_targets, strict=True):
            logits = reference(input_ids=ids[None], use_cache=False).logits[0]
            yield F.cross_entropy(logits[first - 1 : -1], ids[first:], reduction="none")


@pytest.mark.parametrize("backend", ["native", "hf"])
def test_every_token_is_transformers_and_their_sum_is_the_loss(
    backend, tiny_llama_dir, monkeypatch
):
    monkeypatch.setattr(loss, "CHUNK_ELEMENTS", 16 * 300)  # several chunks of the head
    model = (
        native(tiny_model("llama"))
        if backend == "native"
        else HfModel.load(tiny_llama_dir, dtype=torch.float32, device=CPU)
    )
    model.train(False)
    documents = random_ids(LENGTHS)
    found = model.token_nll(documents, FIRST_TARGETS)
    for ours, theirs in zip(found, expected(documents, FIRST_TARGETS), strict=True):
        assert ours.dtype == torch.float32 and not ours.requires_grad
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    whole = float(model.loss_sum(documents, FIRST_TARGETS).detach())
    assert float(torch.cat(found).sum()) == pytest.approx(whole, rel=1e-6)


@pytest.mark.parametrize("kind", ["fastest", "eager"])
def test_a_runner_finds_the_same(kind):
    model = native(tiny_model("llama"))
    sizes = {"num_slots": 1, "capacity": max(LENGTHS)}
    runner = (
        make_runner(model, max_tokens=max(LENGTHS), **sizes)
        if kind == "fastest"
        else NativeRunner(model, **sizes)
    )
    documents = random_ids(LENGTHS)
    for ids, theirs in zip(documents, expected(documents, [1] * len(LENGTHS)), strict=True):
        nll, likeliest = runner.token_nll(ids.tolist())
        torch.testing.assert_close(nll.float(), theirs, rtol=1e-4, atol=1e-4)
        hit = likeliest == ids[1:]
        assert (nll[~hit] > 0.5).all()  # what is not the likeliest has less than 0.61 of chance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_bit_depends_on_packing_order_or_threads(dtype):
    model = native(tiny_model("llama"), dtype=dtype)
    documents = random_ids(LENGTHS)
    together = model.token_nll(documents, FIRST_TARGETS)
    backwards = model.token_nll(documents[::-1], FIRST_TARGETS[::-1])[::-1]
    torch.set_num_threads(2)
    threaded = model.token_nll(documents, FIRST_TARGETS)
    for i, alone in enumerate(together):
        assert torch.equal(alone, backwards[i]) and torch.equal(alone, threaded[i])
    for pair in ((0, 2), (3, 0), (2, 3)):  # of one row alone, a product may round otherwise
        some = model.token_nll([documents[i] for i in pair], [FIRST_TARGETS[i] for i in pair])
        assert all(torch.equal(together[i], nll) for i, nll in zip(pair, some, strict=True))


@pytest.mark.parametrize("variant", ["llama", "gpt2"])  # which holds its weights transposed
@pytest.mark.parametrize("backend", ["native", "hf"])
def test_an_adapter_is_worn_unmerged_and_taken_off_again(backend, variant, request):
    base = native(tiny_model(variant))
    adapter = random_adapter(base, r=4, seed=1)
    merged = native(tiny_model(variant), merge=adapter.delta)
    documents = random_ids(LENGTHS)
    if backend == "hf":
        folder = request.getfixturevalue(f"tiny_{variant}_dir")
        base = HfModel.load(folder, dtype=torch.float32, device=CPU)
    before = torch.cat(base.token_nll(documents, FIRST_TARGETS))
    with base.wearing(adapter):
        worn = torch.cat(base.token_nll(documents, FIRST_TARGETS))
    with base.wearing(None):
        after = torch.cat(base.token_nll(documents, FIRST_TARGETS))
    expected = torch.cat(merged.token_nll(documents, FIRST_TARGETS))
    torch.testing.assert_close(worn, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(before, after) and (worn - before).abs().max() > 0.1
