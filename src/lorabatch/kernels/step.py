"""The Python side of ``step.cpp``: the operations of a recorded program, and the call that replays
them."""

from __future__ import annotations

import functools
from typing import TypeAlias

import torch

from lorabatch.errors import LorabatchError
from lorabatch.kernels import library
from lorabatch.kernels.api import CData, type_of, words

Op: TypeAlias = dict[str, CData]  # fields of a struct Op; the others are zero


@functools.cache
def kinds() -> tuple[str, ...]:
    """What each Kind is called in a profile."""
    return words("Kind")


@functools.cache
def max_queries(dtype: torch.dtype) -> int:
    """Query vectors that attend together: as many as fill the kernel's registers, or a tile."""
    kernels = library("step")
    return int(kernels.lb_step_max_queries(type_of(dtype))) if kernels is not None else 1


def replay(kernels: CData, ops: CData, step: CData) -> None:
    """The operations of a step (struct Op [], struct Step *), on all layers with one call."""
    misfit = kernels.lb_step_run(ops, len(ops), step)
    if misfit:  # found before anything was read or written
        raise LorabatchError(
            f"a step does not fit what was recorded: {words('Misfit', 'MISFIT_')[misfit]}",
            where="kernels",
            fix="this is an error of lorabatch",
        )
