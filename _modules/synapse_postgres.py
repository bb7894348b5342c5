"""
Synapse's PostgreSQL cluster: which one it is, and how it is set.
"""

import pathlib

from salt.exceptions import CommandExecutionError

CLUSTERS = pathlib.Path("/etc/postgresql")

# The PostgreSQL that a release's packages bring.
PACKAGED = {"Debian": {12: 15, 13: 17}}


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
    Return the settings that the formula gives PostgreSQL: ``max_connections`` for the plan, and over it the pillar's own.

    CLI Example:

    .. code-block:: bash

        salt-call synapse_postgres.options
    """
    needed = __salt__["synapse_workers.plan"]()["max_connections"]
    return {"max_connections": needed, **__salt__["synapse_pillar.settings"]()["postgres"]["options"]}
