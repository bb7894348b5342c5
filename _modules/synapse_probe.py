"""
A user that tries whether Synapse works: it sends a message, and syncs until it hears it.
"""

import hashlib
import hmac
import http.client
import json
import secrets
import socket
import time
import urllib.parse

from salt.exceptions import CommandExecutionError

# Of a message to be heard, through every process that has to do with it.
PATIENCE = 30
# What Synapse answers for what it does not have any more.
GONE = 404


def begin(name):
    """
    Register a user of its own, an administrator with a random password, have it make a room, and sync once. Its token stays
    in this process.

    name
        Its name, the part of its id before the server's.

    Returns a dict with ``user`` and ``room``.

    Raises CommandExecutionError if Synapse refuses any of it.

    Source: https://element-hq.github.io/synapse/latest/admin_api/register_api.html

    CLI Example:

    .. code-block:: bash

        salt-call synapse_probe.begin synapse-formula-0123abcd
    """
    main = _main_socket()
    nonce = _ask(main, "GET", "/_synapse/admin/v1/register")["nonce"]
    password = secrets.token_hex(32)
    with open(_registration_secret(), encoding="utf-8") as file:
        secret = file.read().strip()
    mac = hmac.new(secret.encode(), "\0".join([nonce, name, password, "admin"]).encode(), hashlib.sha1).hexdigest()
    body = {"nonce": nonce, "username": name, "password": password, "admin": True, "mac": mac}
    answer = _ask(main, "POST", "/_synapse/admin/v1/register", body)
    probe = {"user": answer["user_id"], "token": answer["access_token"]}
    probe["room"] = _ask(main, "POST", "/_matrix/client/v3/createRoom", {"preset": "private_chat"}, probe)["room_id"]
    probe["since"] = _ask(main, "GET", "/_matrix/client/v3/sync?timeout=0", None, probe)["next_batch"]
    __context__["synapse_probe"] = probe
    return {key: probe[key] for key in ("user", "room")}


def has_begun():
    """
    Return whether there is a user in this process.

    CLI Example:

    .. code-block:: bash

        salt-call synapse_probe.has_begun
    """
    return "synapse_probe" in __context__


def attempt():
    """
    Have the user, who has begun in this process, send a message by way of nginx (where the formula manages it), also while
    users get 503 there, and sync until it is heard.

    Raises CommandExecutionError if it is not heard in time.

    CLI Example:

    .. code-block:: bash

        salt-call synapse_probe.attempt
    """
    probe = _probe()
    settings = __salt__["synapse_pillar.settings"]()
    door = __salt__["synapse_nginx.back_door"]() if settings["nginx"]["managed"] else _main_socket()
    text, since = secrets.token_hex(8), probe["since"]
    room = urllib.parse.quote(probe["room"], safe="")
    path = f"/_matrix/client/v3/rooms/{room}/send/m.room.message/{text}"
    _ask(door, "PUT", path, {"msgtype": "m.text", "body": text}, probe)
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        answer = _ask(door, "GET", f"/_matrix/client/v3/sync?timeout=5000&since={since}", None, probe)
        since = answer["next_batch"]
        events = answer.get("rooms", {}).get("join", {}).get(probe["room"], {}).get("timeline", {}).get("events", [])
        if text in [event["content"].get("body") for event in events]:
            return
    raise CommandExecutionError(f"A message that a test user sent was not heard within {PATIENCE} s")


def end(probes):
    """
    Remove users that have begun, here or in a process that was killed, and their rooms. What is gone already is no fault.

    probes
        A list of what :func:`begin` returned, or would have; ``room`` is None where it did not.

    CLI Example:

    .. code-block:: bash

        salt-call synapse_probe.end '[]'
    """
    own = _probe()
    main = _main_socket()
    # Its own user goes last: it is the one who does it.
    for probe in sorted(probes, key=lambda probe: probe["user"] == own["user"]):
        room, user = (urllib.parse.quote(probe[key] or "", safe="") for key in ("room", "user"))
        if probe["room"]:
            _ask(main, "DELETE", f"/_synapse/admin/v1/rooms/{room}", {"purge": True, "force_purge": True}, own, GONE)
        _ask(main, "POST", f"/_synapse/admin/v1/deactivate/{user}", {"erase": True}, own, GONE)
    __context__.pop("synapse_probe", None)


def _probe():
    if "synapse_probe" not in __context__:
        raise CommandExecutionError("No test user has begun in this process")
    return __context__["synapse_probe"]


def _main_socket():
    return __salt__["synapse_workers.plan"]()["processes"][0]["public_socket"]


def _registration_secret():
    return f"{__salt__['synapse_pillar.settings']()['directories']['data']}/secrets/registration"


def _ask(path, method, target, body=None, probe=None, accepted=200):
    connection = http.client.HTTPConnection("localhost", timeout=PATIENCE)
    connection.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.sock.settimeout(PATIENCE)
    headers = {"Content-Type": "application/json", "X-Forwarded-For": "127.0.0.1"}
    if probe:
        headers["Authorization"] = f"Bearer {probe['token']}"
    try:
        connection.sock.connect(path)
        connection.request(method, target, json.dumps(body) if body is not None else None, headers)
        answer = connection.getresponse()
        text = answer.read().decode(errors="replace")
        if answer.status not in (200, accepted):
            raise CommandExecutionError(f"Synapse answered a test user with {answer.status}: {text[:500]}")
        return json.loads(text)
    except (OSError, http.client.HTTPException, ValueError) as err:
        raise CommandExecutionError(f"Synapse does not answer a test user on {path}: {err!r}") from err
    finally:
        connection.close()
