"""``infer --prompt`` and ``chat``: the texts of a run over a file, on stdout, as they grow."""

import io
import os
import pty
import subprocess
import sys

import pytest
from support.commands import completions, infer_flags, write_rows
from support.models import EOS, native, random_adapter, tiny_model, tiny_tokenizer
from support.processes import ENVIRONMENT

from lorabatch.cli import main
from lorabatch.infer.requests import Request, SamplingParams
from lorabatch.infer.stream import Streams, grown_text
from lorabatch.model.lora import save_adapter

SAID = ["fever?", "and a cough?", "what else?"]
FIXED = ["--dtype", "fp32", "--threads", "1", "--no_cuda", "--max_new_tokens", "9"]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """An adapter folder for ``tiny_llama_dir``."""
    model, folder = native(tiny_model("llama")), tmp_path_factory.mktemp("adapter")
    save_adapter(
        folder,
        random_adapter(model, r=4, seed=3),
        base_name="tiny",
        base_fingerprint=model.base_fingerprint,
        fan_in_fan_out=False,
    )
    return folder


@pytest.fixture
def chat(tiny_llama_dir, monkeypatch, capsys):
    """chat(lines, flags) -> (exit code, lines of stdout, stderr)"""

    def run(lines, *flags, model=tiny_llama_dir):
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        code = main(["chat", "--base_model", str(model), *FIXED, *map(str, flags)])
        out, err = capsys.readouterr()
        return code, out, err

    return run


def expected(model, folder, said, *flags, system=None):
    """What ``infer`` answers to each line, each conversation given as a whole."""
    messages, answers = [{"role": "system", "content": system}] if system else [], []
    for i, text in enumerate(said):
        messages.append({"role": "user", "content": text})
        prompts = write_rows(folder / f"{i}.jsonl", [{"messages": messages}])
        more = [*FIXED, "--overwrite", *flags]
        assert main(infer_flags(model, prompts, folder / "out", *more)) == 0
        answers.append(completions(folder / "out")[0]["text"])
        messages.append({"role": "assistant", "content": answers[-1]})
    return answers


# One prompt


def test_one_prompt_prints_the_completion_and_nothing_else(
    tiny_llama_dir, adapter, tmp_path, capsys, monkeypatch
):
    prompts = write_rows(tmp_path / "p.jsonl", [{"prompt": "The patient"}])
    flags = [*FIXED, "--temperature", "0.7", "--adapter_dir", str(adapter), "--n", "2"]
    assert main(infer_flags(tiny_llama_dir, prompts, tmp_path / "out", *flags)) == 0
    capsys.readouterr()
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.chdir(empty)
    words = ["infer", "--base_model", str(tiny_llama_dir), "--prompt", "The patient", *flags]
    assert main(words) == 0
    out, err = capsys.readouterr()
    assert out == "".join(f"{record['text']}\n" for record in completions(tmp_path / "out"))
    assert err.startswith(f"base {tiny_llama_dir}") and list(empty.iterdir()) == []


REFUSED = [
    (["--prompt", "a", "--output_dir", "x"], 64, "--output_dir: not with --prompt"),
    (["--prompt", "a", "--prompts", "b.txt"], 64, "--prompts: not with --prompt"),
    (["--prompt", "a", "--shards", "2"], 64, "--shards: not with --prompt"),
    (["--prompt", " "], 65, "--prompt: empty prompt"),
]


@pytest.mark.parametrize(("flags", "code", "text"), REFUSED)
def test_what_a_prompt_cannot_have_is_refused_at_once(flags, code, text, capsys):
    assert main(["infer", "--base_model", "/no/such/model", *flags]) == code
    assert text in capsys.readouterr().err


def test_a_prompt_that_does_not_fit_is_one_line(tiny_llama_dir, capsys):
    words = ["infer", "--base_model", str(tiny_llama_dir), "--prompt", "z" * 5000, *FIXED]
    assert main(words) == 65
    out, err = capsys.readouterr()
    assert out == "" and "at most" in err.splitlines()[-1]


# A conversation


def test_answers_are_those_of_a_run_over_the_conversation(chat, tiny_llama_dir, tmp_path):
    code, out, err = chat([SAID[0], "", SAID[1]], "--system", "Be brief.")
    assert "forgotten" not in err
    wanted = expected(tiny_llama_dir, tmp_path, SAID[:2], system="Be brief.")
    assert code == 0 and out == "".join(f"{text}\n" for text in wanted)
    assert "/quit" in err and "you>" not in out


def test_the_base_answers_beside_the_adapter(chat, tiny_llama_dir, adapter, tmp_path):
    """Each knows its own conversation only."""
    code, out, _ = chat(SAID, "--adapter_dir", adapter, "--beside_base")
    base = expected(tiny_llama_dir, tmp_path, SAID)
    ours = expected(tiny_llama_dir, tmp_path, SAID, "--adapters", f"a={adapter}")
    assert base == ours, "no row names the adapter"
    ours = expected(tiny_llama_dir, tmp_path, SAID, "--adapter_dir", str(adapter))
    assert base != ours
    pairs = zip(base, ours, strict=True)
    assert code == 0 and out == "".join(f"base: {b}\nadapter: {a}\n" for b, a in pairs)


def test_reset_begins_a_new_conversation_and_quit_ends_it(chat):
    once, twice = chat(SAID[:1])[1], chat([SAID[0], "/reset", SAID[0], "/quit", SAID[1]])[1]
    assert twice == once * 2
    assert chat([SAID[0], SAID[0]])[1] != once * 2, "the first question is part of the second"


def test_a_long_conversation_forgets_its_oldest_turns(chat):
    code, out, err = chat(SAID * 3, "--max_len", "60")
    assert code == 0 and "1 turns forgotten" in err
    assert out.count("\n") >= len(SAID) * 3


def test_a_text_that_is_too_long_leaves_the_conversation_as_it_was(chat):
    code, out, err = chat([SAID[0], "z" * 5000, SAID[1]])
    assert code == 0 and "at most" in err
    assert out == chat(SAID[:2])[1]


def test_what_cannot_be_asked_is_refused_before_the_model_loads(
    chat, tiny_gpt2_dir, tmp_path, monkeypatch
):
    def never(*args, **options):
        raise AssertionError("loaded")

    monkeypatch.setattr("lorabatch.infer.session.Session.__init__", never)
    code, _, err = chat(SAID, "--beside_base")
    assert code == 64 and "--beside_base: there is no adapter" in err
    code, _, err = chat(SAID, "--adapter_dir", tmp_path / "none")
    assert code == 65 and "no such folder" in err and err.count("\n") == 1
    code, _, err = chat(SAID, model=tiny_gpt2_dir)
    assert code == 65 and "no chat template" in err


@pytest.mark.slow
def test_on_a_terminal_it_asks_and_answers(tiny_llama_dir, tmp_path):
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "lorabatch", "chat", "--base_model", str(tiny_llama_dir)]
    with subprocess.Popen(
        [*command, *FIXED], env=ENVIRONMENT, stdin=theirs, stdout=theirs, stderr=subprocess.PIPE
    ) as process:
        os.close(theirs)
        seen = read_until(ours, "you> ")
        os.write(ours, f"{SAID[0]}\n".encode())
        seen += read_until(ours, "you> ")
        os.write(ours, b"\x04")  # Ctrl-D
        assert process.wait(timeout=60) == 0
    os.close(ours)
    (answer,) = expected(tiny_llama_dir, tmp_path, SAID[:1])
    shown = answer.encode("utf-8", "backslashreplace").decode().replace("\n", "\r\n")
    assert f"{shown}\r\nyou> " in seen


def read_until(terminal, text):
    seen = b""
    while text.encode() not in seen:
        seen += os.read(terminal, 4096)
    return seen.decode()


# Text that grows


def running(text, **params):
    request = Request("0", 0, "", SamplingParams(**params))
    request.output_ids = tiny_tokenizer()(text, add_special_tokens=False)["input_ids"]
    return request


def test_half_a_character_is_held_back():
    whole = running("aé")
    assert grown_text(whole, tiny_tokenizer()) == "aé"
    whole.output_ids.pop()
    assert grown_text(whole, tiny_tokenizer()) == "a"


@pytest.mark.parametrize(
    ("text", "shown"), [("a fev", "a fev"), ("a fever st", "a fever "), ("a fever s", "a fever ")]
)
def test_what_may_be_a_stop_string_is_held_back(text, shown):
    assert grown_text(running(text, stop=("stop", "sting")), tiny_tokenizer()) == shown


def test_the_second_text_waits_for_the_first(capsys):
    first, second = running("one"), running(f"two{EOS}")
    second.position = 1
    streams = Streams(tiny_tokenizer(), ["a: ", "b: "])
    second.text, second.finish_reason = "two", "stop"
    streams.grow(second)
    assert capsys.readouterr().out == "a: "
    streams.grow(first)
    assert capsys.readouterr().out == "one"
    first.text, first.finish_reason = "one more", "length"
    streams.grow(first)
    assert capsys.readouterr().out == " more\nb: two\n"
