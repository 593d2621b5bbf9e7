"""Writes the tables of benchmarks/results/*.json into the pages: ``python benchmarks/tables.py``.

A page says where a table goes: between ``<!-- bench:NAME -->`` and ``<!-- /bench:NAME -->``.
Nothing else on it changes.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PAGES = ("README.md", "README.pt-BR.md", "docs/measure.md", "benchmarks/peers/README.md")
NAMES = {
    "lorabatch": "**lorabatch**",
    "openvino": "OpenVINO GenAI",
    "transformers": "transformers `generate`",
    "vllm": "vLLM (CPU)",
    "ctranslate2": "CTranslate2",
    "llamacpp": "llama.cpp",
}
WORDS = {
    "en": {
        "repeated": "4 short prompts, repeated",
        "distinct": "distinct prompts",
        "note": "{cpu}, {threads} threads, commit {commit}, {date}; median of {rounds} rounds or "
        "more. "
        "In brackets: how many times as fast lorabatch was in the same sitting. –: not measured.",
        "train_note": (
            "{cpu}, {threads} threads, commit {commit}: {base_model}, {batch_size} documents a "
            "step, at most {max_len} tokens each; medians of rounds."
        ),
        "adapters_note": (
            "{cpu}, {threads} threads, commit {commit}, {date}: {base_model}, rank {rank} on all "
            "linear layers; medians of rounds. In brackets: how many times as fast lorabatch was."
        ),
        "train_header": (
            "trainer, type, real tokens/s, padded tokens/s, share of the GEMM roofline, peak "
            "memory, rounds"
        ),
        "adapters_header": (
            "adapters, requests, tokens each, **lorabatch** mixed: tokens/s, "
            "peft `adapter_names`: tokens/s, rounds"
        ),
    },
    "pt": {
        "repeated": "4 prompts curtos, repetidos",
        "distinct": "prompts distintos",
        "note": "{cpu}, {threads} threads, commit {commit}, {date}; mediana de {rounds} rodadas ou "
        "mais. "
        "Entre parênteses: quantas vezes o lorabatch foi mais rápido na mesma sessão. –: não "
        "medido.",
        "train_note": (
            "{cpu}, {threads} threads, commit {commit}: {base_model}, {batch_size} documentos por "
            "passo, até {max_len} tokens cada; medianas das rodadas."
        ),
        "adapters_note": (
            "{cpu}, {threads} threads, commit {commit}, {date}: {base_model}, posto {rank} em "
            "todas as camadas lineares; medianas das rodadas. Entre parênteses: quantas vezes o "
            "lorabatch foi mais rápido."
        ),
        "train_header": (
            "treinador, tipo, tokens reais/s, tokens com padding/s, fração do teto de GEMM, pico "
            "de memória, rodadas"
        ),
        "adapters_header": (
            "adaptadores, pedidos, tokens cada, **lorabatch** misto: tokens/s, "
            "peft `adapter_names`: tokens/s, rodadas"
        ),
    },
}
WAYS = ("mixed", "peft")
Sitting = dict[str, Any]


def number(value: float, language: str, digits: int = 0) -> str:
    """1,865.25 in English, 1.865,25 in Portuguese."""
    text = f"{value:,.{digits}f}"
    return text.translate(str.maketrans(",.", ".,")) if language == "pt" else text


def times(ratio: float | None, language: str) -> str:
    """How many times as fast lorabatch was, behind a rate."""
    return f" ({number(ratio, language, 2)}x)" if ratio else ""


def processor(environment: dict[str, Any], language: str) -> str:
    name = str(environment["cpu"])
    return (
        name.replace("family", "família").replace("model", "modelo") if language == "pt" else name
    )


def results_name(kind: str, host: str) -> str:
    """KIND-HOST-DATE.json: where a benchmark of today keeps what it found on this machine."""
    machine = re.sub(r"[^a-z0-9]+", "-", host.lower()).strip("-")
    return f"{kind}-{machine}-{datetime.now(timezone.utc):%Y-%m-%d}.json"


def of_each_machine(kind: str, folder: Path = HERE / "results") -> list[dict[str, Any]]:
    """The newest results of that kind of every machine, the newest first; sys.exit if there are
    none."""
    files = sorted(folder.glob(f"{kind}-*.json"), key=lambda path: path.stem[-10:])
    if not files:
        sys.exit(f"no {kind} results in {folder}; run: python benchmarks/{kind}.py")
    last = {path.stem[:-11]: path for path in files}  # names end in the date
    return [
        json.loads(path.read_text(encoding="utf-8"))
        for path in sorted(last.values(), key=lambda path: path.stem[-10:], reverse=True)
    ]


def agreement(a: list[str], b: list[str]) -> float:
    """Share of the compared tokens before the first difference of each request: 1 is the same
    text."""
    same = total = 0
    for x, y in zip(map(str.split, a), map(str.split, b), strict=False):
        total += len(x)
        same += next((i for i, (p, q) in enumerate(zip(x, y, strict=True)) if p != q), len(x))
    return same / total


def cells(sittings: list[Sitting], engine: str) -> list[Sitting]:
    """The measured results of one engine, each with its sitting's ``ours``: how many times as fast
    lorabatch was there."""
    found = []
    for s in sittings:
        result, ours = s["engines"].get(engine, {}), s["engines"].get("lorabatch", {})
        if "seconds" in result:
            ratio = (
                statistics.median(result["seconds"]) / statistics.median(ours["seconds"])
                if "seconds" in ours
                else None
            )
            found.append(result | {"ours": ratio, "batch_size": s["batch_size"]})
    return found


def rows(sittings: list[Sitting]) -> Iterator[tuple[str, str, list[Sitting]]]:
    """(mode, engine, its results) in the order of the table."""
    for mode in ("exact", "int8"):
        for engine in NAMES:
            found = cells([s for s in sittings if s["mode"] == mode], engine)
            if found:
                yield mode, engine, found


def middle(results: list[Sitting]) -> tuple[float, float | None]:
    """Median tokens/s over all rounds, median over sittings of how many times as fast lorabatch
    was."""
    ratios = [r["ours"] for r in results if r["ours"]]
    return statistics.median(v for r in results for v in r["tokens_per_s"]), statistics.median(
        ratios
    ) if ratios else None


def markdown(header: list[str], body: list[list[str]], align: str) -> str:
    marks = {"l": "---", "r": "--:"}
    return "\n".join(
        "| " + " | ".join(line) + " |" for line in [header, [marks[a] for a in align], *body]
    )


def infer_summary(
    results: dict[str, Any], language: str, workloads: tuple[str, ...] = ("repeated", "distinct")
) -> str:
    """Tokens/s per engine and batch size, and behind it how many times as fast lorabatch was in the
    same sitting."""
    words, all_sittings = WORDS[language], results["sittings"]
    last = all_sittings[-1]
    commits = ", ".join(dict.fromkeys(s["environment"]["git"]["commit"][:7] for s in all_sittings))
    rounds = min(
        len(e["seconds"]) for s in all_sittings for e in s["engines"].values() if "seconds" in e
    )
    cpu, date = processor(last["environment"], language), last["at"][:10]
    about = {"cpu": cpu, "threads": last["threads"], "commit": commits, "date": date}
    parts = [words["note"].format(rounds=rounds, **about)]
    for workload in workloads:
        sittings = [s for s in results["sittings"] if s["workload"] == workload]
        sizes = sorted({s["batch_size"] for s in sittings})
        body = []
        for _, engine, found in rows(sittings):
            line = [NAMES[engine], found[0]["dtype"]]
            for size in sizes:
                at_size = [r for r in found if r["batch_size"] == size]
                rate, ratio = middle(at_size) if at_size else (None, None)
                shown = number(rate, language) if rate else "–"
                line.append(
                    f"**{shown}**"
                    if engine == "lorabatch" and rate
                    else shown + times(ratio, language)
                )
            body.append(line)
        if body:
            parts.append(
                markdown([words[workload], "", *map(str, sizes)], body, "ll" + "r" * len(sizes))
            )
    return "\n\n".join(parts)


def infer_full(results: dict[str, Any], language: str) -> str:
    """One line per engine, mode, workload and batch size, with everything that was measured."""
    body = []
    for workload in ("repeated", "distinct"):
        sittings = [s for s in results["sittings"] if s["workload"] == workload]
        exact = {
            s["batch_size"]: s["engines"]["lorabatch"]
            for s in sittings
            if s["mode"] == "exact" and "seconds" in s["engines"].get("lorabatch", {})
        }
        for mode, engine, found in rows(sittings):
            for size in sorted({r["batch_size"] for r in found}):
                at_size = [r for r in found if r["batch_size"] == size]
                rates = [v for r in at_size for v in r["tokens_per_s"]]
                rate, ratio = middle(at_size)
                same = (
                    agreement(exact[size]["first_tokens"], at_size[-1]["first_tokens"])
                    if size in exact
                    else None
                )
                body.append(
                    [
                        f"{workload} {size}",
                        f"{NAMES[engine]} {mode} ({at_size[-1]['dtype']})",
                        f"{rate:,.0f} ({min(rates):,.0f}..{max(rates):,.0f})",
                        f"{len(rates)}",
                        "–" if ratio is None else f"{ratio:.2f}",
                        f"{max(r['peak_rss_bytes'] for r in at_size) / 2**30:.1f}",
                        f"{statistics.median(r['startup_s'] for r in at_size):.1f}",
                        "–" if same is None else f"{same:.0%}",
                    ]
                )
    header = [
        "batch",
        "engine",
        "tokens/s (min..max)",
        "rounds",
        "lorabatch / it",
        "peak GiB",
        "start-up s",
        "same beginning",
    ]
    return markdown(header, body, "llrrrrrr")


def train_summary(results: dict[str, Any], language: str) -> str:
    """One line per trainer and type: medians over the rounds (benchmarks/train.py)."""
    words, where, settings = WORDS[language], results["environment"], results["settings"]
    body = []
    for name, t in results["summary"]["trainers"].items():
        trainer = name.split(":")[0]
        run = next(r for r in results["runs"] if r["trainer"] == name)
        rates = [
            number(t["tokens_per_s"], language),
            number(t["padded_tokens_per_s"], language),
            f"{t['roofline_share']:.0%}",
        ]
        body.append(
            [
                "**lorabatch**" if trainer == "lorabatch" else "transformers + peft",
                run["dtype"],
                *rates,
                f"{number(t['peak_memory_bytes'] / 1e9, language, 2)} GB",
                f"{t['rounds']}",
            ]
        )
    note = words["train_note"].format(
        cpu=processor(where, language),
        threads=results["runs"][-1]["threads"],
        commit=where["git"]["commit"][:7],
        **settings,
    )
    return f"{note}\n\n{markdown(words['train_header'].split(', '), body, 'llrrrrr')}"


def adapters_summary(results: dict[str, Any], language: str) -> str:
    """One line per cell, medians of its rounds (benchmarks/adapters.py); in brackets how many times
    as fast mixed batches were."""
    cells: dict[tuple[int, ...], dict[str, Any]] = {}
    for row in results["summary"]:
        cell = tuple(row[n] for n in ("adapters", "requests", "max_new_tokens"))
        cells.setdefault(cell, {})[row["way"]] = row

    def shown(row: dict[str, Any] | None) -> str:
        if row is None:
            return "–"
        ratio = None if row["way"] == "mixed" else row["mixed_ratio"]
        return number(row["tokens_per_s"], language) + times(ratio, language)

    body = []
    for cell, found in cells.items():
        rows = [found.get(way) for way in WAYS]
        rounds = dict.fromkeys(str(row["rounds"]) for row in rows if row)
        if rounds:
            body.append([*map(str, cell), *map(shown, rows), " / ".join(rounds)])
    return markdown(WORDS[language]["adapters_header"].split(", "), body, "rrrrrr")


def infer_distinct(results: dict[str, Any], language: str) -> str:
    """The half of ``infer_summary`` in which no two prompts share a beginning."""
    return infer_summary(results, language, ("distinct",))


def adapters_table(results: dict[str, Any], language: str) -> str:
    """``adapters_summary`` under a line that names the machine."""
    runs = results["runs"]
    commits = ", ".join(dict.fromkeys(run["environment"]["git"]["commit"][:7] for run in runs))
    where, last = runs[-1]["environment"], runs[-1]
    note = WORDS[language]["adapters_note"].format(
        cpu=processor(where, language), commit=commits, date=last["at"][:10], **last
    )
    return f"{note}\n\n{adapters_summary(results, language)}"


Render = Callable[[dict[str, Any], str], str]
# Name: kind of results, how one machine's are shown, and of how many machines (None: of all).
TABLES: dict[str, tuple[str, Render, int | None]] = {
    "train": ("train", train_summary, None),
    "train-newest": ("train", train_summary, 1),
    "infer": ("infer", infer_summary, None),
    "infer-newest": ("infer", infer_distinct, 1),
    "infer-full": ("infer", infer_full, None),
    "adapters": ("adapters", adapters_table, None),
}


def insert(page: str, name: str, table: str) -> str:
    """``page`` with ``table`` between the marks of that name; the page as it is where it has
    none."""
    marks = rf"(<!-- bench:{name} -->\n).*?(<!-- /bench:{name} -->)"
    return re.sub(marks, lambda m: f"{m[1]}\n{table}\n\n{m[2]}", page, flags=re.DOTALL)


def with_tables(page: str, language: str) -> str:
    """The page with every marked table as the results are now."""
    for name, (kind, render, machines) in TABLES.items():
        if f"<!-- bench:{name} -->" in page:
            found = of_each_machine(kind)[:machines]
            page = insert(page, name, "\n\n".join(render(results, language) for results in found))
    return page


def main() -> None:
    for path in (HERE.parent / name for name in PAGES):
        language = "pt" if path.stem.endswith("pt-BR") else "en"
        text = path.read_text(encoding="utf-8")
        path.write_text(with_tables(text, language), encoding="utf-8")


if __name__ == "__main__":
    main()
