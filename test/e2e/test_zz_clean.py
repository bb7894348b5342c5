"""`synapse.clean`, last of all, because it takes everything down."""

import copy

from conftest import PILLAR


def test_clean_removes_everything_but_data_and_the_next_run_brings_it_back(deployment):
    host = deployment.host
    alice = deployment.user()
    room = alice.room()
    alice.say(room, "to be kept")
    key = host.read("/var/lib/matrix-synapse/secrets/signing.key")

    said = deployment.apply("synapse.clean", test=True)
    done = deployment.apply("synapse.clean")
    assert set(said) == set(done)
    assert deployment.apply("synapse.clean") == {}

    assert deployment.containers() == {}
    for path in (
        "/etc/matrix-synapse",
        "/run/matrix-synapse",
        "/etc/nginx/conf.d/matrix-synapse.conf",
        "/run/redis-synapse",
    ):
        assert host.run("test", "-e", path, check=False).returncode == 1, path
    assert "matrix-synapse" not in host.run("systemctl", "list-units", "--all", "--plain").stdout
    assert "matrix-synapse" not in host.sh("docker network ls; docker volume ls; docker image ls").stdout
    assert host.read("/var/lib/matrix-synapse/secrets/signing.key") == key

    host.sh("docker load --quiet --input /srv/images/synapse-*.tar")
    deployment.apply()
    assert host.read("/var/lib/matrix-synapse/secrets/signing.key") == key
    assert "to be kept" in alice.heard(room)


def test_clean_removes_data_only_if_the_pillar_says_so(deployment):
    host = deployment.host
    deployment.pillar = {**copy.deepcopy(PILLAR), "clean": {"remove_data": True}}
    deployment.apply("synapse.clean")
    assert host.run("test", "-e", "/var/lib/matrix-synapse", check=False).returncode == 1
    assert host.run("id", "synapse", check=False).returncode == 1
    databases = "runuser --user postgres -- psql --tuples-only --command 'select datname from pg_database'"
    assert "synapse" not in host.sh(databases).stdout
