"""The command lines of tests, the texts that they work on, and what they leave behind.

Of two equal flags the later one counts, so ``more`` may change everything. One thread: the models
are tiny, and threads that wait for a busy core cost more than they bring.
"""

import json
from pathlib import Path


def patients(count):
    return [
        f"The patient in bed {i} slept well and the monitor showed a steady rhythm {i}."
        for i in range(count)
    ]


TEXTS = patients(12)
ALL_CORES = ("--threads", "none")  # for the packaged model
FIXED = ("--dtype", "fp32", "--threads", "1")


def write_lines(path, lines):
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def write_rows(path, rows):
    return write_lines(path, map(json.dumps, rows))


def train_flags(model, corpus, save_dir, *more):
    """``train``, evaluated on the texts that it learns from; which the data checks would not
    allow."""
    words = ["train", "--base_model", model, "--train_path", corpus, "--val_path", corpus]
    words += ["--data_checks", "off"]
    return [str(w) for w in (*words, "--save_dir", save_dir, *FIXED, *more)]


def infer_flags(model, prompts, output_dir, *more):
    words = ["infer", "--base_model", model, "--prompts", prompts, "--output_dir", output_dir]
    return [str(w) for w in (*words, *FIXED, *more)]


def completions(folder):
    """The records of a run in the order of its file."""
    text = (Path(folder) / "completions.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def adapter_bytes(folder):
    """The adapter files of a training run: the result, the best and the last."""
    return [
        (Path(folder) / name / "adapter_model.safetensors").read_bytes()
        for name in (".", "best", "last")
    ]


def history(folder):
    """What events.jsonl says of the training, without times."""
    kept = ("event", "step", "epoch", "loss", "lr", "grad_norm", "eval_loss", "tokens", "documents")
    events = map(json.loads, (Path(folder) / "events.jsonl").read_text().splitlines())
    return [{k: e[k] for k in kept if k in e} for e in events if e["event"] in ("step", "eval")]
