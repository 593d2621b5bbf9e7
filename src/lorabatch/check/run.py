"""``lorabatch check``: one line for each check, worst first, and two files with all of it."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from lorabatch.check import shape
from lorabatch.check.checked import WIDTH, Checked
from lorabatch.check.items import read_items
from lorabatch.check.look import Files, look_for_everything
from lorabatch.check.rules import Seen, rules_with
from lorabatch.config_trust import CheckConfig
from lorabatch.corpus.readers import Document, read_documents
from lorabatch.corpus.tokens import Tokenizer
from lorabatch.corpus.weights import weighted_paths
from lorabatch.errors import DataError, UsageError
from lorabatch.model import hub

NAMES = "Names of persons are not looked for, and no finding is no proof."


def run_check(config: CheckConfig, command: list[str]) -> int:
    """Print and write the findings. Returns 65 if one of them is a FAIL, else 0."""
    start_s = time.perf_counter()
    rules = rules_with(config.warn_at, config.fail_at)
    trained_on, validation = _paths(config)
    tokenizer = _tokenizer(config.base_model)
    sides = {path: _read(path, config) for path in (*trained_on, *validation)}
    train = [document for path in trained_on for document in sides[path]]
    val = [document for path in validation for document in sides[path]] or None
    if config.show is not None:
        return _show(train[: config.show], tokenizer, config)
    files = Files(train, val, _test_items(config))
    seen = _with_tokens(
        list(look_for_everything(files, config.near_words, config.near_jaccard)),
        train,
        tokenizer,
        config.max_len,
    )
    checked = Checked.of(seen, rules, sides, start_s)
    _print(checked, config)
    checked.write(Path(config.output_dir))
    return 65 if checked.level == "FAIL" else 0


def _test_items(config: CheckConfig) -> list[Document]:
    return [
        item
        for name in config.against
        for item in read_items(Path(name), config.txt_format, config.text_field)
    ]


def _paths(config: CheckConfig) -> tuple[list[Path], list[Path]]:
    """Training files and, unless there is none, the validation file. UsageError, DataError if two
    are the same."""
    if len(config.files) > 2:
        raise UsageError(
            f"{len(config.files)} files",
            where=config.files[2],
            fix="give the training file and the validation file; others with --against",
        )
    train, val = config.train_path, config.val_path
    if config.files:
        train, val = config.files[:1], [*config.files, None][1]
    trained_on = [Path(path) for path, _ in weighted_paths(train)]
    validation = [Path(val)] if val is not None else []
    for path in trained_on:
        for other in validation:
            _refuse_same(path, other)
    return trained_on, validation


def _refuse_same(train: Path, val: Path) -> None:
    if train.is_file() and val.is_file() and hub.file_sha256(train) == hub.file_sha256(val):
        raise DataError(
            f"has the same content as {train}",
            where=val,
            fix="give a validation file of its own, or --val_path none",
        )


def _read(path: Path, config: CheckConfig) -> list[Document]:
    return read_documents(
        path,
        txt_format=config.txt_format,
        text_field=config.text_field,
        group_field=config.group_field,
        domain_field=config.domain_field,
    )


def _tokenizer(base_model: str | None) -> Tokenizer | None:
    if base_model is None:
        return None
    hub.prepare_environment()
    source = hub.find_model(base_model)
    from lorabatch.model.load import load_tokenizer  # and with it torch

    return load_tokenizer(source.path)


def _show(documents: Sequence[Document], tokenizer: Tokenizer | None, config: CheckConfig) -> int:
    if tokenizer is None:
        raise UsageError("needs the model's tokenizer", where="--show", fix="give --base_model too")
    from lorabatch.check import tokens

    for document in documents:
        for text in tokens.shown(document, tokenizer, config.max_len):
            print(text, end="\n\n")
    return 0


def _with_tokens(
    seen: list[Seen], train: Sequence[Document], tokenizer: Tokenizer | None, max_len: int
) -> list[Seen]:
    """With the tokenizer more is seen; of two looks at the same the closer one counts."""
    if tokenizer is None:
        return [*seen, shape.marks(train)]
    from lorabatch.check import tokens

    closer = tokens.seen(train, tokenizer, max_len)
    names = {s.check for s in closer}
    return [*(s for s in seen if s.check not in names), *closer]


def _print(checked: Checked, config: CheckConfig) -> None:
    if config.json:
        print(json.dumps({"findings": [asdict(f) for f in checked.findings]}, indent=2))
        return
    for line in checked.lines():
        print(line)
    print(f"{'':{WIDTH + 6}}  {NAMES} {checked.effort()}")
