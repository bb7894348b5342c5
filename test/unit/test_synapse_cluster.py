"""
How a cluster of PostgreSQL starts and stops, with Debian's unit around it.
"""

import pytest
from salt.exceptions import CommandExecutionError

NAME, UNIT = "15/main", "postgresql@15-main.service"


class Machine:
    """One cluster on a machine: what systemd does with it is a list of its states, one for each time that it is asked."""

    def __init__(self, *course):
        # Each: the unit's state, systemd's job for it, whether the server is there, whether it answers.
        self.course, self.asked = list(course), []

    def run_all(self, words, **kwargs):
        self.asked.append(words)
        state, job, _, answers = self.course.pop(0) if len(self.course) > 1 else self.course[0]
        if words[0] != "systemctl":
            return {"retcode": 0 if answers else 2, "stdout": "", "stderr": ""}
        return {"retcode": 0, "stdout": f"Job={job}\nActiveState={state}", "stderr": ""}

    def did(self):
        return [words[1:] for words in self.asked if words[0] == "systemctl" and words[1] != "show"]


@pytest.fixture
def run(minion, monkeypatch):
    cluster = minion.synapse_cluster

    def on(machine, verb):
        found = {"version": 15, "port": 5432, "sockets": "/run", "data": "/data", "log": "/nonexistent"}
        monkeypatch.setattr(cluster, "_runs", lambda data: machine.course[0][2])
        monkeypatch.setattr(cluster, "clusters", lambda: {NAME: {**found, "running": machine.course[0][2]}})
        minion.salt["cmd.run_all"] = machine.run_all
        return getattr(cluster, verb)(NAME)

    return on


DOWN, COMING, UP = ("inactive", "", False, False), ("activating", "7", True, False), ("active", "", True, True)


def test_a_cluster_that_answers_is_left_alone(run):
    machine = Machine(UP)
    assert run(machine, "start") is False
    assert machine.did() == []


@pytest.mark.parametrize(
    ("course", "verb"),
    [
        ([DOWN, ("inactive", "7", False, False), COMING, COMING, UP], "restart"),
        # It answers while pg_ctlcluster still waits.
        ([DOWN, COMING, ("activating", "7", True, True)], "restart"),
        # It recovers, or a stop of it is under way.
        ([("activating", "", True, False), COMING, UP], "start"),
        # It is being started already.
        ([("activating", "7", False, False), ("activating", "7", False, False), COMING, UP], "start"),
        ([("deactivating", "7", True, False), ("inactive", "8", False, False), COMING, UP], "start"),
    ],
)
def test_a_start_is_over_when_the_server_answers(run, course, verb):
    machine = Machine(*course)
    assert run(machine, "start") is True
    assert machine.did() == [[verb, "--no-block", UNIT]]


@pytest.mark.parametrize("end", [DOWN, ("failed", "0", False, False)])
def test_a_server_that_went_is_no_start(run, end):
    with pytest.raises(CommandExecutionError, match="PostgreSQL 15/main does not start; its log ends"):
        run(Machine(DOWN, COMING, end), "start")


def test_a_server_that_never_answers_is_not_waited_for_forever(run, minion, monkeypatch):
    monkeypatch.setattr(minion.synapse_cluster, "LONGEST_START", 0.2)
    with pytest.raises(CommandExecutionError, match="does not start"):
        run(Machine(DOWN, ("active", "", True, False)), "start")


@pytest.mark.parametrize(
    ("state", "asked"),
    [
        (("active", "", True, True), [["stop", UNIT]]),
        # What systemd calls off is killed.
        (("activating", "7", True, True), [["start", UNIT], ["stop", UNIT]]),
        (("deactivating", "7", True, False), [["stop", UNIT]]),
    ],
)
def test_a_stop_lets_a_start_come_to_its_end(run, state, asked):
    machine = Machine(state, DOWN)
    assert run(machine, "stop") == [NAME]
    assert machine.did() == asked
