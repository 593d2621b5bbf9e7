"""Kills at file operations of ``lorabatch infer --shards`` and of its merge, with 2 to 4 workers on
one folder.

    PYTHONPATH=src:tests/shared python -m support.shard_kills MODEL FOLDER --kills 500

Prints counts as JSON; exits 1 at the first trial that does not end with every request exactly once,
as one run without shards gives them. Workers are forked from this process, which has imported
everything, and fork their own children: all else (claims, pipes, locks, the death of a child with
its parent) is real. A trial begins with an empty folder. The first worker dies at the next
operation in turn, so that each one is met; the others at random ones.

    owner: the worker alone, its child by the kernel    group: both at once
    child: the child, once a trial (two deaths alone are a reason for quarantine)    stop: both
    stand still beyond the time-out
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import torch

from lorabatch import records
from lorabatch.cli import main
from lorabatch.cluster import child
from lorabatch.infer import ranges
from support.commands import infer_flags, write_rows
from support.forked import Forked

TRIAL_S = 120
EVENTS = ("os.mkdir", "os.rename", "os.remove", "os.utime", "os.truncate")


class FileOperations:
    """Counts this process's changes of files in ``folder``; at the chosen one ``act`` is called
    first."""

    def __init__(self, folder, number, act):
        self.count, self._folder, self._number, self._act = 0, str(folder), number, act
        sys.addaudithook(self._hook)
        fsync, write = os.fsync, records.JsonlWriter.write

        def counted_fsync(descriptor):
            self.met("fsync")
            fsync(descriptor)

        def counted_write(writer, record):
            self.met("write", lambda: os.write(writer._file.fileno(), b'{"index": 0, "sam'))  # torn
            return write(writer, record)

        os.fsync, records.JsonlWriter.write = counted_fsync, counted_write

    def _hook(self, event, args):
        opens = (
            event == "open"
            and isinstance(args[2], int)
            and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        )
        if (opens or event in EVENTS) and str(args[0]).startswith(self._folder):
            self.met(event)

    def met(self, event, first=lambda: None):
        self.count += 1
        if self.count == self._number:
            first()
            self._act(event)


def start(argv, folder, log, *, how="none", number=0, notes):
    """A worker in a session of its own; notes: a file to which what happened is added."""

    def act(event, *, victim):
        with open(notes, "a", encoding="utf-8") as file:
            file.write(f"{victim} {event}\n")
        if victim in ("group", "stop"):
            os.killpg(0, signal.SIGSTOP if victim == "stop" else signal.SIGKILL)
        else:
            os.kill(os.getpid(), signal.SIGKILL)

    pid = os.fork()
    if pid:
        return pid
    os.setsid()
    torch.set_num_threads(1)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    doomed = [how == "child"]

    def spawn(module, words, **options):
        assert module == "lorabatch.infer.ranges"
        mine, doomed[0] = doomed[0], False

        def run():
            operations.count, operations._number, operations._act = (
                0,
                number if mine else -1,
                lambda event: act(event, victim="child"),
            )
            ranges.serve(int(words[0]))

        return Forked(run, **options)

    child.spawn = spawn
    operations = FileOperations(
        folder, -1 if how in ("none", "child") else number, lambda event: act(event, victim=how)
    )
    code = 1
    try:
        code = main(argv)
        with open(notes, "a", encoding="utf-8") as file:
            file.write(f"count {operations.count}\n")
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def ends(pids):
    """Exit codes by process; those that stand still have none yet."""
    codes, end = {}, time.monotonic() + TRIAL_S
    while len(codes) < len(pids):
        for pid in pids:
            if pid not in codes:
                found, status = os.waitpid(pid, os.WNOHANG | os.WUNTRACED)
                if found:
                    codes[pid] = (
                        None if os.WIFSTOPPED(status) else os.waitstatus_to_exitcode(status)
                    )
        assert time.monotonic() < end, f"hangs: {[pid for pid in pids if pid not in codes]}"
        time.sleep(0.01)
    return codes


def results(folder):
    """What every completion says, without its times, in the order of the file."""
    lines = map(json.loads, (folder / "completions.jsonl").read_text(encoding="utf-8").splitlines())
    return [
        (
            r["index"],
            r["sample"],
            r["id"],
            r["seed"],
            r["text"],
            r["error"],
            r["key"],
            r["output_tokens"],
        )
        for r in lines
    ]


def trial(words, folder, reference, generator, first_number, operations, counts):
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    notes, log, run = folder / "notes", folder / "log", folder / "run"
    notes.touch()
    argv = [
        *words,
        "--output_dir",
        str(run),
        "--shards",
        str(generator.choice((1, 2, 3, 5, 9))),
        "--claim_timeout_s",
        "2",
    ]
    stopped, numbers, child_left = [], [first_number], 1
    for _ in range(generator.choice((1, 1, 2, 3))):
        doomed = []
        for _ in range(generator.randint(2, 4)):
            how = generator.choices(
                ("owner", "group", "child", "stop"), (10, 5, 3 * child_left, 1)
            )[0]
            child_left -= how == "child"
            number = (
                numbers.pop()
                if numbers and how != "child"
                else generator.randint(1, max(2, operations * 2 // 3))
            )
            doomed.append(start(argv, run, log, how=how, number=number, notes=notes))
            time.sleep(generator.choice((0, 0, 0.1)))
        codes = ends(doomed)
        stopped += [pid for pid, code in codes.items() if code is None]
        assert set(codes.values()) <= {0, -signal.SIGKILL, None}, f"{codes}\n{log.read_text()}"
    codes = ends([start(argv, run, log, notes=notes) for _ in range(generator.randint(2, 4))])
    assert set(codes.values()) == {0}, f"{codes}\n{log.read_text()}"
    assert results(run) == reference, f"other completions in {run}\n{log.read_text()}"
    for pid in stopped:
        os.killpg(pid, signal.SIGCONT)
    codes = ends(stopped)
    assert set(codes.values()) <= {0}, f"{codes} after standing still\n{log.read_text()}"
    assert results(run) == reference, (
        f"other completions in {run} after one woke up\n{log.read_text()}"
    )
    figures = json.loads((run / "metrics.json").read_text())
    assert figures["quarantined"] == [] and figures["completed"] == sum(
        r[5] is None for r in reference
    ), figures
    assert json.loads((run / "run.json").read_text())["status"] == "completed"
    for line in notes.read_text().splitlines():
        if not line.startswith("count"):
            victim, event = line.split()
            counts[victim] += 1
            counts[f"at {event}"] += 1
    counts["trials"] += 1


def run(model, folder, *, kills, seed):
    """Counts of what was done. AssertionError at the first trial that ends otherwise than it
    should."""
    folder.mkdir(parents=True, exist_ok=True)
    prompts = folder / "prompts.jsonl"
    rows = [{"id": f"p{i}", "prompt": f"The patient in bed {i} has a fever"} for i in range(9)]
    rows[4], rows[7]["n"] = {"id": "bad", "prompt": ""}, 2
    write_rows(prompts, rows)
    fixed = "--batch_size 3 --max_new_tokens 6 --temperature 0.9 --output_order input"
    words = infer_flags(model, prompts, "nowhere", *fixed.split())
    notes = folder / "notes"
    plain, sharded = folder / "plain", folder / "sharded"
    for target, more in ((plain, []), (sharded, ["--shards", "3"])):
        shutil.rmtree(target, ignore_errors=True)
        pid = start(
            [*words, "--output_dir", str(target), *more], target, folder / "log", notes=notes
        )
        assert ends([pid]) == {pid: 0}, (folder / "log").read_text()
    operations = int(notes.read_text().split()[-1])
    reference, counts, generator = results(plain), Counter(), random.Random(seed)
    begin = time.monotonic()
    number = 0
    while counts["owner"] + counts["group"] + counts["child"] < kills:
        number += 1
        trial(
            words,
            folder / "trial",
            reference,
            generator,
            1 + number % operations,
            operations,
            counts,
        )
    done = counts["owner"] + counts["group"] + counts["child"]
    return {
        "kills": done,
        "operations of one worker": operations,
        "seconds": round(time.monotonic() - begin, 1),
        **counts,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=500)
    parser.add_argument("--seed", type=int, default=1)
    flags = parser.parse_args()
    print(
        json.dumps(run(flags.model, flags.folder, kills=flags.kills, seed=flags.seed)), flush=True
    )
