"""GGUF files to model folders. The header is read here first, every count compared with the size of
the file, and compared with itself.

The libraries that convert trust the counts: a damaged one keeps them busy for years, or the model
gets random weights.
"""

from __future__ import annotations

import contextlib
import io
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lorabatch.errors import DataError, UnavailableError
from lorabatch.model import hub
from lorabatch.model.hf import from_pretrained
from lorabatch.model.spec import MOST, ModelSpec, check_numbers, spec_from_config
from lorabatch.model.tensorfiles import reading, write_safetensors
from lorabatch.model.weights import compare_shapes, linear_shapes, tensor_shapes
from lorabatch.records import write_json
from lorabatch.schema import Fields, Record

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FORMATS = dict(
    zip(
        (0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12),
        ("B", "b", "H", "h", "I", "i", "f", "?", "Q", "q", "d"),
        strict=True,
    )
)
STRING, ARRAY, ALIGNMENT = 8, 9, 32
MOST_ELEMENTS = 2**22  # of all arrays together; a vocabulary of 256,000 tokens has about a million
COUNTS = {  # endings of keys, and the names in config.json whose bounds they share
    ".block_count": "num_hidden_layers",
    ".embedding_length": "hidden_size",
    ".feed_forward_length": "intermediate_size",
    ".attention.head_count": "num_attention_heads",
    ".attention.head_count_kv": "num_key_value_heads",
    ".attention.key_length": "head_dim",
    ".context_length": "max_position_embeddings",
    ".vocab_size": "vocab_size",
}
REQUIRED = (
    ".block_count",
    ".context_length",
    ".embedding_length",
    ".feed_forward_length",
    ".attention.head_count",
    "_epsilon",
)


@dataclass(frozen=True)
class GgufHeader:
    """``values``: key -> scalar or text; ``shapes``: tensor -> shape, the last axis contiguous as
    in torch."""

    values: Fields
    shapes: Mapping[str, tuple[int, ...]]


class _Bytes:
    """Reads forward and never beyond the end."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data, self._at, self._elements = data, 0, 0

    def take(self, size: int) -> bytes:
        if size > len(self._data) - self._at:
            raise DataError("the file ends within its header", fix="copy it again")
        self._at += size
        return self._data[self._at - size : self._at]

    def number(self, kind: str) -> float:
        return struct.unpack(f"<{kind}", self.take(struct.calcsize(f"<{kind}")))[0]

    def count(self, kind: str = "Q") -> int:
        return int(self.number(kind))

    def text(self) -> str:
        return self.take(self.count()).decode("utf-8", errors="replace")

    def check_fits(self, spans: list[tuple[int, int, str]], alignment: int) -> None:
        """Spans of tensors, sorted, counted from the next aligned byte on, must fill the file one
        behind the other."""
        start = -(-self._at // alignment) * alignment
        for (_, end, name), (begin, _, _) in pairwise([*spans, (len(self._data) - start, 0, "")]):
            if not 0 <= begin - end < alignment:
                raise DataError(
                    f"'{name}' does not end where the next tensor or the end of the file begins",
                    fix="copy it again",
                )

    def value(self, kind: int) -> float | str | None:
        """A scalar or a text; of an array, which is passed over, None."""
        if kind == STRING:
            return self.text()
        if kind != ARRAY:
            return self.number(_format(kind))
        kind, count = self.count("I"), self.count()
        self._elements += count
        if self._elements > MOST_ELEMENTS:
            raise DataError(
                f"arrays of {self._elements:,} elements in the header, at most "
                f"{MOST_ELEMENTS:,} are read",
                fix="copy it again",
            )
        if kind == STRING:
            for _ in range(count):
                self.take(self.count())
        else:
            self.take(count * struct.calcsize(f"<{_format(kind)}"))
        return None


def _format(kind: int) -> str:
    if kind not in FORMATS:
        raise DataError(f"unknown kind of value {kind} in the header", fix="copy it again")
    return FORMATS[kind]


def read_header(path: Path) -> GgufHeader:
    """Raises DataError for a header that is damaged, counts beyond reason, and tensors beyond the
    end of the file."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        read = _Bytes(data)
        if read.take(4) != b"GGUF" or read.count("I") not in (2, 3):
            raise DataError("not a GGUF file of version 2 or 3", fix="check the file")
        num_tensors, num_values = read.count(), read.count()
        values: Record = {}
        for _ in range(num_values):  # ends with the file at the latest
            key = read.text()
            values[key] = read.value(read.count("I"))
        _check_counts(values)
        shapes: dict[str, tuple[int, ...]] = {}
        spans = []  # (first byte, byte behind the last, name) of every tensor
        for _ in range(num_tensors):
            name = read.text()
            num_axes = read.count("I")
            shapes[name] = tuple(reversed(struct.unpack(f"<{num_axes}Q", read.take(8 * num_axes))))
            kind, offset = read.count("I"), read.count()
            spans.append((offset, offset + _num_bytes(shapes[name], kind), name))
        read.check_fits(sorted(spans), max(1, int(values.get("general.alignment", ALIGNMENT))))
        return GgufHeader(values, shapes)


def _check_counts(values: Fields) -> None:
    for key, value in values.items():
        most = next((MOST[name] for ending, name in COUNTS.items() if key.endswith(ending)), None)
        if most is None or value is None:
            continue
        if not (type(value) is int and 0 < value <= most):
            raise DataError(
                f"{key} is {value}, not a whole number up to {most:,}",
                fix="use another copy of the model",
            )


def _num_bytes(shape: tuple[int, ...], kind: int) -> int:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    elements, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    return prod(shape) // elements * size


def check_tensors(header: GgufHeader, spec: ModelSpec) -> None:
    """The file says what it must, and holds the tensors of its own configuration, by name and
    shape, no more and no less. Raises DataError."""
    import gguf

    absent = [key for key in REQUIRED if not any(k.endswith(key) for k in header.values)]
    if absent:  # transformers would take the value of another model
        raise DataError(
            f"the header does not say {absent[0][1:]}", fix="use another copy of the model"
        )
    architecture = next(
        k
        for k, name in gguf.MODEL_ARCH_NAMES.items()
        if name == header.values["general.architecture"]
    )
    names, linears = gguf.get_tensor_name_map(architecture, spec.num_layers), linear_shapes(spec)
    expected = {}
    for name, shape in tensor_shapes(spec).items():
        path, _, half = name.rpartition(".")
        # GGUF never stores [I, O]
        expected[f"{names.get_name(path)}.{half}"] = (
            linears.get(path, shape) if half == "weight" else shape
        )
    compare_shapes(expected, header.shapes, where=None)


def write_converted(path: Path, folder: Path) -> None:
    """The model of a GGUF file as a folder with fp32 safetensors. Raises DataError, or
    UnavailableError without the package gguf."""
    hub.prepare_environment()
    try:
        import gguf  # noqa: F401  (transformers asks for it in the middle of loading)
    except ImportError:
        raise UnavailableError(
            "reading a GGUF file needs the package gguf", fix="run: pip install gguf"
        ) from None
    from transformers import AutoConfig, AutoTokenizer

    with reading("cannot be converted", where=path, fix="use a safetensors copy of the model"):
        header = read_header(path)
        read: Record = {
            "gguf_file": path.name,
            "local_files_only": True,
            "trust_remote_code": False,
        }
        with contextlib.redirect_stderr(io.StringIO()):  # its progress bars cannot be turned off
            config = AutoConfig.from_pretrained(path.parent, **read)
            check_numbers(config.to_dict())
            spec = spec_from_config(config)
            if spec is not None:
                check_tensors(header, spec)
            tokenizer = AutoTokenizer.from_pretrained(path.parent, config=config, **read)
            model = from_pretrained(path.parent, torch.float32, config=config, gguf_file=path.name)
    _write_model(model, folder, tokenizer.eos_token_id)
    tokenizer.save_pretrained(folder)


def _write_model(model: PreTrainedModel, folder: Path, eos_token_id: int) -> None:
    """eos_token_id: of a model that does not say its own."""
    config = model.config.to_dict()
    config.pop("quantization_config", None)  # the weights are no longer quantised
    write_json(
        folder / "config.json",
        config | {"dtype": "float32", "architectures": [type(model).__name__]},
    )
    eos = model.generation_config.eos_token_id if model.generation_config else None
    write_json(
        folder / "generation_config.json",
        {"eos_token_id": eos_token_id if eos is None else eos},
    )
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    write_safetensors(
        folder / "model.safetensors", {k: v for k, v in model.state_dict().items() if k not in tied}
    )
