"""The import order and the size budget of docs/ARCHITECTURE.md, read from the source."""

import ast
import re
import runpy
import subprocess
import sys
from types import SimpleNamespace

import pytest
from support.paths import SRC, TESTS
from support.processes import ENVIRONMENT

PACKAGE = SRC / "lorabatch"
STRUCTURE = SimpleNamespace(**runpy.run_path(str(TESTS / "structure.py")))
# Bottom to top. A module imports from its own place and from further down, also inside functions;
# places of one line never import each other.
ORDER = [
    ("errors",),
    ("rules",),
    ("schema",),
    ("settings",),
    ("command_line",),
    ("config",),
    ("config_trust",),
    ("config_measure",),
    ("config_chat",),
    ("spans",),
    ("findings",),
    ("processor",),
    ("slurm",),
    ("records",),
    ("runs",),
    ("progress",),
    ("signals",),
    ("starter",),
    ("metrics",),
    ("corpus",),
    ("kernels",),
    ("machine",),
    ("model",),
    ("check",),
    ("train", "infer"),
    ("evaluate",),
    ("api",),
    ("__init__",),
    ("bench",),
    ("profile",),
    ("report",),
    ("cluster",),
    ("cli",),
    ("editors",),
    ("__main__",),
]
HEIGHT = {place: height for height, places in enumerate(ORDER) for place in places}
# Places that answer on a login node, in a moment: torch takes seconds to import.
WITHOUT_TORCH = [place for place in HEIGHT if HEIGHT[place] < HEIGHT["kernels"]]
WITHOUT_TORCH += ["check", "report", "cluster", "cli", "__init__", "api"]
# Modules that are started as processes of their own, and by whom: ``python -m NAME``.
PROCESSES = {
    "lorabatch.cluster.leash": "cluster.child",
    "lorabatch.infer.ranges": "cluster.child",
    "lorabatch.machine.probe": "cluster.doctor",
}


def modules():
    """{name without "lorabatch.": source}"""
    return {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): (
            path.read_text(encoding="utf-8")
        )
        for path in sorted(PACKAGE.rglob("*.py"))
    }


MODULES = modules()


def place(module):
    return module.split(".")[0]


def imports(name, source):
    """The modules of ours that a module imports, anywhere in it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name}: an import relative to the folder"
            found = [f"{node.module}.{alias.name}" for alias in node.names]
            found = [f if f.removeprefix("lorabatch.") in MODULES else node.module for f in found]
        else:
            continue
        yield from (f.removeprefix("lorabatch.") for f in found if f.startswith("lorabatch."))


def test_every_module_has_its_place():
    assert {place(name) for name in MODULES} == set(HEIGHT)


def test_imports_only_go_down():
    seen = set()
    for name, source in MODULES.items():
        for target in imports(name, source):
            own, other = place(name), place(target)
            seen.add((own, other))
            assert own == other or HEIGHT[other] < HEIGHT[own], f"{name} imports {target}"
    assert {("train", "model"), ("infer", "model"), ("profile", "train")} <= seen, (
        "the test looks at the real imports, also inside functions"
    )


def test_nothing_is_imported_by_a_string():
    """Except from the command line's table of commands; and some modules are started as processes
    of their own."""
    for name, source in MODULES.items():
        tree = ast.parse(source)
        words = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        words |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        words |= {a.name for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) for a in n.names}
        if name == "cli":
            continue
        assert words.isdisjoint({"import_module", "__import__", "resolve_name"}), name
        assert ("run_module" in words) == (name == "cluster.leash"), name
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                target = re.split("[: ]", node.value)[0]
                if target.removeprefix("lorabatch.") in MODULES and "." in target:
                    assert PROCESSES.get(target) == name, f"{name} names {target} in a string"
    for target, name in PROCESSES.items():
        assert f'"{target}"' in MODULES[name]
        assert HEIGHT[place(target.removeprefix("lorabatch."))] <= HEIGHT[place(name)]


@pytest.mark.parametrize("folder", ["report", "cluster", "corpus", "metrics", "check"])
def test_what_answers_in_a_moment_loads_no_torch(folder):
    names = [f"lorabatch.{name}" for name in MODULES if place(name) == folder]
    code = f"import sys, {', '.join(names)}; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n" and len(names) > 1


def test_what_answers_in_a_moment_never_imports_torch_later_either():
    for name, source in MODULES.items():
        if place(name) in WITHOUT_TORCH:
            for node in ast.walk(ast.parse(source)):
                if isinstance(node, ast.Import):
                    assert all(place(alias.name) != "torch" for alias in node.names), name
                if isinstance(node, ast.ImportFrom):
                    assert place(node.module) != "torch", name


def test_files_and_functions_stay_small():
    found = STRUCTURE.Counts(PACKAGE).found
    assert {name: size for name, size in found.items() if size > STRUCTURE.LIMITS[name]} == {}
