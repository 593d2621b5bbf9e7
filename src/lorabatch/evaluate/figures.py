"""From scored items to figures: each model's own, and every adapter's difference to the base."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from lorabatch.evaluate.items import CHOICE, DOCUMENTS, GENERATION
from lorabatch.metrics.statistics import perplexity
from lorabatch.schema import Fields, Record

if TYPE_CHECKING:
    from lorabatch.metrics.paired import Array

BASE = "base"
BETTER, WORSE, SAME = "better", "worse", "no difference shown"
LEVEL = 0.05
FORGETS = 0.01  # more bits a byte on general text
MEASURES = {DOCUMENTS: "bits per byte", CHOICE: "accuracy", GENERATION: "chrF"}

Lines = Mapping[str, Mapping[str, Fields]]  # model -> id -> line of items.jsonl


@dataclass
class Comparison:
    """B against A on one task. ``difference``: of the measure, B - A."""

    task: str
    measure: str
    model: str
    against: str
    items: int
    clusters: int
    difference: float
    low: float | None
    high: float | None
    reason: str | None  # why there is no interval
    test: str
    p: float
    adjusted_p: float
    can_show: float | None  # difference that so many items show with 80 % power
    improved: int  # items
    worsened: int
    verdict: str = SAME


def kind_of(line: Fields) -> str:
    if "chrf" in line:
        return GENERATION
    return DOCUMENTS if "nll" in line else CHOICE


def rises_are_good(measure: str) -> bool:
    return measure != MEASURES[DOCUMENTS]


def chosen(line: Fields, *, normalised: bool = True) -> int:
    """The option of the least nats, for each character of it if ``normalised``; of equal ones the
    first."""
    sizes = line["option_sizes"] if normalised else [1] * len(line["option_nll"])
    each = [nll / size for nll, size in zip(line["option_nll"], sizes, strict=True)]
    return each.index(min(each))


def score_of(line: Fields) -> tuple[float, float]:
    """(what the measure adds up, what it is counted over): bits over bytes, right answers over
    questions, or chrF over prompts."""
    if kind_of(line) == DOCUMENTS:
        return line["nll"] / math.log(2), line["bytes"]
    if kind_of(line) == GENERATION:
        return line["chrf"], 1.0
    return float(chosen(line) == line["answer"]), 1.0


def own_figures(lines: Mapping[str, Fields]) -> Record:
    """Of one model on one task."""
    found = list(lines.values())
    of_kind = {DOCUMENTS: _of_documents, CHOICE: _of_choice, GENERATION: _of_generation}
    return {"value": _whole(found), **of_kind[kind_of(found[0])](found)}


def _of_documents(lines: Sequence[Fields]) -> Record:
    tokens, nats = sum(line["tokens"] for line in lines), math.fsum(line["nll"] for line in lines)
    return {"perplexity": perplexity(nats / tokens), "tokens": tokens}


def _of_choice(lines: Sequence[Fields]) -> Record:
    from lorabatch.metrics.paired import wilson

    right = sum(chosen(line) == line["answer"] for line in lines)
    plain = sum(chosen(line, normalised=False) == line["answer"] for line in lines)
    low, high = wilson(right, len(lines))
    return {"low": low, "high": high, "by_sum": plain / len(lines)}


def _of_generation(lines: Sequence[Fields]) -> Record:
    counts = {name: sum(line[name] for line in lines) for name in ("exact", "empty")}
    return {**counts, "stopped": sum(line["finish_reason"] == "stop" for line in lines)}


def _whole(lines: Iterable[Fields]) -> float:
    """The measure over all of them."""
    scores = [score_of(line) for line in lines]
    return math.fsum(s for s, _ in scores) / math.fsum(n for _, n in scores)


def by_domain(models: Lines) -> Record:
    """domain -> items and the measure of each model there; empty if the items name none. Without
    intervals: many small comparisons would find something by chance."""
    ids: dict[str, list[str]] = {}
    for name, line in next(iter(models.values())).items():
        if "domain" in line:
            ids.setdefault(line["domain"], []).append(name)
    return {
        domain: {
            "items": len(names),
            "models": {m: _whole(lines[i] for i in names) for m, lines in models.items()},
        }
        for domain, names in sorted(ids.items())
    }


def baselines(lines: Mapping[str, Fields]) -> Record:
    """What whoever knows nothing gets right: chance, and always the commonest place."""
    chance = [1 / len(line["option_nll"]) for line in lines.values()]
    places = Counter(line["answer"] for line in lines.values())
    return {
        "chance": math.fsum(chance) / len(chance),
        "majority": max(places.values()) / len(lines),
    }


def compare_models(
    task: str,
    a: str,
    b: str,
    lines_a: Mapping[str, Fields],
    lines_b: Mapping[str, Fields],
    seed: int,
) -> Comparison:
    """B - A on the same items, whose clusters are resampled; in whatever order they were scored."""
    from lorabatch.metrics import paired  # numpy: not on the way to --help

    ids = sorted(lines_a)
    scores = [(score_of(lines_a[i]), score_of(lines_b[i])) for i in ids]
    changes = [b_score - a_score for (a_score, _), (b_score, _) in scores]
    groups = [str(lines_a[i]["group"]) for i in ids]
    change = paired.cluster_sums(changes, groups)
    size = paired.cluster_sums([size for (_, size), _ in scores], groups)
    interval = paired.bootstrap_interval(change, size, seed=seed)
    error = paired.standard_error(change, size)
    kind = kind_of(lines_a[ids[0]])
    rises, falls = sum(c > 0 for c in changes), sum(c < 0 for c in changes)
    test, p = _p_value(
        change, rises, falls, exact=kind == CHOICE and len(change) == len(ids), seed=seed
    )
    return Comparison(
        task=task,
        measure=MEASURES[kind],
        model=b,
        against=a,
        items=len(ids),
        clusters=len(change),
        difference=float(change.sum() / size.sum()),
        **asdict(interval),
        test=test,
        p=p,
        adjusted_p=p,
        can_show=None if error is None else paired.smallest_difference(error),
        improved=rises if rises_are_good(MEASURES[kind]) else falls,
        worsened=falls if rises_are_good(MEASURES[kind]) else rises,
    )


def _p_value(change: Array, rises: int, falls: int, *, exact: bool, seed: int) -> tuple[str, float]:
    """(name of the test, p of no difference)."""
    from lorabatch.metrics.paired import mcnemar_p, sign_flip_p

    if exact:
        return "McNemar, exact", mcnemar_p(falls, rises)
    return "random signs of clusters", sign_flip_p(change, seed=seed)


def forgetting(models: Lines, seed: int) -> list[Record]:
    """How much more bits each adapter needs for text of another kind, relative to the base's, with
    intervals; it forgets if even the lower end is above FORGETS."""
    from lorabatch.metrics.paired import bootstrap_interval

    (_, base), *others = models.items()
    bits, found = _cluster_bits(base, base), []
    for name, lines in others:
        change = _cluster_bits(lines, base) - bits
        interval = bootstrap_interval(change, bits, seed=seed)
        forgets = interval.low is not None and interval.low > FORGETS
        relative = float(change.sum() / bits.sum())
        found.append({"model": name, "relative": relative, **asdict(interval), "forgets": forgets})
    return found


def _cluster_bits(lines: Mapping[str, Fields], base: Mapping[str, Fields]) -> Array:
    """Of each cluster of the base's lines."""
    from lorabatch.metrics.paired import cluster_sums

    ids = sorted(base)
    return cluster_sums([score_of(lines[i])[0] for i in ids], [base[i]["group"] for i in ids])


def settle(comparisons: Sequence[Comparison]) -> None:
    """p values adjusted for being several, and the verdicts that follow."""
    from lorabatch.metrics.paired import holm

    for comparison, p in zip(comparisons, holm([c.p for c in comparisons]), strict=True):
        comparison.adjusted_p = p
        comparison.verdict = _verdict(comparison)


def _verdict(c: Comparison) -> str:
    """The test and the interval must agree."""
    if c.low is not None and c.high is not None and c.low <= 0 <= c.high:
        return SAME
    if c.adjusted_p >= LEVEL or not c.difference:
        return SAME
    return BETTER if (c.difference > 0) == rises_are_good(c.measure) else WORSE


def evaluation(tasks: Mapping[str, Lines], *, seed: int, general: str | None = None) -> Record:
    """``tasks``, ``comparisons`` and ``forgetting`` of eval.json. tasks: name -> lines; the other
    models of a task are compared with its first, the base. general: the one of general text."""
    comparisons = [
        compare_models(task, names[0], name, models[names[0]], models[name], seed)
        for task, models in tasks.items()
        for names in [list(models)]
        for name in names[1:]
    ]
    settle(comparisons)
    return {
        "tasks": [_task(name, models) for name, models in tasks.items()],
        "comparisons": [asdict(c) for c in comparisons],
        "forgetting": forgetting(tasks[general], seed) if general else [],
    }


def _task(name: str, models: Lines) -> Record:
    """What eval.json says of a task but for comparisons."""
    first = next(iter(models.values()))
    kind = kind_of(next(iter(first.values())))
    return {
        "task": name,
        "kind": kind,
        "measure": MEASURES[kind],
        "items": len(first),
        "clusters": len({line["group"] for line in first.values()}),
        "models": {model: own_figures(lines) for model, lines in models.items()},
        "domains": by_domain(models),
        **(baselines(first) if kind == CHOICE else {}),
    }
