"""Several adapters in one run: ``--adapters NAME=DIR …``, chosen per request by its field
``adapter``.

They stay unmerged: every row of a batch gets its own low-rank product (``LOW_RANK`` in
``kernels/step.cpp``), so requests for different adapters share the base's products. One adapter
alone is cheaper merged: ``--adapter_dir``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lorabatch.config import InferConfig
from lorabatch.errors import DataError, UsageError, nearest
from lorabatch.model import hub


@dataclass(frozen=True)
class AdapterNames:
    """The names in the order of the flag; a request's row is its name's place here."""

    folders: dict[str, Path]

    @classmethod
    def parse(cls, entries: Sequence[str]) -> AdapterNames:
        """``NAME=DIR`` each. UsageError for another form or a name given twice, DataError for a
        folder that is not there."""
        folders: dict[str, Path] = {}
        for entry in entries:
            name, equals, folder = entry.partition("=")
            if not equals or not name or not folder:
                raise UsageError(
                    "is not NAME=DIR",
                    where=f"--adapters {entry}",
                    fix="for example --adapters cardio=results/lora-cardio",
                )
            if name in folders:
                raise UsageError(
                    "this name is there twice",
                    where=f"--adapters {entry}",
                    fix="give each adapter its own name",
                )
            if not Path(folder).is_dir():
                raise DataError(
                    "no such folder",
                    where=f"--adapters {entry}",
                    fix="train first, or correct the path",
                )
            folders[name] = Path(folder)
        return cls(folders)

    def row(self, name: str | None) -> int:
        """Place of an adapter, -1 for None. DataError for a name that is not there: the
        request's error, not the run's."""
        if name is None:
            return -1
        if name not in self.folders:
            raise DataError(
                f"unknown adapter '{name}' "
                f"({nearest(name, self.folders) if self.folders else 'no --adapters were given'})"
            )
        return list(self.folders).index(name)


def merged_adapter(config: InferConfig) -> Path | None:
    """Folder of ``--adapter_dir``; None for the base model, which ``none`` asks for too."""
    return Path(config.adapter_dir) if config.adapter_dir and config.adapter_dir != "none" else None


def check_adapters(config: InferConfig) -> None:
    """Raises UsageError, DataError for a missing folder."""
    adapter_dir = merged_adapter(config)
    if adapter_dir is not None and config.adapters:
        raise UsageError(
            "one adapter for all or one for each request, not both",
            where="--adapter_dir --adapters",
            fix="leave one out",
        )
    if adapter_dir is not None and not adapter_dir.is_dir():
        raise DataError(
            "no such folder",
            where=f"--adapter_dir {adapter_dir}",
            fix="train first, or leave the flag out for the base model",
        )


def files_sha256(folder: Path) -> str:
    """Identity of an adapter by its files, the configuration too: it holds alpha. A missing file is
    left to the one who loads it."""
    files = (folder / "adapter_model.safetensors", folder / "adapter_config.json")
    return " ".join(hub.file_sha256(path) for path in files if path.exists())
