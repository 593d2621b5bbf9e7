"""OpenAI's batch interface: its input lines as our rows, our completions as its output lines.

Input:  {"custom_id", "method", "url", "body": {"messages" | "prompt", "max_tokens", "temperature", …}}
Output: {"id", "custom_id", "response": {"status_code", "request_id", "body"} | null, "error": {…} | null}
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from typing import Any

from lorabatch.errors import DataError

URLS = ("/v1/chat/completions", "/v1/completions")
NAMES = {"max_tokens": "max_new_tokens", "max_completion_tokens": "max_new_tokens"}


def is_line(row: Mapping[str, Any]) -> bool:
    return "custom_id" in row and "body" in row


def as_row(line: Mapping[str, Any], where: str, *, adapters: Container[str] = ()) -> tuple[dict[str, Any], str | None]:
    """(a row as ``prompts`` reads it, what is wrong with it); fields that it does not know keep their names, so that they are listed as ignored.

    ``model`` chooses the adapter of that name; any other name means the base, as where there are no adapters.
    Parameters that the body leaves out take the run's flags, not OpenAI's defaults.
    """
    if not isinstance(line["body"], dict):
        raise DataError("'body' is not an object", where=where, fix="mend the line")
    given: dict[str, Any] = line["body"]
    given = {k: v for k, v in given.items() if v is not None}  # clients write null for "not set"
    body = {NAMES.get(k, k): v for k, v in given.items()}
    if isinstance(body.get("logprobs"), bool):  # chat: a switch and a number; completions: one number
        wanted, top = body.pop("logprobs"), body.pop("top_logprobs", 0)
        body |= {"logprobs": top} if wanted else {}
    if body.get("model") in adapters:
        body["adapter"] = body.pop("model")
    elif adapters and "model" in body:
        body[f"model '{body.pop('model')}' (none of --adapters: the base answers)"] = None
    row = body | {"id": line["custom_id"]}
    error = None
    if line.get("url") not in (None, *URLS):
        error = f"url '{line['url']}' is not one of {', '.join(URLS)}"
    elif "prompt" not in row and "messages" not in row:
        error = "the body has neither 'messages' nor 'prompt'"
    elif any(given[k] != body[name] for k, name in NAMES.items() if k in given):
        error = f"more than one of {', '.join(NAMES)} is given"
    return row, error


def output_line(records: Sequence[Mapping[str, Any]], *, model: str, created: int, adapters: Container[str] = ()) -> dict[str, Any]:
    """The output line of one prompt from its completions, in order of their samples; its model is the adapter, where one was chosen."""
    first = records[0]
    line = {"id": f"batch_req_{first['key']}", "custom_id": first["id"], "response": None, "error": None}
    if error := next((r["error"] for r in records if r["error"]), None):
        return line | {"error": {"code": "invalid_request", "message": error}}
    tokens_in, tokens_out = first["input_tokens"], sum(r["output_tokens"] for r in records)
    body = {
        "id": ("chatcmpl-" if first["chat"] else "cmpl-") + first["key"],
        "object": "chat.completion" if first["chat"] else "text_completion",
        "created": created,
        "model": first["adapter"] if first["adapter"] in adapters else model,
        "choices": [_choice(r) for r in records],
        "usage": {"prompt_tokens": tokens_in, "completion_tokens": tokens_out, "total_tokens": tokens_in + tokens_out},
    }
    return line | {"response": {"status_code": 200, "request_id": first["key"], "body": body}}


def _choice(record: Mapping[str, Any]) -> dict[str, Any]:
    choice = {"index": record["sample"], "finish_reason": record["finish_reason"]}
    entries = record["logprobs"]
    if record["chat"]:
        content = {"message": {"role": "assistant", "content": record["text"]}}
        return choice | content | {"logprobs": None if entries is None else {"content": entries}}
    logprobs = None
    if entries is not None:
        logprobs = {
            "tokens": [e["token"] for e in entries],
            "token_logprobs": [e["logprob"] for e in entries],
            "top_logprobs": [{t["token"]: t["logprob"] for t in e["top_logprobs"]} for e in entries],
        }
    return choice | {"text": record["text"], "logprobs": logprobs}
