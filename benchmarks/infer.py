"""Batched inference, ours beside other engines on the same prompts: ``python benchmarks/infer.py
--help``.

Every engine is a process of its own (benchmarks/peers/) that keeps its model loaded. One engine
runs at a time, the others are stopped (SIGSTOP), because idle engines may spin. Rounds alternate, A
B C A B C, after a short warm-up of each; a number is only ever compared with numbers of the same
sitting. Sittings are appended to one JSON file; benchmarks/tables.py makes the README's table from
it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from itertools import product
from pathlib import Path
from typing import Any

from tables import agreement, results_name

from lorabatch.machine.environment import environment
from lorabatch.model import hub
from lorabatch.model.load import load_tokenizer
from lorabatch.records import utc_now, write_json

HERE = Path(__file__).parent
ENGINES = ("lorabatch", "openvino", "transformers", "vllm", "ctranslate2", "llamacpp")
PEERS_HOME = Path(os.environ.get("PEERS_HOME", "~/.cache/lorabatch-peers")).expanduser()
SHORT_PROMPTS = (
    "Question: What are the symptoms of type 2 diabetes? Answer:",
    "The most common cause of chronic cough in a smoker is",
    "Before an MRI scan, the patient should tell the radiographer",
    "Question: How is high blood pressure treated? Answer:",
)
WARM_UP_TOKENS = 8
# whose beginnings are kept, to see that engines do the same work
COMPARED_TOKENS, COMPARED_REQUESTS = 16, 16


class Missing(Exception):
    """This engine cannot take part; the message says why. Never a slow engine."""


class Peer:
    """One engine's process, stopped unless it is its turn."""

    def __init__(self, name: str, model: Path, mode: str, threads: int) -> None:
        self.name, self.outputs = name, []
        python = Path(sys.executable) if name == "lorabatch" else PEERS_HOME / name / "bin/python"
        if not python.exists():
            raise Missing(f"not installed (bash benchmarks/peers/install.sh {name})")
        script = HERE / "peers" / f"peer_{name}.py"
        command = [
            python,
            script,
            "--model",
            model,
            "--mode",
            mode,
            "--cache",
            PEERS_HOME / "models",
            "--threads",
            threads,
        ]
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115  # lives as long as the process
        self._process = subprocess.Popen(
            list(map(str, command)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            start_new_session=True,
            env=os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"},
        )
        self.facts = self._answer()
        self._signal(signal.SIGSTOP)

    def _answer(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        if line:
            return json.loads(line)
        code = self._process.wait()
        self._log.seek(0)
        last = (self._log.read().strip().splitlines() or ["it said nothing"])[-1]
        raise Missing(last if code == 3 else f"failed: {last}")

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def round(self, prompts: list[list[int]], max_new_tokens: int) -> float:
        """One batch from ids to ids; returns seconds. Raises Missing if the engine dies or returns
        too little."""
        self._signal(signal.SIGCONT)
        start = time.perf_counter()
        self._process.stdin.write(
            json.dumps({"prompts": prompts, "max_new_tokens": max_new_tokens}) + "\n"
        )
        self._process.stdin.flush()
        self.outputs = self._answer()["outputs"]
        seconds = time.perf_counter() - start
        self._signal(signal.SIGSTOP)
        if [len(ids) for ids in self.outputs] != [max_new_tokens] * len(prompts):
            raise Missing(f"did not return {max_new_tokens} tokens for each prompt")
        return seconds

    def peak_rss_bytes(self) -> int:
        status = Path(f"/proc/{self._process.pid}/status").read_text(encoding="utf-8")
        return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) * 1024

    def close(self) -> None:
        self._signal(signal.SIGKILL)
        self._process.wait()


def prompt_texts(workload: str, count: int) -> list[str]:
    """repeated: four short prompts over and over. distinct: the sample's prompts, then beginnings
    of 8 to 71 words of its documents."""
    if workload == "repeated":
        return [SHORT_PROMPTS[i % len(SHORT_PROMPTS)] for i in range(count)]
    sample = HERE.parent / "data_sample"
    texts = (sample / "prompts.txt").read_text(encoding="utf-8").split("\n")
    documents = [
        d.split()
        for d in (sample / "train.txt").read_text(encoding="utf-8").split("\n")
        if len(d.split()) >= 72
    ]
    texts += [" ".join(words[: 8 + 37 * i % 64]) for i, words in enumerate(documents)]
    texts = list(dict.fromkeys(t for t in texts if t))
    if len(texts) < count:
        sys.exit(f"data_sample holds {len(texts)} distinct prompts, not {count}")
    return texts[:count]


def alternate(
    peers: list[Peer], prompts: list[list[int]], max_new_tokens: int, rounds: int
) -> dict[str, Any]:
    """A warm-up each, then rounds A B C A B C. Results by engine; one that fails is closed and
    leaves ``peers``."""
    results: dict[str, Any] = {}
    seconds: dict[str, list[float]] = {peer.name: [] for peer in peers}
    for tokens in [WARM_UP_TOKENS] + [max_new_tokens] * rounds:
        for peer in list(peers):
            try:
                seconds[peer.name].append(peer.round(prompts, tokens))
            except (Missing, BrokenPipeError) as error:
                results[peer.name] = {"missing": str(error)}
                print(f"{peer.name:>14}  {error}")
                peers.remove(peer)
                peer.close()
    return results | {peer.name: _result(peer, seconds[peer.name][1:]) for peer in peers}


def start(
    engines: Iterable[str], model: Path, mode: str, threads: int
) -> tuple[list[Peer], dict[str, Any]]:
    """(the engines that started, why the others did not)."""
    peers, missing = [], {}
    for name in engines:
        try:
            peers.append(Peer(name, model, mode, threads))
            print(f"{name:>14}  {peers[-1].facts}")
        except Missing as error:
            missing[name] = {"missing": str(error)}
            print(f"{name:>14}  missing: {error}")
    return peers, missing


def append(output: Path, record: dict[str, Any]) -> None:
    results = (
        json.loads(output.read_text(encoding="utf-8"))
        if output.exists()
        else {"kind": "infer", "sittings": []}
    )
    results["sittings"].append(record)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_json(output, results)


def _result(peer: Peer, seconds: list[float]) -> dict[str, Any]:
    tokens = sum(map(len, peer.outputs))
    beginnings = [
        " ".join(map(str, ids[:COMPARED_TOKENS])) for ids in peer.outputs[:COMPARED_REQUESTS]
    ]
    return {
        **peer.facts,
        "output_tokens": tokens,
        "seconds": seconds,
        "tokens_per_s": [tokens / s for s in seconds],
        "peak_rss_bytes": peer.peak_rss_bytes(),
        "first_tokens": beginnings,
    }


def show(engines: dict[str, Any]) -> None:
    done = {name: e for name, e in engines.items() if "seconds" in e}
    if not done:
        return
    first = next(iter(done))
    middle = {name: statistics.median(e["tokens_per_s"]) for name, e in done.items()}
    for name, e in done.items():
        low, high = min(e["tokens_per_s"]), max(e["tokens_per_s"])
        same = agreement(done[first]["first_tokens"], e["first_tokens"])
        print(
            f"{name:>14}  {middle[name]:7.1f} tokens/s ({low:.1f}..{high:.1f})  {first} is "
            f"{middle[first] / middle[name]:.2f}x"
            f"  {e['dtype']}  peak {e['peak_rss_bytes'] / 2**30:.1f} GiB  start-up "
            f"{e['startup_s']:.1f} s  same beginning {same:.0%}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=ENGINES)
    parser.add_argument("--base_model", default="smollm2-135m")
    parser.add_argument("--modes", nargs="+", choices=("exact", "int8"), default=["exact", "int8"])
    parser.add_argument(
        "--workloads", nargs="+", choices=("repeated", "distinct"), default=["repeated", "distinct"]
    )
    parser.add_argument("--batch_sizes", nargs="+", type=int, default=[1, 16, 64, 256])
    parser.add_argument("--max_new_tokens", type=int, default=64)
    parser.add_argument(
        "--rounds",
        type=int,
        default=3,
        help="0 only starts each engine, which converts its model where needed",
    )
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument(
        "--output", type=Path, help="appended to [benchmarks/results/infer-CPU-DATE.json]"
    )
    options = parser.parse_args()
    where = environment()
    output = options.output or HERE / "results" / results_name("infer", str(where["cpu"]))
    model = hub.find_model(options.base_model).path
    facts = {
        "base_model": options.base_model,
        "threads": options.threads,
        "max_new_tokens": options.max_new_tokens,
        "environment": where,
    }
    for mode in options.modes:
        peers, missing = start(options.engines, model, mode, options.threads)
        try:
            for workload, batch_size in product(
                options.workloads, options.batch_sizes if options.rounds else ()
            ):
                prompts = load_tokenizer(model)(prompt_texts(workload, batch_size))["input_ids"]
                input_tokens = sum(map(len, prompts))
                print(
                    f"{mode}, {workload} prompts, batch {batch_size}, {input_tokens} prompt tokens"
                )
                record = {
                    "at": utc_now(),
                    "mode": mode,
                    "workload": workload,
                    "batch_size": batch_size,
                    "input_tokens": input_tokens,
                } | facts
                record["engines"] = missing | alternate(
                    peers, prompts, options.max_new_tokens, options.rounds
                )
                show(record["engines"])
                append(output, record)
        finally:
            for peer in peers:
                peer.close()


if __name__ == "__main__":
    main()
