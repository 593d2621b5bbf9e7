"""The recorded CPU step against the plain decoder, and its promise: a row's bits depend on nothing
but its own tokens."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.models import (
    MAX_POSITIONS,
    NATIVE_VARIANTS,
    engine_greedy,
    native,
    packed_logits,
    random_adapter,
    random_ids,
    reference_greedy,
    tiny_model,
)
from support.processes import python_alone

from lorabatch import kernels
from lorabatch.infer.runners import make_runner
from lorabatch.infer.runners.kv_cache import pages
from lorabatch.infer.runners.program import Program, group_size, unsupported
from lorabatch.infer.runners.recorded import ProgramRunner, _cut
from lorabatch.kernels.api import constants
from lorabatch.kernels.panels import pack
from lorabatch.model.attention import Segment

pytestmark = pytest.mark.skipif(
    kernels.library("step") is None,
    reason="no CPU kernels on this machine (compiler or AVX2 missing)",
)
CPU = torch.device("cpu")
SLOTS, CAPACITY = 4, 2 * constants().PAGE
LENGTHS = (70, 9, 1, 33)


def test_whole_pages_of_the_cache_are_whole_pages_of_the_kernels():
    assert all(pages(length) % constants().PAGE == 0 for length in range(1, 200))


def record(model, *, quantize="none", max_tokens=256, adapters=()):
    spec = model.spec
    # ones, not zeros: a program must never read what it has not written
    cache = torch.ones(
        spec.num_layers,
        2,
        SLOTS,
        spec.num_kv_heads,
        CAPACITY,
        spec.head_dim,
        dtype=model.decoder.dtype,
    )
    return Program(
        model.decoder, cache=cache, max_tokens=max_tokens, quantize=quantize, adapters=adapters
    )


def forward(program, pieces):
    """Run pieces (slot, start, token ids, adapter) as one flat batch; hidden states [tokens, H]."""
    ids, positions, slots, groups, adapters = [], [], [], [0], []
    for slot, start, tokens, *adapter in pieces:
        size = group_size(program.spec, program.dtype)
        groups += [len(ids) + min(i + size, len(tokens)) for i in range(0, len(tokens), size)]
        ids += tokens
        positions += range(start, start + len(tokens))
        slots += [slot] * len(tokens)
        adapters += (adapter or [-1]) * len(tokens)
    return program.run(ids, positions, slots, groups, adapters)


def feed(program, pieces):
    """Logits [tokens, V] of ``forward``."""
    return program.logits(forward(program, pieces)).clone()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NATIVE_VARIANTS)
def test_program_agrees_with_the_plain_decoder(name, dtype):
    model = native(tiny_model(name), dtype=dtype)
    if name == "gpt2-gelu":
        assert "GELU" in unsupported(model.spec, dtype, CPU)
        return
    documents = random_ids(LENGTHS)
    ours = feed(record(model), [(slot, 0, ids.tolist()) for slot, ids in enumerate(documents)])
    # the same rounded weights, in fp32
    exact = torch.cat(packed_logits(native(tiny_model(name).to(dtype).float()), documents))
    if dtype == torch.float32:
        torch.testing.assert_close(ours, exact, rtol=0, atol=1e-4)
    else:
        # the residual stream stays in fp32, so we must be closer to the exact result than the plain
        # path is
        plain = torch.cat(packed_logits(model, documents)).float()
        assert (ours - exact).norm() < (plain - exact).norm()


@pytest.mark.parametrize("quantize", ["none", "int8"])
@pytest.mark.parametrize("name", ["gpt2", "mistral-window", "qwen3"])
def test_bits_do_not_depend_on_chunks_slots_or_neighbours(name, quantize):
    model = native(tiny_model(name), dtype=torch.bfloat16)
    program, documents = (
        record(model, quantize=quantize),
        [ids.tolist() for ids in random_ids(LENGTHS)],
    )
    alone = [feed(program, [(0, 0, ids)]) for ids in documents]

    @settings(max_examples=15, deadline=None)
    @given(st.data())
    def any_schedule_gives_the_same(data):
        # document order[i] lives in slot i
        order = data.draw(st.permutations(range(len(documents))))
        done, got = [0] * len(documents), [[] for _ in documents]
        while any(done[d] < LENGTHS[d] for d in order):
            takes = [
                (slot, d, data.draw(st.integers(0, LENGTHS[d] - done[d])))
                for slot, d in enumerate(order)
                if done[d] < LENGTHS[d]
            ]
            takes = [t for t in takes if t[2]] or [(takes[0][0], takes[0][1], 1)]
            rows = feed(
                program,
                [(slot, done[d], documents[d][done[d] : done[d] + n]) for slot, d, n in takes],
            )
            for (_, d, n), part in zip(takes, rows.split([n for _, _, n in takes]), strict=True):
                got[d].append(part)
                done[d] += n
        for d, parts in enumerate(got):
            assert torch.equal(torch.cat(parts), alone[d])

    any_schedule_gives_the_same()


def test_number_of_threads_does_not_change_a_bit(monkeypatch):
    monkeypatch.setattr("lorabatch.infer.runners.program.PARAMS_PER_THREAD", 1)
    model = native(tiny_model("llama"))
    pieces = [(slot, 0, ids.tolist()) for slot, ids in enumerate(random_ids(LENGTHS))]
    one = feed(record(model), pieces)
    torch.set_num_threads(3)
    assert torch.equal(one, feed(record(model), pieces))


NEIGHBOURS = """
import torch
from lorabatch.infer.runners import make_runner, program
from lorabatch.model.attention import Segment
from support.models import native, random_ids, tiny_model

program.PARAMS_PER_THREAD = 1
model = native(tiny_model("llama"), dtype=torch.bfloat16)
runner = make_runner(model, num_slots=1, capacity=128, max_tokens=128)
tokens, others = (ids.tolist() for ids in random_ids([100, 100]))
torch.set_num_threads(1)
alone = runner.logits(runner.forward([Segment(0, 0, tokens, num_logits=50)])).clone()
torch.set_num_threads(2)
for _ in range(100):
    runner.forward([Segment(0, 0, others)])  # what a lost write would leave behind
    for i in range(0, 50, 2):
        runner.forward([Segment(0, i, tokens[i : i + 2])])
    cut = runner.logits(runner.forward([Segment(0, 50, tokens[50:], num_logits=50)]))
    assert torch.equal(cut, alone), (cut - alone).abs().max()
"""


def test_threads_that_write_neighbouring_positions_lose_nothing():
    """Two bf16 values of the cache share a word, and with two tokens a step they are two threads'.
    Threads that wait in a loop, not asleep, arrive together."""
    ended = python_alone(NEIGHBOURS, OMP_WAIT_POLICY="active")
    assert ended.returncode == 0, ended.stderr


def test_greedy_is_the_first_of_the_largest_logits():
    model = native(tiny_model("llama"))
    # a tie: 7 must win over 200
    model.decoder.head.product.weight[7] = model.decoder.head.product.weight[200]
    program = record(model)
    hidden = forward(program, [(0, 0, random_ids([120])[0].tolist())])
    logits = program.logits(hidden)
    assert torch.equal(logits[:, 7], logits[:, 200])
    assert program.greedy(hidden) == logits.argmax(dim=-1).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_every_row_has_its_own_adapter(name, dtype):
    """Adapters of other ranks and layers, in one batch, against each merged into the weights; alone
    it is the same to the bit."""
    reference = tiny_model(name)
    model = native(reference, dtype=dtype)
    last = "down_proj" if name == "llama" else "mlp.c_proj"
    bank = [
        random_adapter(model, r=4, targets=("all-linear",), seed=1),
        random_adapter(model, r=7, targets=("attn",), seed=2),
        random_adapter(model, r=50, targets=(last,), seed=3),
    ]
    program = record(model, adapters=bank)
    documents, chosen = [ids.tolist() for ids in random_ids(LENGTHS)], (2, 0, -1, 1)
    pieces = [
        (slot, 0, ids, adapter)
        for slot, (ids, adapter) in enumerate(zip(documents, chosen, strict=True))
    ]
    together = feed(program, pieces).split(LENGTHS)
    for piece, got in zip(pieces, together, strict=True):
        assert torch.equal(got, feed(program, [piece]))
        merged = native(
            reference, dtype=dtype, merge=bank[piece[3]].delta if piece[3] >= 0 else None
        )
        expected = feed(record(merged), [piece[:3]])
        if dtype == torch.float32:
            torch.testing.assert_close(got, expected, rtol=0, atol=2e-4)
        else:
            assert (got - expected).norm() < 0.03 * expected.norm()
        if piece[3] >= 0:  # the adapter matters
            assert (got - feed(program, [piece[:3]])).norm() > 0.05 * got.norm()


def test_quantised_weights_round_to_the_nearest_of_255_steps_per_row():
    weight = torch.randn(100, 64, generator=torch.Generator().manual_seed(0))
    weight[3] = 0
    packed = pack(weight, quantize="int8")
    # panels back to rows
    values = (
        packed.panels.view(-1, 16, constants().PANEL, 4).permute(0, 2, 1, 3).reshape(-1, 64)[:100]
    )
    scales = packed.scales[:100, None]
    assert ((values * scales - weight).abs() <= scales / 2 + 1e-6).all()
    assert torch.equal(packed.sums[:100], 128 * values.sum(dim=1, dtype=torch.int32))


def test_int8_stays_close():
    model = native(tiny_model("llama"))
    pieces = [(slot, 0, ids.tolist()) for slot, ids in enumerate(random_ids(LENGTHS))]
    exact, rough = feed(record(model), pieces), feed(record(model, quantize="int8"), pieces)
    error = (rough - exact).norm() / exact.norm()
    assert 1e-4 < error < 0.1  # it is quantised, and not broken


def test_without_a_compiler_one_line_says_so_and_work_goes_on(tmp_path):
    nothing = (
        "import torch; from lorabatch.kernels import build, library; build.PREBUILT /= 'none'; "
    )
    code = nothing + "print(library('step'), library('step'))"
    done = python_alone(code, CXX="no-such-compiler", XDG_CACHE_HOME=str(tmp_path))
    assert done.stdout.strip() == "None None"
    assert done.stderr.count("CPU kernels: step not built") == 1 and "Traceback" not in done.stderr
    both = nothing + "library('step'), library('train')"
    done = python_alone(both, CXX="/bin/false", XDG_CACHE_HOME=str(tmp_path))
    assert "step not built (/bin/false ended with 1): torch's own" in done.stderr
    assert done.stderr.count("\n") == 1, "inference speaks of no library of training"
    off = python_alone(code, LORABATCH_KERNELS="off")
    assert (off.stdout.strip(), off.stderr) == ("None None", "")


def test_kernels_share_the_thread_pool_of_torch():
    """Two OpenMP libraries in one process would be two pools on the same cores."""
    kernels.library("step")
    with open("/proc/self/maps") as file:
        loaded = {
            line.split()[-1]
            for line in file
            if "gomp" in line or "iomp" in line or "libomp" in line
        }
    assert len(loaded) == 1, loaded


@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(0, 40)), min_size=1, max_size=8),
    st.integers(1, 16),
)
def test_cutting_a_step_keeps_tokens_places_and_wanted_rows(sizes, max_tokens):
    segments, next_id = [], 0
    for slot, (count, wanted) in enumerate(sizes):
        segments.append(
            Segment(
                slot,
                10 * slot,
                list(range(next_id, next_id + count)),
                num_logits=min(wanted, count),
            )
        )
        next_id += count
    pieces = list(_cut(segments, max_tokens))
    assert all(0 < sum(len(s.token_ids) for s in piece) <= max_tokens for piece in pieces)

    def described(segment):
        first_wanted = len(segment.token_ids) - segment.num_logits
        return [
            (segment.slot, segment.start + i, token, i >= first_wanted)
            for i, token in enumerate(segment.token_ids)
        ]

    assert [x for piece in pieces for s in piece for x in described(s)] == [
        x for s in segments for x in described(s)
    ]


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral-window"])
def test_engine_on_the_program_writes_what_transformers_writes(name):
    """More requests than slots, a tiny step limit, mixed lengths: greedy tokens are transformers'
    own."""
    reference = tiny_model(name)
    prompts, counts = random_ids((5, 40, 1, 17, 70, 3)), (9, 4, 12, 6, 8, 3)
    runner = make_runner(
        native(reference, prepack=False), num_slots=3, capacity=MAX_POSITIONS, max_tokens=16
    )
    assert isinstance(runner, ProgramRunner)
    ours = engine_greedy(runner, prompts, counts, num_slots=3)
    assert ours == [
        reference_greedy(reference, ids, n) for ids, n in zip(prompts, counts, strict=True)
    ]


def test_a_copied_prefix_is_as_good_as_a_computed_one():
    model, ids = native(tiny_model("llama")), random_ids([90])[0].tolist()
    runner = make_runner(model, num_slots=3, capacity=MAX_POSITIONS, max_tokens=256)
    runner.forward([Segment(0, 0, ids[:70])])
    runner.copy(0, 2, 70)
    assert torch.equal(
        runner.forward([Segment(2, 70, ids[70:])]), runner.forward([Segment(1, 0, ids)])
    )


@pytest.mark.slow
def test_real_model_on_the_program_writes_what_transformers_writes(real_model_dir):
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(real_model_dir, dtype=torch.float32).eval()
    runner = make_runner(native(reference, prepack=False), num_slots=4, capacity=128, max_tokens=64)
    prompts, counts = random_ids((8, 30, 3), vocab=reference.config.vocab_size), (24, 24, 24)
    assert engine_greedy(runner, prompts, counts, num_slots=4) == [
        reference_greedy(reference, ids, 24) for ids in prompts
    ]
