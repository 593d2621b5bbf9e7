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
from typing import Any

from lorabatch.report.blocks import Plot
from lorabatch.report.load import InferRun, Run, TrainRun
from lorabatch.report.words import Words

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # Okabe and Ito: safe for the colour-blind
DASHES = ("-", "--", ":", "-.")  # and no two of the first 24 lines look alike without colour and dash
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
PANELS = (  # field of Sample, axis, divisor
    ("cpu_percent", "axis_cpu", 1),
    ("rss_bytes", "axis_rss", 2**30),
    ("gpu_util_percent", "axis_gpu", 1),
    ("gpu_memory_bytes", "axis_gpu_memory", 2**30),
    ("gpu_power_w", "axis_power", 1),
    ("io_bytes_per_s", "axis_io", 1e6),
)


def training_plots(words: Words, runs: Sequence[TrainRun]) -> list[Plot]:
    drawn = [run for run in runs if run.steps or run.evals]
    return [_loss_plot(words, drawn), _throughput_plot(words, drawn)] if any(run.steps for run in drawn) else []


def latency_plots(words: Words, runs: Sequence[InferRun]) -> list[Plot]:
    """Empirical distributions, one panel per latency."""
    names = ("ttft_ms", "tpot_ms", "e2el_ms")
    values = {n: [sorted(v for c in run.completions if (v := getattr(c, n)) is not None) for run in runs] for n in names}
    if not any(values["e2el_ms"]):
        return []
    with canvas(words, columns=len(names), height=3.0) as (figure, panels):
        for name, panel in zip(names, panels, strict=True):
            for i, run in enumerate(runs):
                if values[name][i]:
                    panel.ecdf(_thinned(values[name][i], values[name][i])[0], label=run.label, **line_style(i))
            panel.set_xlabel(f"{name.removesuffix('_ms').upper()} (ms)")
            panel.set_xlim(left=0)
            panel.set_ylim(0, 1.02)
            panel.locator_params(axis="x", nbins=4)
        panels[0].set_ylabel(words("axis_share"))
        return [plot(words, figure, panels[0], "latency", max(len(run.completions) for run in runs))]


def system_plots(words: Words, runs: Sequence[Run]) -> list[Plot]:
    shown = [panel for panel in PANELS if any(getattr(s, panel[0]) is not None for run in runs for s in run.samples)]
    if not shown:
        return []
    kinds = list(dict.fromkeys(type(run) for run in runs))  # a column each: a training lasts longer than an inference
    with canvas(words, rows=len(shown), columns=len(kinds), height=1.5 * len(shown) + 0.8) as (figure, panels):
        for place, panel in enumerate(panels):
            (name, axis, divisor), kind = shown[place // len(kinds)], kinds[place % len(kinds)]
            for i, run in enumerate(runs):
                known = [(s.t_s, getattr(s, name) / divisor) for s in run.samples if getattr(s, name) is not None and type(run) is kind]
                panel.plot(*_thinned([t for t, _ in known], [v for _, v in known]), label=run.label, **line_style(i))
            panel.set_ylim(bottom=0)
            if place % len(kinds) == 0:
                panel.set_ylabel(words(axis))
        for panel in panels[-len(kinds) :]:
            panel.set_xlabel(words("axis_time"))
        return [plot(words, figure, panels[0], "system", max(len(run.samples) for run in runs))]


def _loss_plot(words: Words, runs: Sequence[TrainRun]) -> Plot:
    with canvas(words, rows=2, height=4.6, ratios=(3, 1)) as (figure, (loss, rate)):
        for i, run in enumerate(runs):
            steps, line = [s.step for s in run.steps], line_style(i)
            loss.plot(*_thinned(steps, [s.loss for s in run.steps]), label=words("line_train", run=run.label), alpha=0.75, **line)
            evals = [e for e in run.evals if e.eval_loss is not None]
            if evals:
                points = [e.step for e in evals], [e.eval_loss for e in evals]
                loss.plot(*points, marker="D", linestyle="none", color=line["color"], label=words("val_part", run=run.label))
            rate.plot(*_thinned(steps, [s.lr for s in run.steps]), **line)
        loss.set_ylabel(words("axis_loss"))
        rate.set_ylabel(words("axis_lr"))
        rate.yaxis.set_major_formatter(lambda value, _: _localised(words, f"{value:.0e}" if value else "0"))
        rate.set_ylim(bottom=0)
        rate.set_xlabel(words("axis_step"))
        rate.locator_params(axis="x", integer=True)
        ends = [(run, run.steps[0], run.steps[-1]) for run in runs if run.steps]
        alt = [
            words("alt_loss", run=run.label, first=words.number(a.loss), first_step=a.step, last=words.number(b.loss), last_step=b.step)
            for run, a, b in ends
        ]
        return plot(words, figure, loss, "loss", max(len(run.steps) for run in runs), alt="; ".join(alt))


def _throughput_plot(words: Words, runs: Sequence[TrainRun]) -> Plot:
    with canvas(words, height=2.8) as (figure, (panel,)):
        for i, run in enumerate(runs):
            xs, ys = _thinned([s.step for s in run.steps], [s.tokens_per_s for s in run.steps])
            panel.plot(xs, ys, marker="o", markersize=4, linestyle="none", color=line_style(i)["color"], label=run.label)
            overall = run.metric("tokens_per_s")
            if overall is not None:
                panel.axhline(overall, color=line_style(i)["color"], linestyle="--", linewidth=1)
        panel.set_xlabel(words("axis_step"))
        panel.set_ylabel(words("axis_tokens"))
        panel.set_ylim(bottom=0)
        panel.locator_params(axis="x", integer=True)
        return plot(words, figure, panel, "throughput", max(len(run.steps) for run in runs))


@contextmanager
def canvas(words: Words, *, rows: int = 1, columns: int = 1, height: float, ratios: Sequence[int] | None = None) -> Iterator[Any]:
    """(figure, flat list of panels) in our style; panels of a column share x, those of a row share y."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8, height), facecolor=PAPER, layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False, sharex="col", sharey="row", height_ratios=ratios)
        panels = list(grid.flat)
        for panel in panels:
            for axis in (panel.xaxis, panel.yaxis):
                axis.set_major_formatter(lambda value, _: _localised(words, f"{value:.6g}"))
        yield figure, panels


def plot(words: Words, figure: Any, legend_of: Any, name: str, points: int, *, alt: str = "") -> Plot:
    """Add the legend, write the SVG, and caption it. Called inside ``canvas``, whose style holds until then."""
    handles = [line for line in legend_of.get_lines() if not line.get_label().startswith("_child")]
    labels = [str(line.get_label()) for line in handles]
    if handles:
        columns = min(len(labels), LEGEND_WIDTH // (6 + max(map(len, labels))))
        figure.legend(handles, labels, loc="outside upper left", ncols=max(1, columns))
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]  # without the XML declaration and the DTD's address
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg)  # ids stay unique when several plots share a page
    caption = words(f"fig_{name.rstrip('0123456789')}")
    if points > MAX_POINTS:
        caption += " " + words("thinned", n=words.number(MAX_POINTS))
    return Plot(name, svg, caption, alt or caption)


def line_style(i: int) -> dict[str, Any]:
    return {"color": COLOURS[i % len(COLOURS)], "linestyle": DASHES[i % len(DASHES)], "linewidth": 1.8}


def _thinned(xs: Sequence[float], ys: Sequence[float]) -> tuple[list[float], list[float]]:
    """At most MAX_POINTS points, evenly by position, first and last kept."""
    if len(xs) <= MAX_POINTS:
        return list(xs), list(ys)
    chosen = [round(i * (len(xs) - 1) / (MAX_POINTS - 1)) for i in range(MAX_POINTS)]
    return [xs[i] for i in chosen], [ys[i] for i in chosen]


def _localised(words: Words, number: str) -> str:
    return number.replace("-", "−").replace(".", "," if words.language == "pt" else ".")


def themed(plot: Plot, *, page: bool) -> str:
    """The drawing for an HTML page (colours of the text around it), or as a file (dark on white)."""
    ink, paper = ("currentColor", "none") if page else ("#222222", "#ffffff")
    svg = plot.svg.replace(INK, ink).replace(PAPER, paper)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{html.escape(plot.alt)}" ', 1)
