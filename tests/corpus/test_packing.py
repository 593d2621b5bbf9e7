"""Packing and the order of documents: properties over random lengths."""

import doctest

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorabatch.corpus import packing
from lorabatch.corpus.packing import (
    deal,
    epoch_order,
    epoch_size,
    pack,
    steps_per_epoch,
    training_steps,
)

CAPACITY = 64
quick = settings(max_examples=150, deadline=None)


@quick
@given(st.lists(st.integers(1, 2 * CAPACITY), max_size=60), st.integers(1, CAPACITY))
def test_every_document_is_in_exactly_one_block(lengths, capacity):
    blocks = pack(lengths, capacity)
    assert sorted(i for block in blocks for i in block) == list(range(len(lengths)))
    for block in blocks:
        assert block
        assert sum(lengths[i] for i in block) <= capacity or (
            len(block) == 1 and lengths[block[0]] > capacity
        )


@quick
@given(st.lists(st.integers(1, CAPACITY), min_size=1, max_size=60))
def test_blocks_are_at_most_twice_the_lower_bound(lengths):
    assert len(pack(lengths, CAPACITY)) <= 2 * -(-sum(lengths) // CAPACITY)


@quick
@given(st.lists(st.integers(1, CAPACITY), max_size=60))
def test_no_two_blocks_could_be_one(lengths):
    """What makes the bound hold: any two blocks together are too long."""
    filled = sorted(sum(lengths[i] for i in block) for block in pack(lengths, CAPACITY))
    assert len(filled) < 2 or filled[0] + filled[1] > CAPACITY


def test_packing_by_hand():
    assert pack([], 7) == []
    assert pack([5, 3, 4, 2], 7) == [[0, 3], [2, 1]]
    assert pack([7, 7], 7) == [[0], [1]]
    assert pack([9, 1, 6], 7) == [[0], [2, 1]]  # 9 does not fit anywhere and stays alone
    # best fit: what fits two blocks goes where it leaves least room
    assert pack([4, 5, 2], 7) == [[1, 2], [0]]
    assert pack([3, 3, 3], 6) == [[0, 1], [2]]  # ties keep their order


def test_examples_in_docstrings_are_true():
    """Every ``expression == value`` in the docstrings; they are written as prose, not as a
    session."""
    import re

    examples = [
        e
        for f in (pack, training_steps, epoch_order)
        for e in re.findall(r"``(.+? == .+?)``", f.__doc__ or "")
    ]
    assert examples
    for example in examples:
        assert eval(example, vars(packing)), example
    assert doctest.testmod(packing).failed == 0


@quick
@given(st.integers(1, 50), st.integers(1, 12), st.integers(1, 4), st.integers(0, 2**40))
def test_each_epoch_is_a_permutation_in_steps_of_equal_size(num_documents, per_step, epochs, seed):
    steps = list(training_steps(num_documents, per_step, epochs=epochs, seed=seed))
    assert len(steps) == epochs * steps_per_epoch(num_documents, per_step)
    assert [epoch for epoch, _ in steps] == sorted(epoch for epoch, _ in steps)
    for epoch in range(epochs):
        mine = [indices for e, indices in steps if e == epoch]
        assert sorted(i for indices in mine for i in indices) == list(range(num_documents))
        assert all(len(indices) == per_step for indices in mine[:-1])
        assert 1 <= len(mine[-1]) <= per_step


def test_order_is_a_function_of_seed_and_epoch():
    orders = [
        epoch_order(30, seed=seed, epoch=epoch) for seed in (1, 2, 11) for epoch in (0, 1, 10)
    ]
    assert orders == [
        epoch_order(30, seed=seed, epoch=epoch) for seed in (1, 2, 11) for epoch in (0, 1, 10)
    ]
    assert len({tuple(order) for order in orders}) == len(orders)
    assert orders[0] != list(range(30))
    long, short = (list(training_steps(30, 4, epochs=n, seed=1)) for n in (3, 1))
    assert long[: len(short)] == short  # more epochs do not change the first ones


@pytest.mark.parametrize(
    ("documents", "per_step", "steps"), [(8, 8, 1), (9, 8, 2), (1, 8, 1), (16, 8, 2), (0, 8, 0)]
)
def test_steps_per_epoch(documents, per_step, steps):
    assert steps_per_epoch(documents, per_step) == steps


@given(st.lists(st.integers(1, 500), max_size=40), st.integers(1, 6))
def test_every_document_is_dealt_once_and_evenly(lengths, count):
    shares = deal(lengths, count)
    assert len(shares) == count
    assert sorted(i for share in shares for i in share) == list(range(len(lengths)))
    sums = [sum(lengths[i] for i in share) for share in shares]
    assert max(sums) - min(sums) <= max(lengths, default=0)


# Several files


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 12), st.sampled_from([0.0, 0.3, 1.0, 2.5])), min_size=1),
    st.integers(0, 3),
)
def test_an_epoch_takes_of_each_file_what_its_weight_says(parts, seed):
    total = sum(count for count, _ in parts)
    orders = [epoch_order(total, seed=seed, epoch=epoch, parts=parts) for epoch in range(10)]
    assert orders == [epoch_order(total, seed=seed, epoch=e, parts=parts) for e in range(10)]
    assert {len(order) for order in orders} == {epoch_size(total, parts)}
    first = 0
    for count, weight in parts:
        own = [i for order in orders for i in order if first <= i < first + count]
        taken = max(1, round(weight * count)) if weight else 0
        assert len(own) == 10 * taken
        often = [own.count(i) for i in range(first, first + count)]
        assert max(often) - min(often) <= 1, "none comes again before all had their turn"
        first += count


def test_one_file_of_weight_one_is_the_file_alone():
    for epoch in range(3):
        alone = epoch_order(30, seed=4, epoch=epoch)
        assert epoch_order(30, seed=4, epoch=epoch, parts=[(30, 1.0)]) == alone
        assert sorted(alone) == list(range(30)) and alone != list(range(30))
