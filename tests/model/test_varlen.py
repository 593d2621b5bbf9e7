"""Attention of many sequences in one call: the schemas of torch's private operators, the loop that
is their reference, and what is built around them for GPUs without shared heads."""

import itertools

import pytest
import torch
from support.launches import Launches, on_meta
from support.models import native, random, tiny_model

from lorabatch.model import varlen
from lorabatch.model.attention import PackedAttention, causal_attention
from lorabatch.model.lora import LoraSettings
from lorabatch.model.varlen import (
    EFFICIENT,
    EVERYTHING,
    FLASH,
    LOOP,
    USED,
    Extents,
    attend,
    attend_packed,
    is_there,
    loop,
    operator_for,
    takes,
)

CPU, META = torch.device("cpu"), torch.device("meta")
HEADS, SHARED, DIM = 6, 2, 16

# What torch 2.13 says of itself, and what earlier versions lacked of it.
SCHEMAS = """
_flash_attention_forward(Tensor query, Tensor key, Tensor value, Tensor? cum_seq_q, Tensor? cum_seq_k, SymInt max_q, SymInt max_k, float dropout_p, bool is_causal, bool return_debug_mask, *, float? scale=None, SymInt? window_size_left=None, SymInt? window_size_right=None, Tensor? seqused_k=None, Tensor? alibi_slopes=None, Tensor? block_table=None, int? num_splits=None) -> (Tensor output, Tensor softmax_logsumexp, Tensor rng_state, Tensor unused, Tensor debug_attn_mask)
_flash_attention_backward(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor out, Tensor logsumexp, Tensor cum_seq_q, Tensor cum_seq_k, SymInt max_q, SymInt max_k, float dropout_p, bool is_causal, Tensor rng_state, Tensor unused, *, float? scale=None, SymInt? window_size_left=None, SymInt? window_size_right=None) -> (Tensor, Tensor, Tensor)
_efficient_attention_forward(Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, SymInt? max_seqlen_q, SymInt? max_seqlen_k, float dropout_p, int custom_mask_type, bool compute_log_sumexp=False, *, float? scale=None, Tensor? seqlen_k=None, int? window_size=None) -> (Tensor output, Tensor logsumexp, Tensor philox_seed, Tensor philox_offset, SymInt max_seqlen_batch_q, SymInt max_seqlen_batch_k)
_efficient_attention_backward(Tensor grad_out_, Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor out, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, Tensor logsumexp, float dropout_p, Tensor philox_seed, Tensor philox_offset, int custom_mask_type, bool bias_requires_grad, *, float? scale=None, int? num_splits_key=None, int? window_size=None, bool shared_storage_dqdkdv=False) -> (Tensor, Tensor, Tensor, Tensor)
"""
SINCE_2_12 = ", Tensor? block_table=None, int? num_splits=None"
VERSIONS = {"2.11": SCHEMAS.replace(SINCE_2_12, ""), "2.12": SCHEMAS, "2.13": SCHEMAS}


@pytest.fixture(autouse=True)
def kernels_on(monkeypatch):
    monkeypatch.delenv("LORABATCH_KERNELS", raising=False)


def schemas(version):
    lines = VERSIONS[version].strip().splitlines()
    return {line.split("(")[0]: torch._C.parse_schema(f"aten::{line}") for line in lines}


@pytest.mark.parametrize("version", VERSIONS)
def test_the_private_operators_take_what_we_give(version):
    found = schemas(version)
    assert found.keys() == USED.keys()
    assert all(takes(found[name], *USED[name]) for name in USED)
    if version == "2.11":
        assert not takes(found["_flash_attention_forward"], 10, {"block_table"})


def test_those_of_the_torch_at_hand_are_the_recorded_ones():
    """Another torch: record its schemas above, read what changed, then trust it."""
    version = ".".join(torch.__version__.split(".")[:2])
    assert version in VERSIONS
    for name, recorded in schemas(version).items():
        assert getattr(torch.ops.aten, name).default._schema == recorded
    assert is_there("_flash_attention") and is_there("_efficient_attention")
    assert not is_there("_other_attention")


@pytest.mark.parametrize(
    ("capability", "dtype", "dim", "hip", "expected"),
    [
        ((9, 0), torch.bfloat16, 64, None, FLASH),
        ((8, 0), torch.float16, 256, None, FLASH),
        ((8, 0), torch.float16, 264, None, EFFICIENT),
        ((9, 0), torch.float32, 64, None, EFFICIENT),
        ((7, 0), torch.float16, 64, None, EFFICIENT),
        ((9, 0), torch.bfloat16, 20, None, LOOP),
        ((9, 4), torch.bfloat16, 64, "6.4", LOOP),
    ],
)
def test_which_operator_serves_which_gpu(capability, dtype, dim, hip, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    choose = varlen._operator_for.__wrapped__  # without its memory
    assert choose(torch.device("cuda", 0), dtype, dim) == expected
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: False)
    assert choose(torch.device("cuda", 0), dtype, dim) == (LOOP if expected == LOOP else EFFICIENT)


def test_a_cpu_and_whoever_wants_no_kernels_get_torchs_public_attention(monkeypatch):
    assert operator_for(CPU, torch.bfloat16, 64) == LOOP
    assert operator_for(META, torch.bfloat16, 64) == FLASH
    monkeypatch.setenv("LORABATCH_KERNELS", "off")
    assert operator_for(META, torch.bfloat16, 64) == LOOP


def sequences(pieces, *, seed=0, device=CPU, capacity=40):
    """q, keys, values and extents of sequences (tokens before, new ones) that lie in slots of
    ``capacity`` positions in a cache, last slot first."""
    counts, lengths = [n for _, n in pieces], [start + n for start, n in pieces]
    q = random(sum(counts), HEADS, DIM, seed=seed)
    keys, values = (
        random(capacity * len(pieces), SHARED, DIM, seed=seed + i).to(device) for i in (1, 2)
    )
    firsts = [capacity * (len(pieces) - 1 - i) for i in range(len(pieces))]
    q_starts = torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32, device=device)
    k_starts = torch.tensor([*firsts, 0], dtype=torch.int32, device=device)
    k_lengths = torch.tensor(lengths, dtype=torch.int32, device=device)
    return (
        q.to(device),
        keys,
        values,
        Extents(q_starts, k_starts, k_lengths, max(counts), max(lengths)),
    )


@pytest.mark.parametrize("window", [None, 5])
def test_the_loop_is_causal_attention_of_each_sequence(window):
    """Whole prompts, later pieces and single tokens: each row is that of the whole sequence."""
    pieces = [(0, 9), (7, 4), (20, 1), (0, 1), (3, 30)]
    q, keys, values, extents = sequences(pieces)
    got = loop(q, keys, values, extents, window).split([n for _, n in pieces])
    for (start, n), rows, first, q1 in zip(
        pieces, got, extents.k_starts.tolist(), q.split([n for _, n in pieces]), strict=False
    ):
        whole = torch.cat([random(start, HEADS, DIM, seed=9), q1])
        at = slice(first, first + start + n)
        expected = causal_attention(whole, keys[at], values[at], window)[start:]
        torch.testing.assert_close(rows.flatten(1), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window", [None, 5])
def test_a_packed_block_has_the_values_and_gradients_of_training_today(window):
    lengths = [9, 1, 30, 4]
    starts = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    extents = Extents(starts, starts, None, 30, 30)
    results = []
    for way in ("loop", "today"):
        q, k, v = (random(44, n, DIM, seed=n).requires_grad_() for n in (HEADS, SHARED, SHARED))
        if way == "loop":
            y = attend_packed(q, k, v, extents, window).flatten(1)
        else:
            y = PackedAttention(lengths)(0, q, k, v, window)
        y.backward(random(44, HEADS * DIM, seed=7))
        results.append((y.detach(), q.grad, k.grad, v.grad))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def without_shared_heads(q, keys, values, extents, window, mask, with_log_sums=False):
    """What memory-efficient attention computes, by the reference: as many key heads as query
    heads."""
    assert q.shape[1] == keys.shape[1]
    if mask != EVERYTHING:
        return (loop(q, keys, values, extents, window),)
    assert window is None
    rows = []
    ends, firsts = extents.q_starts.tolist(), extents.k_starts.tolist()
    for at, end, first, n in zip(ends, ends[1:], firsts, extents.k_lengths.tolist(), strict=False):
        scores = torch.einsum("lhd,chd->hlc", q[at:end], keys[first : first + n]) * DIM**-0.5
        rows.append(torch.einsum("hlc,chd->lhd", scores.softmax(-1), values[first : first + n]))
    return (torch.cat(rows),)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("pieces", [[(7, 1), (20, 1), (0, 1)], [(0, 9), (7, 4), (20, 1)]])
def test_gpus_without_shared_heads_get_the_same(pieces, window, monkeypatch):
    monkeypatch.setattr(varlen, "efficient", without_shared_heads)
    monkeypatch.setattr(varlen, "operator_for", lambda *_: EFFICIENT)
    q, keys, values, extents = sequences(pieces)
    got = attend(q, keys, values, extents, window)
    expected = loop(q, keys, values, extents, window)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=[FLASH, EFFICIENT])
def test_the_real_operators_accept_our_arguments_and_give_our_shapes(dtype, window):
    """On the meta device they only say what they would give."""
    for pieces in ([(7, 1), (20, 1)], [(0, 9), (7, 4)]):
        q, keys, values, extents = sequences(pieces, device=META)
        q, keys, values = (t.to(dtype) for t in (q, keys, values))
        assert attend(q, keys, values, extents, window).shape == q.shape
    starts = torch.empty(3, dtype=torch.int32, device=META)
    q, k, v = (
        torch.empty(20, n, DIM, dtype=dtype, device=META, requires_grad=True)
        for n in (HEADS, SHARED, SHARED)
    )
    y = attend_packed(q, k, v, Extents(starts, starts, None, 12, 12), window)
    if dtype == torch.float32 and window is not None:
        return  # torch's own meta function of this gradient does not know the window
    y.sum().backward()
    assert [t.grad.shape for t in (q, k, v)] == [t.shape for t in (q, k, v)]


def test_a_packed_block_is_one_call_a_layer_however_many_documents():
    counts = {}
    for documents in (2, 16):
        model = on_meta(native(tiny_model("llama"), dtype=torch.bfloat16, prepack=False))
        adapters = model.attach(LoraSettings(r=4, alpha=8.0), seed=0)
        assert adapters.flat.device == META
        with Launches() as launches:
            model.loss_sum([torch.arange(1, 9)] * documents, [1] * documents).backward()
        assert launches.counts["_flash_attention_forward"] == 3
        assert launches.counts["_flash_attention_backward"] == 3
        counts[documents] = launches.total
    assert counts[2] == counts[16]
    assert counts[2] <= 3 * 151 + 40, "151 a layer: adapters 60, norms 50, rotary 16"
