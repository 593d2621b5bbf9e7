"""Hand-made run folders: records as a training and an inference leave them."""

import json

from lorabatch.config import InferConfig, TrainConfig

ENVIRONMENT = {
    "host": "node-1",
    "os": "Linux-6.1",
    "python": "3.11.7",
    "packages": {"torch": "2.13.0", "peft": None},
    "cpu": "Test CPU",
    "logical_cores": 4,
    "usable_cores": 2,
    "memory_bytes": 8 * 2**30,
    "git": {"commit": "0123abc", "dirty": False},
    "slurm": {"job_id": "17", "job_partition": "gpu"},
}
TRAIN_METRICS = {
    "steps": 3,
    "planned_steps": 3,
    "loss": 2.5,
    "eval_loss": 2.25,
    "eval_loss_before": 3.0,
    "bits_per_byte": 0.9,
    "bits_per_byte_before": 1.2,
    "best_step": 3,
    "epoch_s": None,
    "p50_step_ms": 500.0,
    "tokens_per_s": 1234.5,
    "train_flops_per_s": 3e11,
    "cold_flops_per_s": 4e11,
    "cold_share": 0.75,
    "padding_share": 0.0,
    "energy_j": None,
    "peak_memory_bytes": 3 * 2**29,
    "phases": {"load_s": 1.5},
}
INFER_METRICS = {
    "iterations": 1,
    "completed": 3,
    "failed": 1,
    "empty": 1,
    "output_throughput": 80.0,
    "tokens_per_s_including_startup": 40.0,
    "startup_s": 2.0,
    "p50_e2el_ms": 250.0,
    "p95_e2el_ms": 1250.0,
    "mbu": None,
    "energy_j": None,
}


def write_jsonl(path, rows, *, torn=""):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + torn, encoding="utf-8")


def write_run(path, kind, config, *, metrics, model, status="completed", environment=None, **extra):
    path.mkdir(parents=True)
    record = {
        "schema_version": 1,
        "kind": kind,
        "status": status,
        "started_at": "2026-01-02T03:04:05+00:00",
        "finished_at": None,
    }
    record |= {
        "command": ["lorabatch", kind, "--save_dir", "a b"],
        "config": config,
        "environment": ENVIRONMENT | (environment or {}),
    }
    machine = {"device": "cpu", "dtype": "fp32", "threads": 2, "backend": "native", "gpu": None}
    (path / "run.json").write_text(json.dumps(record | {"model": model} | machine | extra))
    if metrics is not None:
        (path / "metrics.json").write_text(json.dumps({"kind": kind} | metrics))
    write_jsonl(
        path / "system.jsonl",
        [{"t_s": t, "cpu_percent": 50.0 * t, "rss_bytes": t * 2**30} for t in (1, 2, 3)],
    )
    return path


def train_run(path, *, metrics=TRAIN_METRICS, torn="", checks=None, **changes):
    model = {
        "name": "tiny",
        "converted_from": "tiny.Q4_1.gguf",
        "fingerprint": "f1",
        "trainable_params": 1000,
        "base_params": 99000,
        "trainable_share": 0.01,
    }
    data = {
        "train": {"documents": 24, "tokens": 3000, "split": 1},
        "val": {"documents": 5, "tokens": 400, "target_tokens": 395},
        "checks": checks,
    }
    config = TrainConfig(base_model="tiny", lr=1e-3).to_dict()
    write_run(path, "train", config, metrics=metrics, model=model, data=data, **changes)
    events = [{"event": "eval", "step": 0, "eval_loss": 3.0, "bits_per_byte": 1.2}]
    events += [
        {"event": "step", "step": s, "loss": 4 - s / 2, "lr": s * 1e-4, "tokens_per_s": 1000.0 + s}
        for s in (1, 2, 3)
    ]
    write_jsonl(
        path / "events.jsonl",
        [*events, {"event": "eval", "step": 3, "eval_loss": 2.25, "bits_per_byte": 0.9}],
        torn=torn,
    )
    return path


def completion(index, prompt, text, *, error=None):
    times = (
        {"queue_ms": 0.5, "ttft_ms": 50.0 + index, "e2el_ms": 250.0 + index}
        if error is None
        else {}
    )
    row = {
        "id": str(index),
        "index": index,
        "sample": 0,
        "key": f"{index:016x}",
        "prompt": prompt,
        "text": text,
        "error": error,
    }
    row |= {
        "input_tokens": 3,
        "output_tokens": 11,
        "finish_reason": "error" if error else "length",
        "chat": False,
    }
    return (
        row
        | dict.fromkeys(("queue_ms", "ttft_ms", "e2el_ms", "truncated", "adapter", "logprobs"))
        | times
    )


def infer_run(path, completions, *, adapter=None, metrics=INFER_METRICS, **changes):
    config = InferConfig(base_model="tiny", adapter_dir=adapter).to_dict()
    write_run(
        path,
        "infer",
        config,
        metrics=metrics,
        model={"name": "tiny", "fingerprint": "f1", "adapter": adapter},
        **changes,
    )
    write_jsonl(path / "completions.jsonl", completions)
    return path
