"""What ``lorabatch bench train`` and ``bench infer`` share: the model's surroundings, the levels of a sweep, table and file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lorabatch import hub
from lorabatch.config import BenchConfig
from lorabatch.measure.environment import gpu_description
from lorabatch.measure.roofline import ABOVE
from lorabatch.measure.scaling import bench_record, sweep
from lorabatch.measure.waits import Watch, disturbed
from lorabatch.model import load
from lorabatch.model.device import TYPE_NAMES, choose_device, choose_dtype, choose_threads
from lorabatch.records import write_json

Measure = Callable[[int], Mapping[str, float | None]]  # batch size -> the metrics of one repetition
COLUMNS = {  # key of a point -> head; of an estimate its median
    "tokens_per_s": "tokens/s",
    "batch_latency_ms": "batch ms",
    "step_ms": "step ms",
    "weak_tokens_per_s": "weak tokens/s",
    "ceiling_tokens_per_s": "ceiling",
}


@dataclass(frozen=True)
class Bench:
    config: BenchConfig
    source: hub.ModelSource
    model_config: Any
    device: torch.device
    dtype: torch.dtype
    threads: int

    @classmethod
    def prepare(cls, config: BenchConfig) -> Bench:
        hub.prepare_environment()
        source = hub.find_model(config.base_model)
        device, threads = choose_device(no_cuda=config.no_cuda), choose_threads(config.threads)
        return cls(config, source, load.load_config(source.path), device, choose_dtype(config.dtype, device), threads)

    @property
    def sweep(self) -> str:
        return "threads" if self.config.threads_sweep else "batch_size"

    @property
    def sizes(self) -> list[int]:
        """Every batch size that will be asked for."""
        first = self.config.batch_sizes[0]
        return sorted({first, *(first * p for p in self.config.threads_sweep)} if self.config.threads_sweep else {*self.config.batch_sizes})

    def points(self, measure: Measure) -> list[dict[str, Any]]:
        """Of ``measure.scaling.sweep``. Numbers of threads are swept twice: over the same work (strong scaling, the plain names),
        then over work that grows with them (weak scaling, ``weak_tokens_per_s``). The first run of each level warms up.
        ``waited_share`` of a point: how long its repetitions waited for cores, of the time that they ran.
        """
        warm: set[tuple[int, int]] = set()
        watches: dict[int, Watch] = {}

        def run(threads: int, size: int) -> Mapping[str, float | None]:
            torch.set_num_threads(threads)
            if (threads, size) not in warm:
                warm.add((threads, size))
                measure(size)
            with watches.setdefault(threads if config.threads_sweep else size, Watch()):
                return measure(size)

        config, first = self.config, self.config.batch_sizes[0]
        if not config.threads_sweep:
            points = sweep("batch_size", config.batch_sizes, config.repeats, lambda size: run(self.threads, size))
            return [point | {"waited_share": watches[point["batch_size"]].share} for point in points]
        points = sweep("threads", config.threads_sweep, config.repeats, lambda p: run(p, first))
        weak = sweep("threads", config.threads_sweep, config.repeats, lambda p: run(p, p * first))
        torch.set_num_threads(self.threads)
        return [
            point | {"weak_tokens_per_s": grown["tokens_per_s"], "waited_share": watches[point["threads"]].share}
            for point, grown in zip(points, weak, strict=True)
        ]

    def finish(self, kind: str, points: list[dict[str, Any]], command: list[str], **facts: Any) -> int:
        """Write the record, print it as a table."""
        about = {"gpu": gpu_description(), "dtype": TYPE_NAMES[self.dtype], "device": str(self.device), "threads": self.threads}
        model = {"name": self.source.name}
        record = bench_record(kind, self.sweep, points, command=command, config=self.config.to_dict(), model=model, **about, **facts)
        path = Path(self.config.output)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, record)
        print("\n".join(table(record)))
        print(path)
        return 0


def table(record: Mapping[str, Any]) -> list[str]:
    """Heads, rows, and what follows from them."""
    name = record["sweep"]
    columns = {key: head for key, head in COLUMNS.items() if key in record["points"][0]}
    heads = [name, *columns.values(), *(["share", "bound by"] if "bound" in record["points"][0] else []), "tokens/s: 95 % from", "to"]

    def shown(value: float | None) -> str:
        return "-" if value is None else f"{value:.0f}"

    rows = []
    for point in record["points"]:
        medians = [point[key]["median"] if isinstance(point[key], dict) else point[key] for key in columns]
        ceiling = [f"{point['share_of_ceiling']:.0%}", point["bound"]] if "bound" in point else []
        rate = point["tokens_per_s"]
        rows.append([str(point[name]), *map(shown, medians), *ceiling, shown(rate["low"]), shown(rate["high"])])
    lines = ["".join(f"{text:>{max(9, len(head) + 2)}}" for head, text in zip(heads, row, strict=True)) for row in (heads, *rows)]
    if any(point.get("share_of_ceiling", 0) > 1 for point in record["points"]):
        lines.append(f"faster than the ceiling: {ABOVE}")
    waited = [f"{point[name]} ({point['waited_share']:.0%})" for point in record["points"] if disturbed(point.get("waited_share"))]
    if waited:
        lines.append(f"others had the cores at {name} {', '.join(waited)} (waited, of the time computed): these rates are too low")
    if record.get("no_conclusion"):
        lines.append(f"{'serial share' if name == 'threads' else 'knee'}: {record['no_conclusion']}")
    if record.get("knee") is not None:
        lines.append(f"knee: beyond {record['knee']} at once a doubling brings less than 1.5 times the throughput")
    for key, law in (("serial_share", "the same work (Amdahl)"), ("weak_serial_share", "work that grows with the threads (Gustafson)")):
        if record.get(key) is not None:
            lines.append(f"serial share, {law}: {record[key]:.1%}")
    return lines
