"""Complete prompts in batches: ``python src/infer_batch.py`` is ``lorabatch infer`` from a bare
checkout."""

import sys

from lorabatch.__main__ import start

if __name__ == "__main__":
    sys.exit(start("infer", prog="infer_batch.py"))
