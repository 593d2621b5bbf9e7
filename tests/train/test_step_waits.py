"""How often the host waits for the device in an optimiser step: once. On the meta device there are
no numbers, so what asks for one fails there, as far as the step's own."""

import ast

import pytest
import torch
from support.launches import on_meta
from support.models import native, random_ids, tiny_model
from support.paths import SRC

from lorabatch.config import TrainConfig
from lorabatch.corpus.tokens import TokenDocument
from lorabatch.model.lora import LoraSettings
from lorabatch.train import loop
from lorabatch.train.ranks import ALONE
from lorabatch.train.state import Trainable

WAITS = {"tolist", "item", "cpu", "numpy", "nonzero", "isfinite", "synchronize", "is_nonzero"}


def test_the_gradient_of_several_blocks_never_waits():
    config = TrainConfig(lora_r=4, block_tokens=32)
    model = on_meta(native(tiny_model("llama"), dtype=torch.bfloat16, prepack=False))
    learner = Trainable(model.attach(LoraSettings(r=4, alpha=8.0), seed=0), config)
    documents = [TokenDocument(ids.numpy(), 1) for ids in random_ids([20, 30, 17])]
    loss_sum = loop._gradient_sum(model, learner, documents, ALONE)
    assert loss_sum.device.type == "meta" and loss_sum.shape == ()
    with pytest.raises((RuntimeError, NotImplementedError)):
        loss_sum.tolist()


def test_the_step_asks_for_numbers_in_one_place():
    source = (SRC / "lorabatch" / "train" / "loop.py").read_text("utf-8")
    step = {"train_step", "_mean_gradient", "_gradient_sum", "_backward"}
    functions = [
        f for f in ast.parse(source).body if isinstance(f, ast.FunctionDef) and f.name in step
    ]
    assert {f.name for f in functions} == step
    nodes = [node for f in functions for node in ast.walk(f)]
    # math.isfinite is of a Python number
    asked = [
        n.attr
        for n in nodes
        if isinstance(n, ast.Attribute)
        and n.attr in WAITS
        and not (isinstance(n.value, ast.Name) and n.value.id == "math")
    ]
    assert asked == ["tolist"]
    casts = [
        ast.unparse(n)
        for n in nodes
        if isinstance(n, ast.Call)
        and isinstance(n.func, ast.Name)
        and n.func.id in ("float", "int", "bool")
    ]
    assert casts == ["float(counts)"], "whether a block counts is known to the host"
