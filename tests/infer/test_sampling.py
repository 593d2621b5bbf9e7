"""The sampler against transformers' processors, against the exact distribution, and alone against
in company."""

import pytest
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
from lorabatch.infer.sampling import (
    FIRST_WIDTH,
    choose,
    draw,
    exact_places,
    filtered,
    penalised,
    places,
    sample,
    uniform,
)

# equally spaced draws of one row: what comes out is its distribution, to within 1 / GRID per token
GRID = 4000


def request(i=0, *, prompt=(), output=(), **params):
    return Request(
        str(i), i, "", SamplingParams(**params), token_ids=list(prompt), output_ids=list(output)
    )


def drawn_distribution(logits, params):
    """logits [V] -> how often each token is drawn, [V]."""
    draws = [(i + 0.5) / GRID for i in range(GRID)]
    tokens = draw(logits.expand(GRID, -1), [params] * GRID, draws)
    return torch.bincount(tokens, minlength=len(logits)) / GRID


def transformers_distribution(logits, params):
    processors = LogitsProcessorList([TemperatureLogitsWarper(params.temperature)])
    if params.top_k:
        processors.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        processors.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        processors.append(MinPLogitsWarper(params.min_p))
    return processors(torch.zeros(1, 1, dtype=torch.long), logits[None].clone()).softmax(-1)[0]


def assert_same_distribution(logits, params):
    expected, got = transformers_distribution(logits, params), drawn_distribution(logits, params)
    assert not got[expected == 0].any(), "a dropped token was drawn"
    torch.testing.assert_close(got, expected, rtol=0, atol=1.01 / GRID)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 2**31),
    st.floats(0.2, 3),
    st.integers(0, 12),
    st.floats(0.05, 1),
    st.floats(0, 0.5),
)
def test_every_combination_of_filters_is_transformers(seed, temperature, top_k, top_p, min_p):
    logits = 3 * torch.randn(12, generator=torch.Generator().manual_seed(seed))
    assert_same_distribution(
        logits, SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    )


@pytest.mark.parametrize(
    "filters",
    [{}, {"top_p": 0.5}, {"top_p": 0.97}, {"min_p": 0.02}, {"top_k": 200, "top_p": 0.9}],
    ids=str,
)
def test_filters_that_keep_more_than_the_first_candidates(filters):
    logits = 0.5 * torch.randn(500, generator=torch.Generator().manual_seed(3))
    params = SamplingParams(temperature=1.0, **filters)
    assert (transformers_distribution(logits, params) > 0).sum() > FIRST_WIDTH
    assert_same_distribution(logits, params)


def test_bounds_are_met_by_what_equals_them():
    """Four equal tokens, exactly a quarter each: two of them reach top-p 0.5, all of them are as
    likely as the likeliest."""
    for params, kept in (({"top_p": 0.5}, 2), ({"top_p": 0.51}, 3), ({"min_p": 1.0}, 4)):
        probabilities, _, _ = filtered(
            torch.zeros(1, 4), [SamplingParams(temperature=1.0, **params)], 4
        )
        assert int((probabilities > 0).sum()) == kept


def test_penalties():
    logits = torch.randn(3, 20, generator=torch.Generator().manual_seed(0))
    prompt, output = [1, 2, 2], [5, 5, 2, 7]
    rows = [
        request(prompt=prompt, output=output, repetition_penalty=1.3),
        request(),
        request(prompt=prompt, output=output[:2], presence_penalty=0.5, frequency_penalty=0.25),
    ]
    penalised(logits, rows)
    rows[2].output_ids += output[2:]  # what was counted before is not counted again
    got = penalised(logits, rows)
    seen = torch.tensor([prompt + output])
    torch.testing.assert_close(
        got[0], RepetitionPenaltyLogitsProcessor(1.3)(seen, logits[:1].clone())[0]
    )
    assert torch.equal(got[1], logits[1])
    by_definition = logits[2].clone()
    for token_id in set(output):
        by_definition[token_id] -= 0.5 + 0.25 * output.count(token_id)
    torch.testing.assert_close(got[2], by_definition)


def test_draws_follow_the_probabilities_of_the_seeds():
    weights = torch.tensor([0.5, 0.3, 0.15, 0.05])
    for filters, kept in (
        ({}, weights),
        ({"top_k": 3}, weights[:3] / 0.95),
        ({"top_p": 0.7}, weights[:2] / 0.8),
    ):
        rows = [request(seed=seed, temperature=1.0, **filters) for seed in range(4000)]
        counts = torch.bincount(
            torch.tensor(sample(weights.log().expand(4000, -1), rows)), minlength=4
        ).float()
        expected = 4000 * kept
        assert not counts[len(kept) :].any()
        chi_square = float(((counts[: len(kept)] - expected) ** 2 / expected).sum())
        assert chi_square < 16.3, counts  # 3 degrees of freedom, 0.1 %


def test_a_row_draws_the_same_token_alone_and_in_any_company():
    """Logits in bf16 have many equal values: their order must not depend on the neighbours'
    settings either."""
    kinds = [
        {},
        {"top_k": 5},
        {"top_k": 50},
        {"top_p": 0.9},
        {"min_p": 0.1},
        {"top_p": 0.999},
        {"temperature": 0},
    ]
    rows = [
        request(
            i,
            seed=i,
            prompt=[i, 3],
            **{"temperature": 1.0, "presence_penalty": 0.5 * (i % 2)} | kinds[i % len(kinds)],
        )
        for i in range(40)
    ]
    logits = (2 * torch.randn(40, 3000, generator=torch.Generator().manual_seed(1))).bfloat16()
    together = sample(logits, rows)
    assert [sample(logits[i : i + 1], [row])[0] for i, row in enumerate(rows)] == together
    backwards = sample(logits.flip(0), rows[::-1])
    assert backwards[::-1] == together and len(set(together)) > 20


def test_no_token_ends_a_completion_before_its_least_length():
    logits = torch.zeros(3, 10)
    logits[:, 4], logits[:, 7], logits[:, 2] = 3, 2, 1
    rows = [request(i, min_new_tokens=3, output=[1] * i) for i in (1, 2, 3)]
    for row in rows:
        row.ending_ids = (4, 7)
    assert [row.likeliest for row in rows] == [False, False, True]
    assert sample(logits, rows) == [2, 2, 4]
    sampled = [request(i, min_new_tokens=2, temperature=5.0, seed=i) for i in range(400)]
    for row in sampled:
        row.ending_ids = (4, 7)
    drawn = set(sample(logits[:1].expand(400, -1), sampled))
    assert drawn == set(range(10)) - {4, 7}


def test_logprobs_are_the_models_own_and_only_where_asked():
    logits = torch.randn(3, 30, generator=torch.Generator().manual_seed(5))
    rows = [
        request(0, logprobs=0),
        request(1),
        request(2, logprobs=4, temperature=2.0, seed=1, frequency_penalty=1.0, output=[1]),
    ]
    chosen = sample(logits, rows)
    values = logits.log_softmax(-1)
    assert rows[1].logprobs == []
    assert (
        rows[0].logprobs[0].own == pytest.approx(values[0].max().item())
        and rows[0].logprobs[0].top == []
    )
    entry = rows[2].logprobs[0]
    assert entry.own == pytest.approx(values[2, chosen[2]].item())
    expected = values[2].topk(4)
    assert entry.top_ids == expected.indices.tolist() and entry.top == pytest.approx(
        expected.values.tolist()
    )


def test_uniform_is_a_function_of_seed_step_and_sample():
    values = [
        uniform(seed, step, sample)
        for seed in range(20)
        for step in range(60)
        for sample in range(3)
    ]
    assert len(set(values)) == 3600 and 0 <= min(values) < 0.01 and 0.99 < max(values) < 1
    assert abs(sum(values) / 3600 - 0.5) < 0.02
    assert uniform(3, 4) == uniform(3, 4, 0) != uniform(4, 3)


def test_plain_rows_take_the_runners_way_and_never_see_logits():
    hidden = torch.randn(6, 4, generator=torch.Generator().manual_seed(2))
    seen = []

    class Runner:
        def greedy(self, rows):
            seen.append(("greedy", len(rows)))
            return [100 + int(torch.where((hidden == row).all(dim=1))[0]) for row in rows]

        def logits(self, rows):
            seen.append(("logits", len(rows)))
            return rows @ hidden.T

    plain = [request(i) for i in range(6)]
    assert choose(Runner(), hidden, plain) == [100, 101, 102, 103, 104, 105] and seen == [
        ("greedy", 6)
    ]
    mixed = [
        request(i, **({"temperature": 0.01, "seed": i} if i in (1, 4) else {})) for i in range(6)
    ]
    likeliest = (hidden @ hidden.T).argmax(dim=1).tolist()
    assert choose(Runner(), hidden, mixed) == [100, likeliest[1], 102, 103, likeliest[4], 105]
    assert seen[1:] == [("logits", 2), ("greedy", 4)]


def test_places_in_integers_are_those_in_floats_and_never_of_a_dropped_token():
    """What GPUs use: sums of integers do not depend on their order."""
    generator = torch.Generator().manual_seed(3)
    logits = 4 * torch.randn(64, 500, generator=generator)
    probabilities = logits.softmax(-1)
    probabilities[:, ::3] = 0
    probabilities[:, -1] = 0
    probabilities[:8, 1:] = 0  # a single candidate
    probabilities[:8, 0] = 0.25
    draws = torch.rand(64, generator=generator, dtype=torch.float64).tolist()
    ends = [0.0, 1 - 2**-53]
    for each in (draws, [ends[i % 2] for i in range(64)]):
        found = exact_places(probabilities, each)
        assert (probabilities.gather(1, found) > 0).all()
        if each is draws:
            assert (found == places(probabilities, each)).float().mean() > 0.95
    whole = (probabilities.double() * 2**40).long().sum(-1)
    assert torch.equal(whole, (probabilities.flip(-1).double() * 2**40).long().cumsum(-1)[:, -1])


def test_draws_in_integers_follow_the_same_distribution(monkeypatch):
    monkeypatch.setattr("lorabatch.infer.sampling.places", exact_places)
    logits = 2 * torch.randn(50, generator=torch.Generator().manual_seed(5))
    for params in (SamplingParams(temperature=1.0), SamplingParams(temperature=0.7, top_p=0.8)):
        assert_same_distribution(logits, params)
