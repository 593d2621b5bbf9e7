"""Completions that must follow a schema, an expression or choices: a model that knows nothing says
only what is allowed."""

import json
import re
import sys
from importlib.util import find_spec

import pytest
from support.commands import completions, infer_flags, write_lines, write_rows

from lorabatch.cli import main

needs_llguidance = pytest.mark.skipif(find_spec("llguidance") is None, reason="no llguidance here")
SCHEMA = {
    "type": "object",
    "properties": {
        "fever": {"type": "boolean"},
        "ward": {"enum": ["north", "sóuth"]},
        "beds": {"type": "array", "items": {"enum": [1, 22]}, "minItems": 1, "maxItems": 2},
    },
    "required": ["fever", "ward", "beds"],
    "additionalProperties": False,
}
SAMPLED = ["--temperature", "1.5", "--max_new_tokens", "60", "--no_cuda"]


def follows(text):
    found = json.loads(text)
    return (
        list(found) == ["fever", "ward", "beds"]
        and found["fever"] in (True, False)
        and found["ward"] in ("north", "sóuth")
        and 1 <= len(found["beds"]) <= 2
        and set(found["beds"]) <= {1, 22}
    )


@pytest.fixture
def prompts(tmp_path):
    return write_lines(tmp_path / "p.txt", [f"The patient in bed {i}" for i in range(24)])


@pytest.fixture
def schema(tmp_path):
    path = tmp_path / "schema.json"
    path.write_text(json.dumps(SCHEMA), encoding="utf-8")
    return path


def texts(folder):
    return {r["id"]: (r["text"], r["finish_reason"], r["error"]) for r in completions(folder)}


@needs_llguidance
def test_every_finished_completion_follows_the_schema(
    tiny_llama_dir, tiny_neox_dir, prompts, schema, tmp_path
):
    flags = [*SAMPLED, "--schema", schema]
    for name, model in (("native", tiny_llama_dir), ("hf", tiny_neox_dir)):
        assert main(infer_flags(model, prompts, tmp_path / name, *flags)) == 0
        found = texts(tmp_path / name).values()
        assert {reason for _, reason, _ in found} == {"stop"} and len(found) == 24
        assert all(follows(text) for text, _, _ in found)
        assert len(set(found)) > 3, "the model chooses where it may"


@needs_llguidance
@pytest.mark.parametrize(
    ("flags", "pattern"),
    [
        (["--regex", "[0-9]{2}-[a-c]+"], r"\d\d-[a-c]+"),
        (["--choices", "yes", "no", 'may"be'], 'yes|no|may"be'),
    ],
)
def test_expressions_and_choices(tiny_llama_dir, prompts, tmp_path, flags, pattern):
    assert main(infer_flags(tiny_llama_dir, prompts, tmp_path / "out", *SAMPLED, *flags)) == 0
    found = [text for text, reason, _ in texts(tmp_path / "out").values() if reason == "stop"]
    assert len(found) > 6 and all(re.fullmatch(pattern, text) for text in found)


@needs_llguidance
def test_the_same_texts_in_any_batch_and_after_a_kill(tiny_llama_dir, prompts, schema, tmp_path):
    flags = [*SAMPLED, "--schema", schema]
    for size in (1, 16):
        more = [*flags, "--batch_size", size]
        assert main(infer_flags(tiny_llama_dir, prompts, tmp_path / str(size), *more)) == 0
    whole = texts(tmp_path / "1")
    assert texts(tmp_path / "16") == whole
    path = tmp_path / "16" / "completions.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:7]) + lines[7][:20])
    again = infer_flags(tiny_llama_dir, prompts, tmp_path / "16", *flags, "--resume")
    assert main(again) == 0
    assert texts(tmp_path / "16") == whole and len(path.read_bytes().splitlines()) == 24
    unconstrained = infer_flags(tiny_llama_dir, prompts, tmp_path / "16", *SAMPLED, "--resume")
    assert main(unconstrained) != 0, "other work"


@needs_llguidance
def test_openais_response_format_holds_for_its_request(tiny_llama_dir, tmp_path):
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
    body = {"messages": [{"role": "user", "content": "a"}], "response_format": wanted}
    rows = [
        {"id": "ours", "prompt": "a b", "response_format": wanted},
        {"custom_id": "openai", "url": "/v1/chat/completions", "body": body},
        {"id": "text", "prompt": "a b", "response_format": {"type": "text"}},
        {"id": "kind", "prompt": "a b", "response_format": {"type": "yaml"}},
        {"id": "none", "prompt": "a b", "response_format": {"type": "json_schema"}},
        {"id": "bad", "prompt": "a b", "response_format": {
            "type": "json_schema", "json_schema": {"schema": {"type": "strin"}}}},
        {"id": "long", "prompt": "a b", "response_format": wanted, "min_new_tokens": 9},
    ]  # fmt: skip
    prompts = write_rows(tmp_path / "p.jsonl", rows)
    flags = [*SAMPLED, "--choices", "yes", "no"]
    assert main(infer_flags(tiny_llama_dir, prompts, tmp_path / "out", *flags)) == 0
    found = texts(tmp_path / "out")
    assert follows(found["ours"][0]) and follows(found["openai"][0])
    assert found["text"][2] is None and found["text"][0] not in ("yes", "no")
    assert "not of type text, json_object or json_schema" in found["kind"][2]
    assert "no json_schema.schema" in found["none"][2]
    assert "cannot be followed (Invalid type: strin)" in found["bad"][2]
    assert "ends when it is complete" in found["long"][2]


@needs_llguidance
def test_one_prompt_may_be_constrained_too(tiny_llama_dir, capsys):
    words = ["--prompt", "The patient", "--choices", "yes", "no", "--no_cuda", "--threads", "1"]
    assert main(["infer", "--base_model", str(tiny_llama_dir), *words]) == 0
    assert capsys.readouterr().out in ("yes\n", "no\n")


MISTAKES = [
    (["--schema", "nowhere.json"], 65, "nowhere.json: no such file"),
    (["--schema", "p.txt"], 65, "p.txt: not a JSON schema"),
    (["--schema", "bad.json"], 65, "bad.json: cannot be followed (Invalid type: strin)"),
    (["--regex", "a(b"], 65, "--regex: cannot be followed"),
    (["--choices", "yes", ""], 64, "--choices: an empty choice"),
    (["--regex", "a", "--choices", "b"], 64, "--regex --choices: only one of these"),
    (["--regex", "a", "--ignore_eos"], 64, "leave out --ignore_eos"),
]


@needs_llguidance
@pytest.mark.parametrize(("flags", "code", "text"), MISTAKES)
def test_mistakes_are_found_before_the_model_loads(
    prompts, tmp_path, monkeypatch, capsys, flags, code, text
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.json").write_text('{"type": "strin"}')
    assert main(infer_flags("/no/such/model", prompts, tmp_path / "out", *flags)) == code
    err = capsys.readouterr().err
    assert text in err and err.count("\n") == 1 and not (tmp_path / "out").exists()


def test_without_llguidance_one_line_says_what_to_install(prompts, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    assert main(infer_flags("/no/such/model", prompts, tmp_path / "out", "--regex", "a")) == 69
    err = capsys.readouterr().err
    assert "pip install 'lorabatch[schema]'" in err and err.count("\n") == 1
