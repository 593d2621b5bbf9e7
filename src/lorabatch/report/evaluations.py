"""Evaluations: every adapter's difference to its base with interval and verdict, and the change of
each document."""

from __future__ import annotations

from collections.abc import Sequence

from lorabatch.evaluate.figures import BETTER, MEASURES, WORSE, rises_are_good
from lorabatch.evaluate.items import CHOICE, DOCUMENTS
from lorabatch.report.blocks import Block, Bullets, Cell, Mono, Paragraph, Plot, Section, Table
from lorabatch.report.figures import COLOURS, INK, canvas, plot
from lorabatch.report.load import Evaluated
from lorabatch.report.words import Words
from lorabatch.schema import Fields

HEADS = ("model", "value", "difference", "adjusted_p", "can_show", "verdict")
MOST_WORSENED = 10


def evaluation_sections(words: Words, evaluations: Sequence[Evaluated]) -> list[Section]:
    if not evaluations:
        return []
    blocks: list[Block] = [Paragraph(words("evaluation_note"))]
    for evaluation in evaluations:
        for task in evaluation.record["tasks"]:
            blocks += [_heading(words, evaluation, task), _table(words, evaluation, task)]
            blocks += _domains(words, task)
            for comparison in _comparisons(evaluation, task):
                plots = sum(isinstance(block, Plot) for block in blocks)
                blocks += _changes(words, evaluation, task, comparison, plots + 1)
        blocks += _notes(words, evaluation)
    return [Section("evaluation", words("evaluation"), blocks)]


def _changes(
    words: Words, evaluation: Evaluated, task: Fields, comparison: Fields, number: int
) -> list[Block]:
    """What became of each item; number: of the plot."""
    changes = evaluation.changes.get((task["task"], comparison["model"]), [])
    drawn = bool(changes) and task["kind"] == DOCUMENTS
    plots = [_change_plot(words, comparison, changes, number)] if drawn else []
    return [*plots, *_worsened(words, comparison, changes)]


def _notes(words: Words, evaluation: Evaluated) -> list[Block]:
    notes = [_forgetting(words, f) for f in evaluation.record.get("forgetting") or ()]
    notes += [_caution(words, note) for note in evaluation.record["warnings"]]
    return [Bullets(notes)] if notes else []


def _forgetting(words: Words, found: Fields) -> str:
    key = "evaluation_forgets" if found["forgets"] else "evaluation_remembers"
    interval = words("evaluation_no_interval")
    if found["low"] is not None:
        interval = " … ".join(words.quantity(found[end], "share") for end in ("low", "high"))
    share = words.quantity(found["relative"], "share")
    return words(key, model=found["model"], share=share, interval=interval)


def _caution(words: Words, note: Fields) -> str:
    key = f"caution_{note['kind']}"
    return words(key, **note) if key in words.texts else str(note["text"])


def _comparisons(evaluation: Evaluated, task: Fields) -> list[Fields]:
    return [c for c in evaluation.record["comparisons"] if c["task"] == task["task"]]


def _heading(words: Words, evaluation: Evaluated, task: Fields) -> Paragraph:
    counts = {name: words.number(task[name]) for name in ("items", "clusters")}
    text = words("evaluation_task", run=evaluation.label, task=task["task"], **counts)
    if task["kind"] == CHOICE:
        shares = {name: words.quantity(task[name], "share") for name in ("chance", "majority")}
        text += " " + words("evaluation_chance", **shares)
    return Paragraph(text)


def _table(words: Words, evaluation: Evaluated, task: Fields) -> Table:
    found = {c["model"]: c for c in _comparisons(evaluation, task)}
    rows: list[list[Cell]] = []
    for name, figures in task["models"].items():
        cells = _compared(words, found[name]) if name in found else ["–"] * 4
        rows.append([Mono(name), _shown(words, figures["value"], task["measure"]), *cells])
    return Table([words(f"evaluation_{head}") for head in HEADS], rows)


def _domains(words: Words, task: Fields) -> list[Table]:
    if not task.get("domains"):
        return []
    rows: list[list[Cell]] = []
    for domain, found in task["domains"].items():
        values = [_shown(words, value, task["measure"]) for value in found["models"].values()]
        rows.append([Mono(domain), words.number(found["items"]), *values])
    heads = [words(f"evaluation_{head}") for head in ("domain", "items")]
    return [Table([*heads, *task["models"]], rows)]


def _compared(words: Words, c: Fields) -> list[str]:
    measure, ends = c["measure"], (c["low"], c["high"])
    interval = words("evaluation_no_interval")
    if None not in ends:
        interval = " … ".join(_shown(words, end, measure) for end in ends)
    known = {BETTER: "better", WORSE: "worse"}
    return [
        f"{_shown(words, c['difference'], measure)} [{interval}]",
        words.number(c["adjusted_p"]),
        "–" if c["can_show"] is None else _shown(words, c["can_show"], measure),
        words(f"verdict_{known.get(c['verdict'], 'same')}"),
    ]


def _shown(words: Words, value: float, measure: str) -> str:
    if measure == MEASURES[CHOICE]:
        return words.quantity(value, "share")
    return words.number(value, 4 if measure == MEASURES[DOCUMENTS] else 1)


def _worsened(
    words: Words, comparison: Fields, changes: Sequence[tuple[str, float]]
) -> list[Paragraph]:
    """The items that lost most, to be looked at."""
    sign = -1 if rises_are_good(comparison["measure"]) else 1
    lost = sorted((c for c in changes if sign * c[1] > 0), key=lambda c: -sign * c[1])
    if not lost:
        return []
    values = {
        "model": comparison["model"],
        "count": words.number(len(lost)),
        "names": ", ".join(name for name, _ in lost[:MOST_WORSENED]),
    }
    return [Paragraph(words("evaluation_worsened", **values))]


def _change_plot(
    words: Words, comparison: Fields, changes: Sequence[tuple[str, float]], number: int
) -> Plot:
    """A dot for each document, sorted; the lines are no change, and the whole with its interval."""
    values = sorted(change for _, change in changes)
    label = f"{comparison['task']}, {comparison['model']}"
    with canvas(words, height=2.8) as (figure, (panel,)):
        shares = [(rank + 0.5) / len(values) for rank in range(len(values))]
        panel.plot(values, shares, "o", markersize=3, color=COLOURS[0], label=label)
        panel.axvline(0, color=INK, linewidth=1)
        panel.axvline(comparison["difference"], color=COLOURS[1], linestyle="--", linewidth=1)
        if comparison["low"] is not None:
            panel.axvspan(comparison["low"], comparison["high"], color=COLOURS[1], alpha=0.2)
        panel.set_xlabel(words("axis_change"))
        panel.set_ylabel(words("axis_documents"))
        panel.set_ylim(0, 1)
        return plot(words, figure, panel, f"change{number}", len(values))
