"""PostgreSQL's major upgrade: which cluster holds the data, what keeps a run from starting, what differs, what is told."""

import contextlib
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time

import pytest
from salt.exceptions import CommandExecutionError, SaltInvocationError

DONE = {"outcome": "done", "old": "15/main", "new": "18/main", "phases": []}


@pytest.fixture
def upgrade(minion, tmp_path, monkeypatch):
    """A minion on which Synapse was deployed, with no cluster but those that a test makes."""
    minion.run(minion.good_pillar())
    monkeypatch.setattr(minion.synapse_postgres, "CLUSTERS", tmp_path / "clusters")
    (tmp_path / "data").mkdir()
    return minion.synapse_upgrade


def clusters(minion, *majors, running=True, **databases):
    for major in majors:
        (minion.synapse_postgres.CLUSTERS / str(major) / "main").mkdir(parents=True)
    found = {f"{major}/main": {"running": running, "port": 5432 + i} for i, major in enumerate(majors)}
    minion.salt["synapse_cluster.clusters"] = lambda: found
    minion.salt["synapse_cluster.query"] = lambda name, sql: [
        {"datname": database} for database in databases.get(f"on_{name.split('/')[0]}", [])
    ]


def journal(upgrade, **entry):
    whole = {**DONE, "error": None, "method": "copy", **entry}
    upgrade._write(upgrade.journal_file(), whole)
    if whole["outcome"] == "done":
        upgrade._write(upgrade._served_file(), whole)


def test_what_is_recorded_is_where_the_data_are_whatever_the_pillar_says(minion, upgrade):
    clusters(minion, 15, 18)
    upgrade.write_record("15/main")
    minion.run(minion.good_pillar({"postgres:version": 18}))
    assert minion.synapse_postgres.version() == 15
    assert minion.synapse_postgres.cluster() == "15/main"
    fault = minion.synapse_postgres.fault()
    assert "synapse:postgres:version: 18: Synapse's data are on 15/main" in fault
    assert "synapse.orch.upgrade_postgres" in fault
    upgrade.write_record("18/main")
    assert minion.synapse_postgres.version() == 18
    assert minion.synapse_postgres.fault() is None


def test_without_a_record_the_cluster_with_the_database_is_the_one(minion, upgrade):
    clusters(minion, 15, 18, on_15=["postgres", "synapse"], on_18=["postgres"])
    minion.run(minion.good_pillar({"postgres:version": 18}))
    assert minion.synapse_postgres.version() == 15
    assert "data are on 15/main" in minion.synapse_postgres.fault()


@pytest.mark.parametrize(
    ("there", "given", "version"), [([], 17, 17), ([15], None, 15), ([15], 17, 17), ([17], 17, 17)]
)
def test_without_data_the_pillar_says_which_version_it_is(minion, upgrade, there, given, version):
    clusters(minion, *there)
    minion.run(minion.good_pillar({"postgres:version": given} if given else {}))
    assert minion.synapse_postgres.version() == version
    assert minion.synapse_postgres.fault() is None


def test_the_record_is_whole_or_not_there(upgrade, tmp_path):
    assert upgrade.record() is None
    upgrade.write_record("15/main")
    before = (tmp_path / "data/postgres.json").stat().st_ino
    upgrade.write_record("15/main")
    assert (tmp_path / "data/postgres.json").stat().st_ino == before, "what is so already is not written again"
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["postgres.json"]
    assert json.loads((tmp_path / "data/postgres.json").read_text())["cluster"] == "15/main"


def test_one_run_at_a_time(minion, upgrade):
    clusters(minion, 15)
    assert not upgrade.running()
    with upgrade._alone():
        assert upgrade.running()
        with pytest.raises(CommandExecutionError, match="Another run is at work"):
            upgrade.run(18)
        journal(upgrade, outcome=None, phases=[{"name": "verify", "began": upgrade._now(), "ended": None}])
        assert "is being moved from 15/main to 18/main" in minion.synapse_postgres.fault()
    assert not upgrade.running()
    fault = minion.synapse_postgres.fault()
    assert "was cut off in the phase verify" in fault
    assert fault.endswith("salt-call synapse_postgres.upgrade version=18")


@pytest.mark.parametrize(
    "arguments", [{"version": "new"}, {"version": 18, "method": "magic"}, {"version": 18, "jobs": 0}]
)
def test_a_run_with_a_wrong_argument_does_not_begin(upgrade, arguments):
    *_, name = arguments
    with pytest.raises(SaltInvocationError, match=rf"^{name}: .* is not "):
        upgrade.run(**arguments)
    assert upgrade.journal() is None


def test_a_version_has_to_be_given_and_an_external_server_is_upgraded_by_its_own_means(minion, upgrade):
    with pytest.raises(CommandExecutionError, match="synapse:postgres:version: is missing"):
        minion.synapse_postgres.upgrade()
    minion.run(minion.good_pillar({"postgres:managed": False, "postgres:host": "db.example.org"}))
    with pytest.raises(CommandExecutionError, match="between salt-call synapse_process.stop and start"):
        minion.synapse_postgres.upgrade(version=18)


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        (None, "no upgrade to go back from"),
        ({"outcome": "rolled back"}, "no upgrade to go back from"),
        ({"final": True}, "no way back from method link"),
        ({"final": False}, "15/main was discarded"),
    ],
)
def test_where_there_is_no_way_back_it_says_why(minion, upgrade, entry, said):
    clusters(minion, 18)
    if entry is not None:
        journal(upgrade, **entry)
    with pytest.raises(CommandExecutionError, match=said):
        minion.synapse_postgres.rollback(confirm=True)


def test_the_way_back_is_taken_on_request_only(minion, upgrade):
    clusters(minion, 15, 18)
    upgrade.write_record("18/main")
    journal(upgrade, final=False, served_since="2026-11-24T03:00:00+00:00")
    found = minion.synapse_postgres.rollback()
    assert not found["changed"]
    assert "since 2026-11-24T03:00:00+00:00 stays behind in 18/main" in found["lost"]
    assert upgrade.journal()["outcome"] == "done"


@pytest.mark.parametrize(
    ("cluster", "said"), [("18/main", "holds Synapse's data"), ("16/main", "is no cluster that an upgrade left behind")]
)
def test_only_what_an_upgrade_left_behind_can_be_discarded(minion, upgrade, cluster, said):
    clusters(minion, 15, 16, 18)
    upgrade.write_record("18/main")
    upgrade._leave_behind("15/main", "/nowhere")
    with pytest.raises(CommandExecutionError, match=said):
        minion.synapse_postgres.discard_old(cluster)


def test_what_was_tried_since_does_not_touch_the_way_back_nor_what_was_left_behind(minion, upgrade, tmp_path):
    clusters(minion, 15, 18)
    dropped = []
    minion.salt["synapse_cluster.drop"] = lambda *cluster: dropped.append(cluster) or True
    journal(upgrade, final=False, served_since="2026-11-24T03:00:00+00:00")
    upgrade.write_record("18/main")
    upgrade._leave_behind("15/main", str(tmp_path))
    journal(upgrade, old="18/main", new="19/main", outcome="rolled back")
    assert upgrade.status().endswith(f"Left behind: 15/main, in {tmp_path}")
    assert minion.synapse_postgres.rollback()["would_serve"] == "15/main"
    assert minion.synapse_postgres.discard_old("15/main")
    assert dropped == [("15/main", str(tmp_path))]
    with pytest.raises(CommandExecutionError, match="is no cluster that an upgrade left behind"):
        minion.synapse_postgres.discard_old("15/main")


def test_a_preflight_of_what_is_there_already_leaves_the_journal_alone(minion, upgrade):
    clusters(minion, 15, 18)
    upgrade.write_record("18/main")
    journal(upgrade)
    with pytest.raises(CommandExecutionError, match="data are on 18/main already"):
        upgrade.preflight(18)
    assert upgrade.journal()["outcome"] == "done"


def test_an_after_care_that_was_cut_off_keeps_nobody_from_anything(minion, upgrade):
    clusters(minion, 15, 18)
    for phase, is_fault in (("check", True), ("open", True), ("after-care", False), ("back", True), ("return", True)):
        journal(upgrade, outcome=None, phases=[{"name": phase, "began": upgrade._now(), "ended": None}])
        assert bool(upgrade.fault()) == is_fault, phase


def test_synapse_does_not_start_while_a_move_was_cut_off(minion, upgrade):
    """Not even in the name of the move: what users would write to the new cluster would be lost on the way back."""
    clusters(minion, 15, 18)
    journal(upgrade, outcome=None, phases=[{"name": "verify", "began": upgrade._now(), "ended": None}])
    with pytest.raises(CommandExecutionError, match="was cut off in the phase verify"):
        minion.synapse_process.start(upgrade.HOLDER)


def test_a_cluster_that_is_down_is_not_passed_over(minion, upgrade):
    clusters(minion, 15, 18, running=False)
    minion.run(minion.good_pillar({"postgres:version": 18}))
    with pytest.raises(CommandExecutionError, match="15/main is down, so nobody can tell"):
        minion.synapse_postgres.version()


def test_a_proxy_of_the_operators_has_to_keep_users_out(minion, upgrade):
    minion.run(minion.good_pillar({"nginx:managed": False}))
    assert "synapse:nginx:managed: false" in upgrade._fault_of_gate(gated=False)
    assert upgrade._fault_of_gate(gated=True) is None
    minion.run(minion.good_pillar())
    assert upgrade._fault_of_gate(gated=False) is None


def test_a_console_that_is_gone_is_no_failure(upgrade, monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    monkeypatch.setitem(upgrade.__opts__, "__cli", "salt-call")
    with open(writer, "w", encoding="utf-8") as console:
        monkeypatch.setattr(sys, "stderr", console)
        upgrade._tell("it goes on")
        with contextlib.suppress(BrokenPipeError):
            console.close()


def test_the_record_names_the_old_one_before_the_new_one_is_dropped(minion, upgrade):
    upgrade.write_record("18/main")
    minion.salt["synapse_cluster.drop"] = lambda name, data: seen.append((upgrade.record(), name))
    seen = []
    upgrade._drop_new({"old": "15/main", "new": "18/main", "data": "/nowhere"})
    assert seen == [("15/main", "18/main")]


def test_another_server_with_the_process_id_is_not_this_one(minion, tmp_path):
    data, other = tmp_path / "data", tmp_path / "other"
    for directory in (data, other):
        directory.mkdir()
    program = pathlib.Path(shutil.copy(shutil.which("sleep"), tmp_path / "postgres"))
    with subprocess.Popen([program, "60"], cwd=other) as server:
        try:
            # It gets its name a moment after it is there.
            while pathlib.Path(f"/proc/{server.pid}/comm").read_text().strip() != "postgres":
                time.sleep(0.01)
            for directory in (data, other):
                (directory / "postmaster.pid").write_text(f"{server.pid}\n")
            assert not minion.synapse_cluster._runs(str(data))
            assert minion.synapse_cluster._runs(str(other))
        finally:
            server.kill()


def test_status_tells_how_far_it_is(minion, upgrade, monkeypatch, tmp_path):
    assert "never was an upgrade" in upgrade.status()
    phases = [
        {"name": "stop", "began": "2026-11-24T03:00:00.000+00:00", "ended": "2026-11-24T03:00:02.500+00:00"},
        {"name": "upgrade", "began": "2026-11-24T03:00:02.500+00:00", "ended": None},
    ]
    monkeypatch.setattr(upgrade, "_progress_file", lambda: tmp_path / "progress")
    journal(upgrade, outcome=None, phases=phases)
    (tmp_path / "progress").write_text(json.dumps({"done": 512 << 20, "total": 2 << 30}))
    text = upgrade.status()
    assert text.startswith("15/main to 18/main, method copy: cut off")
    assert "stop     2026-11-24T03:00:00      2.5 s" in text
    assert text.splitlines()[-2].endswith(" s ...")
    assert text.splitlines()[-1] == "  512 of about 2048 MiB, 25 %"


def test_what_differs_is_named(minion):
    before = {"synapse": {"rows public.events": "3", "table public.users": "r"}, "other": {"table public.x": "r"}}
    after = {"synapse": {"rows public.events": "2", "table public.users": "r"}}
    assert minion.synapse_migration.differences(before, before) == []
    assert minion.synapse_migration.differences(before, after) == [
        "other: table public.x: r before, nothing after",
        "synapse: rows public.events: 3 before, 2 after",
    ]


@pytest.mark.parametrize(
    ("data", "place"),
    [
        ("/var/lib/postgresql/15/main", "/var/lib/postgresql/18/main"),
        ("/srv/15/main", "/srv/18/main"),
        ("/srv/data15", "/var/lib/postgresql/18/main"),
    ],
)
def test_the_new_data_go_beside_the_old_ones(minion, data, place):
    assert minion.synapse_cluster.place({"data": data, "version": 15}, 18) == place


def test_ports_that_clusters_have_are_not_free(minion, monkeypatch):
    taken = {"15/main": {"port": 5432}, "15/b": {"port": 5434}}
    monkeypatch.setattr(minion.synapse_cluster, "clusters", lambda: taken)
    assert minion.synapse_cluster.free_ports(2) == [5433, 5435]


def test_every_file_system_has_to_have_what_the_method_needs_there(minion, upgrade, tmp_path):
    about = {"size": 1 << 60, "tablespaces": {}}
    (fault,) = upgrade._faults_of_space(about, f"{tmp_path}/not/there", "copy")
    assert str(tmp_path) in fault
    assert "method copy needs" in fault
    assert list(upgrade._faults_of_space({"size": 1, "tablespaces": {}}, str(tmp_path), "copy")) == []


@pytest.mark.parametrize(("at", "lags"), [(9, True), (10, False)])
def test_a_sequence_that_lags_behind_its_stream_is_named(minion, upgrade, at, lags):
    rows = {
        upgrade.SEQUENCES: [{"name": "events_stream_seq", "value": str(at)}],
        upgrade.POSITIONS: [{"name": "events", "position": "10"}, {"name": "unknown", "position": "99"}],
    }
    found = upgrade.lagging_sequences(rows.get)
    expected = f"the sequence events_stream_seq is at {at}, but the stream events at 10"
    assert found == ([expected] if lags else [])
