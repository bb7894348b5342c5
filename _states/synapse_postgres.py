"""
Synapse's PostgreSQL cluster, as states.
"""

from salt.exceptions import CommandExecutionError


def recorded(name):
    """
    It is recorded which cluster holds Synapse's data, so that no other is ever taken for it.

    name
        The cluster, such as ``15/main``.
    """
    ret = {"name": name, "result": True, "comment": f"{name} is recorded", "changes": {}}
    try:
        old = __salt__["synapse_upgrade.record"]()
        if old == name:
            return ret
        if old:
            raise CommandExecutionError(__salt__["synapse_postgres.fault"]() or f"Synapse's data are on {old}")
        ret["changes"] = {"cluster": {"old": None, "new": name}}
        if __opts__["test"]:
            ret.update(result=None, comment=f"{name} would be recorded")
            return ret
        __salt__["synapse_upgrade.write_record"](name)
    except CommandExecutionError as err:
        ret.update(result=False, comment=str(err), changes={})
    return ret
