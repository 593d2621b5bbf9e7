"""The import order and the size budget of docs/ARCHITECTURE.md, read from the source."""

import ast
from pathlib import Path

SRC = Path(__file__).parents[1] / "src" / "lorabatch"
BASE = {"errors", "schema", "records", "settings", "config", "progress", "signals", "slurm", "processor"}
PURE = {"measure.statistics", "measure.environment", "measure.system"}
CORPUS, MODEL, TRAIN, INFER = "corpus", "model", "train", "infer"
ALLOWED = {
    "base": {"base"},
    "pure": {"base", "pure"},
    "corpus": {"base", "pure", "corpus"},
    "hub": {"base", "model"},  # one writer of tensor files, imported inside the converting function
    "kernels": {"base", "kernels"},
    "model": {"base", "pure", "corpus", "hub", "kernels", "model"},
    "ceilings": {"base", "pure", "hub", "kernels", "model", "ceilings"},
    "train": {"base", "pure", "corpus", "hub", "model", "ceilings", "train"},
    "infer": {"base", "pure", "corpus", "hub", "kernels", "model", "ceilings", "infer"},
    "report": {"base", "pure", "report"},
    "cluster": {"base", "pure", "hub", "train", "infer", "cluster"},  # of train and infer, the files of jobs and prompts
    "cli": {"base", "pure", "hub", "kernels", "model", "ceilings", "train", "infer", "report", "cluster", "cli"},
}


def layer(module):
    first = module.split(".")[0]
    if first in BASE or module in ("", "__init__"):
        return "base"
    if module in PURE:
        return "pure"
    if module in ("measure.roofline", "measure.machine", "measure.products", "measure.profile", "measure.bench"):
        return "ceilings"
    if first == "measure":
        return "pure"
    return "cli" if first in ("cli", "__main__") else first


def modules():
    for path in sorted(SRC.rglob("*.py")):
        yield ".".join(path.relative_to(SRC).with_suffix("").parts).removesuffix(".__init__"), path


def imports(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("lorabatch"):
            base = node.module.removeprefix("lorabatch").removeprefix(".")
            yield from (
                [base] if base and base != "model" else [f"{base}.{a.name}".strip(".") for a in node.names if a.name != "__version__"]
            )


def test_imports_only_go_down():
    seen = set()
    for name, path in modules():
        for target in imports(ast.parse(path.read_text(encoding="utf-8"))):
            seen.add((layer(name), layer(target)))
            assert layer(target) in ALLOWED[layer(name)], f"{name} imports {target}"
    assert ("train", "model") in seen and ("infer", "model") in seen, "the test looks at the real imports"


def test_report_and_cluster_never_import_torch():
    for name, path in modules():
        if layer(name) in ("report", "cluster", "base", "corpus"):
            names = [a.name for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, ast.Import) for a in n.names]
            assert "torch" not in names, name


def test_files_and_functions_stay_small():
    for name, path in modules():
        text = path.read_text(encoding="utf-8")
        assert text.count("\n") <= 345, f"{name} has {text.count(chr(10))} lines"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                assert node.end_lineno - node.lineno < 75, f"{name}.{node.name} has {node.end_lineno - node.lineno + 1} lines"
