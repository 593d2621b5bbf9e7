"""Batched inference, ours beside other engines on the same prompts: ``python benchmarks/infer.py --help``.

Every engine is a process of its own (benchmarks/peers/) that keeps its model loaded. One engine runs at a time,
the others are stopped (SIGSTOP), because idle engines may spin. Rounds alternate, A B C A B C, after a short
warm-up of each; a number is only ever compared with numbers of the same sitting. Sittings are appended to one
JSON file; benchmarks/tables.py makes the README's table from it.
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
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from tables import agreement

from lorabatch import hub
from lorabatch.measure.environment import environment
from lorabatch.records import write_json

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
COMPARED_TOKENS, COMPARED_REQUESTS = 16, 16  # whose beginnings are kept, to see that engines do the same work


class Missing(Exception):
    """This engine cannot take part; the message says why. Never a slow engine."""


class Peer:
    """One engine's process, stopped unless it is its turn."""

    def __init__(self, name: str, model: Path, mode: str, threads: int) -> None:
        self.name, self.seconds, self.outputs = name, [], []
        python = Path(sys.executable) if name == "lorabatch" else PEERS_HOME / name / "bin/python"
        if not python.exists():
            raise Missing(f"not installed (bash benchmarks/peers/install.sh {name})")
        script = HERE / "peers" / f"peer_{name}.py"
        command = [python, script, "--model", model, "--mode", mode, "--cache", PEERS_HOME / "models", "--threads", threads]
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
        """One batch from ids to ids; returns seconds. Raises Missing if the engine dies or returns too little."""
        self._signal(signal.SIGCONT)
        start = time.perf_counter()
        self._process.stdin.write(json.dumps({"prompts": prompts, "max_new_tokens": max_new_tokens}) + "\n")
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
    """repeated: four short prompts over and over. distinct: the sample's prompts, then beginnings of 8 to 71 words of its documents."""
    if workload == "repeated":
        return [SHORT_PROMPTS[i % len(SHORT_PROMPTS)] for i in range(count)]
    sample = HERE.parent / "data_sample"
    texts = (sample / "prompts.txt").read_text(encoding="utf-8").split("\n")
    documents = [d.split() for d in (sample / "train.txt").read_text(encoding="utf-8").split("\n") if len(d.split()) >= 72]
    texts += [" ".join(words[: 8 + 37 * i % 64]) for i, words in enumerate(documents)]
    texts = list(dict.fromkeys(t for t in texts if t))
    if len(texts) < count:
        sys.exit(f"data_sample holds {len(texts)} distinct prompts, not {count}")
    return texts[:count]


def sitting(options: argparse.Namespace, model: Path, mode: str, workload: str, batch_size: int) -> dict[str, Any]:
    """All engines, alternating, on one batch; what benchmarks/tables.py reads."""
    from lorabatch.model.load import load_tokenizer

    prompts = load_tokenizer(model)(prompt_texts(workload, batch_size))["input_ids"]
    record: dict[str, Any] = {"mode": mode, "workload": workload, "batch_size": batch_size, "max_new_tokens": options.max_new_tokens}
    record |= {"at": datetime.now(timezone.utc).isoformat(timespec="seconds"), "input_tokens": sum(map(len, prompts)), "engines": {}}
    peers: list[Peer] = []

    def attempt(name: str, action: Any) -> Any:
        try:
            return action()
        except (Missing, BrokenPipeError) as error:
            record["engines"][name] = {"missing": str(error)}
            print(f"{name:>14}  missing: {error}")

    try:
        for name in options.engines:
            peer = attempt(name, lambda name=name: Peer(name, model, mode, options.threads))
            if peer and attempt(name, lambda peer=peer: peer.round(prompts, WARM_UP_TOKENS)):
                peers.append(peer)
            elif peer:
                peer.close()
        for _ in range(options.rounds):
            for peer in list(peers):
                seconds = attempt(peer.name, lambda peer=peer: peer.round(prompts, options.max_new_tokens))
                if seconds:
                    peer.seconds.append(seconds)
                else:
                    peers.remove(peer)
                    peer.close()
        for peer in peers:
            record["engines"][peer.name] = _result(peer)
    finally:
        for peer in peers:
            peer.close()
    return record


def _result(peer: Peer) -> dict[str, Any]:
    tokens = sum(map(len, peer.outputs))
    beginnings = [" ".join(map(str, ids[:COMPARED_TOKENS])) for ids in peer.outputs[:COMPARED_REQUESTS]]
    return {
        **peer.facts,
        "output_tokens": tokens,
        "seconds": peer.seconds,
        "tokens_per_s": [tokens / s for s in peer.seconds],
        "peak_rss_bytes": peer.peak_rss_bytes(),
        "first_tokens": beginnings,
    }


def show(record: dict[str, Any]) -> None:
    done = {name: e for name, e in record["engines"].items() if "seconds" in e}
    if not done or not all(e["seconds"] for e in done.values()):
        return
    first = next(iter(done))
    middle = {name: statistics.median(e["tokens_per_s"]) for name, e in done.items()}
    for name, e in done.items():
        low, high = min(e["tokens_per_s"]), max(e["tokens_per_s"])
        same = agreement(done[first]["first_tokens"], e["first_tokens"])
        print(
            f"{name:>14}  {middle[name]:7.1f} tokens/s ({low:.1f}..{high:.1f})  {first} is {middle[first] / middle[name]:.2f}x"
            f"  {e['dtype']}  peak {e['peak_rss_bytes'] / 2**30:.1f} GiB  start-up {e['startup_s']:.1f} s  same beginning {same:.0%}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=ENGINES)
    parser.add_argument("--base_model", default="smollm2-135m")
    parser.add_argument("--modes", nargs="+", choices=("exact", "int8"), default=["exact", "int8"])
    parser.add_argument("--workloads", nargs="+", choices=("repeated", "distinct"), default=["repeated", "distinct"])
    parser.add_argument("--batch_sizes", nargs="+", type=int, default=[1, 16, 64, 256])
    parser.add_argument("--max_new_tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3, help="0 only starts each engine, which converts its model where needed")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--output", type=Path, help="appended to [benchmarks/results/infer-CPU-DATE.json]")
    options = parser.parse_args()
    where = environment()
    cpu = re.sub(r"[^a-z0-9]+", "-", f"{where['cpu']}".lower()).strip("-")
    output = options.output or HERE / "results" / f"infer-{cpu}-{datetime.now(timezone.utc):%Y-%m-%d}.json"
    model = hub.find_model(options.base_model).path
    for mode in options.modes:
        for workload in options.workloads:
            for batch_size in options.batch_sizes:
                print(f"{mode}, {workload} prompts, batch {batch_size}")
                record = sitting(options, model, mode, workload, batch_size)
                show(record)
                if options.rounds:
                    results = json.loads(output.read_text(encoding="utf-8")) if output.exists() else {"kind": "infer", "sittings": []}
                    record |= {"base_model": options.base_model, "threads": options.threads, "environment": where}
                    results["sittings"].append(record)
                    output.parent.mkdir(parents=True, exist_ok=True)
                    write_json(output, results)


if __name__ == "__main__":
    main()
