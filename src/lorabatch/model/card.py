"""The model card beside an adapter: ``README.md`` with the metadata that model hubs read, made from
the run's own records.

Training writes it, and an evaluation rewrites its section; what people change elsewhere in it
stays. A README that is not ours is never touched.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from lorabatch.errors import visible
from lorabatch.model.hub import file_sha256
from lorabatch.records import replacing
from lorabatch.runs import CARD, CARD_MARK, is_card
from lorabatch.schema import Fields

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

SECTION = re.compile(r"(<!-- lorabatch: evaluation -->\n).*?(<!-- end -->)", re.DOTALL)
NOT_EVALUATED = "Not evaluated on a file of its own yet: `lorabatch eval`."
# Names under which others find what is packaged here.
PUBLIC_NAMES = {"smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct"}
LIMITS = (
    "Not for medical advice, nor for decisions about people. The figures are those of one seed. "
    "Whether the adapter repeats its training data word for word was not tested."
)


def write_card(folder: Path, record: Fields, figures: Fields) -> None:
    """Of a finished training. record: run.json; figures: metrics.json."""
    path = folder / CARD
    if path.exists() and not is_card(path):
        return
    from huggingface_hub import ModelCardData

    base = str(record["model"]["name"])
    public = PUBLIC_NAMES.get(base, base)
    data = ModelCardData(
        base_model=public if re.fullmatch(r"[\w.-]+/[\w.-]+", public) else None,
        library_name="peft",
        pipeline_tag="text-generation",
        tags=["lora", "lorabatch"],
        model_name=folder.resolve().name,
    )
    rows = "\n".join(f"| {name} | {value} |" for name, value in _facts(record, figures))
    text = f"""---
{data.to_yaml()}
---
{CARD_MARK}

# {_plain(folder.resolve().name)}

A LoRA adapter in PEFT's format.

|  |  |
| --- | --- |
{rows}

Made by:

```
{visible(shlex.join(map(str, record["command"])))}
```

## Evaluation

<!-- lorabatch: evaluation -->
{NOT_EVALUATED}
<!-- end -->

## Limits

{LIMITS}
"""
    _replace(path, text)


def write_evaluation(folder: Path, name: str, lines: Sequence[str], results: Fields) -> None:
    """Rewrite the section of our card in an adapter's folder, if there is one. lines: the verdicts
    in words; results: eval.json, where the adapter is called ``name``."""
    path = folder / CARD
    if not path.exists() or not is_card(path):
        return
    from huggingface_hub import ModelCard

    card = ModelCard(path.read_text(encoding="utf-8"))
    card.data.model_name = card.data.model_name or folder.resolve().name
    card.data.eval_results = list(_results(name, results))
    found = "\n".join(f"- {_plain(line)}" for line in lines)
    _replace(path, SECTION.sub(lambda m: f"{m[1]}{found}\n{m[2]}", str(card)))


def _results(name: str, results: Fields) -> Iterator[EvalResult]:
    """The adapter's own figures, as hubs read them."""
    from huggingface_hub import EvalResult

    for task in results["tasks"]:
        if name in task["models"]:
            yield EvalResult(
                task_type="text-generation",
                dataset_type="text",
                dataset_name=task["task"],
                dataset_config=task["task"],  # results of one are shown as one data set's
                metric_type=task["measure"].replace(" ", "_"),
                metric_value=round(task["models"][name]["value"], 6),
            )


def _facts(record: Fields, figures: Fields) -> Iterator[tuple[str, str]]:
    config, model, environment = record["config"], record["model"], record["environment"]
    source = f", from {model['converted_from']}" if model.get("converted_from") else ""
    yield "base", f"{_plain(model['name'])}{_plain(source)}, weights `{model.get('fingerprint')}`"
    targets = " ".join(map(str, config["target_modules"]))
    yield "adapter", f"rank {config['lora_r']}, alpha {config['lora_alpha']:g}, {_plain(targets)}"
    for part, flag in (("train", "train_path"), ("val", "val_path")):
        if counts := record["data"].get(part):
            yield f"{part} data", _data(config[flag], counts)
    yield (
        "steps",
        f"{figures.get('steps')} of {config['batch_size']} documents, seed {config['seed']}",
    )
    before, after = figures.get("bits_per_byte_before"), figures.get("bits_per_byte")
    if before is not None and after is not None:
        yield (
            "bits per byte",
            f"{before:.4f} before, {after:.4f} after, on the val data, which chose it",
        )
    yield "machine", f"{_plain(environment.get('cpu'))}, {record['device']}, {record['dtype']}"
    joules = figures.get("energy_j") or figures.get("cpu_energy_j")
    yield "energy", "not measured" if joules is None else f"{joules:,.0f} J"


def _data(path: object, counts: Fields) -> str:
    """Name, size and SHA-256 of a file; without the last if it is gone."""
    file, digest = Path(str(path)), ""
    with suppress(OSError):
        digest = f", SHA-256 `{file_sha256(file)}`"
    return f"{_plain(file.name)}, {counts.get('documents')} documents{digest}"


def _plain(text: object) -> str:
    """In one line, and nothing in it is Markdown's or HTML's."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", " ".join(visible(str(text)).split()))


def _replace(path: Path, text: str) -> None:
    with replacing(path) as file:
        file.write(text.encode(errors="backslashreplace"))
