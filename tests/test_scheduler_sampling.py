"""Properties of the scheduler, and the sampler against transformers' filters."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from lorabatch.infer.requests import Request, SamplingParams
from lorabatch.infer.sampling import filtered, penalised, sample, uniform
from lorabatch.infer.scheduler import Scheduler


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 60), st.integers(1, 9)), min_size=1, max_size=40),
    st.integers(1, 9),
    st.integers(1, 80),
    st.booleans(),
)
def test_every_request_runs_to_its_end_in_dense_slots(shapes, max_running, budget, static):
    requests = [Request(str(i), i, "", SamplingParams(), token_ids=[0] * n, max_new_tokens=m) for i, (n, m) in enumerate(shapes)]
    scheduler = Scheduler(requests, max_running=max_running, prefill_tokens=budget, static=static)
    slots, finished = {}, []
    while scheduler.has_work:
        running_before = len(scheduler.running)
        batch = scheduler.next_batch()
        assert batch.requests, "a step without work"
        if batch.is_prefill:
            total = sum(len(r.token_ids) for r in batch.requests)
            assert static or total <= budget or len(batch.requests) == 1
            assert not static or running_before == 0
            slots |= {r.slot: r.id for r in batch.requests}
        assert len(scheduler.running) <= max_running
        assert [slots[i] for i in range(len(scheduler.running))] == [r.id for r in scheduler.running]
        for request in batch.requests:
            request.output_ids.append(0)
        done = [r for r in batch.requests if len(r.output_ids) == r.max_new_tokens]
        for move in scheduler.release(done):
            assert move.length == next(r for r in requests if r.id == slots[move.source]).num_tokens - 1
            slots[move.target] = slots.pop(move.source)
        finished += done
    assert sorted(r.index for r in finished) == list(range(len(requests)))
    assert all(len(r.output_ids) == r.max_new_tokens for r in requests)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.floats(0.2, 3), st.integers(0, 12), st.floats(0.05, 1), st.floats(0, 0.5))
def test_filters_keep_what_transformers_keeps(seed, temperature, top_k, top_p, min_p):
    logits = 3 * torch.randn(1, 12, generator=torch.Generator().manual_seed(seed))
    processors = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k:
        processors.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        processors.append(TopPLogitsWarper(top_p))
    if min_p:
        processors.append(MinPLogitsWarper(min_p))
    expected = processors(torch.zeros(1, 1, dtype=torch.long), logits.clone()).softmax(-1)
    probabilities, order = filtered(logits, [SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)])
    got = torch.zeros_like(logits).scatter(1, order, probabilities / probabilities.sum())
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_repetition_penalty_is_transformers():
    logits = torch.randn(2, 20)
    requests = [Request(str(i), i, "", SamplingParams(repetition_penalty=1.3), token_ids=[1, 2, 2], output_ids=[5]) for i in range(2)]
    expected = RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([[1, 2, 2, 5]] * 2), logits.clone())
    torch.testing.assert_close(penalised(logits, requests), expected)


def test_draws_follow_the_probabilities_and_nothing_else():
    weights = torch.tensor([0.5, 0.3, 0.15, 0.05])
    counts = torch.zeros(4)
    for seed in range(4000):
        counts[sample(weights.log()[None], [Request("a", 0, "", SamplingParams(temperature=1.0, seed=seed))])[0]] += 1
    chi_square = float(((counts - 4000 * weights) ** 2 / (4000 * weights)).sum())
    assert chi_square < 16.3, counts  # 3 degrees of freedom, 0.1 %


def test_uniform_is_a_function_of_seed_and_step():
    values = [uniform(seed, step) for seed in range(60) for step in range(60)]
    assert len(set(values)) == 3600 and 0 <= min(values) < 0.01 and 0.99 < max(values) < 1
    assert abs(sum(values) / 3600 - 0.5) < 0.02
    assert uniform(3, 4) == uniform(3, 4) != uniform(4, 3)
