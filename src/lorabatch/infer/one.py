"""``lorabatch infer --prompt``: one answer on stdout and nothing else; no run folder."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from dataclasses import fields

from lorabatch.config import InferConfig
from lorabatch.errors import DataError, UsageError
from lorabatch.infer.constraints import of_flags

# Flags of a run folder, of a file of prompts, or of what stands in a record.
OF_FILES = (
    *("prompts", "output_dir", "resume", "overwrite", "fail_on_error", "retry_failed", "iters"),
    *(
        "output_order",
        "output_format",
        "rows",
        "shards",
        "leave_early",
        "adapters",
        "logprobs",
        "dry_run",
    ),
)


def run_prompt(config: InferConfig) -> int:
    """Returns the exit code. UsageError for flags that need a file, DataError for a prompt that
    cannot be completed."""
    assert config.prompt is not None
    for field in fields(InferConfig):
        if field.name in OF_FILES and getattr(config, field.name) != field.default:
            raise UsageError(
                "not with --prompt, which reads and writes no file",
                where=f"--{field.name}",
                fix="use --prompts FILE, or leave it out",
            )
    if not config.prompt.strip():
        raise DataError("empty prompt", where="--prompt", fix="give a text")
    grammar = of_flags(config)
    from lorabatch.infer.requests import SamplingParams
    from lorabatch.infer.session import Session
    from lorabatch.infer.stream import Streams

    with redirect_stdout(sys.stderr):
        session = Session(config)
    requests = session.requests(config.prompt, SamplingParams.of(config), index=0, grammar=grammar)
    streams = Streams(session.loaded.tokenizer, [""] * len(requests))
    completed = session.complete(requests, streams.grow)
    streams.end(completed)
    if not any(request.text.strip() for request in completed):
        hint = "ended at once; --min_new_tokens 8 asks for text, lorabatch chat asks a chat model"
        print(f"the completion is empty: the model {hint}", file=sys.stderr)
    return 0
