"""``lorabatch report``: run folders in, ``RELATORIO.md`` (with ``fig/*.svg``) and ``report.html`` out."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from lorabatch.config import ReportConfig
from lorabatch.records import replacing, writing
from lorabatch.report.blocks import Document
from lorabatch.report.figures import themed
from lorabatch.report.load import load_benches, load_runs
from lorabatch.report.markdown import markdown
from lorabatch.report.sections import document
from lorabatch.report.words import Words


def build_report(paths: Sequence[Path], config: ReportConfig) -> list[Path]:
    """Write both reports and return their paths. RELATORIO.md is Portuguese whatever ``config.language`` says."""
    runs, benches = load_runs([p for p in paths if p.suffix != ".json"]), load_benches([p for p in paths if p.suffix == ".json"])

    def written(language: str) -> Document:
        return document(Words(language), runs, benches, grid_g_per_kwh=config.grid_g_per_kwh)

    portuguese = written("pt")
    page = portuguese if config.language == "pt" else written(config.language)
    folder = Path(config.output_dir)
    with writing(folder, fix="choose another --output_dir"):
        (folder / "fig").mkdir(parents=True, exist_ok=True)
    texts = {folder / "fig" / f"{plot.name}.svg": themed(plot, page=False) for plot in portuguese.plots}
    reports = {folder / "RELATORIO.md": markdown(portuguese), folder / "report.html": html_page(page)}
    for path, text in (texts | reports).items():
        with replacing(path) as file:
            file.write(text.encode(errors="backslashreplace"))  # a folder's name may be no UTF-8
    return list(reports)


def html_page(page: Document) -> str:
    """One self-contained page; the template escapes every text, and only our own drawings pass as markup."""
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
    """Escaped text whose command-line flags are code, which also keeps a line from breaking inside them."""
    return Markup(re.sub(r"--[a-z][\w-]*(=\w+)?", r'<code class="flag">\g<0></code>', str(escape(text))))
