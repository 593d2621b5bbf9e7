"""LoRA fine-tuning, batched inference and honest measurement of both, for clusters without
internet."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lorabatch.api import LanguageModel, load

__version__ = "0.1.0"
__all__ = ["LanguageModel", "load"]


def __getattr__(name: str) -> object:
    """The Python interface comes when it is asked for: torch takes seconds to import."""
    if name in __all__:
        from lorabatch import api

        return getattr(api, name)
    raise AttributeError(f"module 'lorabatch' has no attribute '{name}'")
