"""The report's section on evaluations, from records that were made by hand."""

import json
import math

import numpy as np
import pytest
from support.run_folders import ENVIRONMENT

from lorabatch.cli import main
from lorabatch.evaluate import cautions
from lorabatch.evaluate.figures import evaluation
from lorabatch.records import JsonlWriter, write_json
from lorabatch.report.words import read_words


def document(task, model, i, bits):
    return {"nll": bits * 100 * math.log(2), "bytes": 100, "tokens": 25} | common(task, model, i)


def question(task, model, i, right):
    nll = [1.0, 2.0] if right else [2.0, 1.0]
    return {"tokens": 4, "option_nll": nll, "option_sizes": [1, 1], "answer": 0} | common(
        task, model, i
    )


def common(task, model, i):
    key = f"{abs(hash((task, model, i))) % 16**16:016x}"
    name = f"{task}:{i}"
    return {"task": task, "id": name, "group": name, "model": model, "content": key, "key": key}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The adapter is better on documents but for two of them, and no better on questions."""
    path, change = (
        tmp_path_factory.mktemp("evaluated"),
        np.random.default_rng(0).normal(-0.05, 0.01, 40),
    )
    change[[3, 30]] = 0.2, 0.1
    lines = [document("notes", "base", i, 1.0 + i / 100) for i in range(40)]
    lines += [
        document("notes", "tuned", i, 1.0 + i / 100 + d) for i, d in enumerate(change.tolist())
    ]
    for model, right in (("base", range(25)), ("tuned", range(2, 28))):
        lines += [question("exam", model, i, i in right) for i in range(50)]
    tasks: dict = {}
    with JsonlWriter(path / "items.jsonl") as writer:
        for line in lines:
            tasks.setdefault(line["task"], {}).setdefault(line["model"], {})[line["id"]] = line
            writer.write(line)
    figures = evaluation(tasks, seed=0)
    chose = cautions.caution("chose", task="notes", model="tuned")
    notes = [*cautions.of_figures(figures), chose]
    write_json(
        path / "eval.json", {"schema_version": 1, "kind": "eval", **figures, "warnings": notes}
    )
    run = {"kind": "eval", "status": "completed", "command": ["lorabatch", "eval", "a b.jsonl"]}
    write_json(
        path / "run.json", {"schema_version": 1, **run, "config": {}, "environment": ENVIRONMENT}
    )
    return path


def test_both_languages_say_what_is_better_and_what_is_not_shown(folder, tmp_path):
    assert main(["report", str(folder), "--output_dir", str(tmp_path)]) == 0
    page, relatorio = (tmp_path / n for n in ("report.html", "RELATORIO.md"))
    english, portuguese = page.read_text(), relatorio.read_text()
    found = {c["task"]: c for c in json.loads((folder / "eval.json").read_text())["comparisons"]}
    notes, exam = found["notes"], found["exam"]
    assert notes["verdict"] == "better" and exam["verdict"] == "no difference shown"
    shown = f"{notes['difference']:.4f}".replace("-", "−")
    for text in (shown, "40 items in 40 independent groups", "no difference shown", "2.0%"):
        assert text in english, text
    assert "notes chose the best checkpoint of tuned" in english
    assert "notes:3, notes:30" in english and "lorabatch eval &#39;a b.jsonl&#39;" in english
    assert shown.replace(".", ",") in portuguese and "nenhuma diferença demonstrada" in portuguese
    assert "notes escolheu o melhor checkpoint" in portuguese
    assert (tmp_path / "fig" / "change1.svg").exists() and english.count("<svg") >= 1


def test_every_caution_has_its_words_in_both_languages():
    for language in ("en", "pt"):
        assert {f"caution_{kind}" for kind in cautions.TEXTS} <= read_words(language)["text"].keys()


def test_an_evaluation_that_has_not_ended_is_one_line(folder, tmp_path, capsys):
    (tmp_path / "run.json").write_bytes((folder / "run.json").read_bytes())
    assert main(["report", str(tmp_path), "--output_dir", str(tmp_path / "r")]) == 65
    assert "this evaluation has not ended" in capsys.readouterr().err
