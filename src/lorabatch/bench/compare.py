"""``lorabatch compare A B``: is B faster than A? Yes only where the intervals of their medians do
not overlap, and never where one of them had to wait for cores that others used. Of two
evaluations: is B better? (``lorabatch.evaluate.compare``)"""

from __future__ import annotations

from pathlib import Path

from lorabatch.bench.scaling import Estimate, estimate, read_bench, verdict
from lorabatch.config_measure import CompareConfig
from lorabatch.errors import DataError, UsageError, visible
from lorabatch.evaluate.compare import compare_evaluations
from lorabatch.machine.waits import disturbed
from lorabatch.metrics.schema import InferMetrics, SystemMetrics
from lorabatch.records import read_json, read_jsonl
from lorabatch.schema import Fields


class Rate(Estimate):
    """Of tokens/s."""

    waited_share: float | None  # meanwhile; None: not recorded


Rates = dict[str, Rate]  # by what was measured


def run_compare(config: CompareConfig, command: list[str]) -> int:
    lines = compare(Path(config.a), Path(config.b), across_hosts=config.across_hosts)
    print("\n".join(lines))
    return 0


def compare(a: Path, b: Path, *, across_hosts: bool) -> list[str]:
    """The verdict in lines of text. A and B: two run folders of one kind, or two files that
    ``lorabatch bench`` wrote.

    Raises DataError for what is neither or has nothing in common; UsageError for two machines
    without ``across_hosts``.
    """
    kinds = [read_json(p / "run.json")["kind"] if p.is_dir() else "bench" for p in (a, b)]
    if kinds == ["eval", "eval"]:
        return compare_evaluations(a, b)
    if "eval" in kinds:
        raise _two_kinds(kinds[0], kinds[1], b)
    (record_a, rates_a), (record_b, rates_b) = _read(a), _read(b)
    if record_a.get("kind") != record_b.get("kind"):
        raise _two_kinds(record_a.get("kind"), record_b.get("kind"), b)
    common = [name for name in rates_a if name in rates_b]
    if not common:
        raise DataError(
            f"no measurement in common ({', '.join(rates_a)}; {', '.join(rates_b)})",
            where=b,
            fix="sweep the same levels",
        )
    machines = _machine(record_a), _machine(record_b)
    lines = [f"A  {a}  on {machines[0]}", f"B  {b}  on {machines[1]}"]
    if machines[0] != machines[1]:
        if not across_hosts:
            raise UsageError(
                f"measured on different machines ({machines[0]}; {machines[1]})",
                where=f"{a} and {b}",
                fix="measure both on one machine, or add --across_hosts to see them labelled",
            )
        lines.append("DIFFERENT MACHINES: what follows compares machines as much as programs.")
    changed = _differences(record_a, record_b)
    lines.append(f"settings that differ: {', '.join(changed) or 'none'}")
    lines += [_line(name, rates_a[name], rates_b[name]) for name in common]
    return [visible(line) for line in lines]


def _two_kinds(a: object, b: object, where: Path) -> DataError:
    return DataError(f"A is '{a}', B is '{b}'", where=where, fix="compare two of one kind")


def _read(path: Path) -> tuple[Fields, Rates]:
    """What was measured by whom, and the rates."""
    if path.is_dir():
        record = read_json(path / "run.json")
        of_kind = _read_training if record.get("kind") == "train" else _read_inference
        return record, of_kind(path)
    record = read_bench(path)
    sweep = record["sweep"]
    return record, {
        f"{sweep} {p[sweep]}": p["tokens_per_s"] | {"waited_share": p.get("waited_share")}
        for p in record["points"]
    }


def _read_training(path: Path) -> Rates:
    events = read_jsonl(path / "events.jsonl")
    steps = [event["tokens_per_s"] for event in events if event.get("event") == "step"]
    figures = path / "metrics.json"  # a run that was killed has none
    # the first step warms up
    return {
        "steps after the first": _rate(steps[1:], read_json(figures) if figures.exists() else {})
    }


def _read_inference(path: Path) -> Rates:
    figures = read_json(path / "metrics.json")
    passes = InferMetrics.from_dict(figures).pass_tokens_per_s or ()
    return {"repetitions": _rate([rate for rate in passes if rate is not None], figures)}


def _rate(values: list[float], figures: Fields) -> Rate:
    return {**estimate(values), "waited_share": SystemMetrics.from_dict(figures).waited_share}


def _machine(record: Fields) -> str:
    environment, gpu = record.get("environment") or {}, record.get("gpu") or {}
    return f"{environment.get('host')} ({gpu.get('name') or environment.get('cpu')})"


def _differences(a: Fields, b: Fields) -> list[str]:
    configs = [
        {
            **(record.get("config") or {}),
            **{k: record.get(k) for k in ("device", "dtype", "threads")},
            **{k: (record.get("environment") or {}).get(k) for k in ("packages", "git")},
        }
        for record in (a, b)
    ]
    ignored = {"output_dir", "save_dir", "output", "overwrite", "resume"}
    names = [name for name in dict.fromkeys([*configs[0], *configs[1]]) if name not in ignored]
    return [
        f"{n} {configs[0].get(n)} -> {configs[1].get(n)}"
        for n in names
        if configs[0].get(n) != configs[1].get(n)
    ]


def _line(name: str, a: Fields, b: Fields) -> str:
    def shown(e: Fields) -> str:
        if e["median"] is None:
            return "not measured"
        ends = "" if e["low"] is None else f" [{_digits(e['low'])}, {_digits(e['high'])}]"
        return _digits(e["median"]) + ends

    waits = [
        f"{who} waited for cores {e['waited_share']:.0%} as long as it computed"
        for who, e in (("A", a), ("B", b))
        if _waited(e)
    ]
    words = {
        "too few": "too few values to say (six are the least)",
        "overlap": "the intervals overlap: no difference shown",
        "waited": "no verdict, since others had the cores: measure both again on a quiet machine",
    }
    found, counts = verdict(a, b), f"{len(a['values'])} and {len(b['values'])} values"
    times = f", {b['median'] / a['median']:.2f} times A's median" if a["median"] else ""
    said = words.get(found) or f"B is {found}{times}"
    said = "; ".join((*waits, said))
    return (
        f"{name}: A {shown(a)}, B {shown(b)} tokens/s (median and its interval of at least 95 %; "
        f"{counts}): {said}"
    )


def _digits(rate: float) -> str:
    """One behind the point, three in all where the rate is small."""
    return f"{rate:.1f}" if rate >= 10 else f"{rate:.3g}"


def _waited(rate: Fields) -> bool:
    return disturbed(rate.get("waited_share"))
