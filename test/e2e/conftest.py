"""A disposable host for the end-to-end tests, with the formula applied."""

import copy
import os

import pytest
from deployment import Deployment, salt_run
from host import Host

# Every kind of process: those that share the clients, one that all know of (the writer of a stream), one that serves nobody, and
# one with arguments of its own. What else there is, test_streams.py has.
PILLAR = {
    "server_name": "example.org",
    "workers": {
        "list": [
            {"type": "generic", "count": 2},
            {"type": "stream-writer", "stream": "typing"},
            {"type": "background"},
            {"type": "media-repository", "memory": "700M", "cpus": 1.5, "arguments": ["--shm-size=16m"]},
        ]
    },
    "process": {"stop_grace": 10, "health_interval": 15},
    "nginx": {"client": {"listen": ["8008"]}, "federation": {"listen": ["8448"]}},
    # Each test registers users of its own.
    "config": {
        "enable_registration": True,
        "enable_registration_without_verification": True,
        "rc_registration": {"per_second": 1000, "burst_count": 1000},
        "rc_login": {"address": {"per_second": 1000, "burst_count": 1000}},
        "rc_message": {"per_second": 1000, "burst_count": 1000},
        "rc_room_creation": {"per_second": 1000, "burst_count": 1000},
    },
}

# For tests to which it is all the same how many workers there are, and which.
ONE_WORKER = PILLAR | {"workers": {"list": [{"type": "generic"}]}}


@pytest.fixture(scope="session")
def host(worker_id):
    """A host of the tests' own, one for each of pytest's processes. KEEP_HOST=1 leaves it running, and takes it as it is the
    next time."""
    host = Host.up(f"synapse-e2e-{worker_id}")
    yield host
    if not os.environ.get("KEEP_HOST"):
        host.down()


@pytest.fixture(scope="session")
def first_runs(host):
    """The very first run under test=True, and the real one after it: what each said of every state."""
    deployment = Deployment(host, copy.deepcopy(PILLAR))
    host.salt("saltutil.sync_all")
    return {"test": deployment.apply(test=True), "real": deployment.apply(), "deployment": deployment}


@pytest.fixture(scope="module")
def pillar(request):
    """What a module's tests find, and leave: its own PILLAR, or else the one above."""
    return getattr(request.module, "PILLAR", PILLAR)


@pytest.fixture(scope="module")
def deployment(first_runs, pillar):
    return restored(first_runs["deployment"], pillar)


@pytest.fixture
def deployed(deployment, pillar):
    """The deployment as the pillar has it, before the test and after it."""
    yield deployment
    restored(deployment, pillar)


def restored(deployment, pillar):
    if deployment.pillar != pillar:
        deployment.pillar = copy.deepcopy(pillar)
        deployment.apply()
    return deployment


@pytest.fixture(scope="module")
def master(deployment):
    with salt_run(deployment.host) as run:
        yield run
