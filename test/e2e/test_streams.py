"""
Every kind of request is answered by the process that the plan has for it, with Synapse's own processes behind nginx: what
the proof of the routes takes from what Synapse registers, seen once for real.
"""

import copy
import os
import re

import pytest
from conftest import PILLAR
from deployment import Deployment, quote
from host import Host

LOG = "/var/log/nginx/matrix-synapse.access.log"


@pytest.fixture(scope="module")
def deployment():
    """A homeserver with a worker for everything, in a host of its own."""
    pillar = copy.deepcopy(PILLAR)
    pillar["workers"] = {
        "preset": "specialized-workers",
        "list": [
            {"type": "stream-writer", "stream": it} for it in ("thread_subscriptions", "quarantined_media_changes")
        ],
    }
    pillar["config"]["experimental_features"] = {"msc4306_enabled": True}
    pillar["nginx"]["admin_allow"] = ["0.0.0.0/0"]
    host = Host.up("synapse-e2e-streams")
    host.salt("saltutil.sync_all")
    deployment = Deployment(host, pillar)
    deployment.apply()
    yield deployment
    if not os.environ.get("KEEP_HOST"):
        host.down()


@pytest.fixture(scope="module")
def owners(deployment):
    """The names of the processes by stream or type."""
    found = {}
    for process in deployment.host.salt("synapse_workers.plan")["processes"]:
        found.setdefault(process["stream"] or process["type"], []).append(process["name"])
    return found


@pytest.fixture(scope="module")
def alice(deployment):
    """A user who may use the admin API."""
    alice = deployment.user("alice")
    query = f"update users set admin = 1 where name = '{alice.id}' returning name"
    assert alice.id in deployment.host.run("runuser", "-u", "postgres", "--", "psql", "synapse", "-c", query).stdout
    return alice


@pytest.fixture(scope="module")
def names(alice):
    """What stands in the requests below."""
    room = alice.room()
    media = alice.ask("POST", "/_matrix/media/v3/upload", b"text", **{"Content-Type": "text/plain"})["content_uri"]
    found = {
        "room": room,
        "event": alice.say(room, "hello"),
        "user": alice.id,
        "device": alice.ask("GET", "/_matrix/client/v3/account/whoami")["device_id"],
    }
    return {
        **{key: quote(value) for key, value in found.items()},
        "media": media.removeprefix("mxc://"),
        "EVENT": found["event"],
    }


CLIENT = "/_matrix/client/v3"
REQUESTS = [
    ("typing", "PUT", CLIENT + "/rooms/{room}/typing/{user}", {"typing": True, "timeout": 1000}),
    ("to_device", "PUT", CLIENT + "/sendToDevice/m.test/1", {"messages": {"@alice:example.org": {"*": {"a": 1}}}}),
    ("account_data", "PUT", CLIENT + "/user/{user}/account_data/m.test", {"a": 1}),
    ("account_data", "PUT", CLIENT + "/user/{user}/rooms/{room}/tags/u.work", {"order": 0.5}),
    ("receipts", "POST", CLIENT + "/rooms/{room}/receipt/m.read/{event}", {}),
    ("receipts", "POST", CLIENT + "/rooms/{room}/read_markers", {"m.read": "EVENT", "m.fully_read": "EVENT"}),
    ("presence", "PUT", CLIENT + "/presence/{user}/status", {"presence": "online"}),
    ("push_rules", "PUT", CLIENT + "/pushrules/global/room/{room}", {"actions": ["notify"]}),
    ("push_rules", "GET", CLIENT + "/pushrules/", {}),
    ("push_rules", "DELETE", CLIENT + "/pushrules/global/room/{room}", {}),
    ("device_lists", "PUT", CLIENT + "/devices/{device}", {"display_name": "a name"}),
    (
        "thread_subscriptions",
        "PUT",
        "/_matrix/client/unstable/io.element.msc4306/rooms/{room}/thread/{event}/subscription",
        {},
    ),
    ("quarantined_media_changes", "POST", "/_synapse/admin/v1/media/quarantine/{media}", {}),
    ("quarantined_media_changes", "POST", "/_synapse/admin/v1/media/unquarantine/{media}", {}),
    ("room", "GET", CLIENT + "/rooms/{room}/messages?dir=b", {}),
    ("sync", "GET", CLIENT + "/sync?timeout=0", {}),
    ("client-reader", "GET", CLIENT + "/account/whoami", {}),
    ("federation-reader", "GET", "/_matrix/federation/v1/version", {}),
    ("user-directory", "POST", CLIENT + "/user_directory/search", {"search_term": "alice"}),
    ("media-repository", "GET", "/_matrix/client/v1/media/download/{media}", {}),
    ("main", "GET", CLIENT + "/pushers", {}),
]


def test_each_request_is_answered_by_its_owner(deployment, owners, alice, names):
    """The user agent tells the requests apart in nginx's log."""
    for number, (_, method, path, body) in enumerate(REQUESTS):
        body = {
            key: names.get(value, value) if isinstance(value, str) else value for key, value in (body or {}).items()
        }
        alice.ask(
            method, path.format(**names), None if method == "GET" else body, **{"User-Agent": f"request {number}"}
        )
    log = deployment.host.read(LOG)
    answered = {}
    for number, (owner, method, path, _) in enumerate(REQUESTS):
        line = re.search(rf'^.* to unix:\S*/(\S+)[.]sock: (\d+) .*"request {number}"$', log, re.MULTILINE)
        answered[f"{owner}: {method} {path}"] = (line[1] in owners[owner], line[2])
    assert answered == dict.fromkeys(answered, (True, "200"))


def test_an_event_is_persisted_by_the_writer_of_events(deployment, owners, alice, names):
    """nginx does not see it: the process that was asked passes it on."""
    (writer,) = owners["events"]

    def persisted():
        command = (
            f"curl --silent --unix-socket /run/matrix-synapse/private/{writer}.sock http://localhost/_synapse/metrics"
        )
        metric = "synapse_http_server_response_count_total"
        lines = deployment.host.sh(command).stdout.splitlines()
        counts = [line for line in lines if line.startswith(metric) and "ReplicationSendEvent" in line]
        return sum(float(line.split()[-1]) for line in counts)

    before = persisted()
    alice.ask("PUT", f"{CLIENT}/rooms/{names['room']}/send/m.room.message/1", {"msgtype": "m.text", "body": "hello"})
    assert persisted() > before
