"""``python -m lorabatch``, the ``lorabatch`` command and the scripts in ``src/``: Ctrl-C has its one line from here on."""

import os
import sys


def _leave(*_: object) -> None:
    """Nothing is begun yet, and an exception in the middle of an import may be swallowed or shown with its traceback."""
    os.write(2, b"lorabatch: interrupted\n")
    os._exit(130)


def start(command: str | None = None, *, prog: str | None = None) -> int:
    """Import the program and run it, or one command of it, with the arguments of this process. Returns the exit code."""
    try:
        import signal

        early = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # not where the shell lets us ignore it
        if early:
            signal.signal(signal.SIGINT, _leave)
        from lorabatch.cli import main, run_command

        if early:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        return main() if command is None else run_command(command, sys.argv[1:], prog=prog)
    except KeyboardInterrupt:
        _leave()
        raise


if __name__ == "__main__":
    sys.exit(start())
