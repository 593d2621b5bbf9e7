"""Properties of the scheduler."""

from hypothesis import given, settings
from hypothesis import strategies as st

from lorabatch.infer.requests import Request, SamplingParams
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
