"""
Synapse's processes, as states. One state holds all of them: writing, reloading, starting and removing is done in batches.
"""

from salt.exceptions import CommandExecutionError, SaltInvocationError


def running(name):
    """
    Every process of the plan has its unit, and runs with what the pillar says; each is started or restarted at most once.
    Where ``synapse:process:running`` is false, each is stopped, and its unit disabled.

    name
        A sentence; only shown.

    Changes have an entry for each process, old and new: ``absent``, ``stopped``, ``outdated`` (it runs, but not with what
    the pillar says), ``running``; and ``unit`` where only the unit's file or its enablement changes.
    """
    ret = {"name": name, "result": True, "comment": "Every process runs with what the pillar says", "changes": {}}
    try:
        todo = __salt__["synapse_process.pending"]()
        changes = _changes(todo)
        if not changes:
            return ret
        if __opts__["test"]:
            ret.update(result=None, changes=changes, comment=f"{len(changes)} processes would be changed")
            return ret
        __salt__["synapse_process.apply"](todo)
        ret.update(changes=changes, comment=f"{len(changes)} processes were changed")
    except (CommandExecutionError, SaltInvocationError) as err:
        ret.update(result=False, comment=str(err))
    return ret


def _changes(todo):
    known = __salt__["synapse_process.present"]()
    changes = {}
    for key, old, new in (
        ("enable", "unit", "unit enabled"),
        ("disable", "unit", "unit disabled"),
        ("write", "unit", "unit written"),
        ("stop", "running", "stopped"),
        ("start", "stopped", "running"),
        ("restart", "outdated", "running"),
    ):
        for name in todo[key]:
            changes[name] = {"old": old if name in known else "absent", "new": new}
    return changes


def pruned(name, keep=None):
    """
    No process but those of the plan has left a unit, a container, a configuration file or a socket.

    name
        A sentence; only shown.

    keep
        A list of process names to keep. Defaults to those of the plan; an empty list removes every process.
    """
    ret = {"name": name, "result": True, "comment": "There is nothing to remove", "changes": {}}
    try:
        if keep is None:
            keep = __salt__["synapse_workers.names"]()
        gone = [item for item in __salt__["synapse_process.present"]() if item not in keep]
        files = __salt__["synapse_config.superfluous"]() if keep else []
        if not gone and not files:
            return ret
        ret["changes"] = {item: {"old": "present", "new": None} for item in [*gone, *files]}
        if __opts__["test"]:
            ret.update(result=None, comment=f"{len(gone)} processes and {len(files)} files would be removed")
            return ret
        __salt__["synapse_process.prune"](keep)
        for path in files:
            __salt__["file.remove"](path)
        ret["comment"] = f"{len(gone)} processes and {len(files)} files were removed"
    except (CommandExecutionError, SaltInvocationError) as err:
        ret.update(result=False, comment=str(err), changes={})
    return ret
