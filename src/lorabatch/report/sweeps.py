"""Sweeps over batch sizes or numbers of threads: tables and plots with the intervals of their
medians."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from lorabatch.report.blocks import Block, Cell, Paragraph, Plot, Section, Table
from lorabatch.report.figures import COLOURS, INK, canvas, plot
from lorabatch.report.load import Bench
from lorabatch.report.words import Words
from lorabatch.schema import Fields

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LAWS = {"strong": "serial_share", "weak": "weak_serial_share"}
DURATIONS = ("batch_latency_ms", "step_ms")
Levels = list[tuple[int, Fields]]  # a level, and the estimate of its rate


def sweep_sections(words: Words, benches: Sequence[Bench]) -> list[Section]:
    if not benches:
        return []
    blocks: list[Block] = [Paragraph(words("sweep_note"))]
    for number, bench in enumerate(benches):
        environment, gpu = bench.record.get("environment") or {}, bench.record.get("gpu") or {}
        machine = f"{environment.get('host')}, {gpu.get('name') or environment.get('cpu')}"
        where = words("sweep_where", run=bench.label, kind=bench.record["kind"], machine=machine)
        blocks += [
            Paragraph(where),
            *sweep_plots(words, bench, number),
            *sweep_tables(words, bench),
        ]
        if bench.record.get("weak_serial_share") is not None:
            shares = {
                law: words.quantity(bench.record.get(key), "share") for law, key in LAWS.items()
            }
            blocks.append(Paragraph(words("sweep_laws", **shares)))
    return [Section("sweeps", words("sweeps"), blocks)]


def sweep_tables(words: Words, bench: Bench) -> list[Table]:
    """For threads with what Karp and Flatt make of them, and a table of work that grows with the
    threads."""
    if bench.sweep == "batch_size":
        heads = words("sweep_rate"), words("sweep_latency")
        return [_table(words, bench, "tokens_per_s", heads, lambda p: [_duration(words, p)])]
    heads = words("sweep_rate"), words("sweep_karp_flatt")
    strong = _table(
        words, bench, "tokens_per_s", heads, lambda p: [_karp_flatt(words, bench, p["threads"])]
    )
    if not all(point.get("weak_tokens_per_s") for point in bench.points):
        return [strong]
    weak_head = (words("sweep_weak_rate"),)
    return [strong, _table(words, bench, "weak_tokens_per_s", weak_head, lambda p: [])]


def _duration(words: Words, point: Fields) -> str:
    found = next((point[name].get("median") for name in DURATIONS if point.get(name)), None)
    return words.quantity(found, "ms")


def _karp_flatt(words: Words, bench: Bench, threads: int) -> str:
    shares = bench.record.get("karp_flatt") or {}
    if threads == 1:
        return words("not_applicable")
    return words.quantity(shares.get(str(threads)), "share")


def _table(
    words: Words,
    bench: Bench,
    metric: str,
    heads: tuple[str, ...],
    last: Callable[[Fields], list[Cell]],
) -> Table:
    """heads: of the rate, and of what ``last`` adds to a row."""
    first, none = bench.points[0][metric].get("median"), words("not_applicable")
    rows: list[list[Cell]] = []
    for point in bench.points:
        rate, low, high = (point[metric].get(name) for name in ("median", "low", "high"))
        unknown = low is None or high is None
        rows.append(
            [
                words.number(point[bench.sweep]),
                words.quantity(rate, "tokens/s"),
                none if unknown else f"{words.number(low)} … {words.number(high)}",
                none if rate is None or not first else words.number(rate / first),
                *last(point),
            ]
        )
    rate_head, *more = heads
    level = words(f"level_{bench.sweep}")
    return Table([level, rate_head, words("sweep_interval"), words("sweep_speedup"), *more], rows)


def sweep_plots(words: Words, bench: Bench, number: int) -> list[Plot]:
    """Points with the interval of their median; no line joins levels that were not measured but the
    dotted proportional one."""
    strong, weak = _levels(bench, "tokens_per_s"), _levels(bench, "weak_tokens_per_s")
    if not strong:
        return []
    levels = [level for level, _ in strong]
    with canvas(words, height=3.0) as (figure, (panel,)):
        for estimates, colour in ((strong, COLOURS[0]), (weak, COLOURS[1])):
            _draw_intervals(panel, estimates, colour)
        _draw_medians(words, panel, bench, strong, weak)
        panel.set_xscale("log", base=2)
        panel.set_xticks(levels)
        panel.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        panel.set_xlabel(words(f"level_{bench.sweep}"))
        panel.set_ylabel(words("axis_tokens"))
        panel.set_ylim(0, 1.35 * max(estimate["median"] for _, estimate in strong + weak))
        return [plot(words, figure, panel, f"sweep{number + 1}", len(strong))]


def _levels(bench: Bench, metric: str) -> Levels:
    """Those that have a median."""
    found = [(point[bench.sweep], point.get(metric) or {}) for point in bench.points]
    return [(level, estimate) for level, estimate in found if estimate.get("median") is not None]


def _draw_intervals(panel: Axes, estimates: Levels, colour: str) -> None:
    for level, estimate in estimates:
        low, high = estimate.get("low"), estimate.get("high")
        if low is not None and high is not None:
            panel.plot([level, level], [low, high], "_-", color=colour, markersize=12)


def _draw_medians(words: Words, panel: Axes, bench: Bench, strong: Levels, weak: Levels) -> None:
    levels = [level for level, _ in strong]
    medians = [estimate["median"] for _, estimate in strong]
    panel.plot(levels, medians, "o", color=COLOURS[0], label=bench.label)
    proportional = [medians[0] * level / levels[0] for level in levels]
    panel.plot(levels, proportional, ":", color=INK, linewidth=1, label=words("axis_ideal"))
    if weak:
        grown = [estimate["median"] for _, estimate in weak]
        label = words("axis_weak")
        panel.plot([x for x, _ in weak], grown, "s", mfc="none", color=COLOURS[1], label=label)
    knee = bench.record.get("knee")
    if knee is not None:
        label = words("axis_knee")
        panel.axvline(knee, color=COLOURS[1], linestyle="--", linewidth=1, label=label)
