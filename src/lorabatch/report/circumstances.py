"""Tables of what ran, where, with which settings and on which data."""

from __future__ import annotations

from collections.abc import Sequence

from lorabatch.errors import visible
from lorabatch.metrics.schema import DataCounts
from lorabatch.report.blocks import Block, Cell, Mono, Paragraph, Table
from lorabatch.report.load import Run, TrainRun
from lorabatch.report.tables import Row, run_table
from lorabatch.report.words import Words
from lorabatch.schema import Fields, Record
from lorabatch.settings import Settings

EXECUTION = ("dtype", "device", "threads", "backend")


def overview(words: Words, runs: Sequence[Run]) -> Table:
    def moment(run: Run, name: str) -> str:
        return _known(words, run.record.get(name)).replace("T", " ").replace("+00:00", " UTC")

    rows: list[Row[Run]] = [
        (words("kind"), lambda run: words(run.record["kind"])),
        (words("status"), lambda run: status(words, run)),
        (words("host"), lambda run: _known(words, run.environment.get("host"))),
        (words("started"), lambda run: moment(run, "started_at")),
        (words("finished"), lambda run: moment(run, "finished_at")),
        (words("folder"), lambda run: Mono(visible(str(run.path)))),
    ]
    return run_table(words, runs, rows, numeric=False)


def _known(words: Words, value: object) -> str:
    return words("unknown") if value is None else str(value)


def status(words: Words, run: Run) -> str:
    known = ("completed", "failed", "interrupted", "running")
    return words(f"{run.status}_status") if run.status in known else run.status


def environment(words: Words, runs: Sequence[Run]) -> Table:
    """One column for each distinct environment, headed by the runs that share it."""
    columns: dict[tuple[tuple[str, Cell], ...], list[str]] = {}
    for run in runs:
        column = (*_machine(words, run), *_software(words, run))
        columns.setdefault(column, []).append(run.label)
    names = list(dict.fromkeys(name for column in columns for name, _ in column))
    body: list[list[Cell]] = [
        [name, *(dict(column).get(name, words("unknown")) for column in columns)] for name in names
    ]
    heads = [", ".join(labels) for labels in columns.values()]
    return Table([words("quantity"), *heads], body, numeric=False)


def _machine(words: Words, run: Run) -> list[tuple[str, Cell]]:
    env, gpu = run.environment, run.record.get("gpu") or {}
    usable, logical = env.get("usable_cores", "?"), env.get("logical_cores", "?")
    return [
        *((words(name), _known(words, env.get(name))) for name in ("host", "os", "cpu")),
        (words("cores"), words("cores_value", usable=usable, logical=logical)),
        (words("memory"), words.quantity(env.get("memory_bytes"), "bytes")),
        (words("gpu"), _gpu(words, gpu) if gpu else words("no_gpu")),
    ]


def _gpu(words: Words, gpu: Fields) -> str:
    memory = words.quantity(gpu.get("memory_bytes"), "bytes")
    return (
        f"{gpu.get('name')}, {memory}, compute capability {gpu.get('capability')}, CUDA "
        f"{gpu.get('cuda')}"
    )


def _software(words: Words, run: Run) -> list[tuple[str, Cell]]:
    env, parts = run.environment, {name: run.record.get(name) for name in EXECUTION}
    unknown = None in parts.values()
    packages, slurm = env.get("packages") or {}, env.get("slurm") or {}
    return [
        (words("execution"), words("unknown") if unknown else words("execution_value", **parts)),
        ("Python", _known(words, env.get("python"))),
        *((name, version or words("unknown")) for name, version in packages.items()),
        (words("commit"), _commit(words, env.get("git"))),
        (words("slurm"), ", ".join(f"{k} {v}" for k, v in slurm.items()) or words("no_slurm")),
    ]


def _commit(words: Words, git: Fields | None) -> Cell:
    if not git:
        return words("no_commit")
    return words("dirty", commit=git["commit"]) if git.get("dirty") else Mono(git["commit"])


def settings(words: Words, runs: Sequence[Run], config_class: type[Settings]) -> Table:
    """Settings that differ from their default in some run; a value that does is strong."""
    defaults = config_class().to_dict()
    others = [name for run in runs for name in run.config if name not in defaults]
    names = [
        name
        for name in (*defaults, *dict.fromkeys(others))
        if any(
            name not in run.config or run.config[name] != defaults.get(name, run) for run in runs
        )
    ]
    rows: list[list[Cell]] = [
        [
            Mono(name),
            _setting(words, name, defaults, defaults),
            *(_setting(words, name, run.config, defaults) for run in runs),
        ]
        for name in names
    ]
    heads = [words("setting"), words("default"), *(run.label for run in runs)]
    return Table(heads, rows, numeric=False)


def _setting(words: Words, name: str, values: Fields, defaults: Fields) -> Cell:
    if name not in values:
        return words("unknown")
    value, strong = values[name], name not in defaults or values[name] != defaults[name]
    if value is None or value == []:
        return Mono(words("not_set"), strong) if strong else words("not_set")
    if isinstance(value, bool):
        return Mono(str(value).lower(), strong)
    return Mono(" ".join(map(str, value)) if isinstance(value, list) else str(value), strong)


def data(words: Words, runs: Sequence[TrainRun]) -> Table | None:
    parts = [
        (words(f"{part}_part", run=run.label), counts)
        for run in runs
        for part in ("train", "val")
        if (counts := run.data(part))
    ]
    if not parts:
        return None
    rows: list[list[Cell]] = [
        [words(metric.name), *(words.number(metric.of(counts)) for _, counts in parts)]
        for metric in DataCounts.table("data")
    ]
    return Table([words("quantity"), *(head for head, _ in parts)], rows)


def checks(words: Words, runs: Sequence[TrainRun]) -> list[Block]:
    """What training found in its documents before it began; nothing if no run looked."""
    names = dict.fromkeys(name for run in runs for name in run.checks)
    if not names:
        return []
    rows: list[list[Cell]] = [
        [words(f"check {name}"), *(_checked(words, run.checks.get(name)) for run in runs)]
        for name in names
        if f"check {name}" in words.texts
    ]
    head = [words("data_check"), *(run.label for run in runs)]
    return [Paragraph(words("checks_note")), Table(head, rows, numeric=False)]


def _checked(words: Words, check: Record | None) -> str:
    if check is None:
        return words("checks_off")
    level = check["level"].lower()
    if check["check"] == "size":
        return words(f"size_{'ok' if level == 'ok' else 'warn'}")
    count, share = words.number(check["count"]), words.quantity(check["share"], "share")
    key = f"check_{level}" if level in ("warn", "fail") else "check_ok"
    return words(key, count=count, share=share)
