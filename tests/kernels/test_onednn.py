"""The prepacked product against the dense one, and rows that depend on nothing but themselves."""

import pytest
import torch
from support.models import random
from torch.nn import functional as F

from lorabatch.kernels.onednn import (
    Dense,
    Prepacked,
    can_prepack,
    packed_product,
    rows_are_independent,
)

IN_FEATURES = 24
TYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
# (I, O) of SmolLM2's layers
SHAPES = pytest.mark.parametrize("shape", [(576, 1536), (1536, 576), (576, 960)], ids=str)


@SHAPES
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)])
def test_prepacked_equals_dense(shape, dtype, tolerance):
    if not can_prepack(dtype):
        pytest.skip(f"oneDNN does not prepack {dtype} on this processor")
    weight, bias = (
        random(shape[1], shape[0], seed=0, dtype=dtype),
        random(shape[1], seed=1, dtype=dtype),
    )
    x, grad = random(9, shape[0], seed=2, dtype=dtype), random(9, shape[1], seed=3, dtype=dtype)
    packed, dense = Prepacked(weight), Dense(weight)
    for ours, reference in (
        (packed.forward(x, bias), dense.forward(x, bias)),
        (packed.forward(x, None), dense.forward(x, None)),
        (packed.input_grad(grad), dense.input_grad(grad)),
    ):
        assert (ours - reference).float().norm() <= tolerance * reference.float().norm()
    assert not torch.equal(packed.forward(x, bias), packed.forward(x, None))


@SHAPES
@TYPES
@pytest.mark.parametrize("threads", [1, 2])
def test_rows_of_a_packed_product_do_not_depend_on_how_many_there_are(shape, dtype, threads):
    torch.set_num_threads(threads)
    x, grad = random(129, shape[0], seed=2, dtype=dtype), random(129, shape[1], seed=3, dtype=dtype)
    packed = packed_product(random(shape[1], shape[0], seed=0, dtype=dtype))
    bias = random(shape[1], seed=1, dtype=dtype)
    for whole, run in (
        (packed.forward(x, bias), lambda rows: packed.forward(x[rows], bias)),
        (packed.input_grad(grad), lambda rows: packed.input_grad(grad[rows])),
    ):
        for count in (1, 2, 3, 7, 16, 64, 129):
            for rows in (slice(0, count), slice(129 - count, 129)):
                assert torch.equal(run(rows), whole[rows]), f"{count} rows"


def test_rows_that_depend_on_their_number_are_noticed(monkeypatch):
    """As oneDNN's bf16 product does on AMX: for some numbers of rows another order of sums."""
    forward = Prepacked.forward
    for number in (31, 64, 100):
        with monkeypatch.context() as patched:
            patched.setattr(
                Prepacked,
                "forward",
                lambda self, x, bias, n=number: (
                    forward(self, x, bias) * (1 + (x.shape[0] == n) * 2**-20)
                ),
            )
            rows_are_independent.cache_clear()
            assert not rows_are_independent(torch.float32)
    rows_are_independent.cache_clear()
    assert rows_are_independent(torch.float32)


def test_prepacked_takes_rows_that_lie_apart_in_memory():
    weight, wide = random(16, IN_FEATURES, seed=0), random(8, 2 * IN_FEATURES, seed=1)
    packed = Prepacked(weight)
    for x in (wide[:, :IN_FEATURES], wide[::2, IN_FEATURES:], wide[:1, :IN_FEATURES]):
        torch.testing.assert_close(packed.forward(x, None), x @ weight.t())


def test_prepacking_is_only_for_types_it_knows(monkeypatch):
    assert can_prepack(torch.float32)
    assert not can_prepack(torch.float16)
    monkeypatch.setattr(
        "lorabatch.kernels.onednn._pack",
        lambda weight: (_ for _ in ()).throw(AttributeError("no such operator")),
    )
    can_prepack.cache_clear()
    try:
        assert not can_prepack(torch.float32)  # a torch build without the private operators
        monkeypatch.setattr("lorabatch.kernels.onednn._pack", lambda weight: weight)
        monkeypatch.setattr(
            "lorabatch.kernels.onednn._packed_linear",
            lambda x, packed, bias: F.linear(x, packed, bias) + 1,
        )
        can_prepack.cache_clear()
        assert not can_prepack(torch.float32)  # or with ones that compute something else
    finally:
        can_prepack.cache_clear()
