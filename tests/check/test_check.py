"""``lorabatch check`` finds what was planted, names its place, and repeats no identifier."""

import json
import random
import re
import subprocess
import sys
from dataclasses import replace
from string import ascii_lowercase

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.commands import write_lines, write_rows
from support.paths import ROOT, SAMPLE
from support.processes import ENVIRONMENT

from lorabatch.check.look import Files, look_for_everything, look_for_training
from lorabatch.check.rules import RULES, finding
from lorabatch.cli import main
from lorabatch.corpus.readers import Document
from lorabatch.records import read_json, read_jsonl

GENERATOR = random.Random(7)
IDENTIFIERS = {
    "CPF 390.533.447-05": ("pii.number", "390.533.447-05"),
    "CNS 898 0000 0004 3208": ("pii.number", "898 0000 0004 3208"),
    "SSN 536-90-4399": ("pii.number", "536-90-4399"),
    "credit card 4111 1111 1111 1111": ("pii.number", "4111 1111 1111 1111"),
    "account GB82 WEST 1234 5698 7654 32": ("pii.number", "1234 5698 7654 32"),
    "CNPJ 12.ABC.345/01DE-35": ("pii.contact", "12.ABC.345/01DE"),
    "tel (21) 99876-5432": ("pii.contact", "99876-5432"),
    "mail ana.silva@hospital.org.br": ("pii.contact", "ana.silva"),
    "page https://clinic.org/patients/7731": ("pii.contact", "clinic.org/patients"),
    "host 8.8.4.4": ("pii.contact", "8.8.4.4"),
    "MRN 0045981": ("pii.record", "0045981"),
    "DOB 03/04/1950": ("pii.record", "03/04/1950"),
    "a 93-year-old man": ("pii.record", "93-year"),
}


def sentence(count=30):
    return " ".join("".join(GENERATOR.choices(ascii_lowercase, k=6)) for _ in range(count))


def rows(count):
    return [
        {"question": f"What is {sentence(5)}?", "answer": sentence(), "patient": f"p{n}"}
        for n in range(count)
    ]


def check(folder, *words):
    """(exit code, {check: its record}, [findings])."""
    code = main(["check", *map(str, words), "--output_dir", str(folder / "out")])
    record = read_json(folder / "out" / "check.json")
    found = [*read_jsonl(folder / "out" / "findings.jsonl")]
    return code, {c["check"]: c for c in record["checks"]}, found


def places(found, name):
    """{line: line of its partner} of one check."""
    number = [
        [f[key] and int(f[key].rsplit(":", 1)[1]) for key in ("where", "partner")]
        for f in found
        if f["check"] == name
    ]
    return dict(number)


# --- planted ---


def test_leaks_are_found_at_their_places(tmp_path, capsys):
    train, val = rows(200), rows(100)
    for n in range(4):
        val[n]["answer"] = train[50 + n]["answer"].upper() + "!"
    for n in range(10, 15):
        words = train[n]["answer"].split()
        words[3] = "changed"
        val[n]["answer"] = " ".join(words)
    passage = sentence(60)
    train[150]["answer"] = f"{sentence(200)} {passage} {sentence(200)}"
    val[30]["answer"] = passage
    val[40]["patient"] = "p77"
    for n, row in enumerate(val):
        row["patient"] = row["patient"] if n == 40 else f"v{n}"
    val[60]["answer"], train[60]["answer"] = "Yes.", "yes"  # short: equal with their prompts only
    files = [
        write_rows(tmp_path / f"{name}.jsonl", r) for name, r in (("train", train), ("val", val))
    ]
    code, seen, found = check(tmp_path, *files, "--group_field", "patient")
    assert code == 65
    assert places(found, "leak.exact") == {n + 1: 51 + n for n in range(4)}
    near = {**{n + 1: 51 + n for n in range(4)}, **{n + 1: n + 1 for n in range(10, 15)}, 31: 151}
    assert places(found, "leak.near") == near
    assert {f["where"].rsplit(":")[-1]: f["run"] for f in found if f["figure"] == 1}["31"] == 60
    assert places(found, "leak.group") == {41: 78}
    assert {n for n, c in seen.items() if c["level"] == "FAIL"} == {
        "leak.exact",
        "leak.near",
        "leak.group",
    }
    out = capsys.readouterr().out
    assert out.startswith("FAIL  leak.group")
    assert "val.jsonl:41 = train.jsonl:78" in out and "p77" not in out


def test_repeats_and_conflicts_are_found_at_their_places(tmp_path):
    train = rows(100)
    for n in range(3):
        train[90 + n] = train[10 + n]
    words = train[20]["answer"].split()
    train[95]["answer"] = " ".join([*words[:-1], "other"])
    train[97]["question"] = train[30]["question"]
    file = write_rows(tmp_path / "train.jsonl", train)
    code, seen, found = check(tmp_path, file)
    assert code == 0
    assert places(found, "dup.exact") == {91 + n: 11 + n for n in range(3)}
    assert places(found, "dup.near") == {**{91 + n: 11 + n for n in range(3)}, 96: 21}
    assert places(found, "dup.conflict") == {98: 31}
    assert [seen[name]["level"] for name in ("dup.exact", "dup.near", "dup.conflict")] == [
        "warn"
    ] * 3


def test_identifiers_are_found_and_never_repeated(tmp_path, capsys):
    lines = [sentence() for _ in range(40)]
    at = {}
    for n, (text, (row, _)) in enumerate(IDENTIFIERS.items()):
        lines[2 * n] = f"{sentence(5)} {text}, {sentence(5)}"
        at.setdefault(row, []).append(2 * n + 1)
    code, _, found = check(tmp_path, write_lines(tmp_path / "train.txt", lines))
    assert code == 65
    for row, numbers in at.items():
        assert sorted(places(found, row)) == numbers
    files = [path.read_text() for path in (tmp_path / "out").iterdir()]
    assert len(files) == 2
    for text in (*capsys.readouterr(), *files):
        for _, secret in IDENTIFIERS.values():
            assert secret not in text and secret.replace(" ", "") not in text


def test_damaged_and_odd_texts_are_found(tmp_path):
    lines = [f"The patient was well and the {sentence(25)} is normal" for _ in range(50)]
    lines[3] += " \ufffd"
    lines[5] = "12.5 | 13.7 | 99 % +++ 11 // " * 5
    lines[7] += " informaÃ§Ã£o"
    lines[9] = "beep beep beep " * 20
    lines[11] = (
        "O paciente não tem febre e foi para casa com uma receita do médico, mas também dos exames há dias."
    )
    lines[13] += " <|im_start|>"
    lines[15] += " word" * 700
    _, seen, found = check(tmp_path, write_lines(tmp_path / "train.txt", lines))
    expected = {
        "text.broken": {4, 6},
        "text.mojibake": {8},
        "text.repeat": {6, 10, 16},
        "text.language": {12},
        "fmt.special": {14},
        "len.outlier": {16},
    }
    assert {name: set(places(found, name)) for name in expected} == expected
    assert all(seen[name]["level"] == "warn" for name in expected if name != "len.outlier")


def test_test_items_in_training_are_found(tmp_path):
    train = rows(50)
    options = [sentence(3) for _ in range(4)]
    items = [
        {"question": train[4]["question"], "answer": "B"},  # the question alone is no leak
        {"question": "An item", "answer": train[5]["answer"]},
        {"prompt": f"{sentence(9)} and so it is", "completion": " called X"},
        {"question": sentence(9), "options": options, "answer": "B"},
        {"question": sentence(9), "options": {"A": sentence(3), "B": sentence(3)}},
        {"question": train[9]["question"], "answer": "yes"},
    ]
    train[6]["answer"] = f"{sentence(10)} {items[2]['prompt']} called X {sentence(10)}"
    train[7]["answer"] = f"{sentence(10)} A) {options[0]} B) {options[1]} {' '.join(options)}"
    train[9]["answer"] = "Yes!"
    file = write_rows(tmp_path / "train.jsonl", train)
    code, _, found = check(tmp_path, file, "--against", write_rows(tmp_path / "items.jsonl", items))
    assert code == 65
    assert places(found, "leak.eval") == {2: 6, 3: 7, 4: 8, 6: 10}


def test_all_kinds_of_files_give_the_same(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    train = rows(120)
    train[7]["answer"] += " CPF 390.533.447-05"
    train[110] = train[3]
    val = [*rows(100)[:-1], train[9]]
    for name, part in (("train", train), ("val", val)):
        write_rows(tmp_path / f"{name}.jsonl", part)
        table = pyarrow.Table.from_pylist(part)
        parquet.write_table(table, tmp_path / f"{name}.parquet")
        text = [",".join(row[0]) for row in [[part[0].keys()]]] + [
            ",".join(r.values()) for r in part
        ]
        write_lines(tmp_path / f"{name}.csv", text)
    results = {}
    for suffix in ("jsonl", "csv", "parquet"):
        first = 2 if suffix == "csv" else 1  # line of the first row
        files = [tmp_path / f"{name}.{suffix}" for name in ("train", "val")]
        code, seen, found = check(tmp_path, *files)
        levels = {name: c["level"] for name, c in seen.items()}
        lines = [(f["check"], int(f["where"].rsplit(":")[-1]) - first) for f in found]
        results[suffix] = code, levels, lines
    assert results["jsonl"] == results["csv"] == results["parquet"]
    assert results["jsonl"][0] == 65 and ("pii.number", 7) in results["jsonl"][2]


@pytest.mark.parametrize("folder", [SAMPLE, SAMPLE / "pt"], ids=["en", "pt"])
def test_the_sample_data_pass(folder, tmp_path):
    """But for their size, of which the report warns too."""
    code, seen, _ = check(tmp_path, folder / "train.txt", folder / "val.txt")
    assert code == 0
    assert {n for n, c in seen.items() if c["level"] != "ok"} == {"size"}


def test_another_mix_of_domains_is_doubtful(tmp_path):
    train = [row | {"source": "ab"[n % 2]} for n, row in enumerate(rows(100))]
    val = [row | {"source": "a"} for row in rows(100)]
    files = [
        write_rows(tmp_path / f"{name}.jsonl", r) for name, r in (("train", train), ("val", val))
    ]
    _, seen, _ = check(tmp_path, *files, "--domain_field", "source")
    assert seen["size"]["level"] == "warn"
    files[1] = write_rows(
        tmp_path / "val.jsonl", [r | {"source": "ab"[n % 2]} for n, r in enumerate(val)]
    )
    _, seen, _ = check(tmp_path, *files, "--domain_field", "source")
    assert seen["size"]["level"] == "ok"


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.text(max_size=60), min_size=1, max_size=6),
    st.lists(st.text(alphabet="aé .\n0123456789-/@:", max_size=60), min_size=1, max_size=6),
)
def test_no_text_is_too_odd(train, val):
    files = Files(
        *([Document(t, f"f:{n}", prompt=t[:3]) for n, t in enumerate(s)] for s in (train, val))
    )
    everything = list(look_for_everything(files, 0.5, 0.8))
    assert all(finding(s, RULES).line(9) and 0 <= s.measured <= 1 for s in everything)


def test_training_looks_for_the_rows_that_say_so():
    documents = [Document(sentence(), f"f:{n}", prompt="Q?", group=str(n)) for n in range(3)]
    files = Files(documents, documents, documents)
    quick = {s.check for s in look_for_training(replace(files, test=()), 0.5)}
    assert quick == {name for name, rule in RULES.items() if rule.in_training}
    with_tokenizer = {"fmt.special", "fmt.eos", "len.cut", "len.none"}
    assert {s.check for s in look_for_everything(files, 0.5, 0.8)} | with_tokenizer == set(RULES)


# --- with a tokenizer ---


def test_what_is_cut_shows_with_the_models_tokenizer(tmp_path, tiny_llama_dir):
    train = [{"prompt": "Say it:", "completion": " " + "long " * 60}] * 3
    train += [{"prompt": "A prompt that is far too long. " * 9, "completion": " no"}]
    train += [{"prompt": "Ends in a space ", "completion": "yes"}]
    train += [{"prompt": "Cut in a wo", "completion": "rd"}, {"prompt": "Q:", "completion": " A"}]
    file = write_rows(tmp_path / "train.jsonl", train)
    code, seen, found = check(tmp_path, file, "--base_model", tiny_llama_dir, "--max_len", 40)
    assert code == 65
    assert set(places(found, "fmt.eos")) == {1, 2, 3, 4} == set(places(found, "len.cut"))
    assert set(places(found, "len.none")) == {4}
    assert 5 in places(found, "fmt.seam") and 7 not in places(found, "fmt.seam")
    assert seen["len.cut"]["level"] == "FAIL" and 0.5 < seen["len.cut"]["share"] < 1


def test_show_prints_documents_as_the_model_sees_them(tmp_path, tiny_llama_dir, capsys):
    file = write_rows(
        tmp_path / "t.jsonl", [{"prompt": "What is it?", "completion": " A fever"}] * 3
    )
    words = ["check", str(file), "--base_model", str(tiny_llama_dir), "--show", "2"]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert out.count("What is it?⟦ A fever") == 2 and f"{file}:2: " in out and ":3:" not in out
    assert main([*words, "--max_len", "10"]) == 0
    assert ", cut\n" in capsys.readouterr().out
    assert main(["check", str(file), "--show", "2"]) == 64
    assert "--base_model" in capsys.readouterr().err


def test_torch_is_not_imported_without_a_model(tmp_path):
    code = (
        "import sys; from lorabatch.cli import main; "
        f"code = main(['check', {str(SAMPLE / 'train.txt')!r}, '--output_dir', {str(tmp_path)!r}]); "
        "sys.exit(f'{code} torch' if 'torch' in sys.modules else code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")


# --- settings ---


def test_thresholds_can_be_moved(tmp_path, capsys):
    file = write_lines(tmp_path / "train.txt", ["CPF 390.533.447-05 " + sentence(), sentence()])
    assert check(tmp_path, file)[0] == 65
    assert check(tmp_path, file, "--fail_at", "pii.number=none")[1]["pii.number"]["level"] == "warn"
    assert check(tmp_path, file, "--fail_at", "pii.number=0.6")[0] == 0
    both = ["--fail_at", "pii.number=none", "--warn_at", "pii.number=none"]
    assert check(tmp_path, file, *both)[1]["pii.number"]["level"] == "ok"
    capsys.readouterr()
    assert main(["check", str(file), "--json", "--output_dir", str(tmp_path / "out")]) == 65
    shown = json.loads(capsys.readouterr().out)["findings"]
    assert shown[0]["check"] == "pii.number" and {f["check"] for f in shown} <= set(RULES)


def test_the_experiments_file_serves_training_and_check(tmp_path):
    data = write_lines(tmp_path / "data.txt", [sentence()] * 2)
    config = tmp_path / "run.toml"
    config.write_text(
        f'seed = 3\n[train]\ntrain_path = "{data}"\nval_path = "none"\nepochs = 3\n'
        "[check]\nnear_jaccard = 0.9\n"
    )
    _, seen, _ = check(tmp_path, "--config", config)
    assert seen["dup.exact"]["count"] == 1 and "leak.exact" not in seen
    config.write_text("[check]\nnear_jacard = 0.9\n")
    assert main(["check", "--config", str(config)]) == 64


def test_the_guide_lists_every_check_with_its_thresholds():
    guide = (ROOT / "docs" / "check.md").read_text(encoding="utf-8")
    rows_ = re.findall(r"^\| `([a-z.]+)`( ●)?( ◆)? \| ([^|]+) \| ([^|]+) \|", guide, re.MULTILINE)
    told = {name: (bool(dot), bool(stops), fail, warn) for name, dot, stops, fail, warn in rows_}

    def words(share):
        return {None: "never", 0: "any"}.get(share) or f"{100 * share:g} %"

    assert told == {
        name: (rule.in_training, rule.stops, words(rule.fail), words(rule.warn))
        for name, rule in RULES.items()
    }


# --- refused ---

REFUSED = {
    "no such file": (["missing.jsonl"], 65, "missing.jsonl: no such file"),
    "the same file twice": (["a.jsonl", "a.jsonl"], 65, "a.jsonl: has the same content as"),
    "a copy of it": (["a.jsonl", "copy.jsonl"], 65, "copy.jsonl: has the same content as"),
    "three files": (["a.jsonl", "b.jsonl", "c.jsonl"], 64, "c.jsonl: 3 files; give"),
    "no such field": (["a.jsonl", "--group_field", "ward"], 65, "a.jsonl:1: no field 'ward'; fill"),
    "an empty group": (
        ["gap.jsonl", "--group_field", "patient"],
        65,
        "gap.jsonl:2: 'patient' is empty",
    ),
    "a list as a group": (
        ["list.jsonl", "--group_field", "patient"],
        65,
        "list.jsonl:1: 'patient' is not",
    ),
    "a group in text": (
        ["t.txt", "--group_field", "patient"],
        65,
        "t.txt: a .txt file has no field",
    ),
    "no such check": (["a.jsonl", "--fail_at", "pii=0.1"], 64, "no such check"),
    "no share": (["a.jsonl", "--warn_at", "dup.near=2"], 64, "not a share"),
    "options without a question": (
        ["a.jsonl", "--against", "options.jsonl"],
        65,
        "options.jsonl:1: 'options' needs a 'question'",
    ),
    "no test file": (["a.jsonl", "--against", "missing.csv"], 65, "missing.csv: no such file"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_one_line_and_nothing_is_written(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    row = {"text": sentence(), "patient": "p1"}
    write_rows(tmp_path / "a.jsonl", [row])
    write_rows(tmp_path / "copy.jsonl", [row])
    write_rows(tmp_path / "gap.jsonl", [row, row | {"patient": ""}])
    write_rows(tmp_path / "list.jsonl", [row | {"patient": [1]}])
    write_rows(tmp_path / "options.jsonl", [{"options": ["a"]}])
    write_lines(tmp_path / "t.txt", ["text"])
    words, code, text = REFUSED[name]
    assert main(["check", *words, "--output_dir", "out"]) == code
    error = capsys.readouterr().err
    assert error.startswith("lorabatch check: ") and error.count("\n") == 1 and text in error
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path, capsys):
    (tmp_path / "out").write_text("a file")
    assert main(["check", str(SAMPLE / "train.txt"), "--output_dir", str(tmp_path / "out")]) == 69
    assert "choose another --output_dir" in capsys.readouterr().err
