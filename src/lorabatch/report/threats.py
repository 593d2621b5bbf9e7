"""What the records themselves say against trusting their numbers: a closed list, each from the
data."""

from __future__ import annotations

from collections.abc import Sequence

from lorabatch.machine.waits import DISTURBED
from lorabatch.report.load import InferRun, Run, TrainRun
from lorabatch.report.words import Words

FEW_DOCUMENTS = FEW_REQUESTS = 100


def threats(words: Words, trained: Sequence[TrainRun], inferred: Sequence[InferRun]) -> list[str]:
    runs: list[Run] = [*trained, *inferred]
    found = [
        words(key, runs=", ".join(run.label for run in which), least=FEW_REQUESTS)
        for key, which in _of_several(trained, inferred)
        if which
    ]
    found += [line for run in runs for line in _shared(words, run)]
    found += [line for run in trained for line in _validation(words, run)]
    found += [line for run in inferred for line in _inference(words, run)]
    hosts = sorted({str(run.environment.get("host")) for run in runs})
    return found + ([words("hosts", hosts=", ".join(hosts))] if len(hosts) > 1 else [])


def _of_several(
    trained: Sequence[TrainRun], inferred: Sequence[InferRun]
) -> list[tuple[str, list[Run]]]:
    """What is said once, and all the runs it holds for."""
    runs: list[Run] = [*trained, *inferred]
    few = [run for run in inferred if 0 < (run.metrics.completed or 0) < FEW_REQUESTS]
    return [
        ("one_seed", [*trained]),
        ("one_repetition", [run for run in inferred if run.metrics.iterations == 1]),
        ("few_requests", [*few]),
        ("greedy", [run for run in inferred if not run.config.get("temperature")]),
        ("shared_unknown", [run for run in runs if run.system.cpu_wait_percent is None]),
        ("no_state", [run for run in runs if not _state_is_known(run)]),
    ]


def _state_is_known(run: Run) -> bool:
    git = run.environment.get("git") or {"dirty": True}
    return not git.get("dirty")


def _shared(words: Words, run: Run) -> list[str]:
    share = run.system.waited_share
    if share is None or share <= DISTURBED:
        return []
    return [words("shared", run=run.label, wait=words.quantity(share, "share"))]


def _validation(words: Words, run: TrainRun) -> list[str]:
    data = run.data("val")
    if data is None:
        return [words("no_validation", run=run.label)]
    documents, tokens = words.number(data.documents), words.number(data.target_tokens)
    small = words("small") if (data.documents or 0) < FEW_DOCUMENTS else ""
    found = [words("val_size", run=run.label, documents=documents, tokens=tokens, small=small)]
    leaked = max((c["count"] for n, c in run.checks.items() if n.startswith("leak.")), default=0)
    if leaked:
        found.append(words("leaks", run=run.label, count=words.number(leaked)))
    evals = sum(e.step > 0 for e in run.evals)
    return found + (
        [words("best_of", run=run.label, evals=words.number(evals))] if evals > 1 else []
    )


def _inference(words: Words, run: InferRun) -> list[str]:
    found = []
    repetitions, measured = run.metrics.iterations, run.metrics.completed
    if repetitions and repetitions > 1:
        found.append(words("repetitions", run=run.label, count=words.number(repetitions)))
    if temperature := run.config.get("temperature"):
        seed = run.config.get("seed")
        found.append(words("sampled", run=run.label, temperature=temperature, seed=seed))
    finished = sum(c.error is None for c in run.completions)
    if repetitions and measured is not None and measured < finished * repetitions:
        counts = {"count": words.number(finished), "measured": words.number(measured)}
        found.append(words("resumed", run=run.label, **counts))
    cut = sum(c.truncated is not None for c in run.completions)
    return found + ([words("truncated", run=run.label, count=words.number(cut))] if cut else [])
