"""
nginx with the generated configuration, asked over real connections: in front of it stand clients, behind it processes that
answer every request with their own name and what they were sent.
"""

import collections
import concurrent.futures
import contextlib
import http.client
import http.server
import json
import pathlib
import shutil
import socket
import socketserver
import ssl
import subprocess
import threading
import time
import urllib.parse

import pytest
import yaml
from front import DIGEST, LIMITS, Front, free_port, module, render

ROOT = pathlib.Path(__file__).parents[2]
ROUTES = yaml.safe_load((ROOT / "synapse/data/routes.yaml").read_text())
STREAMS = yaml.safe_load((ROOT / "synapse/data/workers.yaml").read_text())["streams"]

# Requests by the kind of process that must answer them, after Synapse's worker documentation. They are not taken from
# routes.yaml, as they test it.
REQUESTS = {
    "sync": """
        GET /_matrix/client/v3/sync
        GET /_matrix/client/r0/sync?since=s1&timeout=30000
        GET /_matrix/client/api/v1/events
        GET /_matrix/client/v3/initialSync
        GET /_matrix/client/v3/rooms/!r:x/initialSync
        POST /_matrix/client/unstable/org.matrix.simplified_msc3575/sync
        OPTIONS /_matrix/client/v3/sync
    """,
    "transaction": """
        PUT /_matrix/federation/v1/send/1234
        PUT /_matrix/federation/v1/send/1234/
    """,
    "federation": """
        GET /_matrix/federation/v1/version
        GET /_matrix/federation/v1/event/$e
        GET /_matrix/federation/v1/publicRooms
        POST /_matrix/federation/v1/publicRooms
        GET /_matrix/federation/v1/query/profile?user_id=@u:x
        GET /_matrix/federation/v1/query/directory
        GET /_matrix/federation/v1/user/devices/@u:x
        POST /_matrix/federation/v1/user/keys/query
        POST /_matrix/federation/v1/user/keys/claim
        POST /_matrix/key/v2/query
        GET /_matrix/key/v2/query/x
        GET /_matrix/key/v2/server
        OPTIONS /_matrix/federation/v1/version
    """,
    "federated room": """
        GET /_matrix/federation/v1/state/!r:x
        GET /_matrix/federation/v1/state_ids/!r:x
        GET /_matrix/federation/v1/backfill/!r:x
        POST /_matrix/federation/v1/get_missing_events/!r:x
        GET /_matrix/federation/v1/make_join/!r:x/@u:y
        GET /_matrix/federation/v1/make_leave/!r:x/@u:y
        GET /_matrix/federation/v1/make_knock/!r:x/@u:y
        PUT /_matrix/federation/v1/send_join/!r:x/$e
        PUT /_matrix/federation/v2/send_join/!r:x/$e
        PUT /_matrix/federation/v1/send_leave/!r:x/$e
        PUT /_matrix/federation/v2/send_leave/!r:x/$e
        PUT /_matrix/federation/v1/send_knock/!r:x/$e
        PUT /_matrix/federation/v1/invite/!r:x/$e
        PUT /_matrix/federation/v2/invite/!r:x/$e
        GET /_matrix/federation/v1/event_auth/!r:x/$e
        GET /_matrix/federation/v1/timestamp_to_event/!r:x
        PUT /_matrix/federation/v1/exchange_third_party_invite/!r:x
        GET /_matrix/federation/v1/hierarchy/!r:x
        GET /_matrix/federation/unstable/rooms/!r:x/complexity
    """,
    "room": """
        POST /_matrix/client/v3/createRoom
        GET /_matrix/client/v3/rooms/!r:x/joined_members
        GET /_matrix/client/v3/rooms/!r:x/context/$e
        GET /_matrix/client/v3/rooms/!r:x/members
        GET /_matrix/client/v3/rooms/!r:x/state
        GET /_matrix/client/v3/rooms/!r:x/messages?dir=b
        GET /_matrix/client/v3/rooms/!r:x/event/$e
        GET /_matrix/client/v3/rooms/!r:x/aliases
        GET /_matrix/client/unstable/org.matrix.msc2432/rooms/!r:x/aliases
        GET /_matrix/client/v1/rooms/!r:x/hierarchy
        GET /_matrix/client/v1/rooms/!r:x/threads
        GET /_matrix/client/v1/rooms/!r:x/timestamp_to_event
        GET /_matrix/client/v1/rooms/!r:x/relations/$e
        GET /_matrix/client/v1/rooms/!r:x/relations/$e/m.thread
        GET /_matrix/client/unstable/rooms/!r:x/relations/$e/m.thread/m.room.message
        GET /_matrix/client/v1/room_summary/!r:x
        GET /_matrix/client/unstable/im.nheko.summary/summary/!r:x
        GET /_matrix/client/unstable/im.nheko.summary/rooms/!r:x/summary
        POST /_matrix/client/v3/rooms/!r:x/redact/$e
        PUT /_matrix/client/v3/rooms/!r:x/redact/$e/txn
        POST /_matrix/client/v3/rooms/!r:x/send/m.room.message
        PUT /_matrix/client/v3/rooms/!r:x/send/m.room.message/txn
        PUT /_matrix/client/r0/rooms/%21r%3Ax/send/m.room.message/txn
        PUT /_matrix/client/v3/rooms/!version12/send/m.room.message/txn
        GET /_matrix/client/v3/rooms/!r:x/state/m.room.name
        PUT /_matrix/client/v3/rooms/!r:x/state/m.room.name/
        PUT /_matrix/client/v3/rooms/!r:x/state/m.space.child/!s:x
        POST /_matrix/client/v3/rooms/!r:x/join
        POST /_matrix/client/v3/rooms/!r:x/invite
        POST /_matrix/client/v3/rooms/!r:x/leave
        POST /_matrix/client/v3/rooms/!r:x/ban
        POST /_matrix/client/v3/rooms/!r:x/unban
        POST /_matrix/client/v3/rooms/!r:x/kick
        POST /_matrix/client/v3/join/!r:x
        POST /_matrix/client/v3/join/%23alias:x
        POST /_matrix/client/v3/knock/!r:x
    """,
    "client": """
        GET /_matrix/client/versions
        GET /_matrix/client/v3/publicRooms
        POST /_matrix/client/v3/publicRooms
        GET /_matrix/client/v3/account/3pid
        GET /_matrix/client/v3/account/whoami
        POST /_matrix/client/v3/account/deactivate
        GET /_matrix/client/v3/voip/turnServer
        GET /_matrix/client/v3/joined_rooms
        POST /_matrix/client/v3/search
        POST /_matrix/client/v3/user/@u:x/filter
        GET /_matrix/client/v3/user/%40u%3Ax/filter/1
        GET /_matrix/client/v3/directory/room/%23alias:x
        PUT /_matrix/client/v3/directory/room/%23alias:x
        GET /_matrix/client/v3/capabilities
        GET /_matrix/client/v3/notifications
        POST /_matrix/client/v3/keys/query
        GET /_matrix/client/v3/keys/changes
        POST /_matrix/client/v3/keys/claim
        PUT /_matrix/client/v3/room_keys/keys/!r:x/s
        POST /_matrix/client/v3/room_keys/version
        GET /_matrix/client/v3/login
        POST /_matrix/client/v3/login
        POST /_matrix/client/v3/register
        GET /_matrix/client/v3/register/available
        GET /_matrix/client/v1/register/m.login.registration_token/validity
        GET /_matrix/client/v3/password_policy
        GET /_matrix/client/v3/profile/@u:x
        PUT /_matrix/client/v3/profile/@u:x/displayname
        GET /_matrix/client/unstable/org.matrix.msc4140/delayed_events
        POST /_matrix/client/unstable/org.matrix.msc4140/delayed_events/1/restart
        GET /_synapse/admin/v1/rooms/!r:x
        GET /_synapse/admin/v2/users/@u:x
    """,
    "user directory": """
        POST /_matrix/client/v3/user_directory/search
    """,
    "typing": """
        PUT /_matrix/client/v3/rooms/!r:x/typing/@u:x
    """,
    "to_device": """
        PUT /_matrix/client/v3/sendToDevice/m.room.encrypted/txn
    """,
    "receipts": """
        POST /_matrix/client/v3/rooms/!r:x/receipt/m.read/$e
        POST /_matrix/client/v3/rooms/!r:x/read_markers
    """,
    "push_rules": """
        PUT /_matrix/client/v3/pushrules/global/room/!r:x
        PUT /_matrix/client/v3/pushrules/global/override/r/enabled
        DELETE /_matrix/client/v3/pushrules/global/room/!r:x
    """,
    "push_rules read": """
        GET /_matrix/client/v3/pushrules/
        GET /_matrix/client/v3/pushrules/global/
        HEAD /_matrix/client/v3/pushrules/global/
    """,
    "account_data": """
        PUT /_matrix/client/v3/user/@u:x/account_data/m.direct
        PUT /_matrix/client/v3/user/@u:x/rooms/!r:x/account_data/m.fully_read
        PUT /_matrix/client/v3/user/@u:x/rooms/!r:x/tags/u.work
        DELETE /_matrix/client/v3/user/@u:x/rooms/!r:x/tags/u.work
    """,
    "account_data read": """
        GET /_matrix/client/v3/user/@u:x/account_data/m.direct
        GET /_matrix/client/v3/user/@u:x/rooms/!r:x/account_data/m.fully_read
        GET /_matrix/client/v3/user/@u:x/rooms/!r:x/tags
    """,
    "presence": """
        PUT /_matrix/client/v3/presence/@u:x/status
    """,
    "presence read": """
        GET /_matrix/client/v3/presence/@u:x/status
    """,
    "device_lists": """
        POST /_matrix/client/v3/delete_devices
        GET /_matrix/client/v3/devices
        PUT /_matrix/client/v3/devices/D
        DELETE /_matrix/client/v3/devices/D
        POST /_matrix/client/v3/keys/upload
        POST /_matrix/client/v3/keys/device_signing/upload
        POST /_matrix/client/v3/keys/signatures/upload
    """,
    "thread_subscriptions": """
        PUT /_matrix/client/unstable/io.element.msc4306/rooms/!r:x/thread/$e/subscription
        DELETE /_matrix/client/unstable/io.element.msc4306/rooms/!r:x/thread/$e/subscription
    """,
    "thread_subscriptions read": """
        GET /_matrix/client/unstable/io.element.msc4306/rooms/!r:x/thread/$e/subscription
        GET /_matrix/client/unstable/io.element.msc4308/thread_subscriptions
    """,
    "quarantined_media_changes": """
        POST /_synapse/admin/v1/quarantine_media/!r:x
        POST /_synapse/admin/v1/room/!r:x/media/quarantine
        POST /_synapse/admin/v1/user/@u:x/media/quarantine
        POST /_synapse/admin/v1/media/quarantine/x/m
        POST /_synapse/admin/v1/media/unquarantine/x/m
    """,
    "media": """
        POST /_matrix/media/v3/upload
        PUT /_matrix/media/v3/upload/x/m
        POST /_matrix/media/v1/create
        GET /_matrix/media/v3/download/x/m
        HEAD /_matrix/media/v3/download/x/m
        GET /_matrix/client/v1/media/download/x/m/name.png
        GET /_matrix/client/v1/media/thumbnail/x/m
        GET /_matrix/client/v1/media/config
        GET /_matrix/client/v1/media/preview_url?url=https://y
        GET /_matrix/federation/v1/media/download/m
        GET /_matrix/federation/v1/media/thumbnail/m
        POST /_synapse/admin/v1/purge_media_cache
        GET /_synapse/admin/v1/room/!r:x/media
        GET /_synapse/admin/v1/users/@u:x/media
        DELETE /_synapse/admin/v1/media/x/m
        POST /_synapse/admin/v1/media/protect/m
        GET /_synapse/admin/v1/media/quarantine_changes
    """,
    "main": """
        GET /_matrix/client/v3/pushers
        POST /_matrix/client/v3/pushers/set
        POST /_matrix/client/v3/logout
        POST /_matrix/client/v3/logout/all
        POST /_matrix/client/v3/refresh
        GET /_matrix/client/v3/auth/m.login.recaptcha/fallback/web
        POST /_matrix/client/v3/rooms/!r:x/report/$e
        POST /_matrix/client/v3/rooms/!r:x/report
        POST /_matrix/client/v3/user/@u:x/openid/request_token
        GET /_matrix/federation/v1/openid/userinfo
        GET /_matrix/client/v3/thirdparty/protocols
        POST /_matrix/client/v3/rooms/!r:x/upgrade
        POST /_matrix/client/v3/rooms/!r:x/forget
        GET /_matrix/client/unstable/account_validity/renew
        POST /_matrix/client/v3/account/3pid/add
        POST /_matrix/client/v3/account/3pid/delete
        POST /_matrix/client/v3/account/password
        POST /_matrix/client/v3/account/password/email/requestToken
        POST /_matrix/client/v3/register/email/requestToken
        PUT /_matrix/client/v3/directory/list/room/!r:x
        GET /_matrix/client/v1/mutual_rooms
        POST /_matrix/client/v1/login/get_token
        GET /_matrix/client/v3/login/sso/redirect
        GET /_matrix/client/v3/login/sso/redirect/oidc?redirectUrl=https://y
        GET /_matrix/client/v3/login/cas/ticket
        GET /_synapse/client/pick_idp
        GET /_synapse/client/pick_username/account_details
        POST /_synapse/client/new_user_consent
        GET /_synapse/client/sso_register
        GET /_synapse/client/oidc/callback
        POST /_synapse/client/saml2/authn_response
        GET /_synapse/client/password_reset/email/submit_token
        POST /_matrix/client/unstable/org.matrix.msc4140/delayed_events/1/send
        GET /_synapse/admin/v1/rooms
        GET /_synapse/admin/v1/rooms/!r:x/members
        GET /_synapse/admin/v2/users
        PUT /_synapse/admin/v2/users/@u:x
        GET /_synapse/admin/v1/statistics/users/media
        GET /_matrix/static/
        GET /_matrix/something/new
    """,
}

READS = [kind for kind in REQUESTS if kind.endswith(" read")]
SERVE_NOBODY = ("pusher", "federation-sender", "appservice", "background", "events")
SPECIALISED = ["room", "sync", "client-reader", "federation-reader", "media-repository", "user-directory"]

# What there is besides main, and who then answers each kind. A kind that is not named is main's.
LAYOUTS = {
    "main alone": ([], {}),
    "workers that serve nobody": (["pusher", "federation-sender", "appservice", "background"], {}),
    "one generic worker": (
        ["generic"],
        {
            "generic": ["sync", "transaction", "federation", "federated room", "room", "client", "user directory"]
            + ["device_lists", *READS]
        },
    ),
    "every stream writer and nothing else": (
        list(STREAMS),
        {stream: [stream, f"{stream} read"] for stream in STREAMS if stream != "events"},
    ),
    "every stream writer beside a generic worker": (
        [*STREAMS, "generic"],
        {
            **{stream: [stream, f"{stream} read"] for stream in STREAMS if stream != "events"},
            "generic": ["sync", "transaction", "federation", "federated room", "room", "client", "user directory"],
        },
    ),
    "specialised workers beside a generic one": (
        ["generic", *SPECIALISED],
        {
            "sync": ["sync"],
            "room": ["room"],
            "client-reader": ["client", "device_lists", *READS],
            "federation-reader": ["federation", "federated room", "transaction"],
            "media-repository": ["media", "quarantined_media_changes"],
            "user-directory": ["user directory"],
        },
    ),
    "sync alone": (["sync"], {"sync": ["sync"]}),
    "room alone": (["room"], {"room": ["room", "federated room"]}),
    "client reader alone": (
        ["client-reader"],
        {"client-reader": ["client", "room", "user directory", "device_lists", *READS]},
    ),
    "federation reader alone": (
        ["federation-reader"],
        {"federation-reader": ["federation", "federated room", "transaction"]},
    ),
    "media alone": (["media-repository"], {"media-repository": ["media", "quarantined_media_changes"]}),
    "media beside the writer of quarantines": (
        ["media-repository", "quarantined_media_changes"],
        {"media-repository": ["media"], "quarantined_media_changes": ["quarantined_media_changes"]},
    ),
    "user directory alone": (["user-directory"], {"user-directory": ["user directory"]}),
}


class Process(socketserver.ThreadingUnixStreamServer):
    """A process of the plan, that answers with its name and what it was sent."""

    daemon_threads = True
    request_queue_size = 128

    class RequestHandlerClass(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_one_request(self):
            self.server.connections.add(self.connection)
            super().handle_one_request()

        def do(self):
            self.server.came.release()
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            answer = {"process": self.server.name, "uri": self.path, "body": len(body), "headers": dict(self.headers)}
            status, headers, answer = self.server.answer(self.headers) or (200, {}, json.dumps(answer).encode())
            self.send_response(status)
            for name, value in {"X-Process": self.server.name, "Content-Length": len(answer), **headers}.items():
                self.send_header(name, str(value))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(answer)

        do_GET = do_HEAD = do_OPTIONS = do_POST = do_PUT = do_DELETE = do

        def log_message(self, *_):
            pass

    def __init__(self, name, path):
        self.name, self.path, self.connections = name, path, set()
        # Counts the requests whose headers came; what a test wants to be answered with in place of the above.
        self.came, self.answer = threading.Semaphore(0), lambda headers: None
        super().__init__(str(path), self.RequestHandlerClass)
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def handle_error(self, *_):
        """Clients that go away are no concern here."""

    def stop(self):
        """Die as a process does: connections closed, socket left behind."""
        self.shutdown()
        self.server_close()
        for connection in self.connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def start_again(self):
        self.path.unlink()
        return Process(self.name, self.path)


class Nginx(Front):
    """nginx before the given kinds of processes, each as often as it is named; a stream's name is its writer."""

    def __init__(self, directory, kinds, **settings):
        shutil.rmtree(directory, ignore_errors=True)
        for side in ("public", "gate"):
            (directory / side).mkdir(parents=True)
        seen = collections.Counter()
        self.processes, self.gates = {}, {}
        planned = []
        for kind in ["main", *kinds]:
            seen[kind] += 1
            name = f"{kind}.{seen[kind]}"
            path = directory / "public" / f"{name}.sock"
            self.processes[name] = Process(name, path)
            planned.append(
                {
                    "name": name,
                    "type": "stream-writer" if kind in STREAMS else kind,
                    "stream": kind if kind in STREAMS else None,
                    "public_socket": None if kind in SERVE_NOBODY else str(path),
                }
            )
        super().__init__(directory, module("synapse_workers").routing(planned, ROUTES, "latest"), **settings)

    def __exit__(self, *_):
        super().__exit__()
        for process in [*self.processes.values(), *self.gates.values()]:
            process.stop()

    def add_gates(self):
        """Stand-ins for the programs that hold requests."""
        for name in self.processes:
            self.gates[name] = Process(f"gate of {name}", self.directory / "gate" / f"{name}.sock")

    def ask(self, method, uri, headers=None, body=None, federation=False, tls=None):
        """Send a request with the URI just as it stands here; return status, headers and body (parsed, if there is one)."""
        port = self.federation if federation else self.client
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        if tls:
            connection = http.client.HTTPSConnection("127.0.0.1", port, timeout=20, context=tls)
        connection.request(method, uri, body, headers or {})
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        parse = answer.headers.get("Content-Type") in ("application/json", None)
        return answer.status, answer.headers, json.loads(content) if content and parse else content

    def raw(self, request, headers, federation=False):
        """The status that nginx answers with, whatever the request looks like."""
        with socket.create_connection(
            ("127.0.0.1", self.federation if federation else self.client), timeout=20
        ) as sent:
            lines = [f"{request} HTTP/1.1", "Host: x", "Connection: close", *map(": ".join, headers.items()), "", ""]
            sent.sendall("\r\n".join(lines).encode())
            return int(sent.makefile("rb").readline().split()[1])

    def who(self, method, uri, headers=None, body=None):
        """The name of the process that answers."""
        status, answered, _ = self.ask(method, uri, headers, body)
        return answered.get("X-Process", status)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("nginx")


@pytest.fixture(scope="module")
def nginx(directory):
    """A layout in which everything can be balanced."""
    kinds = ["generic"] * 3 + ["typing", "receipts", "receipts", "media-repository"]
    well_known = {
        "client": {"m.homeserver": {"base_url": "https://matrix.example.org"}, "odd": """it's $5 \\ "é" </x>"""},
        "server": {"m.server": "matrix.example.org:443"},
    }
    with Nginx(directory / "shared", kinds, well_known=well_known) as running:
        yield running


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_request_reaches_the_process_that_must_answer_it(layout, directory):
    kinds, owners = LAYOUTS[layout]
    owner = {kind: who for who, answered in owners.items() for kind in answered}
    expected = {
        line.strip(): owner.get(kind, "main") for kind, lines in REQUESTS.items() for line in lines.strip().splitlines()
    }
    with Nginx(directory / "layout", kinds) as nginx:
        assert {request: nginx.who(*request.split()).split(".")[0] for request in expected} == expected


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nginx_accepts_the_configuration_without_a_warning(layout, directory):
    nginx = Nginx(directory / "check", LAYOUTS[layout][0])
    said = nginx.run("-t").stderr + (directory / "check/start.log").read_text()
    assert "successful" in said
    assert "[warn]" not in said


@pytest.mark.parametrize(
    "uri",
    [
        "/_matrix/client/v3/rooms/!abc:example.org/state/m.x/%2e%2E%2Fa",
        "/_matrix/client/v3/rooms/%21abc%3Aexample.org/send/m.room.message/%252F%20+?a=%2F&b=c%20d",
        "/_matrix/client/v3/profile/@u:x//displayname",
        "/_matrix/media/v3/download/x/m/%C3%A9%E2%82%AC.png?allow_remote=false",
        "/_matrix/federation/v1/event/$abc%2Fdef",
    ],
)
def test_the_uri_reaches_synapse_as_the_client_sent_it(nginx, uri):
    assert nginx.ask("GET", uri)[2]["uri"] == uri


@pytest.mark.parametrize("uri", ["/_matrix/client/versions", "/_matrix/media/v3/config", "/_synapse/admin/v1/rooms"])
def test_host_address_scheme_and_request_id_reach_synapse(nginx, uri):
    sent = {"Host": "matrix.example.org:8443", "X-Forwarded-For": "198.51.100.7, 127.0.0.1", "X-Request-ID": "forged"}
    if "admin" in uri:
        sent["X-Forwarded-For"] = "127.0.0.1"
    headers = nginx.ask("GET", uri, sent)[2]["headers"]
    assert headers["Host"] == "matrix.example.org:8443"
    assert headers["X-Forwarded-For"] == sent["X-Forwarded-For"].split(",")[0]
    assert headers["X-Forwarded-Proto"] == "http"
    assert headers["X-Request-ID"] != "forged"
    assert headers["Connection"] == "close"


def test_a_proxy_in_front_is_believed_about_address_and_scheme(nginx):
    sent = {"X-Forwarded-For": "6.6.6.6, 203.0.113.9", "X-Forwarded-Proto": "https"}
    headers = nginx.ask("GET", "/_matrix/client/versions", sent)[2]["headers"]
    assert (headers["X-Forwarded-For"], headers["X-Forwarded-Proto"]) == ("203.0.113.9", "https")


def test_nobody_else_is_believed_about_address_and_scheme(directory):
    sent = {"X-Forwarded-For": "203.0.113.9", "X-Forwarded-Proto": "https"}
    with Nginx(directory / "front", [], trusted_proxies=[]) as nginx:
        headers = nginx.ask("GET", "/_matrix/client/versions", sent)[2]["headers"]
    assert (headers["X-Forwarded-For"], headers["X-Forwarded-Proto"]) == ("127.0.0.1", "http")


@pytest.mark.parametrize("name", ["client", "server"])
def test_well_known_says_word_for_word_what_the_settings_say(nginx, name):
    status, headers, content = nginx.ask("GET", f"/.well-known/matrix/{name}")
    assert (status, content) == (200, nginx.settings["well_known"][name])
    assert headers["Content-Type"] == "application/json"
    assert headers["Access-Control-Allow-Origin"] == "*"


def test_other_homeservers_find_well_known_server_alone(nginx):
    assert nginx.ask("GET", "/.well-known/matrix/server", federation=True)[0] == 200
    assert nginx.ask("GET", "/.well-known/matrix/client", federation=True)[0] == 404


def test_well_known_can_be_switched_off(directory):
    with Nginx(directory / "off", []) as nginx:
        assert nginx.ask("GET", "/.well-known/matrix/client")[0] == 404


@pytest.mark.parametrize(
    "uri", ["/", "/health", "/metrics", "/_synapse/metrics", "/_synapse/replication/x", "/_synapse/mas/x", "/_matrixx"]
)
def test_what_is_not_for_the_public_is_an_unrecognized_request(nginx, uri):
    status, headers, content = nginx.ask("GET", uri)
    assert (status, content["errcode"]) == (404, "M_UNRECOGNIZED")
    assert headers["Access-Control-Allow-Origin"] == "*"


def test_the_federation_listener_serves_federation_keys_and_media_only(nginx):
    served = ["/_matrix/federation/v1/version", "/_matrix/key/v2/server", "/_matrix/media/v3/download/x/m"]
    refused = ["/_matrix/client/versions", "/_synapse/client/pick_idp", "/_synapse/admin/v1/rooms", "/"]
    answers = {uri: nginx.ask("GET", uri, federation=True)[0] for uri in served + refused}
    assert answers == {**dict.fromkeys(served, 200), **dict.fromkeys(refused, 404)}


def test_federation_can_be_switched_off(directory):
    off = {"listen": ["127.0.0.1:1"], "tls": None, "enabled": False}
    with Nginx(directory / "off", [], federation=off) as nginx:
        assert nginx.ask("GET", "/_matrix/federation/v1/version")[0] == 200
        with pytest.raises(ConnectionRefusedError):
            nginx.ask("GET", "/_matrix/federation/v1/version", federation=True)


@pytest.mark.parametrize(
    "uri",
    [
        "/_synapse/admin/v1/rooms",
        "/_matrix/../_synapse/admin/v1/rooms",
        "/_matrix/%2e%2e/_synapse/admin/v1/rooms",
        "//_synapse/admin/v1/rooms",
        "/_synapse%2Fadmin/v1/rooms",
        "/_synapse/admin/v2/users/..%2F..%2F..%2F..%2F_matrix%2Fx",
        "/_synapse/metrics/..%2F..%2F_matrix%2Fx",
    ],
)
def test_the_admin_api_is_for_the_allowed_addresses_alone(nginx, uri):
    status, _, content = nginx.ask("GET", uri, {"X-Forwarded-For": "203.0.113.9"})
    assert (status, content["errcode"]) in [(403, "M_FORBIDDEN"), (404, "M_UNRECOGNIZED")]
    assert nginx.ask("GET", "/_synapse/admin/v1/rooms")[0] == 200


# What no path may lead the public to.
CLOSED = ["health", "metrics", "_synapse/admin", "_synapse/metrics", "_synapse/replication", "_synapse/mas"]


@pytest.mark.parametrize("federation", [False, True])
@pytest.mark.parametrize("closed", CLOSED)
def test_no_form_of_a_path_leads_to_what_is_closed(closed, federation, nginx):
    """Synapse splits the raw path at each slash, and decodes what is between. It removes no dots."""

    def resource(uri):
        path = uri.removeprefix("http://example.org").partition("?")[0]
        return "/".join(urllib.parse.unquote(segment) for segment in path[1:].split("/"))

    slashes, dots = ["/", "//", "/./", "%2F", "\\"], ["..", "%2e%2e", ".%2E", "..;"]
    begins = ["", "http://example.org", *(f"/_matrix{slash}{up}" for slash in slashes for up in dots)]
    begins += [
        "/_matrix/client/../..",
        "/_synapse/client/..",
        "/_synapse/client/..%2F..",
        "/_matrix/federation/%2E%2E/..",
    ]
    begins += ["/_matrix/media/v3/download/x/..%2F..%2F..%2F..%2F..", "/_matrix/?", "/_matrix/#", "/_matrix/%3F"]
    spelled = [
        closed,
        closed.replace("_", "%5F"),
        closed.replace("a", "%61"),
        closed.replace("/", "%2F"),
        closed.upper(),
    ]
    uris = {begin + slash + it + "/v1/x" for begin in begins for slash in slashes for it in spelled}
    reached = []
    connection = http.client.HTTPConnection("127.0.0.1", nginx.federation if federation else nginx.client)
    for uri in sorted(uri for uri in uris if uri.startswith(("/", "http://example.org/"))):
        connection.request("GET", uri, headers=PUBLIC)
        answer = connection.getresponse()
        answer.read()
        if answer.status == 200:
            reached.append(uri)
    connection.close()
    assert not [uri for uri in reached if resource(uri).startswith(closed)]


def test_a_room_stays_with_one_process_however_its_id_is_written(nginx):
    forms = [
        "!abc:example.org",
        "%21abc:example.org",
        "!abc%3Aexample.org",
        "%21abc%3aexample.org",
        "!%61bc:example.org",
    ]
    uris = [f"/_matrix/client/v3/rooms/{form}/{end}" for form in forms for end in ("messages", "send/m.x/1", "state")]
    uris += [f"/_matrix/federation/v1/state/{form}" for form in forms]
    uris += [f"/_matrix/client/v3/join/{form}" for form in forms]
    assert len({nginx.who("GET", uri) for uri in uris}) == 1


@pytest.mark.parametrize("room", ["!r{}:example.org", "!Opaque-id_of-version_12-{}", "%21r{}%3Aexample.org"])
def test_rooms_are_spread_over_the_processes(nginx, room):
    found = collections.Counter(nginx.who("GET", f"/_matrix/client/v3/rooms/{room.format(i)}/state") for i in range(90))
    assert len(found) == 3
    assert min(found.values()) > 10


def test_the_devices_of_a_user_stay_with_one_process_and_users_are_spread(nginx):
    def who(token, as_query=False):
        if as_query:
            return nginx.who("GET", f"/_matrix/client/v3/sync?access_token={token}")
        return nginx.who("GET", "/_matrix/client/v3/sync", {"Authorization": f"Bearer {token}"})

    users = {
        user: {who(f"syt_{user}_{device}_x", as_query) for device in range(4) for as_query in (True, False)}
        for user in (f"dXNlcg{i}" for i in range(30))
    }
    assert {len(processes) for processes in users.values()} == {1}
    assert len({min(processes) for processes in users.values()}) == 3
    # A token of another kind is known as a whole.
    assert len({who("mat_abc", as_query) for as_query in (True, False)}) == 1


def test_an_origin_stays_with_one_process_and_origins_are_spread(nginx):
    def who(origin, transaction):
        authorization = f'X-Matrix destination="example.org",key="ed25519:1",origin={origin},sig="c2ln"'
        return nginx.who("PUT", f"/_matrix/federation/v1/send/{transaction}", {"Authorization": authorization})

    found = {
        i: {who(f'"s{i}.org"', transaction) for transaction in range(3)} | {who(f"s{i}.org", 4)} for i in range(30)
    }
    assert {len(processes) for processes in found.values()} == {1}
    assert len({min(processes) for processes in found.values()}) == 3


BEGINS = [
    "GET /_matrix/client/v3/sync",
    "GET /_matrix/client/v3/sync?timeout=0&set_presence=offline&since=",
    "GET /_matrix/client/v3/sync?since=s1&full_state=true",
    "GET /_matrix/client/v3/initialSync",
    "GET /_matrix/client/v3/rooms/!r:x/initialSync",
    "POST /_matrix/client/unstable/org.matrix.simplified_msc3575/sync?timeout=0",
]
GOES_ON = [
    "GET /_matrix/client/r0/sync?since=s1",
    "GET /_matrix/client/v3/sync?filter=%7B%7D&full_state=false&timeout=30000&since=s1_2",
    "GET /_matrix/client/v3/events",
    "POST /_matrix/client/unstable/org.matrix.simplified_msc3575/sync?timeout=0&pos=0/s1",
]


def test_syncs_that_begin_anew_have_workers_of_their_own_and_each_user_one_of_them(directory):
    with Nginx(directory / "initial", ["generic", *["sync"] * 2, *["initial-sync"] * 2]) as nginx:
        users = [{"Authorization": f"Bearer syt_dXNlcg{i}_x_y"} for i in range(20)]
        for requests, kind in ((BEGINS, "initial-sync"), (GOES_ON, "sync")):
            found = [{nginx.who(*request.split(), user) for request in requests} for user in users]
            assert {len(processes) for processes in found} == {1}
            assert set.union(*found) == {f"{kind}.1", f"{kind}.2"}


@pytest.mark.parametrize("kind", ["sync", "generic"])
def test_without_them_they_go_where_other_syncs_go(kind, directory):
    with Nginx(directory / "initial", ["client-reader", *[kind] * 2]) as nginx:
        user = {"Authorization": "Bearer syt_dXNlcg_x_y"}
        found = {nginx.who(*request.split(), user) for request in BEGINS + GOES_ON}
        assert len(found) == 1
        assert min(found).startswith(kind)


def test_requests_without_a_key_are_spread(nginx):
    assert len({nginx.who("GET", "/_matrix/client/v3/sync") for _ in range(60)}) == 3
    assert len({nginx.who("POST", "/_matrix/client/v3/knock/nonsense") for _ in range(60)}) == 3


def test_one_more_process_takes_only_its_share_of_the_rooms(directory):
    def answers(count):
        with Nginx(directory / "grown", ["generic"] * count) as nginx:
            return [nginx.who("GET", f"/_matrix/client/v3/rooms/!r{i}/state") for i in range(200)]

    moved = [after for before, after in zip(answers(3), answers(4), strict=True) if before != after]
    assert set(moved) == {"generic.4"}
    assert 20 < len(moved) < 90


def test_a_dead_process_fails_no_request_that_a_peer_can_take(directory):
    rooms = [f"/_matrix/client/v3/rooms/!r{i}/send/m.x" for i in range(20)]
    with Nginx(directory / "dead", ["generic"] * 2) as nginx:
        before = [nginx.who("POST", room) for room in rooms]
        assert set(before) == {"generic.1", "generic.2"}
        nginx.processes["generic.1"].stop()
        assert {nginx.who("POST", room, body="{}") for room in rooms} == {"generic.2"}
        nginx.processes["generic.1"] = nginx.processes["generic.1"].start_again()
        assert [nginx.who("POST", room) for room in rooms] == before


def test_a_process_without_a_peer_answers_as_soon_as_it_is_back(directory):
    typing = ("PUT", "/_matrix/client/v3/rooms/!r:x/typing/@u:x")
    with Nginx(directory / "back", ["typing"]) as nginx:
        for _ in range(3):
            assert nginx.who(*typing) == "typing.1"
            nginx.processes["typing.1"].stop()
            status, headers, content = nginx.ask(*typing)
            assert (status, content["errcode"]) == (502, "M_UNKNOWN")
            assert headers["Access-Control-Allow-Origin"] == "*"
            nginx.processes["typing.1"] = nginx.processes["typing.1"].start_again()
            assert [nginx.who(*typing) for _ in range(5)] == ["typing.1"] * 5


TYPING = ("PUT", "/_matrix/client/v3/rooms/!r:x/typing/@u:x")


def test_for_a_process_without_a_peer_a_request_goes_to_the_gate(directory):
    with Nginx(directory / "gate", ["generic", "generic", "typing"]) as nginx:
        nginx.add_gates()
        for name, request in (("typing.1", TYPING), ("main.1", ("GET", "/_matrix/client/v3/pushers"))):
            nginx.processes[name].stop()
            assert nginx.who(*request) == f"gate of {name}"
            nginx.processes[name] = nginx.processes[name].start_again()
            assert nginx.who(*request) == name


@pytest.mark.parametrize(
    ("kind", "method", "uri"),
    [
        # By a hash, and by their number of connections.
        ("generic", "GET", "/_matrix/client/v3/sync?access_token=syt_YQ_x"),
        ("generic", "POST", "/_matrix/client/v3/rooms/!r:x/leave"),
        ("generic", "GET", "/_matrix/client/v3/joined_rooms"),
        ("media-repository", "POST", "/_matrix/media/v3/upload"),
    ],
)
def test_a_request_goes_to_a_gate_once_no_peer_takes_it(directory, kind, method, uri):
    body = "x" * 100000 if method == "POST" else None
    with Nginx(directory / "peers", [kind, kind]) as nginx:
        nginx.add_gates()
        nginx.processes[f"{kind}.1"].stop()
        assert {nginx.who(method, uri, body=body) for _ in range(5)} == {f"{kind}.2"}
        nginx.processes[f"{kind}.2"].stop()
        assert nginx.who(method, uri, body=body) in {f"gate of {kind}.1", f"gate of {kind}.2"}
        for gate in nginx.gates.values():
            gate.stop()
        status, headers, content = nginx.ask(method, uri, body=body)
        assert (status, content["errcode"]) == (502, "M_UNKNOWN")


@pytest.mark.parametrize(
    ("method", "uri", "again"),
    [
        ("GET", "/_matrix/client/v3/rooms/!r:x/state/m.room.topic", True),
        ("PUT", "/_matrix/client/v3/rooms/!r:x/state/m.room.topic", True),
        ("POST", "/_matrix/client/v3/rooms/!r:x/leave", False),
    ],
)
def test_a_request_over_which_the_last_peer_died_waits_if_it_may_be_sent_again(directory, method, uri, again):
    with Nginx(directory / "died", ["generic", "generic"]) as nginx:
        nginx.add_gates()
        nginx.processes["generic.2"].stop()
        last, answers = nginx.processes["generic.1"], []
        last.answer = lambda headers: time.sleep(5)
        asking = threading.Thread(target=lambda: answers.append(nginx.who(method, uri)))
        asking.start()
        assert last.came.acquire(timeout=10)
        last.stop()
        asking.join()
        assert answers[0] in ({"gate of generic.1", "gate of generic.2"} if again else {502})


def test_while_the_switch_is_there_every_request_is_told_to_come_back(directory):
    with Nginx(directory / "closed", ["generic"]) as nginx:
        switch = pathlib.Path(nginx.settings["maintenance_switch"])
        switch.touch()
        for method, uri in (
            ("GET", "/_matrix/client/v3/sync"),
            ("PUT", "/_matrix/client/v3/rooms/!r:x/send/m.x/1"),
            ("POST", "/_matrix/media/v3/upload"),
            ("GET", "/_synapse/admin/v1/server_version"),
        ):
            status, headers, content = nginx.ask(method, uri)
            assert (status, content["errcode"], headers["Retry-After"]) == (503, "M_UNKNOWN", "60")
            assert headers["Access-Control-Allow-Origin"] == "*"
        assert nginx.ask("GET", "/_matrix/federation/v1/version", federation=True)[0] == 503
        connection = http.client.HTTPConnection("localhost")
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.connect(nginx.settings["back_door"])
        connection.request("GET", "/_matrix/client/versions")
        assert connection.getresponse().getheader("X-Process") == "generic.1"
        nginx.run("-s", "reload")
        assert nginx.who("GET", "/_matrix/client/versions") == 503
        switch.unlink()
        assert nginx.who("GET", "/_matrix/client/versions") == "generic.1"


@pytest.mark.parametrize(
    ("uri", "megabytes", "status"),
    [
        ("/_matrix/media/v3/upload", 19, 200),
        ("/_matrix/media/v3/upload", 21, 413),
        ("/_matrix/media/v3/create", 14, 413),
        ("/_matrix/media/v3/download/x/m", 14, 413),
        ("/_matrix/client/v3/search", 12, 200),
        ("/_matrix/client/v3/search", 14, 413),
    ],
)
def test_a_body_may_be_as_large_as_synapse_takes_it(nginx, uri, megabytes, status):
    size = megabytes * 1024 * 1024
    answered, _, content = nginx.ask("POST", uri, body=b"x" * size)
    assert answered == status
    assert content.get("body") == size if status == 200 else content["errcode"] == "M_TOO_LARGE"


def test_the_log_says_where_a_request_went_and_no_log_holds_a_token(directory):
    with Nginx(directory / "log", ["typing"]) as nginx:
        for _ in range(2):
            headers = {"Authorization": "Bearer SECRET"}
            status, _, _ = nginx.ask("PUT", "/_matrix/client/v3/rooms/!r/typing/@u?access_token=SECRET", headers)
            nginx.processes["typing.1"].stop()
        (directory / "log/public/typing.1.sock").unlink()
        nginx.ask("PUT", "/_matrix/client/v3/rooms/!r/typing/@u?access_token=SECRET")
    assert status == 502
    lines = (directory / "log/matrix-synapse.access.log").read_text().splitlines()
    assert len(lines) == 3
    assert '"PUT /_matrix/client/v3/rooms/!r/typing/@u HTTP/1.1" 200' in lines[0]
    assert f"via synapse_stream_typing to unix:{directory}/log/public/typing.1.sock: 200" in lines[0]
    assert ": 502, 502 " in lines[1]
    assert not [log.name for log in (directory / "log").glob("*.log") if "SECRET" in log.read_text()]


LOGIN = ("POST", "/_matrix/client/v3/login")
UPLOAD = ("POST", "/_matrix/media/v3/upload")
SYNC = ("GET", "/_matrix/client/v3/sync")
PUBLIC = {"X-Forwarded-For": "203.0.113.9"}


def limited(directory, kinds=(), **limits):
    return Nginx(directory / "limited", kinds, limits={**LIMITS, **limits})


def from_address(address):
    return {"X-Forwarded-For": address}


def test_a_flood_of_logins_from_one_address_is_told_to_wait_and_nobody_else_is(directory):
    with limited(directory, login={"rate": 1, "burst": 5}) as nginx:
        answered = [nginx.ask(*LOGIN, PUBLIC)[0] for _ in range(20)]
        assert answered[:6] == [200] * 6
        assert answered.count(429) > 10
        status, headers, content = nginx.ask(*LOGIN, {**PUBLIC, "Authorization": "Bearer SECRET"}, "SECRET")
        assert (status, content["errcode"], content["retry_after_ms"]) == (429, "M_LIMIT_EXCEEDED", 2000)
        assert (headers["Retry-After"], headers["Access-Control-Allow-Origin"]) == ("2", "*")
        assert nginx.ask("GET", "/_matrix/client/v3/login", PUBLIC)[0] == 200
        assert nginx.ask("OPTIONS", LOGIN[1], PUBLIC)[0] == 200
        assert nginx.ask(*SYNC, PUBLIC)[0] == 200
        assert nginx.ask(*LOGIN, from_address("203.0.113.10"))[0] == 200
        time.sleep(1.1)
        assert nginx.ask(*LOGIN, PUBLIC)[0] == 200
    assert " 429 " in (directory / "limited/matrix-synapse.access.log").read_text()
    assert not [log.name for log in (directory / "limited").glob("*.log") if "SECRET" in log.read_text()]


def test_what_a_stranger_may_ask_is_limited_together(directory):
    requests = """
        POST /_matrix/client/r0/login
        POST /_matrix/client/v3/register?kind=guest
        GET /_matrix/client/v3/register/available?username=a
        GET /_matrix/client/v1/register/m.login.registration_token/validity?token=t
        POST /_matrix/client/v3/register/email/requestToken
        POST /_matrix/client/v3/account/password/msisdn/requestToken
        POST /_matrix/client/v3/account/3pid/email/requestToken
        POST /_matrix/client/v3/account/password
    """
    with limited(directory, login={"rate": 1, "burst": 0}) as nginx:
        for i, request in enumerate(requests.strip().splitlines()):
            client = from_address(f"203.0.113.{i}")
            assert nginx.ask(*LOGIN, client)[0] == 200
            assert nginx.ask(*request.split(), client)[0] == 429


def test_a_network_behind_one_address_may_log_in_at_once(nginx):
    assert {nginx.ask(*LOGIN, from_address("198.51.100.1"))[0] for _ in range(LIMITS["login"]["burst"])} == {200}


def test_an_ipv6_network_of_64_bits_is_one_client(directory):
    with limited(directory, login={"rate": 1, "burst": 0}) as nginx:
        assert nginx.ask(*LOGIN, from_address("2001:db8::1"))[0] == 200
        assert nginx.ask(*LOGIN, from_address("2001:db8:0:0:a:0a0a:c:d"))[0] == 429
        assert nginx.ask(*LOGIN, from_address("2001:db8:0:1::1"))[0] == 200
        assert nginx.ask(*LOGIN, from_address("203.0.113.9"))[0] == 200
        assert nginx.ask(*LOGIN, from_address("203.0.113.10"))[0] == 200


def test_bridges_and_local_programs_are_not_limited(directory):
    exempt = ["172.29.88.0/24", "2001:db8:5::/48"]
    with limited(directory, login={"rate": 1, "burst": 0}, exempt=exempt) as nginx:
        for headers in ({}, *map(from_address, ("127.0.0.1", "172.29.88.7", "2001:db8:5::1"))):
            assert [nginx.ask(*LOGIN, headers)[0] for _ in range(5)] == [200] * 5
        for _ in range(5):
            connection = http.client.HTTPConnection("localhost")
            connection.sock = socket.socket(socket.AF_UNIX)
            connection.sock.connect(nginx.settings["back_door"])
            connection.request(*LOGIN)
            assert connection.getresponse().status == 200


@contextlib.contextmanager
def held(nginx, process, count, request, headers):
    """Have a process at work on a number of requests, whose ends have not come."""
    connections = []
    for _ in range(count):
        connection = http.client.HTTPConnection("127.0.0.1", nginx.client, timeout=20)
        connection.putrequest(*request)
        for name, value in {**headers, "Content-Length": 4000}.items():
            connection.putheader(name, str(value))
        connection.endheaders(b"x" * 1000)
        connections.append(connection)
    assert all(nginx.processes[process].came.acquire(timeout=20) for _ in connections)
    yield connections
    for connection in connections:
        connection.send(b"x" * 3000)
        connection.getresponse().read()
        connection.close()


def test_uploads_at_once_are_bounded_for_one_client_and_for_all(directory):
    with limited(directory, ["media-repository"], uploads={"client": 2, "all": 3}) as nginx:
        with held(nginx, "media-repository.1", 2, UPLOAD, PUBLIC):
            assert nginx.ask(*UPLOAD, PUBLIC, "x")[2]["errcode"] == "M_LIMIT_EXCEEDED"
            assert nginx.ask("PUT", "/_matrix/media/v3/upload/x/m", PUBLIC, "x")[0] == 429
            assert nginx.ask("GET", "/_matrix/media/v3/download/x/m", PUBLIC)[0] == 200
            nginx.processes["media-repository.1"].came = threading.Semaphore(0)
            with held(nginx, "media-repository.1", 1, UPLOAD, from_address("203.0.113.10")):
                assert nginx.ask(*UPLOAD, from_address("203.0.113.11"), "x")[0] == 429
                assert nginx.ask(*UPLOAD, {}, "x")[0] == 200
        assert nginx.ask(*UPLOAD, PUBLIC, "x")[0] == 200


def test_a_client_has_so_many_open_requests_and_no_more(directory):
    with limited(directory, ["media-repository"], open_requests=3, uploads=None) as nginx:
        with held(nginx, "media-repository.1", 3, UPLOAD, PUBLIC):
            assert nginx.ask(*SYNC, PUBLIC)[2]["errcode"] == "M_LIMIT_EXCEEDED"
            assert nginx.ask(*SYNC, PUBLIC, federation=True)[0] == 404
            assert nginx.ask("GET", "/_matrix/federation/v1/version", PUBLIC, federation=True)[0] == 429
            assert nginx.ask(*SYNC, from_address("203.0.113.10"))[0] == 200
        assert nginx.ask(*SYNC, PUBLIC)[0] == 200


def test_null_switches_a_limit_off(directory):
    with limited(directory, ["media-repository"], login=None, open_requests=None, uploads=None) as nginx:
        assert {nginx.ask(*LOGIN, PUBLIC)[0] for _ in range(200)} == {200}
        with held(nginx, "media-repository.1", 60, UPLOAD, PUBLIC):
            assert nginx.ask(*UPLOAD, PUBLIC, "x")[0] == 200


@pytest.mark.parametrize("size", ["8K", "16K"])
def test_a_header_may_have_the_size_that_the_settings_say(size, directory):
    kilobytes = int(size[:-1])
    with limited(directory, header_size=size) as nginx:
        for length, answers in (((kilobytes - 1) * 1024, [200]), ((kilobytes + 1) * 1024, [400, 414])):
            assert nginx.raw(f"{' '.join(SYNC)}?filter={'x' * length}", {}) in answers
            assert nginx.raw(" ".join(SYNC), {"X-Long": "x" * length}) in answers


def is_left(slow):
    slow.settimeout(20)
    try:
        return slow.recv(1000) == b""
    except ConnectionResetError:
        return True


@pytest.mark.parametrize("sent", [b"GET /_matrix/client/versions HTTP/1.1\r\nHost", b"POST"])
def test_a_client_that_does_not_finish_its_header_is_left(sent, directory):
    with limited(directory, header_timeout=1) as nginx, socket.create_connection(("127.0.0.1", nginx.client)) as slow:
        slow.send(sent)
        assert is_left(slow)


def test_a_client_that_does_not_finish_its_body_is_left(directory):
    with limited(directory, body_timeout=1) as nginx, socket.create_connection(("127.0.0.1", nginx.client)) as slow:
        slow.send(b"POST /_matrix/client/v3/login HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        assert is_left(slow)
        assert not nginx.processes["main.1"].came.acquire(blocking=False)


def test_an_upload_is_passed_on_while_it_comes(nginx):
    nginx.processes["media-repository.1"].came = threading.Semaphore(0)
    with held(nginx, "media-repository.1", 1, UPLOAD, {}):
        pass


MEDIA = bytes(range(256)) * 1000
# As Synapse sends it.
OF_MEDIA = {
    "Content-Type": "image/png",
    "Cache-Control": "public,max-age=86400,s-maxage=0,proxy-revalidate",
    "ETag": "1",
}


class Media:
    """A media repository with one file, that tells what it was asked for: a status for each request."""

    def __init__(self, nginx, **headers):
        self.there, self.asked, self.headers = True, [], {**OF_MEDIA, **headers}
        nginx.processes["media-repository.1"].answer = self

    def __call__(self, headers):
        status = 404 if not self.there else 304 if headers.get("If-None-Match") == "1" else 200
        self.asked.append(status)
        return status, self.headers if self.there else {"Content-Type": "text/plain"}, MEDIA if status == 200 else b""


@pytest.mark.parametrize("cache", [None, "10M"])
@pytest.mark.parametrize("path", ["media/v3/download", "media/r0/thumbnail", "client/v1/media/download"])
def test_any_bytes_of_a_file_can_be_asked_for(cache, path, directory):
    ranges = {"0-1": MEDIA[:2], "100000-100999": MEDIA[100000:101000], "255990-": MEDIA[255990:], "-5": MEDIA[-5:]}
    with Nginx(directory / "ranges", ["media-repository"], media_cache=cache) as nginx:
        Media(nginx)
        for asked, answered in ranges.items():
            status, headers, content = nginx.ask("GET", f"/_matrix/{path}/x/m", {"Range": f"bytes={asked}"})
            assert (status, headers["Content-Length"], content) == (206, str(len(answered)), answered)
        assert nginx.ask("GET", f"/_matrix/{path}/x/m", {"Range": "bytes=256000-"})[0] == 416


@pytest.fixture
def cached(directory):
    with Nginx(directory / "cached", ["media-repository"], media_cache="10M") as nginx:
        yield nginx


def test_public_media_come_from_the_cache_as_long_as_synapse_agrees(cached):
    paths = ["/_matrix/media/v3/download/x/m", "/_matrix/media/r0/thumbnail/x/m?width=9&height=9"]
    media = Media(cached)
    assert [cached.ask("GET", path)[2] for path in paths] == [MEDIA] * 2
    time.sleep(2)
    assert [cached.ask("GET", path, {"Range": "bytes=1-2"})[2] for path in paths] == [MEDIA[1:3]] * 2
    assert media.asked == [200, 200, 304, 304]
    media.there = False
    time.sleep(2)
    assert [cached.ask("GET", path)[0] for path in paths] == [404] * 2


def test_another_path_or_query_is_another_file(cached):
    media = Media(cached)
    for path in ("download/x/m", "download/x/m?allow_remote=false", "download/x/n", "thumbnail/x/m?width=1"):
        assert cached.ask("GET", f"/_matrix/media/v3/{path}")[0] == 200
    assert media.asked == [200] * 4


def test_nothing_else_comes_from_the_cache(cached):
    token = {"Authorization": "Bearer t"}
    for path, headers in (
        ("/_matrix/client/v1/media/download/x/m", {}),
        ("/_matrix/client/v1/media/download/x/m", token),
        ("/_matrix/client/v1/media/thumbnail/x/m", {}),
        ("/_matrix/federation/v1/media/download/m", {}),
        ("/_matrix/media/v3/preview_url?url=x", {}),
        ("/_matrix/media/v3/config", {}),
        ("/_matrix/media/v3/download/x/m", token),
        ("/_matrix/media/v3/download/x/m?access_token=t", {}),
    ):
        media = Media(cached)
        for _ in range(2):
            assert cached.ask("GET", path, headers)[0] == 200
        assert media.asked == [200, 200]
    assert not [file for file in (pathlib.Path(cached.settings["media_cache_directory"])).rglob("*") if file.is_file()]


def test_what_synapse_does_not_call_public_is_not_kept(cached):
    for control in ("private", "no-store", "max-age=86400"):
        media = Media(cached, **{"Cache-Control": control})
        for _ in range(2):
            assert cached.ask("GET", "/_matrix/media/v3/download/x/m")[0] == 200
        assert media.asked == [200, 200]


def test_many_who_ask_at_once_for_a_file_make_synapse_read_it_once(cached):
    media = Media(cached)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: cached.ask("GET", "/_matrix/media/v3/download/x/m")[2], range(8)))
    assert answers == [MEDIA] * 8
    assert media.asked.count(200) == 1


def test_nginx_tells_the_digest_of_the_configuration_it_runs(nginx):
    connection = http.client.HTTPConnection("localhost")
    connection.sock = socket.socket(socket.AF_UNIX)
    connection.sock.connect(nginx.settings["status_socket"])
    connection.request("GET", "/config")
    assert connection.getresponse().read().decode() == DIGEST


def test_containers_find_the_client_api_on_the_internal_address_once(directory):
    internal = f"127.0.0.2:{free_port()}"
    listens = {"listen": [internal], "tls": None}
    with Nginx(directory / "internal", [], internal=internal) as nginx:
        assert nginx.config.count(f"listen {internal};") == 1
        connection = http.client.HTTPConnection(internal)
        connection.request("GET", "/_matrix/client/versions")
        assert connection.getresponse().getheader("X-Process") == "main.1"
    assert render(nginx.plan, {**nginx.settings, "client": listens}).count(f"listen {internal};") == 1


def test_another_site_on_the_same_address_keeps_its_requests(directory):
    nginx = Nginx(directory / "beside", [], server_names=["example.org", "matrix.example.org"])
    other = f"server {{ listen 127.0.0.1:{nginx.client} default_server; return 418; }}"
    file = directory / "beside/nginx.conf"
    file.write_text(file.read_text().replace("http {", f"http {{ {other}"))
    with nginx:
        for host, answer in (("matrix.example.org:443", "main.1"), ("example.org", "main.1"), ("other.example", 418)):
            assert nginx.who("GET", "/_matrix/client/versions", {"Host": host}) == answer


def test_tls_speaks_http_1_1_and_http_2_and_nothing_older_than_1_2(directory):
    files = {"certificate": str(directory / "tls.crt"), "key": str(directory / "tls.key")}
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
        + ["-subj", "/CN=matrix.example.org", "-out", files["certificate"], "-keyout", files["key"]],
        check=True,
        capture_output=True,
    )
    port = free_port()
    client = {"listen": [f"127.0.0.1:{port}"], "tls": files}
    context = ssl.create_default_context(cafile=files["certificate"])
    context.check_hostname = False
    with Nginx(directory / "tls", [], client=client) as nginx:
        nginx.client = port
        assert "[warn]" not in nginx.run("-t").stderr
        headers = nginx.ask("GET", "/_matrix/client/versions", tls=context)[2]["headers"]
        assert headers["X-Forwarded-Proto"] == "https"
        context.set_alpn_protocols(["h2"])
        with socket.create_connection(("127.0.0.1", port)) as plain, context.wrap_socket(plain) as secure:
            assert secure.selected_alpn_protocol() == "h2"
        offered = subprocess.run(
            ["openssl", "s_client", "-connect", f"127.0.0.1:{port}", "-tls1_1", "-cipher", "DEFAULT@SECLEVEL=0"],
            input="",
            capture_output=True,
            text=True,
            check=False,
        )
        assert "protocol version" in offered.stderr


@pytest.mark.parametrize(
    ("version", "listen", "directive"),
    [
        ("nginx/1.22.1", "ssl http2;", False),
        ("nginx/1.24.0 (Ubuntu)", "ssl http2;", False),
        ("nginx/1.26.3", "ssl;", True),
    ],
)
def test_http_2_is_switched_on_as_this_nginx_wants_it(nginx, version, listen, directive):
    tls = {"listen": ["0.0.0.0:443"], "tls": {"certificate": "/c", "key": "/k"}}
    config = render(nginx.plan, {**nginx.settings, "client": tls}, version=f"nginx version: {version}\n")
    assert f"listen 0.0.0.0:443 {listen}" in config
    assert ("http2 on;" in config) is directive
