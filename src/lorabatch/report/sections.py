"""The outline of a report: which sections there are and what stands in each."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from lorabatch.config import InferConfig, TrainConfig
from lorabatch.records import RUN_FILES
from lorabatch.report import figures, figures_measure, tables
from lorabatch.report.advice import advice
from lorabatch.report.blocks import Block, Bullets, Code, Document, Example, Examples, KeyFigure, KeyFigures, Paragraph, Section
from lorabatch.report.load import Bench, InferRun, Run, TrainRun
from lorabatch.report.pairing import Pairing, pairings, spread
from lorabatch.report.threats import threats
from lorabatch.report.words import Words

MAX_EXAMPLES = 12
MAX_CHARACTERS = 800  # of a prompt or completion that is shown
MAX_FAILURES = 20
LAWS = {"strong": "serial_share", "weak": "weak_serial_share"}


def document(words: Words, runs: Sequence[TrainRun | InferRun], benches: Sequence[Bench] = (), *, grid_g_per_kwh: float = 0.0) -> Document:
    """The whole report in one language, what was found before how it was found. Pure: no clock, no disk."""
    trained = [run for run in runs if isinstance(run, TrainRun)]
    inferred = [run for run in runs if isinstance(run, InferRun)]
    changes = advice(words, runs, benches)
    sections = [
        Section("summary", words("summary"), _summary(words, runs, trained, inferred)),
        Section("advice", words("advice"), [Bullets(changes) if changes else Paragraph(words("no_advice"))]),
        *_results(words, trained, inferred),
        *_examples(words, inferred),
        *_sweeps(words, benches),
        Section("efficiency", words("efficiency"), _efficiency(words, trained, inferred, grid_g_per_kwh)),
        *_failures(words, inferred),
        *_methodology(words, trained, inferred),
        Section("environment", words("environment"), [tables.environment(words, runs)]),
        Section("threats", words("threats"), [Bullets(threats(words, trained, inferred))]),
        Section("reproduce", words("reproduce"), _reproduction(words, runs, benches)),
    ]
    return Document(words.language, words("title"), words("contents"), sections)


def _summary(words: Words, runs: Sequence[Run], trained: Sequence[TrainRun], inferred: Sequence[InferRun]) -> list[Block]:
    lines = [_trained(words, run) for run in trained] + [_inferred(words, run) for run in inferred]
    for run in runs:
        if run.status != "completed":
            reason = run.record.get("error") or run.record.get("signal")
            lines.append(words("ended", run=run.label, status=tables.status(words, run), error=f" ({reason})" if reason else ""))
    key = [_key_training(words, run) for run in trained] + [_key_inference(words, run) for run in inferred]
    return [Bullets(lines), KeyFigures([figure for pair in key for figure in pair]), tables.overview(words, runs)]


def _machine(words: Words, run: Run) -> str:
    gpu = run.record.get("gpu") or {}
    return str(gpu.get("name") or run.environment.get("cpu") or words("unknown"))


def _base(words: Words, run: Run) -> str:
    return str(run.model.get("name") or run.config.get("base_model") or words("unknown"))


def _trained(words: Words, run: TrainRun) -> str:
    trainable, base = run.model.get("trainable_params"), run.model.get("base_params")
    documents = ((run.record.get("data") or {}).get("train") or {}).get("documents")
    return words(
        "trained",
        run=run.label,
        rank=run.config.get("lora_r"),
        base=_base(words, run),
        trainable=words.number(trainable),
        share=words.quantity(run.model.get("trainable_share"), "share"),
        total=words.number(trainable + base if trainable is not None and base is not None else None),
        documents=words.number(documents),
        steps=words.number(len(run.steps)),
        machine=_machine(words, run),
    )


def _inferred(words: Words, run: InferRun) -> str:
    return words(
        "inferred",
        run=run.label,
        completed=words.number(sum(c.error is None for c in run.completions)),
        base=_base(words, run),
        adapter=words("with_adapter", adapter=run.adapter) if run.adapter else words("without_adapter"),
        batch=run.config.get("batch_size"),
        new=run.config.get("max_new_tokens"),
        machine=_machine(words, run),
    )


def _key_training(words: Words, run: TrainRun) -> list[KeyFigure]:
    before, after, rate = run.metric("bits_per_byte_before"), run.metric("bits_per_byte"), run.metric("tokens_per_s")
    change, note = words("not_measured"), ""
    if before and after is not None:
        change = f"{words.number(before, 4)} → {words.number(after, 4)}"
        share = words.quantity((after - before) / before, "share")
        note = words("key_bits_note", difference=words.number(after - before, 4), share=share, before=words.number(before, 4))
    step = words("key_train_note", step=words.quantity(run.metric("p50_step_ms"), "ms")) if rate is not None else ""
    return [
        KeyFigure(words("key_bits", run=run.label), change, note),
        KeyFigure(words("key_train", run=run.label), words.quantity(rate, "tokens/s"), step),
    ]


def _key_inference(words: Words, run: InferRun) -> list[KeyFigure]:
    rate, time = run.metric("output_throughput"), run.metric("p50_e2el_ms")
    whole, startup = words.quantity(run.metric("tokens_per_s_including_startup"), "tokens/s"), words.quantity(run.metric("startup_s"), "s")
    rate_note = words("key_output_note", whole=whole, startup=startup) if rate is not None else ""
    time_note = words("key_latency_note", p95=words.quantity(run.metric("p95_e2el_ms"), "ms")) if time is not None else ""
    return [
        KeyFigure(words("key_output", run=run.label), words.quantity(rate, "tokens/s"), rate_note),
        KeyFigure(words("key_latency", run=run.label), words.quantity(time, "ms"), time_note),
    ]


def _methodology(words: Words, trained: Sequence[TrainRun], inferred: Sequence[InferRun]) -> list[Section]:
    commands = "\n".join(command_line(run) for run in (*trained, *inferred))
    configuration: list[Block] = [Code(commands), Paragraph(words("configuration_note"))]
    if trained:
        configuration.append(tables.settings(words, trained, TrainConfig))
    if inferred:
        configuration.append(tables.settings(words, inferred, InferConfig))
    data = tables.data(words, trained)
    measured = Bullets([words(key) for key in ("how_rates", "how_latency", "how_quality", "how_missing")])
    return [
        Section("methodology", words("methodology")),
        Section("measurement", words("measurement"), [measured], level=3),
        Section("data", words("data"), [data or Paragraph(words("no_data"))], level=3),
        Section("configuration", words("configuration"), configuration, level=3),
    ]


def _results(words: Words, trained: Sequence[TrainRun], inferred: Sequence[InferRun]) -> list[Section]:
    sections = [Section("results", words("results"))]
    if trained:
        plots = figures.training_plots(words, trained)
        sections.append(Section("training", words("training"), [*plots[:1], tables.training(words, trained), *plots[1:]], level=3))
    if inferred:
        blocks: list[Block] = [tables.inference(words, inferred), tables.latency(words, inferred)]
        sections.append(Section("inference", words("inference"), [*blocks, *figures.latency_plots(words, inferred)], level=3))
    return sections


def _examples(words: Words, inferred: Sequence[InferRun]) -> list[Section]:
    found = pairings(inferred)
    if found:
        return [Section("examples", words("examples"), [block for pairing in found for block in _pair_blocks(words, pairing)])]
    answered = [(run, [c for c in run.completions if c.error is None]) for run in inferred]
    run, completions = next(((run, completions) for run, completions in answered if completions), (None, []))
    if run is None:
        return []
    shown = spread(completions, MAX_EXAMPLES)
    items = [Example(c.id, _clipped(words, c.prompt), [(run.label, _clipped(words, c.text))]) for c in shown]
    note = words("no_pairs", shown=len(shown), count=words.number(len(completions)), run=run.label)
    return [Section("examples", words("examples_single"), [Paragraph(note), Examples(words("prompt"), items)])]


def _pair_blocks(words: Words, pairing: Pairing) -> list[Block]:
    shown = spread(pairing.pairs, MAX_EXAMPLES)
    heads = words("before", run=pairing.base.label), words("after", run=pairing.tuned.label)
    note = words(
        "pairs",
        shown=len(shown),
        count=words.number(len(pairing.pairs)),
        same=words.number(sum(before.text == after.text for before, after in pairing.pairs)),
        base=pairing.base.label,
        tuned=f"{pairing.tuned.label} ({pairing.tuned.adapter})",
    )
    items = [
        Example(b.id, _clipped(words, b.prompt), [(heads[0], _clipped(words, b.text)), (heads[1], _clipped(words, a.text))])
        for b, a in shown
    ]
    return [Paragraph(note), Examples(words("prompt"), items)]


def _clipped(words: Words, text: str) -> str:
    text = text.strip()
    if len(text) > MAX_CHARACTERS:
        return text[:MAX_CHARACTERS] + " " + words("more_characters", n=words.number(len(text) - MAX_CHARACTERS))
    return text or words("empty")


def _efficiency(words: Words, trained: Sequence[TrainRun], inferred: Sequence[InferRun], grid_g_per_kwh: float) -> list[Block]:
    runs: list[Run] = [*trained, *inferred]
    timed = [tables.phases(words, trained)] if trained else []
    timed += [tables.inference_phases(words, inferred)] if inferred else []
    note = Paragraph(words("co2e_note", factor=words.number(grid_g_per_kwh)))
    reasons: dict[str, list[str]] = {}  # most runs lack the same figures for the same reasons: said once
    for run in runs:
        if lacking := (run.metrics or {}).get("missing"):
            reasons.setdefault("; ".join(map(words.reason, dict.fromkeys(lacking.values()))), []).append(run.label)
    missing = [Paragraph(words("missing", runs=", ".join(labels), reasons=text)) for text, labels in reasons.items()]
    drawn = [*figures_measure.roofline_plots(words, runs), *figures.system_plots(words, runs)]
    return [*timed, *drawn[:1], tables.efficiency(words, runs, grid_g_per_kwh=grid_g_per_kwh), note, *missing, *drawn[1:]]


def _sweeps(words: Words, benches: Sequence[Bench]) -> list[Section]:
    if not benches:
        return []
    blocks: list[Block] = [Paragraph(words("sweep_note"))]
    for number, bench in enumerate(benches):
        environment = bench.record.get("environment") or {}
        machine = f"{environment.get('host')}, {(bench.record.get('gpu') or {}).get('name') or environment.get('cpu')}"
        plots = figures_measure.sweep_plots(words, bench, number)
        where = words("sweep_where", run=bench.label, kind=bench.record["kind"], machine=machine)
        blocks += [Paragraph(where), *plots, *tables.sweep(words, bench)]
        if bench.record.get("weak_serial_share") is not None:
            shares = {law: words.quantity(bench.record.get(key), "share") for law, key in LAWS.items()}
            blocks.append(Paragraph(words("sweep_laws", **shares)))
    return [Section("sweeps", words("sweeps"), blocks)]


def _failures(words: Words, inferred: Sequence[InferRun]) -> list[Section]:
    failed = [(run.label, c.id, c.error) for run in inferred for c in run.completions if c.error is not None]
    if not failed:
        return []
    shown = failed[:MAX_FAILURES]
    note = words("failures_note", shown=len(shown), count=words.number(len(failed)))
    return [Section("failures", words("failures"), [Paragraph(note), tables.failures(words, shown)])]


def _reproduction(words: Words, runs: Sequence[Run], benches: Sequence[Bench]) -> list[Block]:
    commits = dict.fromkeys(git["commit"] for run in runs if (git := run.environment.get("git")))
    lines = [f"git checkout {commit}" for commit in commits] + [command_line(run) for run in runs]
    lines += [shlex.join(str(word) for word in bench.record.get("command") or []) for bench in benches]
    files = Paragraph(words("reproduce_data", files=", ".join(RUN_FILES)))
    return [Paragraph(words("reproduce_note")), Code("\n".join(lines)), files]


def command_line(run: Run) -> str:
    """The command as it was run, for a shell. The scripts of ``src/`` record their name and the command they stand for."""
    program, *words = [str(word) for word in run.record["command"]] or ["lorabatch"]
    if program.endswith(".py"):
        return shlex.join(["python", f"src/{program}", *words[1:]])
    return shlex.join([program, *words])
