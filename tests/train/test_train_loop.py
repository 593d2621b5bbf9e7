"""The training loop: that it learns, when it ends, what it does with a broken loss, and what does
not change its gradient."""

import math
from types import SimpleNamespace

import pytest
import torch
from support.models import LENGTHS, TARGETS, native, randomise_b, tiny_corpus, tiny_model

from lorabatch.config import TrainConfig
from lorabatch.errors import TrainingError
from lorabatch.model.hf import HfModel
from lorabatch.model.linear import FrozenLinear, Part
from lorabatch.model.lora import AdapterSet, LoraSettings
from lorabatch.model.loss import cross_entropy_sum
from lorabatch.train import loop
from lorabatch.train.loop import planned_steps
from lorabatch.train.schedule import learning_rate
from lorabatch.train.state import Trainable


class Run:
    """One training run with everything that it reported."""

    def __init__(
        self,
        model,
        adapters,
        corpus,
        validation=None,
        *,
        stop_after=None,
        after_eval=lambda: None,
        **settings,
    ):
        self.events, self.evals, self.gradients, self.weights = [], [], [], []
        self.model, self.adapters = model, adapters
        self.config = TrainConfig(
            **{"max_len": 64, "lr": 1e-2, "warmup_steps": 0, "scheduler": "constant"} | settings
        )
        self.after_eval = after_eval
        self.error = self.state = None
        try:
            self.state = loop.train(
                model,
                Trainable(adapters, self.config),
                corpus,
                validation,
                self.config,
                sink=self.events.append,
                on_step=self.on_step,
                on_eval=self.on_eval,
                stop_requested=lambda: stop_after is not None and len(self.weights) >= stop_after,
            )
        except TrainingError as error:
            self.error = error

    def on_step(self, state, record):
        assert record["step"] == state.step
        self.gradients.append(self.adapters.grad.clone())
        self.weights.append(self.adapters.flat.detach().clone())

    def on_eval(self, state, result, improved):
        self.evals.append((state.step, result.loss, improved))
        self.after_eval()

    @property
    def steps(self):
        return [e for e in self.events if e["event"] == "step"]


def tiny(*, b=True, **settings):
    """A tiny Llama and its adapters; B is random unless ``b`` is False."""
    model = native(tiny_model("llama"))
    adapters = model.attach(LoraSettings(**{"r": 4, "alpha": 8.0} | settings), seed=0)
    if b:
        randomise_b(adapters)
    return model, adapters


class Scripted:
    """A model of one adapter pair, of no use: evaluation losses are read from a script, training
    losses from a function."""

    def __init__(self, eval_losses=(), training_loss=lambda adapter: (adapter**2).sum()):
        self.a, self.b = torch.nn.Parameter(torch.ones(1, 2)), torch.nn.Parameter(torch.ones(2, 1))
        self.adapters = AdapterSet(LoraSettings(r=1), {"x": (self.a, self.b)})
        self.eval_losses, self.training_loss = iter(eval_losses), training_loss

    def train(self, mode=True):
        self.training = mode

    def loss_sum(self, token_ids, first_targets):
        targets = sum(len(t) - f for t, f in zip(token_ids, first_targets, strict=True))
        if not self.training:
            return torch.tensor(next(self.eval_losses) * targets)
        return self.training_loss(self.a) * targets


def scripted_run(model, *, documents=8, **settings):
    """A run whose evaluation is one block, so that each evaluation reads one number of the
    script."""
    return Run(
        model,
        model.adapters,
        tiny_corpus([4] * documents),
        tiny_corpus([4]),
        **{"batch_size": 1} | settings,
    )


# Learning


def test_one_batch_is_overfitted():
    model, adapters = tiny(b=False)
    corpus = tiny_corpus([12, 9, 15, 7])
    run = Run(model, adapters, corpus, corpus, batch_size=4, epochs=60)
    losses = [e["loss"] for e in run.steps]
    assert losses[0] > 4
    assert losses[-1] < losses[0] / 20
    assert run.evals[-1][1] < run.evals[0][1] / 20
    for path, (a, b) in adapters.pairs.items():
        assert b.any(), path
        assert a.isfinite().all() and b.isfinite().all()


def test_hf_backend_learns_in_the_same_loop(tiny_neox_dir):
    model = HfModel.load(tiny_neox_dir, dtype=torch.float32, device=torch.device("cpu"))
    run = Run(
        model,
        model.attach(LoraSettings(r=4, alpha=8.0), seed=0),
        tiny_corpus([12, 9]),
        batch_size=2,
        epochs=30,
    )
    assert run.steps[-1]["loss"] < run.steps[0]["loss"] / 4


def test_records_tell_what_was_done():
    model, adapters = tiny()
    corpus = tiny_corpus(LENGTHS, first_targets=TARGETS)
    run = Run(
        model, adapters, corpus, batch_size=3, epochs=2, scheduler="cosine", warmup_steps=2, lr=3e-3
    )
    assert [e["step"] for e in run.steps] == [1, 2, 3, 4, 5, 6]
    assert [e["epoch"] for e in run.steps] == [0, 0, 0, 1, 1, 1]
    assert [e["documents"] for e in run.steps] == [3, 3, 2, 3, 3, 2]
    assert sum(e["tokens"] for e in run.steps) == run.state.tokens == 2 * sum(LENGTHS)
    assert sum(e["target_tokens"] for e in run.steps) == run.state.targets == 2 * corpus.num_targets
    assert run.state.squared_lengths == 2 * sum(n * n for n in LENGTHS)
    assert [e["lr"] for e in run.steps] == [
        learning_rate(i, peak=3e-3, total_steps=6, warmup=2, kind="cosine") for i in range(6)
    ]
    assert run.state.reason == "finished"
    assert run.state.last_loss == run.steps[-1]["loss"]
    assert len(run.state.epoch_s) == 2 and len(run.state.step_ms) == 6


def test_learning_rate_reaches_the_optimiser():
    """Adam's first step moves every weight by the learning rate."""
    model = Scripted()
    run = Run(model, model.adapters, tiny_corpus([4]), lr=0.125)
    assert (run.weights[0] - 1)[:2].tolist() == pytest.approx([-0.125, -0.125], rel=1e-4)


# When it ends


@pytest.mark.parametrize(
    ("epochs", "max_steps", "expected"),
    [(2, None, 6), (2, 4, 4), (2, 3, 3), (2, 100, 6), (1, 1, 1)],
)
def test_epochs_or_max_steps_whichever_comes_first(epochs, max_steps, expected):
    run = scripted_run(
        Scripted([1.0] * 20), documents=10, batch_size=4, epochs=epochs, max_steps=max_steps
    )
    assert len(run.steps) == run.state.step == run.state.total_steps == expected
    assert planned_steps(run.config, 10) == expected
    assert run.state.reason == "finished"


@pytest.mark.parametrize(
    ("every", "at"), [(None, [0, 2, 4, 6, 8]), (3, [0, 3, 6, 8]), (4, [0, 4, 8]), (100, [0, 8])]
)
def test_evaluation_comes_first_at_times_and_last_but_never_twice(every, at):
    run = scripted_run(Scripted([1.0] * 20), eval_every_steps=every)
    assert [step for step, _, _ in run.evals] == at
    assert [e["step"] for e in run.events if e["event"] == "eval"] == at


def test_without_validation_nothing_is_evaluated():
    model = Scripted()
    run = Run(model, model.adapters, tiny_corpus([4, 4]), batch_size=1)
    assert len(run.steps) == 2 and run.evals == []
    assert run.state.best_eval is None and run.state.last_eval is None


def test_early_stopping_counts_evaluations_without_gain():
    run = scripted_run(
        Scripted([9.0, 4.0, 5.0, 3.0, 3.5, 3.0, 1.0]), eval_every_steps=1, early_stopping_evals=2
    )
    assert run.state.reason == "early stopping"
    # 5.0 was one without gain, 3.0 reset the count, then two: an equal loss is no gain
    assert len(run.steps) == run.state.step == 5
    assert run.state.best_step == 3
    patient = scripted_run(
        Scripted([9.0, 4.0, 5.0, 3.0, 3.5, 3.0, 1.0, 2.0, 2.0]), eval_every_steps=1
    )
    assert (patient.state.reason, patient.state.step, patient.state.best_step) == ("finished", 8, 6)


def test_best_is_of_the_trained_model_and_last_is_the_last():
    """The evaluation before the first step may be better than all others; it is nothing that could
    be saved."""
    run = scripted_run(Scripted([1.0, 4.0, 2.0, 3.0]), documents=3, eval_every_steps=1)
    assert run.evals == [(0, 1.0, False), (1, 4.0, True), (2, 2.0, True), (3, 3.0, False)]
    assert (run.state.first_eval.loss, run.state.best_eval.loss, run.state.last_eval.loss) == (
        1.0,
        2.0,
        3.0,
    )
    assert run.state.best_step == 2


def test_a_requested_stop_ends_after_the_step_and_without_evaluation():
    run = Run(
        *(m := Scripted([1.0] * 20), m.adapters),
        tiny_corpus([4] * 8),
        tiny_corpus([4]),
        batch_size=1,
        eval_every_steps=100,
        stop_after=3,
    )
    assert run.state.reason == "interrupted"
    assert len(run.steps) == 3
    assert [step for step, _, _ in run.evals] == [0]


# A broken loss


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_broken_weight_stops_before_the_first_update(value):
    model, adapters = tiny()
    next(iter(adapters.pairs.values()))[1].data[0, 0] = value
    before = adapters.flat.detach().clone()
    run = Run(model, adapters, tiny_corpus(LENGTHS), batch_size=8)
    assert run.error.exit_code == 70
    assert str(run.error).startswith("step 1: loss ") and "lower --lr" in str(run.error)
    assert run.steps == []
    assert torch.equal(adapters.flat.nan_to_num(nan=7.0), before.nan_to_num(nan=7.0))


def test_divergence_stops_before_the_update_that_would_break_the_adapter():
    model, adapters = tiny(b=False)
    run = Run(model, adapters, tiny_corpus(LENGTHS), batch_size=2, lr=1e30)
    assert 1 <= len(run.steps) < 4
    assert str(run.error).startswith(f"step {len(run.steps) + 1}: ")
    assert adapters.flat.isfinite().all()
    assert torch.equal(adapters.flat, run.weights[-1])


def test_a_broken_gradient_of_a_finite_loss_stops_too():
    # at a = 1: loss 0, infinite slope times zero
    model = Scripted(training_loss=lambda a: (a - 1).abs().sqrt().sum())
    run = Run(model, model.adapters, tiny_corpus([4]))
    assert "loss 0.0 or gradient norm nan is not finite" in str(run.error)
    assert model.adapters.flat.tolist() == [1, 1, 1, 1]


def test_fp16_gradients_survive_a_step_of_many_tokens():
    """Types with few small numbers: the sum's gradient must be divided after it has been added up
    in fp32, not before."""
    generator = torch.Generator().manual_seed(0)
    weight, rows = 0.02 * torch.randn(64, 16, generator=generator), 60_000

    class Half(Scripted):
        def loss_sum(self, token_ids, first_targets):
            targets = torch.cat([t[f:] for t, f in zip(token_ids, first_targets, strict=True)]) % 64
            return cross_entropy_sum(
                self.a.expand(len(targets), 16).to(self.dtype), self.head, targets
            )

    gradients = []
    for dtype in (torch.float32, torch.float16):
        model = Half()
        model.dtype, model.head = (
            dtype,
            FrozenLinear(weight.to(dtype), None, [Part("lm_head", 0, 64)], prepack=False),
        )
        model.a = torch.nn.Parameter(torch.ones(1, 16))
        model.adapters = AdapterSet(LoraSettings(r=1), {"x": (model.a, model.b)})
        corpus = tiny_corpus([rows // 4] * 4)
        # a skewed text, so that the gradients of its tokens do not cancel out
        for document in corpus.documents:
            document.token_ids[:] = document.token_ids % 5
        gradients.append(
            Run(model, model.adapters, corpus, batch_size=4, max_grad_norm=0).gradients[0]
        )
    assert (gradients[1] - gradients[0]).norm() < 0.01 * gradients[0].norm()


# What does not change the gradient


def first_gradient(**settings):
    """Gradient of a step over all documents of the corpus."""
    model, adapters = tiny()
    corpus = tiny_corpus(LENGTHS, first_targets=TARGETS)
    run = Run(
        model, adapters, corpus, **{"batch_size": 8, "max_grad_norm": 0, "max_steps": 1} | settings
    )
    assert run.steps[0]["documents"] == 8
    return run.gradients[0], run.steps[0]["loss"]


@pytest.mark.parametrize(
    "settings",
    [
        {"batch_size": 1, "grad_accum_steps": 8},
        {"batch_size": 2, "grad_accum_steps": 4},
        {"block_tokens": 2},
        {"block_tokens": 32},
        {"block_tokens": 64},
        {"seed": 5},
    ],
    ids=str,
)
def test_gradient_does_not_depend_on_how_a_step_is_cut(settings):
    expected, expected_loss = first_gradient()
    gradient, loss = first_gradient(**settings)
    assert expected.norm() > 0.1
    assert (gradient - expected).norm() <= 1e-6 * expected.norm()
    assert loss == pytest.approx(expected_loss, rel=1e-6)


def test_gradient_is_the_mean_over_supervised_tokens():
    """One division by the tokens of the whole step, not a mean of the documents' means."""
    model, adapters = tiny()
    corpus = tiny_corpus(LENGTHS, first_targets=TARGETS)
    total = 0.0
    for document in corpus.documents:
        loss = model.loss_sum([torch.from_numpy(document.token_ids)], [document.first_target])
        loss.backward()
        total += float(loss.detach())
    expected = adapters.grad / corpus.num_targets
    gradient, loss = first_gradient()
    assert (gradient - expected).norm() <= 1e-5 * expected.norm()
    assert loss == pytest.approx(total / corpus.num_targets, rel=1e-6)


def test_clipping_scales_the_gradient_to_the_limit():
    free, _ = first_gradient()
    clipped, _ = first_gradient(max_grad_norm=0.01)
    assert float(free.norm()) > 0.1
    torch.testing.assert_close(clipped, free * (0.01 / free.norm()))
    untouched, _ = first_gradient(max_grad_norm=1e6)
    assert torch.equal(untouched, free)


def test_gradients_start_from_zero_in_every_step():
    model, adapters = tiny()
    run = Run(model, adapters, tiny_corpus([9]), epochs=2, lr=1e-12, max_grad_norm=0)
    torch.testing.assert_close(run.gradients[1], run.gradients[0])


# Repetition


def trained(seed, **settings):
    model, adapters = tiny(b=False, dropout=0.3)
    Run(
        model,
        adapters,
        tiny_corpus(LENGTHS),
        tiny_corpus([9, 4]),
        batch_size=2,
        epochs=2,
        seed=seed,
        **settings,
    )
    return adapters.flat.detach()


def test_the_same_seed_gives_the_same_adapter_to_the_bit():
    torch.manual_seed(1)
    first = trained(seed=3)
    torch.manual_seed(2)  # the state that the caller left behind does not matter
    assert torch.equal(trained(seed=3), first)
    assert not torch.equal(trained(seed=4), first)


def test_evaluating_more_often_changes_nothing():
    assert torch.equal(trained(seed=3, eval_every_steps=1), trained(seed=3, eval_every_steps=100))


@pytest.mark.parametrize("seed", [2**31, 2**32, 2**40])
def test_large_seeds_work(seed):
    """--seed has no upper bound; job ids and times in nanoseconds are popular seeds."""
    model = Scripted()
    assert Run(model, model.adapters, tiny_corpus([4]), seed=seed).state.step == 1


# Time


def test_epoch_seconds_do_not_contain_evaluation(monkeypatch):
    """As ``TrainState`` says; the clock ticks once a look, and each evaluation takes 1000."""
    now = 0.0

    def tick():
        nonlocal now
        now += 1.0
        return now

    def pass_time():
        nonlocal now
        now += 1000.0

    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=tick))
    run = scripted_run(
        Scripted([1.0] * 20), epochs=2, batch_size=4, eval_every_steps=1, after_eval=pass_time
    )
    assert len(run.evals) == 5
    assert run.state.train_s == 4 and run.state.step_ms == [1000.0] * 4
    assert len(run.state.epoch_s) == 2
    assert sum(run.state.epoch_s) < 100
