"""Settings of the training pass, the memory prediction against a real peak, out of memory in the
middle of a step, LoRA+ against peft."""

import json
import math
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from support.models import NATIVE_TYPES, native, random_ids, tiny_corpus, tiny_model
from support.processes import ENVIRONMENT

from lorabatch.config import TrainConfig
from lorabatch.corpus.tokens import TokenDocument
from lorabatch.errors import TrainingError
from lorabatch.machine import memory
from lorabatch.machine.cgroup import ControlGroup
from lorabatch.machine.device import free_bytes, out_of_memory
from lorabatch.model.lora import LoraSettings
from lorabatch.model.loss import CHUNK_ELEMENTS, LossTerms
from lorabatch.train import planner
from lorabatch.train.loop import train_step
from lorabatch.train.planner import (
    HEADROOM,
    Kept,
    halved,
    kept_by,
    plan,
    step_bytes,
    within_memory,
)
from lorabatch.train.ranks import ALONE
from lorabatch.train.state import Trainable
from lorabatch.train.validation import evaluate


def learner_of(config, *, targets=("all-linear",)):
    model = native(tiny_model("llama"))
    model.configure(LossTerms(config.label_smoothing, config.z_loss), config.checkpointing)
    learner = Trainable(
        model.attach(
            LoraSettings(config.lora_r, config.lora_alpha, target_modules=targets), seed=1
        ),
        config,
    )
    for _, b in learner.adapters.pairs.values():  # away from zero, where A would get no gradient
        b.data.normal_(std=0.05, generator=torch.Generator().manual_seed(b.numel()))
    return model, learner


def documents(lengths=(9, 30, 17)):
    return [TokenDocument(ids.numpy(), 1) for ids in random_ids(lengths)]


def test_checkpointing_changes_no_gradient():
    grads = []
    for mode in ("none", "selective", "full"):
        config = TrainConfig(checkpointing=mode, lora_r=4, max_grad_norm=0)
        model, learner = learner_of(config)
        train_step(model, learner, documents(), config, 1e-3, ALONE)
        grads.append(learner.adapters.grad.clone())
    assert grads[0].norm() > 0.01
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(grads[2], grads[0], rtol=1e-5, atol=1e-7)


def test_nothing_below_the_lowest_adapted_layer_is_back_propagated():
    top = len(tiny_layers := native(tiny_model("llama")).decoder.layers) - 1
    assert len(tiny_layers) > 1
    config = TrainConfig(lora_r=4)
    model, learner = learner_of(config, targets=(f"layers.{top}.mlp.down_proj",))
    seen = []
    for index, linear in enumerate(model.decoder.linears()):
        real = linear.product.input_grad
        linear.product.input_grad = lambda grad, index=index, real=real: (
            seen.append(index) or real(grad)
        )
    train_step(model, learner, documents(), config, 1e-3, ALONE)
    assert learner.adapters.grad.norm() > 0
    assert not seen, (
        "the adapted layer itself needs no input gradient, and no other layer runs backwards"
    )


def test_out_of_memory_repeats_the_step_in_smaller_blocks(capsys):
    config = TrainConfig(lora_r=4, block_tokens=64)
    model, learner = learner_of(config)
    expected = train_step(model, learner, documents(), config, 1e-3, ALONE)
    wanted = learner.adapters.flat.detach().clone()
    model, learner = learner_of(config)
    real, calls = model.loss_sum, []

    def loss_sum(token_ids, first_targets):
        calls.append(sum(map(len, token_ids)))
        if calls[-1] > 40:
            raise RuntimeError(
                "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you "
                "tried to allocate 99 bytes"
            )
        return real(token_ids, first_targets)

    model.loss_sum = loss_sum
    record = train_step(model, learner, documents(), config, 1e-3, ALONE)
    assert calls[0] == 56 and max(calls[1:]) <= 32 and learner.block_tokens == 32
    assert record["loss"] == pytest.approx(expected["loss"], rel=1e-6) and record["step"] == 1
    torch.testing.assert_close(learner.adapters.flat.detach(), wanted, rtol=0, atol=2e-5)
    assert "blocks of 64 tokens: repeated with blocks of 32" in capsys.readouterr().err
    with pytest.raises(TrainingError, match="one document at a time"):
        halved(8, documents(), MemoryError())
    assert not out_of_memory(RuntimeError("shape mismatch")) and out_of_memory(
        RuntimeError("could not create a memory object")
    )


def test_free_memory_is_what_the_jobs_group_leaves(tmp_path, monkeypatch):
    """Slurm limits the group of the job, not the root of all groups; a model file that was read
    counts as free."""
    job = tmp_path / "system.slice/job_7"
    job.mkdir(parents=True)
    (tmp_path / "cgroup.controllers").write_text("cpu memory\n")
    (tmp_path / "membership").write_text("0::/system.slice/job_7/step_0\n")
    for name, text in (
        ("max", "3000000"),
        ("current", "2500000"),
        ("stat", "anon 1900000\ninactive_file 600000\nactive_file 5"),
    ):
        (job / f"memory.{name}").write_text(f"{text}\n")
    monkeypatch.setattr(
        memory, "ControlGroup", partial(ControlGroup, tmp_path, tmp_path / "membership")
    )
    assert free_bytes(torch.device("cpu")) == 1_100_000


def test_blocks_are_halved_until_a_step_fits_but_not_below_a_document(monkeypatch, capsys):
    model, config = (
        native(tiny_model("llama")),
        TrainConfig(lora_r=4, block_tokens=4096, max_len=1024),
    )

    def planned(free):
        monkeypatch.setattr(planner, "free_bytes", lambda device: free)
        return plan(model, config, 1000)

    whole, needed = planned(2**50)
    assert whole == 4096 and not capsys.readouterr().err
    fits = math.ceil(needed / HEADROOM)
    assert planned(fits) == (4096, needed) and not capsys.readouterr().err
    assert (
        planned(fits - 2)[0] == 2048
        and "blocks of 2048 instead of 4096 tokens" in capsys.readouterr().err
    )
    assert planned(1)[0] == 1024 and "blocks of 1024 instead" in capsys.readouterr().err, (
        "a document of --max_len still fits a block"
    )


def test_lora_plus_is_pefts():
    """Three steps with the same gradients: peft's optimiser with two groups, and ours with one and
    a factor."""
    peft_optimizers = pytest.importorskip("peft.optimizers")
    config = TrainConfig(lora_r=4, lora_plus_ratio=16.0)
    _, learner = learner_of(config)

    class Mirror(torch.nn.Module):
        def __init__(self):
            super().__init__()
            for i, (a, b) in enumerate(learner.adapters.pairs.values()):
                self.register_parameter(f"{i}_lora_A", torch.nn.Parameter(a.detach().clone()))
                self.register_parameter(f"{i}_lora_B", torch.nn.Parameter(b.detach().clone()))

        def get_base_model(self):
            return self

    mirror = Mirror()
    theirs = peft_optimizers.create_loraplus_optimizer(
        mirror, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16.0, weight_decay=0.0
    )
    ours = [p for pair in learner.adapters.pairs.values() for p in pair]
    for step in range(3):
        learner.adapters.grad.copy_(
            torch.randn(learner.adapters.num_params, generator=torch.Generator().manual_seed(step))
        )
        for p, mine in zip(mirror.parameters(), ours, strict=True):
            p.grad = mine.grad.clone()
        theirs.step()
        learner.update(1e-3)
    for p, mine in zip(mirror.parameters(), ours, strict=True):
        torch.testing.assert_close(mine.detach(), p.detach(), rtol=1e-5, atol=1e-6)


PEAK = """
import json, sys, psutil, torch
from pathlib import Path
from lorabatch.config import TrainConfig
from lorabatch.model.hub import ModelSource
from lorabatch.model import load
from lorabatch.machine.device import TYPES, keep_freed_memory, return_freed_memory
from lorabatch.model.lora import LoraSettings
from lorabatch.model.loss import LossTerms
from lorabatch.train.planner import plan
from lorabatch.train.state import Trainable
from lorabatch.train.validation import evaluate

folder, mode, dtype, tokens = Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])
(return_freed_memory if mode == "full" else keep_freed_memory)()  # as the product does
config = TrainConfig(checkpointing=mode, block_tokens=tokens)
model = load.load_model(ModelSource(str(folder), folder, None), load.load_config(folder), backend="native", dtype=TYPES[dtype], device=torch.device("cpu"))
model.configure(LossTerms(), mode)
learner = Trainable(model.attach(LoraSettings(), seed=1), config)
held = psutil.Process().memory_info().rss
needed = plan(model, config, learner.adapters.num_params)[1]
Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew: loading had its own
for _ in range(2):
    model.train()
    model.loss_sum([torch.randint(0, 40000, (512,)) for _ in range(tokens // 512)], [10] * (tokens // 512)).backward()
    learner.update(1e-4)
peak = next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith("VmHWM"))
print(json.dumps([held + needed, peak]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "dtype", "tokens", "kernels"),
    [
        ("none", "bf16", 2048, "on"),
        ("selective", "fp32", 1024, "on"),
        ("full", "bf16", 2048, "on"),
        # as on a GPU: torch's operators keep more
        ("selective", "fp32", 1024, "off"),
    ],
)
def test_predicted_memory_is_within_15_percent_of_the_real_peak(
    mode, dtype, tokens, kernels, real_model_dir
):
    if dtype not in NATIVE_TYPES:
        pytest.skip(f"{dtype} is emulated here")
    command = [sys.executable, "-c", PEAK, str(real_model_dir), mode, dtype, str(tokens)]
    environment = ENVIRONMENT | {"LORABATCH_KERNELS": kernels}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr
    predicted, peak = json.loads(done.stdout.splitlines()[-1])
    assert abs(predicted / peak - 1) <= (0.15 if kernels == "on" else 0.08)


def test_the_plan_counts_what_torchs_operators_keep_beside_our_kernels(monkeypatch):
    """Rotated queries and keys, a chunk's logits as fp32 and their probabilities; in fp16 a
    residual stream in fp32."""
    model = native(tiny_model("llama"))
    spec, sizes = model.spec, {"checkpointing": "none", "packed": False, "r": 4, "lora_params": 0}

    def needed(kept, tokens=100):
        return step_bytes(spec, block_tokens=tokens, element_bytes=2, kept=kept, **sizes)

    assert kept_by(native(tiny_model("qwen3")).decoder).rotated, "its kernel lacks the norms"
    monkeypatch.setattr("lorabatch.kernels.train_ops._train_ops", lambda dtype: None)
    assert kept_by(model.decoder) == Kept(rotated=True, logits=True)
    assert kept_by(native(tiny_model("gpt2")).decoder) == Kept(logits=True)
    assert kept_by(native(tiny_model("llama"), dtype=torch.float16).decoder).wide
    rotated = (spec.num_heads + spec.num_kv_heads) * spec.head_dim * spec.num_layers
    assert needed(Kept(rotated=True)) - needed(Kept()) == 2 * 100 * rotated
    assert needed(Kept(wide=True)) - needed(Kept()) == 2 * 100 * 2 * 64 * spec.num_layers
    assert needed(Kept(logits=True)) - needed(Kept()) == 6 * CHUNK_ELEMENTS


def test_whole_layers_again_do_not_ask_for_random_state_without_dropout(monkeypatch):
    """A captured step may not read the generator."""
    monkeypatch.setattr(torch, "get_rng_state", lambda: pytest.fail("the generator was read"))
    config = TrainConfig(checkpointing="full", lora_r=4)
    model, learner = learner_of(config)
    train_step(model, learner, documents(), config, 1e-3, ALONE)
    model.attach(LoraSettings(4, 8.0, dropout=0.1), seed=1)
    with pytest.raises(pytest.fail.Exception, match="the generator was read"):
        model.loss_sum([torch.arange(1, 9)], [1])


class Shared:
    """``even`` ranks, of which this process is the only one that answers."""

    rank, count, even = 0, 1, True

    @staticmethod
    def shares(documents):
        return [documents]


OUT = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")


def no_memory(*args, **kwargs):
    raise OUT


def test_ranks_that_share_a_base_end_with_one_line():
    """Nothing can be tried again: the others wait in a pass that this rank has left."""
    config = TrainConfig(lora_r=4, block_tokens=64)
    model, learner = learner_of(config)
    model.loss_sum = no_memory
    with pytest.raises(TrainingError, match=r"CUDA out of memory\..*\n?.*lower --block_tokens"):
        train_step(model, learner, documents(), config, 1e-3, Shared())
    assert learner.block_tokens == 64


@pytest.mark.parametrize("ratio", [1.0, 16.0])
def test_out_of_memory_in_the_update_keeps_the_adapter(ratio):
    config = TrainConfig(lora_r=4, lora_plus_ratio=ratio)
    model, learner = learner_of(config)
    before = learner.adapters.flat.detach().clone()
    learner.optimizer.step = no_memory
    with pytest.raises(TrainingError, match="optimiser's update"):
        train_step(model, learner, documents(), config, 1e-3, ALONE)
    assert torch.equal(learner.adapters.flat.detach(), before) and learner.state.step == 0


def test_an_evaluation_too_is_repeated_in_smaller_blocks(capsys):
    sized = SimpleNamespace(block_tokens=64)
    model, _ = learner_of(TrainConfig(lora_r=4))
    corpus = tiny_corpus([9, 30, 17])
    real = model.loss_sum
    wanted = evaluate(model, corpus, block_tokens=64).loss

    def loss_sum(token_ids, targets):
        return no_memory() if sum(map(len, token_ids)) > 40 else real(token_ids, targets)

    model.loss_sum = loss_sum
    result = within_memory(
        lambda: evaluate(model, corpus, block_tokens=sized.block_tokens),
        sized,
        corpus.documents,
        even=False,
    )
    assert result.loss == pytest.approx(wanted, rel=1e-6) and sized.block_tokens == 32
    assert "repeated with blocks of 32" in capsys.readouterr().err
