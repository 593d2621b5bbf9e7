#!/usr/bin/env python3
"""How large the parts of the source are: ``python tests/structure.py [FOLDER]``. Counts that long
lines cannot hide.

Tokens: of Python's own tokenizer, without comments, docstrings and layout. Statements: of a
function, without those of functions inside it. Branches: places where a function may go two ways.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

from lorabatch.metrics.statistics import percentile

LAYOUT = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
}
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
BRANCHES = (
    ast.If,
    ast.IfExp,
    ast.For,
    ast.While,
    ast.ExceptHandler,
    ast.comprehension,
    ast.match_case,
)
LIMITS = {
    "statements of a function, most": 30,
    "tokens of a file, most": 3000,
    "tokens of a function, p90": 180,
    "branches of a function, p90": 6,
    "mentions of Any": 120,
}


def num_tokens(source: str) -> int:
    """An f-string counts once, as Python 3.11 reads it; 3.12 reads its parts."""
    depth = count = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        kind = tokenize.tok_name[token.type]
        count += depth == 0 and token.type not in LAYOUT
        depth += (kind == "FSTRING_START") - (kind == "FSTRING_END")
    return count


def own(function: ast.AST) -> Iterator[ast.AST]:
    """The nodes of a function, without those of functions inside it."""
    for child in ast.iter_child_nodes(function):
        if not isinstance(child, FUNCTIONS):
            yield child
            yield from own(child)


def without_docstring(source: str, node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    segment = ast.get_source_segment(source, node) or ""
    docstring = ast.get_docstring(node, clean=False)
    return segment.replace(docstring, "", 1) if docstring else segment


def functions(source: str) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(ast.parse(source)) if isinstance(node, FUNCTIONS))


def num_statements(function: ast.AST) -> int:
    return sum(isinstance(part, ast.stmt) for part in own(function))


class Counts:
    """Of all Python files below a folder: ``found`` has the figures of LIMITS, by their names."""

    def __init__(self, folder: Path) -> None:
        self.statements: dict[str, int] = {}
        self.files: dict[str, int] = {}
        self.tokens: list[int] = []
        branches, mentions = [], 0
        for path in sorted(folder.rglob("*.py")):
            source = path.read_text(encoding="utf-8")
            self.files[str(path)] = num_tokens(source)
            mentions += len(re.findall(r"\bAny\b", source))
            for node in functions(source):
                self.statements[f"{path}:{node.lineno} {node.name}"] = num_statements(node)
                branches.append(sum(isinstance(part, BRANCHES) for part in own(node)))
                self.tokens.append(num_tokens(without_docstring(source, node)))
        values = (
            max(self.statements.values()),
            max(self.files.values()),
            percentile(self.tokens, 90),
            percentile(branches, 90),
            mentions,
        )
        self.found = dict(zip(LIMITS, values, strict=True))


def main(folder: Path) -> None:
    counts = Counts(folder)
    files, functions_ = counts.files, counts.statements
    print(
        f"{folder}: {len(files)} files, {len(functions_)} functions, {sum(files.values())} tokens"
    )
    for name, value in counts.found.items():
        limit = LIMITS[name]
        print(f"  {name:32} {value:6.0f}   {'ok' if value <= limit else f'wanted: {limit}'}")
    for what, sizes in (("functions", functions_), ("files", files)):
        largest = sorted(sizes, key=lambda name: -sizes[name])[:5]
        print(f"  largest {what}: " + "; ".join(f"{name} {sizes[name]}" for name in largest))


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "src/lorabatch"))
