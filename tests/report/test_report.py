"""Reports from hand-made run folders: the golden text, what is missing, what is hostile, what must
not be compared.

``UPDATE_GOLDEN=1 pytest tests/report/test_report.py`` rewrites the golden file; review its diff.
"""

import json
import os
import re
import subprocess
import sys
from dataclasses import fields, replace
from html.parser import HTMLParser
from pathlib import Path
from string import Formatter

import pytest
from support.paths import GOLDEN
from support.processes import ENVIRONMENT
from support.run_folders import (
    completion,
    infer_run,
    train_run,
    write_jsonl,
)

from lorabatch.cli import main
from lorabatch.config import InferConfig, ReportConfig, TrainConfig
from lorabatch.errors import DataError
from lorabatch.report.blocks import Bullets, Mono, Paragraph, Plot, Table
from lorabatch.report.build import build_report
from lorabatch.report.figures import INK, MAX_POINTS, PAPER, training_plots
from lorabatch.report.load import Step, load_runs
from lorabatch.report.markdown import code_span, escaped
from lorabatch.report.pairing import pairings, spread
from lorabatch.report.sections import command_line, document
from lorabatch.report.words import Words

RELATORIO = GOLDEN / "report_relatorio.md"
HOSTILE = "<script>alert(1)</script> | `x` ![i](http://e.example/i.png)\n**b** $y$ \x00\ud800"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A training run, the base model and the tuned one, under relative paths as a user would give
    them. Read them only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("runs"))
        yield write_runs()


@pytest.fixture(scope="module")
def reports(runs):
    """Language -> (RELATORIO.md, report.html)."""
    return {language: build(runs, language, language) for language in ("en", "pt")}


def write_runs():
    prompts = ["The patient", HOSTILE, "Dose:", "The ventilator"]
    before = [completion(i, p, f"before {i}") for i, p in enumerate(prompts)]
    after = [completion(i, p, f"after {i}\nline two | pipe") for i, p in enumerate(prompts)]
    after[1]["text"] = HOSTILE
    after[2] = completion(2, "Dose:", "", error="the prompt has 9 tokens | at most 8 fit")
    after[3]["text"] = before[3]["text"]
    base = infer_run(Path("base"), before)
    return [infer_run(Path("tuned"), after[::-1], adapter="lora"), train_run(Path("lora")), base]


def build(paths, folder="out", language="en"):
    return [
        path.read_text(encoding="utf-8")
        for path in build_report(paths, ReportConfig((), output_dir=folder, language=language))
    ]


def cells(blocks, name):
    """Row ``name`` of whichever table has it, as plain texts."""
    rows = [row for block in blocks if isinstance(block, Table) for row in block.rows]
    found = next(row for row in rows if row[0] == name or row[0] == Mono(name))
    return [cell.text if isinstance(cell, Mono) else cell for cell in found[1:]]


def blocks(paths, language="en"):
    return [
        block
        for section in document(Words(language), load_runs(paths), grid_g_per_kwh=100.0).sections
        for block in section.blocks
    ]


def without_default_settings(markdown):
    """A new setting with a default is no reason to review the golden text again."""
    names = {f"`{field.name}`" for config in (TrainConfig, InferConfig) for field in fields(config)}
    lines = markdown.splitlines(keepends=True)
    return "".join(
        line for line in lines if "**" in line or line.removeprefix("| ").split(" ")[0] not in names
    )


def test_relatorio_is_the_golden_text(reports):
    markdown, _ = reports["en"]
    assert markdown == reports["pt"][0], "Portuguese whatever the page's language"
    shown = without_default_settings(markdown)
    if os.environ.get("UPDATE_GOLDEN"):
        RELATORIO.write_text(shown, encoding="utf-8")
    assert shown == RELATORIO.read_text(encoding="utf-8")
    figures = re.findall(r"\]\((fig/[a-z]+\.svg)\)", markdown)
    assert figures == [f"fig/{name}.svg" for name in ("loss", "throughput", "latency", "system")]
    assert all((Path("en") / name).is_file() for name in figures)


def test_equal_input_gives_equal_bytes(runs, reports):
    build(runs, "again")
    names = sorted(p.relative_to("again") for p in Path("again").rglob("*") if p.is_file())
    assert len(names) == 6  # two documents, four figures, no temporary file
    for name in names:
        assert (Path("again") / name).read_bytes() == (Path("en") / name).read_bytes(), name


@pytest.mark.parametrize(
    ("language", "name", "missing"),
    [
        ("en", "Energy of the node's processors", "not measured"),
        ("pt", "Energia dos processadores do nó", "não medido"),
    ],
)
def test_what_was_not_measured_is_said_never_zero(runs, reports, language, name, missing):
    assert cells(blocks(runs, language), name) == [missing] * 3
    for page in reports[language]:
        assert not re.search(r"\b(None|null|nan)\b", page)


def test_a_measured_zero_is_a_zero_and_a_share_has_its_base(runs):
    found = blocks(runs)
    assert cells(found, "Padding among the tokens") == ["0.0%", "–", "–"]
    assert cells(
        found,
        "Arithmetic of training (4N) and decode (2N): achieved of the rate measured with cold "
        "weights",
    ) == [
        "300 Gflop/s of 400 Gflop/s (75.0%)",
        "not measured",
        "not measured",
    ]


class Page(HTMLParser):
    """Tags, every address, and the visible text of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.addresses, self.text = set(), [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.addresses += [
            value
            for name, value in attrs
            if name.split(":")[-1] in ("src", "href", "srcset", "action", "data")
        ]

    def handle_data(self, data):
        self.text += data


@pytest.mark.parametrize("language", ["en", "pt"])
def test_the_page_loads_nothing_and_runs_nothing(reports, language):
    _, text = reports[language]
    page = Page(text)
    assert (
        page.tags.isdisjoint({"script", "img", "link", "iframe", "object", "embed"})
        and "svg" in page.tags
    )
    assert page.addresses and all(address.startswith("#") for address in page.addresses)
    assert "@import" not in text and not re.search(r"url\((?!#)", text)
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids)) and {a[1:] for a in page.addresses} <= set(ids)
    assert INK not in text and PAPER not in text


def test_texts_of_runs_stay_text(reports):
    markdown, html = reports["en"]
    shown = HOSTILE.replace("\x00", "\\x00").replace("\ud800", "\\ud800")
    assert "<script" not in html and "<script" not in markdown
    assert shown in Page(html).text, "escaped, but complete"
    tables = [line for line in markdown.splitlines() if line.startswith("|") and "alert" in line]
    assert tables and all(len(re.findall(r"(?<!\\)\|", line)) == 5 for line in tables), (
        "id, prompt, before, after"
    )
    assert (
        "![i](" not in markdown
        and "**b**" not in markdown
        and "`x`" not in markdown.replace("\\`", "")
    )


def test_a_run_folder_with_markup_in_its_name(tmp_path):
    path = infer_run(tmp_path / "_$x$ <b>&|`y`", [completion(0, "p", "t")])
    markdown, html = build([path], str(tmp_path / "out"))
    outside_code = re.sub(r"(?s)(`{2,}).*?\1", "", markdown)
    assert "<b>" not in html and "<b>" in markdown and "<b>" not in outside_code
    assert "&lt;b&gt;&amp;|`y`</text>" in html, "in the legend"


def test_markdown_escapes():
    assert escaped("a|b\n `c` <d> *e*") == r"a\|b<br>\`c\` &lt;d&gt; \*e\*"
    assert code_span("a``b|c\nd") == r"``` a``b\|c d ```"


def test_pairs_need_equal_id_and_equal_prompt(tmp_path):
    base = infer_run(
        tmp_path / "base",
        [
            completion(0, "a", "x"),
            completion(1, "b", "y"),
            completion(2, "c", "z"),
            completion(4, "e", "w"),
        ],
    )
    tuned = [
        completion(0, "a", "X"),
        completion(1, "B", "Y"),
        completion(3, "c", "Z"),
        completion(4, "e", "", error="failed"),
    ]
    other = infer_run(tmp_path / "other", tuned, adapter="lora")
    (found,) = pairings(load_runs([other, base]))
    assert [(before.text, after.text) for before, after in found.pairs] == [("x", "X")]
    assert (found.base.label, found.tuned.label) == ("base", "other")
    assert pairings(load_runs([base])) == [] == pairings(load_runs([other]))


def test_a_pair_is_on_the_same_base(tmp_path):
    tuned = infer_run(tmp_path / "tuned", [completion(0, "a", "X")], adapter="lora")
    base = infer_run(tmp_path / "base", [completion(0, "a", "x")])
    record = json.loads((base / "run.json").read_text())
    (base / "run.json").write_text(
        json.dumps(record | {"model": {"name": "tiny", "fingerprint": "f2"}})
    )
    assert pairings(load_runs([tuned, base])) == []
    assert any(
        isinstance(block, Paragraph) and block.text.startswith("No pair of runs")
        for block in blocks([tuned, base])
    )


def test_examples_are_spread_and_counted(tmp_path):
    assert (
        spread("abcdef", 3) == ["a", "c", "e"]
        and spread("ab", 3) == ["a", "b"]
        and spread("", 3) == []
    )
    many = [completion(i, f"p{i}", f"t{i}") for i in range(30)]
    paths = [
        infer_run(tmp_path / "base", many),
        infer_run(tmp_path / "tuned", many, adapter="lora"),
    ]
    _, html = build(paths, str(tmp_path / "out"))
    assert html.count('<article class="example">') == 12
    assert "12 of 30 pairs" in html and "identical in 30 of 30" in html


@pytest.mark.parametrize(
    ("status", "shown"),
    [("running", "running, or killed"), ("interrupted", "interrupted"), ("failed", "failed")],
)
def test_a_run_that_did_not_finish_is_shown_as_such(tmp_path, status, shown):
    path = train_run(
        tmp_path / "run", metrics=None, status=status, torn='{"event": "st', error="out of memory"
    )
    (run,) = load_runs([path])
    assert [step.step for step in run.steps] == [1, 2, 3] and run.metrics.loss is None
    found = blocks([path])
    assert cells(found, "Status") == [shown] and cells(found, "Training throughput") == [
        "not measured"
    ]
    (bullets,) = (block for block in found[:1] if isinstance(block, Bullets))
    assert f"run ended as “{shown}” (out of memory)" in bullets.items[-1]


def test_a_run_that_ended_before_its_model_was_loaded(tmp_path):
    path = infer_run(tmp_path / "run", [], metrics=None, status="failed", adapter="lora")
    record = json.loads((path / "run.json").read_text())
    for name in ("model", "device", "dtype", "threads", "backend", "gpu"):
        del record[name]
    (path / "run.json").write_text(json.dumps(record))
    for name in ("completions.jsonl", "system.jsonl"):
        (path / name).unlink()
    assert load_runs([path])[0].adapter == "lora"
    assert not [block for block in blocks([path]) if isinstance(block, Plot)]
    markdown, _ = build([path], str(tmp_path / "out"))
    assert "0 requisições com tiny e o adaptador lora" in markdown


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: (p / "run.json").unlink(), "not a run folder"),
        (
            lambda p: (p / "run.json").write_text('{"schema_version": 1, "kind": "bench"}'),
            "'kind' is 'bench', not one of train, infer",
        ),
        (lambda p: (p / "run.json").write_text('{"kind": "train"}'), "'schema_version' is missing"),
        (lambda p: (p / "metrics.json").write_text("{"), "not readable as JSON"),
        (
            lambda p: write_jsonl(p / "events.jsonl", [{"event": "step", "step": "one"}]),
            "events.jsonl:1: 'step' is 'one', not of type int",
        ),
        (lambda p: write_jsonl(p / "system.jsonl", [[1]]), "system.jsonl:1: not a JSON object"),
    ],
)
def test_what_is_not_a_run_is_a_data_error_with_the_place(tmp_path, damage, message):
    path = train_run(tmp_path / "run")
    damage(path)
    with pytest.raises(DataError, match=re.escape(message)) as error:
        load_runs([path])
    assert str(path) in str(error.value.where) and error.value.fix


def test_the_command(runs, capsys):
    assert main(["report", *map(str, runs), "--output_dir", "out", "--language", "pt"]) == 0
    assert capsys.readouterr().out.split() == ["out/RELATORIO.md", "out/report.html"]
    assert '<html lang="pt-BR">' in Path("out/report.html").read_text(encoding="utf-8")
    assert main(["report", "nowhere"]) == 65
    assert main(["report", "base", "--output_dir", "base/run.json"]) == 69


def test_runs_of_different_machines_are_labelled(tmp_path):
    one = infer_run(tmp_path / "one" / "run", [completion(0, "a", "x")])
    two = infer_run(
        tmp_path / "two" / "run",
        [completion(0, "a", "x")],
        environment={"host": "node-2", "git": None},
    )
    assert [run.label for run in load_runs([one, two, one])] == [
        f"{one} @ node-1",
        f"{two} @ node-2",
    ]
    _, html = build([one, two], str(tmp_path / "out"))
    assert (
        "Different machines (node-1, node-2)" in html
        and "unknown (not run from a git checkout)" in html
    )


def test_settings_that_differ_from_the_default_are_strong(runs):
    tables = [
        block for block in blocks(runs) if isinstance(block, Table) and block.head[0] == "Setting"
    ]
    strong = {row[0].text for row in tables[0].rows if isinstance(row[2], Mono) and row[2].strong}
    assert strong == {"base_model", "lr"}


def test_the_system_plot_shows_the_last_session(tmp_path):
    path = infer_run(tmp_path / "run", [completion(0, "a", "x")])
    write_jsonl(path / "system.jsonl", [{"t_s": t} for t in (1, 2, 3, 1, 2)])
    assert [sample.t_s for sample in load_runs([path])[0].samples] == [1, 2]


def test_long_runs_are_thinned_and_the_caption_says_so(runs):
    (run,) = (run for run in load_runs(runs) if run.label == "lora")
    steps = [Step(i, 1.0 / (1 + i), 1e-4, 100.0) for i in range(5 * MAX_POINTS)]
    long = replace(run, steps=steps)
    loss, throughput = training_plots(Words("en"), [long])
    assert "At most 1,000 points" in loss.caption and throughput.svg.count("<use") < MAX_POINTS + 50


def test_the_command_as_a_shell_reads_it(runs):
    (run,) = load_runs(runs[1:2])
    assert command_line(run) == "lorabatch train --save_dir 'a b'"
    run.record["command"] = ["train_lora.py", "train", "--lr", "1e-3"]
    assert command_line(run) == "python src/train_lora.py --lr 1e-3"


@pytest.mark.parametrize(
    ("value", "unit", "english", "portuguese"),
    [
        (None, "ms", "not measured", "não medido"),
        (0, "", "0", "0"),
        (0.0415, "ms", "0.0415 ms", "0,0415 ms"),
        (-1.234, "s", "−1.23 s", "−1,23 s"),
        (28125.7, "ms", "28,126 ms", "28.126 ms"),
        (0.0351, "share", "3.5%", "3,5%"),
        (1536 * 2**20, "bytes", "1.50 GiB", "1,50 GiB"),
        (512, "bytes/s", "512 B/s", "512 B/s"),
        (1e9, "flop/s", "1.00 Gflop/s", "1,00 Gflop/s"),
        (13.5, "steps/min", "13.5 steps/min", "13,5 passos/min"),
        (1.23456789, "bits/byte", "1.2346 bits/byte", "1,2346 bits/byte"),
    ],
)
def test_numbers_with_units(value, unit, english, portuguese):
    assert (Words("en").quantity(value, unit), Words("pt").quantity(value, unit)) == (
        english,
        portuguese,
    )


def test_both_languages_say_the_same_things():
    def slots(text):
        return {name for _, name, _, _ in Formatter().parse(text) if name}

    english, portuguese = Words("en").texts, Words("pt").texts
    assert list(english) == list(portuguese)
    assert [key for key in english if slots(english[key]) != slots(portuguese[key])] == []


def test_a_report_needs_no_torch():
    code = (
        "import sys, lorabatch.report.build; print('torch' in sys.modules, 'matplotlib' in "
        "sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=ENVIRONMENT
    )
    assert done.stdout.split() == ["False", "False"]


@pytest.mark.parametrize(
    ("language", "warned"), [("en", "2 (1.5%), warning"), ("pt", "2 (1,5%), aviso")]
)
def test_what_was_found_in_the_data_is_told(language, warned, tmp_path):
    checks = [
        {"check": name, "level": level, "count": count, "share": share}
        for name, level, count, share in (
            ("leak.near", "warn", 2, 0.015),
            ("pii.number", "ok", 0, 0.0),
            ("size", "warn", 0, 1.0),
            ("of.a.later.version", "ok", 0, 0.0),
        )
    ]
    found = {"seconds": 0.1, "files": [], "checks": checks}
    run, before = train_run(tmp_path / "looked", checks=found), train_run(tmp_path / "before")
    _, page = build([run, before], tmp_path / "out", language)
    words = Words(language)
    for shown in (warned, words("check leak.near"), words("size_warn"), words("checks_off")):
        assert shown in page
    assert "later.version" not in page
    assert words("leaks", run="looked", count="2").strip()[:40] in page
