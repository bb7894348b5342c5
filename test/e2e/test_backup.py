"""Backups: made while users talk, proven, and gone back to, also when something fails or somebody kills the run."""

import contextlib
import copy
import itertools
import json
import threading

import pytest
from conftest import ONE_WORKER
from deployment import MAIN, Refused, until
from host import SYNAPSE_VERSION, HostError

PILLAR = ONE_WORKER

DIRECTORY = "/var/backups/matrix-synapse"
DATA = "/var/lib/matrix-synapse"
JOURNAL = f"{DATA}/restore.json"
# Where a test changes a copy of a backup.
COPIES = "/var/backups/copies"

# Takes a line out of, or puts one into, the dump of a table, and tells the manifest.
TAMPER = """
import gzip, hashlib, json, pathlib, sys
backup, old, new = pathlib.Path(sys.argv[1]), sys.argv[2].encode(), sys.argv[3].encode()
manifest = json.loads((backup / "manifest.json").read_text())
for path in backup.glob("database/*.dat.gz"):
    lines = gzip.decompress(path.read_bytes()).splitlines(keepends=True)
    found = [line for line in lines if old in line]
    if found:
        lines[lines.index(found[0])] = new
        path.write_bytes(gzip.compress(b"".join(lines)))
        entry = manifest["files"][str(path.relative_to(backup))]
        entry["size"], entry["sha256"] = path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest()
(backup / "manifest.json").write_text(json.dumps(manifest))
"""


def psql(host, sql, database="postgres"):
    words = ["psql", "--no-psqlrc", "--tuples-only", "--no-align", f"--dbname={database}", "--set=ON_ERROR_STOP=1"]
    return host.run("runuser", "--user", "postgres", "--", *words, input=sql).stdout.split()


def databases(host):
    return set(psql(host, "select datname from pg_database where datname like 'synapse%'"))


def clusters(host):
    return host.run("ls", "/etc/postgresql/15").stdout.split()


def backups(host):
    return host.sh(f"ls --almost-all {DIRECTORY}").stdout.split()


def synapse_restore(host, backup, **kwargs):
    return host.salt("synapse_backup.restore", backup, **kwargs)


def in_background(host, *words):
    """Start salt-call and return its process id."""
    command = f"setsid salt-call --local {' '.join(words)} >/tmp/background.log 2>&1 & echo $!"
    return host.sh(command).stdout.strip()


def phase(host):
    text = host.run("cat", JOURNAL, check=False).stdout
    return text and json.loads(text)["phase"]


@pytest.fixture(scope="module")
def talk(deployment):
    """Alice's room, with an image in it, as it was when the backup was made; and the backup."""
    host, alice = deployment.host, deployment.user()
    room = alice.room()
    alice.say(room, "to be kept")
    alice.sync()
    media = "/_matrix/media/v3/upload?filename=a.txt"
    uri = alice.ask("POST", media, b"an image", **{"Content-Type": "text/plain"})["content_uri"]
    done = host.salt("synapse_backup.create", media=True)
    yield {"alice": alice, "room": room, "image": uri, "backup": done["backup"], "done": done}
    host.sh(f"rm --recursive --force {COPIES}")


@pytest.fixture
def unchanged(deployed):
    """What a test must leave as it is: processes, databases, secrets, no lock, no journal."""

    def seen():
        secrets = deployed.host.sh(f"sha256sum {DATA}/secrets/* {DATA}/roster.json").stdout
        left = deployed.host.sh(f"ls {DATA}").stdout.split()
        return deployed.starts(), databases(deployed.host), secrets, left

    before = seen()
    yield
    assert seen() == before
    assert deployed.all_healthy()


@pytest.fixture
def changed_copy(deployed, talk):
    """Make a copy of the backup that differs by what a script does; return its path."""
    numbers = itertools.count()

    def make(script):
        path = f"{COPIES}/{next(numbers)}/{talk['backup'].rpartition('/')[2]}"
        deployed.host.sh(
            f"rm -rf {path} && mkdir -p {path} && cp -a {talk['backup']}/. {path} && cd {path} && {script}"
        )
        return path

    return make


def tampered(old, new=""):
    return f"python3 - . '{old}' '{new}' <<'END'\n{TAMPER}\nEND"


def test_a_master_makes_a_backup_while_users_talk(deployed, master):
    host, alice = deployed.host, deployed.user()
    room, before, over = alice.room(), deployed.starts(), threading.Event()
    said = []

    def chat():
        while not over.is_set():
            said.append(alice.say(room, str(len(said))))

    chatter = threading.Thread(target=chat)
    chatter.start()
    try:
        master("state.orchestrate", "synapse.orch.backup")
    finally:
        over.set()
        chatter.join()
    assert len(said) > 10
    assert deployed.starts() == before
    (made,) = host.salt("synapse_backup.list")[-1:]
    assert (made["server_name"], made["postgres"], made["media"]) == ("example.org", 15, None)
    assert made["synapse"] == SYNAPSE_VERSION
    assert clusters(host) == ["main"]


def test_a_backup_is_whole_and_only_roots(deployed, talk):
    host, path = deployed.host, talk["backup"]
    assert set(host.sh(f"find {path} -printf '%y%m %U\\n'").stdout.splitlines()) == {"d700 0", "f600 0"}
    manifest = json.loads(host.read(f"{path}/manifest.json"))
    assert manifest["server_name"] == "example.org"
    assert manifest["processes"] == deployed.names()
    assert manifest["image"]["id"] == deployed.containers()[MAIN]["Image"]
    database = manifest["database"]
    assert (database["encoding"], database["collate"], database["ctype"], database["owner"]) == (
        "UTF8",
        "C",
        "C",
        "synapse",
    )
    assert database["tables"]["public.events"] > 5
    assert manifest["media"] == len(host.sh(f"find {DATA}/media -type f").stdout.splitlines()) > 0
    for name in ("config/homeserver.yaml", "data/secrets/signing.key", "data/roster.json"):
        assert f"files/{name}" in manifest["files"]
    assert host.run("cmp", f"{path}/files/data/secrets/signing.key", f"{DATA}/secrets/signing.key").returncode == 0

    verified = host.salt("synapse_backup.verify", path.rpartition("/")[2])
    assert (verified["tables"], verified["rows"]) == (talk["done"]["tables"], talk["done"]["rows"])
    assert clusters(host) == ["main"]


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("echo >>files/data/secrets/signing.key", "signing.key has .* bytes, and should have"),
        ("sed -i 's/e/f/' files/config/homeserver.yaml", "homeserver.yaml has another checksum"),
        ("rm media.tar", "media.tar is missing"),
        ("touch files/more", "files/more is not in the manifest"),
        (tampered("to be kept"), "the table public.event_json has .* rows, and should have"),
        (tampered("@user-", "nothing that a table takes\n"), "pg_restore: "),
    ],
    ids=["longer", "changed", "missing", "more", "a row less", "no row"],
)
def test_verify_says_what_is_wrong(deployed, changed_copy, unchanged, script, said):
    with pytest.raises(HostError, match=said):
        deployed.host.salt("synapse_backup.verify", changed_copy(script))
    assert clusters(deployed.host) == ["main"]


def test_without_space_or_without_proof_there_is_no_backup(deployed, talk, unchanged):
    host = deployed.host
    before = backups(host)
    host.run("mount", "-t", "tmpfs", "-o", "size=50M,mode=0700", "tmpfs", DIRECTORY)
    try:
        with pytest.raises(HostError, match="matrix-synapse.* has 50 MiB free, and the backup may need"):
            host.salt("synapse_backup.create")
        assert backups(host) == []
    finally:
        host.run("umount", DIRECTORY)
    # A cluster that does not start proves nothing.
    host.run("mv", "/usr/bin/pg_ctlcluster", "/usr/bin/pg_ctlcluster.away")
    try:
        with pytest.raises(HostError, match="pg_ctlcluster"):
            host.salt("synapse_backup.create")
    finally:
        host.run("mv", "/usr/bin/pg_ctlcluster.away", "/usr/bin/pg_ctlcluster")
    assert backups(host) == before


def test_a_backup_that_was_killed_is_none_and_the_next_keeps_as_many_as_asked(deployed, talk):
    host = deployed.host
    before = backups(host)
    process = in_background(host, "synapse_backup.create")
    until(lambda: "synapse_scratch" in clusters(host), "the backup is being verified", passing=True)
    with pytest.raises(HostError, match="Another backup, verification or restore is running"):
        host.salt("synapse_backup.create")
    host.run("kill", "-KILL", process)
    assert host.run("pgrep", "--exact", "pg_dump|pg_restore", check=False).stdout == ""
    assert [name for name in backups(host) if name.endswith(".partial")]
    assert [made["backup"].rpartition("/")[2] for made in host.salt("synapse_backup.list")] == before

    kept = copy.deepcopy(deployed.pillar)
    deployed.pillar = {**kept, "backup": {"keep": len(before)}}
    deployed.write_pillar()
    try:
        done = host.salt("synapse_backup.create")
    finally:
        deployed.pillar = kept
        deployed.write_pillar()
    assert done["removed"] == [f"{DIRECTORY}/{before[0]}"]
    assert backups(host) == [*before[1:], done["backup"].rpartition("/")[2]]
    assert clusters(host) == ["main"]


def test_a_master_brings_back_what_was_destroyed(deployed, talk, master):
    host, alice, room = deployed.host, talk["alice"], talk["room"]
    alice.say(room, "after the backup")
    before = databases(host)
    psql(host, f"delete from event_json where room_id = '{room}'", "synapse")
    host.sh(f"rm $(find {DATA}/media/local_content -type f)")
    host.sh(f"echo something else >{DATA}/secrets/form")

    arguments = {"arguments": {"backup": talk["backup"]}}
    master("state.orchestrate", "synapse.orch.restore", f"pillar={json.dumps(arguments)}")
    until(deployed.all_healthy, "every process is healthy")
    assert alice.heard(room)[0] == "to be kept"
    # The client of before goes on where it was.
    assert room not in alice.sync().get("rooms", {}).get("join", {})
    alice.say(room, "as before")
    assert alice.sync(timeout=10000)["rooms"]["join"][room]["timeline"]["events"][-1]["content"]["body"] == "as before"
    path = talk["image"].removeprefix("mxc://")
    assert alice.ask("GET", f"/_matrix/client/v1/media/download/{path}") == b"an image"
    assert host.run("stat", "--format=%a %U %G", f"{DATA}/secrets/form").stdout == "640 root synapse\n"
    assert host.read(f"{DATA}/secrets/form") == host.read(f"{talk['backup']}/files/data/secrets/form")

    (old,) = set(host.salt("synapse_backup.old")) - before
    assert databases(host) == {*before, old}
    assert psql(host, f"select count(*) from event_json where room_id = '{room}'", old) == ["0"]
    assert host.read(f"{DATA}/{old}/secrets/form") == "something else\n"
    assert deployed.apply(test=True) == {}
    with pytest.raises(HostError, match=f"there are: .*{old}"):
        host.salt("synapse_backup.discard_old", "synapse")
    assert host.salt("synapse_backup.discard_old", old) == old
    assert databases(host) == before
    assert host.run("test", "-e", f"{DATA}/{old}", check=False).returncode == 1


@pytest.mark.parametrize(
    ("script", "said"),
    [
        (
            'sed -i \'s/"example.org"/"example.com"/\' manifest.json',
            "is a backup of example.com, and this is example.org",
        ),
        ("rm manifest.json", "no complete backup"),
        ("rm database/toc.dat", "database/toc.dat is missing"),
        ('sed -i \'s/"size": [0-9]*, "owner"/"size": 9000000000000, "owner"/\' manifest.json', "the restored database"),
        ('sed -i \'s/"postgres": "15/"postgres": "99/\' manifest.json', "made by PostgreSQL 99, and 15 can't read"),
    ],
    ids=["another server", "no manifest", "incomplete", "no space", "a newer PostgreSQL"],
)
def test_a_restore_is_refused_before_anything_changes(deployed, changed_copy, unchanged, script, said):
    # One line, for sed.
    flat = 'python3 -c \'import json; m = json.load(open("manifest.json")); json.dump(m, open("manifest.json", "w"))\''
    with pytest.raises(HostError, match=said):
        synapse_restore(deployed.host, changed_copy(f"{flat} && {script}"))


def test_a_restore_meets_the_lock_of_somebody_else(deployed, talk):
    deployed.host.salt("synapse_maintenance.lock", "alice", "new disks")
    try:
        with pytest.raises(HostError, match="alice holds the lock"):
            synapse_restore(deployed.host, talk["backup"])
        assert phase(deployed.host) == ""
    finally:
        deployed.host.salt("synapse_maintenance.unlock", "alice")
    assert deployed.all_healthy()


def test_a_restore_that_fails_goes_back_by_itself(deployed, talk, changed_copy):
    host, alice, room = deployed.host, talk["alice"], talk["room"]
    alice.say(room, "not in the backup")
    before = databases(host)
    (version,) = psql(host, "select compat_version from schema_compat_version", "synapse")
    # Synapse refuses a database of a newer one.
    too_new = changed_copy(tampered(f"X\t{version}", "X\t9999\n"))
    form = host.read(f"{DATA}/secrets/form")
    host.sh(f"echo something else >{DATA}/secrets/form")
    with pytest.raises(
        HostError, match="Undone: the database and the files are those of before, and every process is"
    ) as error:
        synapse_restore(host, too_new)
    assert "matrix-synapse did not become healthy" in str(error.value)
    assert host.read(f"{DATA}/secrets/form") == "something else\n"
    host.run("tee", f"{DATA}/secrets/form", input=form)
    until(deployed.all_healthy, "every process is healthy")
    assert alice.heard(room)[0] == "not in the backup"
    assert databases(host) == before
    assert phase(host) == ""


def test_a_restore_that_is_killed_in_every_phase_is_put_right_by_the_same_command(deployed, talk):
    host, alice, room = deployed.host, talk["alice"], talk["room"]
    alice.say(room, "not in the backup")
    before = databases(host)
    for phases in (["restoring"], ["restoring", "stopping"], ["restoring", "stopping", "switching"], ["starting"]):
        process = in_background(host, "synapse_backup.restore", talk["backup"])
        with contextlib.ExitStack() as stack:
            for last in phases:
                if last == "switching":
                    # Too quick to be met: it has to wait for a lock.
                    stack.enter_context(held(host, "pg_database"))
                until(lambda last=last: phase(host) == last, f"it is {last}", passing=True)
            host.run("kill", "-KILL", process)
            assert "synapse" in databases(host), "there is one at any time"
        assert host.run("pgrep", "--exact", "pg_restore", check=False).stdout == ""

    elsewhere = f"{COPIES}/elsewhere/{talk['backup'].rpartition('/')[2]}"
    host.sh(f"mkdir -p {elsewhere}")
    with pytest.raises(HostError, match="was cut off while it was starting. First finish it"):
        synapse_restore(host, elsewhere)
    with pytest.raises(
        HostError, match="was cut off while it was starting. To finish it: salt-call synapse_backup.restore"
    ):
        host.salt("synapse_process.start")
    assert "To give it up: salt-call synapse_backup.undo" in deployed.refused()
    done = synapse_restore(host, talk["backup"])
    assert deployed.all_healthy()
    assert alice.heard(room)[0] == "to be kept"
    assert phase(host) == ""
    assert databases(host) == {*before, done["old"]}
    host.salt("synapse_backup.discard_old", done["old"])


def test_a_restore_that_was_killed_can_be_given_up(deployed, talk):
    host, alice, room = deployed.host, talk["alice"], talk["room"]
    alice.say(room, "before it was given up")
    before = databases(host)
    process = in_background(host, "synapse_backup.restore", talk["backup"])
    until(lambda: phase(host) == "starting", "it is starting", passing=True)
    host.run("kill", "-KILL", process)
    with pytest.raises(Refused):
        alice.heard(room)
    assert "every process is healthy" in host.salt("synapse_backup.undo")
    assert deployed.all_healthy()
    assert alice.heard(room)[0] == "before it was given up"
    assert databases(host) == before
    assert deployed.apply(test=True) == {}


def test_a_restore_whose_terminal_goes_goes_back(deployed, talk):
    host, alice, room = deployed.host, talk["alice"], talk["room"]
    alice.say(room, "before the terminal went")
    before = databases(host)
    process = in_background(host, "synapse_backup.restore", talk["backup"])
    for at in ("starting", "undoing"):
        until(lambda at=at: phase(host) == at, f"it is {at}", passing=True)
        host.run("kill", "-HUP", process)
    until(lambda: host.run("kill", "-0", process, check=False).returncode, "it ends")
    said = host.read("/tmp/background.log")
    assert "its terminal was closed" in said
    assert "Undone: the database and the files are those of before, and every process is healthy" in said
    assert deployed.all_healthy()
    assert alice.heard(room)[0] == "before the terminal went"
    assert databases(host) == before
    assert phase(host) == ""


def test_a_session_of_somebody_else_is_ended_only_if_allowed(deployed, talk):
    host, before = deployed.host, databases(deployed.host)
    with session(host, "synapse", "select pg_sleep(600)"):
        with pytest.raises(HostError, match=r"(?s)sessions in the database synapse.*postgres \(held,.*Undone: "):
            synapse_restore(host, talk["backup"])
        assert deployed.all_healthy()
        assert databases(host) == before
        done = synapse_restore(host, talk["backup"], kill=True)
    assert deployed.all_healthy()
    host.salt("synapse_backup.discard_old", done["old"])


def test_a_new_machine_comes_back_from_its_backup(deployed, talk):
    host, alice, room = deployed.host, talk["alice"], talk["room"]
    pillar = deployed.pillar
    # What a restore had put aside is data, too.
    psql(host, 'create database "synapse_before_20261124T220046Z" owner synapse')
    deployed.pillar = {**copy.deepcopy(pillar), "clean": {"remove_data": True}}
    deployed.apply("synapse.clean")
    assert databases(host) == set()
    deployed.pillar = pillar
    host.sh("docker load --quiet --input /srv/images/synapse-*.tar")
    host.run("install", "-D", f"{talk['backup']}/files/data/roster.json", f"{DATA}/roster.json")
    deployed.apply()
    with pytest.raises(Refused):
        alice.heard(room)

    done = synapse_restore(host, talk["backup"])
    deployed.apply()
    assert deployed.apply(test=True) == {}
    assert deployed.all_healthy()
    assert deployed.names() == json.loads(host.read(f"{talk['backup']}/manifest.json"))["processes"]
    assert (
        host.run("cmp", f"{talk['backup']}/files/data/secrets/signing.key", f"{DATA}/secrets/signing.key").stdout == ""
    )
    assert alice.heard(room)[0] == "to be kept"
    alice.sync()
    assert alice.ask("GET", f"/_matrix/client/v1/media/download/{talk['image'].removeprefix('mxc://')}") == b"an image"
    host.salt("synapse_backup.discard_old", done["old"])


@contextlib.contextmanager
def session(host, database, sql):
    """Somebody's session in a database, which runs that."""
    asked = "select 1 from pg_stat_activity where application_name = 'held'"
    host.sh(f"setsid runuser -u postgres -- env PGAPPNAME=held psql -d {database} -c '{sql}' >/dev/null 2>&1 &")
    until(lambda: psql(host, asked), "the session is there")
    try:
        yield
    finally:
        psql(host, asked.replace("1", "pg_terminate_backend(pid)"))


def held(host, table):
    """A session that lets nobody change a table of the server's."""
    return session(host, "postgres", f"begin; lock table {table} in share mode; select pg_sleep(600)")
