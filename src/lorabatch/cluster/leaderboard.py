"""The result of a sweep: its points, best first, with intervals over seeds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from lorabatch.errors import visible
from lorabatch.metrics.statistics import mean, standard_deviation, student_t
from lorabatch.schema import Fields, Record


def leaderboard(trials: Sequence[Fields], done: Sequence[Fields], metric: str) -> Record:
    """One row per point, best first. Intervals are over seeds of training, on the same validation
    documents: what another seed may change.

    ``half_width``: of the row's own mean; ``behind`` and ``behind_half_width``: its distance to the
    first row, seed by seed, which have initialisation and order of the documents in common.
    Student's t, 95 %; None below two seeds. (A bootstrap over validation documents would give a
    single seed an interval, and leave out of it what matters most here: the seed's luck.)
    """
    rows = sorted(map(_summed, _points(trials, done)), key=lambda r: (r["mean"] is None, r["mean"]))
    for row in rows[1:]:
        first = rows[0]["values"]
        row["behind"], row["behind_half_width"] = _interval(
            [value - first[seed] for seed, value in row["values"].items() if seed in first]
        )
    return {
        "schema_version": 2,
        "metric": metric,
        "interval": "95 % Student t over seeds of training",
        "rows": rows,
    }


def _summed(row: Record) -> Record:
    average, half = _interval(list(row["values"].values()))
    return row | {"mean": average, "half_width": half, "runs": len(row["values"])}


def _points(trials: Sequence[Fields], done: Sequence[Fields]) -> Iterable[Record]:
    """The trials of each point: values by seed, adapters, errors."""
    points: dict[str, Record] = {}
    for index, (values, record) in enumerate(zip(trials, done, strict=True)):
        point = {k: v for k, v in values.items() if k != "seed"}
        row = points.setdefault(
            str(point), {"point": point, "values": {}, "trials": [], "folders": [], "errors": []}
        )
        row["trials"].append(index)
        if record.get("value") is None:
            row["errors"].append(record.get("error") or "no reason was recorded")
        else:
            row["values"][str(values.get("seed"))] = record["value"]
            row["folders"].append(record["run"])
    return points.values()


def _interval(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Mean, and half the width of its 95 % interval; None for what so few values do not have."""
    spread = standard_deviation(values)
    return mean(values), None if spread is None else student_t(
        len(values) - 1
    ) * spread / math.sqrt(len(values))


def as_markdown(board: Fields) -> str:
    """The leaderboard as a table; a row that may be as good as the first one is marked."""
    rows = board["rows"]
    names = list(rows[0]["point"]) if rows else []
    lines = [
        f"| rank | {' | '.join(names)} | {board['metric']} | ± | behind the first | seeds | |",
        "|---" * (len(names) + 6) + "|",
    ]
    lines += [_line([str(i), *_cells(row, names)]) for i, row in enumerate(rows, start=1)]
    if any(row["half_width"] is not None for row in rows):
        lines.append(f"\n± is half of the {board['interval']}.")
    else:
        lines.append("\n± needs two seeds or more: [search] seed = [1, 2, 3].")
    if rows and rows[0]["folders"]:
        adapters = ", ".join(rows[0]["folders"])
        lines.append(f"Adapters of the first row, beside this file: {adapters}")
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(visible(c).replace("|", "/").replace("\n", " ") for c in cells) + " |"


def _cells(row: Fields, names: Sequence[str]) -> list[str]:
    value = "failed" if row["mean"] is None else f"{row['mean']:.4f}"
    half = "not measured" if row["half_width"] is None else f"{row['half_width']:.4f}"
    behind, reach = row.get("behind"), row.get("behind_half_width")
    distance = "" if behind is None else f"{behind:.4f}"
    distance += "" if reach is None else f" ± {reach:.4f}"
    note = ""
    if row["errors"]:
        note = str(row["errors"][0])
    elif behind is not None and reach is not None and behind <= reach:
        note = "not distinguishable from the first"
    point = [str(row["point"][name]) for name in names]
    return [*point, value, half, distance, str(row["runs"]), note]
