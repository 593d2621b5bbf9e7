"""The outline of a report: which sections there are and what stands in each."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from lorabatch.config import InferConfig, TrainConfig
from lorabatch.report import circumstances, figures, tables
from lorabatch.report.advice import advice
from lorabatch.report.blocks import (
    Block,
    Bullets,
    Code,
    Document,
    KeyFigure,
    KeyFigures,
    Paragraph,
    Section,
)
from lorabatch.report.boards import Board, board_sections
from lorabatch.report.evaluations import evaluation_sections
from lorabatch.report.examples import example_sections
from lorabatch.report.load import Bench, Evaluated, InferRun, Run, TrainRun
from lorabatch.report.roofline import roofline_plots
from lorabatch.report.sweeps import sweep_sections
from lorabatch.report.threats import threats
from lorabatch.report.words import Words
from lorabatch.runs import RUN_FILES

MAX_FAILURES = 20


def document(
    words: Words,
    runs: Sequence[TrainRun | InferRun],
    benches: Sequence[Bench] = (),
    boards: Sequence[Board] = (),
    evaluations: Sequence[Evaluated] = (),
    *,
    grid_g_per_kwh: float = 0.0,
) -> Document:
    """The whole report in one language, what was found before how it was found. Pure: no clock, no
    disk."""
    trained = [run for run in runs if isinstance(run, TrainRun)]
    inferred = [run for run in runs if isinstance(run, InferRun)]
    changes = advice(words, runs, benches)
    sections = [
        Section("summary", words("summary"), _summary(words, runs, trained, inferred)),
        Section(
            "advice",
            words("advice"),
            [Bullets(changes) if changes else Paragraph(words("no_advice"))],
        ),
        *_results(words, trained, inferred),
        *evaluation_sections(words, evaluations),
        *example_sections(words, inferred),
        *board_sections(words, boards),
        *sweep_sections(words, benches),
        Section(
            "efficiency", words("efficiency"), _efficiency(words, trained, inferred, grid_g_per_kwh)
        ),
        *_failures(words, inferred),
        *_methodology(words, trained, inferred),
        Section("environment", words("environment"), [circumstances.environment(words, runs)]),
        Section("threats", words("threats"), [Bullets(threats(words, trained, inferred))]),
        Section("reproduce", words("reproduce"), _reproduction(words, runs, benches, evaluations)),
    ]
    return Document(words.language, words("title"), words("contents"), sections)


def _summary(
    words: Words, runs: Sequence[Run], trained: Sequence[TrainRun], inferred: Sequence[InferRun]
) -> list[Block]:
    lines = [_trained(words, run) for run in trained] + [_inferred(words, run) for run in inferred]
    lines += [_ended(words, run) for run in runs if run.status != "completed"]
    key = [_key_training(words, run) for run in trained] + [
        _key_inference(words, run) for run in inferred
    ]
    return [
        Bullets(lines),
        KeyFigures([figure for pair in key for figure in pair]),
        circumstances.overview(words, runs),
    ]


def _ended(words: Words, run: Run) -> str:
    reason = run.record.get("error") or run.record.get("signal")
    error, status = f" ({reason})" if reason else "", circumstances.status(words, run)
    return words("ended", run=run.label, status=status, error=error)


def _machine(words: Words, run: Run) -> str:
    gpu = run.record.get("gpu") or {}
    return str(gpu.get("name") or run.environment.get("cpu") or words("unknown"))


def _base(words: Words, run: Run) -> str:
    name = str(run.model.get("name") or run.config.get("base_model") or words("unknown"))
    file = run.model.get("converted_from")
    return words("converted", name=name, file=file) if file else name


def _trained(words: Words, run: TrainRun) -> str:
    trainable, base = run.model.get("trainable_params"), run.model.get("base_params")
    data = run.data("train")
    return words(
        "trained",
        run=run.label,
        rank=run.config.get("lora_r"),
        base=_base(words, run),
        trainable=words.number(trainable),
        share=words.quantity(run.model.get("trainable_share"), "share"),
        total=words.number(
            trainable + base if trainable is not None and base is not None else None
        ),
        documents=words.number(data.documents if data else None),
        steps=words.number(len(run.steps)),
        machine=_machine(words, run),
    )


def _inferred(words: Words, run: InferRun) -> str:
    return words(
        "inferred",
        run=run.label,
        completed=words.number(sum(c.error is None for c in run.completions)),
        base=_base(words, run),
        adapter=words("with_adapter", adapter=run.adapter)
        if run.adapter
        else words("without_adapter"),
        batch=run.config.get("batch_size"),
        new=run.config.get("max_new_tokens"),
        machine=_machine(words, run),
    )


def _key_training(words: Words, run: TrainRun) -> list[KeyFigure]:
    before, after = run.metrics.bits_per_byte_before, run.metrics.bits_per_byte
    rate, step_ms = run.metrics.tokens_per_s, run.metrics.step_ms.p50
    change, note = words("not_measured"), ""
    if before and after is not None:
        change = f"{words.number(before, 4)} → {words.number(after, 4)}"
        share = words.quantity((after - before) / before, "share")
        note = words(
            "key_bits_note",
            difference=words.number(after - before, 4),
            share=share,
            before=words.number(before, 4),
        )
    step = "" if rate is None else words("key_train_note", step=words.quantity(step_ms, "ms"))
    return [
        KeyFigure(words("key_bits", run=run.label), change, note),
        KeyFigure(words("key_train", run=run.label), words.quantity(rate, "tokens/s"), step),
    ]


def _key_inference(words: Words, run: InferRun) -> list[KeyFigure]:
    metrics = run.metrics
    rate, time = metrics.output_throughput, metrics.e2el_ms.p50
    whole = words.quantity(metrics.tokens_per_s_including_startup, "tokens/s")
    startup, p95 = words.quantity(metrics.startup_s, "s"), words.quantity(metrics.e2el_ms.p95, "ms")
    rate_note = "" if rate is None else words("key_output_note", whole=whole, startup=startup)
    time_note = "" if time is None else words("key_latency_note", p95=p95)
    return [
        KeyFigure(words("key_output", run=run.label), words.quantity(rate, "tokens/s"), rate_note),
        KeyFigure(words("key_latency", run=run.label), words.quantity(time, "ms"), time_note),
    ]


def _methodology(
    words: Words, trained: Sequence[TrainRun], inferred: Sequence[InferRun]
) -> list[Section]:
    commands = "\n".join(command_line(run) for run in (*trained, *inferred))
    configuration: list[Block] = [Code(commands), Paragraph(words("configuration_note"))]
    if trained:
        configuration.append(circumstances.settings(words, trained, TrainConfig))
    if inferred:
        configuration.append(circumstances.settings(words, inferred, InferConfig))
    data = circumstances.data(words, trained)
    measured = Bullets(
        [words(key) for key in ("how_rates", "how_latency", "how_quality", "how_missing")]
    )
    return [
        Section("methodology", words("methodology")),
        Section("measurement", words("measurement"), [measured], level=3),
        Section(
            "data",
            words("data"),
            [data or Paragraph(words("no_data")), *circumstances.checks(words, trained)],
            level=3,
        ),
        Section("configuration", words("configuration"), configuration, level=3),
    ]


def _results(
    words: Words, trained: Sequence[TrainRun], inferred: Sequence[InferRun]
) -> list[Section]:
    sections = [Section("results", words("results"))]
    if trained:
        plots = figures.training_plots(words, trained)
        sections.append(
            Section(
                "training",
                words("training"),
                [*plots[:1], tables.training(words, trained), *plots[1:]],
                level=3,
            )
        )
    if inferred:
        blocks: list[Block] = [tables.inference(words, inferred), tables.latency(words, inferred)]
        sections.append(
            Section(
                "inference",
                words("inference"),
                [*blocks, *figures.latency_plots(words, inferred)],
                level=3,
            )
        )
    return sections


def _efficiency(
    words: Words, trained: Sequence[TrainRun], inferred: Sequence[InferRun], grid_g_per_kwh: float
) -> list[Block]:
    runs: list[Run] = [*trained, *inferred]
    timed = [tables.phases(words, trained)] if trained else []
    timed += [tables.inference_phases(words, inferred)] if inferred else []
    note = Paragraph(words("co2e_note", factor=words.number(grid_g_per_kwh)))
    drawn = [*roofline_plots(words, runs), *figures.system_plots(words, runs)]
    return [
        *timed,
        *drawn[:1],
        tables.efficiency(words, runs, grid_g_per_kwh=grid_g_per_kwh),
        note,
        *_missing(words, runs),
        *drawn[1:],
    ]


def _missing(words: Words, runs: Sequence[Run]) -> list[Paragraph]:
    """Most runs lack the same figures for the same reasons: said once."""
    reasons: dict[str, list[str]] = {}
    for run in runs:
        if lacking := run.system.missing:
            text = "; ".join(map(words.reason, dict.fromkeys(lacking.values())))
            reasons.setdefault(text, []).append(run.label)
    return [
        Paragraph(words("missing", runs=", ".join(labels), reasons=text))
        for text, labels in reasons.items()
    ]


def _failures(words: Words, inferred: Sequence[InferRun]) -> list[Section]:
    failed = [
        (run.label, c.id, c.error)
        for run in inferred
        for c in run.completions
        if c.error is not None
    ]
    if not failed:
        return []
    shown = failed[:MAX_FAILURES]
    note = words("failures_note", shown=len(shown), count=words.number(len(failed)))
    return [
        Section("failures", words("failures"), [Paragraph(note), tables.failures(words, shown)])
    ]


def _reproduction(
    words: Words, runs: Sequence[Run], benches: Sequence[Bench], evaluations: Sequence[Evaluated]
) -> list[Block]:
    commits = dict.fromkeys(git["commit"] for run in runs if (git := run.environment.get("git")))
    lines = [f"git checkout {commit}" for commit in commits] + [command_line(run) for run in runs]
    lines += [
        shlex.join(str(word) for word in bench.record.get("command") or []) for bench in benches
    ]
    lines += [shlex.join(map(str, evaluation.command)) for evaluation in evaluations]
    files = Paragraph(words("reproduce_data", files=", ".join(RUN_FILES)))
    return [Paragraph(words("reproduce_note")), Code("\n".join(lines)), files]


def command_line(run: Run) -> str:
    """The command as it was run, for a shell. The scripts of ``src/`` record their name and the
    command they stand for."""
    program, *words = [str(word) for word in run.record["command"]] or ["lorabatch"]
    if program.endswith(".py"):
        return shlex.join(["python", f"src/{program}", *words[1:]])
    return shlex.join([program, *words])
