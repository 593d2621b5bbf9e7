"""One request whose settings are extreme, or for which the model's numbers are not finite, changes
nothing for the others."""

import json

import pytest
import torch
from support.commands import completions, infer_flags, write_rows
from support.models import EOS_ID, native, random_ids, save_model, tiny_model, tiny_tokenizer

from lorabatch.cli import main
from lorabatch.infer.engine import Engine
from lorabatch.infer.requests import NOT_FINITE, Request, SamplingParams
from lorabatch.infer.runners.eager import NativeRunner
from lorabatch.infer.runners.hf import HfRunner
from lorabatch.infer.sampling import sample
from lorabatch.infer.scheduler import Scheduler
from lorabatch.model.functional import NO_TOKEN, likeliest
from lorabatch.model.hf import HfModel

BAD = 299  # the token whose embedding is not a number
NEW = 6
TINY, HUGE = 5e-324, 1e30  # the smallest number, the largest that a setting may have
SETTINGS = [
    {},
    {"temperature": 0.8, "seed": 3},
    {"temperature": 1.0, "top_p": 0.9, "seed": 4},
    {"repetition_penalty": 1.2, "logprobs": 2},
]
EXTREMES = [
    {"temperature": 1.0, "top_p": 1e-46},
    {"temperature": 1.0, "top_p": TINY, "min_p": 1.0},
    {"repetition_penalty": 1e-40},
    {"temperature": 1.0, "repetition_penalty": TINY},
    {"temperature": 1.0, "repetition_penalty": HUGE},
    {"temperature": 1e-45},
    {"temperature": TINY, "repetition_penalty": TINY},
    {"temperature": HUGE, "top_p": 0.5},
    {"temperature": 1.0, "top_k": 2**62, "seed": 2**62},
    {
        "temperature": 1.0,
        "logprobs": 20,
        "frequency_penalty": 2.0,
        "presence_penalty": -2.0,
        "min_p": TINY,
    },
]


def request(i, ids, *, new=NEW, **params):
    return Request(
        str(i),
        i,
        "",
        SamplingParams(ignore_eos=True, **params),
        token_ids=list(ids),
        max_new_tokens=new,
    )


def outputs(runner, requests, *, slots=4, **options):
    """(error, output ids) of each."""
    finished = []
    Engine(
        runner, tiny_tokenizer(), [EOS_ID], max_running=slots, **{"prefill_tokens": 64} | options
    ).run(requests, finished.append)
    assert len(finished) == len(requests)
    return [(r.error, r.output_ids) for r in requests]


def broken(token_id=BAD):
    """A tiny Llama (its head is not tied) that answers NaN to one token of its vocabulary; files of
    such weights are refused."""
    model = native(tiny_model("llama"))
    model.decoder.embedding[token_id] = torch.nan
    return model


@pytest.fixture(params=["native", "hf"])
def runner(request):
    if request.param == "native":
        return NativeRunner(broken(), num_slots=4, capacity=128)
    model = tiny_model("llama")
    model.get_input_embeddings().weight.data[BAD] = torch.nan
    return HfRunner(HfModel(model, torch.device("cpu")))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_row_without_finite_numbers_has_no_token_and_the_others_theirs(bad):
    logits = torch.randn(7, 50, generator=torch.Generator().manual_seed(0))
    rows = [request(i, [1, 2], **{**SETTINGS[i % 4], "seed": i}) for i in range(7)]
    expected = sample(logits, rows)
    for row in range(7):
        spoilt = logits.clone()
        spoilt[row, 9] = bad
        assert sample(spoilt, rows) == [
            NO_TOKEN if i == row else token for i, token in enumerate(expected)
        ]
        assert likeliest(spoilt) == [
            NO_TOKEN if i == row else token for i, token in enumerate(likeliest(logits))
        ]
    assert sample(torch.full((7, 50), -torch.inf), rows) == [NO_TOKEN] * 7
    ruled_out = logits.clone()
    ruled_out[:, ::2] = -torch.inf
    assert all(token % 2 for token in sample(ruled_out, rows)), (
        "minus infinity is a token that the model rules out"
    )


@pytest.mark.parametrize("scale", [1.0, 1e38])
@pytest.mark.parametrize("params", EXTREMES, ids=str)
def test_every_legal_setting_leaves_a_token(params, scale):
    logits = scale * torch.randn(3, 40, generator=torch.Generator().manual_seed(1)).clamp(-3, 3)
    logits[1, 5] = 0.0
    rows = [
        Request("0", 0, "", SamplingParams(**params), token_ids=[5, 6], output_ids=[7, 7, 8])
        for _ in range(3)
    ]
    assert all(0 <= token < 40 for token in sample(logits, rows))


def test_bounds_too_small_for_their_type_keep_the_likeliest():
    logits = torch.randn(1, 40, generator=torch.Generator().manual_seed(1))
    for params in ({"top_p": 1e-46}, {"top_p": TINY, "min_p": 1.0}):
        assert sample(logits, [request(0, [1], temperature=1.0, seed=9, **params)]) == [
            int(logits.argmax())
        ]


def test_rows_that_look_at_as_many_candidates_for_another_reason_do_not_meet():
    """top-k 64 and the first look of top-p are both 64 wide; the one is all there is, the other is
    not."""
    logits = 0.1 * torch.randn(2, 500, generator=torch.Generator().manual_seed(2))
    for seed in range(20):
        rows = [
            request(0, [1], temperature=1.0, top_k=64, seed=seed),
            request(1, [1], temperature=1.0, top_p=0.99, seed=seed),
        ]
        assert sample(logits, rows) == [
            sample(logits[i : i + 1], rows[i : i + 1])[0] for i in range(2)
        ]


def test_requests_without_finite_numbers_end_alone(runner):
    """Among neighbours of every kind; and what the slots held does not reach those who get them
    next."""
    prompts = [
        ids.tolist() for ids in random_ids([9, 30, 3, 20, 12, 41, 7, 5, 25, 60], seed=8, vocab=BAD)
    ]
    good = [request(i, ids, **SETTINGS[i % 4]) for i, ids in enumerate(prompts)]
    expected = [outputs(runner, [r.restarted()])[0] for r in good]
    for place in range(0, 60, 25):
        ids = random_ids([60], seed=9, vocab=BAD)[0].tolist()
        ids[place] = BAD
        mixed = [r.restarted() for r in good]
        for i, params in enumerate(SETTINGS):
            mixed.insert(3 * i, request(100 + i, ids[: 60 - i], **params))
        found = outputs(runner, mixed)
        assert [f for f, r in zip(found, mixed, strict=True) if r.index < 100] == expected
        assert all(
            r.error.startswith(NOT_FINITE) and not r.output_ids for r in mixed if r.index >= 100
        )


def test_a_prompt_that_moves_while_it_is_read_leaves_nothing_behind():
    """Slot 0 ends while slot 1 reads a prompt with a bad token: slot 1 moves to 0, and a newcomer
    has slot 1."""
    runner = NativeRunner(broken(), num_slots=2, capacity=128)
    short, long, next_one = (ids.tolist() for ids in random_ids([5, 90, 6], seed=3, vocab=BAD))
    long[20] = BAD
    rows = [request(0, short, new=2), request(1, long), request(2, next_one)]
    expected = outputs(NativeRunner(broken(), num_slots=2, capacity=128), [rows[2].restarted()])[0]
    found = outputs(runner, rows, slots=2, prefill_tokens=30)
    assert found[1][0].startswith(NOT_FINITE) and found[2] == expected


def test_only_who_moves_unread_is_cleared():
    requests = [request(i, [1] * n) for i, n in enumerate((4, 100))]
    scheduler = Scheduler(requests, max_running=2, prefill_tokens=50)
    scheduler.next_batch()
    assert [c.clear for c in scheduler.release([requests[0]])] == [True]


@pytest.mark.parametrize("speculate", [0, 4])
def test_what_came_before_the_bad_token_is_counted_and_none_of_it_is_text(speculate):
    ids = random_ids([12], seed=5)[0].tolist()
    free = outputs(
        NativeRunner(native(tiny_model("llama")), num_slots=1, capacity=128),
        [request(0, ids, new=20)],
    )[0][1]
    at = next(i for i, token in enumerate(free) if i > 3 and token not in ids + free[:i])
    row = request(0, ids, new=20)
    error, output = outputs(
        NativeRunner(broken(free[at]), num_slots=1, capacity=128), [row], speculate=speculate
    )[0]
    assert (
        error.startswith(f"{NOT_FINITE} after {at + 1} tokens")
        and output == free[: at + 1]
        and row.text == ""
    )


@pytest.fixture(scope="module")
def half_broken_dir(tmp_path_factory):
    """A GPT-2 with finite weights that overflow at position 12: its numbers are good until
    there."""
    model = tiny_model("gpt2-untied")
    model.get_parameter("transformer.wpe.weight").data[12] = torch.finfo(torch.float32).max
    return save_model(model, tmp_path_factory.mktemp("half-broken"))


@pytest.mark.parametrize("backend", ["native", "hf"])
def test_the_run_says_what_was_not_finite(backend, half_broken_dir, tmp_path, capsys):
    rows = [{"prompt": "fever", "max_new_tokens": 3, **p} for p in (*SETTINGS, *EXTREMES)]
    alone, mixed = tmp_path / "alone.jsonl", tmp_path / "mixed.jsonl"
    alone.write_text("".join(json.dumps({"id": i, **row}) + "\n" for i, row in enumerate(rows)))
    bad = [
        {"id": f"bad {i}", "prompt": text, "max_new_tokens": 30, **p}
        for i, text in enumerate(("x", "chest pain " * 9))
        for p in SETTINGS[i : i + 1]
    ]
    mixed.write_text(alone.read_text() + "".join(json.dumps(row) + "\n" for row in bad))
    found = {}
    for path in (alone, mixed):
        out = tmp_path / path.stem
        fixed = ["--backend", backend, "--ignore_eos", "--output_format", "openai"]
        assert main(infer_flags(half_broken_dir, path, out, *fixed)) == 0
        found[path.stem] = {record["id"]: record for record in completions(out)}
    assert {i: r["text"] for i, r in found["mixed"].items() if not i.startswith("bad")} == {
        i: r["text"] for i, r in found["alone"].items()
    }
    assert [found["mixed"][row["id"]]["error"].split(" after")[0] for row in bad] == [
        NOT_FINITE
    ] * 2
    assert found["mixed"]["bad 0"]["output_tokens"] > 0 and found["mixed"]["bad 0"]["text"] == ""
    error = capsys.readouterr().err
    assert (
        error.count("warning") == 1
        and f"2 of {len(rows) + 2} requests failed: {NOT_FINITE}" in error
    )
    for name in ("run.json", "metrics.json"):
        record = json.loads((tmp_path / "mixed" / name).read_text())
        assert (record["failed"], record["not_finite"], record["empty"]) == (2, 2, 0)
    assert (tmp_path / "mixed" / "batch_output.jsonl").read_text().count(NOT_FINITE) == 2


def test_a_model_that_says_nothing_is_not_passed_over(tiny_llama_dir, tmp_path, capsys):
    ids = ["--max_new_tokens", 1, "--stop_token_ids", *range(300)]
    flags = infer_flags(tiny_llama_dir, tmp_path / "p.jsonl", tmp_path / "out", *ids)
    rows = [{"prompt": "fever"}, {"prompt": "cough", "stop_token_ids": []}]
    write_rows(tmp_path / "p.jsonl", rows)
    assert main(flags) == 0
    assert "warning" not in capsys.readouterr().err, "one of two has a text"
    write_rows(tmp_path / "p.jsonl", [{"prompt": "fever"}, {"prompt": "cough"}])
    assert main([*flags, "--overwrite"]) == 0
    assert "all 2 completions are empty texts" in capsys.readouterr().err
    assert json.loads((tmp_path / "out" / "run.json").read_text())["empty"] == 2
