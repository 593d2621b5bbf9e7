"""Training's C++ passes against plain autograd in fp64: attention inside packed documents with its
gradient, and the terms of the loss."""

import pytest
import torch
from support.models import native, tiny_model

from lorabatch.kernels import train_ops as fused
from lorabatch.kernels.train_ops import train_ops
from lorabatch.model.functional import rms_norm
from lorabatch.model.linear import Adapter, FrozenLinear, Part
from lorabatch.model.lora_settings import LoraSettings

pytestmark = pytest.mark.skipif(
    train_ops(torch.zeros(1)) is None,
    reason="no CPU kernels on this machine (compiler or AVX2 missing)",
)
# Relative to the norm of what is expected: fp32 sums 700 terms; bf16 rounds inputs of products (8
# bits) and the results once
TOLERANCES = [(torch.float32, 2e-6), (torch.bfloat16, 6e-3)]
SHAPES = {"shared keys": (6, 2, 64), "a key a head": (3, 3, 64), "wide heads": (2, 1, 128)}
# one token, whole tiles, one more, and more than one span of 512
LENGTHS = (130, 1, 37, 700, 64, 65)


def case(heads, kv_heads, head_dim, lengths, dtype, *, rope=True):
    generator = torch.Generator().manual_seed(heads)
    tokens = sum(lengths)
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * head_dim, generator=generator).to(dtype)
    angles = torch.randn(tokens, 1, head_dim // 2, generator=generator)
    grad = torch.randn(tokens, heads * head_dim, generator=generator).to(dtype)
    starts = torch.tensor([0, *torch.tensor(lengths).cumsum(0)])
    return qkv, (angles.cos().to(dtype), angles.sin().to(dtype)) if rope else None, grad, starts


def plain_attention(qkv, heads, kv_heads, rope, lengths):
    q, k, v = qkv.view(len(qkv), heads + 2 * kv_heads, -1).split([heads, kv_heads, kv_heads], dim=1)
    if rope is not None:
        q, k = (
            torch.cat((a * rope[0] - b * rope[1], b * rope[0] + a * rope[1]), dim=-1)
            for a, b in (q.chunk(2, -1), k.chunk(2, -1))
        )
    outputs = []
    for q1, k1, v1 in zip(*(t.split(lengths) for t in (q, k, v)), strict=True):
        k1, v1 = (t.repeat_interleave(heads // kv_heads, dim=1) for t in (k1, v1))
        scores = torch.einsum("ihd,jhd->hij", q1, k1) * q1.shape[-1] ** -0.5
        future = torch.ones(len(q1), len(q1), dtype=torch.bool).triu(1)
        outputs.append(
            torch.einsum(
                "hij,jhd->ihd", scores.masked_fill(future, -torch.inf).softmax(-1), v1
            ).flatten(1)
        )
    return torch.cat(outputs)


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
@pytest.mark.parametrize("rope", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_attention_and_its_gradient_equal_plain_autograd(shape, rope, dtype, tolerance):
    heads, kv_heads, head_dim = SHAPES[shape]
    qkv, turn, grad, starts = case(heads, kv_heads, head_dim, LENGTHS, dtype, rope=rope)
    ops = train_ops(qkv)
    out, log_sums = ops.attend(qkv, heads, kv_heads, turn, starts)
    qkv_grad = ops.attend_grad(qkv, heads, kv_heads, turn, starts, out, log_sums, grad)
    exact = qkv.double().requires_grad_()
    expected = plain_attention(
        exact, heads, kv_heads, turn and tuple(t.double() for t in turn), LENGTHS
    )
    expected.backward(grad.double())
    for got, want in ((out, expected.detach()), (qkv_grad, exact.grad)):
        assert (got.double() - want).norm() <= tolerance * want.norm()
        begin = 0
        for length in LENGTHS:  # a wrong short document would hide in the norm of the whole
            rows = slice(begin, begin := begin + length)
            assert (got[rows].double() - want[rows]).norm() <= 2 * tolerance * max(
                1.0, want[rows].norm()
            )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_document_does_not_notice_its_block(dtype):
    """Bit for bit, values and gradients: between others on two threads, and alone on one."""
    qkv, turn, grad, starts = case(6, 2, 64, LENGTHS, dtype)
    ops = train_ops(qkv)
    torch.set_num_threads(2)
    out, log_sums = ops.attend(qkv, 6, 2, turn, starts)
    whole = ops.attend_grad(qkv, 6, 2, turn, starts, out, log_sums, grad)
    torch.set_num_threads(1)
    for begin, length in zip(starts.tolist(), LENGTHS, strict=False):
        rows = slice(begin, begin + length)
        alone_qkv, alone_turn, own = (
            qkv[rows].contiguous(),
            tuple(t[rows].contiguous() for t in turn),
            torch.tensor([0, length]),
        )
        alone, sums = ops.attend(alone_qkv, 6, 2, alone_turn, own)
        assert torch.equal(alone, out[rows])
        assert torch.equal(
            ops.attend_grad(alone_qkv, 6, 2, alone_turn, own, alone, sums, grad[rows].contiguous()),
            whole[rows],
        )


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 8e-3)])
@pytest.mark.parametrize("rows", [1, 77, 130])
@pytest.mark.parametrize(
    ("rank", "adapted", "with_norm"),
    [
        (16, (0, 2), True),
        (16, (0, 2), False),
        (8, (0, 2), True),
        (3, (1,), False),
        (32, (0, 1, 2), False),
    ],
)
def test_adapted_product_agrees_with_torchs_operators(
    rows, rank, adapted, with_norm, dtype, tolerance, monkeypatch
):
    """The same layer with the kernels and without: value, gradient of the input, gradients of every
    A and B."""
    generator = torch.Generator().manual_seed(rows)

    def random(*shape, std=1.0):
        return std * torch.randn(*shape, generator=generator)

    widths = (192, 64, 64)
    parts = [Part(str(i), sum(widths[:i]), sum(widths[: i + 1])) for i in range(3)]
    layer = FrozenLinear(random(320, 128, std=0.05).to(dtype), None, parts, prepack=True)
    for i in adapted:
        layer.adapters[str(i)] = Adapter(
            random(rank, 128, std=0.1), random(widths[i], rank, std=0.3), 0.5 + i
        )
    weight, upstream, start = (
        random(128).to(dtype),
        random(rows, 320).to(dtype),
        random(rows, 128).to(dtype),
    )
    before = (lambda x: rms_norm(x, weight, 1e-5)) if with_norm else None
    results, calls, lora = [], [], fused.TrainOps.lora
    monkeypatch.setattr(fused.TrainOps, "lora", lambda *given: calls.append(given) or lora(*given))
    for kernels in (True, False):
        if not kernels:
            assert len(calls) == 1, "the kernels did it"
            monkeypatch.setattr(fused, "_train_ops", lambda dtype: None)
        x = start.clone().requires_grad_()
        layer.zero_grad()
        y = layer(x, before)
        y.backward(upstream)
        results.append([y.detach(), x.grad, *(p.grad for p in layer.parameters())])
    assert len(results[0]) == 2 + 2 * len(adapted) and len(calls) == 1
    for got, expected in zip(*results, strict=True):
        assert expected.norm() > 0.1
        assert (got.float() - expected.float()).norm() <= tolerance * expected.float().norm()


def test_a_training_pass_names_what_kernels_do_not_serve():
    def slower(name="llama", dropout=0.0, **changes):
        wide = {
            "hidden_size": 128,
            "intermediate_size": 192,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 64,
        }
        model = native(tiny_model(name, **wide | changes))
        model.attach(LoraSettings(8, 16.0, dropout), seed=0)
        return model.slower_paths()

    assert slower() == []
    assert slower(dropout=0.1) == ["adapters (--lora_dropout)"]
    assert slower(head_dim=32, num_attention_heads=4, num_key_value_heads=2) == [
        "attention (heads have 32 features, not a multiple of 64)"
    ]
    assert slower("mistral-window", intermediate_size=96) == [
        "adapters (layers have 96 features, not a multiple of 64)",
        "attention (the model has attention windows)",
    ]
    assert slower("qwen3") == ["attention (queries and keys are normalised)"]
