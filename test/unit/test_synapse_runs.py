"""
Runs: one at a time, ended by their terminal, undisturbed on their way back.
"""

import signal

import pytest
from salt.exceptions import CommandExecutionError

SIGNALS = signal.SIGINT, signal.SIGTERM, signal.SIGHUP


def test_one_run_at_a_time(minion, tmp_path):
    runs, lock = minion.synapse_runs, tmp_path / "lock"
    assert not runs.busy(lock)
    with runs.alone(lock, "another one is at work"):
        assert runs.busy(lock)
        with (
            pytest.raises(CommandExecutionError, match="another one is at work"),
            runs.alone(lock, "another one is at work"),
        ):
            pass
    assert not runs.busy(lock)


def test_a_terminal_that_is_gone_ends_a_run_but_not_its_way_back(minion, tmp_path):
    runs, before = minion.synapse_runs, [signal.getsignal(number) for number in SIGNALS]
    with runs.alone(tmp_path / "lock", ""):
        with pytest.raises(KeyboardInterrupt, match="its terminal was closed"):
            signal.raise_signal(signal.SIGHUP)
        with runs.undisturbed():
            for number in SIGNALS:
                signal.raise_signal(number)
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_who_has_said_that_a_terminal_does_not_matter_is_heeded(minion, tmp_path):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with minion.synapse_runs.alone(tmp_path / "lock", ""):
        signal.raise_signal(signal.SIGHUP)
