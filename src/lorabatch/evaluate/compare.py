"""Two evaluations of the same items, possibly of different bases: is B better than A?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from lorabatch.errors import DataError, UsageError, visible
from lorabatch.evaluate.figures import BASE, Comparison, Lines, compare_models, settle
from lorabatch.evaluate.results import read_items, read_result
from lorabatch.evaluate.summary import sentence
from lorabatch.schema import Fields


def compare_evaluations(a: Path, b: Path) -> list[str]:
    """The verdicts in lines of text. DataError for folders without common items, UsageError where
    the items of a task are not the same or it is open which models are meant."""
    for folder in (a, b):
        read_result(folder)  # a part of the items would be another sample of them
    tasks_a, tasks_b = read_items(a), read_items(b)
    common = [task for task in tasks_a if task in tasks_b]
    if not common:
        raise DataError(
            f"no task in common ({', '.join(tasks_a)}; {', '.join(tasks_b)})",
            where=b,
            fix="evaluate the same files",
        )
    comparisons = [
        _compared(task, pair, tasks_a[task], tasks_b[task], b)
        for task in common
        for pair in _pairs(tasks_a[task], tasks_b[task], b)
    ]
    settle(comparisons)
    lines = [f"A  {a}", f"B  {b}"]
    for c in comparisons:
        groups = f" in {c.clusters} groups" if c.clusters < c.items else ""
        who = f"B's '{c.model}' against A's '{c.against}'"
        lines.append(f"{c.task}, {c.items} items{groups}: {who}: {sentence(asdict(c))}")
    return [visible(line) for line in lines]


def _pairs(a: Lines, b: Lines, where: Path) -> list[tuple[str, str]]:
    """(A's model, B's model) that are compared: the one adapter of each, or those of one name."""
    adapters = [[name for name in lines if name != BASE] or [BASE] for lines in (a, b)]
    if len(adapters[0]) == len(adapters[1]) == 1:
        return [(adapters[0][0], adapters[1][0])]
    both = [(name, name) for name in adapters[0] if name in adapters[1]]
    if not both:
        raise UsageError(
            f"no adapter in common ({', '.join(adapters[0])}; {', '.join(adapters[1])})",
            where=where,
            fix="evaluate with --adapters NAME=DIR under the same names",
        )
    return both


def _compared(task: str, pair: tuple[str, str], a: Lines, b: Lines, where: Path) -> Comparison:
    lines_a, lines_b = _by_content(a[pair[0]]), _by_content(b[pair[1]])
    if lines_a.keys() != lines_b.keys():
        shared = len(lines_a.keys() & lines_b.keys())
        raise UsageError(
            f"the items of '{task}' differ: A has {len(lines_a)}, B {len(lines_b)}, both {shared}",
            where=where,
            fix="evaluate one file with the same --max_items and --max_len",
        )
    return compare_models(task, *pair, lines_a, lines_b, seed=0)


def _by_content(lines: Mapping[str, Fields]) -> dict[str, Fields]:
    """By what was scored, and which of equal ones it is."""
    seen: dict[str, int] = {}
    found = {}
    for line in lines.values():
        number = seen[line["content"]] = seen.get(line["content"], 0) + 1
        found[f"{line['content']} {number}"] = line
    return found
