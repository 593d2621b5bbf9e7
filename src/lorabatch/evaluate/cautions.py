"""Reasons to believe an evaluation less: seen in its files, before and after it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from lorabatch.corpus.readers import Document, read_documents
from lorabatch.corpus.weights import weighted_paths
from lorabatch.errors import LorabatchError
from lorabatch.evaluate.items import CHOICE, Task
from lorabatch.records import read_json
from lorabatch.schema import Fields, Record

FEW_ITEMS, FEW_CLUSTERS = 100, 30
TEXTS = {  # the report has its own, by the same names
    "cut": "{task}: {count} of {items} items have nothing to score within --max_len",
    "chose": (
        "{task} chose the best checkpoint of '{model}' (its --val_path), so its figure there is "
        "too good: keep a third file for this"
    ),
    "learned": (
        "{count} of {items} items of {task} are also in what '{model}' was trained on: there it "
        "measures memory; remove them"
    ),
    "few_items": "{task}: {items} items are few",
    "few_clusters": "{task}: {count} independent groups are few for an interval (30 or more)",
    "majority": (
        "{task}: '{model}' is not shown to be right more often than always the commonest answer: "
        "bits a byte say more"
    ),
    "empty": (
        "{task}: {count} of {items} completions of '{model}' are empty, because it ends at once: "
        "the difference to it is that of text and no text"
    ),
    "seed": (
        "the intervals are over the items: another --seed of training may change as much "
        "(lorabatch sweep)"
    ),
}


def caution(kind: str, **values: object) -> Record:
    return {"kind": kind, **values, "text": TEXTS[kind].format(**values)}


def of_training(tasks: Iterable[Task], adapters: Mapping[str, Path]) -> Iterator[Record]:
    """Where an adapter's own run has seen the items: it learned from them, or its best checkpoint
    was chosen by them."""
    tasks = list(tasks)
    for name, folder in adapters.items():
        config = _training_config(folder)
        for task in tasks:
            if _same_file(task.path, config.get("val_path")):
                yield caution("chose", task=task.name, model=name)
            found, items = _shared(task, config), len(task.items)
            if found:
                yield caution("learned", task=task.name, model=name, count=found, items=items)


def _training_config(folder: Path) -> Fields:
    """Settings of the run that left an adapter; empty if it is not in its run's folder."""
    for path in (folder, folder.parent):  # best/ and last/ lie inside
        with suppress(LorabatchError):
            record = read_json(path / "run.json")
            if record["kind"] == "train":
                return dict(record["config"])
    return {}


def _same_file(path: Path, other: object) -> bool:
    """By content; a file that is gone is not known to be the same."""
    try:
        return isinstance(other, str) and path.read_bytes() == Path(other).read_bytes()
    except OSError:
        return False


def _shared(task: Task, config: Fields) -> int:
    """Items whose text is in the training file too, word for word."""
    paths = config.get("train_path")
    if not isinstance(paths, list) or task.kind == CHOICE:
        return 0
    try:
        learned = [
            document
            for path, _ in weighted_paths(paths)
            for document in read_documents(
                Path(path), txt_format=config["txt_format"], text_field=config["text_field"]
            )
        ]
    except (LorabatchError, OSError, KeyError):
        return 0
    known = {_words(document) for document in learned}
    return sum(_words(item.documents[0]) in known for item in task.items)


def _words(document: Document) -> str:
    texts = [m["content"] for m in document.messages or ()]
    return " ".join(" ".join([document.prompt or "", document.text, *texts]).casefold().split())


def of_figures(record: Fields) -> Iterator[Record]:
    """Too little data, and models that know no more than which answer is commonest."""
    for task in record["tasks"]:
        name, items, clusters = task["task"], task["items"], task["clusters"]
        if items < FEW_ITEMS:
            yield caution("few_items", task=name, items=items)
        if clusters < FEW_CLUSTERS:
            yield caution("few_clusters", task=name, count=clusters)
        if task["kind"] == CHOICE:
            for model, figures in task["models"].items():
                if figures["low"] <= task["majority"]:
                    yield caution("majority", task=name, model=model)
        for model, figures in task["models"].items():
            if count := figures.get("empty"):
                yield caution("empty", task=name, model=model, count=count, items=items)
    if record["comparisons"]:
        yield caution("seed")
