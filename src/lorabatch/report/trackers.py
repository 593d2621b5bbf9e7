"""A run's events and system samples in the files of experiment trackers, after the fact: where
training has no internet, nothing is sent; where there is some, the whole curve is replayed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import datetime
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from lorabatch.errors import UnavailableError
from lorabatch.records import read_json, read_jsonl
from lorabatch.schema import Fields, Record


class Point(NamedTuple):
    """One value of a curve. ``step``: of training, of system samples whole seconds."""

    name: str  # train/loss, eval/bits_per_byte, system/cpu_percent, …
    step: int
    value: float
    time_s: float  # since 1970; of events from the durations that they record


class History(NamedTuple):
    name: str
    settings: Record
    points: list[Point]


def history(run: Path) -> History:
    """Of one run folder, finished or not. DataError for damaged records."""
    record = read_json(run / "run.json")
    start_s = datetime.fromisoformat(record["started_at"]).timestamp()
    points = list(_events(run / "events.jsonl", start_s))
    for sample in _lines(run / "system.jsonl"):
        time_s = start_s + sample["t_s"]
        points += _numbers("system", int(sample["t_s"]), sample, time_s)
    return History(run.resolve().name, record["config"], points)


def _events(path: Path, time_s: float) -> Iterator[Point]:
    for event in _lines(path):
        spent = (
            event.get("step_ms", 0.0) / 1e3 + event.get("eval_s", 0.0) + event.get("save_s", 0.0)
        )
        time_s += spent
        if event["event"] in ("step", "eval"):
            group = "train" if event["event"] == "step" else "eval"
            yield from _numbers(group, event["step"], event, time_s)


def _lines(path: Path) -> list[Record]:
    return list(read_jsonl(path)) if path.exists() else []


def _numbers(group: str, step: int, record: Fields, time_s: float) -> Iterator[Point]:
    for name, value in record.items():
        if isinstance(value, (int, float)) and name not in ("step", "t_s"):
            yield Point(f"{group}/{name}", step, float(value), time_s)


def to_tensorboard(found: History, output: str) -> str:
    """An event file in a folder of its own below ``output``."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    folder = Path(output) / found.name
    writer = EventFileWriter(str(folder))
    for point in found.points:
        value = Summary.Value(tag=point.name, simple_value=point.value)
        event = Event(wall_time=point.time_s, step=point.step, summary=Summary(value=[value]))
        writer.add_event(event)
    writer.close()
    return f"{folder}; look with: tensorboard --logdir {output}"


def to_mlflow(found: History, output: str) -> str:
    """A run of the experiment "lorabatch" in the tracking store ``output``: an address, or a folder
    for a database file."""
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param

    store = output
    if "://" not in output:
        Path(output).mkdir(parents=True, exist_ok=True)
        store = f"sqlite:///{output}/mlflow.db"
    client = MlflowClient(tracking_uri=store)
    experiment = client.get_experiment_by_name("lorabatch")
    number = experiment.experiment_id if experiment else client.create_experiment("lorabatch")
    run = client.create_run(number, run_name=found.name).info.run_id
    params = [Param(name, str(value)[:6000]) for name, value in found.settings.items()]
    client.log_batch(run, params=params)
    metrics = [Metric(p.name, p.value, int(p.time_s * 1e3), p.step) for p in found.points]
    for first in range(0, len(metrics), 1000):  # the most that one call takes
        client.log_batch(run, metrics=metrics[first : first + 1000])
    client.set_terminated(run)
    return f"{store}; look with: mlflow ui --backend-store-uri {store}"


def to_wandb(found: History, output: str) -> str:
    """A run of the project "lorabatch"; ``output`` holds its files (WANDB_MODE=offline: only
    those)."""
    import wandb

    Path(output).mkdir(parents=True, exist_ok=True)
    run = wandb.init(project="lorabatch", name=found.name, dir=output, config=found.settings)
    # one axis a group: its steps are not those of the others
    for group in ("train", "eval", "system"):
        run.define_metric(f"{group}/step")
        run.define_metric(f"{group}/*", step_metric=f"{group}/step")
    for (group, step), points in groupby(found.points, lambda p: (p.name.split("/")[0], p.step)):
        run.log({f"{group}/step": step} | {p.name: p.value for p in points})
    run.finish()
    return f"{output}; look with: wandb sync, or at the project lorabatch"


TRACKERS: dict[str, Callable[[History, str], str]] = {
    "tensorboard": to_tensorboard,
    "mlflow": to_mlflow,
    "wandb": to_wandb,
}


def send(run: Path, tracker: str, output: str) -> str:
    """Replay one run and return where it can be seen. UnavailableError without the tracker's
    package."""
    try:
        return TRACKERS[tracker](history(run), output)
    except ModuleNotFoundError as error:
        raise UnavailableError(
            f"{tracker} is not installed here (no module {error.name})",
            fix=f"run: pip install {tracker}",
        ) from None
