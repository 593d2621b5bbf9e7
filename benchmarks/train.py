#!/usr/bin/env python3
"""LoRA training side by side: lorabatch against a plain transformers + peft loop, each run in a
process of its own.

Both start from the same adapter, see the same documents in the same order (8 a step unless told),
use AdamW with the same settings, and report every step. Ours packs; theirs pads to the longest
document of the step. Rounds alternate, so that a slow minute of the machine hits both. The losses
of all runs must agree.

    python benchmarks/train.py                       # three rounds, then the table
    python benchmarks/train.py --rounds 1 --append   # one more round into the newest file

The documents are MedQuAD's, which scripts/medquad.py makes.
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
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))
TRAINERS = ("lorabatch:auto", "peft:bf16", "peft:fp32")
# nats per token, at any step, between any two runs of one type: half of what bf16 and fp32 are
# apart
LOSS_TOLERANCE = 0.01
RANK, ALPHA, RATE, SEED, WARM_UP = 16, 32.0, 2e-4, 42, 2


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base_model", default="smollm2-135m")
    parser.add_argument("--documents", type=Path, default=ROOT / "MedQuAD" / "train.jsonl")
    parser.add_argument("--trainers", nargs="+", default=list(TRAINERS), metavar="NAME:DTYPE")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--steps", type=int, default=3, help="measured steps of a run, after two to warm up"
    )
    parser.add_argument("--batch_size", type=int, default=8, help="documents per step")
    parser.add_argument("--max_len", type=int, default=512)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument(
        "--append", action="store_true", help="add the rounds to the newest file of this machine"
    )
    parser.add_argument("--output_dir", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--adapter", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not args.documents.is_file():
        parser.error(f"{args.documents}: no such file; scripts/medquad.py makes it")
    if args.worker == "adapter":
        write_first_adapter(args)
        return 0
    if args.worker:
        print(json.dumps(run_worker(args)))
        return 0
    return compare(args)


def compare(args: argparse.Namespace) -> int:
    from tables import results_name, train_summary

    from lorabatch.machine.environment import environment

    here = environment()
    path = args.output_dir / results_name("train", f"{here['cpu']} {here['usable_cores']} cores")
    record: dict[str, Any] = {"runs": []}
    if args.append and path.exists():
        record = json.loads(path.read_text(encoding="utf-8"))
    settings = {k: getattr(args, k) for k in ("base_model", "batch_size", "max_len", "steps")} | {
        "documents": args.documents.name
    }
    if record.get("settings", settings) != settings:
        sys.exit(
            f"{path}: has other settings ({record['settings']}); leave --append out to start a "
            "new file"
        )
    record |= {"schema_version": 1, "kind": "train", "settings": settings, "environment": here}
    first_round = max((r["round"] for r in record["runs"]), default=0) + 1
    with tempfile.TemporaryDirectory() as scratch:
        spawn(args, "adapter", Path(scratch) / "adapter")
        for number in range(first_round, first_round + args.rounds):
            for trainer in args.trainers:
                run = {"trainer": trainer, "round": number} | spawn(
                    args, trainer, Path(scratch) / "adapter"
                )
                record["runs"].append(run)
                print(
                    (
                        f"round {number} {trainer:15} {run['tokens_per_s']:7.1f} real tokens/s  "
                        f"{run['peak_memory_bytes'] / 1e9:5.2f} GB"
                    ),
                    flush=True,
                )
                record["summary"] = summarise(record["runs"])
                args.output_dir.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"\n{train_summary(record, 'en')}\n{path}")
    apart = record["summary"]["largest_loss_difference"]
    print(
        "losses of runs of one type differ by at most "
        + ", ".join(f"{v:.4f} ({k})" for k, v in apart.items())
    )
    if max(apart.values()) > LOSS_TOLERANCE:
        print(f"that is more than {LOSS_TOLERANCE}", file=sys.stderr)
        return 1
    return 0


def spawn(args: argparse.Namespace, trainer: str, adapter: Path) -> dict[str, Any]:
    command = [
        sys.executable,
        __file__,
        "--worker",
        trainer,
        "--adapter",
        str(adapter),
        "--documents",
        str(args.documents),
    ]
    for name in ("base_model", "steps", "batch_size", "max_len", "threads"):
        if getattr(args, name) is not None:
            command += [f"--{name}", str(getattr(args, name))]
    # of this hour: the machine's own share comes and goes
    ceilings = {"LORABATCH_CEILINGS": str(adapter.parent / "ceilings")}
    done = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ | ceilings
    )
    return {} if trainer == "adapter" else json.loads(done.stdout.splitlines()[-1])


def summarise(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over rounds, the ratio to the faster of peft's types, and how far any two loss curves
    are apart."""
    trainers: dict[str, dict[str, float]] = {}
    for name in dict.fromkeys(r["trainer"] for r in runs):
        mine = [r for r in runs if r["trainer"] == name]
        keys = ("tokens_per_s", "padded_tokens_per_s", "peak_memory_bytes", "roofline_share")
        trainers[name] = {k: statistics.median(r[k] for r in mine) for k in keys} | {
            "rounds": len(mine)
        }
    theirs = [t for name, t in trainers.items() if name.startswith("peft:")]
    ours = [t for name, t in trainers.items() if name.startswith("lorabatch:")]
    ratios = {}
    if ours and theirs:
        best = max(theirs, key=lambda t: t["tokens_per_s"])
        ratios = {
            "speed_ratio": ours[0]["tokens_per_s"] / best["tokens_per_s"],
            "memory_ratio": ours[0]["peak_memory_bytes"] / best["peak_memory_bytes"],
        }
    apart = {}
    for dtype in dict.fromkeys(r["dtype"] for r in runs):
        curves = [r["losses"] for r in runs if r["dtype"] == dtype]
        apart[dtype] = max(max(step) - min(step) for step in zip(*curves, strict=True))
    return {"trainers": trainers, **ratios, "largest_loss_difference": apart}


# The processes that train


def run_worker(args: argparse.Namespace) -> dict[str, Any]:
    from lorabatch.model import hub

    hub.prepare_environment()
    from lorabatch.corpus.packing import training_steps
    from lorabatch.corpus.readers import read_documents
    from lorabatch.corpus.tokens import tokenise
    from lorabatch.machine.ceilings import measured_flops_per_s
    from lorabatch.machine.device import TYPES, choose_device, choose_dtype, choose_threads
    from lorabatch.machine.memory import peak_memory_bytes
    from lorabatch.model import load
    from lorabatch.model.cost import training_flops
    from lorabatch.model.spec import spec_from_config

    trainer, dtype_name = args.worker.split(":")
    device, threads = choose_device(no_cuda=True), choose_threads(args.threads)
    dtype = choose_dtype(dtype_name, device)
    source = hub.find_model(args.base_model)
    config = load.load_config(source.path)
    texts = read_documents(args.documents, txt_format="auto", text_field="text")[
        : args.batch_size * (args.steps + WARM_UP) * 4
    ]
    corpus = tokenise(texts, load.load_tokenizer(source.path), max_len=args.max_len)
    order = training_steps(len(corpus.documents), args.batch_size, epochs=1, seed=SEED)
    batches = [[corpus.documents[i] for i in indices] for _, indices in order][
        : args.steps + WARM_UP
    ]
    begin = start_ours if trainer == "lorabatch" else start_theirs
    step, lora_params = begin(source, config, dtype, device, args.adapter)
    seconds, losses = [], []
    for documents in batches:
        start = time.perf_counter()
        losses.append(step(documents))
        seconds.append(time.perf_counter() - start)
    peak = peak_memory_bytes()
    measured = [d for batch in batches[WARM_UP:] for d in batch]
    tokens = sum(d.num_tokens for d in measured)
    flops = training_flops(
        spec_from_config(config),
        tokens=tokens,
        targets=sum(d.num_targets for d in measured),
        squared_lengths=sum(d.num_tokens**2 for d in measured),
        lora_params=lora_params,
    )
    ceiling = max(measured_flops_per_s(d, device) for d in (TYPES["fp32"], TYPES["bf16"]))
    padded = sum(len(b) * max(d.num_tokens for d in b) for b in batches[WARM_UP:])
    total = sum(seconds[WARM_UP:])
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "threads": threads,
        "losses": losses,
        "step_s": seconds,
        "tokens": tokens,
        "tokens_per_s": tokens / total,
        "padded_tokens_per_s": (padded if trainer == "peft" else tokens) / total,
        "peak_memory_bytes": peak,
        "ceiling_flops_per_s": ceiling,
        "roofline_share": flops / total / ceiling,
    }


def start_ours(source: Any, config: Any, dtype: Any, device: Any, adapter: Path) -> Any:
    """The product's own step."""
    from lorabatch.config import TrainConfig
    from lorabatch.machine.device import keep_freed_memory
    from lorabatch.model import load
    from lorabatch.model.lora import LoraSettings
    from lorabatch.train.loop import train_step
    from lorabatch.train.ranks import Ranks
    from lorabatch.train.state import Trainable

    keep_freed_memory()  # as the product does
    model = load.load_model(source, config, backend="native", dtype=dtype, device=device)
    adapters = model.attach(LoraSettings(RANK, ALPHA), seed=SEED)  # the seed that wrote ``adapter``
    settings = TrainConfig(lr=RATE, lora_r=RANK, lora_alpha=ALPHA)
    learner, ranks = Trainable(adapters, settings), Ranks()

    def step(documents: Any) -> float:
        return train_step(model, learner, documents, settings, RATE, ranks)["loss"]

    return step, adapters.num_params


def write_first_adapter(args: argparse.Namespace) -> None:
    """The adapter that every run starts from, in peft's format."""
    import torch

    from lorabatch.model import hub

    hub.prepare_environment()
    from lorabatch.model import load
    from lorabatch.model.lora import LoraSettings, save_adapter

    source = hub.find_model(args.base_model)
    model = load.load_model(
        source,
        load.load_config(source.path),
        backend="native",
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    weights = model.attach(LoraSettings(RANK, ALPHA), seed=SEED).weights()
    save_adapter(
        args.adapter,
        weights,
        base_name=str(source.path),
        base_fingerprint=None,
        fan_in_fan_out=model.fan_in_fan_out,
    )


def start_theirs(source: Any, config: Any, dtype: Any, device: Any, adapter: Path) -> Any:
    """A plain loop over transformers + peft: pad to the longest, labels -100 where nothing is
    learnt."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(source.path, dtype=dtype, local_files_only=True)
    model = PeftModel.from_pretrained(base, adapter, is_trainable=True)
    model.train()
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=RATE, weight_decay=0.0, fused=True)

    def step(documents: Any) -> float:
        longest = max(d.num_tokens for d in documents)
        ids, mask = (
            torch.zeros(len(documents), longest, dtype=torch.long),
            torch.zeros(len(documents), longest, dtype=torch.long),
        )
        labels = torch.full((len(documents), longest), -100)
        for row, d in enumerate(documents):
            ids[row, : d.num_tokens], mask[row, : d.num_tokens] = torch.from_numpy(d.token_ids), 1
            labels[row, d.first_target : d.num_tokens] = torch.from_numpy(
                d.token_ids[d.first_target :]
            )
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        return float(loss.detach())

    return step, sum(p.numel() for p in trainable)


if __name__ == "__main__":
    sys.exit(main())
