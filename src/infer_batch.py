"""Complete prompts in batches: ``python src/infer_batch.py`` is ``lorabatch infer`` from a bare checkout."""

import sys

from lorabatch.cli import run_command

if __name__ == "__main__":
    sys.exit(run_command("infer", sys.argv[1:], prog="infer_batch.py"))
