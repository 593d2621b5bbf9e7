"""What all checks together found: its lines, its record, its files."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lorabatch.check.rules import LEVELS, RULES, Rule, Seen, finding, hit_record, level, record
from lorabatch.corpus.readers import Document
from lorabatch.errors import visible
from lorabatch.findings import Finding
from lorabatch.model import hub
from lorabatch.records import replacing, utc_now, write_json, writing
from lorabatch.schema import SCHEMA_VERSION, Record, sealed

WIDTH = 13  # of the longest name of a check


@dataclass(frozen=True)
class Checked:
    """seen: worst first."""

    seen: Sequence[Seen]
    rules: Mapping[str, Rule]
    documents: Mapping[Path, int]
    seconds: float

    @classmethod
    def of(
        cls,
        seen: Iterable[Seen],
        rules: Mapping[str, Rule],
        sides: Mapping[Path, Sequence[Document]],
        start_s: float,
    ) -> Checked:
        """start_s: of time.perf_counter."""

        def badness(s: Seen) -> tuple[int, int]:
            return LEVELS.index(level(s, rules[s.check])), [*RULES].index(s.check)

        counts = {path: len(documents) for path, documents in sides.items()}
        ordered = sorted(seen, key=badness)
        return cls(ordered, rules, counts, time.perf_counter() - start_s)

    @property
    def findings(self) -> list[Finding]:
        return [finding(s, self.rules) for s in self.seen]

    @property
    def level(self) -> str:
        """The worst."""
        return self.findings[0].level

    def lines(self, *levels: str) -> Iterator[str]:
        """One for each finding, of these levels only if some are given."""
        for found in self.findings:
            if not levels or found.level in levels:
                yield visible(found.line(WIDTH))

    def effort(self) -> str:
        return f"Looked at {sum(self.documents.values()):,} documents in {self.seconds:.1f} s."

    def record(self) -> Record:
        return {
            "seconds": self.seconds,
            "files": [
                {"path": str(path), "sha256": hub.file_sha256(path), "documents": count}
                for path, count in self.documents.items()
            ],
            "checks": [record(s, self.rules) for s in self.seen],
        }

    def write(self, folder: Path) -> None:
        """check.json and findings.jsonl. UnavailableError if the folder cannot be written to."""
        with writing(folder, fix="choose another --output_dir"):
            folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / "findings.jsonl") as file:
            file.writelines(sealed(hit_record(hit)) + b"\n" for s in self.seen for hit in s.hits)
        head = {"schema_version": SCHEMA_VERSION, "finished_at": utc_now()}
        write_json(folder / "check.json", head | self.record())
