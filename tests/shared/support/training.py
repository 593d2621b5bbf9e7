"""Training runs that are stopped and go on."""

import random
import shutil
import signal
import time

from support.commands import train_flags

STEPS = 12


def flags(model, corpus, save_dir, *more):
    """3 epochs of 4 steps, with dropout, evaluations every 3 steps and a checkpoint after every
    step."""
    fixed = (
        "--epochs 3 --batch_size 3 --lora_r 4 --lr 0.01 --lora_dropout 0.1 --eval_every_steps 3 "
        "--save_every_steps 1"
    )
    return train_flags(model, corpus, save_dir, *fixed.split(), *more)


def finish(attempts, argv, log, *, seed, kills):
    """Kill the run ``kills`` times at random instants of its whole length, then let it end; returns
    the exit codes."""
    generator, codes, longest = random.Random(seed), [], 1.0
    while True:
        killed = codes.count(-signal.SIGKILL)
        options = {"kill_after_s": generator.uniform(0, longest)} if killed < kills else {}
        start_s = time.perf_counter()
        codes.append(attempts(argv, log, **options))
        longest = max(longest, time.perf_counter() - start_s)
        if codes[-1] == 0 and killed >= kills:
            return codes
        if codes[-1] == 0:  # it was faster than the kill: start anew
            shutil.rmtree(argv[argv.index("--save_dir") + 1])
        assert codes[-1] in (0, -signal.SIGKILL), log.read_text()
