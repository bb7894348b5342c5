"""Synapse on a PostgreSQL and a Redis that the formula did not make, reached by network with passwords."""

import copy
import ipaddress
import json
import secrets

import pytest
from conftest import ONE_WORKER, restored
from deployment import MAIN, until
from host import HostError

PILLAR = ONE_WORKER

# Of the containers' network: where a service of the host can be reached from a container.
NETWORK, GATEWAY = "172.29.88.0/24", "172.29.88.1"
NAME = "elsewhere"
# Characters that mean something to YAML, SQL, redis.conf or systemd, with a part that is searched for.
TOKENS = {service: secrets.token_hex(16) for service in ("postgres", "redis")}
PASSWORDS = {service: f"it's 100% \"#: $HOME {token}" for service, token in TOKENS.items()}


def psql(host, cluster, sql):
    words = ["psql", "--cluster", f"15/{cluster}", "--no-psqlrc", "--tuples-only", "--no-align", "--quiet"]
    return host.run("runuser", "--user", "postgres", "--", *words, "--set=ON_ERROR_STOP=1", input=sql).stdout.split()


@pytest.fixture(scope="module")
def servers(deployment):
    """A second cluster and a second Redis."""
    host, password = deployment.host, PASSWORDS["postgres"].replace("'", "''")
    try:
        host.sh(
            f"""pg_createcluster 15 {NAME} --port 5433 --start-conf manual --locale C --encoding UTF8
            echo "listen_addresses = '{GATEWAY}'" >>/etc/postgresql/15/{NAME}/postgresql.conf
            echo 'host {NAME} {NAME} {NETWORK} scram-sha-256' >>/etc/postgresql/15/{NAME}/pg_hba.conf
            systemctl start postgresql@15-{NAME}"""
        )
        psql(host, NAME, f"create role {NAME} login password '{password}';\ncreate database {NAME} owner {NAME};")
        host.write(
            f"/etc/redis/redis-{NAME}.conf",
            f'bind {GATEWAY}\nport 6380\nsave ""\nrequirepass {json.dumps(PASSWORDS["redis"])}\n',
        )
        host.run("systemctl", "start", f"redis-server@{NAME}")
        yield
    finally:
        host.sh(
            f"""systemctl stop redis-server@{NAME} postgresql@15-{NAME} || true
            rm --force /etc/redis/redis-{NAME}.conf
            pg_dropcluster --stop 15 {NAME} || true
            systemctl reset-failed "*@*{NAME}.service" || true"""
        )


@pytest.fixture(scope="module")
def moved(deployment, pillar, servers):
    """The deployment with Synapse on these servers, and what Salt returned of the run that moved it there."""
    common = {"managed": False, "host": GATEWAY}
    deployment.pillar = {
        **copy.deepcopy(pillar),
        "postgres": {**common, "port": 5433, "database": NAME, "user": NAME, "password": PASSWORDS["postgres"]},
        "redis": {**common, "port": 6380, "password": PASSWORDS["redis"]},
    }
    deployment.write_pillar()
    try:
        returned = deployment.host.salt("state.apply", "synapse")
        yield deployment, returned
    finally:
        restored(deployment, pillar)


def test_an_apply_moves_every_process_to_the_external_servers(moved):
    deployment, returned = moved
    assert [state["comment"] for state in returned.values() if state["result"] is not True] == []
    until(deployment.all_healthy, "every process runs on them")
    containers = deployment.containers()
    addresses = {
        name: container["NetworkSettings"]["Networks"]["matrix-synapse"]["IPAddress"]
        for name, container in containers.items()
    }
    assert all(ipaddress.ip_address(address) in ipaddress.ip_network(NETWORK) for address in addresses.values())

    query = (
        f"select distinct application_name || '=' || host(client_addr) from pg_stat_activity where usename = '{NAME}'"
    )
    sessions = psql(deployment.host, NAME, query)
    assert dict(session.split("=") for session in sessions) == addresses
    assert psql(deployment.host, "main", "select 1 from pg_stat_activity where usename = 'synapse'") == []

    # Each process listens to what the others tell.
    ask = ["env", f"REDISCLI_AUTH={PASSWORDS['redis']}", "redis-cli", "-h", GATEWAY, "-p", "6380"]
    clients = deployment.host.run(*ask, "client", "list", "type", "pubsub").stdout.split()
    listening = [word.removeprefix("addr=").split(":")[0] for word in clients if word.startswith("addr=")]
    assert sorted(listening) == sorted(addresses.values())

    mounts = {mount["Source"] for container in containers.values() for mount in container["Mounts"]}
    assert not mounts & {"/run/postgresql", "/run/redis-synapse"}


def test_users_talk_by_the_external_servers(moved):
    alice, bob = moved[0].user(), moved[0].user()
    room = alice.room(invite=[bob.id])
    bob.join(room)
    bob.sync()
    alice.say(room, "hello")
    timeline = bob.sync(timeout=10000)["rooms"]["join"][room]["timeline"]["events"]
    assert [event["content"]["body"] for event in timeline if event["type"] == "m.room.message"] == ["hello"]


def test_a_second_run_changes_nothing_with_external_servers(moved):
    assert moved[0].apply(test=True) == {}
    assert moved[0].apply() == {}


def test_an_upgrade_of_somebody_elses_is_bracketed_by_stop_and_verification(moved):
    host, alice = moved[0].host, moved[0].user()
    room = alice.room()
    alice.say(room, "before the move")
    with pytest.raises(HostError, match=f"must be stopped first.*the unit {MAIN}"):
        host.salt("synapse_postgres.remember")

    # What an operator might do: the database goes through a dump.
    work = f"runuser --user postgres -- env PGCLUSTER=15/{NAME}"
    move = f"""{work} dropdb {NAME}
        {work} createdb --owner {NAME} --encoding UTF8 --locale C --template template0 {NAME}
        {work} pg_restore --dbname {NAME} --exit-on-error /tmp/{NAME}.dump"""
    host.salt("synapse_process.stop", reason="PostgreSQL moves")
    noted = host.salt("synapse_postgres.remember")
    assert noted["rows"] > noted["tables"] > 100
    host.sh(f"{work} pg_dump --format custom --file /tmp/{NAME}.dump {NAME}; {move}")
    assert host.salt("synapse_postgres.verify") == noted
    host.sh(f"{work} psql {NAME} --command 'delete from event_json where ctid = (select min(ctid) from event_json)'")
    with pytest.raises(HostError, match="rows public.event_json: [0-9]+ before"):
        host.salt("synapse_postgres.verify")
    host.sh(f"{move}; rm /tmp/{NAME}.dump")
    assert host.salt("synapse_postgres.verify") == noted
    host.salt("synapse_process.start")
    assert "before the move" in alice.heard(room)


def test_the_passwords_of_external_servers_show_nowhere(moved):
    deployment, returned = moved
    host = deployment.host
    places = {
        "what Salt returned": json.dumps(returned),
        "docker inspect": json.dumps(deployment.containers()),
        "unit files": host.sh("cat /etc/systemd/system/matrix-synapse*.service").stdout,
        "arguments": host.sh("ps axww -o args").stdout,
        "environments": host.sh("{ cat /proc/[0-9]*/environ 2>/dev/null || true; } | tr '\\0' '\\n'").stdout,
        "the journal": host.run("journalctl", "--no-pager", "--output", "cat").stdout,
        "logs": host.sh("cat /var/log/salt/* /var/log/nginx/* /var/log/postgresql/* 2>/dev/null || true").stdout,
        "the plan": json.dumps(host.salt("synapse_workers.plan")),
    }
    assert [place for place, text in places.items() if any(token in text for token in TOKENS.values())] == []
    # But for one file, which Synapse has to read.
    holders = host.run(
        "grep",
        "--recursive",
        "--files-with-matches",
        TOKENS["postgres"],
        "/etc",
        "/run",
        "/var/cache",
        "/var/lib/docker/containers",
        "/var/lib/matrix-synapse",
        check=False,
    )
    assert holders.stdout.split() == ["/etc/matrix-synapse/homeserver.yaml"]
    assert (
        host.run("stat", "--format", "%a %U %G", "/etc/matrix-synapse/homeserver.yaml").stdout == "640 root synapse\n"
    )
