"""Rows of prompt and target: completions by the engine of ``infer``, compared by chrF."""

import json
import sys

import pytest
from support.commands import FIXED, completions, infer_flags, write_rows
from support.models import native, random_adapter, tiny_model

from lorabatch.cli import main
from lorabatch.evaluate import cautions
from lorabatch.evaluate.figures import evaluation
from lorabatch.evaluate.results import read_items
from lorabatch.model.lora import save_adapter

ROWS = [
    {"prompt": f"The patient in bed {i}", "target": [f" slept {i} hours.", " woke up."]}
    for i in range(20)
]


def eval_flags(model, file, output_dir, *more):
    words = ["eval", file, "--base_model", model, "--output_dir", output_dir, *FIXED]
    return [str(w) for w in (*words, "--max_new_tokens", 6, *more)]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    folder, model = tmp_path_factory.mktemp("adapter"), native(tiny_model("llama"))
    save_adapter(
        folder,
        random_adapter(model, r=4, seed=1),
        base_name="tiny",
        base_fingerprint=model.base_fingerprint,
        fan_in_fan_out=False,
    )
    return folder


def test_texts_are_those_of_infer_and_chrf_is_sacrebleus(tiny_llama_dir, adapter, tmp_path, capsys):
    metric = pytest.importorskip("sacrebleu.metrics").CHRF()
    file = write_rows(tmp_path / "wanted.jsonl", ROWS)
    out = tmp_path / "out"
    assert main(eval_flags(tiny_llama_dir, file, out, "--adapters", f"x={adapter}")) == 0
    prompts = write_rows(
        tmp_path / "p.jsonl",
        [{"prompt": r["prompt"]} | ({"adapter": "x"} if a else {}) for a in (0, 1) for r in ROWS],
    )
    flags = ["--max_new_tokens", 6, "--adapters", f"x={adapter}", "--output_order", "input"]
    assert main(infer_flags(tiny_llama_dir, prompts, tmp_path / "infer", *flags)) == 0
    texts = [c["text"].strip() for c in completions(tmp_path / "infer")]
    found = read_items(out)["wanted"]
    for lines, of_model in ((found["base"], texts[:20]), (found["x"], texts[20:])):
        for line, text, row in zip(lines.values(), of_model, ROWS, strict=True):
            scores = [metric.sentence_score(text, [t.strip()]).score for t in row["target"]]
            assert line["chrf"] == pytest.approx(max(scores)) and not line["exact"]
    (task,) = json.loads((out / "eval.json").read_text())["tasks"]
    assert (task["kind"], task["measure"], task["items"]) == ("generation", "chrF", 20)
    assert "wanted: 20 prompts" in capsys.readouterr().out
    assert main(["report", str(out), "--output_dir", str(tmp_path / "report")]) == 0
    before = (out / "items.jsonl").read_bytes()
    lines = before.splitlines(keepends=True)
    (out / "items.jsonl").write_bytes(b"".join(lines[:5]))  # as if killed then
    again = eval_flags(tiny_llama_dir, file, out, "--adapters", f"x={adapter}", "--resume")
    assert main(again) == 0
    assert (out / "items.jsonl").read_bytes() == before


def test_more_chrf_is_better():
    def lines(values):
        return {
            str(i): {
                "group": str(i),
                "chrf": v,
                "exact": False,
                "empty": not v,
                "finish_reason": "stop",
            }
            for i, v in enumerate(values)
        }

    models = {
        "base": lines([0.0, *(20.0 + i for i in range(1, 40))]),
        "x": lines([25.0 + i * 1.1 for i in range(40)]),
    }
    record = evaluation({"t": models}, seed=0)
    (found,) = record["comparisons"]
    assert (found["verdict"], found["improved"], found["worsened"]) == ("better", 40, 0)
    assert found["difference"] == pytest.approx(5 + 0.1 * 19.5 + 20 / 40)
    assert record["tasks"][0]["models"]["x"]["stopped"] == 40
    (empty,) = [note for note in cautions.of_figures(record) if note["kind"] == "empty"]
    assert "1 of 40 completions of 'base' are empty" in empty["text"]


def test_without_sacrebleu_it_says_what_to_install(tiny_llama_dir, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics", None)
    file = write_rows(tmp_path / "t.jsonl", ROWS[:2])
    assert main(eval_flags(tiny_llama_dir, file, tmp_path / "out")) == 69
    assert "pip install 'sacrebleu>=2.6'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"target": "x"}, "t.jsonl:2: no 'prompt'"),
        ({"prompt": "x", "target": 3}, "'target' is not a text or a list of texts"),
        ({"prompt": "x", "target": []}, "no 'target'"),
        ({"prompt": "x"}, "'target' is not a text"),
    ],
)
def test_bad_rows_are_one_line(row, words, tiny_llama_dir, tmp_path, capsys):
    file = write_rows(tmp_path / "t.jsonl", [ROWS[0], row])
    assert main(eval_flags(tiny_llama_dir, file, tmp_path / "out")) == 65
    assert words in capsys.readouterr().err
