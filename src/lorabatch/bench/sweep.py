"""What ``lorabatch bench train`` and ``bench infer`` share: the model's surroundings, the levels of
a sweep, table and file."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lorabatch.bench.scaling import bench_record, sweep
from lorabatch.config_measure import BenchConfig
from lorabatch.machine.device import TYPE_NAMES, choose_device, choose_dtype, choose_threads
from lorabatch.machine.environment import gpu_description
from lorabatch.machine.waits import Watch, disturbed
from lorabatch.model import hub, load
from lorabatch.model.cost import ABOVE
from lorabatch.progress import rounded
from lorabatch.records import write_json
from lorabatch.schema import Fields, Record

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Measure = Callable[[int], Mapping[str, float | None]]  # batch size -> the metrics of one repetition
COLUMNS = {  # key of a point -> head; of an estimate its median
    "tokens_per_s": "tokens/s",
    "batch_latency_ms": "batch ms",
    "step_ms": "step ms",
    "weak_tokens_per_s": "weak tokens/s",
    "ceiling_tokens_per_s": "ceiling",
}
LAWS = {
    "serial_share": "the same work (Amdahl)",
    "weak_serial_share": "work that grows with the threads (Gustafson)",
}


@dataclass(frozen=True)
class Bench:
    config: BenchConfig
    source: hub.ModelSource
    model_config: PretrainedConfig
    device: torch.device
    dtype: torch.dtype
    threads: int

    @classmethod
    def prepare(cls, config: BenchConfig) -> Bench:
        hub.prepare_environment()
        source = hub.find_model(config.base_model)
        device, threads = choose_device(no_cuda=config.no_cuda), choose_threads(config.threads)
        return cls(
            config,
            source,
            load.load_config(source.path),
            device,
            choose_dtype(config.dtype, device),
            threads,
        )

    @property
    def sweep(self) -> str:
        return "threads" if self.config.threads_sweep else "batch_size"

    @property
    def sizes(self) -> list[int]:
        """Every batch size that will be asked for."""
        first = self.config.batch_sizes[0]
        return sorted(
            {first, *(first * p for p in self.config.threads_sweep)}
            if self.config.threads_sweep
            else {*self.config.batch_sizes}
        )

    def points(self, measure: Measure) -> list[Record]:
        """Of ``scaling.sweep``. Numbers of threads are swept twice: over the same work (strong
        scaling, the plain names), then over work that grows with them (weak scaling,
        ``weak_tokens_per_s``). The first run of each level warms up. ``waited_share`` of a point:
        how long its repetitions waited for cores, of the time that they ran.
        """
        config, watched = self.config, _Watched(measure, by=self.sweep)
        if not config.threads_sweep:
            points = sweep(
                "batch_size",
                config.batch_sizes,
                config.repeats,
                lambda size: watched.run(self.threads, size),
            )
            return [point | watched.waited(point["batch_size"]) for point in points]
        first, levels = config.batch_sizes[0], config.threads_sweep
        points = sweep("threads", levels, config.repeats, lambda p: watched.run(p, first))
        weak = sweep("threads", levels, config.repeats, lambda p: watched.run(p, p * first))
        torch.set_num_threads(self.threads)
        return [
            point | {"weak_tokens_per_s": grown["tokens_per_s"]} | watched.waited(point["threads"])
            for point, grown in zip(points, weak, strict=True)
        ]

    def finish(self, kind: str, points: list[Record], command: list[str], **facts: object) -> int:
        """Write the record, print it as a table."""
        about = {
            "gpu": gpu_description(),
            "dtype": TYPE_NAMES[self.dtype],
            "device": str(self.device),
            "threads": self.threads,
        }
        model = {"name": self.source.name}
        record = bench_record(
            kind,
            self.sweep,
            points,
            command=command,
            config=self.config.to_dict(),
            model=model,
            **about,
            **facts,
        )
        path = Path(self.config.output)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, record)
        print("\n".join(table(record)))
        print(path)
        return 0


class _Watched:
    """Measurements with a warm-up before the first of each pair of levels. ``by``: the level that a
    watch belongs to, ``threads`` or ``batch_size``."""

    def __init__(self, measure: Measure, *, by: str) -> None:
        self._measure, self._by = measure, by
        self._warm: set[tuple[int, int]] = set()
        self._watches: dict[int, Watch] = {}

    def run(self, threads: int, size: int) -> Mapping[str, float | None]:
        torch.set_num_threads(threads)
        if (threads, size) not in self._warm:
            self._warm.add((threads, size))
            self._measure(size)
        level = threads if self._by == "threads" else size
        with self._watches.setdefault(level, Watch()):
            return self._measure(size)

    def waited(self, level: int) -> Record:
        return {"waited_share": self._watches[level].share}


def table(record: Fields) -> list[str]:
    """Heads, rows, and what follows from them."""
    name, points = record["sweep"], record["points"]
    columns = {key: head for key, head in COLUMNS.items() if key in points[0]}
    bound = ["share", "bound by"] if "bound" in points[0] else []
    heads = [name, *columns.values(), *bound, "tokens/s: 95 % from", "to"]
    rows = [heads, *(_row(point, name, columns) for point in points)]
    lines = [
        "".join(f"{text:>{max(9, len(head) + 2)}}" for head, text in zip(heads, row, strict=True))
        for row in rows
    ]
    return [*lines, *_warnings(name, points), *_conclusions(record)]


def _row(point: Fields, name: str, columns: Iterable[str]) -> list[str]:
    def shown(value: float | None) -> str:
        return "-" if value is None else rounded(value)

    medians = [
        point[key]["median"] if isinstance(point[key], dict) else point[key] for key in columns
    ]
    bound = [f"{point['share_of_ceiling']:.0%}", point["bound"]] if "bound" in point else []
    ends = (point["tokens_per_s"][end] for end in ("low", "high"))
    return [str(point[name]), *map(shown, medians), *bound, *map(shown, ends)]


def _warnings(name: str, points: Sequence[Fields]) -> Iterator[str]:
    if any(point.get("share_of_ceiling", 0) > 1 for point in points):
        yield f"faster than the ceiling: {ABOVE}"
    waited = [
        f"{point[name]} ({point['waited_share']:.0%})"
        for point in points
        if disturbed(point.get("waited_share"))
    ]
    if waited:
        yield (
            f"others had the cores at {name} {', '.join(waited)} (waited, of the time computed): "
            "these rates are too low"
        )


def _conclusions(record: Fields) -> Iterator[str]:
    if record.get("no_conclusion"):
        what = "serial share" if record["sweep"] == "threads" else "knee"
        yield f"{what}: {record['no_conclusion']}"
    if record.get("knee") is not None:
        yield (
            f"knee: beyond {record['knee']} at once a doubling brings less than 1.5 times the "
            "throughput"
        )
    for key, law in LAWS.items():
        if record.get(key) is not None:
            yield f"serial share, {law}: {record[key]:.1%}"
