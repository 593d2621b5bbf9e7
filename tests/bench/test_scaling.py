"""Intervals, sweeps, Amdahl, Karp-Flatt and the knee on cases worked out by hand."""

import json
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorabatch.bench.scaling import (
    alternating,
    bench_record,
    estimate,
    karp_flatt,
    knee,
    median_interval,
    serial_share,
    sweep,
    verdict,
    weak_serial_share,
)
from lorabatch.bench.sweep import Bench, table
from lorabatch.cli import main
from lorabatch.config_measure import BenchTrainConfig


def test_interval_of_the_median():
    """n = 6: 1 - 2/64; n = 9, second to eighth: 1 - 2 (1 + 9)/512; n = 5 cannot reach 95 %: 1 -
    2/32."""
    assert [median_interval(range(n)) for n in range(6)] == [None] * 6
    assert median_interval([6, 5, 4, 3, 2, 1]) == (1, 6, 1 - 2 / 64)
    assert median_interval(range(1, 10)) == (2, 8, 1 - 20 / 512)
    assert median_interval(range(1, 6), confidence=0.9) == (1, 5, 1 - 2 / 32)


@pytest.mark.parametrize("n", [6, 7, 12, 25])
def test_interval_covers_the_median_as_often_as_it_says(n):
    """Of 4,000 skewed samples; three standard errors of a share near 0.95 are 0.01."""
    draw = random.Random(n)
    hits, trials = 0, 4000
    for _ in range(trials):
        low, high, coverage = median_interval([draw.expovariate(1.0) for _ in range(n)])
        hits += low <= 0.6931 <= high
    assert hits / trials == pytest.approx(coverage, abs=0.011)


def test_estimate_of_none_one_and_two_values():
    nothing = {"low": None, "high": None, "coverage": None}
    assert estimate([]) == {"median": None, "values": [], **nothing}
    assert estimate([3.0]) == {"median": 3.0, "values": [3.0], **nothing}
    assert estimate([1.0, 2.0]) == {"median": 1.5, "values": [1.0, 2.0], **nothing}


def test_a_sweep_alternates_its_order():
    seen = []

    def measure(level):
        seen.append(level)
        return {"tokens_per_s": 10.0 * level + len(seen), "latency_ms": None}

    points = sweep("batch_size", [1, 2, 4], 3, measure)
    assert seen == [1, 2, 4, 4, 2, 1, 1, 2, 4] == list(alternating([1, 2, 4], 3))
    assert [p["batch_size"] for p in points] == [1, 2, 4]
    assert (
        points[1]["tokens_per_s"]["values"] == [22.0, 25.0, 28.0]
        and points[1]["tokens_per_s"]["median"] == 25.0
    )
    assert points[0]["latency_ms"]["median"] is None


@settings(max_examples=50, deadline=None)
@given(st.floats(0, 1), st.floats(0.1, 100))
def test_amdahls_share_is_recovered(share, one):
    workers = [1, 2, 4, 8]
    assert serial_share(
        workers, [one * (share + (1 - share) / p) for p in workers]
    ) == pytest.approx(share, abs=1e-9)


@settings(max_examples=50, deadline=None)
@given(st.floats(0, 1))
def test_gustafsons_share_is_recovered(share):
    workers = [1, 2, 4, 8]
    assert weak_serial_share(workers, [p - share * (p - 1) for p in workers]) == pytest.approx(
        share, abs=1e-9
    )


def test_gustafsons_share_by_hand():
    """S(2) = 1.6, S(4) = 3: least squares of 0.4 = s and 1 = 3 s is (0.4 + 3) / (1 + 9)."""
    assert weak_serial_share([1, 2, 4], [1.0, 1.6, 3.0]) == pytest.approx(0.34)
    assert weak_serial_share([1], [1.0]) is None
    assert weak_serial_share([1, 2], [1.0, 2.2]) == 0 and weak_serial_share([1, 2], [1.0, 0.9]) == 1


def test_shares_by_hand():
    assert serial_share([1], [2.0]) is None and serial_share([2, 2], [1.0, 1.1]) is None
    assert serial_share([1, 2], [10.0, 4.0]) == 0  # faster than linear
    assert serial_share([1, 2], [10.0, 11.0]) == 1  # slower with two
    assert karp_flatt(1.0, 1) is None
    assert karp_flatt(1.6, 2) == pytest.approx((0.625 - 0.5) / 0.5)
    assert karp_flatt(4.0, 4) == 0


def test_the_knee_is_where_a_doubling_brings_less_than_half_of_its_share():
    assert knee([], []) is None and knee([4], [1.0]) is None
    assert knee([1, 2, 4, 8], [10, 19, 30, 40]) == 4  # 1.9, 1.58, 1.33 times
    assert knee([1, 2, 4], [10, 20, 40]) == 4 and knee([1, 2], [10, 10]) == 1
    # three times the batch: at least twice the rate
    assert knee([2, 6], [10, 21]) == 6 and knee([2, 6], [10, 19]) == 2


def test_faster_only_where_intervals_do_not_overlap():
    a, b = estimate([100, 101, 102, 103, 104, 105]), estimate([106, 107, 108, 109, 110, 111])
    assert (verdict(a, b), verdict(b, a)) == ("faster", "slower")
    assert verdict(a, estimate([105, 106, 107, 108, 109, 110])) == "overlap"
    assert verdict(a, estimate([500.0, 501.0])) == "too few"
    waited = {"waited_share": 0.4}
    assert verdict(a | waited, b) == verdict(a, b | waited) == "waited"


def test_a_record_says_what_was_swept_and_what_follows():
    points = [
        {"threads": p, "tokens_per_s": estimate([r] * 6), "weak_tokens_per_s": estimate([w] * 6)}
        for p, r, w in ((1, 100.0, 100.0), (2, 160.0, 190.0))
    ]
    record = bench_record("bench infer", "threads", points, command=["lorabatch"], device="cpu")
    assert record["weak_serial_share"] == pytest.approx(0.1), "2 - 1.9 over 2 - 1"
    assert record["serial_share"] == pytest.approx(0.25) and record["karp_flatt"] == {
        1: None,
        2: pytest.approx(0.25),
    }
    points = [
        {"batch_size": p, "tokens_per_s": estimate([r] * 6)} for p, r in ((1, 100.0), (2, 120.0))
    ]
    record = bench_record("bench infer", "batch_size", points, command=[], device="cpu")
    assert (
        record["knee"] == 1
        and record["environment"]["host"]
        and record["points"][1]["batch_size"] == 2
    )
    assert record["no_conclusion"] is None


def test_nothing_is_concluded_from_few_values_or_from_levels_that_waited():
    few = [
        {"batch_size": p, "tokens_per_s": estimate([r] * 5)} for p, r in ((1, 100.0), (2, 120.0))
    ]
    record = bench_record("bench infer", "batch_size", few, command=[], device="cpu")
    assert record["knee"] is None and "too few values" in record["no_conclusion"]
    waited = [
        {"batch_size": p, "tokens_per_s": estimate([r] * 6), "waited_share": w}
        for p, r, w in ((1, 100.0, 0.0), (2, 120.0, 0.4))
    ]
    record = bench_record("bench infer", "batch_size", waited, command=[], device="cpu")
    assert (
        record["knee"] is None and "the levels 2 (40%) waited for cores" in record["no_conclusion"]
    )


def test_bench_train_measures_whole_steps(tiny_llama_dir, tmp_path, capsys):
    output = tmp_path / "bench.json"
    flags = [
        "--base_model",
        str(tiny_llama_dir),
        "--document_tokens",
        "16",
        "--repeats",
        "2",
        "--dtype",
        "fp32",
        "--output",
        str(output),
    ]
    assert main(["bench", "train", *flags, "--batch_sizes", "1", "3"]) == 0
    record = json.loads(output.read_text())
    assert [point["batch_size"] for point in record["points"]] == [1, 3] and record["knee"] is None
    for point in record["points"]:
        tokens = [
            rate * ms / 1e3
            for rate, ms in zip(
                point["tokens_per_s"]["values"], point["step_ms"]["values"], strict=True
            )
        ]
        assert tokens == pytest.approx([16 * point["batch_size"]] * 2)


@pytest.mark.parametrize("kind", ["train", "infer"])
def test_threads_are_swept_over_fixed_and_over_growing_work(kind, tiny_llama_dir, tmp_path, capsys):
    output = tmp_path / "bench.json"
    flags = {
        "train": ["--document_tokens", "16"],
        "infer": ["--input_tokens", "4", "--max_new_tokens", "3"],
    }[kind]
    flags += [
        "--base_model",
        str(tiny_llama_dir),
        "--repeats",
        "6",
        "--dtype",
        "fp32",
        "--output",
        str(output),
    ]
    assert main(["bench", kind, *flags, "--batch_sizes", "2", "--threads_sweep", "1", "2"]) == 0
    record, text = json.loads(output.read_text()), capsys.readouterr().out
    assert [point["threads"] for point in record["points"]] == [1, 2]
    assert all(
        len(point[key]["values"]) == 6
        for point in record["points"]
        for key in ("tokens_per_s", "weak_tokens_per_s")
    )
    if record["no_conclusion"]:  # others had the cores
        assert (
            "waited for cores" in record["no_conclusion"]
            and record["serial_share"] is record["weak_serial_share"] is None
        )
    else:
        assert 0 <= record["serial_share"] <= 1 and 0 <= record["weak_serial_share"] <= 1
        assert "(Amdahl)" in text and "(Gustafson)" in text
    assert "weak tokens/s" in text
    assert ("bound by" in text) == (kind == "infer")


def test_a_rate_above_the_ceiling_is_said_to_be_one():
    def said(share):
        point = {
            "batch_size": 1,
            "tokens_per_s": estimate([2.0]),
            "ceiling_tokens_per_s": 2 / share,
            "share_of_ceiling": share,
            "bound": "memory",
        }
        return [
            line
            for line in table({"sweep": "batch_size", "points": [point]})
            if "bench machine" in line
        ]

    assert len(said(1.2)) == 1 and said(0.9) == []


def test_a_table_of_few_repeats_under_load_warns_and_concludes_nothing():
    """Two noisy repeats once became "80 % is serial"."""
    points = [
        {
            "threads": p,
            "tokens_per_s": estimate([r, r + 1]),
            "weak_tokens_per_s": estimate([r, r + 1]),
            "waited_share": waited,
        }
        for p, r, waited in ((1, 100.0, 0.01), (2, 110.0, 1.16))
    ]
    record = bench_record("bench infer", "threads", points, command=[], device="cpu")
    lines = table(record)
    assert any("others had the cores at threads 2 (116%)" in line for line in lines)
    assert lines[-1] == "serial share: too few values to say (2 of a level, six are the least)"
    assert not any("Amdahl" in line or "Gustafson" in line for line in lines)


def test_the_work_of_weak_scaling_grows_with_the_threads(monkeypatch):
    """Each (threads, size) runs once to warm up, then as often as asked."""
    threads, seen = [0], []
    monkeypatch.setattr(torch, "set_num_threads", lambda count: threads.__setitem__(0, count))
    config = BenchTrainConfig(batch_sizes=(3,), threads_sweep=(1, 4), repeats=2)
    bench = Bench(config, None, None, torch.device("cpu"), torch.float32, 4)

    def measure(size):
        seen.append((threads[0], size))
        return {"tokens_per_s": float(size)}

    points = bench.points(measure)
    assert {level: seen.count(level) for level in seen} == {(1, 3): 5, (4, 3): 3, (4, 12): 3}, (
        "one thread's share is both sweeps' first level"
    )
    assert (
        bench.sizes == [3, 12]
        and [p["weak_tokens_per_s"]["median"] for p in points] == [3, 12]
        and threads == [4]
    )
