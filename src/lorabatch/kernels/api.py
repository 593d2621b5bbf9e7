"""The interface of the C++ kernels as Python sees it: ``api.h``, read by cffi.

Nothing is read before it is needed, so that whoever runs without kernels pays nothing.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    import torch
    from torch import Tensor

HEADER = Path(__file__).with_name("api.h")
CData: TypeAlias = Any  # whatever cffi makes; it comes without types


@functools.cache
def ffi() -> CData:
    """cffi with the declarations of api.h. Its ``new`` makes structs and arrays, filled with zeros;
    they live as long as somebody holds them, and a pointer in a struct holds nothing."""
    import cffi

    lines = HEADER.read_text(encoding="utf-8").splitlines()
    declared = cffi.FFI()
    declared.cdef("\n".join(line for line in lines if not line.startswith("#")))
    return declared


@functools.cache
def constants() -> CData:
    """The enumerators of api.h as attributes; no library need be built for them."""
    return ffi().dlopen(None)


def words(enum: str, prefix: str = "") -> tuple[str, ...]:
    """The enumerators of an enum that counts from zero, as words: MISFIT_TOKEN_ID is "token id"
    without its prefix."""
    names = ffi().typeof(f"enum {enum}").elements
    return tuple(
        names[value].removeprefix(prefix).lower().replace("_", " ") for value in range(len(names))
    )


def open_library(path: Path, name: str) -> CData:
    """The compiled ``name``.cpp. Raises OSError if it cannot be loaded or lacks a function."""
    library = ffi().dlopen(str(path))
    for function in dir(library):
        if function.startswith(f"lb_{name}_") and not hasattr(library, function):
            raise OSError(f"{path} has no {function}")
    return library


def pointer(tensor: Tensor | None) -> CData:
    """Where its values begin; the tensor must outlive what uses the pointer."""
    declared = ffi()
    return declared.NULL if tensor is None else declared.cast("void *", tensor.data_ptr())


def type_of(dtype: torch.dtype) -> int:
    """The Type of api.h, which has the name that torch gives it. Raises KeyError if the kernels do
    not serve it."""
    return int(ffi().typeof("enum Type").relements[str(dtype).removeprefix("torch.").upper()])
