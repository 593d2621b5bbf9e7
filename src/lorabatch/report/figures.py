"""The plots, as SVG text: same records, same bytes. Only those that have data are drawn.

Ink and paper are stand-in colours until ``themed`` replaces them, so that one drawing serves the
page (follows light and dark) and a file of its own (dark on white). Points are joined by lines
only where the quantity exists between them.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypedDict

from lorabatch.report.blocks import Plot
from lorabatch.report.load import InferRun, Run, TrainRun
from lorabatch.report.words import Words

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito: safe for the colour-blind
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
# and no two of the first 24 lines look alike without colour and dash
DASHES = ("-", "--", ":", "-.")
INK, PAPER = "#0b0c0d", "#fafbfc"
MAX_POINTS = 1000
LEGEND_WIDTH = 100  # characters that fit into one line
STYLE = {
    "svg.hashsalt": "lorabatch",
    "svg.fonttype": "none",
    "text.parse_math": False,  # a run called $x$ is a name
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Arial", "sans-serif"],
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.prop_cycle": "cycler('color', ['#0072b2'])",
    "grid.color": "#808080",
    "grid.alpha": 0.25,
    "legend.frameon": False,
}
DISTRIBUTIONS = ("ttft_ms", "tpot_ms", "e2el_ms")  # of Completion
PANELS = (  # field of Sample, axis, divisor
    ("cpu_percent", "axis_cpu", 1),
    ("rss_bytes", "axis_rss", 2**30),
    ("gpu_util_percent", "axis_gpu", 1),
    ("gpu_memory_bytes", "axis_gpu_memory", 2**30),
    ("gpu_power_w", "axis_power", 1),
    ("io_bytes_per_s", "axis_io", 1e6),
)


class LineStyle(TypedDict):
    color: str
    linestyle: str
    linewidth: float


def training_plots(words: Words, runs: Sequence[TrainRun]) -> list[Plot]:
    drawn = [run for run in runs if run.steps or run.evals]
    return (
        [_loss_plot(words, drawn), _throughput_plot(words, drawn)]
        if any(run.steps for run in drawn)
        else []
    )


def latency_plots(words: Words, runs: Sequence[InferRun]) -> list[Plot]:
    """Empirical distributions, one panel per latency."""
    if not any(_latencies(run, "e2el_ms") for run in runs):
        return []
    with canvas(words, columns=len(DISTRIBUTIONS), height=3.0) as (figure, panels):
        for name, panel in zip(DISTRIBUTIONS, panels, strict=True):
            for i, run in enumerate(runs):
                if values := _latencies(run, name):
                    panel.ecdf(_thinned(values, values)[0], label=run.label, **line_style(i))
            panel.set_xlabel(f"{name.removesuffix('_ms').upper()} (ms)")
            panel.set_xlim(left=0)
            panel.set_ylim(0, 1.02)
            panel.locator_params(axis="x", nbins=4)
        panels[0].set_ylabel(words("axis_share"))
        most = max(len(run.completions) for run in runs)
        return [plot(words, figure, panels[0], "latency", most)]


def _latencies(run: InferRun, name: str) -> list[float]:
    return sorted(ms for c in run.completions if (ms := getattr(c, name)) is not None)


def system_plots(words: Words, runs: Sequence[Run]) -> list[Plot]:
    shown = [panel for panel in PANELS if any(_sampled(run, panel[0]) != ([], []) for run in runs)]
    if not shown:
        return []
    # a column each: a training lasts longer than an inference
    kinds = list(dict.fromkeys(type(run) for run in runs))
    rows, columns = len(shown), len(kinds)
    with canvas(words, rows=rows, columns=columns, height=1.5 * rows + 0.8) as (figure, panels):
        for place, panel in enumerate(panels):
            (name, axis, divisor), kind = shown[place // columns], kinds[place % columns]
            for i, run in enumerate(runs):
                times, values = _sampled(run, name, divisor) if type(run) is kind else ([], [])
                panel.plot(*_thinned(times, values), label=run.label, **line_style(i))
            panel.set_ylim(bottom=0)
            if place % columns == 0:
                panel.set_ylabel(words(axis))
        for panel in panels[-columns:]:
            panel.set_xlabel(words("axis_time"))
        return [plot(words, figure, panels[0], "system", max(len(run.samples) for run in runs))]


def _sampled(run: Run, name: str, divisor: float = 1) -> tuple[list[float], list[float]]:
    """(times, values) of the samples that have one."""
    known = [(s.t_s, value) for s in run.samples if (value := getattr(s, name)) is not None]
    return [t for t, _ in known], [value / divisor for _, value in known]


def _loss_plot(words: Words, runs: Sequence[TrainRun]) -> Plot:
    with canvas(words, rows=2, height=4.6, ratios=(3, 1)) as (figure, (loss, rate)):
        for i, run in enumerate(runs):
            _draw_loss(words, loss, run, line_style(i))
            steps = [step.step for step in run.steps]
            rate.plot(*_thinned(steps, [step.lr for step in run.steps]), **line_style(i))
        loss.set_ylabel(words("axis_loss"))
        rate.set_ylabel(words("axis_lr"))
        rate.yaxis.set_major_formatter(
            lambda value, _: _localised(words, f"{value:.0e}" if value else "0")
        )
        rate.set_ylim(bottom=0)
        rate.set_xlabel(words("axis_step"))
        rate.locator_params(axis="x", integer=True)
        alt = "; ".join(_loss_in_words(words, run) for run in runs if run.steps)
        return plot(words, figure, loss, "loss", max(len(run.steps) for run in runs), alt=alt)


def _draw_loss(words: Words, panel: Axes, run: TrainRun, style: LineStyle) -> None:
    """Of every step as a line, of the evaluations as markers."""
    line = _thinned([step.step for step in run.steps], [step.loss for step in run.steps])
    panel.plot(*line, label=words("line_train", run=run.label), alpha=0.75, **style)
    evals = [(e.step, e.eval_loss) for e in run.evals if e.eval_loss is not None]
    if evals:
        panel.plot(
            [step for step, _ in evals],
            [eval_loss for _, eval_loss in evals],
            marker="D",
            linestyle="none",
            color=style["color"],
            label=words("val_part", run=run.label),
        )


def _loss_in_words(words: Words, run: TrainRun) -> str:
    first, last = run.steps[0], run.steps[-1]
    return words(
        "alt_loss",
        run=run.label,
        first=words.number(first.loss),
        first_step=first.step,
        last=words.number(last.loss),
        last_step=last.step,
    )


def _throughput_plot(words: Words, runs: Sequence[TrainRun]) -> Plot:
    with canvas(words, height=2.8) as (figure, (panel,)):
        for i, run in enumerate(runs):
            colour, overall = line_style(i)["color"], run.metrics.tokens_per_s
            points = _thinned([s.step for s in run.steps], [s.tokens_per_s for s in run.steps])
            panel.plot(
                *points, marker="o", markersize=4, linestyle="none", color=colour, label=run.label
            )
            if overall is not None:
                panel.axhline(overall, color=colour, linestyle="--", linewidth=1)
        panel.set_xlabel(words("axis_step"))
        panel.set_ylabel(words("axis_tokens"))
        panel.set_ylim(bottom=0)
        panel.locator_params(axis="x", integer=True)
        return plot(words, figure, panel, "throughput", max(len(run.steps) for run in runs))


@contextmanager
def canvas(
    words: Words,
    *,
    rows: int = 1,
    columns: int = 1,
    height: float,
    ratios: Sequence[int] | None = None,
) -> Iterator[tuple[Figure, list[Axes]]]:
    """(figure, flat list of panels) in our style; panels of a column share x, those of a row share
    y."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8, height), facecolor=PAPER, layout="constrained")
        grid = figure.subplots(
            rows, columns, squeeze=False, sharex="col", sharey="row", height_ratios=ratios
        )
        panels = list(grid.flat)
        for panel in panels:
            for axis in (panel.xaxis, panel.yaxis):
                axis.set_major_formatter(lambda value, _: _localised(words, f"{value:.6g}"))
        yield figure, panels


def plot(
    words: Words, figure: Figure, legend_of: Axes, name: str, points: int, *, alt: str = ""
) -> Plot:
    """Add the legend, write the SVG, and caption it. Called inside ``canvas``, whose style holds
    until then."""
    _add_legend(figure, legend_of)
    file = io.StringIO()
    figure.savefig(
        file, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
    )
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]  # without the XML declaration and the DTD's address
    # ids stay unique when several plots share a page
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    caption = words(f"fig_{name.rstrip('0123456789')}")
    if points > MAX_POINTS:
        caption += " " + words("thinned", n=words.number(MAX_POINTS))
    return Plot(name, svg, caption, alt or caption)


def _add_legend(figure: Figure, legend_of: Axes) -> None:
    lines = [(line, str(line.get_label())) for line in legend_of.get_lines()]
    handles = [line for line, label in lines if not label.startswith("_child")]
    labels = [label for _, label in lines if not label.startswith("_child")]
    if handles:
        columns = min(len(labels), LEGEND_WIDTH // (6 + max(map(len, labels))))
        figure.legend(handles, labels, loc="outside upper left", ncols=max(1, columns))


def line_style(i: int) -> LineStyle:
    return {
        "color": COLOURS[i % len(COLOURS)],
        "linestyle": DASHES[i % len(DASHES)],
        "linewidth": 1.8,
    }


def _thinned(xs: Sequence[float], ys: Sequence[float]) -> tuple[list[float], list[float]]:
    """At most MAX_POINTS points, evenly by position, first and last kept."""
    if len(xs) <= MAX_POINTS:
        return list(xs), list(ys)
    chosen = [round(i * (len(xs) - 1) / (MAX_POINTS - 1)) for i in range(MAX_POINTS)]
    return [xs[i] for i in chosen], [ys[i] for i in chosen]


def _localised(words: Words, number: str) -> str:
    return number.replace("-", "−").replace(".", "," if words.language == "pt" else ".")


def themed(plot: Plot, *, page: bool) -> str:
    """The drawing for an HTML page (colours of the text around it), or as a file (dark on
    white)."""
    ink, paper = ("currentColor", "none") if page else ("#222222", "#ffffff")
    svg = plot.svg.replace(INK, ink).replace(PAPER, paper)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{html.escape(plot.alt)}" ', 1)
