"""
Appservices, with a real one: test/e2e/bridge is a bridge with a formula of its own, which knows the homeserver from the
map, registers by the hook, and runs on the host as a unit that is After= the homeserver's.
"""

import contextlib
import hashlib
import hmac
import json
import secrets
import time

import pytest

BRIDGE = "testbridge"
UNIT = "test-bridge.service"
STARTED = "39f53479d3a045ac8e11786248231fbf"  # systemd's message id of a unit that has started


def apply(host, sls, **kwargs):
    """The changes of each state, by its id; all states succeed."""
    states = host.salt("state.apply", sls, **kwargs).values()
    failed = [f"{state['__id__']}: {state['comment']}" for state in states if state["result"] is False]
    assert not failed, "\n".join(failed)
    return {state["__id__"]: state["changes"] for state in states if state["changes"]}


class Matrix:
    """A user, by curl in the host."""

    def __init__(self, host, url):
        self.host, self.url, self.token = host, url, None

    def request(self, method, path, body=None):
        command = ["curl", "--silent", "--show-error", "--max-time", "60", "--request", method]
        command += ["--header", f"Authorization: Bearer {self.token}"] if self.token else []
        command += ["--json", json.dumps(body)] if body is not None else []
        return json.loads(self.host.run(*command, self.url + path).stdout)

    def register(self, name):
        nonce, password = self.request("GET", "/_synapse/admin/v1/register")["nonce"], secrets.token_hex(8)
        data = self.host.salt("synapse_pillar.settings")["directories"]["data"]
        secret = self.host.read(f"{data}/secrets/registration").strip()
        text = "\0".join([nonce, name, password, "notadmin"])
        mac = hmac.new(secret.encode(), text.encode(), hashlib.sha1).hexdigest()
        body = {"nonce": nonce, "username": name, "password": password, "admin": False, "mac": mac}
        self.token = self.request("POST", "/_synapse/admin/v1/register", body)["access_token"]

    def room(self, invite):
        room = self.request("POST", "/_matrix/client/v3/createRoom", {"invite": [invite]})["room_id"]
        joined = f"/_matrix/client/v3/rooms/{room}/joined_members"
        until(lambda: invite in self.request("GET", joined)["joined"], f"{invite} joins")
        return room

    def say(self, room, text):
        path = f"/_matrix/client/v3/rooms/{room}/send/m.room.message/{secrets.token_hex(8)}"
        assert "event_id" in self.request("PUT", path, {"msgtype": "m.text", "body": text})

    def heard(self, room):
        chunk = self.request("GET", f"/_matrix/client/v3/rooms/{room}/messages?dir=b&limit=50")["chunk"]
        return [(e["sender"], e["content"]["body"]) for e in chunk if e["type"] == "m.room.message"]


class Remote:
    """The network on the other side of the bridge."""

    def __init__(self, host, url):
        self.matrix = Matrix(host, url)

    def say(self, room, name, text):
        body = {"room": room, "from": name, "text": text}
        assert "event_id" in self.matrix.request("POST", "/remote/messages", body)

    def heard(self):
        return [(m["from"], m["text"]) for m in self.matrix.request("GET", "/remote/messages")]


def until(condition, what, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"gave up waiting: {what}"
        time.sleep(0.2)


@pytest.fixture(scope="module")
def host(deployed):
    """The host with the homeserver and the bridge, which its formula installed in one run."""
    foreseen = apply(deployed, "test.e2e.bridge", test=True)
    done = apply(deployed, "test.e2e.bridge")
    assert "The test bridge is registered" in done
    assert set(foreseen) == set(done)
    yield deployed
    deployed.sh(f"systemctl disable --now {UNIT}; rm -r /etc/systemd/system/{UNIT} /etc/test-bridge /opt/test-bridge")
    deployed.run("systemctl", "daemon-reload")
    deployed.salt("synapse_appservice.remove", BRIDGE)
    apply(deployed, "synapse")


@pytest.fixture(scope="module")
def homeserver(host):
    return host.salt("synapse_appservice.homeserver", BRIDGE)


@pytest.fixture(scope="module")
def processes(host):
    return host.salt("synapse_workers.names")


@pytest.fixture(scope="module")
def carol(host, homeserver):
    user = Matrix(host, homeserver["url"]["host"])
    user.register(f"carol-{secrets.token_hex(4)}")
    return user


@pytest.fixture(scope="module")
def room(carol, homeserver):
    return carol.room(f"@{BRIDGE}bot:{homeserver['server_name']}")


@pytest.fixture(scope="module")
def remote(host, homeserver):
    return Remote(host, f"http://{homeserver['host_address']}:29318")


@contextlib.contextmanager
def each_started_once(host, names):
    """The processes start once each meanwhile, and nothing else of Synapse's does."""
    cursor = host.sh("journalctl --lines 0 --show-cursor --quiet").stdout.partition("cursor: ")[2].strip()
    yield
    command = f"journalctl --quiet --output json --output-fields UNIT --after-cursor {cursor!r} MESSAGE_ID={STARTED}"
    units = [json.loads(line)["UNIT"] for line in host.sh(command).stdout.splitlines()]
    started = [unit.removesuffix(".service") for unit in units if unit.startswith("matrix-synapse")]
    assert sorted(started) == sorted(names)


def test_messages_pass_both_ways(carol, room, remote, homeserver):
    domain = homeserver["server_name"]
    remote.say(room, "alice", "hello from alice")
    remote.say(room, "bob", "hello from bob")
    carol.say(room, "hello from carol")
    ghosts = {(f"@{BRIDGE}_alice:{domain}", "hello from alice"), (f"@{BRIDGE}_bob:{domain}", "hello from bob")}
    assert ghosts <= set(carol.heard(room))
    until(lambda: "hello from carol" in [text for _, text in remote.heard()], "the remote network gets the message")
    assert not {text for _, text in remote.heard()} & {text for _, text in ghosts}


def test_a_second_run_changes_nothing(host, processes):
    with each_started_once(host, []):
        assert apply(host, "test.e2e.bridge", test=True) == {}
        assert apply(host, "test.e2e.bridge") == {}


def test_every_process_reads_the_registration_and_can_not_write_it(host, homeserver, processes):
    path = homeserver["registration"]
    written = host.read(path)
    for name in processes:
        assert host.run("docker", "exec", name, "cat", path).stdout == written
        assert host.run("docker", "exec", name, "sh", "-c", f"echo >> {path}", check=False).returncode != 0
    assert host.sh(f"stat --format '%U %G %a' {path}").stdout.split() == ["root", homeserver["group"], "640"]


def test_every_process_has_the_bridges_container_arguments(host, processes):
    label = '{{index .Config.Labels "org.example.testbridge"}}'
    shown = host.run("docker", "inspect", "--format", label, *processes).stdout.split()
    assert shown == ["here"] * len(processes)


def test_no_token_is_shown_anywhere(host, processes):
    tokens = host.salt("synapse_appservice.tokens", BRIDGE)
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
    assert "at once" in [text for _, text in carol.heard(room)]


def test_a_bridge_without_a_homeserver_gives_up(host):
    # Or the test above would show nothing.
    host.run("systemctl", "stop", UNIT, "matrix-synapse")
    exec_start = "/opt/test-bridge/bin/python /opt/test-bridge/bridge.py /etc/test-bridge/config.json"
    assert host.sh(f"cd /tmp; {exec_start}", check=False, timeout=20).returncode == 1
    host.run("systemctl", "start", UNIT)


def test_a_dead_token_is_refused_and_the_new_registration_works(host, carol, room, remote, processes):
    before = host.salt("synapse_appservice.tokens", BRIDGE)
    assert host.salt("synapse_appservice.renew_tokens", BRIDGE) == ["as_token", "hs_token"]
    with each_started_once(host, processes):
        apply(host, "synapse")
    carol.say(room, "while the bridge is dead")

    assert host.run("systemctl", "restart", UNIT, check=False).returncode != 0
    journal = host.sh(f"journalctl --unit {UNIT} --output cat --lines 20").stdout
    assert "M_UNKNOWN_TOKEN: the homeserver does not know this as_token" in journal
    assert host.run("systemctl", "is-active", UNIT, check=False).stdout.strip() == "failed"

    with each_started_once(host, []):
        changes = apply(host, "test.e2e.bridge")
    assert set(changes) == {"The test bridge is configured", "The test bridge is running"}
    assert not set(before.values()) & set(host.salt("synapse_appservice.tokens", BRIDGE).values())
    remote.say(room, "alice", "alive again")
    assert "alive again" in [text for _, text in carol.heard(room)]
    # Synapse comes back to an appservice that failed after a while, and brings what was said meanwhile.
    until(
        lambda: "while the bridge is dead" in [text for _, text in remote.heard()],
        "the remote network gets what was said meanwhile",
        seconds=120,
    )


def an_appservice(name, **changes):
    registration = {"url": None, "sender_localpart": name, "namespaces": {}, **changes}
    return {"synapse": {"appservices": {name: {"registration": registration}}}}


def test_pillar_and_hook_with_the_same_id_are_a_fault_that_changes_nothing(host, processes):
    before = host.sh("find /etc/matrix-synapse -type f -exec sha256sum {} + | sort").stdout
    with each_started_once(host, []):
        result = host.salt("state.apply", "synapse", pillar=an_appservice(BRIDGE))
    said = json.dumps(result)
    assert f"synapse:appservices:{BRIDGE}" in said
    assert f"synapse_appservice.registered {BRIDGE}" in said
    assert host.sh("find /etc/matrix-synapse -type f -exec sha256sum {} + | sort").stdout == before


def test_an_appservice_in_the_pillar_gets_tokens_that_stay(host, homeserver, processes):
    path = f"{homeserver['registrations']}/inline.yaml"
    with each_started_once(host, processes):
        foreseen = apply(host, "synapse", pillar=an_appservice("inline"), test=True)
        done = apply(host, "synapse", pillar=an_appservice("inline"))
    assert foreseen == done
    assert done["Appservices have their tokens"] == {"inline": {"old": None, "new": ["as_token", "hs_token"]}}
    written = host.read(path)
    assert apply(host, "synapse", pillar=an_appservice("inline"), test=True) == {}

    with each_started_once(host, processes):
        apply(host, "synapse")
    assert host.run("test", "-e", path, check=False).returncode == 1
    assert "inline" not in host.read("/etc/matrix-synapse/homeserver.yaml")

    with each_started_once(host, processes):
        apply(host, "synapse", pillar=an_appservice("inline"))
    assert host.read(path) == written
    apply(host, "synapse")
