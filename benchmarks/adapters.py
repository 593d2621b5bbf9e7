#!/usr/bin/env python3
"""Many adapters in one run: ours in mixed batches, peft's ``adapter_names``.

N random adapters (rank 16, all linear layers) of the base are written once in PEFT's format.
Prompts are distinct, request i uses adapter i modulo N. Each run is a process of its own; the ways
alternate. ``seconds``: from loaded to the last token. peft's run follows a warm-up of two tokens,
ours none. Results are appended to one JSON file; benchmarks/tables.py makes the README's table from
it.

    python benchmarks/adapters.py --adapters 32
    python benchmarks/adapters.py --adapters 256 --requests 256 --ways peft --max_new_tokens 8
    python benchmarks/adapters.py --adapters 32 --check 4    # no timing: are mixed completions
    those of runs of one adapter?
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from infer import PEERS_HOME, prompt_texts
from tables import agreement, results_name

from lorabatch.machine.environment import environment
from lorabatch.model import hub
from lorabatch.model.load import load_config, load_tokenizer
from lorabatch.model.lora import LoraWeights, save_adapter
from lorabatch.model.lora_settings import LoraSettings
from lorabatch.model.native import NativeModel
from lorabatch.model.spec import spec_from_config
from lorabatch.records import read_jsonl, utc_now, write_json

HERE = Path(__file__).parent
RANK = 16
WAYS = ("mixed", "peft")
# whose beginnings are kept, to see that all sides do the same work
COMPARED_TOKENS, COMPARED_REQUESTS = 16, 16


def make_adapters(model: Path, count: int) -> dict[str, Path]:
    """Folders by name, kept beside the peers' models; adapter i is the same in every call."""
    home = PEERS_HOME / "models" / f"adapters-{model.name}-r{RANK}"
    folders = {f"a{i:03d}": home / f"{i:03d}" for i in range(count)}
    missing = {
        i: folder
        for i, folder in enumerate(folders.values())
        if not (folder / "lorabatch.json").exists()
    }
    if missing:
        base = NativeModel.load(
            model,
            spec_from_config(load_config(model)),
            dtype=torch.float32,
            device=torch.device("cpu"),
        )
        for i, folder in missing.items():
            generator = torch.Generator().manual_seed(i)
            pairs = {
                path: (
                    torch.randn(RANK, n_in, generator=generator) * n_in**-0.5,
                    torch.randn(n_out, RANK, generator=generator) * 0.01,
                )
                for path, (n_out, n_in) in base.linear_shapes.items()
            }
            weights = LoraWeights(LoraSettings(r=RANK, alpha=2.0 * RANK), pairs)
            save_adapter(
                folder,
                weights,
                base_name=model.name,
                base_fingerprint=base.base_fingerprint,
                fan_in_fan_out=False,
            )
    return folders


class Work:
    """The requests of one cell, and each way to complete them."""

    def __init__(self, options: argparse.Namespace, model: Path) -> None:
        self.options, self.model = options, model
        self.folders = make_adapters(model, options.adapters)
        self.names = [f"a{i % options.adapters:03d}" for i in range(options.requests)]
        self.prompts = prompt_texts("distinct", options.requests)

    def mixed(self, *, only: range | None = None) -> dict[str, Any]:
        """``lorabatch infer`` over the requests (``only`` some), ``--batch_size`` at once."""
        chosen = only or range(len(self.prompts))
        with tempfile.TemporaryDirectory() as scratch:
            file, out = Path(scratch) / "prompts.jsonl", Path(scratch) / "run"
            rows = [
                {"id": str(i), "prompt": self.prompts[i], "adapter": self.names[i]} for i in chosen
            ]
            file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
            flags = [
                "--base_model",
                self.options.base_model,
                "--prompts",
                file,
                "--output_dir",
                out,
                "--ignore_eos",
                "--output_order",
                "input",
            ]
            flags += [
                "--batch_size",
                self.options.batch_size,
                "--max_new_tokens",
                self.options.max_new_tokens,
                "--threads",
                self.options.threads,
            ]
            flags += ["--adapters", *(f"{name}={folder}" for name, folder in self.folders.items())]
            words = [sys.executable, "-m", "lorabatch", "infer", *map(str, flags)]
            subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
            figures = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
            run = json.loads((out / "run.json").read_text(encoding="utf-8"))
            outputs = [record["text"] for record in read_jsonl(out / "completions.jsonl")]
        return {
            "startup_s": figures["startup_s"],
            "seconds": figures["duration_s"],
            "phases_s": {
                name: value
                for name, value in figures.items()
                if name.startswith("startup_") and name != "startup_s"
            },
            "outputs": outputs,
            "output_tokens": figures["total_output_tokens"],
            "dtype": run["dtype"],
            "peak_rss_bytes": figures["peak_memory_bytes"],
        }

    def peft(self) -> dict[str, Any]:
        job = {
            "model": str(self.model),
            "adapters": {name: str(folder) for name, folder in self.folders.items()},
            "names": self.names,
        }
        job |= {
            "prompts": load_tokenizer(self.model)(self.prompts)["input_ids"],
            "threads": self.options.threads,
        }
        job["max_new_tokens"] = self.options.max_new_tokens
        python, script = PEERS_HOME / "transformers/bin/python", HERE / "peers/peer_peft.py"
        run = subprocess.run(
            [python, script], input=json.dumps(job), stdout=subprocess.PIPE, text=True, check=True
        )
        found = json.loads(run.stdout)
        tokens = sum(map(len, found["outputs"]))
        texts = load_tokenizer(self.model).batch_decode(found["outputs"], skip_special_tokens=True)
        return found | {"outputs": texts, "output_tokens": tokens}

    def beginnings(self, texts: list[str]) -> list[list[int]]:
        ids = load_tokenizer(self.model)(texts[:COMPARED_REQUESTS])["input_ids"]
        return [(i + [0] * COMPARED_TOKENS)[:COMPARED_TOKENS] for i in ids]

    def check(self, count: int) -> dict[str, Any]:
        """The requests of ``count`` adapters in one mixed run, and each adapter's in a run of its
        own."""
        together = self.mixed()["outputs"]
        same = compared = 0
        for first in range(count):
            mine = range(first, len(self.prompts), self.options.adapters)
            alone = self.mixed(only=mine)["outputs"]
            same += sum(a == together[i] for a, i in zip(alone, mine, strict=True))
            compared += len(mine)
        return {"adapters_run_alone": count, "completions_compared": compared, "identical": same}


def summarise(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Medians of each cell and way. ``mixed_ratio``: how many times as fast mixed batches were,
    where both generated as many tokens."""
    rows: list[dict[str, Any]] = []
    names = ("adapters", "requests", "batch_size", "max_new_tokens")
    for cell in sorted({tuple(r[n] for n in names) for r in runs}):
        found = {
            way: [r for r in runs if (r["way"], *(r[n] for n in names)) == (way, *cell)]
            for way in WAYS
        }
        rate = {
            way: statistics.median(r["output_tokens"] / r["seconds"] for r in of)
            for way, of in found.items()
            if of
        }
        for way, value in rate.items():
            of = found[way]
            rows.append(
                dict(zip(names, cell, strict=True))
                | {
                    "way": way,
                    "rounds": len(of),
                    "tokens_per_s": value,
                    "mixed_ratio": rate["mixed"] / value if "mixed" in rate else None,
                    "startup_s": statistics.median(r["startup_s"] for r in of),
                    "peak_rss_bytes": max(r["peak_rss_bytes"] for r in of),
                    "same_beginning": agreement(
                        found["mixed"][0]["beginnings"], of[0]["beginnings"]
                    )
                    if "mixed" in rate
                    else None,
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base_model", default="smollm2-135m")
    parser.add_argument("--adapters", type=int, default=4)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--batch_size", type=int, default=64, help="of ours; peft runs all at once")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--max_new_tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument(
        "--check", type=int, metavar="N", help="adapters that are run alone, to compare"
    )
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument(
        "--output", type=Path, help="appended to [benchmarks/results/adapters-CPU-DATE.json]"
    )
    options = parser.parse_args()
    where = environment()
    output = options.output or HERE / "results" / results_name("adapters", str(where["cpu"]))
    results = (
        json.loads(output.read_text(encoding="utf-8"))
        if output.exists()
        else {"kind": "adapters", "runs": [], "checks": []}
    )
    work = Work(options, hub.find_model(options.base_model).path)
    cell = {
        n: getattr(options, n)
        for n in ("base_model", "adapters", "requests", "batch_size", "max_new_tokens", "threads")
    }
    facts = cell | {"rank": RANK, "environment": where}
    if options.check:
        results["checks"].append(facts | work.check(options.check))
        print(
            results["checks"][-1]["identical"],
            "of",
            results["checks"][-1]["completions_compared"],
            "completions are identical",
        )
    for way in list(options.ways) * (0 if options.check else options.rounds):
        found = getattr(work, way)()
        found["beginnings"] = [
            " ".join(map(str, ids)) for ids in work.beginnings(found.pop("outputs"))
        ]
        results["runs"].append({"at": utc_now(), "way": way} | facts | found)
        print(
            f"{way:>6}  {found['output_tokens'] / found['seconds']:8.1f} tokens/s, "
            f"{found['startup_s']:.1f} s of start-up"
        )
    results["summary"] = summarise(results["runs"])
    output.parent.mkdir(parents=True, exist_ok=True)
    write_json(output, results)


if __name__ == "__main__":
    main()
