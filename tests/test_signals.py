"""The end of the time that a run has: from a flag or from Slurm."""

import time

import pytest

from lorabatch.signals import Deadline, limit_seconds


def test_deadlines(monkeypatch, capsys):
    assert [limit_seconds(t) for t in ("90", "1:30:00", "0:00:07", "100:00:00")] == [
        5400,
        5400,
        7,
        360000,
    ]
    for text in ("", "1:30", "0", "0:00:00", "-5", "1h", "1:2:3:4", "²"):
        with pytest.raises(Exception, match="give minutes"):
            limit_seconds(text)
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 600))
    assert Deadline.from_flag_and_slurm(None).source == "the end of the Slurm job"
    assert Deadline.from_flag_and_slurm("5").source == "--time_limit 5"
    assert Deadline.from_flag_and_slurm("50").within(601) and not Deadline.from_flag_and_slurm(
        "50"
    ).within(500)
    monkeypatch.setenv("SLURM_JOB_END_TIME", "1000")
    assert not Deadline.from_flag_and_slurm(None).within(1e9)
    assert "in the past" in capsys.readouterr().err
