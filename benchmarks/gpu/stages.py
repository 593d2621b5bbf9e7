"""What ``check.py`` asks, a generator of records each. ``ok`` says whether a check held."""

from __future__ import annotations

import copy
import itertools
import shutil
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from attention import attention
from shapes import Setup, next_tokens, relative_error, requests, whole_prompts
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from lorabatch.config import TrainConfig
from lorabatch.corpus.tokens import TokenDocument
from lorabatch.infer.requests import Request
from lorabatch.infer.runners.fixed import FixedRunner
from lorabatch.machine.ceilings import bandwidth
from lorabatch.machine.device import TYPE_NAMES
from lorabatch.model.attention import PackedAttention, Segment
from lorabatch.model.cost import training_flops
from lorabatch.model.lora import AdapterSet, LoraWeights
from lorabatch.model.lora_settings import LoraSettings
from lorabatch.model.native import NativeModel
from lorabatch.train.loop import train_step
from lorabatch.train.planner import plan
from lorabatch.train.state import Trainable

Records = Iterator[dict[str, Any]]
# of logits or gradients, by their norm
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}
MARGIN = 1e-2  # of fp32 logits: nearer tokens may change places
LAUNCHES = 1000


def probe(setup: Setup) -> Records:
    """Versions, tools, and the constants behind every estimate."""
    yield {
        "what": "versions",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "compiler": shutil.which("gcc") or shutil.which("cc"),
        "python_h": (Path(sysconfig.get_path("include")) / "Python.h").exists(),
    }
    yield {"what": "memory", **bandwidth(setup.device, seconds=0.5 if setup.gpu else 0.01)}
    side = setup.sizes.gemm
    a, b = (torch.randn(side, side, dtype=setup.dtype, device=setup.device) for _ in "ab")
    seconds = setup.seconds(lambda: a @ b, setup.sizes.repeats)
    yield {"what": "product", "side": side, "flops_per_s": 2 * side**3 / seconds}
    x = torch.zeros(256, device=setup.device)

    def launches() -> None:
        for _ in range(LAUNCHES):
            x.add_(1)

    yield {"what": "launch", "us": setup.seconds(launches, 3) / LAUNCHES * 1e6}
    if setup.gpu:
        yield {"what": "node of a graph", "us": _graph_seconds(launches, setup) / LAUNCHES * 1e6}


def _graph_seconds(run: Callable[[], None], setup: Setup) -> float:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return setup.seconds(graph.replay, 3)


def correct(setup: Setup) -> Records:
    """Logits, tokens and gradients against transformers and peft over the same random weights."""
    for name in setup.sizes.checked:
        network = setup.network(name)
        model = setup.native(network)
        wide = copy.deepcopy(network).float()
        yield {"model": name, **_logits(setup, model, wide)}
        for way in setup.ways():
            yield {"model": name, "way": way, **_tokens(setup, model, wide, way)}
        yield {"model": name, **_gradients(setup, model, wide)}
        del network, model, wide


def _expected(network: Any, ids: list[int]) -> Tensor:
    with torch.no_grad():
        return network(input_ids=torch.tensor([ids], device=network.device)).logits[0]


def _logits(setup: Setup, model: NativeModel, wide: Any) -> dict[str, Any]:
    """Of two prompts in one packed block."""
    prompts = [p[: 5 + 20 * i] for i, p in enumerate(setup.prompts(model, 2, 100))]
    lengths = [len(p) for p in prompts]
    ids = torch.tensor([i for p in prompts for i in p], device=setup.device)
    positions = torch.cat([torch.arange(n) for n in lengths]).to(setup.device)
    with torch.no_grad():
        hidden = model.decoder(ids, positions, PackedAttention(lengths))
        got = model.decoder.logits(hidden).split(lengths)
    errors = [relative_error(g, _expected(wide, p)) for g, p in zip(got, prompts, strict=True)]
    worst = max(errors)
    return {"what": "logits", "relative_error": worst, "ok": worst < TOLERANCE[setup.dtype]}


def _tokens(setup: Setup, model: NativeModel, wide: Any, way: str) -> dict[str, Any]:
    """Greedy tokens of prompts of unequal length, some in pieces; right where fp32 is sure."""
    prompts = [p[: 3 + 17 * i] for i, p in enumerate(setup.prompts(model, 5, 80))]
    runner, asked = setup.runner(model, 5, 128, way), requests(5)
    half = [len(p) // 2 for p in prompts]
    first = [p[:n] for p, n in zip(prompts, half, strict=True)]
    runner.step(whole_prompts(first, num_logits=0), asked)
    texts = [list(p) for p in prompts]
    for step in range(setup.sizes.new):
        segments = []
        for slot, text in enumerate(texts):
            start = half[slot] if step == 0 else len(text) - 1
            segments += [type(whole_prompts([text])[0])(slot, start, text[start:])]
        for text, tokens in zip(texts, runner.step(segments, asked), strict=True):
            text += tokens
    sure = right = 0
    for text, prompt in zip(texts, prompts, strict=True):
        logits = _expected(wide, text)[len(prompt) - 1 : -1].float()
        top = logits.topk(2).values
        clear = (top[:, 0] - top[:, 1]) > MARGIN
        same = logits.argmax(-1).cpu() == torch.tensor(text[len(prompt) :])
        sure += int(clear.sum())
        right += int((clear.cpu() & same).sum())
    return {"what": "greedy tokens", "clear": sure, "equal": right, "ok": right == sure}


def _gradients(setup: Setup, model: NativeModel, wide: Any) -> dict[str, Any]:
    """Ours in the model's type against peft's in fp32."""
    import peft

    adapters = model.attach(LoraSettings(r=8, alpha=16.0), seed=0)
    generator = torch.Generator().manual_seed(1)
    for _, b in adapters.pairs.values():
        b.data.copy_(0.02 * torch.randn(b.shape, generator=generator))
    kind = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}
    theirs = peft.get_peft_model(wide, peft.LoraConfig(task_type="CAUSAL_LM", **kind))
    named = dict(theirs.named_parameters())
    for path, halves in adapters.pairs.items():
        for half, value in zip("AB", halves, strict=True):
            named[_peft_name(path, half)].data.copy_(value.data)
    ids = torch.tensor(setup.prompts(model, 1, 60)[0])
    model.loss_sum([ids], [1]).backward()
    logits = theirs(input_ids=ids[None].to(setup.device)).logits[0, :-1].float()
    targets = ids[1:].to(setup.device)
    torch.nn.functional.cross_entropy(logits, targets, reduction="sum").backward()
    expected = torch.cat(
        [named[_peft_name(path, half)].grad.reshape(-1) for path in adapters.pairs for half in "AB"]
    )
    model.detach()
    error = relative_error(adapters.grad, expected)
    return {"what": "gradients", "relative_error": error, "ok": error < TOLERANCE[setup.dtype]}


def _peft_name(path: str, half: str) -> str:
    return f"base_model.model.{path}.lora_{half}.default.weight"


def _decode(
    setup: Setup,
    model: NativeModel,
    batch: int,
    *,
    prompt: int | None = None,
    adapters: list[LoraWeights] | None = None,
    way: str = "eager",
    **params: Any,
) -> dict[str, Any]:
    """Prefill, then tokens one by one; the rates of both."""
    sizes = setup.sizes
    length = prompt or sizes.prompt
    asked = requests(batch, **params)
    owners = [i % len(adapters) for i in range(batch)] if adapters else [-1] * batch
    more = {"adapters": adapters} if adapters else {}
    runner = setup.runner(model, batch, length + 2 * sizes.new + 1, way, **more)
    prompts = setup.prompts(model, batch, length)
    chunk = max(1, 8192 // length)  # prompts read in one step
    setup.wait()
    start = time.perf_counter()
    for at in range(0, batch, chunk):
        segments = whole_prompts(prompts)[at : at + chunk]
        new = runner.step(segments, asked[at : at + chunk])
        for request, tokens in zip(asked[at:], new, strict=False):
            request.output_ids += tokens
    prefilled = time.perf_counter()
    _go_on(runner, asked, length, owners, sizes.new)  # libraries load, steps are recorded
    begin = time.perf_counter()
    _go_on(runner, asked, length, owners, sizes.new)
    seconds = time.perf_counter() - begin  # the tokens are on the host: the device is done
    steps = sizes.new
    return {
        "what": "decode",
        "way": way,
        "batch": batch,
        "prefill_tokens_per_s": batch * length / (prefilled - start),
        "tokens_per_s": batch * steps / seconds,
        "ms_a_step": seconds / steps * 1e3,
        "peak_bytes": setup.peak_bytes(),
    }


def _go_on(runner: Any, asked: list[Request], length: int, owners: list[int], count: int) -> None:
    """``count`` more tokens of each request; their prompts were ``length`` tokens long."""
    for request in asked:
        request.max_new_tokens = len(request.output_ids) + count
    while running := [i for i, r in enumerate(asked) if len(r.output_ids) < r.max_new_tokens]:
        segments = [
            Segment(i, length + len(ids) - 1, ids[-1:], adapter=owners[i])
            for i, ids in ((i, asked[i].output_ids) for i in running)
        ]
        new = runner.step(segments, [asked[i] for i in running])
        for i, tokens in zip(running, new, strict=True):
            asked[i].output_ids += tokens


def decode(setup: Setup) -> Records:
    for name in setup.sizes.timed:
        network = setup.network(name)
        model = setup.native(network)
        for batch, way in itertools.product(setup.sizes.batches, setup.ways()):
            yield {"model": name, **_decode(setup, model, batch, way=way)}
        for batch in setup.sizes.batches[::2]:
            yield {"model": name, **_their_decode(setup, network, model, batch)}
        del network, model


def _their_decode(setup: Setup, network: Any, model: NativeModel, batch: int) -> dict[str, Any]:
    """transformers' generate: equal prompts, so that nothing is padded."""
    ids = torch.tensor(setup.prompts(model, batch, setup.sizes.prompt), device=setup.device)
    count = setup.sizes.new

    def generate() -> None:
        network.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
        )

    seconds = setup.seconds(generate, 1)
    return {"what": "transformers", "batch": batch, "tokens_per_s": batch * count / seconds}


def sampled(setup: Setup) -> Records:
    name = setup.sizes.timed[0]
    model = setup.native(setup.network(name))
    asked = ({"temperature": 1.0}, {"temperature": 1.0, "top_p": 0.9})
    for params, way in itertools.product(asked, setup.ways()):
        record = _decode(setup, model, setup.sizes.batches[-2], way=way, **params)
        yield {"model": name, **record, "what": " ".join(f"{k}={v}" for k, v in params.items())}


def adapters(setup: Setup) -> Records:
    name = setup.sizes.timed[0]
    for count in setup.sizes.adapters:
        model = setup.native(setup.network(name))
        bank = [_random_adapter(model, seed) for seed in range(count)]
        for way in setup.ways():
            record = _decode(setup, model, setup.sizes.batches[-2], adapters=bank, way=way)
            yield {"model": name, **record, "what": f"{count} adapters"}


def _random_adapter(model: NativeModel, seed: int) -> LoraWeights:
    adapter: AdapterSet = model.attach(LoraSettings(r=16, alpha=32.0), seed=seed)
    for _, b in adapter.pairs.values():
        b.data.normal_(std=0.02)
    model.detach()
    return adapter.weights()


def seven(setup: Setup) -> Records:
    model = setup.native(setup.network(setup.sizes.large))
    for batch in setup.sizes.batches[:2]:
        way = setup.ways()[-1]
        yield {"model": setup.sizes.large, **_decode(setup, model, batch, way=way)}
    yield {"model": setup.sizes.large, **_train(setup, model, *setup.sizes.steps[-1])}


def long(setup: Setup) -> Records:
    name = setup.sizes.timed[0]
    model = setup.native(setup.network(name))
    batch = setup.sizes.batches[1]
    for way in setup.ways():
        yield {"model": name, **_decode(setup, model, batch, prompt=setup.sizes.context, way=way)}


def invariance(setup: Setup) -> Records:
    """Whether a request's bits depend on its neighbours in a step of a fixed number of rows."""
    name = setup.sizes.timed[0]
    model = setup.native(setup.network(name))
    batch = setup.sizes.batches[-2]
    prompts, rows = setup.prompts(model, batch, setup.sizes.prompt), []
    for company in ([prompts[0]] * batch, prompts):
        runner = setup.runner(model, batch, setup.sizes.prompt + 2)
        rows.append(runner.forward(whole_prompts(company))[0])
        rows.append(runner.forward(next_tokens(setup.sizes.prompt, [7] * batch))[0])
    same = [torch.equal(rows[0], rows[2]), torch.equal(rows[1], rows[3])]
    yield {"what": "equal bits", "rows": batch, "prefill": same[0], "decode": same[1]}
    yield {"what": "equal bits, fixed shapes", **_fixed(setup, model, prompts[0], batch)}


def _fixed(setup: Setup, model: NativeModel, prompt: list[int], batch: int) -> dict[str, Any]:
    """What ``--deterministic`` rests on: nothing depends on where a prompt is cut, nor on a row's
    place in eager and recorded steps."""
    tokens, half = batch * len(prompt), len(prompt) // 2
    sizes = {"num_slots": batch, "capacity": len(prompt) + 2, "max_tokens": tokens}
    runner = FixedRunner(model, **sizes)
    whole = runner.forward([Segment(0, 0, prompt)])
    runner.forward([Segment(0, 0, prompt[:half], num_logits=0)])
    cut = runner.forward([Segment(0, half, prompt[half:])])
    alike = runner.rows_are_alike() if setup.gpu else None  # on a CPU there is no graph
    return {"cut": torch.equal(whole, cut), "rows_alike": alike}


def train(setup: Setup) -> Records:
    for name in setup.sizes.timed:
        network = setup.network(name)
        model = setup.native(network)
        for documents, length in setup.sizes.steps:
            yield {"model": name, **_train(setup, model, documents, length)}
        yield {"model": name, **_their_train(setup, network, *setup.sizes.steps[1])}
        del network, model


def _documents(model: NativeModel, count: int, length: int) -> list[TokenDocument]:
    rng = np.random.default_rng(count)
    return [TokenDocument(rng.integers(0, model.spec.vocab_size, length), 1) for _ in range(count)]


def _train(setup: Setup, model: NativeModel, count: int, length: int) -> dict[str, Any]:
    block = max(2048, min(count * length, 32768))
    config = TrainConfig(block_tokens=block, max_len=max(2, length))
    settings = LoraSettings(r=config.lora_r, alpha=config.lora_alpha)
    fp16 = setup.dtype == torch.float16
    trainable = Trainable(model.attach(settings, seed=0), config, fp16=fp16)
    planned = plan(model, config, trainable.adapters.num_params)
    assert planned is not None
    trainable.block_tokens, documents = planned[0], _documents(model, count, length)
    before = torch.cuda.memory_allocated() if setup.gpu else 0
    if setup.gpu:
        torch.cuda.reset_peak_memory_stats()
    seconds = setup.seconds(
        lambda: train_step(model, trainable, documents, config, 1e-4), setup.sizes.repeats
    )
    model.detach()
    flops = training_flops(
        model.spec,
        tokens=count * length,
        targets=count * (length - 1),
        squared_lengths=count * length**2,
        lora_params=trainable.adapters.num_params,
    )
    peak = setup.peak_bytes()
    return {
        "what": f"train {count} x {length}",
        "block_tokens": planned[0],
        "tokens_per_s": count * length / seconds,
        "ms_a_step": seconds * 1e3,
        "flops_per_s": flops / seconds,
        "planned_bytes": planned[1],
        "added_bytes": None if peak is None else peak - before,
    }


def _their_train(setup: Setup, network: Any, count: int, length: int) -> dict[str, Any]:
    """A plain loop over transformers and peft."""
    import peft

    kind = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
    theirs = peft.get_peft_model(network, peft.LoraConfig(task_type="CAUSAL_LM", **kind))
    theirs.train()
    parameters = [p for p in theirs.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    ids = torch.randint(network.config.vocab_size, (count, length), device=setup.device)

    def step() -> float:
        optimizer.zero_grad()
        loss = theirs(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        return float(loss)

    seconds = setup.seconds(step, setup.sizes.repeats)
    return {
        "what": f"peft {count} x {length}",
        "tokens_per_s": count * length / seconds,
        "ms_a_step": seconds * 1e3,
    }


def trace(setup: Setup) -> Records:
    """Three steps of decoding and one of training under torch's profiler."""
    name = setup.sizes.timed[0]
    model = setup.native(setup.network(name))
    batch, length = setup.sizes.batches[-2], setup.sizes.prompt
    runner, asked = setup.runner(model, batch, length + 8, setup.ways()[-1]), requests(batch)
    first = runner.step(whole_prompts(setup.prompts(model, batch, length)), asked)
    for request, tokens in zip(asked, first, strict=True):
        request.output_ids += tokens
    owners = [-1] * batch
    _go_on(runner, asked, length, owners, 1)
    config = TrainConfig()
    trainable = Trainable(
        model.attach(LoraSettings(), seed=0), config, fp16=setup.dtype == torch.float16
    )
    documents = _documents(model, *setup.sizes.steps[0])
    train_step(model, trainable, documents, config, 1e-4)
    model.detach()
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if setup.gpu else [])
    with profile(activities=activities) as profiler:
        _go_on(runner, asked, length, owners, 3)
        setup.wait()
    profiler.export_chrome_trace(str(setup.out / "trace.json.gz"))
    sort = "self_device_time_total" if setup.gpu else "self_cpu_time_total"
    table = profiler.key_averages().table(sort_by=sort, row_limit=30)
    (setup.out / "operators.txt").write_text(table, encoding="utf-8")
    calls = sum(event.count for event in profiler.key_averages())
    yield {"what": "trace", "dtype": TYPE_NAMES[setup.dtype], "calls_a_step": calls / 3}


STAGES: dict[str, Callable[[Setup], Records]] = {
    stage.__name__: stage
    for stage in (
        probe,
        attention,
        correct,
        decode,
        train,
        trace,
        invariance,
        sampled,
        adapters,
        seven,
        long,
    )
}
FIRST = ["probe", "attention", "correct", "decode", "train", "trace"]
SECOND = ["correct", "decode", "train", "invariance", "sampled", "adapters", "seven", "long"]
LIMITS_S = {
    "probe": 30,
    "attention": 40,
    "correct": 110,
    "decode": 130,
    "train": 140,
    "trace": 40,
    "invariance": 40,
    "sampled": 40,
    "adapters": 45,
    "seven": 100,
    "long": 40,
}
