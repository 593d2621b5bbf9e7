"""``lorabatch bench train``: whole optimiser steps on random documents, over batch sizes or numbers
of threads."""

from __future__ import annotations

import random

import numpy as np

from lorabatch.bench.sweep import Bench
from lorabatch.config import TrainConfig
from lorabatch.config_measure import BenchTrainConfig
from lorabatch.corpus.tokens import TokenDocument
from lorabatch.machine.device import TYPE_NAMES
from lorabatch.model import load
from lorabatch.model.lora_settings import LoraSettings
from lorabatch.progress import counted
from lorabatch.train.loop import train_step
from lorabatch.train.state import Trainable


def run_bench_train(config: BenchTrainConfig, command: list[str]) -> int:
    """Measure, print the table, write its JSON twin."""
    bench = Bench.prepare(config)
    model = load.load_model(
        bench.source, bench.model_config, backend="auto", dtype=bench.dtype, device=bench.device
    )
    settings = TrainConfig(block_tokens=config.block_tokens, lora_r=config.lora_r)
    trainable = Trainable(model.attach(LoraSettings(r=config.lora_r), seed=0), settings)
    draw, vocabulary = random.Random(0), range(bench.model_config.vocab_size)

    def one_step(size: int) -> dict[str, float | None]:
        ids = [np.array(draw.choices(vocabulary, k=config.document_tokens)) for _ in range(size)]
        record = train_step(model, trainable, [TokenDocument(i, 1) for i in ids], settings, 1e-4)
        return {"tokens_per_s": record["tokens_per_s"], "step_ms": record["step_ms"]}

    points = bench.points(one_step)
    where = f"{TYPE_NAMES[bench.dtype]} on {bench.device}, {counted(bench.threads, 'thread')}"
    print(f"{bench.source.name}, {where}; documents of {config.document_tokens} tokens\n")
    return bench.finish("bench train", points, command)
