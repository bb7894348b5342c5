"""The lock and the switch: who may take it, who may give it back, and what is said to others."""

import json
import pathlib

import pytest
from salt.exceptions import CommandExecutionError, SaltInvocationError


@pytest.fixture
def maintenance(minion, tmp_path):
    minion.move_to(tmp_path)
    minion.run(minion.good_pillar())
    (tmp_path / "data").mkdir()
    minion.synapse_maintenance.SWITCH = tmp_path / "nginx" / "switch"
    return minion.synapse_maintenance


def test_one_of_two_gets_the_lock_and_the_other_is_told_who(maintenance):
    assert maintenance.holder() is None
    assert maintenance.fault() is None
    assert maintenance.lock("alice", "new disks")
    held = maintenance.holder()
    assert (held["holder"], held["reason"]) == ("alice", "new disks")
    with pytest.raises(CommandExecutionError, match=rf"alice holds the lock .* since {held['since'][:10]}.*new disks"):
        maintenance.lock("bob", "an upgrade")
    assert maintenance.holder() == held
    assert [path.name for path in pathlib.Path(maintenance.lock_file()).parent.iterdir()] == ["maintenance.json"]


def test_the_holder_may_take_it_again_and_alone_gives_it_back(maintenance):
    assert maintenance.lock("alice", "new disks")
    assert not maintenance.lock("alice", "more disks")
    with pytest.raises(CommandExecutionError, match="start holder='alice'"):
        maintenance.unlock("bob")
    assert maintenance.unlock("alice")
    assert not maintenance.unlock("alice")
    assert maintenance.holder() is None


@pytest.mark.parametrize("text", ["", "by hand", "[]", "{}", json.dumps({"holder": "alice"})])
def test_a_lock_that_was_made_by_hand_is_a_lock(maintenance, text):
    pathlib.Path(maintenance.lock_file()).write_text(text)
    assert "somebody holds the lock" in maintenance.fault()
    with pytest.raises(CommandExecutionError, match="somebody holds the lock"):
        maintenance.lock("alice", "new disks")
    assert maintenance.unlock("somebody")


def test_in_the_middle_of_a_restore_the_lock_tells_how_to_end_that_and_nobody_starts_synapse(maintenance, minion):
    maintenance.lock("synapse_backup.restore", "restore")
    journal = {"backup": "/backups/20261124T220046Z", "phase": "switching"}
    minion.write("data/restore.json", json.dumps(journal))
    assert "start holder" not in maintenance.fault()
    assert maintenance.fault().endswith("To give it up: salt-call synapse_backup.undo")
    with pytest.raises(
        CommandExecutionError, match="was cut off while it was switching. To finish it: .*synapse_backup.rest"
    ):
        minion.synapse_process.start("synapse_backup.restore")
    assert maintenance.holder()


def test_in_the_middle_of_an_upgrade_the_lock_tells_how_to_end_that_and_nobody_starts_synapse(maintenance, minion):
    maintenance.lock("synapse_postgres.upgrade", "PostgreSQL 18")
    minion.salt["synapse_upgrade.fault"] = lambda: "To put it right: salt-call synapse_postgres.upgrade"
    assert maintenance.fault().endswith("nothing changes. To put it right: salt-call synapse_postgres.upgrade")
    with pytest.raises(CommandExecutionError, match="^To put it right"):
        minion.synapse_process.start("synapse_postgres.upgrade")
    assert maintenance.holder()


def test_where_nothing_is_deployed_there_is_no_lock_to_take(maintenance, tmp_path):
    (tmp_path / "data").rmdir()
    with pytest.raises(CommandExecutionError, match="is Synapse deployed here"):
        maintenance.lock("alice", "new disks")


def test_a_lock_that_is_given_back_in_between_can_be_taken(maintenance, monkeypatch):
    maintenance.lock("bob", "an upgrade")
    holder = maintenance.holder

    def given_back():
        pathlib.Path(maintenance.lock_file()).unlink(missing_ok=True)
        return holder()

    monkeypatch.setattr(maintenance, "holder", given_back)
    assert maintenance.lock("alice", "new disks")
    assert holder()["holder"] == "alice"


def test_a_closed_door_without_a_lock_is_named(maintenance, minion):
    assert maintenance.closed_fault() is None
    maintenance.SWITCH.parent.mkdir()
    maintenance.close()
    assert "nginx answers 503 to every user" in maintenance.closed_fault()
    maintenance.lock("alice", "new disks")
    assert maintenance.closed_fault() is None


def test_a_lock_is_taken_in_the_name_of_who_runs_it(maintenance, minion, monkeypatch):
    monkeypatch.setenv("SUDO_USER", "alice")
    maintenance.lock("sudo_bob", "new disks")
    for function in (minion.synapse_process.stop, minion.synapse_process.start):
        with pytest.raises(CommandExecutionError, match="sudo_bob holds the lock"):
            function()
    assert minion.synapse_process._caller() == "sudo_alice"


def test_the_switch_is_turned_once(maintenance):
    assert not maintenance.close(), "there is no nginx"
    maintenance.SWITCH.parent.mkdir()
    assert maintenance.close()
    assert not maintenance.close()
    assert maintenance.closed()
    assert maintenance.open_()
    assert not maintenance.open_()
    assert not maintenance.closed()


@pytest.mark.parametrize(
    "arguments", [{"grace": "soon"}, {"grace": -1}, {"grace": 0}, {"kill": "maybe"}, {"holder": ""}, {"holder": 7}]
)
def test_a_stop_with_a_wrong_argument_takes_no_lock(minion, maintenance, arguments):
    (name,) = arguments
    with pytest.raises(SaltInvocationError, match=rf"^{name}: .* is not "):
        minion.synapse_process.stop(**arguments)
    assert maintenance.holder() is None


def test_what_a_census_found_is_named_whatever_it_is(minion):
    counted = {
        "processes": [
            {"name": "matrix-synapse", "unit": "active", "container": "running"},
            {"name": "matrix-synapse-worker-0-generic", "unit": "failed", "container": "running"},
            {"name": "matrix-synapse-worker-1-generic", "unit": "inactive", "container": "exited"},
        ],
        "strays": [{"kind": "process", "id": 7, "about": "python -m synapse.app.homeserver"}],
        "sessions": [
            {"pid": 1, "process": "matrix-synapse", "client": "a socket"},
            {"pid": 2, "process": "matrix-synapse-worker-1-generic", "client": "a socket"},
            {"pid": 3, "process": "", "client": "192.0.2.1"},
        ],
        "sessions_fault": None,
    }
    assert minion.synapse_process.left(counted) == [
        "the unit matrix-synapse (active)",
        "the unit matrix-synapse-worker-0-generic (failed)",
        "the process 7 (python -m synapse.app.homeserver)",
        "the database session 2 of matrix-synapse-worker-1-generic from a socket",
        "the database session 3 of a nameless program from 192.0.2.1",
    ]
    nothing = {"processes": [], "strays": [], "sessions": [], "sessions_fault": None}
    assert minion.synapse_process.left(nothing) == []
    unknown = {**nothing, "sessions_fault": "The database can't be asked: it starts"}
    assert minion.synapse_process.left(unknown) == [
        "perhaps database sessions (The database can't be asked: it starts)"
    ]
