"""lorabatch compare: faster only without overlap, one machine only, two of a kind."""

import json

import pytest

from lorabatch.bench.scaling import estimate
from lorabatch.cli import main

ENVIRONMENT = {"host": "node-1", "cpu": "Test CPU", "packages": {"torch": "2.13.0"}}
SLOW, FAST, BETWEEN = (
    [100, 101, 102, 103, 104, 105],
    [120, 121, 122, 123, 124, 125],
    [104, 105, 106, 107, 108, 109],
)


def bench(path, rates, *, kind="bench infer", host="node-1", level=16, waited=None):
    point = {"batch_size": level, "tokens_per_s": estimate(rates), "waited_share": waited}
    record = {
        "kind": kind,
        "sweep": "batch_size",
        "environment": ENVIRONMENT | {"host": host},
        "config": {"dtype": "bf16"},
        "points": [point],
    }
    path.write_text(json.dumps(record))
    return str(path)


def run(path, kind, rates, **system):
    path.mkdir()
    config = {"lr": len(str(path)), "save_dir": str(path)}
    record = {
        "schema_version": 1,
        "kind": kind,
        "status": "completed",
        "command": ["lorabatch", kind],
    }
    (path / "run.json").write_text(
        json.dumps(record | {"environment": ENVIRONMENT, "config": config})
    )
    (path / "metrics.json").write_text(json.dumps({"pass_tokens_per_s": rates} | system))
    (path / "events.jsonl").write_text(
        "".join(
            json.dumps({"event": "step", "step": i, "loss": 1.0, "lr": 1e-4, "tokens_per_s": r})
            + "\n"
            for i, r in enumerate([1.0, *rates], 1)
        )
    )
    return str(path)


@pytest.mark.parametrize(
    ("a", "b", "words"),
    [
        (SLOW, FAST, "B is faster, 1.20 times A's median"),
        (FAST, SLOW, "B is slower"),
        (SLOW, BETWEEN, "the intervals overlap: no difference shown"),
        (SLOW, FAST[:5], "too few values to say"),
    ],
)
def test_the_verdict(tmp_path, capsys, a, b, words):
    assert main(["compare", bench(tmp_path / "a.json", a), bench(tmp_path / "b.json", b)]) == 0
    out = capsys.readouterr().out
    assert words in out and "batch_size 16: A " in out and "tokens/s" in out, (
        "absolute values beside every ratio"
    )


@pytest.mark.parametrize(("a", "b"), [(SLOW, FAST), (FAST, SLOW), (SLOW, BETWEEN)])
@pytest.mark.parametrize(("waits", "who"), [((0.4, 0.0), "A"), ((0.0, 0.4), "B")])
def test_no_verdict_where_one_side_waited_for_cores(tmp_path, capsys, a, b, waits, who):
    """Whichever it was: neither its rate nor the ratio is the program's."""
    paths = [
        bench(tmp_path / f"{name}.json", rates, waited=waited)
        for name, rates, waited in (("a", a, waits[0]), ("b", b, waits[1]))
    ]
    assert main(["compare", *paths]) == 0
    out = capsys.readouterr().out
    assert f"{who} waited for cores 40% as long as it computed; no verdict" in out
    assert "faster" not in out and "slower" not in out and "times A's" not in out


def test_a_small_wait_changes_no_verdict(tmp_path, capsys):
    a = bench(tmp_path / "a.json", SLOW, waited=0.04)
    assert main(["compare", a, bench(tmp_path / "b.json", FAST, waited=0.04)]) == 0
    assert "B is faster" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["train", "infer"])
def test_runs_that_waited_get_no_verdict(tmp_path, capsys, kind):
    """The run of the first hour: 100 % of a core used, 116 % waited."""
    a = run(tmp_path / "slow", kind, SLOW, cpu_percent=100.0, cpu_wait_percent=116.0)
    assert main(["compare", a, run(tmp_path / "faster", kind, FAST)]) == 0
    out = capsys.readouterr().out
    assert "A waited for cores 116% as long as it computed; no verdict" in out


@pytest.mark.parametrize("kind", ["train", "infer"])
def test_run_folders(tmp_path, capsys, kind):
    assert (
        main(["compare", run(tmp_path / "slow", kind, SLOW), run(tmp_path / "faster", kind, FAST)])
        == 0
    )
    out = capsys.readouterr().out
    assert "B is faster" in out and "[100.0, 105.0]" in out, (
        "a training run's first step is left out"
    )
    assert "settings that differ: lr" in out and "save_dir" not in out


def test_different_machines_only_when_asked(tmp_path, capsys):
    paths = [bench(tmp_path / "a.json", SLOW), bench(tmp_path / "b.json", FAST, host="node-2")]
    assert main(["compare", *paths]) == 64 and "different machines" in capsys.readouterr().err
    assert (
        main(["compare", *paths, "--across_hosts"]) == 0
        and "DIFFERENT MACHINES" in capsys.readouterr().out
    )


def test_what_cannot_be_compared(tmp_path, capsys):
    a = bench(tmp_path / "a.json", SLOW)
    assert main(["compare", a, bench(tmp_path / "b.json", SLOW, kind="bench train")]) == 65
    assert (
        main(["compare", a, bench(tmp_path / "c.json", SLOW, level=32)]) == 65
        and "no measurement in common" in capsys.readouterr().err
    )
    (tmp_path / "d.json").write_text("{}")
    assert (
        main(["compare", a, str(tmp_path / "d.json")]) == 65
        and main(["compare", a, str(tmp_path / "nothing")]) == 65
    )
