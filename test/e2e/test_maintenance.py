"""The census, the proven stop, and what the lock keeps from starting."""

import json
import time

import pytest
from conftest import ONE_WORKER
from deployment import MAIN, Refused, until
from host import HostError

PILLAR = ONE_WORKER

GENERIC = "matrix-synapse-worker-0-generic"
LOCK = "/var/lib/matrix-synapse/maintenance.json"


@pytest.fixture(autouse=True)
def _all_healthy(deployed):
    yield
    for stray in ("stray", GENERIC):
        deployed.host.run("docker", "kill", "--signal=CONT", stray, check=False)
    deployed.host.run("docker", "rm", "--force", "stray", check=False)
    deployed.host.salt("synapse_process.start")
    until(deployed.all_healthy, "every process is healthy again")


def census(deployed):
    return deployed.host.salt("synapse_process.census")


def stop(deployed, **kwargs):
    return deployed.host.salt("synapse_process.stop", **kwargs)


def synapse_in(deployed, name, *arguments):
    """A container that runs Synapse's image as an operator's hand would, with the formula's directories."""
    mounts = "-v /etc/matrix-synapse:/etc/matrix-synapse -v /run/matrix-synapse:/run/matrix-synapse"
    image = deployed.containers()[MAIN]["Image"]
    deployed.host.sh(f"docker run --detach --name {name} {mounts} --entrypoint sleep {image} {' '.join(arguments)}")


def test_the_census_counts_every_process_and_its_sessions(deployed):
    found = census(deployed)
    assert [process["name"] for process in found["processes"]] == deployed.names()
    assert found["maintenance"] is None
    assert found["strays"] == []
    assert all(process["healthy"] and process["current"] for process in found["processes"])
    assert {process["name"] for process in found["processes"] if process["sessions"]} >= {MAIN, GENERIC}
    psql = "runuser -u postgres -- psql -At -c \"select count(*) from pg_stat_activity where usename = 'synapse'\""
    assert abs(len(found["sessions"]) - int(deployed.host.sh(psql).stdout)) <= 3, "pools open and close sessions"


def test_status_is_a_table_for_people(deployed):
    text = deployed.host.salt("synapse_process.status")
    for name in deployed.names():
        assert any(line.startswith(name) and " active " in line for line in text.splitlines())
    assert "stray" not in text


def test_a_closed_door_without_a_lock_is_told_and_start_opens_it(deployed):
    host = deployed.host
    assert host.salt("synapse_maintenance.close")
    assert census(deployed)["closed"]
    assert "nginx answers 503 to every user" in host.salt("synapse_process.status")
    assert "synapse_process.start opens it" in deployed.refused()
    host.salt("synapse_process.start")
    assert deployed.apply(test=True) == {}


def test_a_database_that_cant_be_asked_proves_nothing_and_hides_nothing(deployed):
    host = deployed.host
    psql = "/usr/lib/postgresql/15/bin/psql"
    host.sh(f"mv {psql} {psql}.away; ln -s /bin/false {psql}")
    try:
        found = census(deployed)
        assert "The database can't be asked" in found["sessions_fault"]
        assert all(process["healthy"] and process["sessions"] is None for process in found["processes"])
        assert "The database can't be asked" in host.salt("synapse_process.status")
        with pytest.raises(HostError, match="still there: .*perhaps database sessions"):
            stop(deployed, grace=3)
    finally:
        host.sh(f"mv --force {psql}.away {psql}")
    until(deployed.all_healthy, "a stop that failed starts all again")


def test_the_stop_is_proven_and_nothing_starts_until_it_is_undone(deployed):
    host, alice = deployed.host, deployed.user()
    done = stop(deployed, reason="tests")
    assert done["killed"] == []
    found = census(deployed)
    assert {process["unit"] for process in found["processes"]} == {"inactive"}
    assert (found["strays"], found["sessions"]) == ([], [])
    assert found["maintenance"]["reason"] == "tests"

    for ask in (lambda: alice.ask("GET", "/_matrix/client/v3/account/whoami"), lambda: alice.room()):
        with pytest.raises(Refused) as refused:
            ask()
        assert refused.value.status == 503
        assert json.loads(refused.value.body)["errcode"] == "M_UNKNOWN"
    answer = host.sh(
        "curl --silent --head http://127.0.0.1:8008/_matrix/client/versions; systemctl reload nginx"
    ).stdout
    assert "Retry-After: 60" in answer
    assert host.sh("curl --silent -o /dev/null -w '%{http_code}' http://127.0.0.1:8008/_matrix/x").stdout == "503"

    for name in (MAIN, GENERIC):
        assert host.run("systemctl", "start", f"{name}.service", check=False).returncode != 0
    assert "root holds the lock" in deployed.refused()
    assert "root holds the lock" in deployed.refused("synapse.process")
    host.run("systemctl", "restart", "docker")
    assert set(deployed.states().values()) <= {"inactive", "failed"}
    with pytest.raises(HostError, match="root holds the lock"):
        stop(deployed, holder="somebody")
    with pytest.raises(HostError, match="root holds the lock"):
        host.salt("synapse_process.start", holder="somebody")

    assert host.salt("synapse_process.start") == deployed.names()
    assert deployed.all_healthy()
    assert alice.say(alice.room(), "open again")


def test_the_lock_outlives_a_reboot(deployed):
    stop(deployed)
    deployed.host.restart()
    time.sleep(3)
    assert set(deployed.states().values()) == {"inactive"}
    assert (
        deployed.host.sh("curl --silent -o /dev/null -w '%{http_code}' http://127.0.0.1:8008/_matrix/x").stdout == "503"
    )


def test_a_stray_container_is_found_and_stopped(deployed):
    synapse_in(deployed, "stray", "1000")
    assert [stray["id"] for stray in census(deployed)["strays"]] == ["stray"]
    assert "A stray: the container stray" in deployed.host.salt("synapse_process.status")
    # `sleep` as PID 1 ignores SIGTERM.
    before = deployed.starts()
    with pytest.raises(HostError, match="still there: the container stray"):
        # time for everything else, also on a machine under load
        stop(deployed, grace=10)
    assert not deployed.host.sh(f"ls {LOCK} || true").stdout
    until(deployed.all_healthy, "a stop that failed starts all again")
    assert all(deployed.starts()[name] > start for name, start in before.items())
    done = stop(deployed, grace=3, kill=True)
    assert any("the container stray" in item for item in done["killed"])
    assert deployed.host.run("docker", "ps", "--quiet").stdout == ""


def test_a_process_with_a_session_that_nobody_knows_is_found(deployed):
    host = deployed.host
    host.sh(
        "setsid runuser -u synapse -- env PGAPPNAME=by-hand psql synapse -c 'select pg_sleep(600)' >/dev/null 2>&1 &"
    )
    until(lambda: "by-hand" in [session["process"] for session in census(deployed)["sessions"]], "the census finds it")
    with pytest.raises(HostError, match="still there: .*the database session .* of by-hand"):
        stop(deployed, grace=3)
    until(deployed.all_healthy, "a stop that failed starts all again")
    done = stop(deployed, grace=3, kill=True)
    assert any("by-hand" in item for item in done["killed"])
    assert census(deployed)["sessions"] == []


def test_a_worker_that_ignores_sigterm_is_named_and_killed_only_if_allowed(deployed):
    deployed.host.salt("synapse_maintenance.close")
    deployed.host.run("docker", "kill", "--signal=STOP", GENERIC)
    with pytest.raises(HostError, match=f"still there: .*{GENERIC}"):
        stop(deployed, grace=3)
    assert census(deployed)["closed"], "a stop that failed opens no door that it did not close"
    deployed.host.run("docker", "kill", "--signal=CONT", GENERIC)
    until(deployed.all_healthy, "a stop that failed starts all again")
    deployed.host.run("docker", "kill", "--signal=STOP", GENERIC)
    done = stop(deployed, grace=3, kill=True)
    assert any(GENERIC in item for item in done["killed"])
    assert census(deployed)["sessions"] == []


def test_the_state_stops_and_starts_once(deployed):
    def run(function, **kwargs):
        (state,) = deployed.host.salt("state.single", f"synapse_process.{function}", name="tests", **kwargs).values()
        return state["result"], state["changes"]

    result, foretold = run("stopped", test=True)
    assert result is None
    assert deployed.all_healthy()
    assert run("stopped") == (True, foretold)
    assert run("stopped") == (True, {})
    assert run("started") == (True, {"lock": {"old": "tests", "new": None}})
    assert run("started") == (True, {})


def test_a_master_stops_and_starts_it(deployed, master):
    master("state.orchestrate", "synapse.orch.stop")
    assert set(deployed.states().values()) == {"inactive"}
    unknown = master("state.orchestrate", "synapse.orch.stop", 'pillar={"arguments": {"kil": true}}', check=False)
    assert unknown.returncode != 0
    refused = master("state.orchestrate", "synapse.orch.stop", 'pillar={"arguments": {"holder": "bob"}}', check=False)
    assert refused.returncode != 0
    assert "root holds the lock" in refused.stdout
    master("state.orchestrate", "synapse.orch.start")
    assert deployed.all_healthy()
    before = deployed.starts()
    arguments = {"target": deployed.host.name, "arguments": {"kill": True, "holder": "bob", "reason": "tests"}}
    # The start takes longer than this, and is waited for all the same.
    arguments["timeout"] = 2
    master("state.orchestrate", "synapse.orch.restart", f"pillar={json.dumps(arguments)}")
    assert deployed.all_healthy()
    assert all(deployed.starts()[name] > start for name, start in before.items())


def test_a_minion_that_does_not_answer_is_a_failure(deployed, master):
    before = deployed.starts()
    nobody = master("state.orchestrate", "synapse.orch.stop", 'pillar={"target": "nobody"}', check=False)
    assert nobody.returncode != 0
    deployed.systemctl("stop", "salt-minion")
    silent = master("state.orchestrate", "synapse.orch.stop", 'pillar={"timeout": 5}', check=False)
    assert silent.returncode != 0
    assert deployed.starts() == before
