"""Run folders -> typed records: all that a report knows.

A run that was killed or failed has no ``metrics.json``; it still loads, and its figures are None.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TypeVar, cast

from lorabatch.bench.scaling import read_bench
from lorabatch.errors import DataError, visible
from lorabatch.evaluate.figures import score_of
from lorabatch.evaluate.results import read_items, read_result
from lorabatch.metrics.inference import tpot_ms
from lorabatch.metrics.schema import DataCounts, InferMetrics, SystemMetrics, TrainMetrics
from lorabatch.records import read_json, read_jsonl
from lorabatch.schema import Fields, Record

T = TypeVar("T")


@dataclass(frozen=True)
class Step:
    step: int
    loss: float
    lr: float
    tokens_per_s: float


@dataclass(frozen=True)
class Evaluation:
    step: int
    eval_loss: float | None  # of an evaluation that diverged
    bits_per_byte: float | None


@dataclass(frozen=True)
class Sample:
    """What the machine did, about once a second."""

    t_s: float
    cpu_percent: float | None
    rss_bytes: float | None
    gpu_util_percent: float | None
    gpu_memory_bytes: float | None
    gpu_power_w: float | None
    read_bytes_per_s: float | None
    write_bytes_per_s: float | None

    @property
    def io_bytes_per_s(self) -> float | None:
        if self.read_bytes_per_s is None or self.write_bytes_per_s is None:
            return None
        return self.read_bytes_per_s + self.write_bytes_per_s


@dataclass(frozen=True)
class Completion:
    id: str
    index: int
    prompt: str
    text: str
    output_tokens: int
    finish_reason: str | None
    ttft_ms: float | None
    e2el_ms: float | None
    truncated: str | None
    error: str | None

    @property
    def tpot_ms(self) -> float | None:
        return tpot_ms(ttft_ms=self.ttft_ms, e2el_ms=self.e2el_ms, output_tokens=self.output_tokens)


@dataclass(frozen=True, kw_only=True)
class Run:
    """What both kinds of run have. ``label`` is unique within a report."""

    label: str
    path: Path
    record: Record
    metrics: TrainMetrics | InferMetrics
    system: SystemMetrics
    samples: list[Sample]

    @property
    def status(self) -> str:
        return str(self.record["status"])

    @property
    def config(self) -> Record:
        return dict(self.record["config"])

    @property
    def environment(self) -> Record:
        return dict(self.record["environment"])

    @property
    def model(self) -> Record:
        """Name and size of the base; empty when the run ended before the model was loaded."""
        return dict(self.record.get("model") or {})

    @property
    def achieved_flops_per_s(self) -> float | None:
        """What the mathematics asked for, over the time it took: of training's steps, or of
        decoding."""
        raise NotImplementedError

    @property
    def precision(self) -> str:
        """Type of the products."""
        return "int8" if self.config.get("quantize") == "int8" else str(self.record.get("dtype"))


@dataclass(frozen=True, kw_only=True)
class TrainRun(Run):
    metrics: TrainMetrics
    steps: list[Step]
    evals: list[Evaluation]

    @property
    def achieved_flops_per_s(self) -> float | None:
        return self.metrics.train_flops_per_s

    def data(self, part: str) -> DataCounts | None:
        """``train`` or ``val``; None: there is none, or the run ended before it was read."""
        counts = (self.record.get("data") or {}).get(part)
        return DataCounts.from_dict(counts) if counts else None

    @property
    def checks(self) -> dict[str, Record]:
        """What was found in the documents, by the check's name; empty where nobody looked."""
        found = (self.record.get("data") or {}).get("checks")
        return {check["check"]: check for check in found["checks"]} if found else {}


@dataclass(frozen=True, kw_only=True)
class InferRun(Run):
    metrics: InferMetrics
    completions: list[Completion]  # in input order

    @property
    def achieved_flops_per_s(self) -> float | None:
        return self.metrics.decode_flops_per_s

    @property
    def adapter(self) -> str | None:
        """Folder of the adapter, None for the base model alone."""
        named = self.model.get("adapter") if self.model else self.config.get("adapter_dir")
        return None if named in (None, "none") else str(named)


@dataclass(frozen=True)
class Bench:
    """A sweep that ``lorabatch bench`` wrote."""

    label: str
    record: Record

    @property
    def sweep(self) -> str:
        return str(self.record["sweep"])

    @property
    def points(self) -> list[Record]:
        return list(self.record["points"])


@dataclass(frozen=True)
class Evaluated:
    """An evaluation that ended. ``changes``: (task, model) -> (id, B - A of the item's own measure)
    of each item."""

    label: str
    command: list[str]
    record: Record
    changes: dict[tuple[str, str], list[tuple[str, float]]]


def is_evaluation(path: Path) -> bool:
    return bool(_run_record(path)["kind"] == "eval")


def load_evaluations(paths: Sequence[Path]) -> list[Evaluated]:
    """Raises DataError for one that has not ended."""
    return [
        Evaluated(
            label=clean(path.resolve().name),
            command=clean(read_json(path / "run.json")["command"]),
            record=clean(read_result(path)),
            changes=_clean_changes(path),
        )
        for path in paths
    ]


def _clean_changes(path: Path) -> dict[tuple[str, str], list[tuple[str, float]]]:
    found = {}
    for task, models in read_items(path).items():
        (_, base), *others = models.items()
        for name, lines in others:
            each = [(i, _own(line) - _own(base[i])) for i, line in lines.items()]
            found[clean(task), clean(name)] = [(clean(i), change) for i, change in each]
    return found


def _own(line: Fields) -> float:
    score, size = score_of(line)
    return score / size


def load_benches(paths: Sequence[Path]) -> list[Bench]:
    """Raises DataError for a file that ``lorabatch bench`` did not write."""
    return [Bench(clean(path.stem), clean(read_bench(path))) for path in paths]


def load_runs(paths: Sequence[Path]) -> list[TrainRun | InferRun]:
    """Training runs first, each kind in the given order. Raises DataError for what is not a run
    folder."""
    folders = list({path.resolve(): path for path in paths}.values())
    records = [_run_record(path) for path in folders]
    hosts = {record["environment"].get("host") for record in records}
    names = [path.resolve().name for path in folders]
    often = Counter(names)
    runs: list[TrainRun | InferRun] = []
    for path, name, record in zip(folders, names, records, strict=True):
        label = name if often[name] == 1 else str(path)
        if len(hosts) > 1:
            label += f" @ {record['environment'].get('host')}"
        runs.append(_load(path, clean(label), record))
    return sorted(runs, key=lambda run: isinstance(run, InferRun))


def _run_record(path: Path) -> Record:
    fix = "give folders that lorabatch train, infer or sweep wrote"
    if not path.is_dir():
        raise DataError("no such folder", where=path, fix=fix)
    if not (path / "run.json").is_file():
        raise DataError("not a run folder (no run.json in it)", where=path, fix=fix)
    record: Record = clean(read_json(path / "run.json"))
    return record


def _load(path: Path, label: str, record: Record) -> TrainRun | InferRun:
    file = path / "metrics.json"
    figures: Record = clean(read_json(file)) if file.exists() else {}
    common: Record = {"label": label, "path": path, "record": record}
    common["system"] = SystemMetrics.from_dict(figures)
    common["samples"] = _last_session(_read(path / "system.jsonl", Sample))
    if record["kind"] == "train":
        events = path / "events.jsonl"
        return TrainRun(
            **common,
            metrics=TrainMetrics.from_dict(figures),
            steps=_read(events, Step, event="step"),
            evals=_read(events, Evaluation, event="eval"),
        )
    return InferRun(
        **common,
        metrics=InferMetrics.from_dict(figures),
        completions=sorted(_read(path / "completions.jsonl", Completion), key=lambda c: c.index),
    )


def _read(path: Path, kind: type[T], *, event: str | None = None) -> list[T]:
    """The lines of a JSONL file as ``kind``; with ``event``, only those of that event."""
    names = [field.name for field in fields(kind)]  # type: ignore[arg-type]  # always one of the dataclasses above
    lines = (clean(line) for line in read_jsonl(path) if event is None or line["event"] == event)
    return [kind(**{name: line.get(name) for name in names}) for line in lines]


def _last_session(samples: list[Sample]) -> list[Sample]:
    """A resumed run appends a second clock that starts at zero; ``metrics.json`` covers the last
    one too."""
    starts = [i for i in range(1, len(samples)) if samples[i].t_s < samples[i - 1].t_s]
    return samples[starts[-1] :] if starts else samples


def clean(value: T) -> T:
    """A record, or part of one, with every character that steers its surroundings as a visible
    escape, so that no output format breaks on it."""
    cleaned: object = value
    if isinstance(value, str):
        cleaned = visible(value.replace("\r\n", "\n"))
    elif isinstance(value, dict):
        cleaned = {clean(k): clean(v) for k, v in value.items()}
    elif isinstance(value, list):
        cleaned = [clean(v) for v in value]
    return cast(T, cleaned)
