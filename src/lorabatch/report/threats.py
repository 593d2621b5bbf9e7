"""What the records themselves say against trusting their numbers: a closed list, each from the data."""

from __future__ import annotations

from collections.abc import Sequence

from lorabatch.report.load import InferRun, Run, TrainRun
from lorabatch.report.words import Words

FEW_DOCUMENTS = FEW_REQUESTS = 100


def threats(words: Words, trained: Sequence[TrainRun], inferred: Sequence[InferRun]) -> list[str]:
    runs: list[Run] = [*trained, *inferred]
    found = [words("one_training", count=len(trained))] if trained else []
    for run in trained:
        found.append(_validation(words, run))
    single = [run for run in inferred if run.metric("iterations") == 1]
    if single:
        found.append(words("one_repetition", runs=_labels(single)))
    greedy = [run for run in inferred if not run.config.get("temperature")]
    if greedy:
        found.append(words("greedy", runs=_labels(greedy)))
    for infer_run in inferred:
        found += _inference(words, infer_run)
    hosts = sorted({str(run.environment.get("host")) for run in runs})
    if len(hosts) > 1:
        found.append(words("hosts", hosts=", ".join(hosts)))
    found.append(words("shared", runs=_labels(runs)))
    unclear = [run for run in runs if (run.environment.get("git") or {"dirty": True}).get("dirty")]
    if unclear:
        found.append(words("no_state", runs=_labels(unclear)))
    return found


def _validation(words: Words, run: TrainRun) -> str:
    record = (run.record.get("data") or {}).get("val")
    if not record:
        return words("no_validation", run=run.label)
    counts = {"documents": words.number(record.get("documents")), "tokens": words.number(record.get("target_tokens"))}
    small = words("small") if (record.get("documents") or 0) < FEW_DOCUMENTS else ""
    after_start = sum(e.step > 0 for e in run.evals)
    return words("val_size", run=run.label, small=small, evals=words.number(after_start), **counts)


def _inference(words: Words, run: InferRun) -> list[str]:
    found = []
    repetitions, measured = run.metric("iterations"), run.metric("completed")
    if repetitions and repetitions > 1:
        found.append(words("repetitions", run=run.label, count=words.number(repetitions)))
    if measured is not None and measured < FEW_REQUESTS:
        found.append(words("few_requests", run=run.label, count=words.number(measured)))
    if run.config.get("temperature"):
        found.append(words("sampled", run=run.label, temperature=run.config["temperature"], seed=run.config.get("seed")))
    finished = sum(c.error is None for c in run.completions)
    if repetitions and measured is not None and measured < finished * repetitions:
        found.append(words("resumed", run=run.label, count=words.number(finished), measured=words.number(measured)))
    cut = sum(c.truncated is not None for c in run.completions)
    if cut:
        found.append(words("truncated", run=run.label, count=words.number(cut)))
    return found


def _labels(runs: Sequence[Run]) -> str:
    return ", ".join(run.label for run in runs)
