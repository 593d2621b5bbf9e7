"""What training looks for in its data before anything slow starts. The first rank looks, once for
each pair of files; what would make the run's own result false stops it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path

from lorabatch.check.checked import Checked
from lorabatch.check.look import Files, look_for_training
from lorabatch.check.rules import RULES
from lorabatch.config_trust import CheckConfig
from lorabatch.corpus.weights import weighted_paths
from lorabatch.errors import DataError
from lorabatch.model import hub
from lorabatch.records import read_json
from lorabatch.schema import Record, dumps
from lorabatch.train.planned import PlannedRun
from lorabatch.train.ranks import Ranks

# Two runs with equal values of these, and equal files, have equal findings.
SETTINGS = (
    "data_checks",
    "group_field",
    "txt_format",
    "text_field",
    "max_train_documents",
    "max_val_documents",
)


def look_at_data(runs: Sequence[PlannedRun], ranks: Ranks) -> list[PlannedRun]:
    """The runs with what run.json keeps of their data. DataError, on every rank, for what stops
    them."""
    records = ranks.from_first(_records(runs) if ranks.is_first else [])
    if isinstance(records, DataError):
        raise records
    return [replace(run, checks=record) for run, record in zip(runs, records, strict=True)]


def _records(runs: Sequence[PlannedRun]) -> list[Record | None] | DataError:
    known: dict[str, Record] = {}  # by what they are about
    try:
        return [_record(run, known) for run in runs]
    except DataError as error:
        return error


def _record(run: PlannedRun, known: dict[str, Record]) -> Record | None:
    if run.config.data_checks == "off":
        return None
    about = _about(run)
    key = dumps(about)
    if key not in known:
        known[key] = _found_earlier(run, about) or _found_now(run) | {"about": about}
    return known[key]


def _found_now(run: PlannedRun) -> Record:
    """DataError for what stops the run."""
    checked = _look(run)
    for line in checked.lines("FAIL", "warn"):
        print(line)
    print(f"data checks: {checked.effort()}", flush=True)
    for found in checked.findings:
        if found.level == "FAIL":
            raise DataError(
                f"{found.check}: {found.found}",
                where=" ".join(run.config.train_path),
                fix=f"{found.fix}, or give --data_checks off",
            )
    return checked.record()


def _about(run: PlannedRun) -> Record:
    """What the findings depend on."""
    config = run.config
    paths = [*(path for path, _ in weighted_paths(config.train_path)), config.val_path]
    digests = [path and hub.file_sha256(Path(path)) for path in paths]
    return {"sha256": digests} | {name: getattr(config, name) for name in SETTINGS}


def _found_earlier(run: PlannedRun, about: Record) -> Record | None:
    """By the attempt that a resumed run goes on from."""
    path = run.folder / "run.json"
    if run.config.resume is None or not path.exists():
        return None
    checks: Record | None = (read_json(path).get("data") or {}).get("checks")
    return checks if checks and checks.get("about") == about else None


def _look(run: PlannedRun) -> Checked:
    config, start_s = run.config, time.perf_counter()
    paths = [Path(path) for path, _ in weighted_paths(config.train_path)]
    files = [documents[: config.max_train_documents] for documents, _ in run.train]
    train = list(chain.from_iterable(files))
    val = run.val_documents and run.val_documents[: config.max_val_documents]
    sides = dict(zip(paths, files, strict=True))
    if val and config.val_path:
        sides[Path(config.val_path)] = val
    rules = RULES
    if config.data_checks != "strict":  # elsewhere a FAIL is a warning here
        rules = {n: rule if rule.stops else replace(rule, fail=None) for n, rule in RULES.items()}
    seen = look_for_training(Files(train, val), CheckConfig.near_words)
    return Checked.of(seen, rules, sides, start_s)
