#!/usr/bin/env python3
"""A recorded mix of request lengths through ``lorabatch infer``: does the batch stay full while
requests wait?

The trace is a CSV file with the columns prompt_tokens and output_tokens, one request a row (for
example Azure's LLM inference trace 2023, github.com/Azure/AzurePublicDataset, with these names for
ContextTokens and GeneratedTokens). Requests longer than ``--max_len`` positions are clipped to it,
answers to half of it. Prompts are the sample's words in a random order, so that none shares a
prefix. ``slots_used_while_waiting`` is the mean share of slots in use in steps begun while requests
waited; a trace of long prompts and short answers is bound by the prompt tokens of a step instead,
and ``step_filled_while_waiting`` takes the larger of both shares.

    python benchmarks/trace.py --trace azure_llm_2023_code.csv --requests 512 --batch_size 64
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import subprocess
import sys
import tempfile
from itertools import islice
from pathlib import Path
from typing import Any

from tables import results_name

from lorabatch.machine.environment import environment
from lorabatch.model import hub
from lorabatch.model.load import load_tokenizer
from lorabatch.records import read_json, utc_now, write_json

HERE = Path(__file__).parent
KEPT = (
    "slots_used_while_waiting",
    "step_filled_while_waiting",
    "max_running",
    "mean_running",
    "total_input_tokens",
    "total_output_tokens",
)
KEPT += (
    "completed",
    "failed",
    "duration_s",
    "tokens_per_s",
    "total_token_throughput",
    "prefill_s",
    "decode_s",
    "peak_memory_bytes",
)


def rows(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Requests with the lengths of the trace: random words cut to so many tokens."""
    words = (HERE.parent / "data_sample" / "train.txt").read_text(encoding="utf-8").split()
    tokenizer = load_tokenizer(hub.find_model(options.base_model).path)
    found = []
    with options.trace.open(encoding="utf-8") as file:
        for number, row in enumerate(islice(csv.DictReader(file), options.requests)):
            new = min(int(row["output_tokens"]), options.max_len // 2)
            # text -> ids is not the inverse of ids -> text
            size = min(int(row["prompt_tokens"]), options.max_len - new - 8)
            ids = tokenizer(" ".join(random.Random(number).choices(words, k=size)))["input_ids"]
            found.append(
                {"id": str(number), "prompt": tokenizer.decode(ids[:size]), "max_new_tokens": new}
            )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trace", type=Path, required=True)
    parser.add_argument("--base_model", default="smollm2-135m")
    parser.add_argument("--requests", type=int, default=512)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--prefill_tokens", type=int, default=2048)
    parser.add_argument("--max_len", type=int, default=1024)
    parser.add_argument("--order", default="arrival")
    parser.add_argument(
        "--output", type=Path, help="appended to [benchmarks/results/trace-CPU-DATE.json]"
    )
    options = parser.parse_args()
    where = environment()
    output = options.output or HERE / "results" / results_name("trace", str(where["cpu"]))
    settings = {
        n: getattr(options, n)
        for n in ("base_model", "batch_size", "prefill_tokens", "max_len", "order")
    }
    with tempfile.TemporaryDirectory() as scratch:
        file, out = Path(scratch) / "prompts.jsonl", Path(scratch) / "run"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows(options)), encoding="utf-8")
        flags = [
            "--prompts",
            file,
            "--output_dir",
            out,
            "--ignore_eos",
            *(w for k, v in settings.items() for w in (f"--{k}", v)),
        ]
        subprocess.run([sys.executable, "-m", "lorabatch", "infer", *map(str, flags)], check=True)
        figures = read_json(out / "metrics.json")
    record = (
        {"at": utc_now(), "trace": options.trace.name, "requests": options.requests}
        | settings
        | {name: figures[name] for name in KEPT}
    )
    results = read_json(output) if output.exists() else {"kind": "trace", "runs": []}
    results["runs"].append(record | {"environment": where})
    output.parent.mkdir(parents=True, exist_ok=True)
    write_json(output, results)
    print(
        f"slots {record['slots_used_while_waiting']:.1%}, steps "
        f"{record['step_filled_while_waiting']:.1%} full while requests wait"
    )


if __name__ == "__main__":
    main()
