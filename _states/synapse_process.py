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


def stopped(name, reason="state.apply", kill=False, grace=None):
    """
    Synapse is proven to be stopped, and stays so: see ``synapse_process.stop``.

    name
        In whose name the lock is taken; only that name ends it.

    reason
        What for; whoever meets the lock reads it.

    kill
        Whether what does not end by itself may be killed.

    grace
        Seconds that processes have to end. Defaults to ``synapse:process:stop_grace``.
    """
    ret = {"name": name, "result": True, "comment": "Synapse is stopped and locked", "changes": {}}
    try:
        left = __salt__["synapse_process.left"](__salt__["synapse_process.census"](memory=False))
        held = __salt__["synapse_maintenance.holder"]()
        if held and held["holder"] != name:
            raise CommandExecutionError(__salt__["synapse_maintenance.fault"]())
        if held and not left and __salt__["synapse_maintenance.closed"]():
            return ret
        if __opts__["test"]:
            ret.update(result=None, comment="Synapse would be stopped and locked")
            ret["changes"] = {item: {"old": "running", "new": "stopped"} for item in left}
        else:
            done = __salt__["synapse_process.stop"](name, reason, kill, grace)
            ret["changes"] = {item: {"old": "running", "new": "stopped"} for item in done["stopped"]}
        if not held:
            ret["changes"]["lock"] = {"old": None, "new": name}
    except (CommandExecutionError, SaltInvocationError) as err:
        ret.update(result=False, comment=str(err), changes={})
    return ret


def started(name):
    """
    The maintenance is over: see ``synapse_process.start``.

    name
        In whose name the lock was taken.
    """
    ret = {"name": name, "result": True, "comment": "Synapse is not under maintenance", "changes": {}}
    try:
        held = __salt__["synapse_maintenance.holder"]()
        if not held and not __salt__["synapse_maintenance.closed"]():
            return ret
        if held and held["holder"] != name:
            raise CommandExecutionError(__salt__["synapse_maintenance.fault"]())
        unfinished = __salt__["synapse_maintenance.unfinished"]()
        if unfinished:
            raise CommandExecutionError(unfinished)
        ret["changes"] = {"lock": {"old": held and held["holder"], "new": None}}
        if __opts__["test"]:
            ret.update(result=None, comment="Synapse would be started")
            return ret
        names = __salt__["synapse_process.start"](name)
        ret["comment"] = f"{len(names)} processes are healthy"
    except (CommandExecutionError, SaltInvocationError) as err:
        ret.update(result=False, comment=str(err), changes={})
    return ret


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
