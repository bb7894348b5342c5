"""
Runs: one at a time, ended by their terminal, undisturbed on their way back; and the files that they leave.
"""

import os
import signal
import stat

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


@pytest.mark.parametrize("content", ["text", b"bytes"])
def test_a_file_is_whole_and_roots(minion, tmp_path, content):
    path = tmp_path / "file"
    path.write_text("before")
    minion.synapse_files.write(path, content, gid=os.getgid(), mode=0o640)
    assert path.read_bytes() == (content if isinstance(content, bytes) else content.encode())
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_a_file_that_cannot_be_written_stays_as_it_was(minion, tmp_path):
    path = tmp_path / "file"
    path.write_text("before")
    with pytest.raises(TypeError):
        minion.synapse_files.write(path, None)
    assert path.read_text() == "before"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
