"""Backups: what is one, what differs, what is refused, without a database."""

import contextlib
import json

import pytest
from salt.exceptions import CommandExecutionError, SaltInvocationError

STAMP = "20261124T220046Z"


@pytest.fixture
def backup(minion, tmp_path):
    """The module, and below the test's directory a place for backups."""
    minion.run(minion.good_pillar({"backup": {"directory": f"{tmp_path}/backups"}}))
    minion.synapse_backup.RUN_LOCK = str(tmp_path / "lock")
    return minion.synapse_backup


@pytest.fixture
def made(backup, tmp_path):
    """A backup with two files, sealed as `create` does."""
    path = tmp_path / "backups" / STAMP
    (path / "files").mkdir(parents=True)
    for name in ("one", "two"):
        (path / "files" / name).write_text(name)
    manifest = {"format": backup.FORMAT, "made": "2026-11-24T22:00:46+00:00", "server_name": "example.org"}
    manifest |= {"synapse": "1.163.2", "media": None, "database": {"postgres": "15.14 (Debian 15.14-0+deb12u1)"}}
    manifest["files"] = backup._seal(path)
    (path / "manifest.json").write_text(json.dumps(manifest))
    return path


def test_the_list_tells_what_is_complete_and_what_is_not(backup, made):
    for name in (".20261124T220047Z.partial", "lost+found"):
        (made.parent / name).mkdir()
    broken = made.parent / "20261124T220048Z"
    broken.mkdir()
    complete, incomplete = backup.list_()
    assert complete == {
        "backup": str(made),
        "made": "2026-11-24T22:00:46+00:00",
        "server_name": "example.org",
        "synapse": "1.163.2",
        "postgres": 15,
        "media": None,
        "size": 6,
    }
    assert incomplete["backup"] == str(broken)
    assert "manifest.json" in incomplete["fault"]


def test_a_sealed_backup_is_roots_alone(backup, made):
    assert {
        path.stat().st_mode & 0o777 for path in made.rglob("*") if path.is_file() and path.name != "manifest.json"
    } == {0o600}
    assert backup._file_faults(made, backup._manifest(made)) == []


def test_every_file_that_differs_is_named(backup, made):
    manifest = backup._manifest(made)
    (made / "files" / "one").write_text("eno")
    (made / "files" / "two").unlink()
    (made / "files" / "three").touch()
    assert backup._file_faults(made, manifest) == [
        "files/two is missing",
        "files/three is not in the manifest",
        "files/one has another checksum",
    ]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 1'])
def test_a_manifest_that_is_none_makes_no_backup(backup, made, text):
    (made / "manifest.json").write_text(text)
    with pytest.raises(CommandExecutionError, match="no complete backup"):
        backup._manifest(made)


def test_another_format_is_refused(backup, made):
    (made / "manifest.json").write_text('{"format": 2}')
    with pytest.raises(CommandExecutionError, match="has format 2, and this formula knows 1"):
        backup._manifest(made)


@pytest.mark.parametrize("name", ["", "..", "nothing", f".{STAMP}.partial", "20261124T220047Z", None, 7])
def test_what_is_no_backup_is_none(backup, made, name):
    (made.parent / f".{STAMP}.partial").mkdir()
    for function in (backup.verify, backup.restore, backup.remove):
        with pytest.raises(CommandExecutionError, match="is no backup: see synapse_backup.list"):
            function(name)


def test_the_oldest_go_if_only_so_many_stay(backup, made):
    for day in (25, 26):
        (made.parent / f"202611{day}T220046Z").mkdir()
    assert backup._prune(made.parent, None) == []
    assert backup._prune(made.parent, 2) == [str(made)]
    assert backup._prune(made.parent, 2) == []
    assert sorted(path.name for path in made.parent.iterdir()) == ["20261125T220046Z", "20261126T220046Z"]


def test_a_sequence_may_be_ahead_and_never_behind(backup):
    wanted = {
        name: {"last": last, "step": step} for name, last, step in (("up", 5, 1), ("down", -5, -1), ("unused", None, 1))
    }
    ahead = {"up": {"last": 6}, "down": {"last": -6}, "unused": {"last": None}}
    assert backup._sequence_faults(wanted, wanted) == []
    assert backup._sequence_faults(ahead, wanted) == []
    behind = {"up": {"last": 4}, "down": {"last": None}}
    assert backup._sequence_faults(behind, wanted) == [
        "the sequence up is at 4, and was at 5 already",
        "the sequence down is at None, and was at -5 already",
        "the sequence unused is missing",
    ]


def test_two_needs_of_one_file_system_have_to_fit_together(backup, tmp_path):
    assert backup._space_faults([(tmp_path / "not" / "there", 1, "the backup")]) == []
    (fault,) = backup._space_faults([(tmp_path, 1 << 60, "the backup"), (tmp_path / "x", 1 << 60, "the cluster")])
    assert "the backup and the cluster may need" in fault


def test_only_one_runs_at_a_time(backup, made):
    with backup._alone(), pytest.raises(CommandExecutionError, match="Another backup"):
        backup.remove(STAMP)
    assert backup.remove(STAMP) == str(made)
    assert not made.exists()


@pytest.fixture
def cut_off(minion, backup, tmp_path):
    """A restore that was cut off in a phase, with nginx closed and no lock, as in the middle of a start."""
    maintenance = minion.synapse_maintenance
    maintenance.SWITCH = tmp_path / "switch"
    maintenance.close()

    def at(phase):
        minion.write("data/restore.json", json.dumps({"backup": f"/b/{STAMP}", "phase": phase, "old": "x", "new": "y"}))
        return tmp_path / "data" / "restore.json"

    return at


@pytest.mark.parametrize("phase", ["restoring", "stopping", "switching", "starting", "undoing"])
def test_a_restore_that_was_cut_off_says_how_to_end_it(backup, cut_off, phase):
    assert backup.fault() is None
    cut_off(phase)
    assert backup.fault() == (
        f"The restore of /b/{STAMP} was cut off while it was {phase}. To finish it: salt-call synapse_backup.restore /b/{STAMP}."
        " To give it up: salt-call synapse_backup.undo"
    )
    with backup._alone():
        assert f"The restore of /b/{STAMP} is {phase}" in backup.fault()


@pytest.mark.parametrize("holder", [None, "root"])
def test_nothing_undoes_a_restore_once_somebody_let_users_in(minion, backup, cut_off, holder):
    journal = cut_off("switching")
    if holder:
        minion.synapse_maintenance.lock(holder, "new disks")
    else:
        minion.synapse_maintenance.open_()
    assert backup.fault()
    cut_off("starting")
    with pytest.raises(CommandExecutionError, match="no restore that was cut off"):
        backup.undo()
    assert backup.fault() is None
    assert not journal.exists()


def test_a_console_that_is_gone_is_no_failure(backup, monkeypatch):
    with open("/dev/full", "w", encoding="utf-8") as gone:
        monkeypatch.setattr("sys.stderr", gone)
        backup._tell("nobody reads it")
        monkeypatch.undo()
        with contextlib.suppress(OSError):
            gone.close()


def test_media_is_yes_or_no(backup):
    with pytest.raises(SaltInvocationError, match="media: 'some' is not true or false"):
        backup.create(media="some")


@pytest.mark.parametrize(
    "arguments", [("create",), ("verify", STAMP), ("restore", STAMP), ("discard_old", "x"), ("old",)]
)
def test_an_external_database_is_left_to_who_runs_it(minion, backup, arguments):
    minion.run(minion.good_pillar({"postgres": {"managed": False, "host": "db.example.org"}}))
    name, *rest = arguments
    with pytest.raises(CommandExecutionError, match="backed up and restored by whoever runs its server"):
        getattr(backup, name)(*rest)


@pytest.mark.parametrize("directory", ["{0}/data", "{0}/data/backups", "{0}"])
def test_backups_are_apart_from_what_they_are_of(minion, tmp_path, directory):
    path = directory.format(tmp_path)
    minion.run(minion.good_pillar({"backup": {"directory": path}}))
    faults = minion.synapse_pillar.faults()
    assert faults
    assert all(fault.startswith("synapse:backup:directory: ") and "must be apart from" in fault for fault in faults)
