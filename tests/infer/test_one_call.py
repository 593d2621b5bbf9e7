"""The eager runner with attention in one call a layer, as GPUs have it: on the CPU by the reference
loop, against the runner of today; on the meta device its launches are counted."""

import random

import pytest
import torch
from support.launches import Launches, on_meta
from support.models import (
    engine_greedy,
    native,
    random_adapter,
    random_ids,
    tiny_model,
)

from lorabatch.infer.runners.eager import NativeRunner
from lorabatch.model.attention import Segment

SLOTS, CAPACITY = 5, 128
VARIANTS = ["gpt2", "llama", "mistral-window", "qwen3"]


@pytest.fixture(autouse=True)
def kernels_on(monkeypatch):
    monkeypatch.delenv("LORABATCH_KERNELS", raising=False)


def two_runners(variant, **more):
    """With attention in one call, and as it is on the CPU."""
    sizes = {"num_slots": SLOTS, "capacity": CAPACITY}
    return [
        NativeRunner(native(tiny_model(variant)), one_call=way, **sizes, **more)
        for way in (True, False)
    ]


@pytest.mark.parametrize("variant", VARIANTS)
def test_pieces_of_many_sequences_get_the_hidden_states_of_the_runner_of_today(variant):
    ours, today = two_runners(variant)
    rng, sequences = random.Random(3), [ids.tolist() for ids in random_ids([70, 3, 100, 17])]
    slots, done = rng.sample(range(SLOTS), 4), [0] * 4
    while live := [i for i in range(4) if done[i] < len(sequences[i])]:
        segments = []
        for i in rng.sample(live, rng.randint(1, len(live))):
            piece = sequences[i][done[i] : done[i] + rng.choice([1, 1, 2, 9, 40])]
            segments.append(Segment(slots[i], done[i], piece, num_logits=len(piece)))
            done[i] += len(piece)
        got, expected = ours.forward(segments), today.forward(segments)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_engine_writes_the_same_tokens(variant):
    prompts = random_ids([7, 40, 1, 23, 12, 3, 30], seed=1)
    counts = [20, 9, 15, 30, 1, 25, 12]
    ours, today = (
        engine_greedy(runner, prompts, counts, num_slots=SLOTS, prefill_tokens=16)
        for runner in two_runners(variant)
    )
    assert ours == today and len({token for row in ours for token in row}) > 10


def test_copied_and_cleared_slots():
    ours, today = two_runners("llama")
    prefix, rest = (ids.tolist() for ids in random_ids([30, 12], seed=6))
    rows = []
    for runner in (ours, today):
        runner.forward([Segment(2, 0, prefix, num_logits=0)])
        runner.copy(2, 4, 30)
        runner.clear(2)
        assert not runner.cache.data[:, :, 2].any()
        rows.append(runner.forward([Segment(4, 30, rest, num_logits=12)]))
    torch.testing.assert_close(rows[0], rows[1], rtol=1e-4, atol=1e-4)


def decode_launches(segments, *, adapters=0, **shape):
    """Operators of a step of a Llama's shape on a new GPU, and copies from the host."""
    reference = native(tiny_model("llama", **shape), dtype=torch.bfloat16, prepack=False)
    bank = [random_adapter(reference, r=4, seed=i) for i in range(adapters)]
    runner = NativeRunner(on_meta(reference), num_slots=64, capacity=CAPACITY, adapters=bank)
    assert runner.cache.by_token, "the meta device has the operators of a GPU"
    # inference mode would hide casts and copies inside composed operators
    with torch.no_grad(), Launches() as launches:
        hidden = NativeRunner.forward.__wrapped__(runner, segments)
        logits = NativeRunner.logits.__wrapped__(runner, hidden)
    assert logits.shape[0] == len(segments) and logits.dtype == torch.float32
    return launches


@pytest.mark.parametrize("rows", [1, 64])
def test_launches_of_a_decode_step_do_not_grow(rows):
    """35 a layer on torch's operators: 16 of two norms, 8 of the rotation, 6 of products and sums,
    2 of the activation, 2 that store keys and values, and attention, which had 17 before."""
    segments = [Segment(slot, 9, [7]) for slot in range(rows)]
    few, more = (decode_launches(segments, num_hidden_layers=n) for n in (2, 4))
    assert (more.total - few.total) / 2 <= 36
    assert few.total - 2 * (more.total - few.total) / 2 <= 20, "embedding, rotation, norm, head"
    assert few.from_host == more.from_host == 2, "numbers of the step, and starts and lengths"


def test_launches_of_prompts_do_not_depend_on_their_number():
    def prompts(count):
        return [Segment(slot, 16 * (slot % 2), [7] * 20) for slot in range(count)]

    assert decode_launches(prompts(2)).total == decode_launches(prompts(30)).total


def test_launches_do_not_depend_on_the_number_of_adapters():
    counts = [
        decode_launches([Segment(i, 9, [7], adapter=i % n) for i in range(12)], adapters=n).total
        for n in (2, 6)
    ]
    assert counts[0] == counts[1]
