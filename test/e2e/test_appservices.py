"""
Appservices, with a real one: test/e2e/bridge is a bridge with a formula of its own, which knows the homeserver from the
map, registers by the hook, and runs on the host as a unit that is After= the homeserver's.
"""

import contextlib
import json

import pytest
from conftest import ONE_WORKER
from deployment import until

PILLAR = ONE_WORKER

BRIDGE = "testbridge"
UNIT = "test-bridge.service"
STARTED = "39f53479d3a045ac8e11786248231fbf"  # systemd's message id of a unit that has started


class Remote:
    """The network on the other side of the bridge."""

    def __init__(self, host, url):
        self.host, self.url = host, f"{url}/remote/messages"

    def say(self, room, name, text):
        body = json.dumps({"room": room, "from": name, "text": text})
        self.host.run("curl", "--silent", "--show-error", "--fail-with-body", "--json", body, self.url)

    def heard(self):
        messages = json.loads(self.host.run("curl", "--silent", "--show-error", "--fail", self.url).stdout)
        return [message["text"] for message in messages]


@pytest.fixture(scope="module", autouse=True)
def bridge(deployment):
    """The bridge, which its formula installs in one run, and for which a test run has foreseen all."""
    foreseen = deployment.apply("test.e2e.bridge", test=True)
    done = deployment.apply("test.e2e.bridge")
    assert "The test bridge is registered" in done
    # Salt's service.running says nothing of a unit that is not there yet.
    assert {*foreseen, "The test bridge is running"} == set(done)
    yield
    host = deployment.host
    host.run("systemctl", "disable", "--now", UNIT)
    host.sh(f"rm -r /etc/systemd/system/{UNIT} /etc/test-bridge /opt/test-bridge; systemctl daemon-reload")
    host.salt("synapse_appservice.remove", BRIDGE)
    deployment.apply()


@pytest.fixture(scope="module")
def homeserver(bridge, host):
    return host.salt("synapse_appservice.homeserver", BRIDGE)


@pytest.fixture(scope="module")
def processes(deployment):
    return deployment.names()


@pytest.fixture(scope="module")
def carol(deployment, bridge):
    return deployment.user()


@pytest.fixture(scope="module")
def room(carol, homeserver):
    bot = f"@{BRIDGE}bot:{homeserver['server_name']}"
    room = carol.room(invite=[bot])
    members = f"/_matrix/client/v3/rooms/{room}/joined_members"
    until(lambda: bot in carol.ask("GET", members)["joined"], "the bot joins")
    return room


@pytest.fixture(scope="module")
def remote(host, homeserver):
    return Remote(host, f"http://{homeserver['host_address']}:29318")


@contextlib.contextmanager
def each_started_once(host, names):
    """The processes start once each meanwhile, and nothing else of Synapse's does."""
    since = host.sh("date +@%s.%6N").stdout.strip()
    yield
    # Not --after-cursor: beside a match, systemd 252 takes it for the first entry that matches, and leaves that out.
    command = f"journalctl --quiet --output json --output-fields UNIT --since {since} MESSAGE_ID={STARTED}"
    units = [json.loads(line)["UNIT"] for line in host.sh(command).stdout.splitlines()]
    started = [unit.removesuffix(".service") for unit in units if unit.startswith("matrix-synapse")]
    assert sorted(started) == sorted(names)


def test_messages_pass_both_ways(carol, room, remote, homeserver):
    domain = homeserver["server_name"]
    for name in ("alice", "bob"):
        remote.say(room, name, f"hello from {name}")
    carol.say(room, "hello from carol")
    timeline = carol.sync()["rooms"]["join"][room]["timeline"]["events"]
    said = {event["content"]["body"]: event["sender"] for event in timeline if event["type"] == "m.room.message"}
    assert said == {f"hello from {name}": f"@{BRIDGE}_{name}:{domain}" for name in ("alice", "bob")} | {
        "hello from carol": carol.id
    }
    until(lambda: remote.heard() == ["hello from carol"], "the remote network gets the message, and no echo")


def test_a_second_run_changes_nothing(deployment, host):
    with each_started_once(host, []):
        assert deployment.apply("test.e2e.bridge", test=True) == {}
        assert deployment.apply("test.e2e.bridge") == {}


def test_every_process_reads_the_registration_and_can_not_write_it(host, homeserver, processes):
    path = homeserver["registration"]
    written = host.read(path)
    for name in processes:
        assert host.run("docker", "exec", name, "cat", path).stdout == written
        assert host.run("docker", "exec", name, "sh", "-c", f"echo >> {path}", check=False).returncode != 0
    assert host.sh(f"stat --format '%U %G %a' {path}").stdout.split() == ["root", homeserver["group"], "640"]


def tokens_of(host):
    """The tokens that the formula made for the bridge, which no job returns."""
    return json.loads(host.read(f"/var/lib/matrix-synapse/appservices/{BRIDGE}.tokens.json"))


def test_every_process_has_the_bridges_container_arguments(host, processes):
    label = '{{index .Config.Labels "org.example.testbridge"}}'
    shown = host.run("docker", "inspect", "--format", label, *processes).stdout.split()
    assert shown == ["here"] * len(processes)


def test_no_token_is_shown_anywhere(host, processes):
    tokens = tokens_of(host)
    shown = [host.run("docker", "inspect", *processes).stdout, host.sh("ps -ewwo args").stdout]
    shown += [host.sh("cat /etc/systemd/system/*.service").stdout, host.sh("journalctl --boot --output cat").stdout]
    assert not [token for token in tokens.values() for text in shown if token in text]


def test_a_container_reaches_the_homeserver_by_the_address_for_containers(host, homeserver):
    image = host.run("docker", "inspect", "--format", "{{.Image}}", "matrix-synapse").stdout.strip()
    command = ["docker", "run", "--rm", *homeserver["arguments"], "--entrypoint", "curl", image, "--silent"]
    answer = host.run(*command, homeserver["url"]["container"] + "/_matrix/client/versions").stdout
    assert "versions" in json.loads(answer)


def test_a_container_can_read_its_registration(host, homeserver):
    image = host.run("docker", "inspect", "--format", "{{.Image}}", "matrix-synapse").stdout.strip()
    group = host.run("getent", "group", homeserver["group"]).stdout.split(":")[2]
    command = ["docker", "run", "--rm", "--user=12345:12345", f"--group-add={group}", *homeserver["mounts"]]
    shown = host.run(*command, "--entrypoint", "cat", image, "/registration.yaml").stdout
    assert shown == host.read(homeserver["registration"])


def test_the_bridge_starts_when_the_homeserver_answers(host, carol, room, remote, processes):
    # It asks once and gives up if there is no answer; see the bridge.
    host.run("systemctl", "stop", UNIT, "matrix-synapse")
    until(lambda: not host.run("docker", "ps", "--quiet", "--filter=name=^matrix-synapse").stdout, "all stop")
    with each_started_once(host, processes):
        host.run("systemctl", "start", UNIT)
    remote.say(room, "alice", "at once")
    assert "at once" in carol.heard(room)


def test_a_bridge_without_a_homeserver_gives_up(host):
    # Or the test above would show nothing.
    host.run("systemctl", "stop", UNIT, "matrix-synapse")
    exec_start = "/opt/test-bridge/bin/python /opt/test-bridge/bridge.py /etc/test-bridge/config.json"
    assert host.sh(f"cd /tmp; {exec_start}", check=False, timeout=20).returncode == 1
    host.run("systemctl", "start", UNIT)


def test_a_dead_token_is_refused_and_the_new_registration_works(deployment, host, carol, room, remote, processes):
    before = tokens_of(host)
    assert host.salt("synapse_appservice.renew_tokens", BRIDGE) == ["as_token", "hs_token"]
    with each_started_once(host, processes):
        deployment.apply()
    carol.say(room, "while the bridge is dead")

    assert host.run("systemctl", "restart", UNIT, check=False).returncode != 0
    journal = host.sh(f"journalctl --unit {UNIT} --output cat --lines 20").stdout
    assert "M_UNKNOWN_TOKEN: the homeserver does not know this as_token" in journal
    assert host.run("systemctl", "is-active", UNIT, check=False).stdout.strip() == "failed"

    with each_started_once(host, []):
        changes = deployment.apply("test.e2e.bridge")
    assert set(changes) == {"The test bridge is configured", "The test bridge is running"}
    assert not set(before.values()) & set(tokens_of(host).values())
    remote.say(room, "alice", "alive again")
    assert "alive again" in carol.heard(room)
    # Synapse comes back to an appservice that failed after a while, and brings what was said meanwhile.
    until(
        lambda: "while the bridge is dead" in remote.heard(),
        "the remote network gets what was said meanwhile",
        seconds=120,
    )


def an_appservice(name):
    return {name: {"registration": {"url": None, "sender_localpart": name, "namespaces": {}}}}


def test_pillar_and_hook_with_the_same_id_are_a_fault_that_changes_nothing(deployed, host):
    files = "find /etc/matrix-synapse -type f -exec sha256sum {} + | sort"
    before = host.sh(files).stdout
    deployed.pillar["appservices"] = an_appservice(BRIDGE)
    with each_started_once(host, []):
        said = deployed.refused()
    assert f"synapse:appservices:{BRIDGE}" in said
    assert f"synapse_appservice.registered {BRIDGE}" in said
    assert host.sh(files).stdout == before


def test_an_appservice_in_the_pillar_gets_tokens_that_stay(deployed, host, homeserver, processes):
    path = f"{homeserver['registrations']}/inline.yaml"
    deployed.pillar["appservices"] = an_appservice("inline")
    with each_started_once(host, processes):
        foreseen = deployed.apply(test=True)
        done = deployed.apply()
    assert foreseen == done
    assert done["Appservices have their tokens"] == {"inline": {"old": None, "new": ["as_token", "hs_token"]}}
    written = host.read(path)
    assert deployed.apply(test=True) == {}

    deployed.pillar["appservices"] = {}
    with each_started_once(host, processes):
        deployed.apply()
    assert host.run("test", "-e", path, check=False).returncode == 1
    assert "inline" not in host.read("/etc/matrix-synapse/homeserver.yaml")

    deployed.pillar["appservices"] = an_appservice("inline")
    with each_started_once(host, processes):
        deployed.apply()
    assert host.read(path) == written


def test_a_file_of_the_operators_is_an_appservice_and_its_change_restarts_what_reads_it(deployed, host, processes):
    file = "/etc/other-bridge/registration.yaml"
    registration = {
        "id": "other",
        "url": None,
        "as_token": "a" * 32,
        "hs_token": "b" * 32,
        "sender_localpart": "otherbot",
        "namespaces": {},
    }
    host.write(file, json.dumps(registration), mode="0600")
    deployed.pillar["appservices"] = {"other": {"file": file}}
    deployed.apply()
    whoami = ["curl", "--silent", "http://127.0.0.1:8008/_matrix/client/v3/account/whoami", "--header"]
    assert "@otherbot:" in host.run(*whoami, "Authorization: Bearer " + "a" * 32).stdout

    host.write(file, json.dumps(registration | {"as_token": "c" * 32}), mode="0600")
    with each_started_once(host, processes):
        deployed.apply()
    assert "M_UNKNOWN_TOKEN" in host.run(*whoami, "Authorization: Bearer " + "a" * 32).stdout
    assert "@otherbot:" in host.run(*whoami, "Authorization: Bearer " + "c" * 32).stdout


def test_a_bridge_that_is_gone_leaves_nothing_to_synapse(deployment, host, homeserver, processes):
    tokens = tokens_of(host)
    assert host.salt("state.single", "synapse_appservice.absent", BRIDGE)
    with each_started_once(host, processes):
        deployment.apply()
    assert host.run("test", "-e", homeserver["registration"], check=False).returncode == 1
    labels = host.run("docker", "inspect", "--format", "{{json .Config.Labels}}", *processes).stdout
    assert "org.example.testbridge" not in labels
    assert host.run("systemctl", "restart", UNIT, check=False).returncode != 0
    assert "M_UNKNOWN_TOKEN" in host.sh(f"journalctl --unit {UNIT} --output cat --lines 20").stdout

    # Its tokens are kept, for when it comes back.
    deployment.apply("test.e2e.bridge")
    assert tokens_of(host) == tokens
