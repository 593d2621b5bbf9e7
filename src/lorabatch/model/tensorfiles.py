"""Files of unknown origin: damage is one line, and a reader never sees half a file."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from lorabatch.errors import DataError, LorabatchError, UnavailableError
from lorabatch.machine.device import out_of_memory
from lorabatch.records import writing


@contextmanager
def reading(what: str, *, where: Path, fix: str) -> Iterator[None]:
    """Whatever goes wrong while libraries read files of unknown origin is the files' fault, in one
    line: a DataError, if not want of memory."""
    try:
        yield
    except LorabatchError as error:
        if error.where is not None:
            raise
        raise type(error)(error.what, where=where, fix=error.fix) from error
    except BaseException as error:
        if isinstance(error, Exception) and out_of_memory(error):
            raise UnavailableError(
                "does not fit in memory",
                where=where,
                fix="use a smaller model or a smaller --dtype",
            ) from error
        # A panic of the tokenizers' Rust code is no Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        if "trust_remote_code" in str(error):
            what, fix = (
                "needs code of its own to run (auto_map), which is never run here",
                "use a model that transformers itself knows",
            )
        else:
            what = (
                f"{what} ({type(error).__name__}: "
                f"{next(iter(str(error).strip().splitlines()), '')[:300]})"
            )
        raise DataError(what, where=where, fix=fix) from error


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file by name, on the CPU: mapped, so that names and shapes cost nothing.
    Raises DataError."""
    from safetensors.torch import load_file

    if not path.is_file():
        raise DataError("not a file", where=path, fix="copy it again")

    try:
        return load_file(path)
    except Exception as error:  # the library raises its own class for every kind of damage
        raise DataError(
            f"not a readable safetensors file ({error})", where=path, fix="copy it again"
        ) from None


def is_finite(tensor: Tensor) -> bool:
    """One pass without a copy: the sum over a value that is not finite is none either, and hardly
    any other."""
    return tensor.is_meta or math.isfinite(tensor.sum()) or bool(tensor.isfinite().all())


def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write beside, flush to disk, rename. The file gets the user's umask (the library makes it
    0600). Raises UnavailableError."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    umask = os.umask(0)
    os.umask(umask)
    try:
        with writing(path):
            try:
                save_file(
                    {k: v.contiguous() for k, v in tensors.items()},
                    temporary,
                    metadata={"format": "pt"},
                )
            except SafetensorError as error:  # its own class, also for what the system refuses
                raise OSError(0, str(error)) from None
            temporary.chmod(0o666 & ~umask)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
