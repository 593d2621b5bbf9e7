"""``lorabatch compare A B``: is B faster than A? Yes only where the intervals of their medians do not overlap,
and never where the slower one had to wait for cores that others used."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorabatch.errors import DataError, UsageError, visible
from lorabatch.measure.scaling import estimate, read_bench, verdict
from lorabatch.measure.waits import disturbed, waited_share
from lorabatch.records import read_json, read_jsonl

Rates = dict[str, dict[str, Any]]  # what was measured -> estimate of its tokens/s, and waited_share meanwhile (None: not recorded)


def compare(a: Path, b: Path, *, across_hosts: bool) -> list[str]:
    """The verdict in lines of text. A and B: two run folders of one kind, or two files that ``lorabatch bench`` wrote.

    Raises DataError for what is neither or has nothing in common; UsageError for two machines without ``across_hosts``.
    """
    (record_a, rates_a), (record_b, rates_b) = _read(a), _read(b)
    if record_a.get("kind") != record_b.get("kind"):
        raise DataError(f"A is '{record_a.get('kind')}', B is '{record_b.get('kind')}'", where=b, fix="compare two of one kind")
    common = [name for name in rates_a if name in rates_b]
    if not common:
        raise DataError(f"no measurement in common ({', '.join(rates_a)}; {', '.join(rates_b)})", where=b, fix="sweep the same levels")
    machines = [_machine(record) for record in (record_a, record_b)]
    lines = [f"A  {a}  on {machines[0]}", f"B  {b}  on {machines[1]}"]
    if machines[0] != machines[1]:
        if not across_hosts:
            fix = "measure both on one machine, or add --across_hosts to see them labelled"
            raise UsageError(f"measured on different machines ({machines[0]}; {machines[1]})", where=f"{a} and {b}", fix=fix)
        lines.append("DIFFERENT MACHINES: what follows compares machines as much as programs.")
    changed = _differences(record_a, record_b)
    lines.append(f"settings that differ: {', '.join(changed) or 'none'}")
    return [visible(line) for line in (*lines, *(_line(name, rates_a[name], rates_b[name]) for name in common))]


def _read(path: Path) -> tuple[Mapping[str, Any], Rates]:
    metrics: Mapping[str, Any] = {}
    if path.is_dir():
        record = read_json(path / "run.json")
        if record.get("kind") == "train":
            steps = [e["tokens_per_s"] for e in read_jsonl(path / "events.jsonl") if e.get("event") == "step"]
            if (path / "metrics.json").exists():  # a run that was killed has none
                metrics = read_json(path / "metrics.json")
            return record, {
                "steps after the first": estimate(steps[1:]) | {"waited_share": waited_share(metrics)}
            }  # the first one warms up
        metrics = read_json(path / "metrics.json")
        return record, {
            "repetitions": estimate([rate for rate in metrics.get("pass_tokens_per_s") or [] if rate is not None])
            | {"waited_share": waited_share(metrics)}
        }
    record = read_bench(path)
    sweep = record["sweep"]
    return record, {f"{sweep} {p[sweep]}": p["tokens_per_s"] | {"waited_share": p.get("waited_share")} for p in record["points"]}


def _machine(record: Mapping[str, Any]) -> str:
    environment, gpu = record.get("environment") or {}, record.get("gpu") or {}
    return f"{environment.get('host')} ({gpu.get('name') or environment.get('cpu')})"


def _differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
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
    return [f"{n} {configs[0].get(n)} -> {configs[1].get(n)}" for n in names if configs[0].get(n) != configs[1].get(n)]


def _line(name: str, a: Mapping[str, Any], b: Mapping[str, Any]) -> str:
    def shown(e: Mapping[str, Any]) -> str:
        if e["median"] is None:
            return "not measured"
        interval = "" if e["low"] is None else f" [{e['low']:.1f}, {e['high']:.1f}]"
        return f"{e['median']:.1f}{interval}"

    waits = [f"{who} waited for cores {e['waited_share']:.0%} as long as it computed" for who, e in (("A", a), ("B", b)) if _waited(e)]
    words = {
        "too few": "too few values to say (six are the least)",
        "overlap": "the intervals overlap: no difference shown",
        "waited": "no verdict, because the slower one was disturbed: measure it again on a quiet machine",
    }
    found, counts = verdict(a, b), f"{len(a['values'])} and {len(b['values'])} values"
    times = f", {b['median'] / a['median']:.2f} times A's median" if a["median"] else ""
    said = words.get(found) or f"B is {found}{times}"
    said = "; ".join((*waits, said))
    return f"{name}: A {shown(a)}, B {shown(b)} tokens/s (median and its interval of at least 95 %; {counts}): {said}"


def _waited(rate: Mapping[str, Any]) -> bool:
    return disturbed(rate.get("waited_share"))
