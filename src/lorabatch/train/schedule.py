"""Learning rate as a pure function of the step, so that a resumed run needs no stored state."""

from __future__ import annotations

import math


def warmup_steps(total_steps: int, asked: int | None) -> int:
    """The asked number, or 5 % of all steps; never all of them."""
    steps = math.ceil(0.05 * total_steps) if asked is None else asked
    return min(steps, max(0, total_steps - 1))


def learning_rate(step: int, *, peak: float, total_steps: int, warmup: int, kind: str) -> float:
    """The rate of 0-based ``step``: linear warm-up, then cosine or linear decay to zero, or
    constant.

    The first step already learns (1 / (warmup + 1) of the peak), the last decayed step nearly does
    not.
    """
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    if kind == "constant":
        return peak
    share = (step - warmup) / max(1, total_steps - warmup)
    return peak * (0.5 * (1 + math.cos(math.pi * share)) if kind == "cosine" else 1 - share)
