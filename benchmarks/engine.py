#!/usr/bin/env python3
"""The engine's own Python per token: a pass over a runner that computes nothing.

Scheduler, segments, endings and statistics are the real ones; the model is not there, and the text
of a finished request is empty. Seconds of the processor, not of the clock; of several passes the
least, since other work on the machine only adds. ``--profile`` says where they go.

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
from itertools import product
from typing import Any

from lorabatch.infer.engine import Engine
from lorabatch.infer.requests import Request, SamplingParams
from lorabatch.infer.runners.graph import reads_prompt, steps_of_a_visit
from lorabatch.infer.runners.graph_rows import tokens_left
from lorabatch.infer.runners.graph_step import MOST_STEPS
from lorabatch.model.attention import Segment

PROMPT_TOKENS, NEW_TOKENS, EOS_ID = 16, 64, 0


class Null:
    """A Runner without a model. ``most``: tokens of a row that the engine gets at once, as from
    ``GraphRunner``."""

    static = False

    def __init__(self, most: int) -> None:
        self._most, self.apart = most, most > 1

    def step(self, segments: Sequence[Segment], requests: Sequence[Request]) -> list[list[int]]:
        if self._most == 1 or any(map(reads_prompt, segments, requests)):
            return [[7] for s in segments if s.num_logits]
        left = [tokens_left(request) for request in requests]
        count = min(steps_of_a_visit(left), self._most)
        return [[7] * min(count, n) for n in left]

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


def one_pass(rows: int, most: int, requests: list[Request]) -> tuple[float, int]:
    """(processor seconds, tokens)."""
    engine = Engine(Null(most), NoText(), [EOS_ID], max_running=rows, prefill_tokens=rows * 8)
    finished: list[Request] = []
    gc.collect()
    start = time.process_time()
    engine.run(requests, finished.append)
    seconds = time.process_time() - start
    assert len(finished) == len(requests)
    return seconds, sum(len(r.output_ids) for r in finished)


def measure(rows: int, most: int, passes: int) -> dict[str, Any]:
    rounds = max(1, 4096 // rows)
    results = [one_pass(rows, most, asked(rows, rounds)) for _ in range(passes)]
    seconds, tokens = min(results)
    us = round(seconds / tokens * 1e6, 3)
    return {"rows": rows, "tokens_at_once": most, "tokens": tokens, "us_per_token": us}


def profiled(run: Callable[[], Any]) -> None:
    profile = cProfile.Profile()
    profile.runcall(run)
    pstats.Stats(profile).sort_stats("tottime").print_stats(20)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", nargs="+", type=int, default=[16, 256, 1024])
    parser.add_argument("--tokens_at_once", nargs="+", type=int, default=[1, MOST_STEPS])
    parser.add_argument("--passes", type=int, default=5)
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    for rows, most in product(options.rows, options.tokens_at_once):
        if options.profile:
            requests = asked(rows, 1)
            profiled(lambda rows=rows, most=most, own=requests: one_pass(rows, most, own))
        else:
            print(json.dumps(measure(rows, most, options.passes)))


if __name__ == "__main__":
    main()
