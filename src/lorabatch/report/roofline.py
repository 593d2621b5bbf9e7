"""The roofline: what the measured rates of a machine allow, and where the runs were."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from lorabatch.report.blocks import Plot
from lorabatch.report.figures import COLOURS, INK, canvas, plot
from lorabatch.report.load import InferRun, Run, TrainRun
from lorabatch.report.words import Words

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ELEMENT_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "int8": 1}
SMALL = 9  # points, of a label
Place = tuple[Run, tuple[float, float]]  # a run, and its ``position``


def position(run: Run) -> tuple[float, float] | None:
    """(flop/byte, flop/s) of a run on the roofline; None where it was not measured.

    Training reads the frozen weights twice per block, forward and backward: 4 flop per parameter
    and token over 2 reads. Decoding: the flops and the bytes of its own records.
    """
    if isinstance(run, TrainRun):
        achieved, size = run.achieved_flops_per_s, ELEMENT_BYTES.get(str(run.record.get("dtype")))
        block = run.config.get("block_tokens")
        return (2.0 * block / size, achieved) if achieved and size and block else None
    if not isinstance(run, InferRun):
        return None
    share, bandwidth = run.metrics.mbu, run.metrics.measured_bytes_per_s
    flops = run.achieved_flops_per_s
    return (flops / (share * bandwidth), flops) if share and bandwidth and flops else None


def roofline_plots(words: Words, runs: Sequence[Run]) -> list[Plot]:
    """One plot for the runs of one machine; none where machines differ or a ceiling is missing."""
    places = [(run, place) for run in runs if (place := position(run)) is not None]
    bandwidth, peaks = _bandwidth(runs), _peaks(runs)
    hosts = {str(run.environment.get("host")) for run in runs}
    if not places or not bandwidth or not peaks or len(hosts) > 1:
        return []
    with canvas(words, height=3.6) as (figure, (panel,)):
        _draw_roofs(words, panel, peaks, bandwidth, places)
        panel.margins(y=0.12)
        for i, (run, (x, y)) in enumerate(places):
            marker, colour = "o" if isinstance(run, InferRun) else "s", COLOURS[i % len(COLOURS)]
            panel.plot([x], [y / 1e9], marker, markersize=8, color=colour, label=run.label)
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        for axis in (panel.xaxis, panel.yaxis):
            axis.set_major_formatter(lambda value, _: words.number(value, 0 if value >= 1 else 3))
        panel.set_xlabel(words("axis_intensity"))
        panel.set_ylabel(words("axis_gflops"))
        return [plot(words, figure, panel, "roofline", len(places))]


def _bandwidth(runs: Sequence[Run]) -> float:
    """The ceiling of memory; 0 where none was measured."""
    decoded = [run.metrics for run in runs if isinstance(run, InferRun)]
    return max((metrics.measured_bytes_per_s or 0.0 for metrics in decoded), default=0.0)


def _peaks(runs: Sequence[Run]) -> dict[str, float]:
    """The ceiling of arithmetic of each type that the runs' products have."""
    peaks: dict[str, float] = {}
    for run in runs:
        ceiling = run.metrics.cold_flops_per_s or 0.0
        peaks[run.precision] = max(peaks.get(run.precision, 0.0), ceiling)
    return {name: peak for name, peak in peaks.items() if peak}


def _draw_roofs(
    words: Words, panel: Axes, peaks: Mapping[str, float], bandwidth: float, places: Sequence[Place]
) -> None:
    for dtype, peak in peaks.items():
        ridge = peak / bandwidth
        left, right = ridge / 256, max(8 * ridge, *(2 * x for _, (x, _) in places))
        roof = [(left, bandwidth * left / 1e9), (ridge, peak / 1e9), (right, peak / 1e9)]
        panel.plot(*zip(*roof, strict=True), color=INK, linewidth=1.5)
        label = f"{dtype}: {words.quantity(peak, 'flop/s')}"
        panel.annotate(
            label,
            (right, peak / 1e9),
            xytext=(0, 2),
            textcoords="offset points",
            ha="right",
            va="bottom",
            fontsize=SMALL,
        )
    panel.annotate(
        words.quantity(bandwidth, "bytes/s"),
        (left, bandwidth * left / 1e9),
        xytext=(10, 0),
        textcoords="offset points",
        va="center",
        fontsize=SMALL,
    )
