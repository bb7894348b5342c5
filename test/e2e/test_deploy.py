"""What the first run makes of a bare host."""

import json
import re

import pytest
from deployment import Refused, quote, request, until


def test_a_test_run_on_a_bare_host_lists_exactly_what_the_first_run_changes(first_runs):
    assert set(first_runs["test"]) == set(first_runs["real"])
    processes = "Synapse's processes are running"
    assert first_runs["test"][processes] == first_runs["real"][processes]
    files = "Synapse's configuration is in place"
    assert first_runs["test"][files] == first_runs["real"][files]


def test_a_second_run_changes_nothing_and_restarts_nothing(deployed):
    starts = deployed.starts()
    assert deployed.apply(test=True) == {}
    assert deployed.apply() == {}
    assert deployed.starts() == starts


def test_workers_are_named_in_sequence(deployed):
    assert deployed.host.salt("synapse_workers.names") == [
        "matrix-synapse",
        "matrix-synapse-worker-0-generic",
        "matrix-synapse-worker-1-generic",
        "matrix-synapse-worker-2-stream-writer-typing",
        "matrix-synapse-worker-3-background",
        "matrix-synapse-worker-4-media-repository",
    ]


def test_every_process_is_healthy_and_current_in_a_container_of_its_own(deployed):
    assert sorted(deployed.containers()) == sorted(deployed.names())
    for process in deployed.status():
        assert process["unit"] == "active"
        assert process["healthy"] is True
        assert process["current"] is True
        assert process["memory"] > 20 * 1024 * 1024


def test_docker_shows_every_process_as_healthy(deployed):
    def healths():
        return {container["State"]["Health"]["Status"] for container in deployed.containers().values()}

    until(lambda: healths() == {"healthy"}, "docker ps shows all as healthy")


def test_the_health_check_of_a_process_that_hangs_fails_until_it_goes_on(deployed):
    """Of one without listeners for others too: the check asks the process itself."""
    name = "matrix-synapse-worker-3-background"
    listed = deployed.host.run("docker", "top", name, "-eo", "pid,args").stdout.splitlines()
    pids = [line.split()[0] for line in listed if "-m synapse.app" in line and "docker-init" not in line]
    assert len(pids) == 1

    def failures():
        return deployed.containers()[name]["State"]["Health"]["FailingStreak"]

    assert failures() == 0
    deployed.host.run("kill", "-STOP", *pids)
    try:
        until(failures, "Docker finds out")
    finally:
        deployed.host.run("kill", "-CONT", *pids)
    until(lambda: failures() == 0, "it is healthy again")


def test_containers_are_confined(deployed):
    identity = deployed.host.sh('echo "$(id -u synapse):$(id -g synapse)"').stdout.strip()
    for container in deployed.containers().values():
        host, config = container["HostConfig"], container["Config"]
        assert host["ReadonlyRootfs"] is True
        assert host["CapDrop"] == ["ALL"]
        assert not host["CapAdd"]
        assert host["SecurityOpt"] == ["no-new-privileges"]
        assert host["Init"] is True
        assert "/tmp" in host["Tmpfs"]
        assert config["User"] == identity
        assert not [word for word in config["Env"] if re.match("(UID|GID)=", word)]


def test_limits_and_arguments_of_the_pillar_reach_the_container(deployed):
    media = deployed.containers()["matrix-synapse-worker-4-media-repository"]["HostConfig"]
    assert media["Memory"] == 700 * 1024 * 1024
    assert media["NanoCpus"] == 1_500_000_000
    assert media["ShmSize"] == 16 * 1024 * 1024
    assert deployed.containers()["matrix-synapse"]["HostConfig"]["Memory"] == 0


def test_no_process_compiles_byte_code_at_start(deployed):
    script = (
        "import importlib.util, os, sys, synapse.app.generic_worker\n"
        "files = [m.__file__ for m in list(sys.modules.values()) if (getattr(m, '__file__', None) or '').endswith('.py')]\n"
        "print(len(files), sum(not os.path.exists(importlib.util.cache_from_source(f)) for f in files))"
    )
    done = deployed.host.run("docker", "exec", "matrix-synapse-worker-0-generic", "python3", "-c", script)
    modules, without = map(int, done.stdout.split())
    assert modules > 500
    assert without == 0


def test_the_database_has_c_collation_and_utf8_and_is_synapse_own(deployed):
    query = (
        "select pg_encoding_to_char(encoding), datcollate, datctype, pg_get_userbyid(datdba) from pg_database"
        " where datname = 'synapse'"
    )
    assert psql(deployed, query) == ["UTF8|C|C|synapse"]


def test_max_connections_suffices_for_the_plan(deployed):
    needed = deployed.host.salt("synapse_workers.plan")["max_connections"]
    # Not less than were allowed before.
    assert int(psql(deployed, "show max_connections")[0]) >= needed
    assert needed >= 6 * 10


def test_database_sessions_bear_the_names_of_their_processes(deployed):
    names = psql(deployed, "select distinct application_name from pg_stat_activity where usename = 'synapse'")
    assert set(names) == set(deployed.names())


def test_the_database_is_reached_by_its_socket_alone(deployed):
    query = "select count(*) from pg_stat_activity where usename = 'synapse' and client_addr is not null"
    assert psql(deployed, query) == ["0"]


def psql(deployed, query):
    words = ["runuser", "--user", "postgres", "--", "psql", "--no-psqlrc", "--tuples-only", "--no-align"]
    return deployed.host.run(*words, "--command", query).stdout.split("\n")[:-1]


def test_redis_answers_on_a_socket_that_only_synapse_enters(deployed):
    run = deployed.host.run
    socket = "/run/redis-synapse/redis.sock"
    assert run("runuser", "--user", "synapse", "--", "redis-cli", "-s", socket, "ping").stdout == "PONG\n"
    assert (
        "PONG" not in run("runuser", "--user", "www-data", "--", "redis-cli", "-s", socket, "ping", check=False).stdout
    )


@pytest.mark.parametrize(
    ("account", "side", "enters"),
    [
        ("synapse", "public", True),
        ("synapse", "private", True),
        ("www-data", "public", True),
        ("www-data", "private", False),
        ("nobody", "public", False),
        ("nobody", "private", False),
    ],
)
def test_sockets_are_entered_by_synapse_and_nginx_alone(deployed, account, side, enters):
    socket = f"/run/matrix-synapse/{side}/matrix-synapse.sock"
    command = ["curl", "--silent", "--fail", "--unix-socket", socket, "http://localhost/health"]
    done = deployed.host.run("runuser", "--user", account, "--", *command, check=False)
    assert (done.returncode == 0) is enters


def test_users_talk_through_nginx(deployed):
    alice, bob = deployed.user(), deployed.user()
    room = alice.room(invite=[bob.id])
    bob.join(room)
    bob.sync()
    alice.say(room, "hello")
    timeline = bob.sync(timeout=10000)["rooms"]["join"][room]["timeline"]["events"]
    assert [event["content"]["body"] for event in timeline if event["type"] == "m.room.message"] == ["hello"]
    assert "hello" in alice.heard(room)


def test_writes_of_streams_reach_their_writers(deployed):
    """Each of these answers 500 on a process that is not the writer of its stream."""
    alice = deployed.user()
    room = alice.room()
    event = alice.say(room, "read me")
    base, me = f"/_matrix/client/v3/rooms/{quote(room)}", quote(alice.id)
    alice.ask("PUT", f"{base}/typing/{me}", {"typing": True, "timeout": 1000})
    alice.ask("POST", f"{base}/receipt/m.read/{quote(event)}", {})
    alice.ask("PUT", "/_matrix/client/v3/sendToDevice/m.test/1", {"messages": {}})
    alice.ask("PUT", f"/_matrix/client/v3/user/{me}/account_data/m.test", {"a": 1})
    assert alice.ask("GET", f"/_matrix/client/v3/user/{me}/account_data/m.test") == {"a": 1}
    rule = "/_matrix/client/v3/pushrules/global/room/" + quote(room)
    alice.ask("PUT", rule, {"actions": ["notify"]})
    alice.ask("PUT", f"/_matrix/client/v3/presence/{me}/status", {"presence": "online"})


def test_media_is_stored_and_served_by_the_media_repository(deployed):
    alice = deployed.user()
    uri = alice.ask("POST", "/_matrix/media/v3/upload", b"\x89PNG not really", **{"Content-Type": "image/png"})[
        "content_uri"
    ]
    download = f"/_matrix/client/v1/media/download/{uri.removeprefix('mxc://')}"
    assert alice.ask("GET", download) == b"\x89PNG not really"
    assert alice.ask("GET", download, Range="bytes=1-3") == b"PNG"
    log = deployed.host.run("tail", "--lines", "200", "/var/log/nginx/matrix-synapse.access.log").stdout
    uploads = [line for line in log.splitlines() if "/media/v3/upload" in line]
    assert "matrix-synapse-worker-4-media-repository.sock" in uploads[-1]


def test_well_known_tells_where_the_homeserver_is(deployed):
    client, headers = request(deployed.url + "/.well-known/matrix/client")
    assert client == {"m.homeserver": {"base_url": "https://example.org"}}
    assert headers["Access-Control-Allow-Origin"] == "*"
    assert request(deployed.url + "/.well-known/matrix/server")[0] == {"m.server": "example.org:443"}


@pytest.mark.parametrize(
    "path", ["/_synapse/admin/v1/server_version", "/_synapse/metrics", "/_synapse/replication", "/health"]
)
def test_what_is_not_for_the_public_is_not_public(deployed, path):
    with pytest.raises(Refused) as refused:
        request(deployed.url + path)
    assert refused.value.status in (403, 404)
    assert json.loads(refused.value.body)["errcode"] in ("M_FORBIDDEN", "M_UNRECOGNIZED")


def test_the_address_that_synapse_notes_is_the_clients_whatever_the_client_says(deployed):
    alice = deployed.user()
    alice.ask("GET", "/_matrix/client/v3/sync", **{"X-Forwarded-For": "203.0.113.9"})

    def seen():
        whois = alice.ask("GET", f"/_matrix/client/v3/admin/whois/{quote(alice.id)}")
        return {c["ip"] for d in whois["devices"].values() for s in d["sessions"] for c in s["connections"]}

    # Synapse writes addresses down now and then.
    until(seen, "an address is written down")
    # Of this machine, as the host sees it.
    gateway = deployed.host.sh("ip route | sed -n 's/^default via \\([^ ]*\\).*/\\1/p'").stdout.strip()
    assert seen() == {gateway}


def test_no_secret_shows(deployed):
    host = deployed.host
    names = ["replication", "macaroon", "form", "registration", "signing.key"]
    values = [host.read(f"/var/lib/matrix-synapse/secrets/{name}").split()[-1] for name in names]
    places = {
        "docker inspect": json.dumps(deployed.containers()),
        "unit files": host.sh("cat /etc/systemd/system/matrix-synapse*.service").stdout,
        "homeserver.yaml": host.read("/etc/matrix-synapse/homeserver.yaml"),
        "arguments": host.sh("ps axww -o args").stdout,
        "environments": host.sh("{ cat /proc/[0-9]*/environ 2>/dev/null || true; } | tr '\\0' '\\n'").stdout,
        "the journal": host.run("journalctl", "--no-pager", "--output", "cat").stdout,
        "Salt's log": host.sh("cat /var/log/salt/* 2>/dev/null || true").stdout,
        "the plan": json.dumps(host.salt("synapse_workers.plan")),
        "docker history": host.sh("docker image history --no-trunc $(docker image ls --quiet)").stdout,
    }
    assert [place for place, text in places.items() if any(value in text for value in values)] == []


def test_secrets_can_be_read_by_synapse_alone(deployed):
    modes = deployed.host.sh(
        "stat --format '%a %U %G' /var/lib/matrix-synapse/secrets/* /etc/matrix-synapse/*.yaml"
    ).stdout
    assert set(modes.splitlines()) == {"640 root synapse"}
