"""The learning rate, by hand."""

import math

import pytest

from lorabatch.train.schedule import learning_rate, warmup_steps


def rates(kind, *, total_steps, warmup, peak=1.0):
    return [
        learning_rate(step, peak=peak, total_steps=total_steps, warmup=warmup, kind=kind)
        for step in range(total_steps)
    ]


@pytest.mark.parametrize(
    ("total_steps", "asked", "expected"),
    [
        (100, None, 5),
        (101, None, 6),
        (1, None, 0),
        (2, None, 1),
        (0, None, 0),
        (100, 0, 0),
        (100, 30, 30),
        (100, 100, 99),
        (10, 500, 9),
        (1, 3, 0),
    ],
)
def test_warmup_steps(total_steps, asked, expected):
    assert warmup_steps(total_steps, asked) == expected


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
def test_warmup_is_linear_and_already_learns_in_its_first_step(kind):
    assert rates(kind, total_steps=10, warmup=3, peak=8.0)[:4] == [2.0, 4.0, 6.0, 8.0]


def test_constant_stays():
    assert rates("constant", total_steps=6, warmup=2) == [
        pytest.approx(1 / 3),
        pytest.approx(2 / 3),
        1,
        1,
        1,
        1,
    ]


def test_linear_falls_by_equal_steps():
    assert rates("linear", total_steps=4, warmup=0, peak=2.0) == [2.0, 1.5, 1.0, 0.5]
    assert rates("linear", total_steps=6, warmup=2, peak=2.0)[2:] == [2.0, 1.5, 1.0, 0.5]


def test_cosine_falls_slowly_then_fast_then_slowly():
    root = math.sqrt(0.5)
    assert rates("cosine", total_steps=4, warmup=0) == pytest.approx(
        [1, (1 + root) / 2, 0.5, (1 - root) / 2]
    )
    assert rates("cosine", total_steps=5, warmup=1)[1:] == pytest.approx(
        [1, (1 + root) / 2, 0.5, (1 - root) / 2]
    )


@pytest.mark.parametrize("kind", ["cosine", "linear"])
def test_decay_ends_near_zero_and_never_below(kind):
    falling = rates(kind, total_steps=1000, warmup=50)[50:]
    assert falling == sorted(falling, reverse=True)
    assert 0 < falling[-1] < 2e-3
    assert learning_rate(1000, peak=1.0, total_steps=1000, warmup=50, kind=kind) == pytest.approx(0)


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
def test_a_single_step_has_the_full_rate(kind):
    assert rates(kind, total_steps=1, warmup=warmup_steps(1, None), peak=3.0) == [3.0]
