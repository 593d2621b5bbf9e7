"""``lorabatch.load``: the same texts as the command line, likelihoods as transformers', and mistakes
by name."""

import pytest
import torch
from support.commands import completions, infer_flags, write_rows
from support.models import (
    native,
    random_adapter,
    reference_logits,
    tiny_model,
    tiny_tokenizer,
)
from support.processes import python

import lorabatch
from lorabatch.cli import main
from lorabatch.errors import DataError, UsageError
from lorabatch.model.lora import save_adapter

PROMPTS = ["The patient", "A fever and a cough.", "Question: what is asthma? Answer:"]
FIXED = {"dtype": "fp32", "threads": 1, "no_cuda": True}


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """Two adapter folders for ``tiny_llama_dir``."""
    folders, model = {}, native(tiny_model("llama"))
    for seed, name in enumerate(("cardio", "onco")):
        folders[name] = tmp_path_factory.mktemp(name)
        save_adapter(
            folders[name],
            random_adapter(model, r=4, seed=seed),
            base_name="tiny",
            base_fingerprint=model.base_fingerprint,
            fan_in_fan_out=False,
        )
    return folders


@pytest.fixture(scope="module")
def model(tiny_llama_dir, adapters):
    return lorabatch.load(tiny_llama_dir, adapters=adapters, **FIXED)


def test_importing_it_loads_no_torch():
    code = "import sys, lorabatch; print('torch' in sys.modules, lorabatch.__version__ > '')"
    assert python(code).stdout == "False True\n"


def test_it_generates_what_the_command_line_generates(model, tiny_llama_dir, adapters, tmp_path):
    """Sampled, with several completions of a prompt, messages and an adapter for each prompt."""
    messages = [{"role": "user", "content": "fever?"}]
    names = ["cardio", None, "onco", "cardio"]
    sampling = {"max_new_tokens": 9, "temperature": 0.8, "n": 2, "seed": 5, "ignore_eos": True}
    found = model.generate([*PROMPTS, messages], adapter=names, logprobs=0, **sampling)
    rows = [{"prompt": text} for text in PROMPTS] + [{"messages": messages}]
    rows = [row | {"adapter": name} for row, name in zip(rows, names, strict=True)]
    prompts = write_rows(tmp_path / "prompts.jsonl", rows)
    flags = [f"--{name}={value}" for name, value in sampling.items()]
    flags += ["--adapters", *(f"{name}={folder}" for name, folder in adapters.items())]
    flags += ["--logprobs", "0", "--output_order", "input", "--no_cuda"]
    assert main(infer_flags(tiny_llama_dir, prompts, tmp_path / "out", *flags)) == 0
    records = completions(tmp_path / "out")
    assert [c.text for c in found] == [r["text"] for r in records]
    assert [c.input_tokens for c in found] == [r["input_tokens"] for r in records]
    assert {c.finish_reason for c in found} == {"length"} and len(found) == 8
    for completion, record in zip(found, records, strict=True):
        assert [round(value, 6) for value in completion.logprobs] == [
            entry["logprob"] for entry in record["logprobs"]
        ]


def test_a_later_and_longer_batch_gives_the_same_texts(model):
    """The first call's slots are too short for the second's prompts."""
    first = model.generate(PROMPTS, max_new_tokens=6)
    assert model.generate(["The patient has a fever. " * 9], max_new_tokens=20)[0].error is None
    assert model.generate(PROMPTS, max_new_tokens=6) == first


def test_a_prompt_that_cannot_run_has_its_error(model):
    empty, good, long = model.generate([" ", PROMPTS[0], "z" * 5000], max_new_tokens=4)
    assert "empty prompt" in empty.error and "at most" in long.error
    assert (empty.text, long.token_ids) == ("", ()) and good.error is None
    assert good == model.generate([PROMPTS[0]], max_new_tokens=4)[0]


def expected_score(text, prompt=""):
    """(log-likelihood, tokens) by transformers."""
    encode = lambda text: tiny_tokenizer()(text)["input_ids"]  # noqa: E731
    given = encode(prompt)
    ids = given + encode(text)
    logits = reference_logits(tiny_model("llama"), torch.tensor(ids)).log_softmax(dim=-1)
    places = range(max(1, len(given)), len(ids))
    return sum(float(logits[i - 1, ids[i]]) for i in places), len(places)


@pytest.mark.parametrize("backend", ["native", "hf"])
def test_scores_are_the_likelihoods_of_transformers(tiny_llama_dir, backend):
    model = lorabatch.load(tiny_llama_dir, backend=backend, prefill_tokens=8, **FIXED)
    texts = [*PROMPTS, ("The patient", " has a fever"), "à"]
    for text, score in zip(texts, model.score(texts), strict=True):
        prompt, rest = ("", text) if isinstance(text, str) else text
        value, count = expected_score(rest, prompt)
        assert score.log_likelihood == pytest.approx(value, rel=1e-4)
        assert score.num_tokens == count
    pair = model.score([("The patient", " has a fever")])[0]
    assert pair.num_bytes == len(" has a fever")
    assert pair.bits_per_byte == pytest.approx(-pair.log_likelihood / 12 / 0.6931472, rel=1e-6)


def test_scores_see_the_adapter(model, tiny_llama_dir, adapters):
    merged = lorabatch.load(tiny_llama_dir, adapter=adapters["onco"], **FIXED)
    base, cardio, onco = model.score([PROMPTS[1]] * 3, adapter=[None, "cardio", "onco"])
    assert onco.log_likelihood == pytest.approx(
        merged.score([PROMPTS[1]])[0].log_likelihood, rel=1e-4
    )
    assert len({round(s.log_likelihood, 2) for s in (base, cardio, onco)}) == 3
    assert model.score([PROMPTS[1]], adapter="onco")[0] == onco


MISTAKES = [
    (UsageError, "did you mean 'temperature'", lambda m: m.generate(["a"], temprature=1)),
    (UsageError, "at least 0", lambda m: m.generate(["a"], temperature=-1.0)),
    (UsageError, "not of type int", lambda m: m.generate(["a"], n="two")),
    (UsageError, "not a list of texts", lambda m: m.generate("a fever")),
    (UsageError, "2 adapters for 1", lambda m: m.generate(["a"], adapter=["cardio", None])),
    (DataError, "did you mean 'cardio'", lambda m: m.generate(["a"], adapter="cardoi")),
    (DataError, r"texts\[1\]: is empty", lambda m: m.score(["a b", ""])),
    (DataError, r"texts\[0\]: has \d+ tokens, and at most", lambda m: m.score(["z" * 5000])),
    (UsageError, "did you mean 'adapters'", lambda m: lorabatch.load("x", adaptors=1)),
    (UsageError, "unknown setting 'output_dir'", lambda m: lorabatch.load("x", output_dir="y")),
    (DataError, "no such folder", lambda m: lorabatch.load("x", adapter="/no/such")),
]


@pytest.mark.parametrize(("kind", "text", "call"), MISTAKES)
def test_mistakes_are_named(model, kind, text, call):
    with pytest.raises(kind, match=text) as refused:
        call(model)
    assert "\n" not in str(refused.value)
