"""
Clusters of PostgreSQL, as Debian's postgresql-common keeps them: what one is like and what is in it, how another is made
after it, and how data get from one major version into the next. What they are for, this module does not know.

A cluster is called as Debian calls it: ``15/main``.
"""

import contextlib
import csv
import io
import json
import os
import pathlib
import re
import shutil
import stat
import time

from salt.exceptions import CommandExecutionError

CONFIG = pathlib.Path("/etc/postgresql")
PROGRAMS = "/usr/lib/postgresql/{}/bin"
# What PostgreSQL's packages ask before they make a cluster.
NO_NEW_CLUSTER = pathlib.Path("/etc/postgresql-common/createcluster.d/matrix-synapse.conf")


# Seconds that a cluster has to start: one that recovers from a crash reads all that was written since its last checkpoint.
LONGEST_START = 600

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


def clusters():
    """
    Return the clusters of this machine by name, each a dict with ``version``, ``port``, ``running``, ``start`` (auto,
    manual or disabled), ``data``, ``config``, ``sockets`` and ``log``.

    Source: pg_lsclusters(1)

    CLI Example:

    .. code-block:: bash

        salt-call synapse_cluster.clusters
    """
    return {name: {**cluster, "running": _runs(cluster["data"])} for name, cluster in _configured().items()}


def _configured():
    """What the clusters' files say. pg_lsclusters takes as long as some phases of an upgrade, so it is asked when one changed."""
    files = sorted(path for path in CONFIG.glob("*/*/**/*") if path.is_file())
    stamp = [(str(path), path.stat().st_ino, path.stat().st_mtime_ns) for path in files]
    known = __context__.get("synapse_cluster.configured")
    if not known or known[0] != stamp:
        listed = json.loads(_run("pg_lsclusters", "--json") or "[]") if files else []
        known = __context__["synapse_cluster.configured"] = (stamp, dict(map(_described, listed)))
    return known[1]


def _described(found):
    return f"{found['version']}/{found['cluster']}", {
        "version": int(found["version"]),
        "port": int(found["port"]),
        "start": found["start"],
        "data": found["pgdata"],
        "config": found["configdir"],
        "sockets": found["socketdir"],
        "log": found["logfile"],
    }


def _runs(data):
    """Whether a server has these data: it is alive, and no other program, nor another server, got its process id after a
    crash."""
    try:
        pid = pathlib.Path(data, "postmaster.pid").read_text(encoding="utf-8").split("\n", 1)[0]
        process = pathlib.Path(f"/proc/{int(pid)}")
        is_server = (process / "comm").read_text(encoding="utf-8").strip() == "postgres"
        return is_server and os.path.samefile(process / "cwd", data)
    except (OSError, ValueError):
        return False


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


def databases(name):
    """
    Return the names of the databases of a cluster that runs.

    name
        The cluster.

    CLI Example:

    .. code-block:: bash

        salt-call synapse_cluster.databases 15/main
    """
    return [row["datname"] for row in query(name, DATABASES)]


def client(name, program, *arguments):
    """
    Run one of PostgreSQL's client programs, of the cluster's own version, as its superuser. Return what it printed.

    name
        The cluster, which must run.

    program
        The program's name.

    arguments
        Its arguments.

    CLI Example:

    .. code-block:: bash

        salt-call synapse_cluster.client 15/main vacuumdb --all
    """
    return _run(*_client(_cluster(name), program), *arguments)


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
    names = databases(name)
    extensions = {row["extname"] for database in names for row in _query(cluster, EXTENSIONS_USED, database)}
    options = {row["option"] for database in names for row in _query(cluster, COLUMN_OPTIONS, database)}
    links = pathlib.Path(cluster["data"], "pg_tblspc").iterdir()
    tablespaces = {path: size(path) for path in map(os.path.realpath, links)}
    return {
        **cluster,
        **found,
        "databases": names,
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


def _copy(source, target, text=None):
    """Copy a file, or what a changed one would hold. The directory is postgres's, who could put a link there meanwhile."""
    found = source.stat()
    content = source.read_bytes() if text is None else text
    __salt__["synapse_files.write"](target, content, found.st_gid, stat.S_IMODE(found.st_mode), found.st_uid)


def _copy_settings(source, target, new):
    """Copy a file of settings without those that the new version does not know; return their names."""
    lines, unknown = [], []
    for line in source.read_text(encoding="utf-8").splitlines():
        found = re.match(r"\s*([A-Za-z_][\w.]*)\s*[=\s]", line)
        if found and not found[1].startswith("include") and not _knows(new, found[1].lower()):
            unknown.append(found[1])
            line = f"# PostgreSQL {new['version']} does not know it: {line}"
        lines.append(f"{line}\n")
    _copy(source, target, "".join(lines))
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


def stop(*names):
    """
    Stop clusters in order, side by side, and wait until they are down. Return the names of those that ran.

    names
        The clusters.

    CLI Example:

    .. code-block:: bash

        salt-call synapse_cluster.stop 18/main
    """
    ran = [name for name in names if _cluster(name)["running"]]
    for name in names:
        if "activating" in _job(name):
            # It waits for that to end: see start(). What systemd calls off is killed, and not stopped in order.
            _run_all("systemctl", "start", _unit(name))
    _run("systemctl", "stop", *map(_unit, names))
    for name in names:
        if _cluster(name)["running"]:
            # It was not systemd that started it.
            _run("pg_ctlcluster", "--skip-systemctl-redirect", "--mode=fast", *name.split("/"), "stop")
    return ran


def set_read_only(name, on):
    """
    Have a cluster that runs take no changes, unless a session insists; or take them again.

    name
        The cluster.

    on
        Whether it takes none.

    Source: https://www.postgresql.org/docs/current/runtime-config-client.html, ``default_transaction_read_only``

    CLI Example:

    .. code-block:: bash

        salt-call synapse_cluster.set_read_only 15/main false
    """
    setting = "default_transaction_read_only"
    change = f"set {setting} = on" if on else f"reset {setting}"
    _query(_cluster(name), f"alter system {change};\nselect pg_reload_conf()")


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
    if _answers(cluster):
        return False
    # Debian's pg_ctlcluster, by which the unit starts it, goes on waiting for two seconds after the server answers. One that
    # is there and does not answer recovers, or is about to stop; one that is not may be so although its unit is active, or
    # because it is only just being started.
    verb = "start" if cluster["running"] or "activating" in _job(name) else "restart"
    _run_all("systemctl", verb, "--no-block", _unit(name))
    deadline = time.monotonic() + LONGEST_START
    while not (answers := _answers(cluster)) and not _gave_up(name) and time.monotonic() < deadline:
        time.sleep(0.05)
    if not answers:
        raise CommandExecutionError(f"PostgreSQL {name} does not start; its log ends:\n{_end_of(cluster['log'])}")
    return True


def _answers(cluster):
    """Whether it is this cluster's server that takes connections at its port."""
    asked = [
        f"{PROGRAMS.format(cluster['version'])}/pg_isready",
        f"--host={cluster['sockets']}",
        f"--port={cluster['port']}",
    ]
    return _runs(cluster["data"]) and _run_all(*asked)["retcode"] == 0


def _gave_up(name):
    """Whether neither a server is there nor systemd about to start one."""
    return not (_cluster(name)["running"] or set(_job(name)) - {"", "0", "active", "inactive", "failed"})


def _job(name):
    """The state of a cluster's unit, and the number of the job that systemd has for it."""
    shown = _run("systemctl", "show", "--property=ActiveState,Job", _unit(name)).splitlines()
    return [line.partition("=")[2] for line in shown]


def _unit(name):
    return f"postgresql@{name.replace('/', '-')}.service"


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
        owner, text = file.stat(), f"# By synapse-formula: auto, manual or disabled.\n{start_conf}\n"
        __salt__["synapse_files.write"](file, text, owner.st_gid, 0o644, owner.st_uid)
    # What starts at boot is known to systemd also by this; the formula's own state asks for it.
    if (start_conf == "auto") != os.path.lexists(f"/etc/systemd/system/multi-user.target.wants/{_unit(name)}"):
        _run("systemctl", "--quiet", "--no-reload", "enable" if start_conf == "auto" else "disable", _unit(name))


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
