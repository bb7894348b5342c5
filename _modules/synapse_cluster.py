"""
Clusters of PostgreSQL, as Debian's postgresql-common keeps them: what one is like and what is in it, how another is made
after it, and how data get from one major version into the next. What they are for, this module does not know.

A cluster is called as Debian calls it: ``15/main``.
"""

import contextlib
import csv
import fcntl
import functools
import io
import json
import os
import pathlib
import re
import shutil
import subprocess
import tempfile
import time

from salt.exceptions import CommandExecutionError

CONFIG = pathlib.Path("/etc/postgresql")
PROGRAMS = "/usr/lib/postgresql/{}/bin"
EXTENSIONS = "/usr/share/postgresql/{}/extension"
# What PostgreSQL's packages ask before they make a cluster.
NO_NEW_CLUSTER = pathlib.Path("/etc/postgresql-common/createcluster.d/matrix-synapse.conf")

# Tools run in units of systemd's, so that they end with all their children also when whoever started them was killed.
TOOL = "matrix-synapse-postgres-"
# FICLONE of ioctl_ficlone(2).
CLONE = 0x40049409

# How much free space a method needs on the file system of the new cluster, as a share of the old one's data, and the
# option of pg_upgrade(1). A dump is loaded with all its WAL.
METHODS = {
    "clone": {"space": 0.05, "option": "--clone"},
    "link": {"space": 0.05, "option": "--link"},
    # The default of pg_upgrade, whose name only newer ones know.
    "copy": {"space": 1.05, "option": None},
    "dump": {"space": 1.5, "option": None},
}
# What a new cluster has of its own, and writes at the start.
SPACE = 256 << 20

# Settings that say where a cluster is, and so do not follow.
PLACES = {"data_directory", "port"}

ABOUT = """
select pg_encoding_to_char(encoding) as encoding, datcollate as collate, datctype as ctype,
  to_jsonb(d) ->> 'datlocprovider' as provider,
  coalesce(to_jsonb(d) ->> 'datlocale', to_jsonb(d) ->> 'daticulocale') as locale,
  current_setting('data_checksums') as checksums, current_setting('data_directory_mode') as mode,
  (select setting::bigint / 1048576 from pg_settings where name = 'wal_segment_size') as wal_segment
from pg_database d where datname = 'template0'
"""
DATABASES = "select datname from pg_database where datallowconn order by datname"
SLOTS = "select slot_name, slot_type from pg_replication_slots"
FILE_SETTINGS = "select name, setting from pg_file_settings where sourcefile = '{}' and applied order by seqno"
# Minor releases of 2026 keep more with columns than the options of ALTER TABLE, and the clients of older ones stumble on it.
COLUMN_OPTIONS = """
select distinct split_part(option, '=', 1) as option from pg_attribute, unnest(attoptions) as option
where split_part(option, '=', 1) not in ('n_distinct', 'n_distinct_inherited')
"""
EXTENSIONS_USED = "select extname from pg_extension"
QUIET = "select pg_terminate_backend(pid) from pg_stat_activity where backend_type = 'autovacuum worker'"

# What is in a database, in rows of kind, name and value. Definitions are compared by their features: majors print the same
# definition differently.
CONTENTS = """
with own as (select oid, nspname from pg_namespace where nspname !~ '^pg_' and nspname <> 'information_schema'),
rel as (select c.*, quote_ident(nspname) || '.' || quote_ident(relname) as full_name
  from pg_class c join own on own.oid = relnamespace)
select 'table' as kind, full_name as name, relkind::text as value from rel where relkind in ('r', 'p', 'm', 'v', 'f')
union all
select 'column', full_name || '.' || attname, format_type(atttypid, atttypmod) || ' ' || attnotnull
  from rel join pg_attribute on attrelid = rel.oid and attnum > 0 and not attisdropped where relkind in ('r', 'p')
union all
select 'index', full_name, concat_ws(' ', indisvalid, indisready, indisunique, indisprimary, indnatts)
  from rel join pg_index on indexrelid = rel.oid
union all
select 'constraint', full_name || ' ' || conname, contype::text || ' ' || convalidated
  from rel join pg_constraint on conrelid = rel.oid where contype <> 'n'
union all
select 'trigger', full_name || ' ' || tgname, tgenabled::text
  from rel join pg_trigger on tgrelid = rel.oid where not tgisinternal
union all
select 'function', quote_ident(nspname) || '.' || proname, count(*)::text
  from pg_proc join own on own.oid = pronamespace group by 2
union all
select 'extension', extname, '' from pg_extension
union all
select 'sequence', quote_ident(schemaname) || '.' || quote_ident(sequencename), coalesce(last_value::text, 'unused')
  from pg_sequences
"""
# The main forks alone: the others are made again.
SIZES = """
union all
select 'size', full_name, (pg_relation_size(rel.oid) + case when reltoastrelid = 0 then 0 else pg_relation_size(reltoastrelid)
  end)::text from rel where relkind in ('r', 'm', 'i', 'S')
"""
TABLES = """
select quote_ident(schemaname) || '.' || quote_ident(tablename) as name from pg_tables
where schemaname not in ('pg_catalog', 'information_schema')
"""
OUTDATED_EXTENSIONS = """
select quote_ident(name) as name, default_version as version from pg_available_extensions
where installed_version <> default_version
"""
# pg_collation_actual_version(oid) tells of collations, pg_database_collation_actual_version(oid) of the database's own.
OUTDATED_COLLATIONS = """
select 'database' as kind, quote_ident(datname) as name from pg_database
  where datname = current_database() and datcollversion <> pg_database_collation_actual_version(oid)
union all
select 'collation', collnamespace::regnamespace || '.' || quote_ident(collname) from pg_collation
  where collversion <> pg_collation_actual_version(oid)
"""


def methods():
    """
    Return the methods by which data get into another major version: a dict of dicts with ``space``, how much of the data's
    size they need again.

    CLI Example:

    .. code-block:: bash

        salt-call synapse_cluster.methods
    """
    return METHODS


def margin():
    """
    Return how many bytes a new cluster needs beside the data.

    CLI Example:

    .. code-block:: bash

        salt-call synapse_cluster.margin
    """
    return SPACE


def clusters():
    """
    Return the clusters of this machine by name, each a dict with ``version``, ``port``, ``running``, ``start`` (auto,
    manual or disabled), ``data``, ``config``, ``sockets`` and ``log``.

    Source: pg_lsclusters(1)

    CLI Example:

    .. code-block:: bash

        salt-call synapse_cluster.clusters
    """
    if not CONFIG.is_dir():
        return {}
    return {
        f"{found['version']}/{found['cluster']}": {
            "version": int(found["version"]),
            "port": int(found["port"]),
            "running": bool(found["running"]),
            "start": found["start"],
            "data": found["pgdata"],
            "config": found["configdir"],
            "sockets": found["socketdir"],
            "log": found["logfile"],
        }
        for found in json.loads(_run("pg_lsclusters", "--json") or "[]")
    }


def _cluster(name):
    try:
        return clusters()[name]
    except KeyError as err:
        raise CommandExecutionError(f"There is no cluster {name} of PostgreSQL here") from err


def query(name, sql, database="postgres"):
    """
    Return the rows of a query, a dict for each, whose values are strings.

    name
        The cluster, which must run.

    sql
        One statement.

    database
        The database's name.

    CLI Example:

    .. code-block:: bash

        salt-call synapse_cluster.query 15/main "select version()"
    """
    return _query(_cluster(name), sql, database)


def _query(cluster, sql, database="postgres"):
    printed = _run(*_client(cluster, "psql"), "--csv", f"--dbname={database}", stdin=sql)
    return list(csv.DictReader(io.StringIO(printed)))


def _client(cluster, program):
    """A client of the cluster's own version, as its superuser."""
    # By these paths, not by Debian's wrapper: that takes as long as the query.
    words = [f"{PROGRAMS.format(cluster['version'])}/{program}", f"--host={cluster['sockets']}"]
    words += [f"--port={cluster['port']}", "--no-password"]
    if program == "psql":
        words += ["--no-psqlrc", "--quiet", "--set=ON_ERROR_STOP=1"]
    return ["runuser", "--user=postgres", "--", *words]


def about(name):
    """
    Return what a cluster is like that runs: what :func:`clusters` tells, and ``encoding``, ``collate``, ``ctype``,
    ``provider``, ``locale``, ``checksums``, ``mode``, ``wal_segment`` (megabytes), ``databases``, ``extensions``,
    ``column_options`` (of its own making), ``slots`` (of replication), ``size`` (bytes) and ``tablespaces`` (their bytes by directory).

    name
        The cluster.

    CLI Example:

    .. code-block:: bash

        salt-call synapse_cluster.about 15/main
    """
    cluster = _cluster(name)
    (found,) = _query(cluster, ABOUT)
    databases = [row["datname"] for row in _query(cluster, DATABASES)]
    extensions = {row["extname"] for database in databases for row in _query(cluster, EXTENSIONS_USED, database)}
    options = {row["option"] for database in databases for row in _query(cluster, COLUMN_OPTIONS, database)}
    links = pathlib.Path(cluster["data"], "pg_tblspc").iterdir()
    tablespaces = {path: size(path) for path in map(os.path.realpath, links)}
    return {
        **cluster,
        **found,
        "databases": databases,
        "extensions": sorted(extensions),
        "column_options": sorted(options),
        "slots": [f"{row['slot_name']} ({row['slot_type']})" for row in _query(cluster, SLOTS)],
        "size": size(cluster["data"]) + sum(tablespaces.values()),
        "tablespaces": tablespaces,
    }


def size(directory):
    """
    Return how many bytes a directory takes on disk, with all below it; 0 if it is not there.

    directory
        Its path.

    CLI Example:

    .. code-block:: bash

        salt-call synapse_cluster.size /var/lib/postgresql/15/main
    """
    total = 0
    for parent, _, files in os.walk(directory):
        for file in files:
            # A server that runs removes files all the time.
            with contextlib.suppress(OSError):
                total += os.lstat(f"{parent}/{file}").st_blocks * 512
    return total


def place(old, version):
    """
    Return where the data of a cluster's successor go: beside its own, where its path names the version.

    old
        What :func:`about` returned.

    version
        The new major version.

    CLI Example:

    .. code-block:: bash

        salt-call synapse_cluster.place '{"data": "/srv/15/main", "version": 15}' 18
    """
    parts = [str(version) if part == str(old["version"]) else part for part in pathlib.Path(old["data"]).parts]
    data = str(pathlib.Path(*parts))
    return data if data != old["data"] else f"/var/lib/postgresql/{version}/main"


def can_clone(source, target):
    """
    Return whether files of one directory can be cloned into another, sharing their blocks (reflinks).

    source
        A directory.

    target
        Another, which need not be there yet.

    Source: ioctl_ficlone(2)

    CLI Example:

    .. code-block:: bash

        salt-call synapse_cluster.can_clone /var/lib/postgresql/15 /var/lib/postgresql/18
    """
    with tempfile.TemporaryFile(dir=source) as one, tempfile.TemporaryFile(dir=existing(target)) as other:
        one.write(b"\0" * 4096)
        one.flush()
        try:
            fcntl.ioctl(other.fileno(), CLONE, one.fileno())
        except OSError:
            return False
    return True


def existing(path):
    """
    Return the deepest directory of a path that is there.

    path
        The path.

    CLI Example:

    .. code-block:: bash

        salt-call synapse_cluster.existing /var/lib/postgresql/18/main
    """
    return next(str(parent) for parent in [pathlib.Path(path), *pathlib.Path(path).parents] if parent.is_dir())


def install(version):
    """
    Install the packages of a major version, which make no cluster of their own. Return what Salt says was installed.

    version
        The major version.

    Raises CommandExecutionError if the packages are not to be had.

    CLI Example:

    .. code-block:: bash

        salt-call synapse_cluster.install 18
    """
    if os.access(f"{PROGRAMS.format(version)}/pg_upgrade", os.X_OK):
        return {}
    NO_NEW_CLUSTER.parent.mkdir(exist_ok=True)
    NO_NEW_CLUSTER.write_text("create_main_cluster = off\n", encoding="utf-8")
    try:
        done = __salt__["pkg.install"](f"postgresql-{version}", refresh=True)
    except CommandExecutionError as err:
        raise CommandExecutionError(f"The package postgresql-{version} can't be installed: {err}") from err
    finally:
        NO_NEW_CLUSTER.unlink()
    if not os.access(f"{PROGRAMS.format(version)}/pg_upgrade", os.X_OK):
        raise CommandExecutionError(
            f"The package postgresql-{version} is not to be had: do the package sources of this machine offer it?"
        )
    return done


def missing_extensions(version, extensions):
    """
    Return the extensions that a major version has not, as it is installed here.

    version
        The major version.

    extensions
        A list of names.

    CLI Example:

    .. code-block:: bash

        salt-call synapse_cluster.missing_extensions 18 '[plpgsql]'
    """
    directory = pathlib.Path(EXTENSIONS.format(version))
    return [name for name in extensions if not (directory / f"{name}.control").exists()]


def strange_options(version, options):
    """
    Return the options of columns that a major version does not know, as it is installed here, and would refuse.

    version
        The major version.

    options
        A list of names.

    CLI Example:

    .. code-block:: bash

        salt-call synapse_cluster.strange_options 18 '[pg_attver]'
    """
    server = pathlib.Path(f"{PROGRAMS.format(version)}/postgres").read_bytes() if options else b""
    return [option for option in options if f"\0{option}\0".encode() not in server]


def create(name, old, port):
    """
    Make a cluster after another: with its encoding, locale, checksums, WAL segments and settings. It does not start by
    itself.

    name
        The new cluster.

    old
        What :func:`about` returned of the old one.

    port
        The new one's port.

    Returns a list of the settings that the new version does not know any more; they stay behind.

    Raises CommandExecutionError if it can't be made, or if it would not start with these settings.

    Source: pg_createcluster(1), initdb(1)

    CLI Example:

    .. code-block:: bash

        salt-call synapse_cluster.create 18/main '{"version": 15, ...}' 5433
    """
    version, cluster = name.split("/")
    options = [f"--wal-segsize={old['wal_segment']}"]
    if old["checksums"] == "on":
        options.append("--data-checksums")
    elif int(version) >= 18:
        # It has them unless told otherwise.
        options.append("--no-data-checksums")
    if old["mode"].endswith("0750"):
        options.append("--allow-group-access")
    if old["provider"] == "i":
        options += ["--locale-provider=icu", f"--icu-locale={old['locale']}"]
    elif old["provider"] == "b":
        options += ["--locale-provider=builtin", f"--builtin-locale={old['locale']}"]
    _run(
        *("pg_createcluster", f"--port={port}", "--start-conf=manual", f"--datadir={place(old, int(version))}"),
        *(f"--encoding={old['encoding']}", "--locale=C", f"--lc-collate={old['collate']}"),
        *(f"--lc-ctype={old['ctype']}", "--no-status", version, cluster, "--", *options),
    )
    return _carry_settings(old, _cluster(name))


def _carry_settings(old, new):
    """Have the new cluster set as the old one; return what the new version does not know."""
    source, target = pathlib.Path(old["config"]), pathlib.Path(new["config"])
    unknown = []
    for file in ("pg_hba.conf", "pg_ident.conf", "environment", "pg_ctl.conf"):
        if (source / file).exists():
            _copy(source / file, target / file)
    if (source / "conf.d").is_dir():
        for file in (source / "conf.d").glob("*.conf"):
            (target / "conf.d").mkdir(exist_ok=True)
            unknown += _copy_settings(file, target / "conf.d" / file.name, new)
    unknown += _copy_settings(
        pathlib.Path(old["data"], "postgresql.auto.conf"), pathlib.Path(new["data"], "postgresql.auto.conf"), new
    )
    name = f"{old['version']}/{source.name}"
    present = _settings(new)
    for row in _query(old, FILE_SETTINGS.format(source / "postgresql.conf")):
        setting, value = row["name"], row["setting"]
        # Such as hba_file, or cluster_name.
        about_itself = setting in PLACES or name in value or name.replace("/", "-") in value
        if about_itself or present.get(setting) == value:
            continue
        if _knows(new, setting):
            _run("pg_conftool", str(new["version"]), target.name, "set", setting, value)
        else:
            unknown.append(setting)
    checked = _check_settings(new, "max_connections")
    if checked["retcode"] != 0:
        raise CommandExecutionError(
            f"PostgreSQL {new['version']} does not start with the settings of {name}: {checked['stderr']}"
        )
    return unknown


def _copy(source, target):
    shutil.copyfile(source, target)
    shutil.copystat(source, target)
    os.chown(target, source.stat().st_uid, source.stat().st_gid)


def _copy_settings(source, target, new):
    """Copy a file of settings without those that the new version does not know; return their names."""
    lines, unknown = [], []
    for line in source.read_text(encoding="utf-8").splitlines():
        found = re.match(r"\s*([A-Za-z_][\w.]*)\s*[=\s]", line)
        if found and not found[1].startswith("include") and not _knows(new, found[1].lower()):
            unknown.append(found[1])
            line = f"# PostgreSQL {new['version']} does not know it: {line}"
        lines.append(f"{line}\n")
    _copy(source, target)
    target.write_text("".join(lines), encoding="utf-8")
    return unknown


def _settings(cluster):
    """What stands in the configuration of a cluster that need not run."""
    shown = _run("pg_conftool", str(cluster["version"]), pathlib.Path(cluster["config"]).name, "show", "all")
    pairs = (line.split(" = ", 1) for line in shown.splitlines() if " = " in line)
    return {name.strip(): value.strip().removeprefix("'").removesuffix("'") for name, value in pairs}


def _knows(cluster, setting):
    """Whether the cluster's version has a setting. A name with a dot is an extension's, or anybody's."""
    known = _known_settings(cluster["version"])
    return "." in setting or setting in known or _check_settings(cluster, setting)["retcode"] == 0


def _known_settings(version):
    """The settings of a version, but for those that are for developers."""
    key = f"synapse_cluster.settings.{version}"
    if key not in __context__:
        described = _run(
            "runuser", "--user=postgres", "--", f"{PROGRAMS.format(version)}/postgres", "--describe-config"
        )
        __context__[key] = {line.split("\t")[0].lower() for line in described.splitlines()}
    return __context__[key]


def _check_settings(cluster, setting):
    """Have the server read its configuration, as it does when it starts, and print one setting."""
    return _run_all(
        *("runuser", "--user=postgres", "--", f"{PROGRAMS.format(cluster['version'])}/postgres", "-C", setting),
        *("-c", f"config_file={cluster['config']}/postgresql.conf"),
    )


def drop(name, data=None):
    """
    Remove a cluster with all its data. Return whether it was there.

    name
        The cluster.

    data
        Where its data are, for one that is perhaps only half made.

    CLI Example:

    .. code-block:: bash

        salt-call synapse_cluster.drop 18/main
    """
    version, cluster = name.split("/")
    config = CONFIG / version / cluster
    there = clusters().get(name)
    if there:
        stop(name)
        _run("pg_dropcluster", version, cluster)
    # pg_dropcluster leaves files that it did not make, and knows no cluster without a configuration.
    for directory in (config, data):
        if directory and os.path.isdir(directory):
            shutil.rmtree(directory)
    return there is not None


def stop(name):
    """
    Stop a cluster in order, and wait until it is down. Return whether it ran.

    name
        The cluster.

    CLI Example:

    .. code-block:: bash

        salt-call synapse_cluster.stop 18/main
    """
    version, cluster = name.split("/")
    ran = _cluster(name)["running"]
    _run("systemctl", "stop", f"postgresql@{version}-{cluster}")
    if _cluster(name)["running"]:
        # It was not systemd that started it.
        _run("pg_ctlcluster", "--skip-systemctl-redirect", "--mode=fast", version, cluster, "stop")
    return ran


def start(name):
    """
    Start a cluster, and wait until it answers. Return whether it was down.

    name
        The cluster.

    Raises CommandExecutionError if it does not start, with the end of its log.

    CLI Example:

    .. code-block:: bash

        salt-call synapse_cluster.start 18/main
    """
    cluster = _cluster(name)
    if cluster["running"]:
        return False
    # Its unit calls any start a success.
    _run_all("systemctl", "restart", f"postgresql@{name.replace('/', '-')}")
    if not _cluster(name)["running"]:
        raise CommandExecutionError(f"PostgreSQL {name} does not start; its log ends:\n{_end_of(cluster['log'])}")
    _query(cluster, "select 1 as up")
    return True


def _end_of(file, lines=15):
    try:
        return "\n".join(pathlib.Path(file).read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])
    except OSError as err:
        return f"(it can't be read: {err})"


def place_at(name, port, start_conf):
    """
    Give a cluster its port for the next start, and say whether it starts by itself.

    name
        The cluster.

    port
        The port; it counts from the next start on.

    start_conf
        ``auto``, ``manual`` or ``disabled``: then not even an operator starts it by accident.

    Source: pg_createcluster(1), ``start.conf``

    CLI Example:

    .. code-block:: bash

        salt-call synapse_cluster.place_at 18/main 5432 auto
    """
    cluster = _cluster(name)
    version, short = name.split("/")
    if cluster["port"] != port:
        _run("pg_conftool", version, short, "set", "port", str(port))
    if cluster["start"] != start_conf:
        file = pathlib.Path(cluster["config"], "start.conf")
        draft = file.with_suffix(".new")
        draft.write_text(f"# By synapse-formula: auto, manual or disabled.\n{start_conf}\n", encoding="utf-8")
        os.chown(draft, file.stat().st_uid, file.stat().st_gid)
        draft.rename(file)
    # What starts at boot is known to systemd also by this; the formula's own state asks for it.
    unit = f"postgresql@{version}-{short}.service"
    if (start_conf == "auto") != os.path.lexists(f"/etc/systemd/system/multi-user.target.wants/{unit}"):
        _run("systemctl", "--quiet", "enable" if start_conf == "auto" else "disable", unit)


def free_ports(count):
    """
    Return ports that no cluster has, the lowest above those taken.

    count
        How many.

    CLI Example:

    .. code-block:: bash

        salt-call synapse_cluster.free_ports 2
    """
    taken = {cluster["port"] for cluster in clusters().values()}
    return [port for port in range(5433, 5433 + len(taken) + count) if port not in taken][:count]


def contents(name, method):
    """
    Return what is in a cluster that runs, to be compared with another that its data were moved to: a dict of dicts by
    database, whose keys are a kind and a name: tables, columns, indexes, constraints, triggers, functions, extensions,
    sequences; after a dump the number of rows of every table, else the sizes of their files.

    name
        The cluster. Nobody should write to it meanwhile.

    method
        How the data are moved.

    CLI Example:

    .. code-block:: bash

        salt-call synapse_cluster.contents 15/main copy
    """
    cluster = _cluster(name)
    # One of these might cut off the end of a file between now and the stop.
    _query(cluster, QUIET)
    found = {}
    for database in (row["datname"] for row in _query(cluster, DATABASES)):
        found[database] = contents_of(functools.partial(_query, cluster, database=database), rows=method == "dump")
    return found


def contents_of(ask, rows):
    """
    Return what is in one database, as :func:`contents` does.

    ask
        A function that returns the rows of a query in it, a dict for each.

    rows
        Whether rows are counted; otherwise files are measured.
    """
    found = {f"{row['kind']} {row['name']}": row["value"] for row in ask(CONTENTS + ("" if rows else SIZES))}
    return found | _counts(ask) if rows else found


def _counts(ask):
    tables = [row["name"] for row in ask(TABLES)]
    if not tables:
        return {}
    quoted = [(table.replace("'", "''"), table) for table in tables]
    counts = " union all ".join(f"select '{text}' as name, count(*) as count from {table}" for text, table in quoted)
    return {f"rows {row['name']}": row["count"] for row in ask(counts)}


def differences(before, after):
    """
    Return what differs between two :func:`contents`, a sentence each.

    before
        What was.

    after
        What is.

    CLI Example:

    .. code-block:: bash

        salt-call synapse_cluster.differences '{}' '{}'
    """
    found = []
    for database in sorted(before.keys() | after.keys()):
        old, new = before.get(database, {}), after.get(database, {})
        found += [
            f"{database}: {item}: {old.get(item, 'nothing')} before, {new.get(item, 'nothing')} after"
            for item in sorted(old.keys() | new.keys())
            if old.get(item) != new.get(item)
        ]
    return found


def check(old, new, method, jobs):
    """
    Have ``pg_upgrade --check`` look at both clusters, while the old one runs.

    old, new
        The clusters.

    method
        ``clone``, ``link``, ``copy`` or ``dump``; of the last pg_upgrade knows nothing.

    jobs
        How many processes work on it.

    Raises CommandExecutionError with what it found.

    Source: pg_upgrade(1)

    CLI Example:

    .. code-block:: bash

        salt-call synapse_cluster.check 15/main 18/main copy 2
    """
    if method != "dump":
        _pg_upgrade(_cluster(old), _cluster(new), method, jobs, None, "--check")


def move(old, new, method, jobs, progress):
    """
    Move all data of one cluster into another, which is new and down. ``dump`` leaves both running, the others both down.

    old, new
        The clusters.

    method
        ``clone``, ``link``, ``copy`` or ``dump``.

    jobs
        How many processes work on it.

    progress
        A function that is called each second, with the bytes that the new cluster has.

    Raises CommandExecutionError if any part of it failed.
    """
    if method == "dump":
        start(new)
        _dump(_cluster(old), _cluster(new), progress)
    else:
        stop(old)
        _pg_upgrade(_cluster(old), _cluster(new), method, jobs, progress)


def _pg_upgrade(old, new, method, jobs, progress, *more):
    option = METHODS[method]["option"]
    run = f"/run/{TOOL}upgrade"
    words = [
        f"{PROGRAMS.format(new['version'])}/pg_upgrade",
        f"--old-bindir={PROGRAMS.format(old['version'])}",
        f"--new-bindir={PROGRAMS.format(new['version'])}",
        f"--old-datadir={old['data']}",
        f"--new-datadir={new['data']}",
        f"--old-options=-c config_file={old['config']}/postgresql.conf",
        f"--new-options=-c config_file={new['config']}/postgresql.conf",
        f"--old-port={old['port']}",
        f"--new-port={new['port']}",
        f"--socketdir={run}",
        f"--jobs={jobs}",
        "--username=postgres",
        *([option] if option else []),
        *more,
    ]
    with tempfile.TemporaryFile() as output:
        tool = _start_tool("upgrade", words, stdout=output, stderr=output)
        _follow([tool], new["data"], progress)
        output.seek(0)
        said = output.read().decode(errors="replace")
    if tool.returncode != 0:
        logs = [path for path in re.findall(r"/\S+\.(?:log|txt)\b", said) if os.path.exists(path)]
        ends = "\n".join(f"{path}:\n{_end_of(path)}" for path in dict.fromkeys(logs))
        end = "\n".join(line for line in said.splitlines()[-12:] if line.strip())
        raise CommandExecutionError(
            f"pg_upgrade failed with the exit status {tool.returncode}:\n{end}\n{ends}".rstrip()
        )


def _dump(old, new, progress):
    """`pg_dumpall | psql`, where each may fail."""
    programs = PROGRAMS.format(new["version"])
    # libpq's own way to be sure that no server of another place is meant.
    dump_words = [f"{programs}/pg_dumpall", f"--host={old['sockets']}", f"--port={old['port']}", "--no-password"]
    load_words = [f"{programs}/psql", f"--host={new['sockets']}", f"--port={new['port']}", "--no-password"]
    load_words += ["--no-psqlrc", "--quiet", "--set=ON_ERROR_STOP=1", "--output=/dev/null", "--dbname=postgres"]
    with tempfile.TemporaryFile() as dump_errors, tempfile.TemporaryFile() as load_errors:
        dump = _start_tool("dump", dump_words, stdout=subprocess.PIPE, stderr=dump_errors)
        load = _start_tool("load", load_words, stdin=subprocess.PIPE, stdout=load_errors, stderr=load_errors)
        _pump(dump.stdout, load.stdin, new["data"], progress)
        _follow([dump, load], new["data"], progress)
        failed = []
        for name, tool, errors in (("pg_dumpall", dump, dump_errors), ("psql", load, load_errors)):
            if tool.returncode != 0:
                errors.seek(0)
                said = "\n".join(errors.read().decode(errors="replace").splitlines()[-10:])
                failed.append(f"{name} failed with the exit status {tool.returncode}: {said}")
    if failed:
        raise CommandExecutionError("\n".join(failed))


def _pump(source, target, data, progress):
    """Pass a dump on, but for the superuser, whom every cluster has, and at whom psql would stop."""
    reported = time.monotonic()
    try:
        for line in source:
            if line.strip() == b"CREATE ROLE postgres;":
                break
            target.write(line)
        while block := source.read1(1 << 20):
            target.write(block)
            if time.monotonic() - reported >= 1:
                reported = time.monotonic()
                progress(size(data))
        target.close()
    except BrokenPipeError:
        # Whoever read has ended, and says why.
        with contextlib.suppress(BrokenPipeError):
            target.close()
    source.close()


def _start_tool(name, words, **pipes):
    """Start a program as PostgreSQL's account, in a unit of its own."""
    unit = f"{TOOL}{name}"
    return subprocess.Popen(
        [
            *("systemd-run", f"--unit={unit}", "--pipe", "--wait", "--collect", "--quiet"),
            *("--uid=postgres", f"--property=RuntimeDirectory={unit}", f"--property=WorkingDirectory=/run/{unit}"),
            *("--setenv=LC_ALL=C.UTF-8", "--", *words),
        ],
        **{"stdin": subprocess.DEVNULL, **pipes},
        env={**os.environ, "LC_ALL": "C.UTF-8"},
    )


def _follow(tools, data, progress):
    """Wait until the tools have ended."""
    while True:
        for tool in tools:
            try:
                tool.wait(timeout=1)
            except subprocess.TimeoutExpired:
                break
        else:
            return
        if progress:
            progress(size(data))


def end_tools():
    """
    End what :func:`move` and :func:`check` started, with all its children, if whoever started it is gone. Return whether
    there was any.

    CLI Example:

    .. code-block:: bash

        salt-call synapse_cluster.end_tools
    """
    listed = _run("systemctl", "list-units", "--all", "--plain", "--no-legend", f"{TOOL}*.service").split()
    units = [word for word in listed if word.startswith(TOOL) and word.endswith(".service")]
    if units:
        _run_all("systemctl", "kill", "--signal=SIGKILL", *units)
        _run_all("systemctl", "stop", *units)
        _run_all("systemctl", "reset-failed", *units)
    return bool(units)


def make_usable(name):
    """
    Make a cluster usable again that ``pg_upgrade --link`` has put aside. Its successor must never have been started.

    name
        The cluster.

    Source: pg_upgrade(1), "Reverting to old cluster"

    CLI Example:

    .. code-block:: bash

        salt-call synapse_cluster.make_usable 15/main
    """
    control = pathlib.Path(_cluster(name)["data"], "global/pg_control")
    put_aside = control.with_name("pg_control.old")
    if put_aside.exists() and not control.exists():
        put_aside.rename(control)


def care(name, method):
    """
    Do what a cluster needs after its data were moved: statistics in stages, updates of extensions, new indexes where the
    versions of collations changed. It serves meanwhile.

    name
        The cluster.

    method
        How its data were moved.

    Returns a list of what was done beside the statistics.

    Raises CommandExecutionError if a part of it failed.

    Source: pg_upgrade(1), "Post-upgrade processing"

    CLI Example:

    .. code-block:: bash

        salt-call synapse_cluster.care 18/main copy
    """
    cluster, done = _cluster(name), []
    for database in (row["datname"] for row in _query(cluster, DATABASES)):
        for row in _query(cluster, OUTDATED_EXTENSIONS, database):
            _query(cluster, f"alter extension {row['name']} update", database)
            done.append(f"{database}: the extension {row['name']} is updated to {row['version']}")
        outdated = _query(cluster, OUTDATED_COLLATIONS, database) if cluster["version"] >= 15 else []
        if outdated:
            _run(*_client(cluster, "reindexdb"), "--concurrently", f"--dbname={database}")
        for row in outdated:
            _query(
                cluster, f"alter {row['kind']} {row['name']} refresh {_about_collation(row['kind'])}version", database
            )
            done.append(
                f"{database}: its indexes are made anew, as the {row['kind']} {row['name']} has another version"
            )
    # From 18 on pg_upgrade brings the statistics along, but for a few.
    missing = ["--missing-stats-only"] if method != "dump" and cluster["version"] >= 18 else []
    _run(*_client(cluster, "vacuumdb"), "--all", "--analyze-in-stages", *missing)
    return done


def _about_collation(kind):
    return "collation " if kind == "database" else ""


def _run(*words, stdin=None):
    done = _run_all(*words, stdin=stdin)
    if done["retcode"] != 0:
        program = next((word for word in words if word.startswith("/")), words[0]).rpartition("/")[2]
        raise CommandExecutionError(f"{program}: {done['stderr'] or done['stdout']}")
    return done["stdout"]


def _run_all(*words, stdin=None):
    return __salt__["cmd.run_all"](
        [str(word) for word in words],
        cwd="/",
        stdin=stdin,
        python_shell=False,
        ignore_retcode=True,
        output_loglevel="quiet",
        # Not in the language of whoever runs it: some of it is read here.
        env={"LC_ALL": "C.UTF-8"},
    )
