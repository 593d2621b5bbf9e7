"""``python -m lorabatch``, the ``lorabatch`` command and the scripts in ``src/``: Ctrl-C has its
one line from here on, so nothing that takes time is imported before it is heard."""

import os
import sys

INTERRUPTED = 130
NEEDED = ("torch", "transformers", "regex")  # a Python without one of these is not the project's


def _leave(*_: object) -> None:
    """Nothing is begun yet, and an exception in the middle of an import may be swallowed or shown
    with its traceback."""
    os.write(2, b"lorabatch: interrupted\n")
    os._exit(INTERRUPTED)


def _use_project_python() -> None:
    """Replace this process by the same command under the checkout's own Python, where this one
    lacks what ``scripts/build.sh`` installed. Exits with 69 where nothing was built yet."""
    import importlib.util
    from pathlib import Path

    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if not missing:
        return
    checkout = Path(__file__).resolve().parents[2]
    folder = Path(os.environ.get("VENV") or checkout / ".venv")
    python = folder / "bin" / "python"
    if Path(sys.prefix).resolve() == folder.resolve() or not os.access(python, os.X_OK):
        build = f"bash {checkout / 'scripts' / 'build.sh'}"
        print(
            f"lorabatch: this Python ({sys.executable}) has no {missing[0]}; run: {build}",
            file=sys.stderr,
        )
        raise SystemExit(69)
    print(
        f"lorabatch: this Python has no {missing[0]}: using {python}", file=sys.stderr, flush=True
    )
    os.execv(python, [str(python), *sys.argv])


def start(command: str | None = None, *, prog: str | None = None) -> int:
    """Import the program and run it, or one command of it, with the arguments of this process.
    Returns the exit code. prog: the script in ``src/`` that was started, if one was: it finds the
    project's environment itself."""
    try:
        import signal

        # not where the shell lets us ignore it
        early = signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if early:
            signal.signal(signal.SIGINT, _leave)
        if prog is not None:
            _use_project_python()
        from lorabatch.cli import main, run_command

        if early:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        code = main() if command is None else run_command(command, sys.argv[1:], prog=prog)
        if code == INTERRUPTED:
            # Python would end with the signal where C code of an import had met it first
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        return code
    except KeyboardInterrupt:
        _leave()
        raise


if __name__ == "__main__":
    sys.exit(start())
