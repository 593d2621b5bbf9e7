"""The lean norm, rotation and activation against plain compositions of torch's operations."""

import pytest
import torch
from torch.nn import functional as F

from lorabatch.kernels import train_ops as fused
from lorabatch.model.functional import rms_norm, rotate, swiglu

TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 4e-2}


def plain_rms_norm(x, weight, eps):
    wide = x.float() if x.dtype != torch.float64 else x
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def plain_swiglu(x):
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def plain_rotate(x, cos, sin):
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def operands(name, dtype):
    generator = torch.Generator().manual_seed(7)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    if name == "rms_norm":
        return random(9, 32), (random(32) + 1, 1e-5), rms_norm, plain_rms_norm
    if name == "swiglu":
        return random(9, 48), (), swiglu, plain_swiglu
    angle = random(9, 1, 8).double()
    return random(9, 3, 16), (angle.cos().to(dtype), angle.sin().to(dtype)), rotate, plain_rotate


@pytest.mark.parametrize("name", ["rms_norm", "swiglu", "rotate"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "torch"])
def test_value_and_gradient_match_the_plain_form(name, dtype, kernels, monkeypatch):
    if not kernels:
        monkeypatch.setattr(fused, "_train_ops", lambda dtype: None)
    x, rest, ours, plain = operands(name, dtype)
    upstream = torch.randn(plain(x, *rest).shape, generator=torch.Generator().manual_seed(1)).to(
        dtype
    )
    results = []
    for function in (ours, plain):
        leaf = x.clone().requires_grad_()
        y = function(leaf, *rest)
        y.backward(upstream)
        results.append((y.detach().float(), leaf.grad.float()))
    for got, expected in zip(*results, strict=True):
        assert expected.abs().max() > 0.1
        torch.testing.assert_close(got, expected, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype])


@pytest.mark.parametrize("name", ["rms_norm", "swiglu", "rotate"])
def test_inference_path_equals_training_path(name):
    x, rest, ours, _ = operands(name, torch.float32)
    with torch.inference_mode():
        expected = ours(x, *rest)
    got = ours(x.clone().requires_grad_(), *rest).detach()
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(x, operands(name, torch.float32)[0]), "the input was changed in place"


def test_rotation_also_takes_strided_views():
    fused = torch.randn(9, 5, 16, requires_grad=True)
    q, _ = fused.split([3, 2], dim=1)
    angle = torch.randn(9, 1, 8)
    got = rotate(q, angle.cos(), angle.sin())
    torch.testing.assert_close(got, plain_rotate(q, angle.cos(), angle.sin()))
