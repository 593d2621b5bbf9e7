"""A token's hidden state is a function of its own sequence alone, bit for bit, however the sequence
enters the cache."""

import random

import pytest
import torch
from support.models import NATIVE_VARIANTS, native, random_ids, tiny_model

from lorabatch.infer.runners.eager import NativeRunner
from lorabatch.infer.runners.kv_cache import attend, in_fp32
from lorabatch.model.attention import Segment

SLOTS = 5
CAPACITY = 128
REAL_HEADS = {
    "hidden_size": 192,
    "head_dim": 64,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "num_hidden_layers": 2,
}


@pytest.fixture(scope="module")
def models():
    """Runners by (variant, type, changes of the configuration), built once."""
    built = {}

    def get(variant, dtype, *, capacity=CAPACITY, **changes):
        key = (variant, dtype, capacity, *sorted(changes.items()))
        if key not in built:
            built[key] = NativeRunner(
                native(tiny_model(variant, **changes), dtype=dtype),
                num_slots=SLOTS,
                capacity=capacity,
            )
        return built[key]

    return get


def alone(runner, ids, *, slot=0):
    """Hidden states [L, H] of one sequence read token by token."""
    return torch.cat([runner.forward([Segment(slot, i, ids[i : i + 1])]) for i in range(len(ids))])


def in_pieces(runner, sequences, *, seed):
    """Hidden states of all sequences, each in its own slot, read in random pieces together with
    random others."""
    rng = random.Random(seed)
    slots = rng.sample(range(SLOTS), len(sequences))
    done, hidden = [0] * len(sequences), [[] for _ in sequences]
    while live := [i for i, ids in enumerate(sequences) if done[i] < len(ids)]:
        chosen = rng.sample(live, rng.randint(1, len(live)))
        sizes = [
            min(rng.choice([1, 1, 2, 5, 9, 40, 1000]), len(sequences[i]) - done[i]) for i in chosen
        ]
        segments = [
            Segment(slots[i], done[i], sequences[i][done[i] : done[i] + n], num_logits=n)
            for i, n in zip(chosen, sizes, strict=True)
        ]
        for i, n, rows in zip(chosen, sizes, runner.forward(segments).split(sizes), strict=True):
            hidden[i].append(rows)
            done[i] += n
    return [torch.cat(rows) for rows in hidden]


def as_lists(ids):
    return [t.tolist() for t in ids]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    "variant", [v for v in NATIVE_VARIANTS if v in ("gpt2", "llama", "mistral-window", "qwen3")]
)
def test_pieces_and_neighbours_do_not_change_a_bit(models, variant, dtype):
    runner = models(variant, dtype)
    sequences = as_lists(random_ids([70, 3, 100, 17], seed=4))
    expected = [alone(runner, ids) for ids in sequences]
    assert len({float(h.float().sum()) for h in expected}) == 4, "different sequences differ"
    for seed in range(6):
        for got, want in zip(in_pieces(runner, sequences, seed=seed), expected, strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_long_sequences_of_a_real_head_size_too(models, dtype):
    """Beyond SUM_LIMIT positions and with oneDNN's own half-precision products."""
    runner = models("llama", dtype, capacity=1300, max_position_embeddings=2048, **REAL_HEADS)
    short, long = as_lists(random_ids([90, 1200], seed=5))
    for seed in range(2):
        got = in_pieces(runner, [short, long], seed=seed)
        assert torch.equal(got[0], alone(runner, short))
        again = runner.forward([Segment(1, 0, long, num_logits=len(long))])
        assert torch.equal(got[1], again)


def test_copied_positions_serve_another_slot(models):
    runner = models("llama", torch.float32)
    prefix, rest, other = as_lists(random_ids([30, 12, 20], seed=6))
    expected = alone(runner, prefix + rest)[30:]
    runner.forward([Segment(2, 0, prefix + other, num_logits=0)])
    runner.copy(2, 4, 30)
    assert torch.equal(runner.forward([Segment(4, 30, rest, num_logits=12)]), expected)
    assert torch.equal(runner.forward([Segment(2, 30, rest, num_logits=12)]), expected), (
        "what lay behind the prefix is overwritten"
    )


def test_hidden_states_come_in_the_order_of_the_segments(models):
    runner = models("llama", torch.float32)
    a, b = as_lists(random_ids([11, 4], seed=7))
    whole = {
        0: runner.forward([Segment(0, 0, a, num_logits=11)]),
        1: runner.forward([Segment(0, 0, b, num_logits=4)]),
    }
    got = runner.forward([Segment(3, 0, b, num_logits=2), Segment(1, 0, a, num_logits=3)])
    assert torch.equal(got, torch.cat([whole[1][-2:], whole[0][-3:]]))
    assert runner.forward([Segment(3, 0, b, num_logits=0)]).shape == (0, 64)
    assert runner.greedy(got) == runner.logits(got).argmax(-1).tolist()


def test_large_keys_do_not_overflow_fp16():
    """q.k is 120,000 here, beyond fp16's 65,504; scaled by 1/8 first it is 15,000."""
    q = torch.full((1, 1, 1, 64), 50.0, dtype=torch.float16)
    keys = torch.full((1, 1, 64, 64), 37.5, dtype=torch.float16)
    keys[..., 1:, :] = 0
    values = torch.zeros(1, 1, 64, 64, dtype=torch.float16)
    values[..., 0, :] = 2
    assert not in_fp32(q.expand(1, 1, 2, 64)), "large enough for half precision"
    y = attend(q.expand(1, 1, 2, 64), keys, values, torch.tensor([[63]]), None)
    assert torch.equal(y, torch.full_like(y, 2.0))
