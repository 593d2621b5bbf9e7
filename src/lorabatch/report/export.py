"""``lorabatch export``: what a run left, in the formats of other tools."""

from __future__ import annotations

from pathlib import Path

from lorabatch.config import ExportConfig
from lorabatch.errors import UsageError
from lorabatch.report.trackers import send


def run_export(config: ExportConfig, command: list[str]) -> int:
    """One line for each run: what was written and how to look at it. Returns 0."""
    if config.to == "gguf":
        _to_gguf(config)
        return 0
    runs = [Path(run) for run in config.runs]
    for run in runs:  # before the first is sent
        if not (run / "run.json").is_file():
            raise UsageError("is no run folder (no run.json)", where=run, fix="check the path")
    for run in runs:
        print(f"{run}: {send(run, config.to, config.output or f'results/{config.to}')}")
    return 0


def _to_gguf(config: ExportConfig) -> None:
    from lorabatch.model.gguf_adapter import export_gguf

    if len(config.runs) > 1:
        raise UsageError("--to gguf takes one adapter", fix="call it once for each")
    folder = Path(config.runs[0])
    output = Path(config.output) if config.output else folder / "adapter.gguf"
    export_gguf(folder, config.base_model, output)
    print(f"{output}; use with: llama-cli -m BASE.gguf --lora {output}")
