"""What an evaluation found, in plain words."""

from __future__ import annotations

from collections.abc import Iterator

from lorabatch.errors import visible
from lorabatch.evaluate.figures import BETTER, FORGETS, MEASURES, SAME
from lorabatch.evaluate.items import CHOICE, DOCUMENTS, GENERATION
from lorabatch.schema import Fields

NOUNS = {
    MEASURES[DOCUMENTS]: "documents",
    MEASURES[CHOICE]: "questions",
    MEASURES[GENERATION]: "prompts",
}
UNITS = {
    MEASURES[DOCUMENTS]: "bits a byte",
    MEASURES[CHOICE]: "points",
    MEASURES[GENERATION]: "chrF",
}


def lines(record: Fields) -> Iterator[str]:
    """Of eval.json."""
    for task in record["tasks"]:
        yield visible(f"{task['task']}: {_size(task)}")
        width = max(map(len, task["models"]))
        for name, figures in task["models"].items():
            said = f"  {name:{width}}  {shown(figures['value'], task['measure'])}"
            own = [
                c for c in record["comparisons"] if (c["task"], c["model"]) == (task["task"], name)
            ]
            yield visible(said + "".join(f": {sentence(c)}" for c in own))
        yield from (visible(line) for line in _domains(task))
        if task["kind"] == CHOICE:
            yield (
                f"  chance is right in {task['chance']:.1%}, always the commonest answer in "
                f"{task['majority']:.1%}"
            )
    yield from (visible(_forgetting(found)) for found in record.get("forgetting") or ())
    yield from (visible(f"note: {note['text']}") for note in record["warnings"])


def _domains(task: Fields) -> Iterator[str]:
    for domain, found in (task.get("domains") or {}).items():
        values = [f"{m} {shown(v, task['measure'])}" for m, v in found["models"].items()]
        yield f"    {domain} ({found['items']}): {', '.join(values)}"


def _forgetting(found: Fields) -> str:
    ends = f"no interval: {found['reason']}"
    if found["low"] is not None:
        ends = f"95 % interval {found['low']:+.1%} to {found['high']:+.1%}"
    verdict = "forgets" if found["forgets"] else "does not show that it forgets"
    bits = f"bits a byte of general text {found['relative']:+.1%}, {ends}"
    return f"'{found['model']}' {verdict}: {bits} (it forgets from {FORGETS:+.0%} on)"


def of_model(record: Fields, name: str) -> Iterator[str]:
    """What eval.json says of one adapter, one sentence a task, and the reasons for doubt."""
    for c in record["comparisons"]:
        if c["model"] == name:
            task = next(t for t in record["tasks"] if t["task"] == c["task"])
            value = shown(task["models"][name]["value"], c["measure"])
            yield f"{c['task']}, {_size(task)}: {value}; beside {c['against']} {sentence(c)}"
    yield from (n["text"] for n in record["warnings"] if n.get("model") in (None, name))


def _size(task: Fields) -> str:
    noun = NOUNS[task["measure"]]
    groups = f" in {task['clusters']} groups" if task["clusters"] < task["items"] else ""
    return f"{task['items']} {noun}{groups}"


def shown(value: float, measure: str) -> str:
    """A value of a measure with its unit."""
    if measure == MEASURES[CHOICE]:
        return f"{value:.1%} right"
    return f"{amount(value, measure)} {UNITS[measure]}"


def amount(value: float, measure: str) -> str:
    """A difference of a measure, without its unit."""
    if measure == MEASURES[DOCUMENTS]:
        return f"{value:.4f}"
    return f"{100 * value if measure == MEASURES[CHOICE] else value:.1f}"


def sentence(c: Fields) -> str:
    """A comparison in words: "better by 0.0462 bits a byte (95 % interval 0.0401 to 0.0530, …)"."""
    measure = c["measure"]
    if c["verdict"] == SAME:
        return f"{SAME} ({_signed(c)}{_p(c)}){_can_show(c)}"
    down = -1 if c["difference"] < 0 else 1
    ends = sorted(down * end for end in (c["low"], c["high"]) if end is not None)
    interval = " to ".join(amount(end, measure) for end in ends)
    said = f"95 % interval {interval}" if ends else f"no interval: {c['reason']}"
    count, noun = c["improved"] if c["verdict"] == BETTER else c["worsened"], NOUNS[measure]
    how = "improved" if c["verdict"] == BETTER else "became worse"
    return (
        f"{c['verdict']} by {amount(abs(c['difference']), measure)} {UNITS[measure]} "
        f"({said}{_p(c)}); {count} of {c['items']} {noun} {how}"
    )


def _signed(c: Fields) -> str:
    """The difference with its sign and interval."""
    measure = c["measure"]
    said = (
        f"{'+' if c['difference'] > 0 else ''}{amount(c['difference'], measure)} {UNITS[measure]}"
    )
    if c["low"] is None:
        return f"{said}, no interval: {c['reason']}"
    return f"{said}, 95 % interval {amount(c['low'], measure)} to {amount(c['high'], measure)}"


def _p(c: Fields) -> str:
    text = f", p {c['p']:.2g}"
    return text if c["adjusted_p"] == c["p"] else f"{text}, {c['adjusted_p']:.2g} with the others"


def _can_show(c: Fields) -> str:
    if not c["can_show"]:
        return ""
    most = amount(c["can_show"], c["measure"])
    return f"; so many {NOUNS[c['measure']]} show {most} {UNITS[c['measure']]} or more"
