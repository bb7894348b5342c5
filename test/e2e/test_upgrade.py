"""PostgreSQL's major upgrades: by each method, and with a fault in each phase."""

import contextlib
import copy
import json
import os
import secrets
import signal

import pytest
from deployment import MAIN, Deployment, salt_run, until
from host import Host, HostError

OLD, NEW = "15/main", "18/main"
GENERIC = "matrix-synapse-worker-0-generic"
DATA = "/var/lib/matrix-synapse"
PROGRAMS = "/usr/lib/postgresql/18/bin"
PHASES = ["preflight", "stop", "upgrade", "verify", "switch", "start", "check", "open", "after-care"]

PILLAR = {
    "server_name": "example.org",
    "workers": {"list": [{"type": "generic"}]},
    "process": {"stop_grace": 10},
    # The newer one is built without it.
    "postgres": {"options": {"ssl": "off"}},
    "nginx": {"client": {"listen": ["8008"]}},
    "config": {
        "enable_registration": True,
        "enable_registration_without_verification": True,
        "rc_registration": {"per_second": 1000, "burst_count": 1000},
        "rc_message": {"per_second": 1000, "burst_count": 1000},
        "rc_room_creation": {"per_second": 1000, "burst_count": 1000},
    },
}
# What users' data are in.
TABLES = ["events", "event_json", "state_events", "room_memberships", "users", "profiles"]


class Site(Deployment):
    """The deployment, with two users who know each other."""

    def __init__(self, host):
        super().__init__(host, copy.deepcopy(PILLAR))
        host.salt("saltutil.sync_all")
        host.run("install", "/srv/formula/test/e2e/interrupt.py", "/usr/local/bin/interrupt")
        self.seen = {}
        if host.run("test", "-e", f"{DATA}/postgres.json", check=False).returncode == 0:
            # A host that was kept may be in any state.
            self.mend()
        self.apply()
        self.alice, self.bob = self.user(), self.user()
        self.room = self.alice.room(invite=[self.bob.id])
        self.bob.join(self.room)
        self.said = [self.alice.say(self.room, f"before {number}") and f"before {number}" for number in range(5)]
        self.bob.sync()
        self.rows = self.count_rows()
        # What was there when last seen on a cluster.
        self.seen = {OLD: (list(self.said), self.rows)}

    def cluster(self):
        """Where Synapse's data are recorded to be."""
        return json.loads(self.host.read(f"{DATA}/postgres.json"))["cluster"]

    def journal(self):
        return json.loads(self.host.read(f"{DATA}/postgres-upgrade.json"))

    def clusters(self):
        return self.host.salt("synapse_cluster.clusters")

    def psql(self, sql, cluster=None, database="synapse"):
        words = ["psql", "--cluster", cluster or self.cluster(), "--no-psqlrc", "--tuples-only", "--no-align"]
        done = self.host.run("runuser", "--user=postgres", "--", *words, f"--dbname={database}", input=sql)
        return done.stdout.splitlines()

    def count_rows(self):
        """Every row about these users and their room, by its digest."""
        mine = " or ".join(f"t::text like '%{word}%'" for word in (self.room, self.alice.id, self.bob.id))
        rows = (f"select '{name} ' || md5(t::text) from {name} t where {mine}" for name in TABLES)
        return set(self.psql(" union all ".join(rows)))

    def talks(self):
        """Whoever was there before the upgrade goes on: nothing is lost, and new messages come through."""
        until(self.all_healthy, "every process is healthy")
        self.alice.url = self.bob.url = self.url
        text = f"after {secrets.token_hex(4)}"
        self.alice.say(self.room, text)
        events = []

        def heard():
            joined = self.bob.sync(timeout=2000).get("rooms", {}).get("join", {})
            events.extend(joined.get(self.room, {}).get("timeline", {}).get("events", []))
            return text in [event["content"].get("body") for event in events]

        until(heard, "who synced before hears what is said now")
        self.said.append(text)
        assert set(self.bob.heard(self.room)) >= set(self.said)
        assert self.rows - self.count_rows() == set()
        self.rows = self.count_rows()
        self.seen[self.cluster()] = (list(self.said), self.rows)

    def upgrade(self, **kwargs):
        return self.host.salt("synapse_postgres.upgrade", version=18, **kwargs)

    def fails(self, **kwargs):
        """An upgrade that fails; return what it says."""
        with pytest.raises(HostError) as failed:
            self.upgrade(**kwargs)
        return str(failed.value)

    def interrupt(self, phase, number, file="-", function="upgrade", **kwargs):
        """Start an upgrade, and send it a signal in a phase; return its process id."""
        words = [f"{name}={value}" for name, value in (kwargs or {"version": 18}).items()]
        command = ["interrupt", phase, file, str(int(number)), "salt-call", "--local", f"synapse_postgres.{function}"]
        reached, pid = self.host.run(*command, *words).stdout.split()
        assert reached == phase
        return pid

    def returned(self):
        """What was said on the newer cluster is gone, and clients begin anew."""
        said, self.rows = self.seen[OLD]
        self.said = list(said)
        self.bob.since = None

    def mend(self):
        """End every fault, and be on the old cluster, and nowhere else."""
        self.host.run("fuser", "--silent", "--kill", f"{DATA}/postgres-upgrade.lock", check=False)
        mounts = self.host.sh(f"grep --only-matching '{PROGRAMS}/[a-z_]*' /proc/mounts || true").stdout.split()
        for path in mounts:
            self.host.run("umount", "--lazy", path)
        self.host.sh("rm -rf /run/systemd/system/{matrix-synapse*,postgresql@*}.service.d; systemctl daemon-reload")
        self.pillar = copy.deepcopy(PILLAR)
        self.write_pillar()
        with contextlib.suppress(FileNotFoundError, HostError):
            if not self.journal()["outcome"]:
                self.host.salt("synapse_postgres.rollback")
        if self.cluster() == NEW:
            self.host.salt("synapse_postgres.rollback", confirm=True)
            if self.seen:
                self.returned()
        if NEW in self.clusters():
            self.host.salt("synapse_postgres.discard_old", NEW)


@pytest.fixture(scope="module")
def site():
    """A host of these tests' own. KEEP_HOST=1 leaves it running."""
    host = Host.up(os.environ.get("UPGRADE_HOST", "synapse-upgrade"))
    site = Site(host)
    yield site
    if not os.environ.get("KEEP_HOST"):
        host.down()


@pytest.fixture
def synapse(site):
    """The homeserver on the old cluster; whatever the test did, it works and has all its data in the end."""
    site.mend()
    yield site
    site.talks()


@pytest.fixture
def lying(synapse):
    """Have a shell script run in the place of one of PostgreSQL's programs, which is REAL in it."""

    def put(program, script):
        path = f"{PROGRAMS}/{program}"
        synapse.host.sh(f"test -e {path}.real || cp -a {path} {path}.real")
        synapse.host.write("/run/lie", f"#!/bin/bash\nset -euo pipefail\nREAL={path}.real\n{script}\n", mode="0755")
        synapse.host.sh(f"cp /run/lie /run/{program}.lie && chmod 755 /run/{program}.lie")
        synapse.host.run("mount", "--bind", f"/run/{program}.lie", path)

    yield put
    synapse.mend()


def is_on(synapse, cluster):
    """The data are on this cluster, and the other, where it is there, is down."""
    found = synapse.clusters()
    assert synapse.cluster() == cluster
    assert (found[cluster]["running"], found[cluster]["port"], found[cluster]["start"]) == (True, 5432, "auto")
    others = [name for name in found if name != cluster]
    assert [found[name]["start"] for name in others if found[name]["running"]] == []
    return others


def went_back(synapse, said, phase):
    """What an upgrade said that failed, and what it left."""
    assert f"failed in the phase {phase}:" in said
    assert "Undone:" in said
    assert synapse.journal()["outcome"] == "rolled back"
    assert is_on(synapse, OLD) == []
    assert synapse.all_healthy()
    assert not synapse.host.sh(
        f"ls {DATA}/maintenance.json /etc/nginx/matrix-synapse.maintenance 2>/dev/null || true"
    ).stdout


# --- What keeps an upgrade from beginning -----------------------------------------------------------


def test_without_the_packages_it_does_not_begin(synapse):
    host = synapse.host
    host.sh("dpkg --purge postgresql-18 2>/dev/null; mv /srv/packages/Packages /srv/packages/Packages.away")
    before = synapse.starts()
    try:
        said = synapse.fails()
    finally:
        host.sh("mv /srv/packages/Packages.away /srv/packages/Packages")
    went_back(synapse, said, "preflight")
    assert "postgresql-18" in said
    assert synapse.starts() == before


def test_a_preflight_alone_installs_and_looks_and_leaves_all_as_it_is(synapse):
    before = synapse.starts()
    found = synapse.host.salt("synapse_postgres.preflight", version=18)
    assert found == {"cluster": NEW, "method": "copy", "settings_left_behind": []}
    assert synapse.starts() == before
    assert is_on(synapse, OLD) == []


def test_an_apply_never_moves_to_an_empty_database(synapse):
    synapse.pillar["postgres"]["version"] = 18
    assert "Synapse's data are on 15/main" in synapse.refused()
    # As if it had been deployed before there was a record, and the package had made a cluster of its own.
    synapse.host.sh(f"mv {DATA}/postgres.json /run/postgres.json && pg_createcluster --start 18 main >/dev/null")
    try:
        assert "Synapse's data are on 15/main" in synapse.refused()
    finally:
        synapse.host.sh(f"pg_dropcluster --stop 18 main; mv /run/postgres.json {DATA}/postgres.json")
    assert is_on(synapse, OLD) == []


def test_a_check_that_refuses_leaves_users_alone(synapse):
    before = synapse.starts()
    synapse.psql("create table odd (proc regproc)", database="postgres")
    try:
        said = synapse.fails()
    finally:
        synapse.psql("drop table odd", database="postgres")
    went_back(synapse, said, "preflight")
    assert "reg" in said
    assert synapse.starts() == before


def test_too_little_space_is_found_before_anything_stops(synapse):
    before = synapse.starts()
    synapse.host.sh(
        "install -d -o postgres /var/lib/postgresql/18 && mount -t tmpfs -o size=100m,uid=postgres none /var/lib/postgresql/18"
    )
    try:
        said = synapse.fails()
    finally:
        synapse.host.run("umount", "/var/lib/postgresql/18")
    went_back(synapse, said, "preflight")
    assert "MiB free, method copy needs" in said
    assert synapse.starts() == before


def test_a_replication_slot_is_not_lost_unasked(synapse):
    synapse.psql("select pg_create_physical_replication_slot('standby')")
    try:
        said = synapse.fails()
    finally:
        synapse.psql("select pg_drop_replication_slot('standby')")
    went_back(synapse, said, "preflight")
    assert "standby (physical)" in said


def test_the_new_cluster_is_made_after_the_old_one_whatever_the_defaults_are(synapse):
    conf = "/etc/postgresql-common/createcluster.d/other.conf"
    synapse.host.write(conf, "initdb_options = '--data-checksums --wal-segsize=32'\n")
    try:
        assert synapse.host.salt("synapse_postgres.preflight", version=18)["cluster"] == NEW
    finally:
        synapse.host.run("rm", conf)


# --- What makes it fail on the way ------------------------------------------------------------------


@pytest.mark.parametrize(("method", "program"), [("copy", "pg_upgrade"), ("dump", "pg_dumpall")])
def test_a_disk_that_fills_up_costs_nothing(synapse, lying, method, program):
    host = synapse.host
    host.sh(
        "install -d -o postgres /var/lib/postgresql/18 && mount -t tmpfs -o size=600m,uid=postgres none /var/lib/postgresql/18"
    )
    fill = "head --bytes=2G /dev/zero >/var/lib/postgresql/18/full 2>/dev/null || true"
    lying(program, f'[[ " $* " == *" --check "* ]] || {fill}\nexec $REAL "$@"')
    try:
        said = synapse.fails(method=method)
        went_back(synapse, said, "upgrade")
    finally:
        host.run("umount", "/var/lib/postgresql/18")
    assert "No space left on device" in said or "The file system of /var/lib/postgresql/18/main is full" in said


def test_a_locale_that_the_new_one_has_not_goes_back(synapse):
    """It is built without ICU, which only shows when the database is made."""
    synapse.psql("create database other template template0 locale_provider icu icu_locale 'de'", database="postgres")
    try:
        said = synapse.fails()
        went_back(synapse, said, "upgrade")
    finally:
        synapse.psql("drop database other", database="postgres")
    assert "ICU is not supported" in said


def test_a_dump_that_breaks_off_in_the_pipe_is_noticed(synapse, lying):
    lying("pg_dumpall", '$REAL "$@" | head --bytes=20000\nexit 3')
    said = synapse.fails(method="dump")
    went_back(synapse, said, "upgrade")
    assert "pg_dumpall failed with the exit status" in said


def test_a_restore_that_stops_is_noticed(synapse, lying):
    lying("pg_dumpall", '$REAL "$@"\necho "select 1 / 0;"')
    said = synapse.fails(method="dump")
    went_back(synapse, said, "upgrade")
    assert "division by zero" in said


def test_one_row_less_is_noticed(synapse, lying):
    lying("pg_dumpall", '$REAL "$@" | sed "/^COPY public.event_json /{n;d}"')
    said = synapse.fails(method="dump")
    went_back(synapse, said, "verify")
    assert "rows public.event_json" in said


def test_a_file_that_was_not_copied_whole_is_noticed(synapse, lying):
    (path,) = synapse.psql("select pg_relation_filepath('event_json')")
    shrink = f"for file in /var/lib/postgresql/18/main/base/*/$(basename {path}); do truncate --size=8192 $file; done"
    lying("pg_upgrade", f'$REAL "$@"\n[[ " $* " == *" --check "* ]] || {shrink}')
    said = synapse.fails()
    went_back(synapse, said, "verify")
    assert "size public.event_json" in said


def test_a_library_that_only_the_old_one_has_is_found_before_anything_stops(synapse):
    file = "/etc/postgresql/15/main/conf.d/other.conf"
    synapse.host.write(file, "shared_preload_libraries = 'adminpack'\n")
    try:
        said = synapse.fails()
        went_back(synapse, said, "preflight")
    finally:
        synapse.host.run("rm", file)
    assert "adminpack" in said


def test_a_server_that_does_not_start_after_the_move_is_noticed(synapse, lying):
    conf = "/etc/postgresql/18/main/postgresql.conf"
    lying("pg_upgrade", f'$REAL "$@"\n[[ " $* " == *" --check "* ]] || echo "nonsense = 1" >>{conf}')
    said = synapse.fails()
    went_back(synapse, said, "verify")
    assert "PostgreSQL 18/main does not start" in said
    assert "nonsense" in said


def starts_on_the_old_one_alone(synapse):
    """A worker that starts only while the data are on the old cluster."""
    only = f"[Service]\nExecStartPre=/usr/bin/grep --quiet {OLD} {DATA}/postgres.json\n"
    synapse.host.write(f"/run/systemd/system/{GENERIC}.service.d/only.conf", only)
    synapse.host.run("systemctl", "daemon-reload")


def test_a_synapse_that_does_not_come_up_goes_back(synapse):
    starts_on_the_old_one_alone(synapse)
    said = synapse.fails()
    went_back(synapse, said, "start")
    assert f"{GENERIC} did not become healthy" in said


def test_a_synapse_that_sends_no_message_goes_back(synapse):
    """The table of the events takes no more of them, on the new cluster."""
    synapse.psql(
        "create function refuse() returns trigger language plpgsql as $$ begin"
        " if current_setting('server_version_num')::int >= 180000 then raise 'no more'; end if; return new; end $$;"
        "create trigger refuse before insert on events for each row execute function refuse()"
    )
    try:
        said = synapse.fails()
        went_back(synapse, said, "check")
    finally:
        synapse.psql("drop trigger refuse on events; drop function refuse()")
    assert "500" in said


# --- What cuts it off -------------------------------------------------------------------------------

# A file that shows that the phase's tool is at work.
AT_WORK = {"upgrade": "/run/matrix-synapse-postgres-upgrade"}


def nothing_empty_runs(synapse, phase):
    """Whatever was cut off: no process of Synapse has another database than the old one, or the whole new one."""
    switched = PHASES.index(phase) - PHASES.index("switch")
    assert synapse.cluster() in ((OLD,) if switched < 0 else (OLD, NEW) if switched == 0 else (NEW,))
    if phase in ("upgrade", "verify"):
        assert synapse.host.run("systemctl", "start", MAIN, check=False).returncode != 0
        assert f"was cut off in the phase {phase}" in synapse.refused()
    if phase in ("verify", "switch"):
        # What users wrote to the new one now would be lost.
        with pytest.raises(HostError, match=f"was cut off in the phase {phase}"):
            synapse.host.salt("synapse_process.start", holder="synapse_postgres.upgrade")


@pytest.mark.parametrize("phase", PHASES)
def test_a_run_that_is_killed_is_put_right_by_the_next(synapse, phase):
    synapse.interrupt(phase, signal.SIGKILL, AT_WORK.get(phase, "-"))
    nothing_empty_runs(synapse, phase)
    if phase in ("upgrade", "open", "after-care"):
        # Goes back and begins anew, or goes on.
        assert synapse.upgrade()["cluster"] == NEW
        is_on(synapse, NEW)
    else:
        assert synapse.host.salt("synapse_postgres.rollback")["changed"]
        assert is_on(synapse, OLD) == []


@pytest.mark.parametrize("phase", PHASES)
def test_a_loss_of_power_is_put_right_by_the_next_run(synapse, phase):
    synapse.interrupt(phase, signal.SIGSTOP, AT_WORK.get(phase, "-"))
    synapse.host.kill()
    nothing_empty_runs(synapse, phase)
    if phase in ("verify", "open", "after-care"):
        assert synapse.upgrade()["cluster"] == NEW
        is_on(synapse, NEW)
    else:
        assert synapse.host.salt("synapse_postgres.rollback")["changed"]
        assert is_on(synapse, OLD) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_an_operator_who_gives_up_is_heeded_once(synapse, number):
    """Ctrl-C, or a terminal that goes away; and on the way back, whatever comes."""
    pid = synapse.interrupt("verify", number)
    until(lambda: synapse.journal()["phases"][-1]["name"] == "back", "it goes back", passing=True)
    synapse.host.sh(f"kill -INT {pid}; kill -TERM {pid}; kill -HUP {pid}")
    until(lambda: synapse.journal()["outcome"], "it goes back by itself")
    until(lambda: synapse.host.run("kill", "-0", pid, check=False).returncode, "its process ends")
    went_back(synapse, synapse.host.read("/var/log/interrupted.log"), "verify")


def test_a_way_back_that_is_killed_is_put_right_by_the_next(synapse):
    """When the new cluster is gone, and the old one is not there yet."""
    starts_on_the_old_one_alone(synapse)
    slow = "[Service]\nExecStartPre=/bin/sh -c 'touch /run/old-starts; sleep 2'\n"
    synapse.host.write("/run/systemd/system/postgresql@15-main.service.d/slow.conf", slow)
    synapse.host.sh("rm -f /run/old-starts; systemctl daemon-reload")
    synapse.interrupt("back", signal.SIGKILL, "/run/old-starts")
    assert NEW not in synapse.clusters()
    assert "was cut off in the phase back" in synapse.host.salt("synapse_postgres.fault")
    assert synapse.host.salt("synapse_postgres.rollback")["changed"]
    assert is_on(synapse, OLD) == []
    assert synapse.journal()["probes"] == []


def test_an_after_care_that_fails_keeps_nobody_from_going_back(synapse, lying):
    host = synapse.host
    lying("vacuumdb", '[[ " $* " != *" --analyze-in-stages "* ]] || exit 7\nexec $REAL "$@"')
    said = synapse.fails()
    assert "failed in the phase after-care" in said
    assert "Synapse runs on 18/main, and users are served" in said
    # Nothing is locked.
    assert MAIN in host.salt("synapse_process.start")
    foretold = host.salt("synapse_postgres.rollback")
    assert (foretold["changed"], foretold["would_serve"]) == (False, OLD)
    assert "failed in the phase after-care" in synapse.fails()
    synapse.interrupt("return", signal.SIGKILL, function="rollback", confirm=True)
    assert host.salt("synapse_postgres.rollback")["changed"]
    assert is_on(synapse, OLD) == [NEW]
    synapse.returned()


# --- By each method ---------------------------------------------------------------------------------


def test_copy_moves_everything_and_nothing_else_gets_in_the_way(synapse):
    host = synapse.host
    # Somebody else in the same cluster.
    host.sh(f"runuser -u postgres -- psql --cluster {OLD} --command 'select pg_sleep(600)' >/dev/null 2>&1 &")
    pid = synapse.interrupt("stop", signal.SIGSTOP)
    assert "Another run is at work" in synapse.fails()
    assert "PostgreSQL is being moved from 15/main to 18/main" in synapse.refused()
    with pytest.raises(HostError, match="PostgreSQL is being moved from 15/main to 18/main"):
        host.salt("synapse_process.stop")
    assert "at work" in host.salt("synapse_postgres.status")
    host.run("kill", "-CONT", pid)
    until(lambda: synapse.journal()["outcome"] == "done", "the first one comes to its end")
    until(lambda: host.run("kill", "-0", pid, check=False).returncode, "its process ends")
    console = host.read("/var/log/interrupted.log")
    assert "these are cut off until the switch: psql on postgres" in console
    assert "synapse/postgres/upgrade: verify ..." in console
    assert is_on(synapse, NEW) == [OLD]
    synapse.talks()

    assert not host.salt("synapse_postgres.upgrade", version=18)["changed"]
    # The old one can't start by accident, nor at boot.
    host.run("systemctl", "start", "postgresql@15-main", check=False)
    host.run("systemctl", "restart", "postgresql")
    assert is_on(synapse, NEW) == [OLD]
    until(synapse.all_healthy, "Synapse is back after PostgreSQL")
    assert synapse.apply(test=True) == {}
    synapse.pillar["postgres"]["version"] = 18
    assert synapse.apply() == {}

    since = synapse.journal()["served_since"]
    # What is asked for in vain takes no way back away.
    with pytest.raises(HostError, match="data are on 18/main already"):
        host.salt("synapse_postgres.preflight", version=18)
    with pytest.raises(HostError, match="postgresql-99"):
        host.salt("synapse_postgres.preflight", version=99)
    foretold = host.salt("synapse_postgres.rollback")
    assert not foretold["changed"]
    assert since in foretold["lost"]
    assert is_on(synapse, NEW) == [OLD]
    assert host.salt("synapse_postgres.rollback", confirm=True)["changed"]
    assert is_on(synapse, OLD) == [NEW]
    lost = synapse.said[-1]
    synapse.returned()
    synapse.talks()
    assert lost not in synapse.alice.heard(synapse.room)
    with pytest.raises(HostError, match="holds Synapse's data"):
        host.salt("synapse_postgres.discard_old", OLD)
    assert host.salt("synapse_postgres.discard_old", NEW)
    assert is_on(synapse, OLD) == []


@pytest.fixture
def reflinks(synapse):
    """PostgreSQL's data on a file system that can share blocks."""
    host = synapse.host
    move = """systemctl stop matrix-synapse postgresql@15-main
        cp -a /var/lib/postgresql/. {target}
        {mount}
        systemctl start postgresql@15-main matrix-synapse"""
    host.sh(
        """truncate --size=1G /srv/xfs && mkfs.xfs -q /srv/xfs
        for number in $(seq 0 63); do test -e /dev/loop$number || mknod /dev/loop$number b 7 $number; done
        mkdir -p /mnt/xfs && mount -o loop /srv/xfs /mnt/xfs"""
        + "\n"
        + move.format(target="/mnt/xfs", mount="umount /mnt/xfs && mount -o loop /srv/xfs /var/lib/postgresql")
    )
    until(synapse.all_healthy, "every process is healthy on it")
    yield
    synapse.mend()
    host.sh(
        """systemctl stop matrix-synapse postgresql@15-main
        mkdir -p /mnt/ext && mount --bind / /mnt/ext
        rm -rf /mnt/ext/var/lib/postgresql/15 && cp -a /var/lib/postgresql/15 /mnt/ext/var/lib/postgresql/
        umount /mnt/ext /var/lib/postgresql && rm /srv/xfs
        systemctl start postgresql@15-main matrix-synapse"""
    )


def test_clone_is_the_default_where_files_can_share_blocks(synapse, reflinks):
    done = synapse.upgrade()
    assert (done["method"], done["kept"]) == ("clone", OLD)
    assert is_on(synapse, NEW) == [OLD]
    synapse.talks()


def test_dump_moves_everything_and_nobody_writes_what_would_stay_behind(synapse, lying):
    late = 'psql --cluster 15/main --dbname postgres --command "create table late ()"'
    lying("pg_dumpall", f'{late} >/tmp/late.log 2>&1 || true\nexec $REAL "$@"')
    done = synapse.upgrade(method="dump")
    assert "read-only transaction" in synapse.host.read("/tmp/late.log")
    assert list(done["seconds"]) == PHASES
    assert is_on(synapse, NEW) == [OLD]


# --- By a master ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def master(site):
    with salt_run(site.host) as run:
        yield run


ORCHESTRATE = ("state.orchestrate", "synapse.orch.upgrade_postgres")


def test_a_master_upgrades_it_and_shows_how_far_it_is(synapse, master):
    synapse.pillar["postgres"]["version"] = 18
    synapse.write_pillar()
    done = master(*ORCHESTRATE)
    assert is_on(synapse, NEW) == [OLD]
    for phase in PHASES:
        assert (
            f"synapse/postgres/upgrade: {phase} ..." in done.stderr
            or f"{synapse.host.name}: {phase} ..." in done.stderr
        )
    synapse.talks()
    assert json.loads(master(*ORCHESTRATE).stdout)["retcode"] == 0
    assert is_on(synapse, NEW) == [OLD]


def test_a_master_is_told_what_failed_and_what_was_undone(synapse, master, lying):
    lying("pg_upgrade", '[[ " $* " == *" --check "* ]] || exit 7\nexec $REAL "$@"')
    failed = master(*ORCHESTRATE, 'pillar={"arguments": {"version": 18}}', check=False)
    assert failed.returncode != 0
    went_back(synapse, json.dumps(json.loads(failed.stdout)), "upgrade")
    assert "exit status 7" in failed.stdout


def test_a_minion_whose_work_is_killed_is_a_failure_and_the_next_run_puts_it_right(synapse, master, lying):
    host = synapse.host
    lying("pg_upgrade", '[[ " $* " == *" --check "* ]] || { touch /run/blocked; sleep 1000; }\nexec $REAL "$@"')
    host.sh("rm -f /run/blocked; chmod 777 /run")
    command = " ".join(["salt-run", *ORCHESTRATE, """'pillar={"arguments": {"version": 18}, "timeout": 20}'"""])
    host.sh(f"({command} && echo exit 0 || echo exit $?) >/run/orchestration.log 2>&1 &")
    until(lambda: host.run("test", "-e", "/run/blocked", check=False).returncode == 0, "the tool is at work")
    host.sh("fuser --kill /var/lib/matrix-synapse/postgres-upgrade.lock")
    until(lambda: "\nexit " in host.read("/run/orchestration.log"), "the master notices")
    assert "\nexit 0" not in host.read("/run/orchestration.log")
    host.run("umount", "--lazy", f"{PROGRAMS}/pg_upgrade")
    master(*ORCHESTRATE, 'pillar={"arguments": {"version": 18}}')
    assert is_on(synapse, NEW) == [OLD]


def test_a_minion_that_is_not_connected_is_a_failure(synapse, master):
    synapse.host.run("systemctl", "stop", "salt-minion")
    before = synapse.starts()
    silent = master(*ORCHESTRATE, 'pillar={"timeout": 5}', check=False)
    assert silent.returncode != 0
    assert synapse.starts() == before
    assert is_on(synapse, OLD) == []


# --- The one without a way back, last ----------------------------------------------------------------


def test_link_moves_everything_and_says_that_there_is_no_way_back(synapse):
    """With checksums on, which the new one then has too."""
    host = synapse.host
    host.sh(
        f"""systemctl stop matrix-synapse postgresql@15-main
        runuser -u postgres -- /usr/lib/postgresql/15/bin/pg_checksums --enable --pgdata /var/lib/postgresql/15/main
        systemctl start postgresql@15-main {MAIN}"""
    )
    until(synapse.all_healthy, "every process is healthy again")
    # Before the new one was started, there is one.
    synapse.interrupt(
        "upgrade", signal.SIGKILL, "/var/lib/postgresql/15/main/global/pg_control.old", version=18, method="link"
    )
    assert host.salt("synapse_postgres.rollback")["changed"]
    assert is_on(synapse, OLD) == []
    synapse.talks()

    done = synapse.upgrade(method="link")
    assert is_on(synapse, NEW) == [OLD]
    assert synapse.psql("show data_checksums") == ["on"]
    with pytest.raises(HostError, match="There is no way back from method link"):
        host.salt("synapse_postgres.rollback", confirm=True)
    synapse.talks()
    assert host.salt("synapse_postgres.discard_old", done["kept"])
    assert is_on(synapse, NEW) == []
    assert synapse.apply(test=True) == {}
    host.restart()
    assert is_on(synapse, NEW) == []
