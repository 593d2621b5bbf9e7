"""Whatever is in a prompt file, a training file or a flag: an exit code that is documented, one
line, and every good prompt answered once."""

import json
from dataclasses import dataclass

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.commands import completions, infer_flags, train_flags

from lorabatch.cli import main

CODES = {0, 64, 65, 69, 70}
LIMIT = 12  # positions: prompts are short, so that examples are quick
TINY, HUGE = 5e-324, 1.7976931348623157e308

texts = st.sampled_from(
    [
        "fever",
        "a",
        " ",
        "",
        "dor no peito",
        "x" * 50,
        "\u2028",
        "é",
        "<|endoftext|>",
        "{}",
        "\ud83d",
        "a\udc00",
        "\0",
        "\ufeff",
    ]
)
odd = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from(
        [
            0,
            -1,
            1,
            2**31,
            2**63,
            2**64,
            10**400,
            -(10**400),
            0.0,
            -0.0,
            0.5,
            TINY,
            HUGE,
            -HUGE,
            float("nan"),
            float("inf"),
        ]
    ),
    st.integers(),
    st.floats(),
    texts,
    st.lists(st.one_of(st.integers(), texts), max_size=3),
    st.dictionaries(texts, texts, max_size=2),
)
LEGAL = {
    "max_new_tokens": st.sampled_from([1, 2, 2.0, 2**62]),
    "temperature": st.sampled_from([0, 0.0, TINY, 1e-45, 1e-6, 1, 1.5, 1e30]),
    "top_k": st.sampled_from([0, 1, 64, 299, 2**40]),
    "top_p": st.sampled_from([TINY, 1e-46, 1e-7, 0.5, 1 - 2**-53, 1]),
    "min_p": st.sampled_from([0, TINY, 0.5, 1]),
    "repetition_penalty": st.sampled_from([TINY, 1e-300, 1e-40, 1, 2.5, 1e30]),
    "presence_penalty": st.sampled_from([-2, 0, 2]),
    "frequency_penalty": st.sampled_from([-2.0, TINY, 2]),
    "seed": st.sampled_from([0, 2**62, 2**63 - 1]),
    "stop": st.sampled_from(["e", ["a", "fever"], []]),
    "stop_token_ids": st.sampled_from([[], [0], [5, 2**62], 7]),
    "ignore_eos": st.booleans(),
    "logprobs": st.sampled_from([0, 1, 20]),
    "n": st.sampled_from([1, 2, 3]),
}
FLAGS = {name: values for name, values in LEGAL.items() if not name.startswith("stop")}


@dataclass(frozen=True)
class Line:
    """One line of the file; ``answers``: the completions that it owes if the file is good as a
    whole, None: unknown, some error records."""

    content: bytes
    answers: int | None = None


def encoded(row):
    return json.dumps(row).encode()


good_rows = st.fixed_dictionaries({"prompt": st.sampled_from(["fever", "a", "é"])}, optional=LEGAL)
odd_rows = st.dictionaries(
    st.sampled_from(
        [
            "prompt",
            "question",
            "messages",
            "id",
            "adapter",
            "error",
            "custom_id",
            "body",
            "url",
            *LEGAL,
        ]
    ),
    odd,
    max_size=5,
)
openai_rows = st.builds(
    lambda name, body: {"custom_id": name, "body": body},
    odd,
    st.one_of(
        odd,
        st.dictionaries(
            st.sampled_from(
                ["prompt", "messages", "max_tokens", "max_completion_tokens", "model", "id", *LEGAL]
            ),
            odd,
            max_size=4,
        ),
    ),
)
chats = st.fixed_dictionaries(
    {
        "messages": st.lists(
            st.one_of(
                odd, st.dictionaries(st.sampled_from(["role", "content", "x"]), odd, max_size=3)
            ),
            max_size=3,
        )
    }
)
raw = st.sampled_from(
    [
        b"",
        b" ",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b"\xef\xbb\xbf{}",
        b'{"prompt": "a", "prompt": "b"}',
        b"{" * 3000,
        b'{"prompt": "a"}\0',
        b"\r",
        b"1" * 5000,
    ]
)
lines = st.one_of(
    good_rows.map(lambda row: Line(encoded(row), row.get("n", 1))),
    good_rows.map(lambda row: Line(encoded(row), row.get("n", 1))),
    st.one_of(odd_rows, openai_rows, chats).map(lambda row: Line(encoded(row))),
    raw.map(Line),
)


@st.composite
def flags(draw):
    """Some flags with a legal value, one perhaps with any value."""
    chosen = draw(st.dictionaries(st.sampled_from(sorted(FLAGS)), st.none(), max_size=2))
    words = [
        f"--{name}={draw(FLAGS[name])}"
        for name in chosen
        if name not in ("ignore_eos", "n", "max_new_tokens")
    ]
    more = draw(
        st.sampled_from(
            [
                *sorted(FLAGS),
                "batch_size",
                "rows",
                "max_len",
                "prefill_tokens",
                "order",
                "adapters",
                *[None] * 60,
            ]
        )
    )
    if more:
        words.append(
            f"--{more}={draw(st.one_of(st.sampled_from(['', 'x', 'nan', '-1', '1e999', '0:1', '1:2', '9:99', 'a=b', '3']), odd.map(str)))}"
        )
    return [w.encode(errors="replace").decode().replace("\0", "?") for w in words]


def one_line(code, said):
    assert code in CODES, (code, said.err)
    assert "Traceback" not in said.err
    if code:
        assert said.err.splitlines()[-1].startswith("lorabatch ") and "--debug" not in said.err, (
            said.err
        )


def check_prompts(model, folder, capsys, content, words, name):
    folder.mkdir(exist_ok=True)
    path, out = folder / f"p.{name}", folder / "out"
    path.write_bytes(b"\n".join(line.content for line in content))
    limit = [] if any(w.startswith("--max_len") for w in words) else ["--max_len", str(LIMIT)]
    fixed = ["--overwrite", "--max_new_tokens", 2]
    code = main(infer_flags(model, path, out, *fixed, *limit, *words))
    one_line(code, capsys.readouterr())
    if code:
        return
    found = completions(out)
    places = [(r["index"], r["sample"]) for r in found]
    assert len(set(places)) == len(places)
    if name == "jsonl" and not any(w.startswith(("--rows", "--n")) for w in words):
        rows = [line for line in content if line.content.strip() and not line.content.isspace()]
        assert {r["index"] for r in found} == set(range(len(rows)))
        for index, line in enumerate(rows):
            if line.answers is not None:
                mine = [r for r in found if r["index"] == index]
                assert [r["sample"] for r in sorted(mine, key=lambda r: r["sample"])] == list(
                    range(line.answers)
                )
                assert all(r["error"] is None for r in mine), mine


def check_documents(model, folder, capsys, content, name):
    folder.mkdir(exist_ok=True)
    path = folder / f"d.{name}"
    path.write_bytes(content)
    fixed = "--val_path none --overwrite --max_steps 1 --max_len 16 --lora_r 2"
    flags = train_flags(model, path, folder / "run", *fixed.split(), "--max_train_documents", 2)
    one_line(main(flags), capsys.readouterr())


data_rows = st.dictionaries(
    st.sampled_from(["text", "prompt", "completion", "question", "answer", "messages"]),
    odd,
    max_size=4,
)
good_text = st.just({"text": "The patient has a fever."})
csv_cells = st.sampled_from(
    ["a", "", '"', '"a, b"', "fever", "text", "prompt", "completion", "é", "\0", "\r", "x\ny"]
)
documents = st.one_of(
    st.lists(st.one_of(good_text, good_text, data_rows, chats).map(encoded) | raw, max_size=3).map(
        lambda rows: ("jsonl", b"\n".join(rows))
    ),
    st.lists(st.lists(csv_cells, max_size=3).map(",".join), max_size=3).map(
        lambda rows: ("csv", "\n".join(["text,id", *rows][:4]).encode())
    ),
    st.tuples(st.sampled_from(["txt", "csv", "jsonl", "parquet", "json"]), st.binary(max_size=40)),
    st.lists(texts, max_size=3).map(lambda t: ("txt", "\n".join(t).encode(errors="surrogatepass"))),
)
prompt_files = st.one_of(
    st.tuples(st.just("jsonl"), st.lists(lines, max_size=4)),
    st.tuples(
        st.just("jsonl"),
        st.lists(
            good_rows.map(lambda row: Line(encoded(row), row.get("n", 1))), min_size=1, max_size=4
        ),
    ),
    st.tuples(st.just("txt"), st.lists(st.binary(max_size=12).map(Line), max_size=3)),
)
QUICK = {
    "derandomize": True,
    "deadline": None,
    "suppress_health_check": list(HealthCheck),
    "database": None,
}


def fuzz_prompts(examples, model, tmp_path, capsys):
    @settings(max_examples=examples, **QUICK)
    @given(prompt_files, flags())
    def check(file, words):
        check_prompts(model, tmp_path / "infer", capsys, file[1], words, file[0])

    check()


def fuzz_documents(examples, model, tmp_path, capsys):
    @settings(max_examples=examples, **QUICK)
    @given(documents)
    def check(document):
        check_documents(model, tmp_path / "train", capsys, document[1], document[0])

    check()


def test_some_prompts(tiny_llama_dir, tmp_path, capsys):
    fuzz_prompts(25, tiny_llama_dir, tmp_path, capsys)


def test_some_documents(tiny_llama_dir, tmp_path, capsys):
    fuzz_documents(15, tiny_llama_dir, tmp_path, capsys)


@pytest.mark.slow
@pytest.mark.parametrize(("model", "examples"), [("tiny_llama_dir", 150), ("tiny_neox_dir", 60)])
def test_many_prompts(model, examples, request, tmp_path, capsys):
    fuzz_prompts(examples, request.getfixturevalue(model), tmp_path, capsys)


@pytest.mark.slow
def test_many_documents(tiny_llama_dir, tmp_path, capsys):
    fuzz_documents(80, tiny_llama_dir, tmp_path, capsys)
