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

    def write():
        return __salt__["synapse_config.write"](image)

    return _written(name, "configuration files", __salt__["synapse_config.pending"], write)


def secrets_exist(name):
    """
    The signing key and the secrets exist: the pillar's, else random ones that are made once and then stay.

    name
        The directory they stand in; only shown.
    """
    pending, write = __salt__["synapse_config.pending_secrets"], __salt__["synapse_config.write_secrets"]
    return _written(name, "secrets", pending, write, directory=f"{name}/")


def _written(name, what, pending, write, directory=""):
    ret = {"name": name, "result": True, "comment": f"All {what} are as they should be", "changes": {}}
    try:
        changes = {
            item: {
                "old": "out of date" if __salt__["file.file_exists"](f"{directory}{item}") else None,
                "new": "written",
            }
            for item in pending()
        }
        if not changes:
            return ret
        if __opts__["test"]:
            ret.update(result=None, changes=changes, comment=f"{len(changes)} {what} would be written")
            return ret
        ret.update(comment=f"{len(write())} {what} were written", changes=changes)
    except (CommandExecutionError, SaltInvocationError) as err:
        ret.update(result=False, comment=str(err))
    return ret
