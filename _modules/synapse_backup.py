"""
Backups of the homeserver: making them, proving them, and going back to one.

A backup is a directory of root's: the dump of one snapshot of the database (``database/``), the configuration, secrets, signing
key, roster and tokens (``files/``), the media if asked for (``media.tar``), and ``manifest.json``, which tells without the
pillar what it is of and what is in it. It bears its final name only once it was restored into a scratch cluster and found
whole there. All work is done by PostgreSQL's own tools.
"""

import contextlib
import datetime
import hashlib
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time

from salt.exceptions import CommandExecutionError, SaltInvocationError

FORMAT = 1
STAMP = "%Y%m%dT%H%M%SZ"
STAMP_PATTERN = r"\d{8}T\d{6}Z"

HOLDER = "synapse_backup.restore"
RUN_LOCK = "/run/matrix-synapse-backup.lock"

# Of a cluster that is there while a backup is verified.
SCRATCH = "synapse_scratch"
SCRATCH_SOCKETS = "/run/matrix-synapse-scratch"
SCRATCH_OPTIONS = {
    "listen_addresses": "",
    # It is thrown away, so nothing in it has to outlive a crash.
    "fsync": "off",
    "full_page_writes": "off",
    "wal_level": "minimal",
    "max_wal_senders": 0,
    "autovacuum": "off",
    "maintenance_work_mem": "128MB",
}

# A child of such a command ends with the run that started it.
MORTAL = ("setpriv", "--pdeathsig=KILL", "--")

SESSION_NAME = "synapse_backup"
ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "LC_ALL": "C.UTF-8",
    "PGAPPNAME": SESSION_NAME,
    "PGOPTIONS": "-c client_min_messages=error",
}

# The directories of data that get their files back from a backup, and these files' mode. The roster stays: the units on
# the machine bear the names that stand in the one that is there.
RESTORED = {"secrets": 0o640, "appservices": 0o600}

DATABASE = """
select json_build_object(
    'postgres', current_setting('server_version'), 'name', datname, 'size', pg_database_size(db.oid),
    'owner', pg_get_userbyid(datdba), 'encoding', pg_encoding_to_char(encoding), 'collate', datcollate, 'ctype', datctype,
    'schema_version', (select version from schema_version),
    'roles', (select json_agg(rolname order by rolname) from pg_roles where oid = datdba or oid in
        (select refobjid from pg_shdepend where refclassid = 'pg_authid'::regclass and dbid = db.oid)))
from pg_database db where datname = current_database();
"""
# PostgreSQL makes one statement for each table, and psql runs them.
ROWS = r"""
select format('select %L, count(*) from %I.%I', format('%I.%I', nspname, relname), nspname, relname)
from pg_class join pg_namespace on pg_namespace.oid = relnamespace
where relkind = 'r' and nspname <> 'information_schema' and nspname !~ '^pg_' order by relpages desc \gexec
"""
SEQUENCES = """
select coalesce(json_object_agg(format('%I.%I', schemaname, sequencename),
    json_build_object('last', last_value, 'step', increment_by)), '{}')
from pg_sequences;
"""
# Who is left in a database, besides ourselves, once Synapse is stopped.
OTHERS = """
select format('%s (%s, process %s)', usename, coalesce(nullif(application_name, ''), 'a nameless program'), pid)
from pg_stat_activity where datname = :'name' and pid <> pg_backend_pid() and backend_type = 'client backend';
"""


def create(media=None):
    """
    Make a backup while Synapse runs, restore it into a scratch cluster to see that it is whole, and only then give it its
    name. The oldest ones go, if ``synapse:backup:keep`` says how many stay.

    media
        Whether the media are in it. Defaults to ``synapse:backup:media``.

    Returns a dict with ``backup`` (its path), ``size`` (bytes), ``tables``, ``rows``, ``media`` (files, or None), ``seconds``
    and ``removed`` (paths of old ones).

    Raises CommandExecutionError if it can't be made or is not whole; then there is no backup.

    CLI Example:

    .. code-block:: bash

        salt-call synapse_backup.create media=True
    """
    started = time.monotonic()
    settings = _settings()
    media = settings["backup"]["media"] if media is None else media
    if not isinstance(media, bool):
        raise SaltInvocationError(f"media: {media!r} is not true or false")
    with _alone():
        directory = _directory(settings)
        _remove_partial(directory)
        now = _now()
        partial = directory / f".{now:{STAMP}}.partial"
        try:
            partial.mkdir(mode=0o700)
            manifest = _write(partial, now, media, settings)
            verified = _verify(partial, manifest)
            final = directory / f"{now:{STAMP}}"
            partial.rename(final)
            __salt__["synapse_files.sync"](directory)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        removed = _prune(directory, settings["backup"]["keep"])
    return {
        "backup": str(final),
        "size": _size(manifest),
        "tables": verified["tables"],
        "rows": verified["rows"],
        "media": manifest["media"],
        "seconds": round(time.monotonic() - started, 1),
        "removed": removed,
    }


def verify(backup):
    """
    Restore a backup into a scratch cluster, which is gone afterwards, and compare it with its manifest: size and checksum of
    every file, the rows of every table, sequences.

    backup
        Its name in ``synapse:backup:directory``, or its path.

    Returns a dict with ``backup``, ``files``, ``tables``, ``rows`` and ``seconds``.

    Raises CommandExecutionError that names everything that is wrong.

    CLI Example:

    .. code-block:: bash

        salt-call synapse_backup.verify 20261124T220046Z
    """
    started = time.monotonic()
    settings = _settings()
    with _alone():
        path = _path(backup, settings)
        manifest = _manifest(path)
        verified = _verify(path, manifest)
    return {
        "backup": str(path),
        "files": len(manifest["files"]),
        **verified,
        "seconds": round(time.monotonic() - started, 1),
    }


def list_():
    """
    Return the backups in ``synapse:backup:directory``, the oldest first: a list of dicts with ``backup`` (the path), ``made``,
    ``server_name``, ``synapse`` and ``postgres`` (versions), ``media`` (how many files, None without media) and ``size``
    (bytes); or ``backup`` and ``fault``, where its manifest can't be read.

    CLI Example:

    .. code-block:: bash

        salt-call synapse_backup.list
    """
    found = []
    for path in _backups(pathlib.Path(_all_settings()["backup"]["directory"])):
        try:
            manifest = _manifest(path)
        except CommandExecutionError as err:
            found.append({"backup": str(path), "fault": str(err)})
            continue
        shown = {key: manifest[key] for key in ("made", "server_name", "synapse", "media")}
        found.append({"backup": str(path), **shown, "postgres": _major(manifest), "size": _size(manifest)})
    return found


def remove(backup):
    """
    Remove a backup. Return its path.

    backup
        Its name in ``synapse:backup:directory``, or its path.

    CLI Example:

    .. code-block:: bash

        salt-call synapse_backup.remove 20261124T220046Z
    """
    with _alone():
        return _remove(_path(backup, _all_settings()))


def restore(backup, kill=False, grace=None):
    """
    Go back to a backup: database, secrets, signing key, tokens, and media if they are in it.

    The new database is filled and compared with the manifest while Synapse still runs. Then Synapse is proven to be stopped, the
    databases change names in one transaction, the files are put back, and Synapse is started. The database of before stays, under
    another name, and with it a directory of the files that were replaced, until :func:`discard_old`.

    Any failure puts back the database and files of before and starts Synapse. A run that was killed is put right by the same
    command: what had not changed names yet begins anew, what had is brought to its end.

    backup
        Its name in ``synapse:backup:directory``, or its path.

    kill
        Whether what does not end by itself may be killed: see ``synapse_process.stop``.

    grace
        Seconds that processes have to end: see ``synapse_process.stop``.

    Returns a dict with ``backup``, ``old`` (the name of the database of before), ``kept`` (secrets that stay, since the pillar
    gives them), ``processes`` (all healthy), ``seconds`` and ``comment``.

    Raises CommandExecutionError that says what failed and what was undone.

    CLI Example:

    .. code-block:: bash

        salt-call synapse_backup.restore 20261124T220046Z
    """
    started = time.monotonic()
    settings = _settings()
    with _alone():
        path = _path(backup, settings)
        journal = _resumed(path, settings) or _begin(path, settings)
        try:
            if journal["phase"] == "restoring":
                _fill(journal, settings)
                _enter(journal, "stopping", settings)
            _stop(kill, grace, journal, settings)
            _enter(journal, "switching", settings)
            _switch(journal, settings)
            kept = _put_back(journal, settings)
            _enter(journal, "starting", settings)
            names = __salt__["synapse_process.start"](HOLDER, opened=False, force=True)
        except BaseException as err:
            raise CommandExecutionError(f"{str(err) or type(err).__name__}\n{_undone(journal, settings)}") from err
        _finish(settings)
    return {
        "backup": str(path),
        "old": journal["old"],
        "kept": kept,
        "processes": names,
        "seconds": round(time.monotonic() - started, 1),
        "comment": (
            f"The database of before is {journal['old']}, the files of before are in {_aside(journal, settings)}, until"
            f" salt-call synapse_backup.discard_old {journal['old']}. Now run salt-call state.apply synapse"
        ),
    }


def undo():
    """
    Give up a restore that was cut off: the database and the files of before are put back, and Synapse is started if it was
    stopped. Return in words what was done.

    Raises CommandExecutionError if there is none, which is so as well once users are served by the restored database.

    CLI Example:

    .. code-block:: bash

        salt-call synapse_backup.undo
    """
    settings = _settings()
    with _alone():
        journal = _journal(settings)
        if not journal:
            raise CommandExecutionError("There is no restore that was cut off")
        _end_orphans()
        return _undo(journal, settings)


def fault():
    """
    Return a sentence that says which restore is at work or was cut off, and how to put it right; None if there is none.

    CLI Example:

    .. code-block:: bash

        salt-call synapse_backup.fault
    """
    journal = _journal(_all_settings())
    if not journal:
        return None
    if busy():
        return f"The restore of {journal['backup']} is {journal['phase']}, or waits for another run of synapse_backup to end"
    return (
        f"{_cut_off(journal)}. To finish it: salt-call synapse_backup.restore {journal['backup']}."
        " To give it up: salt-call synapse_backup.undo"
    )


def old():
    """
    Return the names of the databases that restores have put aside, the oldest first.

    CLI Example:

    .. code-block:: bash

        salt-call synapse_backup.old
    """
    settings = _settings()
    pattern = f"{re.escape(_stem(settings))}_before_{STAMP_PATTERN}"
    return sorted(name for name in _databases() if re.fullmatch(pattern, name))


def discard_old(name):
    """
    Destroy the database that a restore has put aside, and the files of before beside it. Return the name.

    name
        One of :func:`old`.

    CLI Example:

    .. code-block:: bash

        salt-call synapse_backup.discard_old synapse_before_20261124T220046Z
    """
    settings = _settings()
    with _alone():
        if name not in old():
            raise CommandExecutionError(f"No restore has put {name} aside; there are: {', '.join(old()) or 'none'}")
        journal = _journal(settings)
        if journal and journal["old"] == name:
            raise CommandExecutionError(
                f"{name} is needed to undo a restore that was cut off: see synapse_backup.restore"
            )
        _drop(name)
        shutil.rmtree(f"{settings['directories']['data']}/{name}", ignore_errors=True)
    return name


# Settings, places, exclusion


def _all_settings():
    return __salt__["synapse_pillar.settings"]()


def _settings():
    settings = _all_settings()
    if not settings["postgres"]["managed"]:
        raise CommandExecutionError(
            "synapse:postgres:managed: false: an external database is backed up and restored by whoever runs its server;"
            f" beside it, save {settings['directories']['config']} and {settings['directories']['data']}. Around a restore,"
            " stop and start Synapse by synapse_process.stop and synapse_process.start"
        )
    return settings


@contextlib.contextmanager
def _alone():
    with __salt__["synapse_runs.alone"](RUN_LOCK, "Another backup, verification or restore is running"):
        try:
            yield
        except OSError as err:
            raise CommandExecutionError(f"{type(err).__name__}: {err}") from err


def busy():
    """
    Return whether a backup, a verification or a restore is running.

    CLI Example:

    .. code-block:: bash

        salt-call synapse_backup.busy
    """
    return __salt__["synapse_runs.busy"](RUN_LOCK)


def _directory(settings):
    path = pathlib.Path(settings["backup"]["directory"])
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = path.lstat()
    if not path.is_dir() or path.is_symlink() or status.st_uid != 0 or status.st_mode & 0o022:
        raise CommandExecutionError(f"{path} must be a directory that only root can write to")
    return path


def _backups(directory):
    return sorted(path for path in directory.glob("*T*Z") if re.fullmatch(STAMP_PATTERN, path.name))


def _remove_partial(directory):
    for path in directory.iterdir():
        if re.fullmatch(rf"\.{STAMP_PATTERN}\.partial", path.name):
            shutil.rmtree(path)


def _remove(path):
    # What is being removed is no backup any more, whenever it is cut off.
    doomed = path.with_name(f".{path.name}.partial")
    path.rename(doomed)
    shutil.rmtree(doomed)
    return str(path)


def _prune(directory, keep):
    return [_remove(path) for path in _backups(directory)[:-keep]] if keep else []


def _path(backup, settings):
    path = pathlib.Path(settings["backup"]["directory"], str(backup))
    if not re.fullmatch(STAMP_PATTERN, path.name) or not path.is_dir():
        raise CommandExecutionError(f"{path} is no backup: see synapse_backup.list")
    return path


def _manifest(path):
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        if manifest["format"] == FORMAT:
            return manifest
    except (OSError, ValueError, KeyError, TypeError) as err:
        raise CommandExecutionError(f"{path} is no complete backup: manifest.json: {err}") from err
    raise CommandExecutionError(f"{path} has format {manifest['format']}, and this formula knows {FORMAT}")


def _major(manifest):
    return int(re.match(r"\d+", manifest["database"]["postgres"])[0])


def _size(manifest):
    return sum(file["size"] for file in manifest["files"].values())


def _now():
    return datetime.datetime.now(datetime.UTC)


def _tell(text):
    """To the console of whoever runs it, if that is still there."""
    with contextlib.suppress(OSError):
        print(f"[{_now():%H:%M:%S}] {text}", file=sys.stderr, flush=True)


# Making one


def _write(partial, now, media, settings):
    cluster, name = _cluster(), settings["postgres"]["database"]
    with _session(cluster, name) as ask:
        ask("begin isolation level repeatable read read only;")
        snapshot = ask("select pg_export_snapshot();")
        database = json.loads(ask(DATABASE))
        sequences = json.loads(ask(SEQUENCES))
        media_size = _tree_size(_media(settings)) if media else 0
        faults = _space_faults(
            [
                (partial, database["size"] + media_size, "the backup"),
                (_scratch_data(), database["size"], "the scratch cluster that it is restored into"),
            ]
        )
        if faults:
            raise CommandExecutionError("\n".join(faults))
        rows = ask(ROWS, later=True)
        _watched(
            _postgres(
                cluster,
                "pg_dump",
                f"--dbname={name}",
                f"--snapshot={snapshot}",
                "--format=directory",
                # The time that a higher level takes, on a database that serves users, buys a tenth of the size.
                "--compress=1",
                f"--jobs={_jobs()}",
                "--no-sync",
                f"--file={partial / 'database'}",
            ),
            "dumping the database",
            lambda: _tree_size(partial / "database"),
            database["size"],
        )
        tables = _counted(rows())
    _copy_files(partial / "files", settings)
    # After the snapshot: what it knows of is there already.
    archived = _archive(partial / "media.tar", settings) if media else None
    manifest = {
        "format": FORMAT,
        "server_name": settings["server_name"],
        "made": now.isoformat(timespec="seconds"),
        **_synapse(settings),
        "processes": __salt__["synapse_workers.names"](),
        "database": {**database, "sequences": sequences, "tables": tables},
        "media": archived,
        "files": _seal(partial),
    }
    text = json.dumps(manifest, indent=1) + "\n"
    __salt__["synapse_files.write"](partial / "manifest.json", text)
    return manifest


def _synapse(settings):
    image = __salt__["synapse_image.wanted"](settings["image"])
    version = None
    if image["id"]:
        command = ["docker", "run", "--rm", "--pull=never", "--network=none", "--read-only", "--user=65534:65534"]
        code = "import synapse; print(synapse.__version__)"
        version = _run([*command, "--entrypoint=python3", image["id"], "-c", code]).strip()
    return {"synapse": version, "image": {"reference": image["reference"], "id": image["id"]}}


def _copy_files(into, settings):
    config, data = (pathlib.Path(settings["directories"][name]) for name in ("config", "data"))
    _copy_tree(config, into / "config")
    for name in RESTORED:
        _copy_tree(data / name, into / "data" / name)
    shutil.copyfile(data / "roster.json", into / "data" / "roster.json")


def _copy_tree(tree, into):
    for path in _files_below(tree):
        target = into / path.relative_to(tree)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)


def _files_below(tree):
    return sorted(path for path in tree.rglob("*") if path.is_file() and not path.is_symlink())


def _tree_size(tree):
    total = 0
    for directory, _, names in os.walk(tree):
        for name in names:
            # One that goes meanwhile is no matter.
            with contextlib.suppress(FileNotFoundError):
                total += os.lstat(os.path.join(directory, name)).st_size
    return total


def _media(settings):
    return pathlib.Path(settings["directories"]["data"], "media")


def _archive(archive, settings):
    """Put the media into an archive; return how many files are in it."""
    media = _media(settings)
    # Exit status 1: a file went, or grew, meanwhile. Synapse writes each once, before the database tells of it.
    command = [*MORTAL, "tar", "--create", f"--file={archive}", f"--directory={media}", "--exclude=./.restore-*", "."]
    _watched(command, "copying the media", lambda: archive.stat().st_size, _tree_size(media), allowed=(0, 1))
    return _archived(archive)


def _archived(archive):
    """How many files are in an archive."""
    return sum(not line.endswith("/") for line in _run([*MORTAL, "tar", "--list", f"--file={archive}"]).splitlines())


def _seal(partial):
    """Make all of it root's alone and lasting; return size and checksum of every file, by path."""
    files = {}
    for directory, _, names in os.walk(partial, topdown=False):
        for name in sorted(names):
            path = pathlib.Path(directory, name)
            os.chown(path, 0, 0)
            path.chmod(0o600)
            __salt__["synapse_files.sync"](path)
            files[str(path.relative_to(partial))] = {"size": path.stat().st_size, "sha256": _checksum(path)}
        os.chown(directory, 0, 0)
        os.chmod(directory, 0o700)
        __salt__["synapse_files.sync"](directory)
    return files


def _checksum(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# Proving one


def _verify(path, manifest):
    faults = _file_faults(path, manifest)
    if faults:
        raise CommandExecutionError(f"{path} is damaged:\n" + "\n".join(faults))
    faults = _space_faults([(_scratch_data(), manifest["database"]["size"], "the scratch cluster")])
    if faults:
        raise CommandExecutionError("\n".join(faults))
    with _scratch() as cluster:
        roles = [role for role in manifest["database"]["roles"] if role not in _roles(cluster)]
        for role in roles:
            _sql('create role :"role";', cluster, role=role)
        _load(path, manifest, cluster, "synapse")
        faults = _database_faults(manifest, cluster, "synapse")
    if faults:
        raise CommandExecutionError(f"{path} does not restore to what was dumped:\n" + "\n".join(faults))
    tables = manifest["database"]["tables"]
    return {"tables": len(tables), "rows": sum(tables.values())}


def _file_faults(path, manifest):
    """What differs between a backup's files and its manifest, a sentence each."""
    there = {str(file.relative_to(path)): file for file in _files_below(path)}
    there.pop("manifest.json", None)
    known = manifest["files"]
    _tell("reading every file of the backup")
    faults = [f"{name} is missing" for name in known if name not in there]
    faults += [f"{name} is not in the manifest" for name in there if name not in known]
    for name, file in there.items():
        if name not in known:
            continue
        size = file.stat().st_size
        if size != known[name]["size"]:
            faults.append(f"{name} has {size} bytes, and should have {known[name]['size']}")
        elif _checksum(file) != known[name]["sha256"]:
            faults.append(f"{name} has another checksum")
    if not faults and manifest["media"] is not None:
        count = _archived(path / "media.tar")
        if count != manifest["media"]:
            faults.append(f"media.tar has {count} files, and should have {manifest['media']}")
    return faults


def _load(path, manifest, cluster, database):
    """Make a database and restore the dump into it."""
    wanted = manifest["database"]
    _run(
        _postgres(
            cluster,
            "createdb",
            "--template=template0",
            f"--owner={wanted['owner']}",
            f"--encoding={wanted['encoding']}",
            f"--lc-collate={wanted['collate']}",
            f"--lc-ctype={wanted['ctype']}",
            database,
        )
    )
    _watched(
        _postgres(
            cluster,
            "pg_restore",
            f"--dbname={database}",
            f"--jobs={_jobs()}",
            "--exit-on-error",
            str(path / "database"),
        ),
        "restoring the dump",
        lambda: int(_sql("select pg_database_size(:'name');", cluster, name=database)),
        wanted["size"],
    )


def _database_faults(manifest, cluster, database):
    """What differs between a restored database and the manifest, a sentence each."""
    wanted = manifest["database"]
    _tell("counting the rows of every table")
    rows = _counted(_sql(ROWS, cluster, database))
    faults = [
        f"the table {table} has {_number(rows.get(table))}, and should have {_number(wanted['tables'].get(table))}"
        for table in sorted({*rows, *wanted["tables"]})
        if rows.get(table) != wanted["tables"].get(table)
    ]
    sequences = json.loads(_sql(SEQUENCES, cluster, database))
    return faults + _sequence_faults(sequences, wanted["sequences"])


def _number(rows):
    return "no place" if rows is None else f"{rows} rows"


def _sequence_faults(sequences, wanted):
    """A sequence is read when its turn comes, not in the snapshot: it may be ahead of the manifest, and never behind."""
    faults = []
    for name, known in wanted.items():
        there = sequences.get(name)
        if there is None:
            faults.append(f"the sequence {name} is missing")
        elif known["last"] is not None and (
            there["last"] is None or (there["last"] - known["last"]) * known["step"] < 0
        ):
            faults.append(f"the sequence {name} is at {there['last']}, and was at {known['last']} already")
    return faults


def _counted(text):
    return {table: int(rows) for table, rows in (line.split("\t") for line in text.splitlines())}


@contextlib.contextmanager
def _scratch():
    """A cluster that nobody else can enter; it goes, whatever happens."""
    version = __salt__["synapse_postgres.version"]()
    _drop_scratch()
    try:
        os.mkdir(SCRATCH_SOCKETS, 0o700)
        shutil.chown(SCRATCH_SOCKETS, "postgres", "postgres")
        options = [word for name, value in SCRATCH_OPTIONS.items() for word in ("--pgoption", f"{name}={value}")]
        _run(
            ["pg_createcluster", str(version), SCRATCH, f"--datadir={_scratch_data()}", "--start-conf=manual"]
            + [f"--socketdir={SCRATCH_SOCKETS}", "--locale=C", "--encoding=UTF8", *options, "--", "--no-sync"]
        )
        _run(["pg_ctlcluster", str(version), SCRATCH, "start"])
        yield f"{version}/{SCRATCH}"
    finally:
        _drop_scratch()


def _scratch_data():
    return f"/var/lib/postgresql/{__salt__['synapse_postgres.version']()}/{SCRATCH}"


def _drop_scratch():
    """Also what a run that was killed has left of it."""
    for path in pathlib.Path("/etc/postgresql").glob(f"*/{SCRATCH}"):
        version = path.parent.name
        subprocess.run(
            ["pg_dropcluster", "--stop", version, SCRATCH], env=ENVIRONMENT, capture_output=True, check=False
        )
        for left in (path, pathlib.Path("/var/lib/postgresql", version, SCRATCH)):
            shutil.rmtree(left, ignore_errors=True)
        subprocess.run(
            ["systemctl", "reset-failed", f"postgresql@{version}-{SCRATCH}.service"], capture_output=True, check=False
        )
    shutil.rmtree(SCRATCH_SOCKETS, ignore_errors=True)


def _space_faults(needs):
    """
    A sentence for each file system that has too little free space.

    needs
        A list of ``(path, bytes, what for)``. Two on one file system have to fit together.
    """
    systems = {}
    for path, needed, purpose in needs:
        there = pathlib.Path(path)
        while not there.exists():
            there = there.parent
        systems.setdefault(there.stat().st_dev, []).append((there, needed, purpose))
    faults = []
    for users in systems.values():
        # A tenth for what grows meanwhile, and what an empty cluster takes.
        needed = int(sum(size for _, size, _ in users) * 1.1) + (100 << 20)
        status = os.statvfs(users[0][0])
        free = status.f_bavail * status.f_frsize
        if free < needed:
            purposes = " and ".join(purpose for _, _, purpose in users)
            faults.append(f"{users[0][0]} has {_mebibytes(free)} free, and {purposes} may need {_mebibytes(needed)}")
    return faults


def _mebibytes(size):
    return f"{size / (1 << 20):.0f} MiB"


# Going back to one


def _restore_faults(path, manifest, settings):
    """What speaks against a restore, a sentence each. Nothing has changed yet."""
    database, faults = manifest["database"], []
    held = __salt__["synapse_maintenance.holder"]()
    if held and held["holder"] != HOLDER:
        faults.append(__salt__["synapse_maintenance.fault"]())
    if manifest["server_name"] != settings["server_name"]:
        faults.append(f"{path} is a backup of {manifest['server_name']}, and this is {settings['server_name']}")
    version = __salt__["synapse_postgres.version"]()
    if version < _major(manifest):
        faults.append(f"{path} was made by PostgreSQL {_major(manifest)}, and {version} can't read that")
    if database["owner"] != settings["user"]["name"]:
        right = f"the backup's database belongs to {database['owner']}: give synapse:user:name that name"
        faults.append(__salt__["synapse_pillar.fault"]("synapse:user:name", settings["user"]["name"], right))
    faults += [
        f"The backup's database grants rights to the role {role}, which is missing: runuser -u postgres -- createuser {role}"
        for role in database["roles"]
        if role != database["owner"] and role not in _roles(_cluster())
    ]
    if settings["postgres"]["database"] not in _databases():
        faults.append("Synapse's database is missing: run salt-call state.apply synapse first")
    media = path / "media.tar"
    needs = [(_cluster_data(), database["size"], "the restored database")]
    if manifest["media"] is not None and media.exists():
        needs.append((_media(settings), media.stat().st_size, "the restored media"))
    return faults + _space_faults(needs) + _file_faults(path, manifest)


def _journal_file(settings):
    return pathlib.Path(settings["directories"]["data"], "restore.json")


def _journal(settings):
    """The journal of a run that is at work or was cut off."""
    try:
        journal = json.loads(_journal_file(settings).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    if journal["phase"] == "starting" and _taken_over():
        # Users may have written since: nothing may undo it any more.
        _journal_file(settings).unlink(missing_ok=True)
        return None
    return journal


def _taken_over():
    """Whether somebody else let users in, or stopped Synapse. A restore keeps nginx closed as long as it has a journal."""
    held = __salt__["synapse_maintenance.holder"]()
    return held["holder"] != HOLDER if held else not __salt__["synapse_maintenance.closed"]()


def _resumed(path, settings):
    """The journal of a run that was cut off, if it is to be brought to its end; what is not is undone."""
    journal = _journal(settings)
    if not journal:
        return None
    _end_orphans()
    if journal["phase"] not in ("switching", "starting"):
        _tell(f"{_cut_off(journal)}, and is undone")
        _undo(journal, settings)
        return None
    if journal["backup"] != str(path):
        raise CommandExecutionError(
            f"{_cut_off(journal)}. First finish it: salt-call synapse_backup.restore {journal['backup']};"
            " or give it up: salt-call synapse_backup.undo"
        )
    _tell(f"{_cut_off(journal)}, and is finished now")
    return journal


def _cut_off(journal):
    return f"The restore of {journal['backup']} was cut off while it was {journal['phase']}"


def _finish(settings):
    """The end of a run. Without a journal nothing undoes it any more: only then users are let in."""
    _journal_file(settings).unlink(missing_ok=True)
    __salt__["synapse_maintenance.open"]()


def _begin(path, settings):
    faults = _restore_faults(path, _manifest(path), settings)
    if faults:
        raise CommandExecutionError("Nothing was changed:\n" + "\n".join(faults))
    stamp, name = _now().strftime(STAMP), _stem(settings)
    for left in pathlib.Path(settings["directories"]["data"]).glob(f"{name}_before_*.*"):
        shutil.rmtree(left)
    journal = {"backup": str(path), "new": f"{name}_new_{stamp}", "old": f"{name}_before_{stamp}"}
    _enter(journal, "restoring", settings)
    return journal


def _stem(settings):
    # A database's name may have 63 bytes.
    return settings["postgres"]["database"][:39]


def _enter(journal, phase, settings):
    """Note what is done from here on, before it is done."""
    journal["phase"] = phase
    __salt__["synapse_files.write"](_journal_file(settings), json.dumps(journal, indent=1) + "\n")
    _tell(f"restore: {phase}")


def _fill(journal, settings):
    """The new database, complete, beside the one that still serves."""
    cluster, path = _cluster(), pathlib.Path(journal["backup"])
    manifest = _manifest(path)
    _load(path, manifest, cluster, journal["new"])
    faults = _database_faults(manifest, cluster, journal["new"])
    if faults:
        raise CommandExecutionError(f"{path} does not restore to what was dumped:\n" + "\n".join(faults))
    _run(_postgres(cluster, "vacuumdb", "--analyze-only", f"--jobs={_jobs()}", "--quiet", journal["new"]))
    if manifest["media"] is not None:
        _unpack_media(path / "media.tar", settings)


def _unpack_media(archive, settings):
    """Bring back the media that are missing. None ever changes, so those that are there stay, and this needs no undo."""
    media = _media(settings)
    for left in media.glob(".restore-*"):
        shutil.rmtree(left)
    with tempfile.TemporaryDirectory(prefix=".restore-", dir=media) as draft:
        _run([*MORTAL, "tar", "--extract", f"--file={archive}", f"--directory={draft}"])
        for directory, names, files in os.walk(draft):
            there = media / pathlib.Path(directory).relative_to(draft)
            missing = [name for name in [*names, *files] if not (there / name).exists()]
            for name in missing:
                os.rename(pathlib.Path(directory, name), there / name)
            names[:] = [name for name in names if name not in missing]


def _stop(kill, grace, journal, settings):
    reason = f"restore of {journal['backup']}"
    __salt__["synapse_process.stop"](HOLDER, reason, kill=kill, grace=grace, force=True)
    database, cluster = settings["postgres"]["database"], _cluster()
    others = _sql(OTHERS, cluster, name=database).splitlines()
    if others and not kill:
        raise CommandExecutionError(
            f"There are sessions in the database {database}, which can't change its name under them: {', '.join(others)}."
            " With kill=True they are ended"
        )
    if others:
        _sql(
            "select pg_terminate_backend(pid) from pg_stat_activity"
            " where datname = :'name' and pid <> pg_backend_pid() and backend_type = 'client backend';",
            cluster,
            name=database,
        )


def _switch(journal, settings):
    """The new database takes the place of the old, in one transaction: there is one at any time."""
    if journal["new"] in _databases():
        _rename(settings["postgres"]["database"], journal["old"], journal["new"])


def _switch_back(journal, settings):
    if journal["old"] in _databases():
        _rename(settings["postgres"]["database"], journal["new"], journal["old"])


def _rename(live, aside, instead):
    script = 'begin; alter database :"live" rename to :"aside"; alter database :"instead" rename to :"live"; commit;'
    _sql(script, _cluster(), live=live, aside=aside, instead=instead)


def _aside(journal, settings):
    return pathlib.Path(settings["directories"]["data"], journal["old"])


def _put_back(journal, settings):
    """Put the backup's files in place, after those of before were put aside; return the names of those that stay."""
    _put_aside(journal, settings)
    data, source = pathlib.Path(settings["directories"]["data"]), pathlib.Path(journal["backup"], "files", "data")
    given = [name for name, value in settings["secrets"].items() if value]
    # The name of its file, as of the others.
    given += ["signing.key"] if settings["signing_key"]["current"] else []
    kept = []
    for name in RESTORED:
        for file in _files_below(source / name):
            if name == "secrets" and file.name in given:
                kept.append(file.name)
            else:
                (data / name).mkdir(mode=0o700, exist_ok=True)
                _place(file, data / name, settings)
    return kept


def _place(file, directory, settings):
    mode = RESTORED[directory.name]
    # What is not root's alone, Synapse reads.
    gid = __salt__["file.group_to_gid"](settings["user"]["group"]) if mode & 0o040 else 0
    __salt__["synapse_files.write"](directory / file.name, file.read_bytes(), gid, mode)


def _put_aside(journal, settings):
    data, aside = pathlib.Path(settings["directories"]["data"]), _aside(journal, settings)
    if aside.exists():
        return
    draft = aside.with_suffix(".new")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(mode=0o700)
    for name in RESTORED:
        _copy_tree(data / name, draft / name)
    _seal(draft)
    draft.rename(aside)
    __salt__["synapse_files.sync"](data)


def _take_back(journal, settings):
    data, aside = pathlib.Path(settings["directories"]["data"]), _aside(journal, settings)
    if not aside.exists():
        return
    for name in RESTORED:
        for file in _files_below(data / name):
            if not (aside / name / file.name).exists():
                file.unlink()
        for file in _files_below(aside / name):
            _place(file, data / name, settings)
    # One that is half removed must not be taken for what there was.
    shutil.rmtree(aside.rename(aside.with_suffix(".done")))


def _undone(journal, settings):
    try:
        return _undo(journal, settings)
    except (CommandExecutionError, OSError) as err:
        return f"Nothing is lost, but it could not be undone yet: {err}\nThe same command, once this is mended, begins with that"


def _undo(journal, settings):
    """Put back the database and files of before, start Synapse if it was stopped; return in words what was done."""
    with __salt__["synapse_runs.undisturbed"]():
        return _put_all_back(journal, settings)


def _put_all_back(journal, settings):
    touched = journal.setdefault("undo_from", journal["phase"])
    _enter(journal, "undoing", settings)
    if touched in ("switching", "starting"):
        __salt__["synapse_process.stop"](HOLDER, "a restore is undone", kill=True, force=True)
        _switch_back(journal, settings)
        _take_back(journal, settings)
    said = "Undone: the database and the files are those of before"
    held, healthy = __salt__["synapse_maintenance.holder"](), False
    if (held and held["holder"] == HOLDER) or (not held and touched != "restoring"):
        try:
            __salt__["synapse_process.start"](HOLDER, opened=False, force=True)
            said, healthy = f"{said}, and every process is healthy", True
        except CommandExecutionError as err:
            # As it may have been before; only an operator can tell.
            said += f", but Synapse does not start with them: {err}"
    _drop(journal["new"])
    if healthy:
        _finish(settings)
    else:
        _journal_file(settings).unlink(missing_ok=True)
    return said


# PostgreSQL's tools


def _cluster():
    return f"{__salt__['synapse_postgres.version']()}/main"


def _cluster_data():
    return _sql("show data_directory;", _cluster())


def _jobs():
    # Half of the processors stay with those who are served meanwhile.
    return max(1, (os.cpu_count() or 1) // 2)


def _databases():
    return _sql("select datname from pg_database;", _cluster()).splitlines()


def _roles(cluster):
    return _sql("select rolname from pg_roles;", cluster).splitlines()


def _end_orphans():
    """What a run that was killed may have left at work in the server."""
    _sql(
        "select pg_terminate_backend(pid) from pg_stat_activity where application_name = :'name' and pid <> pg_backend_pid();",
        _cluster(),
        name=SESSION_NAME,
    )


def _drop(database):
    _sql('drop database if exists :"name" with (force);', _cluster(), name=database)


def _postgres(cluster, program, *arguments):
    """
    The command that runs one of PostgreSQL's programs as PostgreSQL's account.

    The capability lets it write and read a backup in root's directory. It ends with the run that started it.
    """
    identity = ("--reuid=postgres", "--regid=postgres", "--init-groups", "--pdeathsig=KILL")
    capability = ("--inh-caps=+dac_override", "--ambient-caps=+dac_override")
    return ["setpriv", *identity, *capability, "--", program, f"--cluster={cluster}", *arguments]


def _psql(cluster, database, **variables):
    return _postgres(
        cluster,
        "psql",
        *("--no-psqlrc", "--quiet", "--tuples-only", "--no-align", "--field-separator=\t"),
        "--set=ON_ERROR_STOP=1",
        f"--dbname={database}",
        *(f"--set={name}={value}" for name, value in variables.items()),
    )


def _sql(script, cluster, database="postgres", **variables):
    """Run a script, in which ``:'name'`` and ``:"name"`` stand for variables; return what it prints."""
    return _run(_psql(cluster, database, **variables), script).strip("\n")


def _run(command, text=None):
    stdin = {"input": text} if text is not None else {"stdin": subprocess.DEVNULL}
    try:
        done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False, **stdin)
    except FileNotFoundError as err:
        raise CommandExecutionError(f"{command[0]} is not installed") from err
    if done.returncode != 0:
        raise CommandExecutionError(f"{_program(command)}: {(done.stderr or done.stdout).strip()}")
    return done.stdout


def _program(command):
    return command[command.index("--") + 1] if command[0] == "setpriv" else command[0]


def _watched(command, what, done, total, allowed=(0,)):
    """Run a command that takes its time, and tell how far it is."""
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as said:
        process = subprocess.Popen(command, env=ENVIRONMENT, stdin=subprocess.DEVNULL, stdout=said, stderr=said)
        try:
            _tell(what)
            while process.poll() is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=5)
                    break
                with contextlib.suppress(CommandExecutionError, OSError):
                    _tell(f"{what}: {_mebibytes(done())} of about {_mebibytes(total)}")
        except BaseException:
            process.kill()
            process.wait()
            raise
        if process.returncode not in allowed:
            said.seek(0)
            raise CommandExecutionError(f"{_program(command)}: {said.read().strip()[-4000:]}")


@contextlib.contextmanager
def _session(cluster, database):
    """
    A session of psql's that stays open: yields a function that runs a script in it and returns what it prints; or, with
    ``later``, a function that waits for that.
    """
    end = "end of the answer"
    session = subprocess.Popen(
        _psql(cluster, database),
        env=ENVIRONMENT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )

    def answer():
        lines = []
        for line in session.stdout:
            if line.rstrip("\n") == end:
                return "".join(lines).strip("\n")
            lines.append(line)
        raise CommandExecutionError(f"psql: {''.join(lines).strip()}")

    def ask(script, later=False):
        with contextlib.suppress(BrokenPipeError):
            session.stdin.write(f"{script}\n\\echo {end}\n")
            session.stdin.flush()
        return answer if later else answer()

    try:
        yield ask
    finally:
        session.kill()
        session.communicate()


__func_alias__ = {"list_": "list"}
