"""What the records themselves say against trusting their numbers: a closed list, each from the data."""

from __future__ import annotations

from collections.abc import Sequence

from lorabatch.measure.waits import DISTURBED
from lorabatch.report.load import InferRun, Run, TrainRun
from lorabatch.report.words import Words

FEW_DOCUMENTS = FEW_REQUESTS = 100


def threats(words: Words, trained: Sequence[TrainRun], inferred: Sequence[InferRun]) -> list[str]:
    runs: list[Run] = [*trained, *inferred]
    shared: list[tuple[str, list[Run]]] = [  # said once, naming all the runs it holds for
        ("one_seed", [*trained]),
        ("one_repetition", [run for run in inferred if run.metric("iterations") == 1]),
        ("few_requests", [run for run in inferred if 0 < (run.metric("completed") or 0) < FEW_REQUESTS]),
        ("greedy", [run for run in inferred if not run.config.get("temperature")]),
        ("shared_unknown", [run for run in runs if run.metric("cpu_wait_percent") is None]),
        ("no_state", [run for run in runs if (run.environment.get("git") or {"dirty": True}).get("dirty")]),
    ]
    found = [words(key, runs=", ".join(run.label for run in which), least=FEW_REQUESTS) for key, which in shared if which]
    for run in runs:
        wait, busy = run.metric("cpu_wait_percent"), run.metric("cpu_percent")
        if wait and busy and wait / busy > DISTURBED:
            found.append(words("shared", run=run.label, wait=words.quantity(wait / busy, "share")))
    found += [line for run in trained for line in _validation(words, run)]
    found += [line for run in inferred for line in _inference(words, run)]
    hosts = sorted({str(run.environment.get("host")) for run in runs})
    return found + ([words("hosts", hosts=", ".join(hosts))] if len(hosts) > 1 else [])


def _validation(words: Words, run: TrainRun) -> list[str]:
    record = (run.record.get("data") or {}).get("val")
    if not record:
        return [words("no_validation", run=run.label)]
    documents, tokens = words.number(record.get("documents")), words.number(record.get("target_tokens"))
    small = words("small") if (record.get("documents") or 0) < FEW_DOCUMENTS else ""
    found = [words("val_size", run=run.label, documents=documents, tokens=tokens, small=small)]
    evals = sum(e.step > 0 for e in run.evals)
    return found + ([words("best_of", run=run.label, evals=words.number(evals))] if evals > 1 else [])


def _inference(words: Words, run: InferRun) -> list[str]:
    found = []
    repetitions, measured = run.metric("iterations"), run.metric("completed")
    if repetitions and repetitions > 1:
        found.append(words("repetitions", run=run.label, count=words.number(repetitions)))
    if run.config.get("temperature"):
        found.append(words("sampled", run=run.label, temperature=run.config["temperature"], seed=run.config.get("seed")))
    finished = sum(c.error is None for c in run.completions)
    if repetitions and measured is not None and measured < finished * repetitions:
        found.append(words("resumed", run=run.label, count=words.number(finished), measured=words.number(measured)))
    cut = sum(c.truncated is not None for c in run.completions)
    return found + ([words("truncated", run=run.label, count=words.number(cut))] if cut else [])
