"""What every record of ours holds, and how it is written as JSON and checked when it is read: one
table (``KINDS``) for all of them.

A kind of record is the name of its file (where that says too little, a name of its own). What its
fields may be is written as ``lorabatch.rules`` has it.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from lorabatch.errors import DataError
from lorabatch.rules import (
    ANY,
    COUNT,
    DIGITS,
    FLAG,
    INT,
    MOMENT,
    NUMBER,
    POSITIVE,
    PROCESS,
    TEXT,
    Maybe,
    Variants,
    one_of,
    whole,
    wrong,
)

Record = dict[str, Any]  # a JSON object
Fields = Mapping[str, Any]  # one that is only read

SCHEMA_VERSION = 1
CHECKSUM = "crc32"
SEAL = re.compile(rb',\s+"crc32": "([0-9a-f]{8})"\s*}\s*\Z')
SEAL_BYTES = 40  # at most
RESTORE = "restore or remove the file"


class NewerRecord(DataError):
    """Written by a version that knows more than this one: never guessed at, never taken for
    damage."""


@dataclass(frozen=True)
class Kind:
    fields: object
    version: int = SCHEMA_VERSION
    needs_version: bool = False  # every version of it wrote its number


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
    **dict.fromkeys(
        ("base_model", "adapter_dir", "prompts", "output_format", "quantize"), Maybe(TEXT)
    ),
    "temperature": Maybe(NUMBER),
    "adapters": Maybe([TEXT]),
}
GPU = {"name": Maybe(TEXT), "memory_bytes": Maybe(COUNT)}
MODEL = {
    **dict.fromkeys(("name", "converted_from", "fingerprint", "adapter"), Maybe(TEXT)),
    **dict.fromkeys(("trainable_params", "base_params"), Maybe(COUNT)),
    "trainable_share": Maybe(NUMBER),
}
ESTIMATE = {**dict.fromkeys(("median", "low", "high"), Maybe(NUMBER)), "values": [NUMBER]}
EVALUATION = {
    "loss": Maybe(NUMBER),
    "tokens": COUNT,
    "seconds": NUMBER,
    "bits_per_byte": Maybe(NUMBER),
}
COUNTERS = {
    **dict.fromkeys(
        (
            "step",
            "total_steps",
            "tokens",
            "targets",
            "squared_lengths",
            "epoch",
            "evals_without_gain",
        ),
        COUNT,
    ),
    **dict.fromkeys(("train_s", "epoch_start_s"), NUMBER),
    **dict.fromkeys(("first_eval", "last_eval", "best_eval"), Maybe(EVALUATION)),
    **dict.fromkeys(("last_eval_step", "best_step"), Maybe(COUNT)),
    "epoch_s": [NUMBER],
    "last_loss": Maybe(NUMBER),
    "reason": TEXT,
}
CHECKS = {
    "seconds": NUMBER,
    "files": [{"path": TEXT, "sha256": TEXT}],
    "checks": [{"check": TEXT, "level": TEXT, "count": COUNT, "share": NUMBER}],
}
LOGPROB = {"token": TEXT, "logprob": Maybe(NUMBER, missing=False)}
SCALER = {
    "scale": NUMBER,
    **dict.fromkeys(("grow_every", "good_steps", "overflows", "overflows_in_a_row"), COUNT),
}

KINDS: dict[str, Kind] = {
    "run.json": Kind(
        {
            "kind": one_of("train", "infer", "eval"),
            "status": TEXT,
            "command": [TEXT],
            "config": CONFIG,
            "environment": ENVIRONMENT,
            **dict.fromkeys(
                ("run_id", "error", "signal", "device", "dtype", "backend"), Maybe(TEXT)
            ),
            **dict.fromkeys(("started_at", "finished_at"), Maybe(MOMENT)),
            "resumed": Maybe([{"step": COUNT, "from": TEXT}]),
            **dict.fromkeys(("threads", "planned_steps"), Maybe(POSITIVE)),
            "requests": Maybe({"total": COUNT, "earlier": COUNT, "begun_at": MOMENT}),
            "gpu": Maybe(GPU),
            "model": Maybe(MODEL),
            "data": Maybe(
                {
                    **dict.fromkeys(("train", "val"), Maybe({"*": Maybe(NUMBER)})),
                    "checks": Maybe(CHECKS),
                }
            ),
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
                "step": {
                    "step": INT,
                    "tokens": Maybe(COUNT),
                    **dict.fromkeys(("loss", "lr", "tokens_per_s"), NUMBER),
                },
                "eval": {
                    "step": INT,
                    **dict.fromkeys(("eval_loss", "bits_per_byte"), Maybe(NUMBER)),
                },
            },
        )
    ),
    "system.jsonl": Kind(
        {
            "t_s": NUMBER,
            **dict.fromkeys(
                (
                    "cpu_percent",
                    "rss_bytes",
                    "gpu_util_percent",
                    "gpu_memory_bytes",
                    "gpu_power_w",
                    "read_bytes_per_s",
                    "write_bytes_per_s",
                ),
                Maybe(NUMBER),
            ),
        }
    ),
    "completions.jsonl": Kind(
        {
            **dict.fromkeys(("id", "prompt", "text"), TEXT),
            "key": DIGITS,
            "index": whole(0, 2.0**42),  # both fit into one number
            "sample": whole(0, 2.0**20),
            **dict.fromkeys(("input_tokens", "output_tokens"), COUNT),
            **dict.fromkeys(
                ("finish_reason", "truncated", "error", "adapter"), Maybe(TEXT, missing=False)
            ),
            **dict.fromkeys(("queue_ms", "ttft_ms", "e2el_ms"), Maybe(NUMBER, missing=False)),
            "chat": FLAG,
            "logprobs": Maybe([LOGPROB | {"top_logprobs": [LOGPROB]}], missing=False),
        }
    ),
    "check.json": Kind(CHECKS | {"finished_at": MOMENT}, needs_version=True),
    "findings.jsonl": Kind(
        {
            **dict.fromkeys(("check", "where"), TEXT),
            **dict.fromkeys(("partner", "kind", "masked"), Maybe(TEXT)),
            "figure": Maybe(NUMBER),
        }
    ),
    "items.jsonl": Kind(
        {
            **dict.fromkeys(("task", "id", "group", "model"), TEXT),
            "domain": Maybe(TEXT),
            **dict.fromkeys(("content", "key"), DIGITS),
            "tokens": COUNT,
            "nll": Maybe(NUMBER),
            "bytes": Maybe(POSITIVE),
            "option_nll": Maybe([NUMBER]),
            "option_sizes": Maybe([POSITIVE]),
            "answer": Maybe(COUNT),
            "chrf": Maybe(NUMBER),
            **dict.fromkeys(("exact", "empty"), Maybe(FLAG)),
            "finish_reason": Maybe(TEXT),
        }
    ),
    "eval.json": Kind(
        {
            "tasks": [
                {
                    **dict.fromkeys(("task", "measure"), TEXT),
                    "kind": one_of("documents", "choice", "generation"),
                    **dict.fromkeys(("items", "clusters"), POSITIVE),
                    "models": {"*": {"value": NUMBER}},
                    **dict.fromkeys(("chance", "majority"), Maybe(NUMBER)),
                    "domains": Maybe({"*": {"items": POSITIVE, "models": {"*": NUMBER}}}),
                }
            ],
            "comparisons": [
                {
                    **dict.fromkeys(("task", "measure", "model", "against", "verdict"), TEXT),
                    **dict.fromkeys(("items", "clusters"), POSITIVE),
                    **dict.fromkeys(("improved", "worsened"), COUNT),
                    **dict.fromkeys(("difference", "p", "adjusted_p"), NUMBER),
                    **dict.fromkeys(("low", "high", "can_show"), Maybe(NUMBER)),
                    "reason": Maybe(TEXT),
                }
            ],
            "forgetting": Maybe(
                [
                    {
                        "model": TEXT,
                        "relative": NUMBER,
                        **dict.fromkeys(("low", "high"), Maybe(NUMBER)),
                        "reason": Maybe(TEXT),
                        "forgets": FLAG,
                    }
                ]
            ),
            "warnings": [
                {
                    **dict.fromkeys(("kind", "text"), TEXT),
                    **dict.fromkeys(("task", "model"), Maybe(TEXT)),
                    **dict.fromkeys(("count", "items"), Maybe(COUNT)),
                }
            ],
        },
        needs_version=True,
    ),
    "plan.json": Kind(
        {"prompts_sha256": TEXT, "adapters_sha256": {"*": TEXT}, "bounds": [COUNT], "config": FREE},
        needs_version=True,
    ),
    # its DONE.json
    "shard": Kind({"files": [TEXT], **dict.fromkeys(("quarantined", "work_keys"), Maybe([TEXT]))}),
    # its DONE.json, of a sweep
    "task": Kind({"trials": {"*": {"value": Maybe(NUMBER), "error": Maybe(TEXT), "run": TEXT}}}),
    "sweep.json": Kind({"sweep": FREE, "trials": [FREE], "tasks": [[COUNT]]}, version=2),
    "leaderboard.json": Kind(
        {
            "metric": TEXT,
            "rows": [
                {
                    "point": FREE,
                    "runs": COUNT,
                    "folders": [TEXT],
                    "errors": [TEXT],
                    **dict.fromkeys(("mean", "half_width", "behind"), Maybe(NUMBER)),
                    "behind_half_width": Maybe(NUMBER),
                }
            ],
        },
        version=2,
    ),
    "claim": Kind(
        {
            "host": TEXT,
            "pid": PROCESS,
            **dict.fromkeys(("where", "job"), Maybe(TEXT)),
            "started": Maybe(COUNT),
        }
    ),
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
                    **dict.fromkeys(
                        ("weak_tokens_per_s", "batch_latency_ms", "step_ms"), Maybe(ESTIMATE)
                    ),
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
                (
                    *(f"{t}_{end}" for t in TYPES for end in ("flops_per_s", "cold_flops_per_s")),
                    "read_bytes_per_s",
                ),
                Maybe(NUMBER),
            ),
            "measurements": Maybe({"*": NUMBER}),
            "waited_shares": Maybe({"*": Maybe(NUMBER)}),
        }
    ),
    "COMPLETE": Kind(
        {name: {"bytes": COUNT, "sha256": TEXT} for name in ("state.safetensors", "state.json")}
    ),
    "state.json": Kind(
        {
            "step": COUNT,
            "learner": {"counters": COUNTERS, "scaler": Maybe(SCALER)},
            "identity": {
                "settings": FREE,
                "content": {"dtype": one_of("fp32", "bf16", "fp16")},
                "circumstances": FREE,
            },
            "events_bytes": COUNT,
        },
        needs_version=True,
    ),
    "lorabatch.json": Kind(
        dict.fromkeys(("base_name", "base_fingerprint", "adapter_sha256"), Maybe(TEXT))
    ),
    "MANIFEST.json": Kind(
        {"name": TEXT, "revision": Maybe(TEXT), "files": {"*": {"bytes": COUNT, "sha256": TEXT}}}
    ),
}


def check(record: Fields, kind: str, where: object, *, fix: str) -> None:
    """DataError that names the first field of a record that is not as its kind says; NewerRecord
    for a version to come."""
    rule = KINDS[kind]
    version = record.get("schema_version")
    if type(version) is int and version > rule.version:
        what = (
            f"written by a newer lorabatch (version {version} of this record, {rule.version} is "
            "the newest known here)"
        )
        raise NewerRecord(what, where=where, fix="update lorabatch, or choose another folder")
    known = {"schema_version": POSITIVE if rule.needs_version else Maybe(POSITIVE)}
    for what in (*wrong(record, known, ""), *wrong(record, rule.fields, "")):
        raise DataError(what, where=where, fix=fix)


def _plain(value: object) -> object:
    """JSON has no NaN: a value that is not a number is null, never a token other parsers refuse."""
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value


def dumps(record: Fields, *, indent: int | None = None) -> str:
    """JSON that can be encoded: of a file name that is not UTF-8 Python makes half surrogate pairs,
    which are written as escapes."""
    text = json.dumps(
        _plain(record), ensure_ascii=False, allow_nan=False, default=str, indent=indent
    )
    return text.encode(errors="backslashreplace").decode()


def sealed(record: Fields, *, indent: int | None = None) -> bytes:
    """A record of ours as JSON with its checksum, without a line end."""
    body = (
        dumps({k: v for k, v in record.items() if k != CHECKSUM}, indent=indent)[:-1]
        .rstrip()
        .encode()
    )
    gap, end = ("\n" + " " * indent, "\n") if indent else (" ", "")
    return body + f',{gap}"{CHECKSUM}": "{zlib.crc32(body):08x}"{end}}}'.encode()


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number in JSON")


def _iswhole(content: bytes) -> bool:
    """Whether a record has the checksum that it was written with, if it has one."""
    seal = SEAL.search(content, max(0, len(content) - SEAL_BYTES))
    return seal is None or zlib.crc32(content[: seal.start()]) == int(seal[1], 16)


def parsed(
    content: bytes,
    kind: str | None,
    where: object,
    *,
    fix: str = RESTORE,
    what: str = "not readable as JSON",
) -> Record:
    """A record from its bytes: whole, one JSON object, and as ``schema.KINDS[kind]`` has it (None:
    of others, unchecked). DataError."""
    if not _iswhole(content):
        raise DataError(
            "damaged: it does not have the checksum it was written with", where=where, fix=fix
        )
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
