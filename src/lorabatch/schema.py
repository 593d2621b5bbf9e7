"""What every record of ours holds, and how it is written as JSON and checked when it is read: one table (``KINDS``) for all of them.

A kind of record is the name of its file (where that says too little, a name of its own). A field is a leaf (words, and a test of
the value), ``Maybe`` (null or missing is fine), ``[kind]`` (a list of them) or a mapping of fields, where ``"*"`` stands for all
other names; without it other names are not looked at, so that a record may say more than its readers know.
"""

from __future__ import annotations

import json
import math
import re
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NoReturn

from lorabatch.errors import DataError

SCHEMA_VERSION = 1
CHECKSUM = "crc32"
SEAL = re.compile(rb',\s+"crc32": "([0-9a-f]{8})"\s*}\s*\Z')
SEAL_BYTES = 40  # at most
RESTORE = "restore or remove the file"
LARGEST = 1e60  # more than anything counted or measured here (a loss that diverges in fp32 too), and products of a few stay finite
SHOWN = 60  # characters of a value that is wrong


class NewerRecord(DataError):
    """Written by a version that knows more than this one: never guessed at, never taken for damage."""


@dataclass(frozen=True)
class Leaf:
    words: str
    test: Callable[[Any], bool]


@dataclass(frozen=True)
class Maybe:
    of: Any
    missing: bool = True  # is as good as null


@dataclass(frozen=True)
class Variants:
    """A mapping whose other fields depend on one of its own; a value that is not listed asks for nothing more."""

    by: str
    fields: Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Kind:
    fields: Any
    version: int = SCHEMA_VERSION
    needs_version: bool = False  # every version of it wrote its number


def _whole(least: float, most: float = 2.0**63) -> Leaf:
    words = f"a whole number from {least:.0f}" if math.isfinite(least) else "of type int"
    return Leaf(words, lambda v: type(v) is int and max(least, -LARGEST) <= v < min(most, LARGEST))


def _is_moment(value: Any) -> bool:
    try:
        return isinstance(value, str) and datetime.fromisoformat(value).tzinfo is not None
    except ValueError:
        return False


def is_number(value: Any) -> bool:
    """Finite, and small enough to be reckoned with."""
    return type(value) in (int, float) and abs(value) <= LARGEST  # no comparison holds for what is not a number


def one_of(*names: str) -> Leaf:
    return Leaf(f"one of {', '.join(names)}", lambda v: isinstance(v, str) and v in names)


ANY = Leaf("anything", lambda v: True)
TEXT = Leaf("of type str", lambda v: isinstance(v, str))
FLAG = Leaf("of type bool", lambda v: isinstance(v, bool))
INT, COUNT, POSITIVE = _whole(-math.inf, LARGEST), _whole(0), _whole(1)
NUMBER = Leaf("of type float", is_number)
PROCESS = _whole(1, 2.0**31)
DIGITS = Leaf("16 hexadecimal digits", lambda v: isinstance(v, str) and re.fullmatch("[0-9a-f]{16}", v) is not None)
MOMENT = Leaf("a time with its zone", _is_moment)
FREE = {"*": ANY}
TYPES = ("fp32", "bf16", "fp16", "int8")

ENVIRONMENT = {
    **dict.fromkeys(("host", "os", "cpu", "python"), Maybe(TEXT)),
    **dict.fromkeys(("logical_cores", "usable_cores", "memory_bytes"), Maybe(POSITIVE)),
    "packages": Maybe({"*": Maybe(TEXT)}),
    "git": Maybe({"commit": TEXT, "dirty": Maybe(FLAG)}),
    "slurm": Maybe({"*": TEXT}),
}
CONFIG = {
    **dict.fromkeys(("batch_size", "grad_accum_steps", "block_tokens"), Maybe(POSITIVE)),
    **dict.fromkeys(("base_model", "adapter_dir", "prompts", "output_format", "quantize"), Maybe(TEXT)),
    "temperature": Maybe(NUMBER),
    "adapters": Maybe([TEXT]),
}
GPU = {"name": Maybe(TEXT), "memory_bytes": Maybe(COUNT)}
MODEL = {
    **dict.fromkeys(("name", "fingerprint", "adapter"), Maybe(TEXT)),
    **dict.fromkeys(("trainable_params", "base_params"), Maybe(COUNT)),
    "trainable_share": Maybe(NUMBER),
}
ESTIMATE = {**dict.fromkeys(("median", "low", "high"), Maybe(NUMBER)), "values": [NUMBER]}
EVALUATION = {"loss": Maybe(NUMBER), "tokens": COUNT, "seconds": NUMBER, "bits_per_byte": Maybe(NUMBER)}
COUNTERS = {
    **dict.fromkeys(("step", "total_steps", "tokens", "targets", "squared_lengths", "epoch", "evals_without_gain"), COUNT),
    **dict.fromkeys(("train_s", "epoch_start_s"), NUMBER),
    **dict.fromkeys(("first_eval", "last_eval", "best_eval"), Maybe(EVALUATION)),
    **dict.fromkeys(("last_eval_step", "best_step"), Maybe(COUNT)),
    "epoch_s": [NUMBER],
    "last_loss": Maybe(NUMBER),
    "reason": TEXT,
}
LOGPROB = {"token": TEXT, "logprob": Maybe(NUMBER, missing=False)}
SCALER = {"scale": NUMBER, **dict.fromkeys(("grow_every", "good_steps", "overflows", "overflows_in_a_row"), COUNT)}

KINDS: dict[str, Kind] = {
    "run.json": Kind(
        {
            "kind": one_of("train", "infer"),
            "status": TEXT,
            "command": [TEXT],
            "config": CONFIG,
            "environment": ENVIRONMENT,
            **dict.fromkeys(("run_id", "error", "signal", "device", "dtype", "backend"), Maybe(TEXT)),
            **dict.fromkeys(("started_at", "finished_at"), Maybe(MOMENT)),
            "resumed": Maybe([{"step": COUNT, "from": TEXT}]),
            "threads": Maybe(POSITIVE),
            "gpu": Maybe(GPU),
            "model": Maybe(MODEL),
            "data": Maybe({part: Maybe({"*": Maybe(NUMBER)}) for part in ("train", "val")}),
        },
        needs_version=True,
    ),
    "metrics.json": Kind(
        {
            **dict.fromkeys(("cpu_percent", "cpu_wait_percent", "duration_s"), Maybe(NUMBER)),
            "phases": Maybe({"*": Maybe(NUMBER)}),
            "gpu_throttle_share": Maybe({"*": NUMBER}),
            "missing": Maybe({"*": TEXT}),
            "pass_tokens_per_s": Maybe([Maybe(NUMBER)]),
        }
    ),
    "events.jsonl": Kind(
        Variants(
            "event",
            {
                "step": {"step": INT, **dict.fromkeys(("loss", "lr", "tokens_per_s"), NUMBER)},
                "eval": {"step": INT, **dict.fromkeys(("eval_loss", "bits_per_byte"), Maybe(NUMBER))},
            },
        )
    ),
    "system.jsonl": Kind(
        {
            "t_s": NUMBER,
            **dict.fromkeys(
                (
                    *("cpu_percent", "rss_bytes", "gpu_util_percent", "gpu_memory_bytes", "gpu_power_w"),
                    *("read_bytes_per_s", "write_bytes_per_s"),
                ),
                Maybe(NUMBER),
            ),
        }
    ),
    "completions.jsonl": Kind(
        {
            **dict.fromkeys(("id", "prompt", "text"), TEXT),
            "key": DIGITS,
            "index": _whole(0, 2.0**42),  # both fit into one number
            "sample": _whole(0, 2.0**20),
            **dict.fromkeys(("input_tokens", "output_tokens"), COUNT),
            **dict.fromkeys(("finish_reason", "truncated", "error", "adapter"), Maybe(TEXT, missing=False)),
            **dict.fromkeys(("queue_ms", "ttft_ms", "e2el_ms"), Maybe(NUMBER, missing=False)),
            "chat": FLAG,
            "logprobs": Maybe([LOGPROB | {"top_logprobs": [LOGPROB]}], missing=False),
        }
    ),
    "plan.json": Kind(
        {"prompts_sha256": TEXT, "adapters_sha256": {"*": TEXT}, "bounds": [COUNT], "config": FREE},
        needs_version=True,
    ),
    "shard": Kind({"files": [TEXT], **dict.fromkeys(("quarantined", "work_keys"), Maybe([TEXT]))}),  # its DONE.json
    "task": Kind({"trials": {"*": {"value": Maybe(NUMBER), "error": Maybe(TEXT), "run": TEXT}}}),  # its DONE.json, of a sweep
    "sweep.json": Kind({"sweep": FREE, "trials": [FREE], "tasks": [[COUNT]]}, version=2),
    "claim": Kind({"host": TEXT, "pid": PROCESS, **dict.fromkeys(("where", "job"), Maybe(TEXT)), "started": Maybe(COUNT)}),
    "deaths.jsonl": Kind({"first": COUNT, "end": COUNT, "reason": TEXT, "work_key": Maybe(TEXT)}),
    "jobs.json": Kind({"jobs": {"*": TEXT}}),
    "bench": Kind(
        {
            "kind": TEXT,
            "sweep": one_of("batch_size", "threads"),
            "points": [
                {
                    **dict.fromkeys(("batch_size", "threads"), Maybe(POSITIVE)),
                    "tokens_per_s": ESTIMATE,
                    **dict.fromkeys(("weak_tokens_per_s", "batch_latency_ms", "step_ms"), Maybe(ESTIMATE)),
                    "waited_share": Maybe(NUMBER),
                }
            ],
            "command": Maybe([TEXT]),
            "environment": Maybe(ENVIRONMENT),
            "config": Maybe(CONFIG),
            "gpu": Maybe(GPU),
            "knee": Maybe(POSITIVE),
            **dict.fromkeys(("serial_share", "weak_serial_share"), Maybe(NUMBER)),
            "karp_flatt": Maybe({"*": Maybe(NUMBER)}),
        }
    ),
    "ceilings": Kind(  # of a machine, in its cache
        {
            **dict.fromkeys(
                (*(f"{t}_{end}" for t in TYPES for end in ("flops_per_s", "cold_flops_per_s")), "read_bytes_per_s"), Maybe(NUMBER)
            ),
            "measurements": Maybe({"*": NUMBER}),
            "waited_shares": Maybe({"*": Maybe(NUMBER)}),
        }
    ),
    "COMPLETE": Kind({name: {"bytes": COUNT, "sha256": TEXT} for name in ("state.safetensors", "state.json")}),
    "state.json": Kind(
        {
            "step": COUNT,
            "learner": {"counters": COUNTERS, "scaler": Maybe(SCALER)},
            "identity": {"settings": FREE, "content": {"dtype": one_of("fp32", "bf16", "fp16")}, "circumstances": FREE},
            "events_bytes": COUNT,
        },
        needs_version=True,
    ),
    "lorabatch.json": Kind(dict.fromkeys(("base_name", "base_fingerprint", "adapter_sha256"), Maybe(TEXT))),
    "MANIFEST.json": Kind({"name": TEXT, "revision": Maybe(TEXT), "files": {"*": {"bytes": COUNT, "sha256": TEXT}}}),
}


def check(record: Mapping[str, Any], kind: str, where: object, *, fix: str) -> None:
    """DataError that names the first field of a record that is not as its kind says; NewerRecord for a version to come."""
    rule = KINDS[kind]
    version = record.get("schema_version")
    if type(version) is int and version > rule.version:
        what = f"written by a newer lorabatch (version {version} of this record, {rule.version} is the newest known here)"
        raise NewerRecord(what, where=where, fix="update lorabatch, or choose another folder")
    known = {"schema_version": POSITIVE if rule.needs_version else Maybe(POSITIVE)}
    for wrong in (*_wrong(record, known, ""), *_wrong(record, rule.fields, "")):
        raise DataError(wrong, where=where, fix=fix)


def _wrong(value: Any, rule: Any, name: str) -> Iterable[str]:
    """What does not fit, in words."""
    if isinstance(rule, Maybe):
        return () if value is None else _wrong(value, rule.of, name)
    if isinstance(rule, Leaf):
        return () if rule.test(value) else (f"'{name}' is {_shown(value)}, not {rule.words}",)
    if isinstance(rule, list):
        if not isinstance(value, list):
            return (f"'{name}' is {_shown(value)}, not of type list",)
        return (wrong for i, item in enumerate(value) for wrong in _wrong(item, rule[0], f"{name}[{i}]"))
    if not isinstance(value, dict):
        return (f"'{name}' is {_shown(value)}, not of type dict",)
    if isinstance(rule, Variants):
        variant = value.get(rule.by)
        rule = {rule.by: TEXT, **(rule.fields.get(variant, {}) if isinstance(variant, str) else {})}
    return _wrong_fields(value, rule, f"{name}." if name else "")


def _wrong_fields(value: Mapping[str, Any], rules: Mapping[str, Any], prefix: str) -> Iterable[str]:
    for name, rule in rules.items():
        if name == "*":
            for other in value:
                if other not in rules:
                    yield from _wrong(value[other], rule, f"{prefix}{other}")
        elif name in value or (isinstance(rule, Maybe) and rule.missing):
            yield from _wrong(value.get(name), rule, f"{prefix}{name}")
        else:
            yield f"'{prefix}{name}' is missing"


def _shown(value: Any) -> str:
    text = repr(value) if not isinstance(value, (dict, list)) else f"a {type(value).__name__}"
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"


def _plain(value: object) -> object:
    """JSON has no NaN: a value that is not a number is null, never a token other parsers refuse."""
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value


def dumps(record: Mapping[str, Any], *, indent: int | None = None) -> str:
    """JSON that can be encoded: of a file name that is not UTF-8 Python makes half surrogate pairs, which are written as escapes."""
    text = json.dumps(_plain(record), ensure_ascii=False, allow_nan=False, default=str, indent=indent)
    return text.encode(errors="backslashreplace").decode()


def sealed(record: Mapping[str, Any], *, indent: int | None = None) -> bytes:
    """A record of ours as JSON with its checksum, without a line end."""
    body = dumps({k: v for k, v in record.items() if k != CHECKSUM}, indent=indent)[:-1].rstrip().encode()
    gap, end = ("\n" + " " * indent, "\n") if indent else (" ", "")
    return body + f',{gap}"{CHECKSUM}": "{zlib.crc32(body):08x}"{end}}}'.encode()


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def parsed(content: bytes, kind: str | None, where: object, *, fix: str = RESTORE, what: str = "not readable as JSON") -> dict[str, Any]:
    """A record from its bytes: whole, one JSON object, and as ``schema.KINDS[kind]`` has it (None: of others, unchecked). DataError."""
    seal = SEAL.search(content, max(0, len(content) - SEAL_BYTES))
    if seal and zlib.crc32(content[: seal.start()]) != int(seal[1], 16):
        raise DataError("damaged: it does not have the checksum it was written with", where=where, fix=fix)
    try:
        record = json.loads(content.decode("utf-8"), parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{what} ({error})", where=where, fix=fix) from None
    if not isinstance(record, dict):
        raise DataError("not a JSON object", where=where, fix=fix)
    record.pop(CHECKSUM, None)
    if kind is not None:
        check(record, kind, where, fix=fix)
    return record
