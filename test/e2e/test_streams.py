"""
Every kind of request is answered by the process that the plan has for it, with Synapse's own processes behind nginx: what
the proof of the routes takes from what Synapse registers, seen once for real.
"""

import copy
import json
import os
import re
import urllib.parse

import proof
import pytest
from conftest import PILLAR
from deployment import Deployment, owners_in, quote
from host import Host

STREAMS = proof.DATA["workers"]["streams"]


@pytest.fixture(scope="module")
def deployment():
    """A homeserver with a worker for everything, in a host of its own."""
    pillar = copy.deepcopy(PILLAR)
    pillar["workers"] = {
        "preset": "specialized-workers",
        "list": [
            {"type": "stream-writer", "stream": it}
            # The preset has one of events already.
            for it in ("thread_subscriptions", "quarantined_media_changes", "events")
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
    return owners_in(deployment.host.salt("synapse_workers.plan"))


@pytest.fixture(scope="module")
def alice(deployment):
    """A user who may use the admin API."""
    alice = deployment.user()
    query = f"update users set admin = 1 where name = '{alice.id}' returning name"
    assert alice.id in deployment.host.run("runuser", "-u", "postgres", "--", "psql", "synapse", "-c", query).stdout
    return alice


@pytest.fixture(scope="module")
def names(alice):
    """What stands in the paths below."""
    room = alice.room()
    media = alice.ask("POST", "/_matrix/media/v3/upload", b"text", **{"Content-Type": "text/plain"})["content_uri"]
    found = {
        "room": room,
        "event": alice.say(room, "hello"),
        "user": alice.id,
        "device": alice.ask("GET", "/_matrix/client/v3/account/whoami")["device_id"],
    }
    return {key: quote(value) for key, value in found.items()} | {"media": media.removeprefix("mxc://")}


CLIENT = "/_matrix/client/v3"
THREAD = "/_matrix/client/unstable/io.element.msc4306/rooms/{room}/thread/{event}"
# Owner, method, path, body. The writes of streams come first.
REQUESTS = [
    ("typing", "PUT", CLIENT + "/rooms/{room}/typing/{user}", {"typing": True, "timeout": 1000}),
    ("to_device", "PUT", CLIENT + "/sendToDevice/m.test/1", {"messages": {"USER": {"*": {"a": 1}}}}),
    ("account_data", "PUT", CLIENT + "/user/{user}/account_data/m.test", {"a": 1}),
    ("account_data", "PUT", CLIENT + "/user/{user}/rooms/{room}/tags/u.work", {"order": 0.5}),
    ("receipts", "POST", CLIENT + "/rooms/{room}/receipt/m.read/{event}", {}),
    ("receipts", "POST", CLIENT + "/rooms/{room}/read_markers", {"m.read": "EVENT", "m.fully_read": "EVENT"}),
    ("presence", "PUT", CLIENT + "/presence/{user}/status", {"presence": "online"}),
    ("push_rules", "PUT", CLIENT + "/pushrules/global/room/{room}", {"actions": ["notify"]}),
    ("push_rules", "DELETE", CLIENT + "/pushrules/global/room/{room}", None),
    ("device_lists", "PUT", CLIENT + "/devices/{device}", {"display_name": "a name"}),
    ("thread_subscriptions", "PUT", THREAD + "/subscription", {}),
    ("quarantined_media_changes", "POST", "/_synapse/admin/v1/media/quarantine/{media}", {}),
    ("quarantined_media_changes", "POST", "/_synapse/admin/v1/media/unquarantine/{media}", {}),
    ("push_rules", "GET", CLIENT + "/pushrules/", None),
    ("room", "GET", CLIENT + "/rooms/{room}/messages?dir=b", None),
    ("sync", "GET", CLIENT + "/sync?timeout=0", None),
    ("client-reader", "GET", CLIENT + "/account/whoami", None),
    ("federation-reader", "GET", "/_matrix/federation/v1/version", None),
    ("user-directory", "POST", CLIENT + "/user_directory/search", {"search_term": "user"}),
    ("media-repository", "GET", "/_matrix/client/v1/media/download/{media}", None),
    ("main", "GET", CLIENT + "/pushers", None),
]


def test_each_request_is_answered_by_its_owner(deployment, owners, alice, names):
    """The user agent tells the requests apart in nginx's log."""
    event = urllib.parse.unquote(names["event"])
    for number, (_, method, path, body) in enumerate(REQUESTS):
        body = body and json.loads(json.dumps(body).replace("EVENT", event).replace("USER", alice.id))
        alice.ask(method, path.format(**names), body, **{"User-Agent": f"request {number}"})
    answers = {answer.agent: answer for answer in deployment.answers()}
    answered = {}
    for number, (owner, method, path, _) in enumerate(REQUESTS):
        answer = answers[f"request {number}"]
        name = owner if answer.process in owners[owner] else answer.process
        answered[f"{method} {path}"] = (name, answer.status)
    assert answered == {f"{method} {path}": (owner, 200) for owner, method, path, _ in REQUESTS}


@pytest.mark.parametrize(
    ("owner", "method", "path", "body"), [it for it in REQUESTS if it[0] in STREAMS and it[1] != "GET"]
)
def test_a_write_on_another_process_fails_or_is_passed_on_as_the_proof_has_it(
    owner, method, path, body, deployment, owners, alice, names
):
    others = ["media-repository"] if owner == "quarantined_media_changes" else ["main", "client-reader"]
    fails = owner in {stream for stream, _ in proof.WRITERS.values()}
    body = json.dumps(body).replace("EVENT", urllib.parse.unquote(names["event"])).replace("USER", alice.id)
    for other in others:
        socket = f"/run/matrix-synapse/public/{owners[other][0]}.sock"
        command = ["curl", "--silent", "--unix-socket", socket, "--request", method, "--data", body, "--header", "@-"]
        command += ["--write-out", "%{http_code}", "--output", "/dev/null", f"http://localhost{path.format(**names)}"]
        done = deployment.host.run(*command, input=f"Authorization: Bearer {alice.token}\n")
        assert (other, done.stdout) == (other, "500" if fails else "200")


def test_the_events_of_a_room_are_persisted_by_one_of_the_two_writers(deployment, owners, alice):
    """nginx does not see it: the process that was asked passes them on."""

    def persisted(writer):
        command = ["curl", "--silent", "--unix-socket", f"/run/matrix-synapse/private/{writer}.sock"]
        metrics = deployment.host.run(*command, "http://localhost/_synapse/metrics").stdout
        counted = r"^synapse_http_server_response_count_total\{.*ReplicationSendEvent.* (\S+)$"
        return sum(map(float, re.findall(counted, metrics, re.M)))

    def writers_of(room):
        before = {writer: persisted(writer) for writer in owners["events"]}
        for text in ("hello", "hello again"):
            alice.say(room, text)
        return [writer for writer in before if persisted(writer) > before[writer]]

    found = set()
    # Which of them is told by the room's id, which is random.
    for _ in range(20):
        (writer,) = writers_of(alice.room())
        found.add(writer)
    assert found == set(owners["events"])
