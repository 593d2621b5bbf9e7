"""How an adapter is applied: its settings, and what adapter_config.json says of them (peft's file;
it may come from anywhere)."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeGuard, TypeVar

from lorabatch.config import TrainConfig
from lorabatch.errors import DataError
from lorabatch.schema import Fields

# of processor time: for one pattern on one layer (they take microseconds), and for all
PATTERN_S, PATTERNS_S = 0.1, 10.0
MOST_R, MOST_PATTERNS = 2**16, 2**10
UNSUPPORTED = (  # keys of adapter_config.json that change what an adapter computes
    *(
        "use_dora",
        "modules_to_save",
        "lora_bias",
        "trainable_token_indices",
        "target_parameters",
        "layer_replication",
    ),
    *(
        "alora_invocation_tokens",
        "use_qalora",
        "use_bdlora",
        "arrow_config",
        "kasa_config",
        "velora_config",
        "monteclora_config",
    ),
)
# Values of init_lora_weights after which an adapter belongs to what is left of the base.
CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")

Check = Callable[[object], bool]
T = TypeVar("T")


@dataclass(frozen=True)
class LoraSettings:
    """What TrainConfig says of the adapters; its defaults are the defaults here."""

    r: int = TrainConfig.lora_r
    alpha: float = TrainConfig.lora_alpha
    dropout: float = TrainConfig.lora_dropout
    use_rslora: bool = TrainConfig.use_rslora
    target_modules: tuple[str, ...] = TrainConfig.target_modules
    # peft's per-layer exceptions, read only
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def from_config(cls, config: TrainConfig) -> LoraSettings:
        return cls(
            r=config.lora_r,
            alpha=config.lora_alpha,
            dropout=config.lora_dropout,
            use_rslora=config.use_rslora,
            target_modules=config.target_modules,
        )

    def scale(self, path: str, r: int) -> float:
        """``alpha / r``, or ``alpha / sqrt(r)`` with rank-stabilised LoRA (arXiv 2312.03732)."""
        alpha = _exception(self.alpha_pattern, path, self.alpha)
        return alpha / (math.sqrt(r) if self.use_rslora else r)

    def r_of(self, path: str) -> int:
        return _exception(self.rank_pattern, path, self.r)

    def check_patterns(self, paths: Iterable[str]) -> None:
        """TimeoutError for patterns that run away: they come with the files."""
        begin_s = time.process_time()
        for path in paths:
            self.scale(path, self.r_of(path))
            if time.process_time() - begin_s > PATTERNS_S:
                raise TimeoutError("the patterns take too long")


def _exception(patterns: Mapping[str, T], path: str, default: T) -> T:
    """What peft's per-layer patterns say of a layer. TimeoutError for one that takes too long."""
    if not patterns:
        return default
    import regex  # the same language as re's, and it can be stopped

    return next(
        (
            v
            for pattern, v in patterns.items()
            if regex.match(rf"(.*\.)?({pattern})$", path, timeout=PATTERN_S)
        ),
        default,
    )


def _is_r(value: object) -> bool:
    return type(value) is int and 0 < value <= MOST_R


def _is_alpha(value: object) -> bool:
    return _is_number(value) and 0 < value < 1e9


def _is_share(value: object) -> bool:
    return _is_number(value) and 0 <= value <= 1


def _is_number(value: object) -> TypeGuard[float]:
    return type(value) in (int, float)


def _is_by_pattern(value: object, is_valid: Check) -> bool:
    return not value or (
        isinstance(value, dict)
        and len(value) <= MOST_PATTERNS
        and all(is_valid(v) for v in value.values())
    )


VALID: dict[str, tuple[Check, str]] = {  # of adapter_config.json
    "r": (_is_r, f"a whole number up to {MOST_R:,}"),
    "lora_alpha": (_is_alpha, "a positive number"),
    "lora_dropout": (
        lambda v: v is None or _is_share(v),
        "a share from 0 to 1",
    ),
    "use_rslora": (lambda v: v is None or type(v) is bool, "true or false"),
    "rank_pattern": (
        lambda v: _is_by_pattern(v, _is_r),
        f"whole numbers up to {MOST_R:,} by pattern",
    ),
    "alpha_pattern": (lambda v: _is_by_pattern(v, _is_alpha), "positive numbers by pattern"),
    "target_modules": (
        lambda v: (
            not v or isinstance(v, str) or (isinstance(v, list) and all(type(t) is str for t in v))
        ),
        "names of layers",
    ),
    "init_lora_weights": (
        lambda v: not str(v).startswith(CHANGE_THE_BASE),
        "a start that leaves the base as it is (peft can convert the adapter)",
    ),
}


def settings_from(config: Fields, path: Path) -> LoraSettings:
    """path: of the file, for messages. DataError for what is wrong in it and for what we cannot
    apply faithfully."""
    _check_config(config, path)
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


def _check_config(config: Fields, path: Path) -> None:
    if str(config.get("peft_type")) != "LORA":
        raise DataError(
            f"peft_type is {config.get('peft_type')}, not LORA",
            where=path,
            fix="only LoRA adapters can be used",
        )
    for name in UNSUPPORTED:
        if config.get(name):
            raise DataError(
                f"uses {name}, which is not supported",
                where=path,
                fix="merge it into the base with peft first",
            )
    if config.get("bias", "none") != "none":
        raise DataError(
            f"trains biases (bias={config['bias']})",
            where=path,
            fix="merge it into the base with peft first",
        )
    for name, (is_valid, what) in VALID.items():
        if not is_valid(config.get(name)):
            raise DataError(
                f"'{name}' is {str(config.get(name))[:40]}, not {what}",
                where=path,
                fix="restore the file",
            )
