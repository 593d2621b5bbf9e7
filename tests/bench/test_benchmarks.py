"""The README's tables come from the results files and from nothing else."""

import json
import runpy
import sys

import pytest
from support.paths import ROOT

BENCHMARKS = ROOT / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import tables  # noqa: E402


def engine(seconds, tokens=128, first_tokens=("1 2 3 4",), dtype="bf16"):
    return {
        "dtype": dtype,
        "seconds": seconds,
        "tokens_per_s": [tokens / s for s in seconds],
        "peak_rss_bytes": 2**30,
        "startup_s": 1.0,
        "first_tokens": list(first_tokens),
    }


def sitting(engines, mode="exact", batch_size=2):
    facts = {
        "at": "2026-11-24T10:00:00Z",
        "threads": 2,
        "environment": {"cpu": "a CPU", "git": {"commit": "12345678"}},
    }
    return facts | {
        "mode": mode,
        "workload": "repeated",
        "batch_size": batch_size,
        "engines": engines,
    }


def test_ratios_are_taken_within_a_sitting():
    """A slow hour of the machine slows both sides: the ratio is 2 in both sittings, whatever the
    hour."""
    quick = sitting({"lorabatch": engine([1.0, 1.1, 1.0]), "openvino": engine([2.0, 2.0, 2.0])})
    slow = sitting({"lorabatch": engine([10.0]), "openvino": engine([20.0])})
    alone = sitting({"openvino": engine([0.1])})
    rate, ratio = tables.middle(tables.cells([quick, slow, alone], "openvino"))
    assert ratio == 2.0
    assert rate == 64.0


def test_a_missing_engine_has_no_row():
    results = {
        "sittings": [
            sitting(
                {
                    "lorabatch": engine([1.0]),
                    "openvino": engine([2.0]),
                    "vllm": {"missing": "not installed"},
                }
            )
        ]
    }
    summary, full = tables.infer_summary(results, "en"), tables.infer_full(results, "en")
    assert summary.startswith(
        "a CPU, 2 threads, commit 1234567, 2026-11-24; median of 1 rounds or more."
    )
    assert "| OpenVINO GenAI | bf16 | 64 (2.00x) |" in summary
    assert "vLLM" not in summary + full
    assert "| **lorabatch** | bf16 | **128** |" in summary


def test_agreement_counts_to_the_first_difference():
    assert tables.agreement(["1 2 3 4"], ["1 2 9 4"]) == 0.5
    assert tables.agreement(["1 2", "3 4"], ["1 2", "3 4"]) == 1.0


def test_each_machine_has_its_newest_results(tmp_path):
    for name in (
        "infer-zen-3-2026-11-20",
        "infer-zen-3-2026-11-29",
        "infer-zen-5-2026-11-25",
        "train-zen-3-2026-11-30",
    ):
        (tmp_path / f"{name}.json").write_text(json.dumps({"name": name}))
    found = [results["name"] for results in tables.of_each_machine("infer", tmp_path)]
    assert found == ["infer-zen-3-2026-11-29", "infer-zen-5-2026-11-25"]


def test_only_the_marked_part_of_a_page_changes():
    page = (
        "before\n<!-- bench:infer -->\nold\n<!-- /bench:infer -->\nafter\n<!-- bench:train "
        "-->\n<!-- /bench:train -->\n"
    )
    new = tables.insert(page, "infer", r"| 1\2 |")
    assert new == page.replace("\nold\n", "\n\n| 1\\2 |\n\n")
    assert tables.insert(new, "infer", r"| 1\2 |") == new


@pytest.mark.parametrize(
    "path", sorted((BENCHMARKS / "results").glob("infer-*.json")), ids=lambda path: path.stem
)
def test_recorded_results_count_their_tokens(path):
    for record in json.loads(path.read_text(encoding="utf-8"))["sittings"]:
        for result in record["engines"].values():
            if "missing" not in result:
                assert result["output_tokens"] == record["batch_size"] * record["max_new_tokens"]
                assert result["tokens_per_s"] == pytest.approx(
                    [result["output_tokens"] / s for s in result["seconds"]]
                )


def test_the_table_of_adapters_shows_each_way_of_a_cell():
    cell = {"adapters": 4, "requests": 64, "max_new_tokens": 8, "rounds": 2}
    rows = [
        cell | {"way": w, "tokens_per_s": t, "mixed_ratio": 1000 / t}
        for w, t in (("mixed", 1000.0), ("peft", 100.0))
    ]
    results = {"summary": rows}
    assert "| 4 | 64 | 8 | 1,000 | 100 (10.00x) | 2 |" in tables.adapters_summary(results, "en")
    portuguese = tables.adapters_summary(results, "pt")
    assert "| 4 | 64 | 8 | 1.000 | 100 (10,00x) | 2 |" in portuguese
    assert portuguese.startswith("| adaptadores | pedidos |") and "rodadas |" in portuguese
    rows[1]["rounds"] = 1
    assert tables.adapters_summary(results, "en").endswith("| 2 / 1 |"), "of each way"


def test_numbers_are_those_of_the_language():
    assert tables.number(1865.4, "en") == "1,865" and tables.number(1865.4, "pt") == "1.865"
    assert tables.number(0.5, "pt", 1) == "0,5" and tables.times(12.75, "pt") == " (12,75x)"
    assert tables.times(None, "pt") == ""


def test_distinct_prompts_are_distinct():
    infer = runpy.run_path(str(BENCHMARKS / "infer.py"))
    prompts = infer["prompt_texts"]("distinct", 256)
    assert len(set(prompts)) == len(prompts) == 256
    assert len(set(infer["prompt_texts"]("repeated", 256))) == 4
