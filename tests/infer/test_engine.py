"""A request's tokens are its own: the same alone, in any batch, in any order, cut, shared or
guessed ahead."""

import random

import pytest
import torch
from support.models import EOS_ID, NATIVE_TYPES, native, random_ids, tiny_model, tiny_tokenizer
from support.paths import SAMPLE
from support.tape import Tape

from lorabatch.infer.engine import Engine, _accepted
from lorabatch.infer.requests import Request, SamplingParams
from lorabatch.infer.runners import make_runner
from lorabatch.infer.runners.eager import NativeRunner
from lorabatch.infer.runners.graph import GraphRunner
from lorabatch.infer.stats import PassStats
from lorabatch.machine.device import TYPES
from lorabatch.model import hub
from lorabatch.model.attention import Segment
from lorabatch.model.load import load_config, load_model, load_tokenizer

GREEDY = SamplingParams(ignore_eos=True)


def complete(
    runner, prompts, new, *, slots, arrival=None, tokenizer=None, settings=GREEDY, **options
):
    """(output ids of each prompt, what the pass cost), run in ``arrival``; ``new``: tokens for
    each."""
    requests = [
        Request(str(i), i, "", settings, token_ids=list(p), max_new_tokens=n)
        for i, (p, n) in enumerate(zip(prompts, new, strict=True))
    ]
    engine = Engine(
        runner,
        tokenizer or tiny_tokenizer(),
        [EOS_ID],
        max_running=slots,
        **{"prefill_tokens": 64} | options,
    )
    finished = []
    stats = engine.run([requests[i] for i in arrival or range(len(requests))], finished.append)
    assert len(finished) == len(requests)
    return [r.output_ids for r in requests], stats


@pytest.fixture(scope="module", params=["plain", "kernels", "recorded"])
def toy(request):
    sizes = {"num_slots": 6, "capacity": 128}
    if request.param == "recorded":  # on a tape, which cannot see the CPU's kernels
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("lorabatch.kernels.train_ops._train_ops", lambda dtype: None)
            model = native(tiny_model("llama"), prepack=False)
            yield GraphRunner(model, record=Tape, **sizes)
        return
    model = native(tiny_model("llama"))
    if request.param == "plain":
        yield NativeRunner(model, **sizes)
        return
    runner = make_runner(model, max_tokens=64, **sizes)
    if isinstance(runner, NativeRunner):
        pytest.skip("no kernels on this machine")
    yield runner


@pytest.fixture(scope="module")
def prompts():
    """Two groups that share a beginning, copies of one prompt, and loners."""
    system, *rest = (ids.tolist() for ids in random_ids([40, 9, 20, 1, 33, 70, 3, 12], seed=11))
    return [
        system + rest[0],
        system + rest[1],
        rest[3],
        system + rest[2],
        rest[4],
        rest[5],
        *[rest[4]] * 3,
        system + rest[6],
    ]


NEW = [12, 20, 16, 9, 25, 14, 8, 8, 30, 11]


@pytest.mark.parametrize(
    ("slots", "options"),
    [
        (6, {}),
        (3, {"prefill_tokens": 7}),
        (6, {"order": "longest"}),
        (4, {"order": "adapter"}),
        (4, {"speculate": 4}),
        (6, {"speculate": 7, "prefill_tokens": 20}),
    ],
)
def test_no_way_of_running_changes_a_token(toy, prompts, slots, options):
    expected = [complete(toy, [p], [n], slots=1)[0][0] for p, n in zip(prompts, NEW, strict=True)]
    assert len({tuple(e) for e in expected}) >= 7, "a constant output would prove little"
    order = random.Random(slots).sample(range(len(prompts)), len(prompts))
    got, stats = complete(toy, prompts, NEW, slots=slots, arrival=order, **options)
    assert got == expected
    assert stats.shared_tokens > 0
    assert (stats.guessed_tokens > 0) == ("speculate" in options)


def test_sampled_tokens_do_not_depend_on_the_batch_either(toy, prompts):
    settings = SamplingParams(temperature=0.9, ignore_eos=True, seed=5)
    expected = [
        complete(toy, [p], [n], slots=1, settings=settings)[0][0]
        for p, n in zip(prompts, NEW, strict=True)
    ]
    assert (
        complete(toy, prompts, NEW, slots=5, settings=settings, prefill_tokens=16, speculate=3)[0]
        == expected
    )


def test_while_requests_wait_a_step_is_full_of_requests_or_of_prompts(toy):
    ids = [p.tolist() for p in random_ids([20] * 12, seed=5)]
    _, stats = complete(toy, ids, [9] * 12, slots=4)
    assert stats.waiting_slots == stats.waiting_fill == stats.waiting_steps > 0, (
        "short prompts: all slots are in use"
    )
    _, stats = complete(toy, ids, [2] * 12, slots=6, prefill_tokens=20)
    assert stats.waiting_slots < stats.waiting_fill == stats.waiting_steps, (
        "long prompts, short answers: a prompt a step is all there is room for"
    )


def test_a_guess_beyond_the_end_is_not_counted(toy):
    """A stop in the middle of accepted guesses ends the request there."""
    prompt = random_ids([12], seed=3)[0].tolist()
    free = complete(toy, [prompt], [40], slots=1)[0][0]
    stop = SamplingParams(stop_token_ids=(free[20],), ignore_eos=True)
    expected = free[: free.index(free[20]) + 1]
    assert complete(toy, [prompt], [40], slots=1, settings=stop, speculate=8)[0][0] == expected


def test_right_guesses_bring_the_token_behind_them_and_the_first_wrong_one_ends_them():
    # 8 and 9 are guessed to follow 7
    segment, stats = Segment(0, 5, [7, 8, 9], num_logits=3), PassStats(begin_s=0.0)
    for chosen, accepted in (([8, 9, 4], [8, 9, 4]), ([8, 1, 4], [8, 1]), ([1, 9, 4], [1])):
        assert _accepted(segment, chosen, stats) == accepted
    assert (stats.guessed_tokens, stats.accepted_tokens) == (6, 3)


@pytest.mark.slow
def test_real_model_120_prompts_are_the_same_in_every_way():
    source = hub.find_model("smollm2-135m")
    config, tokenizer = load_config(source.path), load_tokenizer(source.path)
    instruction = (
        "You are a careful assistant who answers questions of patients in one short sentence. "
    )
    words, texts = (
        random.Random(0),
        [
            line
            for line in (SAMPLE / "prompts.txt").read_text(encoding="utf-8").splitlines()
            if line
        ],
    )
    while len(texts) < 120:
        texts.append(
            instruction
            + (
                "What should one know about "
                f"{words.choice(['fever', 'asthma', 'insulin', 'sleep'])} at age {len(texts)}?"
            )
        )
    ids = [tokenizer(t)["input_ids"] for t in texts[:120]]
    new = [3 + i % 4 for i in range(120)]
    model = load_model(
        source, config, backend="native", dtype=TYPES[NATIVE_TYPES[-1]], device=torch.device("cpu")
    )
    runner = make_runner(model, num_slots=64, capacity=128, max_tokens=2112)
    expected, _ = complete(runner, ids, new, slots=1, tokenizer=tokenizer, prefill_tokens=2048)
    order = random.Random(1).sample(range(120), 120)
    for options in (
        {"prefill_tokens": 2048},
        {"prefill_tokens": 100, "order": "longest", "speculate": 4},
    ):
        got, stats = complete(
            runner, ids, new, slots=64, arrival=order, tokenizer=tokenizer, **options
        )
        assert got == expected
        assert stats.shared_tokens > 1000
    assert stats.accepted_tokens > 0
