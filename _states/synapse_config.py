"""
The files that Synapse reads, as states.
"""

from salt.exceptions import CommandExecutionError, SaltInvocationError


def managed(name, image):
    """
    All configuration files of the plan are as the pillar says. Synapse's parser accepts every one before any is replaced.

    name
        The directory they stand in; only shown.

    image
        The reference of the image whose Synapse shall accept them.

    Changes tell which files are new or changed, never what is in them. Among them is ``accepted-by``, where another image
    is wanted than the one that accepted the configuration.
    """
    ret = {"name": name, "result": True, "comment": "All configuration files are as they should be", "changes": {}}
    try:
        pending = __salt__["synapse_config.pending"]()
        if not pending:
            return ret
        ret["changes"] = {
            path: {"old": "out of date" if __salt__["file.file_exists"](path) else None, "new": "written"}
            for path in pending
        }
        if __opts__["test"]:
            ret["result"] = None
            ret["comment"] = f"{len(pending)} configuration files would be written"
            return ret
        ret["comment"] = f"{len(__salt__['synapse_config.write'](image))} configuration files were written"
    except (CommandExecutionError, SaltInvocationError) as err:
        ret.update(result=False, comment=str(err), changes={})
    return ret


def secrets_exist(name):
    """
    The signing key and the secrets exist: the pillar's, else random ones that are made once and then stay.

    name
        The directory they stand in; only shown.
    """
    ret = {"name": name, "result": True, "comment": "All secrets are there", "changes": {}}
    try:
        pending = __salt__["synapse_config.pending_secrets"]()
        if not pending:
            return ret
        ret["changes"] = {
            item: {"old": "out of date" if __salt__["file.file_exists"](f"{name}/{item}") else None, "new": "written"}
            for item in pending
        }
        if __opts__["test"]:
            ret["result"] = None
            ret["comment"] = f"{len(pending)} secrets would be written"
            return ret
        __salt__["synapse_config.write_secrets"]()
        ret["comment"] = f"{len(pending)} secrets were written"
    except (CommandExecutionError, SaltInvocationError) as err:
        ret.update(result=False, comment=str(err), changes={})
    return ret
