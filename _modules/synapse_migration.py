"""
How data get from one cluster of PostgreSQL into a newer one: by which method, whether they all arrived, and what is left to do.
"""

import contextlib
import fcntl
import functools
import os
import pathlib
import re
import subprocess
import tempfile
import time

from salt.exceptions import CommandExecutionError

PROGRAMS = "/usr/lib/postgresql/{}/bin"
EXTENSIONS = "/usr/share/postgresql/{}/extension"

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

        salt-call synapse_migration.methods
    """
    return METHODS


def margin():
    """
    Return how many bytes a new cluster needs beside the data.

    CLI Example:

    .. code-block:: bash

        salt-call synapse_migration.margin
    """
    return SPACE


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

        salt-call synapse_migration.can_clone /var/lib/postgresql/15 /var/lib/postgresql/18
    """
    with (
        tempfile.TemporaryFile(dir=source) as one,
        tempfile.TemporaryFile(dir=__salt__["synapse_cluster.existing"](target)) as other,
    ):
        one.write(b"\0" * 4096)
        one.flush()
        try:
            fcntl.ioctl(other.fileno(), CLONE, one.fileno())
        except OSError:
            return False
    return True


def missing_extensions(version, extensions):
    """
    Return the extensions that a major version has not, as it is installed here.

    version
        The major version.

    extensions
        A list of names.

    CLI Example:

    .. code-block:: bash

        salt-call synapse_migration.missing_extensions 18 '[plpgsql]'
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

        salt-call synapse_migration.strange_options 18 '[pg_attver]'
    """
    server = pathlib.Path(f"{PROGRAMS.format(version)}/postgres").read_bytes() if options else b""
    return [option for option in options if f"\0{option}\0".encode() not in server]


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

        salt-call synapse_migration.contents 15/main copy
    """
    # One of these might cut off the end of a file between now and the stop.
    _query(name, QUIET)
    found = {}
    for database in __salt__["synapse_cluster.databases"](name):
        found[database] = contents_of(functools.partial(_query, name, database=database), rows=method == "dump")
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

        salt-call synapse_migration.differences '{}' '{}'
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

        salt-call synapse_migration.check 15/main 18/main copy 2
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
        __salt__["synapse_cluster.start"](new)
        _dump(_cluster(old), _cluster(new), progress)
    else:
        __salt__["synapse_cluster.stop"](old)
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
        raise CommandExecutionError(f"pg_upgrade failed with the exit status {tool.returncode}:\n{_reasons(said)}")


def _reasons(said):
    """What pg_upgrade says of its failure, and the errors in the files that it names."""
    lines = [line.strip() for line in said.splitlines() if line.strip() and not line.rstrip().endswith(" ok")][-12:]
    for path in dict.fromkeys(re.findall(r"/[^\s\"]+\.(?:log|txt)\b", said)):
        with contextlib.suppress(OSError):
            text = pathlib.Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
            telling = [line for line in text if re.search(r"\b(error|FATAL|PANIC|ERROR)\b", line)] or text
            lines += [f"{os.path.basename(path)}: {line.strip()[:300]}" for line in telling[:6]]
    return "\n".join(lines)


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
                progress(__salt__["synapse_cluster.size"](data))
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
            progress(__salt__["synapse_cluster.size"](data))


def end_tools():
    """
    End what :func:`move` and :func:`check` started, with all its children, if whoever started it is gone. Return whether
    there was any.

    CLI Example:

    .. code-block:: bash

        salt-call synapse_migration.end_tools
    """
    listed = _systemctl("list-units", "--all", "--plain", "--no-legend", f"{TOOL}*.service").split()
    units = [word for word in listed if word.startswith(TOOL) and word.endswith(".service")]
    if units:
        _systemctl("kill", "--signal=SIGKILL", *units)
        _systemctl("stop", *units)
        _systemctl("reset-failed", *units)
    return bool(units)


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

        salt-call synapse_migration.care 18/main copy
    """
    version, done = _cluster(name)["version"], []
    for database in __salt__["synapse_cluster.databases"](name):
        for row in _query(name, OUTDATED_EXTENSIONS, database):
            _query(name, f"alter extension {row['name']} update", database)
            done.append(f"{database}: the extension {row['name']} is updated to {row['version']}")
        outdated = _query(name, OUTDATED_COLLATIONS, database) if version >= 15 else []
        if outdated:
            __salt__["synapse_cluster.client"](name, "reindexdb", "--concurrently", f"--dbname={database}")
        for row in outdated:
            _query(name, f"alter {row['kind']} {row['name']} refresh {_about_collation(row['kind'])}version", database)
            done.append(
                f"{database}: its indexes are made anew, as the {row['kind']} {row['name']} has another version"
            )
    # From 18 on pg_upgrade brings the statistics along, but for a few.
    missing = ["--missing-stats-only"] if method != "dump" and version >= 18 else []
    _analyze(name, *missing)
    return done


def _analyze(name, *options):
    """Make statistics. Synapse's background updates make indexes meanwhile, which may end in a deadlock, at the expense of either."""
    words = (name, "vacuumdb", "--all", "--analyze-in-stages", *options)
    __salt__["synapse_runs.persist"](lambda: __salt__["synapse_cluster.client"](*words), "deadlock detected")


def _about_collation(kind):
    return "collation " if kind == "database" else ""


def _cluster(name):
    return __salt__["synapse_cluster.clusters"]()[name]


def _query(name, sql, database="postgres"):
    return __salt__["synapse_cluster.query"](name, sql, database)


def _systemctl(*words):
    # What has ended meanwhile is no failure.
    command = ["systemctl", *words]
    return __salt__["cmd.run_all"](command, python_shell=False, ignore_retcode=True, output_loglevel="debug")["stdout"]
