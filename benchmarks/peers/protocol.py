"""How benchmarks/infer.py and an engine talk: JSON lines, token ids in, token ids out.

An engine is started once with ``--model FOLDER --mode exact|int8 --cache DIR --threads N`` and
keeps its model loaded. Its first line says that it is ready; then each line on stdin is one round,
``{"prompts": [[id, …], …], "max_new_tokens": 64}``, answered by ``{"outputs": [[id, …], …]}``.
Greedy, never ended by an end-of-text token. No tokenizer on either side: every engine sees the same
ids, and the runner counts the ids that come back and holds the clock.
"""

import argparse
import ctypes
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

Generate = Callable[[list[list[int]], int], list[list[int]]]
PR_SET_PDEATHSIG = 1  # of prctl(2), Linux
NO_SUCH_MODE = 3  # exit status: this engine has no such mode


def serve(load: Callable[[argparse.Namespace], tuple[Generate, str]], *packages: str) -> None:
    """Answer rounds until stdin ends. ``load(options)`` returns the generating function and what it
    computes in."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--mode", choices=("exact", "int8"), required=True)
    parser.add_argument("--cache", type=Path, required=True, help="where converted models are kept")
    parser.add_argument("--threads", type=int, required=True)
    options = parser.parse_args()
    # a stopped engine must not outlive a runner that is killed
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print must not get between the answers
    start = time.perf_counter()
    generate, dtype = load(options)
    versions = {name: metadata.version(name) for name in packages}
    channel.write(
        json.dumps({"startup_s": time.perf_counter() - start, "dtype": dtype, "versions": versions})
        + "\n"
    )
    for line in sys.stdin:
        job = json.loads(line)
        outputs = generate(job["prompts"], job["max_new_tokens"])
        channel.write(json.dumps({"outputs": outputs}) + "\n")


def converted(folder: Path, convert: Callable[[Path], None]) -> Path:
    """``folder``, made by ``convert(temporary)`` if it is not there yet. The conversion is part of
    no measurement."""
    if not folder.exists():
        temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
        temporary.parent.mkdir(parents=True, exist_ok=True)
        convert(temporary)
        temporary.rename(folder)
    return folder


def has_no_mode(why: str) -> None:
    print(why, file=sys.stderr)
    sys.exit(NO_SUCH_MODE)
