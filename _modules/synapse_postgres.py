"""
Synapse's PostgreSQL cluster: which one it is, how it is set, who is connected; and its move to a newer major version.
"""

import csv
import io
import json
import os
import pathlib

from salt.exceptions import CommandExecutionError

CLUSTERS = pathlib.Path("/etc/postgresql")

# The PostgreSQL that a release's packages bring.
PACKAGED = {"Debian": {12: 15, 13: 17}}

SESSIONS = """
select pid, application_name as process, coalesce(host(client_addr), 'a socket') as client, state, backend_start as since
from pg_stat_activity where usename = '{role}' and pid <> pg_backend_pid() order by backend_start
"""
TERMINATE = """
select pid, pg_terminate_backend(pid) from pg_stat_activity where usename = '{role}' and pid <> pg_backend_pid()
"""


def version():
    """
    Return the PostgreSQL major version that Synapse's data are on, as an integer: the recorded one; while none is recorded,
    that of the only cluster with Synapse's database, else the pillar's, else that of the only cluster on this machine, else
    what the distribution packages.

    Raises CommandExecutionError where that does not tell.

    CLI Example:

    .. code-block:: bash

        salt-call synapse_postgres.version
    """
    recorded = __salt__["synapse_upgrade.record"]()
    if recorded:
        return int(recorded.split("/")[0])
    settings = __salt__["synapse_pillar.settings"]()
    given, there = settings["postgres"]["version"], _present()
    if given is not None and there not in ([], [given]):
        # Perhaps the pillar was changed before anything was recorded.
        holding = [major for major in there if _holds_database(major, settings["postgres"]["database"])]
        if len(holding) == 1:
            return holding[0]
        down = [f"{major}/main" for major in there if major != given and not _runs(major)]
        if down and not holding:
            raise CommandExecutionError(
                f"synapse:postgres:version: {given}: {', '.join(down)} is down, so nobody can tell whether Synapse's data are on"
                " it. Start it, or remove it, if nobody needs what is in it"
            )
    if given is not None:
        return given
    if len(there) == 1:
        return there[0]
    packaged = PACKAGED.get(__grains__.get("os"), {}).get(__grains__.get("osmajorrelease"))
    if there or packaged is None:
        raise CommandExecutionError(
            f"synapse:postgres:version: is missing: this machine has the clusters {there or 'none'}; say which is Synapse's"
        )
    return packaged


def _present():
    return sorted(int(path.parent.name) for path in CLUSTERS.glob("*/main") if path.parent.name.isdecimal())


def _runs(major):
    return __salt__["synapse_cluster.clusters"]().get(f"{major}/main", {"running": False})["running"]


def _holds_database(major, database):
    if not _runs(major):
        return False
    rows = __salt__["synapse_cluster.query"](f"{major}/main", "select datname from pg_database")
    return database in [row["datname"] for row in rows]


def cluster():
    """
    Return the cluster that Synapse's data are on, as Debian calls it: ``15/main``.

    CLI Example:

    .. code-block:: bash

        salt-call synapse_postgres.cluster
    """
    return f"{version()}/main"


def fault():
    """
    Return a sentence that says why nothing may touch PostgreSQL now: a move that is at work or was cut off, or a version in
    the pillar that the data are not on, where a run would start an empty database. None if there is no reason.

    CLI Example:

    .. code-block:: bash

        salt-call synapse_postgres.fault
    """
    settings = __salt__["synapse_pillar.settings"]()
    if not settings["postgres"]["managed"]:
        return None
    unfinished = __salt__["synapse_upgrade.fault"]()
    wanted = settings["postgres"]["version"]
    if unfinished or wanted in (None, version()):
        return unfinished
    return (
        f"synapse:postgres:version: {wanted}: Synapse's data are on {cluster()}, and state.apply does not move them. To move them:"
        f" salt-run state.orchestrate synapse.orch.upgrade_postgres, or salt-call synapse_postgres.upgrade. To stay:"
        " take the version out of the pillar"
    )


def options():
    """
    Return the settings that the formula gives PostgreSQL: ``max_connections`` for the plan, but never less than there are,
    as the cluster may be others' too; and over it the pillar's own.

    CLI Example:

    .. code-block:: bash

        salt-call synapse_postgres.options
    """
    needed = __salt__["synapse_workers.plan"]()["max_connections"]
    return {
        "max_connections": max(needed, _connections_allowed()),
        **__salt__["synapse_pillar.settings"]()["postgres"]["options"],
    }


def _connections_allowed():
    """How many connections the cluster allows: that it runs with, else that it would start with; 0 if it is not there."""
    major = version()
    configuration = CLUSTERS / str(major) / "main"
    if not configuration.is_dir():
        return 0
    for command in (
        (
            "psql",
            f"--cluster={major}/main",
            "--no-psqlrc",
            "--tuples-only",
            "--no-align",
            "--dbname=postgres",
            "--command=show max_connections",
        ),
        (f"/usr/lib/postgresql/{major}/bin/postgres", "-D", str(configuration), "-C", "max_connections"),
    ):
        done = _run("runuser", "--user=postgres", "--", *command)
        if done["retcode"] == 0:
            return int(done["stdout"])
    return 0


def sessions():
    """
    Return every session of Synapse's role in the database, whoever has it: a list of dicts with ``pid`` (of PostgreSQL's
    process), ``process`` (the name that the session gives itself: Synapse's processes give their own), ``client`` (an
    address, ``a socket``), ``state`` and ``since``. A cluster of this machine that is down has none, nor has a deployment
    that is not there yet.

    Raises CommandExecutionError if that can't be found out: of an external server also if it does not answer.

    Source: https://www.postgresql.org/docs/current/monitoring-stats.html, ``pg_stat_activity``

    CLI Example:

    .. code-block:: bash

        salt-call synapse_postgres.sessions
    """
    return [{**row, "pid": int(row["pid"])} for row in _ask(SESSIONS)]


def terminate_sessions():
    """
    End every session of Synapse's role in the database.

    CLI Example:

    .. code-block:: bash

        salt-call synapse_postgres.terminate_sessions
    """
    _ask(TERMINATE)


def upgrade(version=None, method=None, jobs=None, kill=False, grace=None, gated=False):
    """
    Move Synapse's data to a newer major version of PostgreSQL, in phases: ``preflight``, while users are served; ``stop``,
    ``upgrade``, ``verify``, ``switch``, ``start``, ``check``, while nginx answers 503; ``open``; ``after-care``.

    Whatever fails before users are served again is undone: the old cluster serves, and Synapse is healthy. A run that was
    cut off is put right by the next one, which then goes on. The old cluster stays, down and disabled, until it is
    discarded by :func:`discard_old`; until then :func:`rollback` goes back to it.

    version
        The major version. Defaults to ``synapse:postgres:version``.

    method
        ``clone``: files share their blocks with the old cluster's, at any size in no time; the file system must have
        reflinks. ``copy``: files are copied. ``link``: both clusters have the same files, at any size in no time, but **there
        is no way back once the new one was started**. ``dump``: all is written as SQL and read again, for where the others
        can't be. Defaults to ``clone`` where it can be, else ``copy``.

    jobs
        How many processes work on it. Defaults to the number of processors.

    kill, grace
        See ``synapse_process.stop``.

    gated
        With ``synapse:nginx:managed: false``: whether a proxy of your own keeps users out until this has ended. Otherwise it
        does not begin, as it would lose what they write before all is checked.

    Returns a dict with ``cluster`` (where the data are), ``changed``, ``method``, ``kept`` (the old cluster),
    ``settings_left_behind`` (which the new version does not know) and ``seconds`` by phase.

    Raises CommandExecutionError that says what failed and what was undone.

    Source: https://www.postgresql.org/docs/current/pgupgrade.html

    CLI Example:

    .. code-block:: bash

        salt-call synapse_postgres.upgrade version=18
    """
    return __salt__["synapse_upgrade.run"](_target(version), method, jobs, kill, grace, gated)


def _target(version):
    settings = __salt__["synapse_pillar.settings"]()
    if not settings["postgres"]["managed"]:
        raise CommandExecutionError(
            "synapse:postgres:managed: false: upgrade it by its own means, between salt-call synapse_process.stop and start;"
            " synapse_postgres.remember before and synapse_postgres.verify after it tell whether all is there"
        )
    wanted = version if version is not None else settings["postgres"]["version"]
    if wanted is None:
        raise CommandExecutionError("synapse:postgres:version: is missing: to which version?")
    return wanted


def preflight(version=None, method=None, gated=False):
    """
    Do the first phase of :func:`upgrade` alone, and clean up after it: nothing is stopped. The packages of the new version
    stay.

    version, method, gated
        See :func:`upgrade`.

    Returns a dict with ``cluster`` (the one that would be made), ``method`` and ``settings_left_behind``.

    Raises CommandExecutionError that says what would keep the upgrade from going through.

    CLI Example:

    .. code-block:: bash

        salt-call synapse_postgres.preflight version=18
    """
    return __salt__["synapse_upgrade.preflight"](_target(version), method, gated)


def rollback(confirm=False, kill=False, grace=None, gated=False):
    """
    Go back to the cluster of before the last upgrade. What was written since then stays behind in the newer one, which is
    kept, down and disabled. A run that was cut off before users were served by the new
    cluster is put right, and that is all then. An after-care that fails does not keep anybody from going back.

    confirm
        Whether to do it. Otherwise only what would be lost is said.

    kill, grace
        See ``synapse_process.stop``.

    gated
        See :func:`upgrade`.

    Returns a dict with ``changed`` and ``lost``, and ``serves`` or ``would_serve``.

    Raises CommandExecutionError if there is no way back, or if it failed; then Synapse runs as before.

    CLI Example:

    .. code-block:: bash

        salt-call synapse_postgres.rollback
        salt-call synapse_postgres.rollback confirm=True
    """
    return __salt__["synapse_upgrade.go_back"](confirm, kill, grace, gated)


def discard_old(cluster):
    """
    Remove a cluster that an upgrade, or the way back from one, left behind, with its data. Return whether it was there.

    cluster
        Its name, such as ``15/main``. Never the one that Synapse's data are on.

    CLI Example:

    .. code-block:: bash

        salt-call synapse_postgres.discard_old 15/main
    """
    return __salt__["synapse_upgrade.discard"](cluster)


def status():
    """
    Return the last upgrade, or the one that is at work, as text for people: its phases, their times, how far it is.

    CLI Example:

    .. code-block:: bash

        salt-call synapse_postgres.status
    """
    return f"Synapse's data are on {cluster()}\n{__salt__['synapse_upgrade.status']()}"


def remember():
    """
    Note what is in Synapse's database, while Synapse is stopped, for :func:`verify`. So the work of others on it can be
    checked, such as the upgrade of an external PostgreSQL.

    Returns a dict with ``tables`` and ``rows``.

    Raises CommandExecutionError if Synapse runs, or the database can't be read, or is empty.

    CLI Example:

    .. code-block:: bash

        salt-call synapse_postgres.remember
    """
    left = __salt__["synapse_process.left"](__salt__["synapse_process.census"](memory=False))
    if left:
        raise CommandExecutionError(
            f"Synapse must be stopped first, by salt-call synapse_process.stop: there is {'; '.join(left)}"
        )
    found = __salt__["synapse_migration.contents_of"](_rows_of_database, rows=True)
    summary = _summary(found)
    if not summary["tables"]:
        raise CommandExecutionError("There is no table in Synapse's database: nothing could be compared with that")
    __salt__["synapse_files.write"](_remembered(), json.dumps(found, indent=1))
    return summary


def verify():
    """
    Compare Synapse's database with what :func:`remember` noted: tables, columns, indexes, constraints, triggers, functions,
    extensions, sequences, the rows of every table; and sequences with ``stream_positions``.

    Returns a dict with ``tables`` and ``rows``.

    Raises CommandExecutionError that names what differs.

    CLI Example:

    .. code-block:: bash

        salt-call synapse_postgres.verify
    """
    try:
        before = json.loads(_remembered().read_text(encoding="utf-8"))
    except FileNotFoundError as err:
        raise CommandExecutionError("Nothing was noted before: salt-call synapse_postgres.remember") from err
    found = __salt__["synapse_migration.contents_of"](_rows_of_database, rows=True)
    database = __salt__["synapse_pillar.settings"]()["postgres"]["database"]
    faults = __salt__["synapse_migration.differences"]({database: before}, {database: found})
    faults += __salt__["synapse_upgrade.lagging_sequences"](_rows_of_database)
    if faults:
        more = f"; and {len(faults) - 10} more" if len(faults) > 10 else ""
        raise CommandExecutionError(f"The database is not as it was: {'; '.join(faults[:10])}{more}")
    return _summary(found)


def _remembered():
    return pathlib.Path(__salt__["synapse_pillar.settings"]()["directories"]["data"], "postgres-remembered.json")


def _summary(contents):
    counts = [int(value) for item, value in contents.items() if item.startswith("rows ")]
    return {"tables": len(counts), "rows": sum(counts)}


def _rows_of_database(query):
    settings = __salt__["synapse_pillar.settings"]()
    if settings["postgres"]["managed"]:
        return __salt__["synapse_cluster.query"](cluster(), query, settings["postgres"]["database"])
    return _ask_external(settings, query)


def _ask(query):
    settings = __salt__["synapse_pillar.settings"]()
    if settings["postgres"]["managed"]:
        return _ask_managed(_about(query, settings["user"]["name"]))
    return _ask_external(settings, _about(query, settings["postgres"]["user"] or settings["user"]["name"]))


def _ask_managed(query):
    if not CLUSTERS.is_dir() or not _runs(version()):
        return []
    try:
        return __salt__["synapse_cluster.query"](cluster(), query)
    except CommandExecutionError as err:
        raise CommandExecutionError(f"The database can't be asked: {err}") from err


def _ask_external(settings, query):
    """By Synapse's own driver and credentials, from its image: this machine need not have any client of PostgreSQL's."""
    homeserver = f"{settings['directories']['config']}/homeserver.yaml"
    if not os.path.exists(homeserver):
        return []
    image = __salt__["synapse_image.wanted"](settings["image"])
    if not image["id"]:
        raise CommandExecutionError(
            f"The database can't be asked: the image {image['reference']} is not here. It comes by salt-call state.apply"
            " synapse.image"
        )
    arguments = __salt__["synapse_process.common_arguments"]()
    script = __salt__["cp.get_file_str"]("salt://synapse/postgres/files/query.py")
    done = _run(
        *("docker", "run", "--rm", *arguments, "--entrypoint=python3", image["id"]),
        *("-c", script, homeserver, query),
    )
    return _rows(done)


def _about(query, role):
    return query.format(role=role.replace("'", "''"))


def _rows(done):
    if done["retcode"] != 0:
        raise CommandExecutionError(f"The database can't be asked: {done['stderr'] or done['stdout']}")
    return list(csv.DictReader(io.StringIO(done["stdout"])))


def _run(*command):
    return __salt__["cmd.run_all"](list(command), python_shell=False, ignore_retcode=True, output_loglevel="quiet")
