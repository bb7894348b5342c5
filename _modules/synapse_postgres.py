"""
Synapse's PostgreSQL cluster: which one it is, and how it is set.
"""

import csv
import io
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
    Return the PostgreSQL major version that Synapse's database is on, as an integer: the pillar's, else that of the only
    cluster on this machine, else what the distribution packages.

    Raises CommandExecutionError where that does not tell.

    CLI Example:

    .. code-block:: bash

        salt-call synapse_postgres.version
    """
    given = __salt__["synapse_pillar.settings"]()["postgres"]["version"]
    if given is not None:
        return given
    there = sorted(int(path.parent.name) for path in CLUSTERS.glob("*/main") if path.parent.name.isdecimal())
    if len(there) == 1:
        return there[0]
    packaged = PACKAGED.get(__grains__.get("os"), {}).get(__grains__.get("osmajorrelease"))
    if there or packaged is None:
        raise CommandExecutionError(
            f"synapse:postgres:version: is missing: this machine has the clusters {there or 'none'}; say which is Synapse's"
        )
    return packaged


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
    address, ``a socket``), ``state`` and ``since``. A server that is down has none.

    Raises CommandExecutionError if that can't be found out.

    Source: https://www.postgresql.org/docs/current/monitoring-stats.html, ``pg_stat_activity``

    CLI Example:

    .. code-block:: bash

        salt-call synapse_postgres.sessions
    """
    return _ask(SESSIONS)


def terminate_sessions():
    """
    End every session of Synapse's role in the database.

    CLI Example:

    .. code-block:: bash

        salt-call synapse_postgres.terminate_sessions
    """
    _ask(TERMINATE)


def _ask(query):
    settings = __salt__["synapse_pillar.settings"]()
    return _ask_managed(settings, query) if settings["postgres"]["managed"] else _ask_external(settings, query)


def _ask_managed(settings, query):
    if not CLUSTERS.is_dir():
        return []
    cluster = f"--cluster={version()}/main"
    # pg_isready(1): 2 says that nobody answered.
    if _run("pg_isready", cluster)["retcode"] == 2:
        return []
    done = _run(
        *("runuser", "--user=postgres", "--", "psql", cluster, "--no-psqlrc", "--csv", "--dbname=postgres"),
        *("--command", _about(query, settings["user"]["name"])),
    )
    return _rows(done)


def _ask_external(settings, query):
    """By Synapse's own driver and credentials, from its image: this machine need not have any client of PostgreSQL's."""
    image = __salt__["synapse_image.wanted"](settings["image"])
    if not image["id"]:
        return []
    arguments = __salt__["synapse_process.common_arguments"]()
    script = __salt__["cp.get_file_str"]("salt://synapse/postgres/files/query.py")
    homeserver = f"{settings['directories']['config']}/homeserver.yaml"
    done = _run(
        *("docker", "run", "--rm", *arguments, "--entrypoint=python3", image["id"]),
        *("-c", script, homeserver, _about(query, settings["postgres"]["user"] or settings["user"]["name"])),
    )
    return _rows(done)


def _about(query, role):
    return query.format(role=role.replace("'", "''"))


def _rows(done):
    if done["retcode"] != 0:
        raise CommandExecutionError(
            f"The database can't be asked for Synapse's sessions: {done['stderr'] or done['stdout']}"
        )
    return [{**row, "pid": int(row["pid"])} for row in csv.DictReader(io.StringIO(done["stdout"])) if row.get("pid")]


def _run(*command):
    return __salt__["cmd.run_all"](list(command), python_shell=False, ignore_retcode=True, output_loglevel="quiet")
