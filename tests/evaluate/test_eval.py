"""``lorabatch eval`` as a user meets it: known differences, hand-computed figures, kills, and every
kind of bad input."""

import json
import math
import signal
from pathlib import Path

import pytest
import torch
from support.commands import FIXED, train_flags, write_lines, write_rows
from support.models import native, random_adapter, tiny_model, tiny_tokenizer

from lorabatch.cli import main
from lorabatch.corpus.readers import read_documents
from lorabatch.corpus.tokens import tokenise
from lorabatch.evaluate.figures import evaluation
from lorabatch.evaluate.items import read_tasks
from lorabatch.evaluate.results import read_items
from lorabatch.model.lora import LoraWeights, save_adapter
from lorabatch.train.validation import evaluate

QUESTIONS = [
    {
        "question": f"Which bed is bed {i}?",
        "options": [f"bed {i}", "no bed", "the door"],
        "answer": i % 3,
    }
    for i in range(12)
]


def eval_flags(model, files, output_dir, *more):
    words = ["eval", *files, "--base_model", model, "--output_dir", output_dir, *FIXED, *more]
    return [str(w) for w in words]


def documents(count, *, start=0):
    return [
        {
            "id": i,
            "text": f"The patient in bed {i} slept well. " * (1 + i % 3),
            "page": f"p{i // 2}",
        }
        for i in range(start, start + count)
    ]


def result(folder):
    return json.loads((folder / "eval.json").read_text())


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """Folders of a random adapter and of one that changes nothing."""
    folder, model = tmp_path_factory.mktemp("adapters"), native(tiny_model("llama"))
    weights = random_adapter(model, r=4, seed=1)
    nothing = LoraWeights(
        weights.settings, {p: (a, torch.zeros_like(b)) for p, (a, b) in weights.pairs.items()}
    )
    for name, values in (("random", weights), ("nothing", nothing)):
        save_adapter(
            folder / name,
            values,
            base_name="tiny",
            base_fingerprint=model.base_fingerprint,
            fan_in_fan_out=False,
        )
    return folder


@pytest.fixture
def trained(tiny_llama_dir, corpus, tmp_path):
    """An adapter that learned its texts, and so is better on texts like them."""
    steps = ["--max_steps", 30, "--batch_size", 4, "--lr", 0.02]
    assert main(train_flags(tiny_llama_dir, corpus, tmp_path / "lora", *steps)) == 0
    return tmp_path / "lora"


# Documents


def test_an_adapter_that_learned_is_better_in_words_and_figures(
    tiny_llama_dir, trained, tmp_path, capsys
):
    file = write_rows(tmp_path / "texts.jsonl", documents(40, start=50))
    out = tmp_path / "out"
    assert main(eval_flags(tiny_llama_dir, [file], out, "--adapter_dir", trained)) == 0
    record = result(out)
    (task,), (found,) = record["tasks"], record["comparisons"]
    assert task["items"] == task["clusters"] == 40
    base, lora = (task["models"][name]["value"] for name in ("base", "lora"))
    assert found["difference"] == pytest.approx(lora - base) and found["difference"] < -0.5
    assert found["low"] < found["difference"] < found["high"] < 0
    assert (found["verdict"], found["improved"], found["worsened"]) == ("better", 40, 0)
    assert found["p"] == 1e-4 and 0 < found["can_show"] < -found["difference"]
    said = capsys.readouterr().out
    assert f"better by {-found['difference']:.4f} bits a byte (95 % interval" in said
    assert "40 of 40 documents improved" in said and "another --seed of training" in said
    assert json.loads((out / "run.json").read_text())["status"] == "completed"


def test_figures_are_those_of_trainings_evaluation(tiny_llama_dir, adapters, tmp_path):
    """And do not depend on the size of blocks; long documents are split, and count once."""
    texts = [f"Bed {i}: " + "the patient slept and the monitor was quiet. " * i for i in range(12)]
    file, values = write_lines(tmp_path / "t.txt", texts), []
    for block in (128, 4096):
        out = tmp_path / str(block)
        flags = ["--max_len", 64, "--block_tokens", block, "--adapters", f"x={adapters / 'random'}"]
        assert main(eval_flags(tiny_llama_dir, [file], out, *flags)) == 0
        values.append({m: f["value"] for m, f in result(out)["tasks"][0]["models"].items()})
        assert len(read_items(out)["t"]["base"]) == 12
    assert values[0] == pytest.approx(values[1], rel=1e-9)
    model = native(tiny_model("llama"))
    corpus = tokenise(read_documents(file), tiny_tokenizer(), max_len=64, count_bytes=True)
    assert corpus.num_split
    assert values[0]["base"] == pytest.approx(
        evaluate(model, corpus, block_tokens=512).bits_per_byte, rel=1e-6
    )


def test_an_adapter_that_changes_nothing_differs_by_exactly_nothing(
    tiny_llama_dir, adapters, tmp_path, capsys
):
    file = write_rows(tmp_path / "t.jsonl", documents(6))
    out, more = tmp_path / "out", ["--adapter_dir", adapters / "nothing"]
    assert main(eval_flags(tiny_llama_dir, [file], out, *more)) == 0
    (found,) = result(out)["comparisons"]
    assert (found["difference"], found["p"], found["improved"], found["worsened"]) == (0, 1, 0, 0)
    assert found["low"] is None and found["high"] is None and "alike" in found["reason"]
    assert found["verdict"] == "no difference shown"
    said = capsys.readouterr().out
    assert (
        "no difference shown (0.0000 bits a byte, no interval: all clusters changed alike" in said
    )
    assert "6 items are few" in said and "6 independent groups are few" in said


def test_documents_of_one_group_are_one_cluster(tiny_llama_dir, adapters, tmp_path, capsys):
    file = write_rows(tmp_path / "t.jsonl", documents(20))
    more = ["--adapter_dir", adapters / "random", "--group_field", "page"]
    assert main(eval_flags(tiny_llama_dir, [file], tmp_path / "out", *more)) == 0
    (found,) = result(tmp_path / "out")["comparisons"]
    assert (found["items"], found["clusters"]) == (20, 10)
    assert "t: 20 documents in 10 groups" in capsys.readouterr().out


def test_figures_are_also_listed_by_domain(tiny_llama_dir, adapters, tmp_path, capsys):
    rows = [row | {"ward": "ab"[i % 2]} for i, row in enumerate(documents(7))]
    file, out = write_rows(tmp_path / "t.jsonl", rows), tmp_path / "out"
    more = ["--adapter_dir", adapters / "random", "--domain_field", "ward"]
    assert main(eval_flags(tiny_llama_dir, [file], out, *more)) == 0
    (task,) = result(out)["tasks"]
    lines = list(read_items(out)["t"]["random"].values())
    assert [(d, found["items"]) for d, found in task["domains"].items()] == [("a", 4), ("b", 3)]
    for domain, some in (("a", lines[::2]), ("b", lines[1::2])):
        bits = sum(x["nll"] for x in some) / math.log(2) / sum(x["bytes"] for x in some)
        assert task["domains"][domain]["models"]["random"] == pytest.approx(bits)
    assert "    b (3): base " in capsys.readouterr().out
    assert main(["report", str(out), "--output_dir", str(tmp_path / "report")]) == 0
    assert "Domínio" in (tmp_path / "report" / "RELATORIO.md").read_text()


def test_forgetting_is_a_share_of_the_bases_bits(
    tiny_llama_dir, trained, adapters, tmp_path, capsys
):
    file = write_rows(tmp_path / "ward.jsonl", documents(10, start=50))
    letters = [f"Dear {n}, thank you for the {n} apples!" for n in "abcdefghijklmnopqrst"]
    other, out = write_lines(tmp_path / "letters.txt", letters), tmp_path / "out"
    more = ["--general", other, "--adapters", f"lora={trained}", f"same={adapters / 'nothing'}"]
    assert main(eval_flags(tiny_llama_dir, [file], out, *more)) == 0
    lora, same = result(out)["forgetting"]
    values = {m: f["value"] for m, f in result(out)["tasks"][1]["models"].items()}
    assert lora["relative"] == pytest.approx(values["lora"] / values["base"] - 1)
    assert lora["low"] < lora["relative"] < lora["high"] and lora["forgets"] == (lora["low"] > 0.01)
    assert (same["relative"], same["low"], same["forgets"]) == (0, None, False)
    said = capsys.readouterr().out
    assert "'same' does not show that it forgets: bits a byte of general text +0.0%" in said
    assert main(["report", str(out), "--output_dir", str(tmp_path / "report")]) == 0
    questions = write_rows(tmp_path / "q.jsonl", QUESTIONS)
    assert main(eval_flags(tiny_llama_dir, [file], tmp_path / "o2", "--general", questions)) == 64
    assert "holds no plain documents" in capsys.readouterr().err


def test_an_adapter_that_forgets_is_said_to():
    def lines(bits):
        return {str(i): document_line(i, b) for i, b in enumerate(bits)}

    def document_line(i, bits):
        return {"group": str(i), "nll": bits * math.log(2), "bytes": 10, "tokens": 3}

    base, noise = [10.0 + i % 7 for i in range(60)], [0.1 * (i % 3) for i in range(60)]
    worse = [b * 1.05 + n for b, n in zip(base, noise, strict=True)]
    models = {"base": lines(base), "worse": lines(worse)}
    record = evaluation({"general": models}, seed=0, general="general")
    (found,) = record["forgetting"]
    assert found["forgets"] and 0.05 < found["low"] < found["high"] < 0.07


def test_several_adapters_are_adjusted_for_being_several(tiny_llama_dir, adapters, tmp_path):
    file = write_rows(tmp_path / "t.jsonl", documents(10))
    more = ["--adapters", f"one={adapters / 'random'}", f"two={adapters / 'nothing'}"]
    assert main(eval_flags(tiny_llama_dir, [file], tmp_path / "out", *more)) == 0
    one, two = result(tmp_path / "out")["comparisons"]
    assert (one["model"], two["model"], one["against"]) == ("one", "two", "base")
    assert one["adjusted_p"] == pytest.approx(2 * one["p"]) and two["adjusted_p"] == 1


@pytest.mark.parametrize("backend", ["native", "hf"])
def test_both_backends_score_alike(backend, tiny_llama_dir, adapters, tmp_path):
    file = write_rows(tmp_path / "t.jsonl", documents(5))
    more = ["--adapter_dir", adapters / "random", "--backend", backend]
    assert main(eval_flags(tiny_llama_dir, [file], tmp_path / "out", *more)) == 0
    lines = read_items(tmp_path / "out")["t"]["random"].values()
    weights = random_adapter(native(tiny_model("llama")), r=4, seed=1)
    model = native(tiny_model("llama"), merge=weights.delta)
    for line, row in zip(lines, documents(5), strict=True):
        ids = torch.tensor([*tiny_tokenizer()(row["text"])["input_ids"], 0])
        assert line["nll"] == pytest.approx(float(model.loss_sum([ids], [1])), rel=1e-4)


# What makes it less credible


def test_it_says_where_the_file_chose_the_checkpoint_or_was_learned(
    tiny_llama_dir, trained, corpus, tmp_path, capsys
):
    more = ["--adapter_dir", trained / "best"]
    assert main(eval_flags(tiny_llama_dir, [corpus], tmp_path / "out", *more)) == 0
    said = capsys.readouterr().out
    assert "train chose the best checkpoint of 'best'" in said
    assert "12 of 12 items of train are also in what 'best' was trained on" in said
    fresh = write_rows(tmp_path / "fresh.jsonl", documents(4, start=90))
    assert main(eval_flags(tiny_llama_dir, [fresh], tmp_path / "out2", *more)) == 0
    kinds = {note["kind"] for note in result(tmp_path / "out2")["warnings"]}
    assert kinds == {"few_items", "few_clusters", "seed"}


# Multiple choice


def expected_choices(rows, *, normalised):
    """By transformers, one option at a time, of the text formats that lm-eval writes."""
    model, tokenizer, found = tiny_model("llama"), tiny_tokenizer(), []
    for row in rows:
        prompt = tokenizer(f"Question: {row['question']}\nAnswer:")["input_ids"]
        scores = []
        for option in row["options"]:
            target = tokenizer(f" {option}")["input_ids"]
            ids = torch.tensor([[*prompt, *target]])
            with torch.no_grad():
                logs = model(input_ids=ids).logits[0].log_softmax(-1)
            places = range(len(prompt) - 1, len(prompt) + len(target) - 1)
            total = sum(float(logs[p, t]) for p, t in zip(places, target, strict=True))
            scores.append(total / (len(option) if normalised else 1))
        found.append(max(range(len(scores)), key=scores.__getitem__))
    return found


def test_accuracy_is_what_transformers_finds_one_option_at_a_time(tiny_llama_dir, tmp_path, capsys):
    file = write_rows(tmp_path / "q.jsonl", QUESTIONS)
    assert main(eval_flags(tiny_llama_dir, [file], tmp_path / "out")) == 0
    (task,) = result(tmp_path / "out")["tasks"]
    figures = task["models"]["base"]
    for name, normalised in (("value", True), ("by_sum", False)):
        chosen = expected_choices(QUESTIONS, normalised=normalised)
        right = sum(c == row["answer"] for c, row in zip(chosen, QUESTIONS, strict=True))
        assert figures[name] == pytest.approx(right / 12), name
    assert (task["kind"], task["items"], task["chance"], task["majority"]) == (
        "choice",
        12,
        pytest.approx(1 / 3),
        pytest.approx(1 / 3),
    )
    assert "is not shown to be right more often than always" in capsys.readouterr().out


def test_answers_are_texts_letters_or_places_and_letters_can_be_scored(tiny_llama_dir, tmp_path):
    rows = [
        {"question": "a?", "options": {"A": "yes", "B": "no"}, "answer": "B"},
        {"question": "b?", "options": ["yes", "no"], "answer": "yes"},
        {"question": "c?", "options": ["yes", "no"], "answer": 1},
    ]
    file = write_rows(tmp_path / "q.jsonl", rows)
    for how, prompt in (
        ("option", "Question: a?\nAnswer:"),
        ("letter", "Question: a?\nA. yes\nB. no\nAnswer:"),
    ):
        (task,) = read_tasks(config([file], answer_with=how))
        assert [item.answer for item in task.items] == [1, 0, 1]
        assert task.items[0].documents[0].prompt == prompt
    assert [d.text for d in task.items[0].documents] == [" A", " B"]


def config(files, **values):
    from lorabatch.config_trust import EvalConfig

    return EvalConfig(files=tuple(map(str, files)), **values)


def line(i, nll, answer):
    return {
        "group": str(i),
        "tokens": 4,
        "option_nll": nll,
        "option_sizes": [1, 1],
        "answer": answer,
    }


def test_two_accuracies_are_compared_by_the_items_that_one_has_right():
    """10 that the base alone has right, 25 that the adapter alone has: p 0.016674."""
    right, wrong = [1.0, 2.0], [2.0, 1.0]
    base = {str(i): line(i, right if i < 30 else wrong, 0) for i in range(100)}
    lora = {str(i): line(i, right if 10 <= i < 55 else wrong, 0) for i in range(100)}
    record = evaluation({"q": {"base": base, "lora": lora}}, seed=0)
    (found,) = record["comparisons"]
    assert found["test"] == "McNemar, exact" and found["p"] == pytest.approx(0.016674, abs=1e-6)
    assert found["difference"] == pytest.approx(0.15) and found["verdict"] == "better"
    assert (found["improved"], found["worsened"]) == (25, 10)
    grouped = {
        m: {k: v | {"group": str(int(k) // 2)} for k, v in ls.items()}
        for m, ls in (("a", base), ("b", lora))
    }
    (found,) = evaluation({"q": grouped}, seed=0)["comparisons"]
    assert found["clusters"] == 50 and found["test"] == "random signs of clusters"


# Resuming


@pytest.mark.slow
@pytest.mark.parametrize("lines", [1, 7, 30])
def test_killed_and_resumed_ends_as_if_uninterrupted(
    lines, attempts, tiny_llama_dir, adapters, tmp_path
):
    file = write_rows(tmp_path / "t.jsonl", documents(40))
    more = ["--adapter_dir", adapters / "random", "--block_tokens", 64]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert main(eval_flags(tiny_llama_dir, [file], whole, *more)) == 0
    argv = eval_flags(tiny_llama_dir, [file], killed, *more)
    stop = [str(killed / "items.jsonl"), lines]
    assert attempts(argv, tmp_path / "log", kill_at_lines=stop) == -signal.SIGKILL
    assert not (killed / "eval.json").exists()
    assert attempts([*argv, "--resume"], tmp_path / "log") == 0, (tmp_path / "log").read_text()
    assert (killed / "items.jsonl").read_bytes() == (whole / "items.jsonl").read_bytes()
    assert (killed / "eval.json").read_bytes() == (whole / "eval.json").read_bytes()


def test_a_damaged_line_is_set_aside_and_scored_again(tiny_llama_dir, adapters, tmp_path, capsys):
    file = write_rows(tmp_path / "t.jsonl", documents(12))
    out, more = tmp_path / "out", ["--adapter_dir", adapters / "random"]
    assert main(eval_flags(tiny_llama_dir, [file], out, *more)) == 0
    lines, figures = (
        (out / "items.jsonl").read_bytes().splitlines(),
        (out / "eval.json").read_bytes(),
    )
    spoilt = [*lines[:4], lines[4].replace(b"nll", b"nlm"), *lines[5:]]
    (out / "items.jsonl").write_bytes(b"\n".join(spoilt) + b"\n")
    assert main(eval_flags(tiny_llama_dir, [file], out, *more, "--resume")) == 0
    assert "1 damaged lines moved to items.jsonl.damaged" in capsys.readouterr().err
    assert sorted((out / "items.jsonl").read_bytes().splitlines()) == sorted(lines)
    assert (out / "eval.json").read_bytes() == figures


def test_resuming_with_another_adapter_is_refused_and_changes_nothing(
    tiny_llama_dir, adapters, tmp_path, capsys
):
    file = write_rows(tmp_path / "t.jsonl", documents(3))
    out = tmp_path / "out"
    first = eval_flags(tiny_llama_dir, [file], out, "--adapters", f"x={adapters / 'random'}")
    assert main(first) == 0
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    same = ["--adapters", f"x={adapters / 'random'}", "--resume"]
    for other in (
        ["--adapters", f"x={adapters / 'nothing'}", "--resume"],
        [*same, "--group_field", "page"],
        [*same, "--max_len", 16],
    ):
        assert main(eval_flags(tiny_llama_dir, [file], out, *other)) == 64
        assert "holds scores of other items, adapters or settings" in capsys.readouterr().err
    assert main(first) == 64
    assert "contains an earlier run" in capsys.readouterr().err
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before


# Bad input


GOOD = {"question": "q?", "options": ["a", "b"], "answer": "a"}


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([GOOD, {"options": ["a", "b"], "answer": "a"}], "q.jsonl:2: no 'question'"),
        ([GOOD, {"question": "q?", "answer": "a"}], "q.jsonl:2: 'options' is neither"),
        ([GOOD, GOOD | {"answer": "c"}], "q.jsonl:2: the answer 'c' is none of the 2 options"),
        ([GOOD, GOOD | {"answer": 2}], "the answer 2 is none of the 2 options"),
        ([GOOD, GOOD | {"answer": True}], "the answer True is none"),
        ([GOOD, {"question": "q?", "options": ["a", "b"]}], "q.jsonl:2: no 'answer'"),
        ([GOOD, GOOD | {"options": ["a", "a"]}], "different texts"),
        ([GOOD, GOOD | {"options": ["a"]}], "2 to 26 different texts"),
        ([GOOD, GOOD], "the answer of all 2 questions is option A"),
        ([GOOD, GOOD | {"question": "long " * 200, "answer": "b"}], "raise --max_len"),
        ([{"text": "a b c"}, {"txt": "a"}], "q.jsonl:2: no 'text'"),
        ([{"text": "a"}], "q.jsonl: no item has anything to score"),
    ],
)
def test_bad_rows_are_one_line(rows, words, tiny_llama_dir, tmp_path, capsys):
    file = write_rows(tmp_path / "q.jsonl", rows)
    assert main(eval_flags(tiny_llama_dir, [file], tmp_path / "out")) == 65
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert words in error
    assert not (tmp_path / "out" / "eval.json").exists()


def test_bad_flags_and_adapters_are_one_line(
    tiny_llama_dir, tiny_gpt2_dir, adapters, tmp_path, capsys
):
    rows = write_rows(tmp_path / "t.jsonl", documents(3))
    text, twin = write_lines(tmp_path / "t.txt", ["a b c"]), tmp_path / "x" / "t.txt"
    twin.parent.mkdir()
    write_lines(twin, ["d e f"])
    random = adapters / "random"
    cases = [
        (64, [text, twin], [], "two files are called 't'"),
        (64, [text], ["--group_field", "page"], "t.txt has no fields"),
        (65, [rows], ["--group_field", "ward"], "t.jsonl:1: no text or number in the field 'ward'"),
        (64, [rows], ["--adapters", f"base={random}"], "none of them 'base'"),
        (
            64,
            [rows],
            ["--adapters", f"random={random}", "--adapter_dir", random],
            "different names",
        ),
        (64, [rows], ["--adapters", "random"], "is not NAME=DIR"),
        (65, [rows], ["--adapter_dir", tmp_path / "none"], "no such folder"),
        (65, [tmp_path / "gone.txt"], [], "no such file"),
        (
            65,
            [rows],
            ["--adapter_dir", random, "--base_model", tiny_gpt2_dir],
            "another base model",
        ),
    ]
    for code, files, more, words in cases:
        assert (
            main(eval_flags(tiny_llama_dir, files, tmp_path / "out", *more, "--overwrite")) == code
        )
        assert words in capsys.readouterr().err, words
    assert main(["eval", str(rows), "--resume"]) == 64


def test_a_model_without_finite_numbers_is_said(tiny_llama_dir, adapters, tmp_path, capsys):
    model = native(tiny_model("llama"))
    weights = random_adapter(model, r=4, seed=1)
    huge = {p: (1e30 * a, 1e8 * b) for p, (a, b) in weights.pairs.items()}
    save_adapter(
        tmp_path / "huge",
        LoraWeights(weights.settings, huge),
        base_name="tiny",
        base_fingerprint=model.base_fingerprint,
        fan_in_fan_out=False,
    )
    file = write_rows(tmp_path / "t.jsonl", documents(3))
    more = ["--adapter_dir", tmp_path / "huge"]
    assert main(eval_flags(tiny_llama_dir, [file], tmp_path / "out", *more)) == 70
    assert "the model 'huge' gives numbers that are not finite" in capsys.readouterr().err


def test_no_text_of_the_items_is_recorded(tiny_llama_dir, tmp_path):
    file = write_rows(tmp_path / "t.jsonl", documents(3))
    assert main(eval_flags(tiny_llama_dir, [file], tmp_path / "out")) == 0
    for path in Path(tmp_path / "out").iterdir():
        assert b"slept" not in path.read_bytes(), path
    lines = read_items(tmp_path / "out")["t"]["base"].values()
    assert all(math.isfinite(x["nll"]) and x["bytes"] > 0 for x in lines)


# Two evaluations


def test_two_evaluations_of_the_same_items_are_compared(tiny_llama_dir, adapters, tmp_path, capsys):
    file = write_rows(tmp_path / "t.jsonl", documents(12))
    (tmp_path / "x").mkdir()
    other = write_rows(tmp_path / "x" / "t.jsonl", documents(11))
    folders = {}
    for name, used, adapter in (
        ("a", file, "nothing"),
        ("b", file, "random"),
        ("c", other, "random"),
    ):
        folders[name] = tmp_path / name
        more = ["--adapter_dir", adapters / adapter]
        assert main(eval_flags(tiny_llama_dir, [used], folders[name], *more)) == 0
    capsys.readouterr()
    assert main(["compare", str(folders["a"]), str(folders["b"])]) == 0
    (own,) = result(folders["b"])["comparisons"]  # the adapter of A is the base again
    said = capsys.readouterr().out
    assert "t, 12 items: B's 'random' against A's 'nothing': " in said
    assert f"{own['verdict']} " in said and f"{abs(own['difference']):.4f} bits a byte" in said
    assert main(["compare", str(folders["a"]), str(folders["c"])]) == 64
    assert "the items of 't' differ: A has 12, B 11, both 11" in capsys.readouterr().err
    (folders["b"] / "eval.json").unlink()
    assert main(["compare", str(folders["a"]), str(folders["b"])]) == 65
    assert "has not ended" in capsys.readouterr().err
