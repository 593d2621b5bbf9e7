"""Plots of measurements held against limits: the roofline, and sweeps over batch size or threads."""

from __future__ import annotations

from collections.abc import Sequence

from lorabatch.report.blocks import Plot
from lorabatch.report.figures import COLOURS, INK, canvas, plot
from lorabatch.report.load import Bench, InferRun, Run, TrainRun
from lorabatch.report.words import Words

ELEMENT_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "int8": 1}


def position(run: Run) -> tuple[float, float] | None:
    """(flop/byte, flop/s) of a run on the roofline; None where it was not measured.

    Training reads the frozen weights twice per block, forward and backward: 4 flop per parameter
    and token over 2 reads. Decoding: the flops and the bytes of its own records.
    """
    if isinstance(run, TrainRun):
        achieved, size = run.achieved_flops_per_s, ELEMENT_BYTES.get(str(run.record.get("dtype")))
        block = run.config.get("block_tokens")
        return (2.0 * block / size, achieved) if achieved and size and block else None
    share, bandwidth, flops = run.metric("mbu"), run.metric("measured_bytes_per_s"), run.achieved_flops_per_s
    return (flops / (share * bandwidth), flops) if share and bandwidth and flops else None


def roofline_plots(words: Words, runs: Sequence[Run]) -> list[Plot]:
    """One plot for the runs of one machine; none where machines differ or a ceiling is missing."""
    places = [(run, place) for run in runs if (place := position(run)) is not None]
    bandwidths = [value for run in runs if (value := run.metric("measured_bytes_per_s"))]
    peaks: dict[str, float] = {}
    for run in runs:
        peaks[run.precision] = max(peaks.get(run.precision, 0.0), run.metric("cold_flops_per_s") or 0.0)
    peaks = {name: peak for name, peak in peaks.items() if peak}
    if not places or not bandwidths or not peaks or len({str(run.environment.get("host")) for run in runs}) > 1:
        return []
    bandwidth = max(bandwidths)
    with canvas(words, height=3.6) as (figure, (panel,)):
        for dtype, peak in peaks.items():
            ridge = peak / bandwidth
            right = max(8 * ridge, *(2 * x for _, (x, _) in places))
            roof = [(ridge / 256, bandwidth * ridge / 256 / 1e9), (ridge, peak / 1e9), (right, peak / 1e9)]
            panel.plot(*zip(*roof, strict=True), color=INK, linewidth=1.5)
            text = f"{dtype}: {words.quantity(peak, 'flop/s')}"
            panel.annotate(text, (right, peak / 1e9), xytext=(0, 2), textcoords="offset points", ha="right", va="bottom", fontsize=9)
        panel.annotate(words.quantity(bandwidth, "bytes/s"), roof[0], xytext=(10, 0), textcoords="offset points", va="center", fontsize=9)
        panel.margins(y=0.12)
        for i, (run, (x, y)) in enumerate(places):
            marker = "o" if isinstance(run, InferRun) else "s"
            panel.plot([x], [y / 1e9], marker, markersize=8, color=COLOURS[i % len(COLOURS)], label=run.label)
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        for axis in (panel.xaxis, panel.yaxis):
            axis.set_major_formatter(lambda value, _: words.number(value, 0 if value >= 1 else 3))
        panel.set_xlabel(words("axis_intensity"))
        panel.set_ylabel(words("axis_gflops"))
        return [plot(words, figure, panel, "roofline", len(places))]


def sweep_plots(words: Words, bench: Bench, number: int) -> list[Plot]:
    """Points with the interval of their median; no line joins levels that were not measured but the dotted proportional one."""
    points = [(p[bench.sweep], p["tokens_per_s"]) for p in bench.points if p["tokens_per_s"].get("median") is not None]
    if not points:
        return []
    weak = [(p[bench.sweep], e) for p in bench.points if (e := p.get("weak_tokens_per_s")) and e.get("median") is not None]
    with canvas(words, height=3.0) as (figure, (panel,)):
        levels, medians = [level for level, _ in points], [estimate["median"] for _, estimate in points]
        for estimates, colour in ((points, COLOURS[0]), (weak, COLOURS[1])):
            for level, estimate in estimates:
                if None not in (estimate.get("low"), estimate.get("high")):
                    panel.plot([level, level], [estimate["low"], estimate["high"]], "_-", color=colour, markersize=12)
        panel.plot(levels, medians, "o", color=COLOURS[0], label=bench.label)
        panel.plot(levels, [medians[0] * level / levels[0] for level in levels], ":", color=INK, linewidth=1, label=words("axis_ideal"))
        if weak:
            panel.plot([x for x, _ in weak], [e["median"] for _, e in weak], "s", mfc="none", color=COLOURS[1], label=words("axis_weak"))
        if bench.record.get("knee") is not None:
            panel.axvline(bench.record["knee"], color=COLOURS[1], linestyle="--", linewidth=1, label=words("axis_knee"))
        panel.set_xscale("log", base=2)
        panel.set_xticks(levels)
        panel.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        panel.set_xlabel(words(f"level_{bench.sweep}"))
        panel.set_ylabel(words("axis_tokens"))
        panel.set_ylim(0, 1.35 * max(medians + [e["median"] for _, e in weak]))
        return [plot(words, figure, panel, f"sweep{number + 1}", len(points))]
