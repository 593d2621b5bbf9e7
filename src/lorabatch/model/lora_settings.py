"""How an adapter is applied: its settings, and what adapter_config.json says of them (peft's file; it may come from anywhere)."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorabatch.errors import DataError

PATTERN_S, PATTERNS_S = 0.1, 10.0  # of processor time: for one pattern on one layer (they take microseconds), and for all
MOST_RANK, MOST_PATTERNS = 2**16, 2**10
UNSUPPORTED = (  # keys of adapter_config.json that change what an adapter computes
    *("use_dora", "modules_to_save", "lora_bias", "trainable_token_indices", "target_parameters", "layer_replication"),
    *("alora_invocation_tokens", "use_qalora", "use_bdlora", "arrow_config", "kasa_config", "velora_config", "monteclora_config"),
)
# Values of init_lora_weights after which an adapter belongs to what is left of the base.
CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class LoraSettings:
    r: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    use_rslora: bool = False
    target_modules: tuple[str, ...] = ("all-linear",)
    rank_pattern: Mapping[str, int] = field(default_factory=dict)  # peft's per-layer exceptions, read only
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)

    def scale(self, path: str, rank: int) -> float:
        """``alpha / r``, or ``alpha / sqrt(r)`` with rank-stabilised LoRA (arXiv 2312.03732)."""
        alpha = _exception(self.alpha_pattern, path, self.alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def rank(self, path: str) -> int:
        return _exception(self.rank_pattern, path, self.r)

    def check_patterns(self, paths: Iterable[str]) -> None:
        """TimeoutError for patterns that run away: they come with the files."""
        begin_s = time.process_time()
        for path in paths:
            self.scale(path, self.rank(path))
            if time.process_time() - begin_s > PATTERNS_S:
                raise TimeoutError("the patterns take too long")


def _exception(patterns: Mapping[str, Any], path: str, otherwise: Any) -> Any:
    """What peft's per-layer patterns say of a layer. TimeoutError for one that takes too long."""
    if not patterns:
        return otherwise
    import regex  # the same language as re's, and it can be stopped

    return next((v for pattern, v in patterns.items() if regex.match(rf"(.*\.)?({pattern})$", path, timeout=PATTERN_S)), otherwise)


def _is_rank(value: Any) -> bool:
    return type(value) is int and 0 < value <= MOST_RANK


def _is_alpha(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < 1e9


def _is_by_pattern(value: Any, is_valid: Callable[[Any], bool]) -> bool:
    return not value or (isinstance(value, dict) and len(value) <= MOST_PATTERNS and all(is_valid(v) for v in value.values()))


VALID: dict[str, tuple[Callable[[Any], bool], str]] = {  # of adapter_config.json
    "r": (_is_rank, f"a whole number up to {MOST_RANK:,}"),
    "lora_alpha": (_is_alpha, "a positive number"),
    "lora_dropout": (lambda v: v is None or (type(v) in (int, float) and 0 <= v <= 1), "a share from 0 to 1"),
    "use_rslora": (lambda v: v is None or type(v) is bool, "true or false"),
    "rank_pattern": (lambda v: _is_by_pattern(v, _is_rank), f"whole numbers up to {MOST_RANK:,} by pattern"),
    "alpha_pattern": (lambda v: _is_by_pattern(v, _is_alpha), "positive numbers by pattern"),
    "target_modules": (
        lambda v: not v or isinstance(v, str) or (isinstance(v, list) and all(type(t) is str for t in v)),
        "names of layers",
    ),
    "init_lora_weights": (
        lambda v: not str(v).startswith(CHANGE_THE_BASE),
        "a start that leaves the base as it is (peft can convert the adapter)",
    ),
}


def settings_from(config: Mapping[str, Any], path: Path) -> LoraSettings:
    """path: of the file, for messages. DataError for what is wrong in it and for what we cannot apply faithfully."""
    if str(config.get("peft_type")) != "LORA":
        raise DataError(f"peft_type is {config.get('peft_type')}, not LORA", where=path, fix="only LoRA adapters can be used")
    for name in UNSUPPORTED:
        if config.get(name):
            raise DataError(f"uses {name}, which is not supported", where=path, fix="merge it into the base with peft first")
    if config.get("bias", "none") != "none":
        raise DataError(f"trains biases (bias={config['bias']})", where=path, fix="merge it into the base with peft first")
    for name, (is_valid, what) in VALID.items():
        if not is_valid(config.get(name)):
            raise DataError(f"'{name}' is {str(config.get(name))[:40]}, not {what}", where=path, fix="restore the file")
    targets = config.get("target_modules") or ()
    return LoraSettings(
        r=config["r"],
        alpha=float(config["lora_alpha"]),
        dropout=float(config.get("lora_dropout") or 0.0),
        use_rslora=bool(config.get("use_rslora")),
        target_modules=(targets,) if isinstance(targets, str) else tuple(targets),
        rank_pattern=config.get("rank_pattern") or {},
        alpha_pattern=config.get("alpha_pattern") or {},
    )
