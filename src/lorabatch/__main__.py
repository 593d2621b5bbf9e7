"""``python -m lorabatch``: the same program as the ``lorabatch`` command."""

import sys

from lorabatch.cli import main

if __name__ == "__main__":
    sys.exit(main())
