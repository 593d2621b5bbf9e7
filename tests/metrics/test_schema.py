"""The figures of ``metrics.json``: each name once, the same formulas for a run and for merged shards,
and records of other versions."""

import dataclasses

import pytest

from lorabatch.infer.metrics import add_request
from lorabatch.infer.requests import Request, SamplingParams, completion_record
from lorabatch.metrics.inference import Latencies, Times, infer_metrics, tpot_ms
from lorabatch.metrics.schema import (
    DataCounts,
    InferMetrics,
    InferStartup,
    KernelFacts,
    SystemMetrics,
    TrainMetrics,
    TrainPhases,
)
from lorabatch.metrics.statistics import Summary
from lorabatch.report.words import LANGUAGES, Words
from lorabatch.schema import KINDS

COUNTS = {"failed": 1, "not_finite": 0, "empty": 0}
RECORDS = (
    TrainMetrics(
        steps=3,
        step_ms=Summary(1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0),
        phases=TrainPhases(load_s=1.5),
        kernels=KernelFacts(better_variants={"amx": "not built"}),
    ),
    InferMetrics(completed=4, startup=InferStartup(startup_load_s=2.0), pass_tokens_per_s=[1.0]),
    InferMetrics(completed=4, shards=2, quarantined=["p0"]),
    SystemMetrics(cpu_percent=150.0, missing={"energy_j": "no GPU"}),
    DataCounts(documents=2, median_tokens=1.5),
)


def finished(index, moments, num_tokens):
    """A request that was submitted, began, had its first and its last token at these seconds."""
    submitted_s, started_s, first_token_s, last_token_s = moments
    return Request(
        str(index),
        index,
        "",
        SamplingParams(),
        token_ids=[1, 2, 3],
        output_ids=[7] * num_tokens,
        submitted_s=submitted_s,
        started_s=started_s,
        first_token_s=first_token_s,
        last_token_s=last_token_s,
    )


def test_times_of_a_request_by_hand():
    """Submitted at 1 s, first token at 3 s, fifth and last at 5 s."""
    latencies = Latencies()
    add_request(latencies, finished(0, (1.0, 1.5, 3.0, 5.0), 5))
    add_request(latencies, finished(1, (1.0, 1.5, 3.0, 3.0), 1))
    found = infer_metrics([latencies], iterations=1, duration_s=4.0, counts=COUNTS)
    assert (found.queue_ms.mean, found.ttft_ms.mean, found.e2el_ms.mean) == (500, 2000, 3000)
    assert found.tpot_ms == Summary(500, 500, None, 500, 500, 500, 500), "of the first alone"
    assert (found.completed, found.failed) == (2, 1)
    assert (found.total_input_tokens, found.total_output_tokens) == (6, 6)
    assert (found.request_throughput, found.output_throughput) == (0.5, 1.5)
    assert (found.tokens_per_s, found.total_token_throughput) == (1.5, 3.0)


def test_merged_shards_have_the_figures_of_the_run_that_they_are_parts_of():
    """A run counts what it measures; the merging reads records of the same requests."""
    requests = [finished(i, (0.0, 0.25 * i, 0.5 * i, 2.0 * i), i) for i in range(1, 5)]
    run, merged = Latencies(), Latencies("d")
    for request in requests:
        add_request(run, request)
        record = completion_record(request, None, key="", adapter=None)
        merged.add(
            Times(record["queue_ms"], record["ttft_ms"], record["e2el_ms"]),
            input_tokens=record["input_tokens"],
            output_tokens=record["output_tokens"],
        )
    one, other = (
        infer_metrics([latencies], iterations=1, duration_s=2.0, counts=COUNTS)
        for latencies in (run, merged)
    )
    for name in ("queue_ms", "ttft_ms", "tpot_ms", "e2el_ms"):
        found, expected = (dataclasses.astuple(getattr(x, name)) for x in (other, one))
        assert found == pytest.approx(expected, rel=1e-6) and found[0] > 0
        one, other = (dataclasses.replace(x, **{name: Summary()}) for x in (one, other))
    assert one == other and one.total_output_tokens == 10


def test_a_time_that_was_not_recorded_counts_for_nothing():
    assert tpot_ms(ttft_ms=None, e2el_ms=5.0, output_tokens=3) is None
    latencies = Latencies("d")
    latencies.add(Times(None, None, 8.0), input_tokens=1, output_tokens=2)
    found = infer_metrics([latencies], iterations=1, duration_s=0.0, counts=COUNTS)
    assert found.ttft_ms == found.tpot_ms == Summary() and found.e2el_ms.mean == 8.0
    assert found.completed == 1 and found.output_throughput is None


@pytest.mark.parametrize("metrics", RECORDS, ids=lambda metrics: type(metrics).__name__)
def test_a_record_gives_the_metrics_it_was_written_from(metrics):
    record = metrics.to_dict()
    assert type(metrics).from_dict(record) == metrics
    assert type(metrics).from_dict(record | {"of_a_later_version": 1}) == metrics


def test_only_what_can_be_measured_has_a_key():
    run, shards = RECORDS[1].to_dict(), RECORDS[2].to_dict()
    assert "startup_load_s" in run and "startup_warm_up_s" not in run, "there was no warm-up"
    assert "p50_itl_ms" in run and "shards" not in run
    assert shards["shards"] == 2 and not {"p50_itl_ms", "startup_s", "mbu"} & shards.keys()
    train = RECORDS[0].to_dict()
    assert train["phases"] == {"load_s": 1.5} and train["kernel_variant"] is None
    assert train["p95_step_ms"] == 6.0 and train["loss"] is None


def test_what_is_no_number_is_not_measured():
    record = {"loss": "2.5", "eval_loss": 1e99, "steps": True, "tokens_per_s": 7, "phases": None}
    found = TrainMetrics.from_dict(record | {"better_variants": [], "p50_step_ms": "x"})
    assert (found.loss, found.eval_loss, found.steps, found.tokens_per_s) == (None, None, None, 7)
    assert found.phases == TrainPhases() and found.step_ms.p50 is None
    assert found.kernels == KernelFacts()


def test_every_metric_that_a_report_shows_has_a_label_in_both_languages():
    kinds = (TrainMetrics, TrainPhases, InferMetrics, SystemMetrics, DataCounts)
    tables = [
        (name, kind.table(name))
        for kind in kinds
        for name in {field.metadata["table"] for field in dataclasses.fields(kind)} - {""}
    ]
    # a latency is one row, its percentiles are columns
    keys = {m.field if name == "latency" else m.name for name, table in tables for m in table}
    assert len(keys) > 50
    for language in LANGUAGES:
        assert keys <= Words(language).texts.keys()


def test_what_a_record_must_hold_to_be_read_is_known_to_the_schema():
    keys = {
        key
        for kind in (TrainMetrics, InferMetrics, SystemMetrics)
        for key in (*kind.from_dict({}).to_dict(), *(f.name for f in dataclasses.fields(kind)))
    }
    assert KINDS["metrics.json"].fields.keys() <= keys


@pytest.mark.parametrize("metrics", RECORDS[:3], ids=lambda metrics: type(metrics).__name__)
def test_a_run_and_its_machine_share_no_key(metrics):
    assert not metrics.to_dict().keys() & SystemMetrics().to_dict().keys()
