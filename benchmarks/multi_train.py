#!/usr/bin/env python3
"""K adapters in one process (``lorabatch train --jobs``) against K runs one after another, each in a process of its own.

Both train the same runs (seed and learning rate differ) for the same steps on the same documents, one document a step or the
default eight. Ways alternate. ``step`` compares the time inside optimiser steps, ``whole`` the time of the processes
with their start-up. The adapters of both ways must be equal to the bit.

    python benchmarks/multi_train.py --documents train.jsonl --jobs 4 --batch_size 1 --append
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base_model", default="smollm2-135m")
    parser.add_argument("--documents", type=Path, default=ROOT / "data_sample" / "train.txt")
    parser.add_argument("--jobs", type=int, default=4, help="adapters")
    parser.add_argument("--batch_size", type=int, default=1, help="documents per step of each")
    parser.add_argument("--max_len", type=int, default=512)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--append", action="store_true", help="add to today's file of this machine")
    parser.add_argument("--output_dir", type=Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args()

    from lorabatch.measure.environment import environment

    path = args.output_dir / f"multi-train-{datetime.now(timezone.utc):%Y-%m-%d}.json"
    record: dict[str, Any] = {"schema_version": 1, "kind": "multi train", "environment": environment(), "rounds": []}
    if args.append and path.exists():
        record = json.loads(path.read_text(encoding="utf-8"))
    for _ in range(args.rounds):
        found = one_round(args)
        record["rounds"].append({k: getattr(args, k) for k in ("jobs", "batch_size", "max_len", "steps")} | found)
        record["summary"] = summarise(record["rounds"])
        args.output_dir.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    for row in record["summary"]:
        print(
            f"{row['jobs']} runs, {row['batch_size']} documents a step, at most {row['max_len']} tokens each: "
            f"steps {row['step_ratio']:.2f}x, whole {row['whole_ratio']:.2f}x ({row['rounds']} rounds)"
        )
    print(path)
    return 0 if all(r["equal"] for r in record["rounds"]) else 1


def one_round(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of both ways, and whether they made the same adapters."""
    runs = [{"name": f"run{i}", "seed": i, "lr": 1e-4 * (i + 1)} for i in range(args.jobs)]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        file = folder / "jobs.jsonl"
        file.write_text("".join(json.dumps(run) + "\n" for run in runs), encoding="utf-8")
        together_s = train(args, folder / "together", "--jobs", file)
        alone_s = [train(args, folder / "alone" / str(run["name"]), "--seed", run["seed"], "--lr", run["lr"]) for run in runs]
        ways = {way: [folder / way / str(run["name"]) for run in runs] for way in ("together", "alone")}
        step_s = {way: [steps_s(f) for f in folders] for way, folders in ways.items()}
        peak = {way: max(read(f / "metrics.json")["peak_memory_bytes"] for f in folders) for way, folders in ways.items()}
        return {
            "together_s": together_s,
            "alone_s": alone_s,
            "together_step_s": max(step_s["together"]),  # all runs are in every step
            "alone_step_s": step_s["alone"],
            "tokens": sum(read(f / "metrics.json")["total_tokens"] for f in ways["alone"]),
            "peak_memory_bytes": peak,
            "equal": all(adapter(a) == adapter(b) for a, b in zip(ways["together"], ways["alone"], strict=True)),
        }


def train(args: argparse.Namespace, save_dir: Path, *more: Any) -> float:
    """Seconds of one process."""
    words = ["train", "--train_path", args.documents.resolve(), "--val_path", "none", "--save_dir", save_dir, "--dtype", "bf16", *more]
    for name in ("base_model", "batch_size", "max_len"):
        words += [f"--{name}", getattr(args, name)]
    documents = args.batch_size * args.steps * 2
    words += ["--max_steps", args.steps, "--max_train_documents", documents]
    start = time.perf_counter()
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    subprocess.run(
        [sys.executable, "-m", "lorabatch", *map(str, words)],
        env=environment,
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    return time.perf_counter() - start


def steps_s(folder: Path) -> float:
    """Seconds in steps without the first two, which pack the transposed weights and fill caches."""
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    return sum(e["step_ms"] for e in events if e["event"] == "step" and e["step"] > 2) / 1e3


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def adapter(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


def summarise(rounds: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Median ratios, separate over together, of each setting."""
    rows = []
    for key in sorted({(r["batch_size"], r["max_len"], r["jobs"]) for r in rounds}):
        mine = [r for r in rounds if (r["batch_size"], r["max_len"], r["jobs"]) == key]
        ratios = {
            "step_ratio": statistics.median(sum(r["alone_step_s"]) / r["together_step_s"] for r in mine),
            "whole_ratio": statistics.median(sum(r["alone_s"]) / r["together_s"] for r in mine),
        }
        rows.append(dict(zip(("batch_size", "max_len", "jobs"), key, strict=True)) | ratios | {"rounds": len(mine)})
    return rows


if __name__ == "__main__":
    sys.exit(main())
