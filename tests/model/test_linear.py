"""Frozen linear layers and their adapters against plain autograd."""

import pytest
import torch
from support.models import random
from torch.nn import functional as F

from lorabatch.model.linear import Adapter, FrozenLinear, Part

# Three parts of different sizes in one weight, as q, k and v are
IN_FEATURES, PARTS = 24, (Part("q", 0, 16), Part("k", 16, 24), Part("v", 24, 32))
TYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def make_layer(adapted, *, dtype=torch.float32, bias=True, prepack=False):
    """A layer with adapters of rank 4 and scale 0.5 + index on the parts named by index."""
    layer = FrozenLinear(
        random(32, IN_FEATURES, seed=0, dtype=dtype, std=0.3),
        random(32, seed=1, dtype=dtype) if bias else None,
        PARTS,
        prepack=prepack,
    )
    for index in adapted:
        part = PARTS[index]
        a = random(4, IN_FEATURES, seed=10 + index, std=0.3)
        b = random(part.stop - part.start, 4, seed=20 + index, std=0.3)
        layer.adapters[str(index)] = Adapter(a, b, 0.5 + index)
    return layer


def plain(layer, x, pairs, mask=None):
    """(W + scale B A) x + bias in ordinary autograd and fp32; pairs: index of the part -> (A,
    B)."""
    weight = layer.product.weight.float()
    out = F.linear(x, weight, None if layer.bias is None else layer.bias.float())
    low_input = x if mask is None else x * mask
    pieces = list(out.split([p.stop - p.start for p in layer.parts], dim=1))
    for index, (a, b) in pairs.items():
        pieces[index] = (
            pieces[index] + layer.adapters[str(index)].scale * (low_input @ a.t()) @ b.t()
        )
    return torch.cat(pieces, dim=1)


def compare_with_plain(layer, *, dtype, input_needs_grad=True, mask=None, tolerance):
    """Outputs and all gradients, as errors relative to the norm of what is expected."""
    x = random(7, IN_FEATURES, seed=3, dtype=dtype)
    upstream = random(7, 32, seed=4, dtype=dtype)
    expected_x = x.float().requires_grad_(input_needs_grad)
    pairs = {
        int(i): (ad.a.detach().clone().requires_grad_(), ad.b.detach().clone().requires_grad_())
        for i, ad in layer.adapters.items()
    }
    expected = plain(layer, expected_x, pairs, mask)
    expected.backward(upstream.float())
    x.requires_grad_(input_needs_grad)
    got = layer(x)
    got.backward(upstream)
    checks = [(got, expected), (x.grad, expected_x.grad)] if input_needs_grad else [(got, expected)]
    checks += [
        (half.grad, want.grad)
        for i, pair in pairs.items()
        for half, want in zip(
            (layer.adapters[str(i)].a, layer.adapters[str(i)].b), pair, strict=True
        )
    ]
    for ours, reference in checks:
        assert reference.norm() > 0.1
        assert ours.shape == reference.shape
        assert (ours.float() - reference).norm() <= tolerance * reference.norm()
    assert got.dtype == dtype
    assert all(
        ad.a.grad.dtype == torch.float32 and ad.b.grad.dtype == torch.float32
        for ad in layer.adapters.values()
    )
    return got, x.grad


@pytest.mark.parametrize("adapted", [(0,), (1,), (0, 2), (0, 1, 2)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("prepack", [True, False])
# bf16 has 8 bits: 4e-3 a rounding
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_adapted_product_equals_plain_autograd(adapted, bias, prepack, dtype, tolerance):
    layer = make_layer(adapted, dtype=dtype, bias=bias, prepack=prepack)
    compare_with_plain(layer, dtype=dtype, tolerance=tolerance)


@TYPES
def test_memory_that_held_anything_gives_the_same_gradients(dtype, monkeypatch):
    """Sums of adapters are written over what was in their place."""
    monkeypatch.setattr(torch, "empty_like", lambda x: torch.full_like(x, float("nan")))
    compare_with_plain(make_layer((0, 1, 2), dtype=dtype), dtype=dtype, tolerance=1e-2)


def test_adapters_learn_when_the_input_needs_no_gradient():
    got, x_grad = compare_with_plain(
        make_layer((0, 2)), dtype=torch.float32, input_needs_grad=False, tolerance=1e-6
    )
    assert got.requires_grad
    assert x_grad is None


@TYPES
def test_frozen_product_passes_the_gradient_to_its_input_only(dtype):
    layer = make_layer((), dtype=dtype)
    x, upstream = (
        random(7, IN_FEATURES, seed=3, dtype=dtype).requires_grad_(),
        random(7, 32, seed=4, dtype=dtype),
    )
    out = layer(x)
    out.backward(upstream)
    torch.testing.assert_close(out, F.linear(x, layer.product.weight, layer.bias))
    torch.testing.assert_close(x.grad, upstream @ layer.product.weight)
    assert layer.product.weight.grad is None and layer.bias.grad is None
    assert not layer(x.detach()).requires_grad


def test_gradients_of_an_expanded_upstream():
    """``sum().backward()`` sends a gradient without memory of its own."""
    layer = make_layer((0, 1), prepack=True)
    x = random(5, IN_FEATURES, seed=3).requires_grad_()
    layer(x).sum().backward()
    weight = layer.product.weight.clone()
    for index, adapter in layer.adapters.items():
        part = PARTS[int(index)]
        weight[part.start : part.stop] += adapter.scale * (adapter.b @ adapter.a).detach()
    torch.testing.assert_close(x.grad, weight.sum(dim=0).expand(5, -1))


# Dropout


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_dropout_equals_a_reference_with_the_same_mask(dtype, tolerance):
    layer = make_layer((0, 2), dtype=dtype)
    layer.dropout = 0.4
    layer.train()
    torch.manual_seed(5)
    mask = F.dropout(torch.ones(7, IN_FEATURES, dtype=dtype), 0.4).float()
    assert 0.2 < (mask == 0).float().mean() < 0.6
    assert mask.max() == pytest.approx(1 / 0.6, rel=5e-3)
    torch.manual_seed(5)
    compare_with_plain(layer, dtype=dtype, mask=mask, tolerance=tolerance)


def test_dropout_is_off_in_evaluation():
    layer = make_layer((0,))
    x = random(7, IN_FEATURES, seed=3)
    layer.train()
    without = layer(x)
    layer.dropout = 0.4
    assert not torch.equal(layer(x), without)
    layer.eval()
    assert torch.equal(layer(x), without)


@pytest.mark.parametrize("bias", [True, False])
def test_the_head_keeps_its_sums_in_fp32_where_the_product_can(bias, monkeypatch):
    """The meta device stands for a GPU: nothing is computed, types and shapes are."""
    layer = make_layer([], dtype=torch.bfloat16, bias=bias)
    x = random(5, IN_FEATURES, dtype=torch.bfloat16)
    assert layer.project_wide(x).dtype == torch.bfloat16
    layer.product.weight = layer.product.weight.to("meta")
    layer.bias = layer.bias.to("meta") if bias else None
    y = layer.project_wide(x.to("meta"))
    assert (y.dtype, y.shape) == (torch.float32, (5, 32))
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert layer.project_wide(x.to("meta")).dtype == torch.bfloat16
