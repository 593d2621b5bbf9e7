#!/usr/bin/env python3
"""The first minutes on a GPU: what is right, how fast, and where the time goes.

One process, so that CUDA starts once; each stage has a time limit of its own and stops there with
what it has. Weights are random with the shapes of real models: nothing is downloaded, nothing
travels but the source. A line of JSON a result goes to ``OUT/check.jsonl`` as it comes, a table is
printed last. Two calls of nine minutes ask everything:

    python benchmarks/gpu/check.py --minutes 9 --out OUT
    python benchmarks/gpu/check.py --minutes 9 --out OUT --stages second

Without a GPU it says so and runs tiny models on the CPU, so that it is not broken on the day.
Exit code 0, or 1 if a check failed or a stage ended with an error.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from shapes import TINY, TRUE, Setup
from stages import FIRST, LIMITS_S, SECOND, STAGES

LEAST_S = 5  # a stage with less time left is not begun


class OutOfTime(Exception):
    """The stage's limit, or the call's."""


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    def stop(number: int, frame: object) -> None:
        raise OutOfTime(f"stopped after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Lines:
    """Records as they come: each a flushed line, all of them for the table."""

    def __init__(self, path: Path) -> None:
        self.records: list[dict[str, Any]] = []
        self._file = path.open("a", encoding="utf-8")

    def add(self, stage: str, record: dict[str, Any]) -> None:
        self.records.append({"stage": stage, **record})
        self._file.write(json.dumps(self.records[-1]) + "\n")
        self._file.flush()


def run_stage(name: str, setup: Setup, lines: Lines, seconds: float) -> None:
    start = time.perf_counter()
    ending: dict[str, Any] = {}
    try:
        with limited(seconds):
            for record in STAGES[name](setup):
                lines.add(name, record)
    except OutOfTime as error:
        ending = {"ended": str(error)}
    except Exception as error:  # the other stages still have something to say
        ending = {"error": f"{type(error).__name__}: {error}"[:500]}
        traceback.print_exc()
    lines.add(name, {"what": "stage", "seconds": time.perf_counter() - start, **ending})
    if setup.gpu:
        torch.cuda.empty_cache()


def shown(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value)


def table(records: list[dict[str, Any]]) -> str:
    """One line a record; a check that failed stands out."""
    rows = []
    for record in records:
        rest = {k: v for k, v in record.items() if k not in ("stage", "what", "ok", "environment")}
        mark = {True: "ok", False: "FAILED", None: ""}[record.get("ok")]
        mark = "ERROR" if "error" in record else mark
        facts = ", ".join(f"{k} {shown(v)}" for k, v in rest.items())
        rows.append(f"{record['stage']:10} {record['what']:28} {mark:7} {facts}")
    return "\n".join(rows)


def chosen_stages(words: list[str]) -> list[str]:
    names = {"first": FIRST, "second": SECOND}
    return [stage for word in words for stage in names.get(word, [word])]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=9.0, help="limit of the whole call")
    parser.add_argument("--out", type=Path, default=Path("results/gpu"), help="folder")
    parser.add_argument(
        "--stages", nargs="+", default=["first"], choices=["first", "second", *STAGES]
    )
    parser.add_argument("--sizes", choices=["true", "tiny"], help="default: tiny without a GPU")
    parser.add_argument("--dtype", choices=["bf16", "fp16", "fp32"], help="default: the device's")
    options = parser.parse_args()
    gpu = torch.cuda.is_available()
    if not gpu:
        print("no GPU here: tiny models on the CPU show that the stages run, and nothing else")
    sizes = options.sizes or ("true" if gpu else "tiny")
    options.out.mkdir(parents=True, exist_ok=True)
    setup = Setup(TRUE if sizes == "true" else TINY, options.out, options.dtype)
    lines, end = Lines(options.out / "check.jsonl"), time.monotonic() + 60 * options.minutes
    lines.add("call", {"what": "facts", **setup.facts()})
    for name in chosen_stages(options.stages):
        left = end - time.monotonic()
        if left < LEAST_S:
            lines.add(name, {"what": "stage", "ended": "not begun: the call's time is up"})
            continue
        run_stage(name, setup, lines, min(left, LIMITS_S[name]))
        print(table([r for r in lines.records if r["stage"] == name]), flush=True)
    print("\n" + table(lines.records))
    failed = [r for r in lines.records if r.get("ok") is False or "error" in r]
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
