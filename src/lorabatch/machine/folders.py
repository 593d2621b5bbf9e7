"""Where this machine keeps what is expensive to make: converted models, measured ceilings."""

from __future__ import annotations

import os
from pathlib import Path


def converted_folder() -> Path:
    """Where converted GGUF models are kept: beside the hub cache, because on clusters that is the
    big disk."""
    beside = Path(os.environ.get("HF_HOME") or os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    return Path(os.environ.get("LORABATCH_CACHE") or beside / "lorabatch").expanduser()
