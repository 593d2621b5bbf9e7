"""Loss scaling for fp16: the one piece of arithmetic that keeps small gradients above the type's
smallest number."""

from __future__ import annotations

from dataclasses import dataclass

from lorabatch.errors import TrainingError

LARGEST = 2.0**24
MOST_OVERFLOWS_IN_A_ROW = 24  # from the largest scale down to one


@dataclass
class LossScaler:
    """The factor on the loss: halved after an overflow (the step is tried again), doubled after
    ``grow_every`` good steps.

    Same rule as the paper (arXiv 1710.03740, section 3.2), except that a step whose gradient
    overflowed is repeated instead of lost: which documents are learned does not depend on the
    scale.
    """

    scale: float = 2.0**12
    grow_every: int = 500
    good_steps: int = 0
    overflows: int = 0  # of the whole run
    overflows_in_a_row: int = 0

    def good(self) -> None:
        self.overflows_in_a_row = 0
        self.good_steps += 1
        if self.good_steps >= self.grow_every:
            self.scale, self.good_steps = min(self.scale * 2, LARGEST), 0

    def overflowed(self, step: int) -> None:
        """Note an overflow. TrainingError when a smaller scale has no prospect of helping."""
        self.overflows += 1
        self.overflows_in_a_row += 1
        self.good_steps = 0
        if self.scale <= 1 or self.overflows_in_a_row >= MOST_OVERFLOWS_IN_A_ROW:
            raise TrainingError(
                f"the gradient overflows fp16 even with loss scale {self.scale:g}",
                where=f"step {step}",
                fix="the adapter before this step is kept; lower --lr or use --dtype fp32",
            )
        self.scale = max(1.0, self.scale / 2)
