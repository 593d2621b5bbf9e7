"""Recorded steps of decoding, replayed on the CPU from a tape with a CUDA graph's semantics, against
the eager runner over the engine; what they may not do; how many launches they are."""

import ast
import random

import pytest
import torch
from support.launches import Launches, on_meta
from support.models import (
    EOS_ID,
    native,
    random_adapter,
    random_ids,
    tiny_model,
    tiny_tokenizer,
)
from support.paths import SRC
from support.tape import Tape, WouldWait

from lorabatch.infer.engine import Engine
from lorabatch.infer.requests import NOT_FINITE, Request, SamplingParams
from lorabatch.infer.runners import graph, graph_rows, graph_step
from lorabatch.infer.runners.eager import NativeRunner
from lorabatch.infer.runners.fixed import FixedRunner
from lorabatch.infer.runners.graph import BUCKETS, GraphRunner
from lorabatch.infer.runners.graph_step import Kind, Rows, decode_step, sampled
from lorabatch.infer.sampling import draw, draws_of, signed, uniform
from lorabatch.infer.scheduler import Batch
from lorabatch.infer.stats import PassStats
from lorabatch.model.attention import Segment

SLOTS, CAPACITY = 6, 128
VARIANTS = ["gpt2", "llama", "mistral-window", "qwen3"]
SAMPLED = {"temperature": 0.9, "seed": 5}
# of one pass, in turn: greedy, drawn with and without filters, and what is never recorded
MIXED = [
    {},
    SAMPLED,
    {**SAMPLED, "top_k": 7},
    {**SAMPLED, "top_p": 0.7, "min_p": 0.02},
    {**SAMPLED, "repetition_penalty": 1.3, "presence_penalty": 0.4},
    {"logprobs": 2},
    {**SAMPLED, "min_new_tokens": 6},
]
PENALISED = [
    {"repetition_penalty": 1.4, "logprobs": 0},
    {"frequency_penalty": 0.3},
    {**SAMPLED, "presence_penalty": -2.0, "repetition_penalty": 0.8, "logprobs": 20},
    {"logprobs": 3},
]
KINDS = {"greedy": [{}], "sampled": [SAMPLED], "mixed": MIXED, "penalised": PENALISED}


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    """Without the CPU's kernels, which a tape cannot see."""
    monkeypatch.delenv("LORABATCH_KERNELS", raising=False)
    monkeypatch.setattr("lorabatch.kernels.train_ops._train_ops", lambda dtype: None)
    Tape.made = Tape.replays = 0


def requests(settings, *, ignore_eos=True):
    """Prompts of unequal length, two of them with a common beginning, and as many settings as there
    are."""
    ids = [t.tolist() for t in random_ids([7, 40, 1, 23, 12, 3, 30, 9, 18, 5], seed=1)]
    ids[8] = ids[1][:30] + ids[8]
    return [
        Request(
            str(i),
            i,
            "",
            SamplingParams(ignore_eos=ignore_eos, **settings[i % len(settings)]),
            token_ids=token_ids,
            max_new_tokens=4 + 3 * i,
            ending_ids=() if ignore_eos else (EOS_ID,),
        )
        for i, token_ids in enumerate(ids)
    ]


def run(runner, asked, **options):
    engine = Engine(
        runner,
        tiny_tokenizer(),
        [EOS_ID],
        max_running=SLOTS,
        **{"prefill_tokens": 64} | options,
    )
    finished = []
    engine.run(asked, finished.append)
    assert len(finished) == len(asked)
    return [(r.output_ids, r.error, list(map(reported, r.logprobs))) for r in asked]


class Near(float):
    """The last bits depend on how many rows are taken at once."""

    def __eq__(self, other):
        return abs(self - other) < 1e-4

    __hash__ = None


def reported(entry):
    return entry.top_ids, [Near(value) for value in (entry.own, *entry.top)]


def runners(variant="llama", *, record=Tape):
    sizes = {"num_slots": SLOTS, "capacity": CAPACITY}
    model = tiny_model(variant)
    ours, eager = (native(model, prepack=False) for _ in range(2))  # as on a GPU
    return GraphRunner(ours, record=record, **sizes), NativeRunner(eager, **sizes)


@pytest.mark.parametrize("settings", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_engine_writes_the_eager_runners_tokens(variant, settings):
    ours, eager = runners(variant)
    got = run(ours, requests(settings))
    assert Tape.replays > 20, "steps were recorded"
    assert got == run(eager, requests(settings))
    assert len({token for ids, _, _ in got for token in ids}) > 10
    again = Tape.made
    assert run(ours, requests(settings)) == got and Tape.made == again <= 4 * 5


def test_only_prompts_and_least_lengths_are_not_recorded(monkeypatch):
    steps = []

    def eager_step(self, segments, requests):
        steps.append(
            [(len(s.token_ids), r.must_continue) for s, r in zip(segments, requests, strict=True)]
        )
        return eager(self, segments, requests)

    eager = NativeRunner.step
    monkeypatch.setattr(NativeRunner, "step", eager_step)
    ours, _ = runners()
    run(ours, requests(PENALISED))
    assert {kind for _, kind in ours._graphs} >= {Kind(True, True, True)}
    assert all(any(count > 1 for count, _ in step) for step in steps)
    steps.clear()
    run(ours, requests([{**SAMPLED, "min_new_tokens": 6}, SAMPLED]))
    alone = [step for step in steps if all(count == 1 for count, _ in step)]
    assert alone and all(must for step in alone for _, must in step), "neighbours are recorded"


class Nobody:
    """A constraint that allows everything and looks at every token."""

    taken = 0

    def allowed(self):
        return torch.ones(300, dtype=torch.bool).numpy()

    def take(self, token_id):
        self.taken += 1
        return self.taken == 3


def test_a_constraint_looks_at_every_token():
    for runner in runners():
        asked = requests([SAMPLED])
        asked[4].constraint = Nobody()
        ids = run(runner, asked)[4][0]
        assert len(ids) == asked[4].constraint.taken == 3


def test_a_visit_of_the_host_yields_several_tokens_and_the_device_tests_what_ends_them():
    ours, eager = runners()
    asked = requests([{}])[:3]
    for request in asked:
        request.max_new_tokens = 40
    first = eager.step([Segment(i, 0, r.token_ids) for i, r in enumerate(asked)], asked)
    ours.step([Segment(i, 0, r.token_ids) for i, r in enumerate(asked)], asked)
    next_ones = [
        Segment(i, len(r.token_ids), new)
        for i, (r, new) in enumerate(zip(asked, first, strict=True))
    ]
    for request, new in zip(asked, first, strict=True):
        request.output_ids += new
    whole = ours.step(next_ones, asked)
    assert [len(tokens) for tokens in whole] == [graph_step.MOST_STEPS] * 3
    asked[0].ending_ids = (299, whole[0][2])
    asked[1].ending_ids = tuple(range(300))[:8]
    asked[2].max_new_tokens = 1 + 6
    got = ours.step(next_ones, asked)
    stop = whole[0].index(whole[0][2]) + 1
    assert got[0] == whole[0][:stop] and got[2] == whole[2][:6]
    assert got[1] == whole[1][: len(got[1])]
    rows = ours._rows[Kind()]
    assert rows.chosen[0, stop:6].tolist() == [graph_step.NOTHING] * (6 - stop)


def test_a_stop_string_within_a_visit_ends_tokens_and_their_probabilities():
    ours, eager = runners()
    whole = run(eager, requests([{"logprobs": 1}]))
    word = tiny_tokenizer().decode(whole[9][0][7:9])
    got = run(ours, requests([{"logprobs": 1, "stop": (word,)}]))
    assert got == run(eager, requests([{"logprobs": 1, "stop": (word,)}]))
    assert len(got[9][0]) < len(whole[9][0]) and len(got[9][2]) == len(got[9][0])


def test_steps_of_a_visit_are_counted_as_steps():
    stats = PassStats(begin_s=0.0)
    batch = Batch((), (), (), 0)
    segments = [Segment(0, 5, [1]), Segment(1, 9, [1], adapter=0)]
    stats.count_step(batch, segments, [[7, 8, 9, 7], [7]], 1.0)
    assert (stats.decode_steps, stats.decode_tokens) == (4, 5)
    assert stats.decode_kv_tokens == 5 + 6 + 7 + 8 + 9 and stats.decode_adapters == 4
    stats.count_step(batch, [Segment(0, 5, [1, 2, 3], num_logits=3)], [[2, 3]], 1.0)
    assert (stats.decode_steps, stats.decode_tokens, stats.decode_kv_tokens) == (5, 7, 40)


@pytest.mark.parametrize(
    "options", [{"prefill_tokens": 7}, {"order": "longest"}, {"speculate": 3}], ids=str
)
def test_any_way_of_running_too(options):
    ours, eager = runners()
    assert run(ours, requests([{}]), **options) == run(eager, requests([{}]))
    assert Tape.replays > 0


def test_every_row_of_a_recorded_step_has_its_own_adapter():
    results = []
    for kind, more in ((GraphRunner, {"record": Tape}), (NativeRunner, {})):
        model = native(tiny_model("llama"), prepack=False)
        bank = [random_adapter(model, r=4 + i, seed=i) for i in range(3)]
        runner = kind(model, num_slots=SLOTS, capacity=CAPACITY, adapters=bank, **more)
        asked = requests([{}, SAMPLED])
        for i, request in enumerate(asked):
            request.adapter_row = i % 4 - 1
            request.adapter = str(request.adapter_row)
        results.append(run(runner, asked))
    assert results[0] == results[1] and Tape.replays > 20
    ours, _ = runners()
    assert run(ours, requests([{}, SAMPLED]))[1:4] != results[0][1:4], "adapters change tokens"


def test_a_token_that_ends_a_request_leaves_its_neighbours_alone():
    ours, eager = runners()
    whole = [ids for ids, _, _ in run(eager, requests([{}]))]
    stops = {"stop_token_ids": (whole[4][6], whole[7][11])}
    got = [ids for ids, _, _ in run(ours, requests([stops], ignore_eos=False))]
    assert got == [ids for ids, _, _ in run(eager, requests([stops], ignore_eos=False))]
    assert [len(ids) for ids in got] != [len(ids) for ids in whole]
    assert all(ids == full[: len(ids)] for ids, full in zip(got, whole, strict=True))


def test_a_request_whose_numbers_break_ends_alone():
    """A row of NaN in the embedding: whoever reads that token has no next one."""
    results = []
    for runner in runners():
        runner._decoder.embedding[200] = float("nan")
        asked = requests([{}, SAMPLED])
        asked[3].token_ids[-1] = 200
        results.append(run(runner, asked))
    assert results[0] == results[1]
    assert NOT_FINITE in results[0][3][1] and sum(error is None for _, error, _ in results[0]) >= 8


def test_a_step_that_cannot_be_recorded_is_run_as_before_and_that_is_said_once(capsys):
    def refuse(step):
        raise RuntimeError("operation not permitted when stream is capturing\nat line 7")

    ours, eager = runners(record=refuse)
    assert run(ours, requests([{}])) == run(eager, requests([{}]))
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "steps are not recorded here, and are slower (operation not permitted when stream is "
        "capturing)"
    ]


class Wrong(Tape):
    """A graph that chooses the token after the right one."""

    def __init__(self, step):
        super().__init__(step)
        self._chosen = rows_of(step)

    def replay(self):
        super().replay()
        self._chosen.chosen[:, 0] += 1


def test_a_graph_that_chooses_other_tokens_is_not_believed(capsys):
    ours, eager = runners(record=Wrong)
    assert run(ours, requests([{}])) == run(eager, requests([{}]))
    assert Tape.replays <= graph_step.MOST_STEPS, "it was asked once"
    assert capsys.readouterr().err.count("chose other tokens") == 1


def rows_of(step):
    return step.__closure__[[*step.__code__.co_freevars].index("rows")].cell_contents


class Tight(Tape):
    """Memory for recording no more than two rows, and for replaying one from the seventh time on."""

    def __init__(self, step):
        self._count = len(rows_of(step).numbers)
        if self._count > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        super().__init__(step)

    def replay(self):
        super().replay()
        if self._count == 2 and Tape.replays > 6:
            raise RuntimeError("CUDA error: out of memory")


def out_of_memory(step):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


@pytest.mark.parametrize("settings", [[{}], PENALISED], ids=["greedy", "penalised"])
def test_want_of_memory_makes_recorded_steps_smaller_and_nothing_is_lost(settings, capsys):
    ours, eager = runners(record=Tight)
    assert run(ours, requests(settings)) == run(eager, requests(settings))
    assert Tape.replays > 20 and {count for count, _ in ours._graphs} == {1}
    assert capsys.readouterr().err.splitlines() == [
        f"out of memory: recorded steps take at most {rows} at once"
        for rows in ("4 rows", "2 rows", "1 row")
    ]


def test_without_memory_for_any_recorded_step_none_is_recorded(capsys):
    ours, eager = runners(record=out_of_memory)
    assert run(ours, requests([{}])) == run(eager, requests([{}]))
    *smaller, last = capsys.readouterr().err.splitlines()
    assert len(smaller) == 3 and "no memory for a recorded step of one row" in last


# --- the same shapes in every step ---


class Shaped:
    """A product whose last digits depend on how many rows it has, as on a GPU."""

    def __init__(self, product):
        self._product = product

    def forward(self, x, bias):
        return self._product.forward(x, bias) * (1 + 0.02 * (len(x) % 97))


def shaped(kind, **more):
    model = native(tiny_model("llama"), prepack=False)
    for layer in (*model.decoder.linears(), model.decoder.head):
        layer.product = Shaped(layer.product)
    return kind(model, num_slots=SLOTS, capacity=CAPACITY, record=Tape, **more)


def in_company_and_alone(runner):
    """The tokens of the same requests, run in three ways."""
    alone = [run(runner, [asked])[0] for asked in requests(MIXED)]
    return [run(runner, requests(MIXED)), run(runner, requests(MIXED), prefill_tokens=48), alone]


def test_tokens_do_not_depend_on_the_batch_where_shapes_never_change():
    """Not even where sums depend on shapes: least lengths and prompts, which are not recorded, too."""
    runner = shaped(FixedRunner, max_tokens=64 + SLOTS)
    together, less, alone = in_company_and_alone(runner)
    assert together == less == alone and Tape.replays > 20 and runner._possible
    together, less, alone = in_company_and_alone(shaped(GraphRunner))
    assert together != alone, "they do otherwise"


def test_whether_equal_rows_differ_is_seen():
    runner = shaped(FixedRunner, max_tokens=64)
    assert runner.rows_are_alike() and Tape.replays == 1
    head = runner._decoder.head.product
    head.forward = lambda x, bias: Shaped.forward(head, x, bias) + torch.arange(len(x))[:, None]
    assert not runner.rows_are_alike()


# --- what a recorded step may not do ---


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: x + torch.tensor([1, 2, 3]),
        lambda x: x[[0, 1]],
        lambda x: x[x > 0],
        lambda x: x.repeat_interleave(x),
        lambda x: bool(x.any()),
        lambda x: x.nonzero(),
    ],
)
def test_the_tape_refuses_what_waits_or_copies_from_the_host(wait):
    x = torch.tensor([1, 2, 3])
    with pytest.raises(WouldWait):
        Tape(lambda: wait(x))


def test_python_stands_still_in_a_replay():
    x, out, calls = torch.ones(2), torch.zeros(2), []

    def step():
        calls.append(1)
        out.copy_(x * len(calls))

    tape = Tape(step)
    x.fill_(3)
    tape.replay()
    assert out.tolist() == [3, 3] and len(calls) == 1


def test_no_line_of_the_recorded_step_asks_a_tensor_for_its_numbers():
    """What the tape cannot see on a CPU: there, tolist is no operator."""
    source = (SRC / "lorabatch" / "infer" / "runners" / "graph_step.py").read_text("utf-8")
    banned = {"tolist", "item", "cpu", "numpy", "nonzero", "tensor", "is_nonzero", "synchronize"}
    nodes = list(ast.walk(ast.parse(source)))
    used = {n.attr for n in nodes if isinstance(n, ast.Attribute)}
    assert {"unbind", "topk"} <= used and not used & banned
    called = {n.func for n in nodes if isinstance(n, ast.Call)}
    names = {f.id for f in called if isinstance(f, ast.Name)}
    assert "_candidates" in names and not names & {"int", "float", "print", "list"}
    assert not [n for n in nodes if isinstance(n, ast.While | ast.For)]


def test_the_host_looks_once_a_visit():
    """And at the log-probabilities, where somebody wants them; hashing and drawing never look."""
    folder = SRC / "lorabatch" / "infer"
    looks = {"tolist", "item", "cpu", "numpy", "nonzero", "synchronize"}

    def found(tree):
        return sorted(
            n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and n.attr in looks
        )

    trees = {p.stem: ast.parse(p.read_text("utf-8")) for p in (folder / "runners").glob("*.py")}
    functions = {
        n.name: n
        for tree in (*trees.values(), ast.parse((folder / "sampling.py").read_text("utf-8")))
        for n in ast.walk(tree)
        if isinstance(n, ast.FunctionDef)
    }
    assert found(functions["read"]) == ["tolist"] and found(functions["_report"]) == ["tolist"] * 2
    assert len(found(trees["graph_rows"])) == 3 and found(trees["graph"]) == []
    assert not [n for n in ("draws_of", "_shifted", "fixed_places") if found(functions[n])]


@pytest.mark.parametrize(
    ("kind", "others"), [(Kind(), 44), (Kind(True), 147), (Kind(True, True, True), 190)], ids=str
)
def test_launches_of_a_recorded_step(kind, others):
    """35 a layer, whatever the number of rows; choosing the token and testing whether it ends its
    row is part of it."""
    totals = {}
    for layers, count in ((2, 4), (4, 4), (2, 64)):
        model = on_meta(
            native(
                tiny_model("llama", num_hidden_layers=layers), dtype=torch.bfloat16, prepack=False
            )
        )
        runner = NativeRunner(model, num_slots=65, capacity=CAPACITY)
        device = torch.device("meta")
        rows = Rows.on(device, kind, count=count, vocabulary=300, seen=CAPACITY)
        with torch.no_grad(), Launches() as launches:
            decode_step(model.decoder, runner.cache, rows)
        assert launches.from_host == 0
        totals[layers, count] = launches.total
    assert totals[2, 4] == totals[2, 64]
    a_layer = (totals[4, 4] - totals[2, 4]) / 2
    assert a_layer <= 36
    assert totals[2, 4] - 2 * a_layer <= others


# --- choosing the token ---


def settings_of(params, draws):
    values = [(p.temperature, p.top_k, p.top_p, p.min_p, 1, 0, 0) for p in params]
    return [torch.tensor(v, dtype=torch.float64) for v in (values, [[d] for d in draws])]


def test_tokens_drawn_in_the_step_are_the_samplers():
    rng, generator = random.Random(2), torch.Generator().manual_seed(2)
    logits = 3 * torch.randn(400, 300, generator=generator)
    params = [
        SamplingParams(
            temperature=rng.choice([0.3, 1.0, 2.5]),
            top_k=rng.choice([0, 0, 1, 5, 300]),
            top_p=rng.choice([1.0, 1.0, 0.9, 0.4]),
            min_p=rng.choice([0.0, 0.0, 0.1]),
        )
        for _ in range(400)
    ]
    draws = [rng.random() for _ in params]
    got, settled = sampled(logits, *settings_of(params, draws))
    assert settled.all()
    assert (got == draw(logits, params, draws)).float().mean() >= 0.995, "but for rounding"


def test_draws_on_the_device_are_those_of_the_host():
    rng = random.Random(0)
    numbers = [(rng.randrange(2**64), rng.randrange(4096), rng.randrange(8)) for _ in range(2000)]
    numbers += [(-1, 0, 0), (0, 0, 0), (2**63, 1, 1023)]
    seeds, steps, samples = zip(*numbers, strict=True)
    got = draws_of(
        torch.tensor([signed(s) for s in seeds]), torch.tensor(steps), torch.tensor(samples)
    )
    assert got.tolist() == [uniform(*three) for three in numbers]


def test_rows_that_need_more_candidates_are_left_to_the_host(monkeypatch):
    monkeypatch.setattr(graph_step, "CANDIDATES", 8)
    monkeypatch.setattr(graph_rows, "CANDIDATES", 8)
    flat = torch.zeros(3, 300)
    params = [
        SamplingParams(temperature=1.0, top_p=0.9),
        SamplingParams(temperature=1.0, top_k=5, top_p=0.9),
        SamplingParams(temperature=1.0),
    ]
    assert sampled(flat, *settings_of(params, [0.5] * 3))[1].tolist() == [False, True, True]
    ours, eager = runners()
    wide = [{"temperature": 20.0, "top_p": 0.95, "seed": 1}, {"temperature": 20.0, "top_k": 20}]
    assert run(ours, requests(wide)) == run(eager, requests(wide))


def test_buckets_hold_every_number_of_rows():
    assert list(BUCKETS) == sorted(BUCKETS)
    sizes = [graph.bucket(count, 1500) for count in range(1, 1501)]
    assert all(count <= size for count, size in enumerate(sizes, start=1)) and sizes[-1] == 1500
    assert graph.bucket(5, 5) == 8 and graph.bucket(1025, 1500) == 1500


def test_rows_beyond_those_of_a_step_touch_nobodys_slot():
    ours, _ = runners()
    ours.forward([Segment(slot, 0, [5, 6, 7]) for slot in range(SLOTS)])
    before = ours.cache.data.clone()
    params = SamplingParams(ignore_eos=True)
    asked = [Request(str(i), i, "", params, token_ids=[5, 6, 7]) for i in range(5)]
    ours.step([Segment(slot, 3, [8]) for slot in range(5)], asked)
    after = ours.cache.data
    changed = (before != after).any(dim=-1).any(dim=3).any(dim=0).any(dim=0)  # [slots, positions]
    assert changed[:5, 3].all() and changed[SLOTS, 0] and changed.sum() == 6
