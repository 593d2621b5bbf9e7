"""``lorabatch bench train``: whole optimiser steps on random documents, over batch sizes or numbers of threads."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lorabatch import hub
from lorabatch.config import BenchTrainConfig, TrainConfig
from lorabatch.corpus.tokens import TokenDocument
from lorabatch.measure.environment import gpu_description
from lorabatch.measure.scaling import bench_record, sweep
from lorabatch.model import load
from lorabatch.model.device import TYPE_NAMES, choose_device, choose_dtype, choose_threads
from lorabatch.model.lora import LoraSettings
from lorabatch.records import write_json
from lorabatch.train.loop import train_step
from lorabatch.train.ranks import ALONE
from lorabatch.train.state import Learner


def run_bench_train(config: BenchTrainConfig, command: list[str]) -> int:
    """Measure, print the table, write its JSON twin."""
    hub.prepare_environment()
    source = hub.find_model(config.base_model)
    device, threads = choose_device(no_cuda=config.no_cuda), choose_threads(config.threads)
    dtype = choose_dtype(config.dtype, device)
    model_config = load.load_config(source.path)
    model = load.load_model(source, model_config, backend="auto", dtype=dtype, device=device)
    name, levels = ("threads", config.threads_sweep) if config.threads_sweep else ("batch_size", config.batch_sizes)
    step = _Step(model, config, model_config.vocab_size)
    points = sweep(name, levels, config.repeats, lambda level: step.measured(name, level))
    torch.set_num_threads(threads)
    facts = {"gpu": gpu_description(), "dtype": TYPE_NAMES[dtype], "device": str(device), "threads": threads}
    record = bench_record("bench train", name, points, command=command, config=config.to_dict(), model={"name": source.name}, **facts)
    path = Path(config.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, record)
    print(f"{source.name}, {TYPE_NAMES[dtype]} on {device}, {threads} threads; documents of {config.document_tokens} tokens")
    for point in record["points"]:
        rate, time_ms = point["tokens_per_s"], point["step_ms"]["median"]
        interval = "" if rate["low"] is None else f"  [{rate['low']:.0f}, {rate['high']:.0f}]"
        print(f"  {name} {point[name]:>4}  {rate['median']:8.0f} tokens/s{interval}  {time_ms:8.0f} ms a step")
    print(path)
    return 0


class _Step:
    """Optimiser steps of any size on one model; the first of each level is not measured."""

    def __init__(self, model: Any, config: BenchTrainConfig, vocabulary: int) -> None:
        self._model, self._config, self._vocabulary = model, config, vocabulary
        self._settings = TrainConfig(block_tokens=config.block_tokens, lora_r=config.lora_r)
        adapters = model.attach(LoraSettings(r=config.lora_r), seed=0)
        self._learner = Learner(adapters, self._settings)
        self._warm: set[int] = set()
        self._random = random.Random(0)

    def measured(self, name: str, level: int) -> dict[str, float | None]:
        if name == "threads":
            torch.set_num_threads(level)
        size = level if name == "batch_size" else self._config.batch_sizes[0]
        if level not in self._warm:
            self._warm.add(level)
            self._run(size)
        record = self._run(size)
        return {"tokens_per_s": record["tokens_per_s"], "step_ms": record["step_ms"]}

    def _run(self, size: int) -> dict[str, Any]:
        length = self._config.document_tokens
        ids = [np.array(self._random.choices(range(self._vocabulary), k=length)) for _ in range(size)]
        return train_step(self._model, self._learner, [TokenDocument(i, 1) for i in ids], self._settings, 1e-4, ALONE)
