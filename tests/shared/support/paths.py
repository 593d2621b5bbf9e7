"""Where things lie in the repository, wherever the test that asks lies."""

from pathlib import Path

TESTS = Path(__file__).parents[2]
SHARED = TESTS / "shared"  # where this package is found
ROOT = TESTS.parent
SRC = ROOT / "src"
SAMPLE = ROOT / "data_sample"
GOLDEN = TESTS / "golden"
