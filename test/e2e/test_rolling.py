"""Processes restart one after the other, and no request fails: seen by clients that don't stop asking meanwhile."""

import json
import threading
import time

import pytest
from deployment import MAIN, Refused, quote, request, until
from host import HostError
from load import CLIENT, Load

GENERICS = ["matrix-synapse-worker-0-generic", "matrix-synapse-worker-1-generic"]
TYPING = "matrix-synapse-worker-2-stream-writer-typing"
PUBLIC = "/run/matrix-synapse/public"


@pytest.fixture
def synapse(deployed):
    until(deployed.all_healthy, "every process is healthy")
    return deployed


def restarted(synapse, before):
    return {name for name, start in synapse.starts().items() if before.get(name) != start}


def busy(synapse):
    """The generic workers that have a request."""
    rows = synapse.host.read("/proc/net/unix").splitlines()
    return [name for name in GENERICS if any(" 03 " in row and row.endswith(f"/public/{name}.sock") for row in rows)]


def test_all_processes_restart_and_no_request_fails(synapse):
    before = synapse.starts()
    with Load(synapse) as load:
        done = synapse.host.salt("synapse_rolling.restart")
    assert [row["name"] for row in done] == synapse.names()
    assert restarted(synapse, before) == set(before)
    assert load.failed == []
    assert load.sent > 500
    # What was waited for comes to its end by itself.
    assert [row["name"] for row in done if row["cut_off"]] == []


def test_main_restarts_without_its_workers_and_requests_wait_for_it(synapse):
    alice, before = synapse.user(), synapse.starts()
    done, longest = threading.Event(), 0

    def restart():
        synapse.host.salt("synapse_rolling.restart", [MAIN])
        done.set()

    thread = threading.Thread(target=restart)
    thread.start()
    while not done.is_set():
        began = time.monotonic()
        alice.ask("GET", f"{CLIENT}/pushers")
        longest = max(longest, time.monotonic() - began)
    thread.join()
    assert restarted(synapse, before) == {MAIN}
    assert longest > 0.5


def test_a_change_of_main_alone_restarts_main_alone(synapse):
    before = synapse.starts()
    synapse.pillar["main"] = {"memory": "2G"}
    synapse.apply()
    assert restarted(synapse, before) == {MAIN}
    assert synapse.apply(test=True) == {}


def test_an_apply_that_restarts_several_workers_of_a_type_fails_no_request(synapse):
    before = synapse.starts()
    synapse.pillar["workers"]["list"][0]["config"] = {"enable_metrics": False}
    with Load(synapse) as load:
        synapse.apply()
    assert restarted(synapse, before) == set(GENERICS)
    assert load.failed == []


def test_a_change_that_all_share_restarts_them_together_and_requests_wait(synapse):
    before = synapse.starts()
    synapse.pillar["config"] = {**synapse.pillar.get("config", {}), "user_ips_max_age": "14d"}
    synapse.write_pillar()
    with pytest.raises(HostError, match="What all processes share has changed"):
        synapse.host.salt("synapse_rolling.restart", [TYPING])
    assert restarted(synapse, before) == set()
    with Load(synapse) as load:
        synapse.apply()
    assert restarted(synapse, before) == set(before)
    assert load.failed == []
    assert load.sent > 100
    assert synapse.apply(test=True) == {}


def test_requests_are_waited_for_and_cut_off_after_the_time(synapse):
    alice = synapse.user()
    alice.sync()
    answers = []
    waiting = threading.Thread(target=lambda: answers.append(alice.sync(timeout=120000)))
    waiting.start()
    (row,) = synapse.host.salt("synapse_rolling.restart", until(lambda: busy(synapse), "a process has it"), drain=1)
    assert row["cut_off"] == 1
    assert row["drained"] < 3
    # nginx asked the other one for it.
    assert not answers
    alice.room()
    waiting.join()
    assert len(answers) == 1


def test_a_rolling_restart_that_is_killed_is_finished_by_the_next_apply(synapse):
    host, alice = synapse.host, synapse.user()
    alice.sync()
    waiting = threading.Thread(target=alice.sync, kwargs={"timeout": 120000})
    waiting.start()
    names = json.dumps(until(lambda: busy(synapse), "a process has it"))
    host.sh(f"salt-call --local synapse_rolling.restart '{names}' >/dev/null 2>&1 & echo $! >/run/rolling.pid")

    def shut():
        return host.sh(f"find {PUBLIC} -type s -perm 0 -printf '%f\\n'").stdout.split()

    until(shut, "a process is taken from nginx")
    assert "A rolling restart of Synapse's processes is at work" in synapse.refused()
    host.sh("kill -KILL $(cat /run/rolling.pid)")
    (left,) = [file.removesuffix(".sock") for file in shut()]
    assert left in GENERICS
    assert f"a restart has taken {left} from nginx" in host.salt("synapse_process.status")
    # Users are served by the other.
    assert alice.ask("GET", f"{CLIENT}/joined_rooms") == {"joined_rooms": []}
    alice.room()
    waiting.join()
    changes = synapse.apply()
    assert changes["Synapse's processes are running"] == {left: {"old": "outdated", "new": "running"}}
    assert shut() == []
    assert synapse.apply(test=True) == {}


def test_one_that_does_not_come_back_stops_the_rest(synapse):
    host = synapse.host
    host.sh(
        f"""mkdir -p /run/systemd/system/{GENERICS[0]}.service.d
        printf '[Service]\\nExecStartPre=/bin/false\\n' >/run/systemd/system/{GENERICS[0]}.service.d/lame.conf
        systemctl daemon-reload"""
    )
    before = synapse.starts()
    try:
        with pytest.raises(HostError) as failed:
            host.salt("synapse_rolling.restart", [*GENERICS, TYPING])
    finally:
        host.sh(f"rm -r /run/systemd/system/{GENERICS[0]}.service.d; systemctl daemon-reload")
    assert f"{GENERICS[0]} did not become healthy" in str(failed.value)
    assert f"Not restarted: {GENERICS[1]}, {TYPING}" in str(failed.value)
    assert restarted(synapse, before) <= {GENERICS[0]}
    until(synapse.all_healthy, "it comes back by itself")


def test_what_is_stopped_keeps_nobody_waiting(synapse):
    synapse.systemctl("stop", MAIN)
    try:
        began = time.monotonic()
        with pytest.raises(Refused, match="502"):
            request(f"{synapse.url}/_matrix/client/v3/pushers")
        assert time.monotonic() - began < 5
    finally:
        synapse.systemctl("start", MAIN)


def test_a_dead_process_without_peers_is_waited_for(synapse):
    alice = synapse.user()
    room = alice.room()
    synapse.kill(TYPING)
    path = f"{CLIENT}/rooms/{quote(room)}/typing/{quote(alice.id)}"
    assert alice.ask("PUT", path, {"typing": True, "timeout": 1000}) == {}


def test_a_master_restarts_all_and_shows_how_far_it_is(synapse, master):
    before = synapse.starts()
    done = master("state.orchestrate", "synapse.orch.rolling_restart")
    assert restarted(synapse, before) == set(before)
    for name in before:
        assert f"{name} (" in done.stderr
