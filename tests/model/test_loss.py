"""The loss head against plain cross-entropy on full logits, and the promise that full logits never
exist."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lorabatch.kernels import train_ops as fused
from lorabatch.model import loss as loss_module
from lorabatch.model.linear import FrozenLinear, Part
from lorabatch.model.loss import LossTerms, cross_entropy_sum

HIDDEN, VOCAB = 24, 100


@pytest.fixture(params=["kernels", "torch"], autouse=True)
def kernels(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr(fused, "_train_ops", lambda dtype: None)


def make_case(rows, *, dtype=torch.float32, bias=False, prepack=False):
    """(hidden [n, H], head, targets [n])."""
    generator = torch.Generator().manual_seed(rows)
    head_bias = torch.randn(VOCAB, generator=generator).to(dtype) if bias else None
    weight = torch.randn(VOCAB, HIDDEN, generator=generator).to(dtype)
    head = FrozenLinear(weight, head_bias, [Part("lm_head", 0, VOCAB)], prepack=prepack)
    hidden = torch.randn(rows, HIDDEN, generator=generator).to(dtype)
    return hidden, head, torch.randint(0, VOCAB, (rows,), generator=generator)


def plain(hidden, head, targets, smoothing=0.0, z=0.0):
    """Loss and gradient of the hidden states from full fp32 logits."""
    hidden = hidden.detach().float().requires_grad_()
    bias = None if head.bias is None else head.bias.float()
    logits = F.linear(hidden, head.product.weight.float(), bias)
    loss = (
        F.cross_entropy(logits, targets, reduction="sum", label_smoothing=smoothing)
        + z * logits.logsumexp(-1).square().sum()
    )
    loss.backward()
    return loss.detach(), hidden.grad


# 16 rows are the smallest chunk; 40 rows end in a chunk that is not full, 48 in one that is
@pytest.mark.parametrize("rows", [1, 15, 16, 17, 40, 48])
@pytest.mark.parametrize("chunk_rows", [16, 20, 1000])
@pytest.mark.parametrize("bias", [True, False])
def test_value_and_gradient_equal_plain_cross_entropy(rows, chunk_rows, bias, monkeypatch):
    monkeypatch.setattr(loss_module, "CHUNK_ELEMENTS", chunk_rows * VOCAB)
    hidden, head, targets = make_case(rows, bias=bias)
    hidden.requires_grad_()
    loss = cross_entropy_sum(hidden, head, targets)
    loss.backward()
    expected_loss, expected_grad = plain(hidden, head, targets)
    assert loss.dtype == torch.float32 and loss.shape == ()
    torch.testing.assert_close(loss.detach(), expected_loss, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(hidden.grad, expected_grad, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        assert torch.equal(cross_entropy_sum(hidden, head, targets), loss.detach())
    assert torch.equal(cross_entropy_sum(hidden.detach(), head, targets), loss.detach())


@pytest.mark.parametrize("prepack", [True, False])
def test_bf16_is_as_exact_as_its_logits(prepack):
    """Against the reference on the same bf16 values; what differs is the rounding of logits and of
    their gradient."""
    hidden, head, targets = make_case(40, dtype=torch.bfloat16, prepack=prepack)
    hidden.requires_grad_()
    loss = cross_entropy_sum(hidden, head, targets)
    loss.backward()
    expected_loss, expected_grad = plain(hidden, head, targets)
    assert float(loss.detach()) == pytest.approx(float(expected_loss), rel=2e-3)
    assert hidden.grad.dtype == torch.bfloat16
    assert (hidden.grad.float() - expected_grad).norm() <= 1e-2 * expected_grad.norm()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize(("smoothing", "z"), [(0.1, 0.0), (0.0, 1e-2), (0.2, 1e-3)])
def test_smoothing_and_z_equal_their_definitions(smoothing, z, dtype, tolerance):
    hidden, head, targets = make_case(40, dtype=dtype)
    hidden.requires_grad_()
    loss = cross_entropy_sum(hidden, head, targets, LossTerms(smoothing, z))
    loss.backward()
    expected_loss, expected_grad = plain(hidden, head, targets, smoothing, z)
    assert float(loss.detach()) == pytest.approx(float(expected_loss), rel=max(2e-6, tolerance / 5))
    assert (hidden.grad.float() - expected_grad).norm() <= tolerance * expected_grad.norm()


def test_gradient_is_scaled_by_what_comes_from_above():
    hidden, head, targets = make_case(20)
    hidden.requires_grad_()
    (cross_entropy_sum(hidden, head, targets) / 7).backward()
    torch.testing.assert_close(hidden.grad, plain(hidden, head, targets)[1] / 7)


def test_extreme_logits_stay_finite():
    hidden, head, targets = make_case(20)
    hidden = (1000 * hidden).requires_grad_()
    loss = cross_entropy_sum(hidden, head, targets)
    loss.backward()
    expected_loss, expected_grad = plain(hidden, head, targets)
    torch.testing.assert_close(loss.detach(), expected_loss)
    torch.testing.assert_close(hidden.grad, expected_grad, rtol=1e-4, atol=1e-4)


class LargestTensor(TorchDispatchMode):
    """The most elements that any operator's result has had."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.elements = max(self.elements, leaf.numel())
        return out


@pytest.mark.parametrize("training", [True, False])
def test_no_tensor_ever_holds_all_logits(training, monkeypatch):
    monkeypatch.setattr(loss_module, "CHUNK_ELEMENTS", 16 * VOCAB)
    hidden, head, targets = make_case(160)
    hidden.requires_grad_(training)
    with LargestTensor() as largest:
        loss = cross_entropy_sum(hidden, head, targets)
        if training:
            loss.backward()
    # one chunk of logits, the head's weight, the hidden states
    assert 16 * VOCAB <= largest.elements <= 160 * HIDDEN
    with LargestTensor() as largest:  # the counter does see what it should
        plain(hidden, head, targets)
    assert largest.elements == 160 * VOCAB
