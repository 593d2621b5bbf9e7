"""Properties of the scheduler: dense slots, the step's budget, true copies, nobody starves,
everybody finishes."""

from hypothesis import given, settings
from hypothesis import strategies as st

from lorabatch.infer.requests import Request, SamplingParams
from lorabatch.infer.scheduler import MIN_SHARED, Copy, Scheduler, common_length
from lorabatch.infer.speculation import Lookup

SYSTEM = list(range(100, 100 + MIN_SHARED))


def make(index, shape):
    """A prompt of one of few texts, so that beginnings are shared, some of them by the whole
    prompt."""
    family, length, new = shape
    text = SYSTEM + [family] * 30 if family else [index + 1000] * 60
    return Request(
        str(index), index, "", SamplingParams(), token_ids=text[:length], max_new_tokens=new
    )


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.integers(1, 46), st.integers(1, 9)), min_size=1, max_size=40
    ),
    st.integers(1, 9),
    st.integers(1, 80),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
def test_every_request_runs_to_its_end_in_dense_slots(
    shapes, max_running, budget, static, longest_first, apart
):
    requests = [make(i, shape) for i, shape in enumerate(shapes)]
    source = iter(requests)
    scheduler = Scheduler(
        source,
        max_running=max_running,
        prefill_tokens=budget,
        static=static,
        apart=apart,
        order="longest" if longest_first else "arrival",
    )
    held = {}  # what a cache would hold: slot -> tokens
    finished, steps = [], 0
    while scheduler.has_work:
        steps += 1
        running_before = len(scheduler.running)
        batch = scheduler.next_batch()
        assert batch.chunks, "a step without work"
        assert len(scheduler.running) <= max_running
        assert [r.slot for r in scheduler.running] == list(range(len(scheduler.running)))
        assert not (static and batch.admitted and running_before)
        for copy in batch.copies:
            assert len(held[copy.source]) >= copy.length >= MIN_SHARED
            held[copy.target] = held[copy.source][: copy.length]
        assert len({p.request.slot for p in batch.chunks}) == len(batch.chunks), (
            "a slot twice in one step"
        )
        assert static or sum(p.stop - p.start for p in batch.chunks if p.is_prompt) <= budget
        decoding = [r for r in scheduler.running if r.output_ids]
        read = {p.request.id for p in batch.chunks}
        if apart:
            assert len({p.is_prompt for p in batch.chunks}) == 1
        assert {r.id for r in decoding} <= read or (apart and batch.prompt_tokens), (
            "who generates gets a token in every step"
        )
        for chunk in batch.chunks:
            stream = chunk.request.token_ids + chunk.request.output_ids
            before = held.get(chunk.request.slot, []) if chunk.start else []
            assert before[: chunk.start] == stream[: chunk.start], (
                "it goes on from what its slot holds"
            )
            held[chunk.request.slot] = before[: chunk.start] + stream[chunk.start : chunk.stop]
        going_on = [p.request for p in batch.chunks if p.yields_token]
        for request in going_on:
            request.output_ids.append(0)
        done = [r for r in going_on if len(r.output_ids) == r.max_new_tokens]
        for copy in scheduler.release(done):
            held[copy.target] = held[copy.source][: copy.length]
        finished += done
    assert sorted(r.index for r in finished) == list(range(len(requests)))
    assert all(len(r.output_ids) == r.max_new_tokens for r in requests)
    assert steps <= sum(len(r.token_ids) + r.max_new_tokens for r in requests)


def test_who_leaves_is_not_moved_first():
    requests = [make(i, (0, 3, 1)) for i in range(4)]
    scheduler = Scheduler(requests, max_running=4, prefill_tokens=100)
    scheduler.next_batch()
    assert scheduler.release([requests[0], requests[3]]) == [Copy(2, 0, 3)]


def test_samples_of_one_prompt_read_it_once():
    requests = [make(i, (1, 46, 3)) for i in range(4)]
    scheduler = Scheduler(requests, max_running=4, prefill_tokens=28)
    read = []
    while not all(r.output_ids for r in requests):
        batch = scheduler.next_batch()
        read += [p.stop - p.start for p in batch.chunks if p.is_prompt]
        for chunk in batch.chunks:
            if chunk.yields_token:
                chunk.request.output_ids.append(0)
    assert read == [28, 18, 1, 1, 1]


def test_other_adapters_share_nothing():
    requests = [make(i, (1, 46, 3)) for i in range(2)]
    requests[1].adapter = "other"
    scheduler = Scheduler(requests, max_running=2, prefill_tokens=1000)
    assert [(p.start, p.stop) for p in scheduler.next_batch().chunks] == [(0, 46), (0, 46)]


def test_longest_first_sorts_what_it_sees():
    requests = [make(i, (0, n, 1)) for i, n in enumerate([3, 40, 20])]
    scheduler = Scheduler(requests, max_running=3, prefill_tokens=1000, order="longest")
    assert [p.request.index for p in scheduler.next_batch().chunks] == [1, 2, 0]


@given(st.lists(st.integers(0, 3), max_size=30), st.lists(st.integers(0, 3), max_size=30))
def test_common_length_is_where_sequences_part(a, b):
    n = common_length(a, b)
    assert a[:n] == b[:n] and (a[n : n + 1] != b[n : n + 1] or n in (len(a), len(b)))


@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=12),
    st.lists(st.integers(0, 3), max_size=30),
    st.integers(1, 6),
)
def test_guesses_are_what_followed_the_newest_pair_before(prompt, output, count):
    lookup = Lookup()
    for upto in range(len(output) + 1):
        stream = prompt + output[:upto]
        guess = lookup.guess(prompt, output[:upto], count)
        earlier = [i for i in range(len(stream) - 2) if stream[i : i + 2] == stream[-2:]]
        assert guess == (stream[earlier[-1] + 2 :][:count] if earlier else [])
