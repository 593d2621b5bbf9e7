"""``lorabatch report``: run folders in, ``RELATORIO.md`` (with ``fig/*.svg``) and ``report.html``
out."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from lorabatch.config import ReportConfig
from lorabatch.records import replacing, writing
from lorabatch.report.blocks import Document
from lorabatch.report.boards import load_boards
from lorabatch.report.figures import themed
from lorabatch.report.load import is_evaluation, load_benches, load_evaluations, load_runs
from lorabatch.report.markdown import markdown
from lorabatch.report.sections import document
from lorabatch.report.words import Words


def run_report(config: ReportConfig, command: list[str]) -> int:
    for path in build_report([Path(p) for p in config.runs], config):
        print(path)
    return 0


def build_report(paths: Sequence[Path], config: ReportConfig) -> list[Path]:
    """Write both reports and return their paths. RELATORIO.md is Portuguese whatever
    ``config.language`` says."""
    boards, others = load_boards(paths)
    folders = [p for p in others if p.suffix != ".json"]
    evaluated = [p for p in folders if is_evaluation(p)]
    runs = load_runs([p for p in folders if p not in evaluated])
    benches = load_benches([p for p in others if p.suffix == ".json"])
    evaluations = load_evaluations(evaluated)

    def written(language: str) -> Document:
        words, factor = Words(language), config.grid_g_per_kwh
        return document(words, runs, benches, boards, evaluations, grid_g_per_kwh=factor)

    portuguese = written("pt")
    page = portuguese if config.language == "pt" else written(config.language)
    folder = Path(config.output_dir)
    with writing(folder, fix="choose another --output_dir"):
        (folder / "fig").mkdir(parents=True, exist_ok=True)
    texts = {
        folder / "fig" / f"{plot.name}.svg": themed(plot, page=False) for plot in portuguese.plots
    }
    reports = {
        folder / "RELATORIO.md": markdown(portuguese),
        folder / "report.html": html_page(page),
    }
    for path, text in (texts | reports).items():
        with replacing(path) as file:
            file.write(text.encode(errors="backslashreplace"))  # a folder's name may be no UTF-8
    return list(reports)


def html_page(page: Document) -> str:
    """One self-contained page; the template escapes every text, and only our own drawings pass as
    markup."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["flags"] = with_flags
    environment.filters["kind"] = lambda block: type(block).__name__
    environment.filters["drawing"] = lambda plot: Markup(themed(plot, page=True))
    return environment.get_template("report.html.j2").render(page=page) + "\n"


def with_flags(text: str) -> Markup:
    """Escaped text whose command-line flags are code, which also keeps a line from breaking inside
    them."""
    return Markup(
        re.sub(r"--[a-z][\w-]*(=\w+)?", r'<code class="flag">\g<0></code>', str(escape(text)))
    )
