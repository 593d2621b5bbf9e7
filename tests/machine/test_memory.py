"""The largest memory of a process is its own."""

from support.processes import python

HELD_BYTES = 400 << 20


def test_a_process_does_not_inherit_its_parents_peak():
    """``getrusage`` hands a parent's peak on to its child; metrics.json must not."""
    held = b"x" * HELD_BYTES
    done = python(
        "from lorabatch.machine.memory import peak_memory_bytes\n"
        "before = peak_memory_bytes()\n"
        f"held = b'x' * {HELD_BYTES // 4}\n"
        "print(before, peak_memory_bytes())"
    )
    before, after = map(int, done.stdout.split())
    assert before < len(held) // 4 < after < len(held)
