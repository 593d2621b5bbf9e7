"""README and guides: their commands run, their links lead somewhere, their tables are made from the
settings and the results.

Every ```bash and ```python block of a page runs as it stands, in order, in a copy of the project
with a tiny base model. Only variables and short sample files make it shorter. A block that cannot run here says why
in its info string (```bash no-run-here: REASON) and is counted below.
"""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from support.models import tiny_gguf, tiny_model

from lorabatch.cli import COMMANDS

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
README, TWIN = ROOT / "README.md", ROOT / "README.pt-BR.md"
GUIDES = [DOCS / f"{name}.md" for name in (
    "train", "check", "evaluate", "infer", "python", "adapters", "cluster", "offline", "measure",
    "troubleshooting",
)]  # fmt: skip
PAGES = [README, *GUIDES]
# Everything that readers see, but for the log, whose entries speak of the tree of their day.
ALL_PAGES = [
    *sorted(ROOT.glob("*.md")),
    *sorted(DOCS.glob("*.md")),
    *sorted((DOCS / "decisions").glob("*.md")),
    ROOT / "benchmarks" / "peers" / "README.md",
    ROOT / "data_sample" / "README.md",
    ROOT / "results" / "README.md",
    ROOT / "report" / "README.md",
]
LOG = sorted((DOCS / "log").glob("*.md"))

# How many blocks of each page do not run here. To add one, find out first why it cannot be run.
NOT_RUN = {
    "README.md": 1,
    "train.md": 1,
    "adapters.md": 1,
    "infer.md": 1,
    "cluster.md": 2,
    "offline.md": 1,
    "measure.md": 1,
}
# The variables of the examples, small. BASE_MODEL and MODEL: a tiny Llama, as a folder and as GGUF.
SHORT = {
    "MAX_STEPS": "2", "MAX_NEW_TOKENS": "4", "MAX_VAL_DOCUMENTS": "4", "ITERS": "1", "RANKS": "2",
    "SHARDS": "2", "REPEATS": "1",
}  # fmt: skip
FOLDERS = ("SCRATCH", "SLURM_TMPDIR")
# The beginnings of the sample files: file, what separates its parts, how many of them.
SAMPLES = [
    ("data_sample/train.txt", "\n\n", 16),
    ("data_sample/val.txt", "\n\n", 4),
    ("data_sample/prompts.txt", "\n", 4),
    ("data_sample/chat.jsonl", "\n", 2),
]
TIMEOUT_S = 600  # of a block; the machine may be busy with other things

FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
GENERATED = re.compile(r"<!-- (bench|flags):.*?<!-- (/bench:[a-z-]+|end) -->", re.DOTALL)


def text(page):
    return page.read_text(encoding="utf-8")


def name(page):
    return str(page.relative_to(ROOT))


def blocks(page):
    """[(info string, commands)] of the page's fenced blocks."""
    return FENCE.findall(text(page))


def prose(page):
    """The page without fenced blocks, generated tables and rows of tables."""
    left = FENCE.sub("", GENERATED.sub("", text(page)))
    return "\n".join(line for line in left.split("\n") if not line.startswith("|"))


def script(folder, file, body):
    path = folder / file
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


@pytest.fixture
def project(tmp_path):
    """What a clone holds, with an environment whose programs are those that run this test."""
    root = tmp_path / "project"
    for folder in ("scripts", "configs", "env", "src"):
        shutil.copytree(ROOT / folder, root / folder)
    for file, separator, count in SAMPLES:
        (root / file).parent.mkdir(exist_ok=True)
        parts = text(ROOT / file).split(separator)[:count]
        (root / file).write_text(separator.join(parts) + "\n", encoding="utf-8")
    for folder in ("results", "report"):
        (root / folder).mkdir()
    shutil.copy(ROOT / "pyproject.toml", root)
    programs = root / ".venv" / "bin"
    programs.mkdir(parents=True)
    (root / ".venv" / "pyvenv.cfg").touch()
    script(programs, "python", f'PYTHONPATH={root}/src exec {sys.executable} "$@"')
    script(programs, "lorabatch", f'exec {programs}/python -m lorabatch "$@"')
    script(programs, "torchrun", f'exec {programs}/python -m torch.distributed.run "$@"')
    (programs / "activate").write_text(f'PATH="{programs}:$PATH"\n')
    stamp = f"source '{root}/scripts/lib.sh'; BUILD_FOR=cpu write_stamp"
    subprocess.run(["bash", "-c", stamp], cwd=root, check=True)
    return root


@pytest.fixture
def environment(project, tmp_path, tiny_llama_dir):
    tiny_gguf(tiny_model("llama"), tmp_path / "tiny.gguf")
    kept = {
        k: os.environ[k] for k in ("PATH", "HOME", "LANG", "LORABATCH_CEILINGS") if k in os.environ
    }
    kept["PATH"] = f"{project}/.venv/bin:{kept['PATH']}"
    # Kernels off: so that nothing is compiled into the cache of this one test.
    offline = {"HF_HUB_OFFLINE": "1", "PIP_NO_INDEX": "1", "LORABATCH_KERNELS": "off"}
    folders = {key: str(tmp_path / key.lower()) for key in (*FOLDERS, "XDG_CACHE_HOME")}
    for folder in folders.values():
        Path(folder).mkdir()
    models = {"BASE_MODEL": str(tiny_llama_dir), "MODEL": str(tmp_path / "tiny.gguf")}
    return kept | offline | folders | models | SHORT | {"OMP_NUM_THREADS": "1"}


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=name)
def test_the_commands_of_a_page_run_as_they_stand(page, project, environment):
    for info, commands in blocks(page):
        if info in ("bash", "python"):
            program = ["bash", "-euo", "pipefail"] if info == "bash" else ["python"]
            done = subprocess.run(
                [*program, "-c", commands],
                cwd=project,
                env=environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=TIMEOUT_S,
            )
            assert done.returncode == 0, f"{commands}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"


def test_blocks_that_do_not_run_say_why_and_are_counted():
    found = Counter()
    for page in PAGES:
        for info, commands in blocks(page):
            if info not in ("", "bash", "python"):
                assert re.fullmatch(r"bash no-run-here: \w.{9,}", info), f"{name(page)}: {info}"
                found[page.name] += 1
            if info == "":  # output, never a command
                assert not re.search(r"^(lorabatch|bash|sbatch|python) ", commands, re.MULTILINE)
    assert found == NOT_RUN


def test_only_known_variables_shorten_an_example():
    known = {*SHORT, *FOLDERS, "BASE_MODEL", "MODEL", "HOME"}
    used = set()
    for page in PAGES:
        for info, commands in blocks(page):
            if info == "bash":
                used |= set(re.findall(r"\$\{(\w+):-", commands))
    assert {"BASE_MODEL", "MAX_STEPS"} <= used <= known


# --- shape ---


@pytest.mark.parametrize(
    ("page", "limit"), [(README, 130), (TWIN, 130), (DOCS / "ARCHITECTURE.md", 90)]
)
def test_a_page_that_everybody_reads_stays_short(page, limit):
    assert len(text(page).splitlines()) <= limit


@pytest.mark.parametrize(
    "page", [*PAGES, TWIN, DOCS / "ARCHITECTURE.md", DOCS / "LOG.md", *LOG], ids=name
)
def test_prose_is_wrapped_at_100_columns(page):
    long = [
        line for line in prose(page).split("\n") if len(line) > 100 and not line.startswith("#")
    ]
    assert not long


def shape(page):
    """What the two READMEs have in common: levels of headings, tables, lists of links, blocks."""
    lines = FENCE.sub("", text(page)).split("\n")
    headings = [len(line) - len(line.lstrip("#")) for line in lines if line.startswith("#")]
    rows = [line.count("|") if line.startswith("|") else 0 for line in lines]
    marks = re.findall(r"<!-- .*? -->", text(page))
    links = re.findall(r"\]\(([^)]+)\)", text(page).replace("README.pt-BR.md", "README.md"))
    return headings, [n for n in rows if n], marks, links


def commands_of(page):
    """The page's blocks without comments and reasons; the Portuguese samples stand for the English."""
    return [
        (info.split(":")[0], re.sub(r" *#.*", "", body.replace("data_sample/pt/", "data_sample/")))
        for info, body in blocks(page)
    ]


def test_the_portuguese_readme_is_the_twin_of_the_english_one():
    assert shape(TWIN) == shape(README)
    ours, theirs = commands_of(README), commands_of(TWIN)
    assert [info for info, _ in theirs] == [info for info, _ in ours]
    for (info, body), (_, twin) in zip(ours, theirs, strict=True):
        if info.startswith("bash"):
            # a prompt and its translation
            assert [line for line in twin.split("\n") if 'prompt":' not in line] == [
                line for line in body.split("\n") if 'prompt":' not in line
            ]
        else:
            assert twin == body


def cells(row):
    return [cell.strip() for cell in row.strip("|").split("|")]


def tables(page):
    """[(header, rows)] of the page's tables, each line as its cells."""
    lines = [cells(line) if line.startswith("|") else None for line in text(page).split("\n")]
    starts = [i for i, line in enumerate(lines) if line and lines[i - 1] is None]
    ends = [next(j for j in range(i, len(lines)) if lines[j] is None) for i in starts]
    return [(lines[i], lines[i + 2 : j]) for i, j in zip(starts, ends, strict=True)]


def with_the_other_comma(cell):
    swap = str.maketrans(",.", ".,")
    return re.sub(r"(?<=\d)[,.](?=\d)", lambda found: found[0].translate(swap), cell)


def test_the_portuguese_tables_have_portuguese_numbers_and_headers():
    ours, theirs = tables(README), tables(TWIN)
    assert len(ours) == len(theirs) == 4
    for (head, rows), (their_head, their_rows) in zip(ours[:3], theirs[:3], strict=True):
        assert [list(map(with_the_other_comma, row)) for row in rows] == their_rows
        same = {cell for cell in {*head} & {*their_head} if re.search(r"[a-z]{3}", cell)}
        assert same <= {"peft `adapter_names`: tokens/s"}, "the others are words"
        assert not any(re.search(r"\d, ", cell) for row in rows for cell in row), "one value a cell"
    versions = {"3.10", "3.12", "2.0"}  # of Python, of the licence
    assert set(re.findall(r"(?<![\w.])\d+\.\d+(?![\w.])", prose(TWIN))) <= versions


CLAIM = re.compile(r"\d tokens/s|[\d)] times (as fast|OpenVINO|peft)|\d min\b|\bms became\b")


@pytest.mark.parametrize("page", [*PAGES, TWIN], ids=name)
def test_a_claim_about_speed_names_its_machine(page):
    for sentence in re.split(r"\n\n|\n(?=- )|(?<=[.!?])\s+(?=[A-Z`*])", prose(page)):
        if CLAIM.search(sentence):
            assert re.search(r"AMD EPYC|Intel", sentence), sentence


def test_the_readme_says_near_its_top_what_has_never_run():
    for page, words in ((README, "ever run on a GPU"), (TWIN, "rodou em uma GPU")):
        assert words in "\n".join(text(page).split("\n")[:8])


# --- links and names ---


def anchors(page):
    """The names that GitHub gives to the headings of a page."""
    titles = re.findall(r"^#+ (.*)$", FENCE.sub("", text(page)), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", [*ALL_PAGES, *LOG], ids=name)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", text(page))):
        if re.match(r"https?:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{name(page)}: {link}"
        assert not anchor or anchor in anchors(target), f"{name(page)}: {link}"


@pytest.mark.parametrize("page", [*PAGES, TWIN, DOCS / "ARCHITECTURE.md"], ids=name)
def test_files_that_are_named_exist(page):
    places = r"`((?:src|scripts|docs|configs|benchmarks|data_sample)/[\w./-]+)`"
    for path in re.findall(places, text(page)):
        assert (ROOT / path).exists(), path


def test_the_tree_of_the_architecture_is_the_source():
    tree = next(body for _, body in blocks(DOCS / "ARCHITECTURE.md") if "cli.py" in body)
    source = ROOT / "src" / "lorabatch"
    folders = {p.name for p in source.iterdir() if p.is_dir() and p.name != "__pycache__"}
    assert set(re.findall(r"^  (\w+)/", tree, re.MULTILINE)) == folders
    for file in re.findall(r"[\w]+\.(?:py|cpp)\b", tree):
        assert [*(ROOT / "src").rglob(file)], file


def test_the_log_lists_its_days_and_the_source_refers_to_them():
    listed = re.findall(r"\(log/(.*?)\.md\)", text(DOCS / "LOG.md"))
    assert listed == [page.stem for page in LOG]
    for page in LOG:
        days = re.findall(r"^## (\d{4}-\d\d-\d\d)", text(page), re.MULTILINE)
        assert days and set(days) == {page.stem}
    referred = set()
    for path in (ROOT / "src").rglob("*.*"):
        if path.suffix in (".py", ".cpp", ".h"):
            referred |= set(re.findall(r"docs/LOG\.md,\W+(\d{4}-\d\d-\d\d)", text(path)))
    assert referred and referred <= {page.stem for page in LOG}


# --- generated tables ---


def flag_tables(*words):
    program = [sys.executable, str(ROOT / "scripts" / "flag_tables.py"), *words]
    return subprocess.run(program, capture_output=True, text=True)


def test_the_flag_tables_are_those_of_the_settings(tmp_path):
    assert flag_tables("--check").returncode == 0
    copy = tmp_path / "docs"
    copy.mkdir()
    for guide in GUIDES:
        shutil.copy(guide, copy)
    stale = text(copy / "train.md").replace("| `--lora_r` | `16` |", "| `--lora_r` | `8` |")
    assert stale != text(copy / "train.md")
    (copy / "train.md").write_text(stale, encoding="utf-8")
    found = flag_tables("--check", "--docs", str(copy))
    assert found.returncode == 1 and "train.md" in found.stderr
    assert flag_tables("--docs", str(copy)).returncode == 0
    assert text(copy / "train.md") == text(DOCS / "train.md")


def test_the_flags_of_every_command_stand_in_exactly_one_guide():
    marked = [c for g in GUIDES for c in re.findall(r"<!-- flags: ([a-z ]+) -->", text(g))]
    assert sorted(marked) == sorted(COMMANDS)


def test_the_tables_of_results_are_those_of_the_results():
    tables = runpy.run_path(str(ROOT / "benchmarks" / "tables.py"))
    for page in tables["PAGES"]:
        before = text(ROOT / page)
        language = "pt" if "pt-BR" in page else "en"
        assert "<!-- bench:" in before
        assert tables["with_tables"](before, language) == before, page
