"""Loss scaling: the rule alone, and a tiny model in fp16, which torch's CPU kernels can run."""

import pytest
import torch
from support.models import LENGTHS, TARGETS, native, randomise_b, tiny_corpus, tiny_model

from lorabatch.config import TrainConfig
from lorabatch.errors import TrainingError
from lorabatch.model.lora import LoraSettings
from lorabatch.train import loop
from lorabatch.train.scaler import LARGEST, LossScaler
from lorabatch.train.state import Trainable


def test_the_scale_halves_at_an_overflow_and_doubles_after_good_steps():
    scaler = LossScaler(scale=64.0, grow_every=3)
    scaler.overflowed(1)
    assert (scaler.scale, scaler.overflows, scaler.good_steps) == (32.0, 1, 0)
    for _ in range(2):
        scaler.good()
    scaler.overflowed(3)  # starts the count of good steps again
    for expected in (16.0, 16.0, 32.0):
        scaler.good()
        assert scaler.scale == expected
    assert (scaler.overflows, scaler.overflows_in_a_row) == (2, 0)
    scaler = LossScaler(scale=LARGEST, grow_every=1)
    scaler.good()
    assert scaler.scale == LARGEST


def test_an_overflow_that_no_scale_helps_is_an_error():
    scaler = LossScaler(scale=2.0**12)
    with pytest.raises(
        TrainingError,
        match=r"step 7: the gradient overflows fp16 even with loss scale 1; .* kept; lower --lr",
    ):
        for _ in range(100):
            scaler.overflowed(7)
    assert scaler.overflows == 13


def fp16_run(scale, *, dtype=torch.float16, steps=6):
    model = native(tiny_model("llama"), dtype=dtype)
    learner = Trainable(
        model.attach(LoraSettings(r=4, alpha=8.0), seed=0),
        TrainConfig(),
        fp16=dtype == torch.float16,
    )
    randomise_b(learner.adapters)
    if learner.scaler:
        learner.scaler.scale = scale
    config = TrainConfig(batch_size=8, epochs=steps, lr=1e-2, max_grad_norm=0, warmup_steps=0)
    events, gradients = [], []
    corpus = tiny_corpus(LENGTHS, first_targets=TARGETS)
    loop.train(
        model,
        learner,
        corpus,
        None,
        config,
        sink=events.append,
        on_step=lambda state, record: gradients.append(learner.adapters.grad.clone()),
        on_eval=lambda *_: None,
        stop_requested=bool,
    )
    return learner, events, gradients


def test_fp16_learns_what_fp32_learns_after_overflows():
    """The first scale overflows fp16; the step is tried again with smaller ones, and no document is
    skipped."""
    learner, events, gradients = fp16_run(2.0**22)
    _, expected_events, expected = fp16_run(1.0, dtype=torch.float32)
    assert [e["step"] for e in events] == [1, 2, 3, 4, 5, 6]
    assert events[0]["overflows"] > 0 and events[0]["loss_scale"] < 2.0**22
    assert learner.scaler.overflows == events[-1]["overflows"]
    assert float((gradients[0] - expected[0]).norm() / expected[0].norm()) < 0.02
    assert events[-1]["loss"] == pytest.approx(expected_events[-1]["loss"], rel=0.02)
    assert learner.adapters.flat.dtype == torch.float32


def test_the_scale_does_not_change_the_gradient():
    small, large = (fp16_run(scale, steps=1)[2][0] for scale in (1.0, 256.0))
    assert float((small - large).norm() / large.norm()) < 0.01


def test_a_checkpoint_keeps_the_scale():
    learner, _, _ = fp16_run(2.0**22)
    other = Trainable(
        native(tiny_model("llama"), dtype=torch.float16).attach(
            LoraSettings(r=4, alpha=8.0), seed=1
        ),
        TrainConfig(),
        fp16=True,
    )
    other.restore(learner.record(), learner.tensors())
    assert other.scaler == learner.scaler and torch.equal(
        other.adapters.flat, learner.adapters.flat
    )


@pytest.mark.parametrize("variant", ["llama", "gpt2"])
def test_the_sum_of_many_layers_may_pass_what_fp16_holds(variant):
    """The residual stream is fp32 there: in fp16, 3 times 30,000 is infinite."""
    logits, gradients = [], []
    for dtype in (torch.float32, torch.float16):
        model = native(tiny_model(variant), dtype=dtype)
        decoder = model.decoder
        for layer in decoder.layers:
            layer.down.bias = torch.zeros(64, dtype=dtype)
            layer.down.bias[0] = 30_000.0
        adapters = model.attach(LoraSettings(r=4, alpha=8.0, dropout=0.1), seed=0)
        decoder.train(False)
        loss = model.loss_sum([torch.arange(1, 20)], [1])
        loss.backward()
        logits.append(loss.item())
        gradients.append(adapters.grad.clone())
    assert logits[1] == pytest.approx(logits[0], rel=0.01)
    assert gradients[1].isfinite().all()
    assert float((gradients[1] - gradients[0]).norm() / gradients[0].norm()) < 0.05


def test_dropout_in_fp16_runs_on_a_wide_residual():
    model = native(tiny_model("llama"), dtype=torch.float16)
    adapters = model.attach(LoraSettings(r=4, alpha=8.0, dropout=0.5), seed=0)
    model.train()
    model.loss_sum([torch.arange(1, 20)], [1]).backward()
    assert adapters.grad.isfinite().all() and adapters.grad.norm() > 0
