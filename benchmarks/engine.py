#!/usr/bin/env python3
"""The engine's own Python per token: a pass over a runner that computes nothing.

Scheduler, segments, endings and statistics are the real ones; the model is not there, and the text
of a finished request is empty. Seconds of the processor, not of the clock; of several passes the
least, since other work on the machine only adds. ``--profile`` says where they go. For counts of
instructions, which other work hardly changes, run it once under ``perf stat -e instructions:u``
with one ``--rows`` and ``--passes 1``, and again with ``--passes 2``: the difference is one pass.

    python benchmarks/engine.py
    python benchmarks/engine.py --rows 1024 --profile
"""

from __future__ import annotations

import argparse
import cProfile
import gc
import json
import pstats
import time
from collections.abc import Callable, Sequence
from typing import Any

from lorabatch.infer.engine import Engine
from lorabatch.infer.requests import Request, SamplingParams
from lorabatch.model.attention import Segment

PROMPT_TOKENS, NEW_TOKENS, EOS_ID = 16, 64, 0


class Null:
    """A Runner without a model."""

    static = False

    def step(self, segments: Sequence[Segment], requests: Sequence[Request]) -> list[list[int]]:
        return [[7] for s in segments if s.num_logits]

    def copy(self, source: int, target: int, length: int) -> None:
        pass

    def clear(self, slot: int) -> None:
        pass


class NoText:
    """A Tokenizer that writes nothing."""

    def decode(self, *_: Any, **__: Any) -> str:
        return ""


def asked(rows: int, rounds: int) -> list[Request]:
    """``rounds`` times as many requests as run at once, their prompts without a common beginning,
    their lengths around NEW_TOKENS, so that newcomers arrive in most steps."""
    params = SamplingParams()
    return [
        Request(
            str(i),
            i,
            "",
            params,
            token_ids=[i % 50_000, *range(1, PROMPT_TOKENS)],
            max_new_tokens=NEW_TOKENS // 2 + 37 * i % NEW_TOKENS,
        )
        for i in range(rows * rounds)
    ]


def one_pass(rows: int, requests: list[Request]) -> tuple[float, int]:
    """(processor seconds, tokens)."""
    engine = Engine(Null(), NoText(), [EOS_ID], max_running=rows, prefill_tokens=rows * 8)
    finished: list[Request] = []
    gc.collect()
    start = time.process_time()
    engine.run(requests, finished.append)
    seconds = time.process_time() - start
    assert len(finished) == len(requests)
    return seconds, sum(len(r.output_ids) for r in finished)


def measure(rows: int, passes: int) -> dict[str, Any]:
    rounds = max(1, 4096 // rows)
    results = [one_pass(rows, asked(rows, rounds)) for _ in range(passes)]
    seconds, tokens = min(results)
    return {"rows": rows, "tokens": tokens, "us_per_token": round(seconds / tokens * 1e6, 3)}


def profiled(run: Callable[[], Any]) -> None:
    profile = cProfile.Profile()
    profile.runcall(run)
    pstats.Stats(profile).sort_stats("tottime").print_stats(20)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", nargs="+", type=int, default=[16, 256, 1024])
    parser.add_argument("--passes", type=int, default=5)
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    for rows in options.rows:
        if options.profile:
            profiled(lambda rows=rows: one_pass(rows, asked(rows, 1)))
        else:
            print(json.dumps(measure(rows, options.passes)))


if __name__ == "__main__":
    main()
