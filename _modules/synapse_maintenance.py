"""
Maintenance: the lock that keeps every Synapse process from starting, and the switch that lets nginx say so to clients.

Both are files, so that they outlive the run that made them, a reload of nginx and a reboot of the machine. Every unit
asserts that the lock is not there; nginx looks for the switch at each request.
"""

import datetime
import json
import os
import pathlib

from salt.exceptions import CommandExecutionError

SWITCH = pathlib.Path("/etc/nginx/matrix-synapse.maintenance")


def lock_file():
    """
    Return the path of the lock.

    CLI Example:

    .. code-block:: bash

        salt-call synapse_maintenance.lock_file
    """
    return f"{__salt__['synapse_pillar.settings']()['directories']['data']}/maintenance.json"


def switch_file():
    """
    Return the path of the switch.

    CLI Example:

    .. code-block:: bash

        salt-call synapse_maintenance.switch_file
    """
    return str(SWITCH)


def holder():
    """
    Return who holds the lock, a dict with ``holder``, ``since`` (ISO 8601) and ``reason``; None if nobody does.

    CLI Example:

    .. code-block:: bash

        salt-call synapse_maintenance.holder
    """
    try:
        text = pathlib.Path(lock_file()).read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    try:
        found = json.loads(text)
        return {key: str(found[key]) for key in ("holder", "since", "reason")}
    except (ValueError, KeyError, TypeError):
        # One that somebody made by hand keeps the units from starting all the same.
        return {"holder": "somebody", "since": "an unknown time", "reason": text.strip()}


def fault():
    """
    Return a sentence that says who holds the lock, since when and how to end it; None if nobody does.

    CLI Example:

    .. code-block:: bash

        salt-call synapse_maintenance.fault
    """
    held = holder()
    return held and _sentence(held)


def _sentence(held):
    end = f"To end it: salt-call synapse_process.start holder='{held['holder']}'"
    return (
        f"Synapse is under maintenance: {held['holder']} holds the lock {lock_file()} since {held['since']}"
        f" ({held['reason']}). Until it ends nothing starts and nothing changes. {unfinished() or end}"
    )


def unfinished():
    """
    Return a sentence that says which work on the database is not finished, and how to put it right; None if all is. To start
    Synapse in the middle of it would let users write what its way back destroys.

    CLI Example:

    .. code-block:: bash

        salt-call synapse_maintenance.unfinished
    """
    return __salt__["synapse_upgrade.fault"]() or __salt__["synapse_backup.fault"]()


def at_work():
    """
    Return a sentence that says which work on the database is going on now; None if there is none.

    CLI Example:

    .. code-block:: bash

        salt-call synapse_maintenance.at_work
    """
    going_on = __salt__["synapse_upgrade.running"]() or __salt__["synapse_backup.busy"]()
    return unfinished() if going_on else None


def lock(name, reason):
    """
    Take the lock. Who has it already may take it again. Return whether it was free.

    name
        Who takes it.

    reason
        What for, for whoever meets the lock.

    Raises CommandExecutionError if somebody else holds it.

    CLI Example:

    .. code-block:: bash

        salt-call synapse_maintenance.lock "alice" "new disks"
    """
    path = lock_file()
    since = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    draft = f"{path}.{os.getpid()}.new"
    try:
        with open(draft, "w", encoding="utf-8") as file:
            json.dump({"holder": name, "since": since, "reason": reason}, file)
            file.flush()
            os.fsync(file.fileno())
    except FileNotFoundError as err:
        raise CommandExecutionError(f"{os.path.dirname(path)} is not there: is Synapse deployed here?") from err
    try:
        # Whole from the beginning, and only one of two can be first.
        while not _link(draft, path):
            # Else it was given back in between.
            if held := holder():
                if held["holder"] != name:
                    raise CommandExecutionError(_sentence(held))
                return False
    finally:
        os.unlink(draft)
    __salt__["synapse_files.sync"](os.path.dirname(path))
    return True


def _link(draft, path):
    try:
        os.link(draft, path)
    except FileExistsError:
        return False
    return True


def unlock(name):
    """
    Give the lock back. Return whether there was one.

    name
        Who holds it.

    Raises CommandExecutionError if somebody else does.

    CLI Example:

    .. code-block:: bash

        salt-call synapse_maintenance.unlock "alice"
    """
    held = holder()
    if held is None:
        return False
    if held["holder"] != name:
        raise CommandExecutionError(_sentence(held))
    pathlib.Path(lock_file()).unlink()
    return True


def close():
    """
    Let nginx answer 503 to everything that Synapse would have to answer. Return whether it did not yet.

    CLI Example:

    .. code-block:: bash

        salt-call synapse_maintenance.close
    """
    if closed() or not SWITCH.parent.is_dir():
        return False
    SWITCH.touch(mode=0o644)
    return True


def open_():
    """
    Let nginx pass requests on again. Return whether it did not.

    CLI Example:

    .. code-block:: bash

        salt-call synapse_maintenance.open
    """
    was = closed()
    SWITCH.unlink(missing_ok=True)
    return was


def closed():
    """
    Return whether nginx answers 503.

    CLI Example:

    .. code-block:: bash

        salt-call synapse_maintenance.closed
    """
    return SWITCH.exists()


def closed_fault():
    """
    Return a sentence if nginx answers 503 though nobody holds the lock, as after a start that was cut off; None otherwise.

    CLI Example:

    .. code-block:: bash

        salt-call synapse_maintenance.closed_fault
    """
    if holder() or not closed():
        return None
    return (
        f"nginx answers 503 to every user, since {SWITCH} is there, though nobody holds the lock: a start is at work or was"
        " cut off, or not every process became healthy. salt-call synapse_process.start opens it"
    )


__func_alias__ = {"open_": "open"}
