"""OpenAI's batch interface: its input lines as our rows, our completions as its output lines.

Input:  {"custom_id", "method", "url", "body": {"messages" | "prompt", "max_tokens", "temperature",
…}}
Output: {"id", "custom_id", "response": {"status_code", "request_id", "body"} | null, "error": {…} |
null}
"""

from __future__ import annotations

from collections.abc import Container, Sequence

from lorabatch.errors import DataError
from lorabatch.schema import Fields, Record

URLS = ("/v1/chat/completions", "/v1/completions")
NAMES = {"max_tokens": "max_new_tokens", "max_completion_tokens": "max_new_tokens"}


def is_line(row: Fields) -> bool:
    return "custom_id" in row and "body" in row


def as_row(line: Fields, where: str, *, adapters: Container[str] = ()) -> tuple[Record, str | None]:
    """(a row as ``prompts`` reads it, what is wrong with it); fields that it does not know keep
    their names, so that they are listed as ignored.

    ``model`` chooses the adapter of that name; any other name means the base, as where there are no
    adapters. Parameters that the body leaves out take the run's flags, not OpenAI's defaults.
    """
    if not isinstance(line["body"], dict):
        raise DataError("'body' is not an object", where=where, fix="fix the line")
    # clients write null for "not set"
    given = {name: value for name, value in line["body"].items() if value is not None}
    row = _settings(given, adapters) | {"id": line["custom_id"]}
    return row, _fault(line, given, row)


def _settings(given: Fields, adapters: Container[str]) -> Record:
    body = {NAMES.get(name, name): value for name, value in given.items()}
    # chat: a switch and a number; completions: one number
    if isinstance(body.get("logprobs"), bool):
        wanted, top = body.pop("logprobs"), body.pop("top_logprobs", 0)
        body |= {"logprobs": top} if wanted else {}
    if body.get("model") in adapters:
        body["adapter"] = body.pop("model")
    elif adapters and "model" in body:
        body[f"model '{body.pop('model')}' (none of --adapters: the base answers)"] = None
    return body


def _fault(line: Fields, given: Fields, row: Fields) -> str | None:
    if line.get("url") not in (None, *URLS):
        return f"url '{line['url']}' is not one of {', '.join(URLS)}"
    if "prompt" not in row and "messages" not in row:
        return "the body has neither 'messages' nor 'prompt'"
    if any(given[name] != row[ours] for name, ours in NAMES.items() if name in given):
        return f"more than one of {', '.join(NAMES)} is given"
    return None


def output_line(
    records: Sequence[Fields], *, model: str, created: int, adapters: Container[str] = ()
) -> Record:
    """The output line of one prompt from its completions, in order of their samples; its model is
    the adapter, where one was chosen."""
    first = records[0]
    line = {
        "id": f"batch_req_{first['key']}",
        "custom_id": first["id"],
        "response": None,
        "error": None,
    }
    if error := next((r["error"] for r in records if r["error"]), None):
        return line | {"error": {"code": "invalid_request", "message": error}}
    body = {
        "id": ("chatcmpl-" if first["chat"] else "cmpl-") + first["key"],
        "object": "chat.completion" if first["chat"] else "text_completion",
        "created": created,
        "model": first["adapter"] if first["adapter"] in adapters else model,
        "choices": [_choice(record) for record in records],
        "usage": _usage(records),
    }
    return line | {"response": {"status_code": 200, "request_id": first["key"], "body": body}}


def _usage(records: Sequence[Fields]) -> Record:
    prompt, completion = records[0]["input_tokens"], sum(r["output_tokens"] for r in records)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }


def _choice(record: Fields) -> Record:
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
            "top_logprobs": [
                {t["token"]: t["logprob"] for t in e["top_logprobs"]} for e in entries
            ],
        }
    return choice | {"text": record["text"], "logprobs": logprobs}
