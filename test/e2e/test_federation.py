"""Two homeservers of the formula's, each in a host of its own, federate."""

import copy
import os
import subprocess

import pytest
from conftest import PILLAR
from deployment import Deployment, owners_in, until
from host import Host

NAMES = {"a.test": "synapse-fed-a", "b.test": "synapse-fed-b"}
TLS = "/etc/ssl/test"
# Where Synapse may read it.
AUTHORITY = "/etc/matrix-synapse/test-authority.crt"


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    """A directory with an authority, and a certificate of it and a key for each server."""
    directory = tmp_path_factory.mktemp("certificates")

    def make(name, *options):
        command = [
            "openssl",
            "req",
            "-x509",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:P-256",
            "-nodes",
            "-days",
            "2",
        ]
        command += ["-subj", f"/CN={name}", "-keyout", f"{name}.key", "-out", f"{name}.crt", *options]
        subprocess.run(command, cwd=directory, check=True, capture_output=True)

    make("authority")
    for name in NAMES:
        signed = ["-CA", "authority.crt", "-CAkey", "authority.key", "-addext", "basicConstraints=critical,CA:FALSE"]
        make(name, *signed, "-addext", f"subjectAltName=DNS:{name}")
    return directory


@pytest.fixture(scope="module")
def homeservers(certificates):
    """The deployments, by server name. Each finds the other as on the Internet: name, .well-known, TLS. The names, the
    authority and the private addresses are what the Internet does not have."""
    hosts = {name: Host.up(host) for name, host in NAMES.items()}
    yield {name: homeserver(name, hosts, certificates) for name in NAMES}
    if not os.environ.get("KEEP_HOST"):
        for host in hosts.values():
            host.down()


def homeserver(name, hosts, certificates):
    host = hosts[name]
    for path, file in (
        (f"{TLS}/server.crt", f"{name}.crt"),
        (f"{TLS}/server.key", f"{name}.key"),
        (AUTHORITY, "authority.crt"),
    ):
        host.write(path, (certificates / file).read_text())
    others = {other: it.address for other, it in hosts.items() if other != name}
    pillar = copy.deepcopy(PILLAR) | {
        "server_name": name,
        "workers": {"list": [{"type": "generic"}, {"type": "federation-sender", "count": 2}]},
    }
    pillar["nginx"]["federation"] = {
        "listen": ["443"],
        "tls": {"certificate": f"{TLS}/server.crt", "key": f"{TLS}/server.key"},
    }
    pillar["process"]["arguments"] = [f"--add-host={other}:{address}" for other, address in others.items()]
    pillar["config"] |= {
        "federation_custom_ca_list": [AUTHORITY],
        "ip_range_whitelist": [f"{address}/32" for address in others.values()],
        "trusted_key_servers": [],
    }
    host.salt("saltutil.sync_all")
    deployment = Deployment(host, pillar)
    deployment.apply()
    return deployment


@pytest.fixture(params=["10", "12"])
def room_version(request):
    return request.param


@pytest.fixture
def people(homeservers):
    return [homeserver.user() for homeserver in homeservers.values()]


def test_a_room_is_shared_with_all_that_was_said_before(homeservers, people, room_version):
    alice, bob = people
    room = alice.room(preset="public_chat", room_version=room_version)
    said = [f"before bob came, {number}" for number in range(15)]
    for text in said:
        alice.say(room, text)
    bob.join(room, via="a.test")
    hears(bob, room, *said)
    for speaker, listener in (alice, bob), (bob, alice):
        speaker.say(room, f"hello from {speaker.id}")
        hears(listener, room, f"hello from {speaker.id}")

    home = homeservers["a.test"]
    readers = owners(home)["generic"]
    for kind in "GET v1/make_join", "PUT v2/send_join", "GET v1/backfill", "PUT v1/send":
        assert answered_by(home, kind) == set(readers)


def owners(homeserver):
    return owners_in(homeserver.host.salt("synapse_workers.plan"))


def hears(person, room, *texts):
    until(lambda: set(texts) <= set(person.heard(room)), f"{person.id} hears all of {texts}")


def answered_by(homeserver, kind):
    """The processes that answered another homeserver's requests of a kind."""
    method, endpoint = kind.split()
    return {
        answer.process
        for answer in homeserver.answers()
        if (answer.method, answer.status) == (method, 200)
        and answer.path.startswith(f"/_matrix/federation/{endpoint}/")
    }


def test_what_is_said_while_the_senders_restart_arrives_afterwards(homeservers, people, room_version):
    alice, bob = people
    room = alice.room(preset="public_chat", room_version=room_version)
    bob.join(room, via="a.test")
    for homeserver, speaker, listener in zip(homeservers.values(), (alice, bob), (bob, alice), strict=True):
        senders = owners(homeserver)["federation-sender"]
        homeserver.systemctl("stop", *senders)
        said = [f"{speaker.id} while nobody sends", f"{speaker.id} afterwards"]
        speaker.say(room, said[0])
        assert said[0] not in listener.heard(room)
        homeserver.systemctl("start", *senders)
        speaker.say(room, said[1])
        hears(listener, room, *said)
