"""
The rolling restart: Synapse's processes one after the other, while users are served.

A process is taken from nginx by the mode of its public socket: nginx, which may not enter any more, goes to the process's
peers, or waits at the gate if it has none, without being told anything. As each request has a connection of its own, the
requests in flight are the connections that are left. The socket that the process binds next has its usual mode.
"""

import contextlib
import os
import pathlib
import stat
import time

from salt.exceptions import CommandExecutionError, SaltInvocationError

EVENT = "synapse/rolling"
# Of a socket in /proc/net/unix that has a client, and of one that is not accepted yet: socket_state in linux/net.h.
CONNECTED = ("02", "03")
AT_WORK = "A rolling restart of Synapse's processes is at work: wait until it has ended"
# Seconds that requests in flight have when all processes restart. Whatever takes longer is most likely a sync that waits for
# events, and nobody is served meanwhile.
TOGETHER = 5


def restart(names=None, drain=None):
    """
    Restart processes one after the other: no new request goes to a process, those that it works on come to their end, it
    restarts and is healthy, it gets requests again. The main process restarts without its workers.

    names
        A list of process names. Defaults to all that run, the main process first.

    drain
        Seconds that the requests in flight have to come to their end. Defaults to ``synapse:process:drain_timeout``.

    Returns a list of dicts, one for each process: ``name``, ``drained`` (seconds), ``cut_off`` (requests that were still in
    flight then) and ``restarted`` (seconds).

    Raises SaltInvocationError for an argument that is none; CommandExecutionError if Synapse is under maintenance, if another
    run is at work, if what all processes share waits to be applied, or with the end of its journal if a process does not become
    healthy: the rest is not touched then.

    CLI Example:

    .. code-block:: bash

        salt-call synapse_rolling.restart
        salt-call synapse_rolling.restart '[matrix-synapse-worker-0-generic]' drain=60
    """
    drain = __salt__["synapse_pillar.settings"]()["process"]["drain_timeout"] if drain is None else drain
    sockets = _public_sockets()
    if names is None:
        states = __salt__["synapse_process.states"](list(sockets))
        names = [name for name in sockets if states[name]["ActiveState"] != "inactive"]
    _check(names, drain, sockets)
    # Which also knows whether anything speaks against it.
    if __salt__["synapse_process.restarts_together"](__salt__["synapse_process.pending"]()):
        raise CommandExecutionError(
            "What all processes share has changed, so that they must restart together: salt-call state.apply synapse"
        )
    done = []
    with _alone():
        for number, name in enumerate(names):
            _tell(f"{name} ({number + 1} of {len(names)}) ...")
            try:
                done.append(_restart(name, sockets[name], drain))
            except CommandExecutionError as err:
                rest = f"\nNot restarted: {', '.join(names[number + 1 :])}" if names[number + 1 :] else ""
                raise CommandExecutionError(f"{err}{rest}") from err
    return done


def restart_together(names):
    """
    Restart the main process, and with it its workers, since what they share has changed. New requests wait meanwhile; those
    that are at work come to their end, if they do within a few seconds.

    names
        The processes that restart.

    Raises CommandExecutionError if the main process does not become healthy, with the end of its journal, or if a rolling
    restart is at work.

    CLI Example:

    .. code-block:: bash

        salt-call synapse_rolling.restart_together '[matrix-synapse, matrix-synapse-worker-0-generic]'
    """
    sockets = _public_sockets()
    paths = [sockets[name] for name in names if sockets[name]]
    with _alone(), contextlib.ExitStack() as all_shut:
        for path in paths:
            all_shut.enter_context(shut(path))
        _drain(paths, TOGETHER)
        __salt__["synapse_process.restart"]("matrix-synapse", alone=False)


def _public_sockets():
    """Those that nginx passes requests to, by process; None for one that it has nothing for."""
    managed = __salt__["synapse_pillar.settings"]()["nginx"]["managed"]
    planned = __salt__["synapse_workers.plan"]()["processes"]
    return {process["name"]: process["public_socket"] if managed else None for process in planned}


def _check(names, drain, planned):
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise SaltInvocationError(f"names: {names!r} is not a list of process names")
    unknown = [name for name in names if name not in planned]
    if unknown:
        raise SaltInvocationError(f"names: there is no {', '.join(unknown)}; there are {', '.join(planned)}")
    if isinstance(drain, bool) or not isinstance(drain, int | float) or drain < 0:
        raise SaltInvocationError(f"drain: {drain!r} is not a number of seconds")


def _restart(name, public_socket, drain):
    begin = time.monotonic()
    with shut(public_socket):
        cut_off = _drain([public_socket], drain) if public_socket else 0
        drained = time.monotonic()
        __salt__["synapse_process.restart"](name)
    return {
        "name": name,
        "drained": round(drained - begin, 1),
        "cut_off": cut_off,
        "restarted": round(time.monotonic() - drained, 1),
    }


@contextlib.contextmanager
def shut(path):
    """Nobody but root can enter a socket any more. It opens again if it is still there in the end."""
    with _socket(path) as opened:
        if opened is None:
            yield
            return
        mode = os.stat(opened).st_mode & 0o777
        os.chmod(opened, 0)
        try:
            yield
        finally:
            # Also where it was removed: the process's new one is another.
            os.chmod(opened, mode)


@contextlib.contextmanager
def _socket(path):
    """A name for a socket that keeps its meaning, None if there is none: Synapse, which makes it, could put a link in its place."""
    try:
        descriptor = os.open(path, os.O_PATH | os.O_NOFOLLOW) if path else None
    except FileNotFoundError:
        descriptor = None
    if descriptor is None:
        yield None
        return
    try:
        yield f"/proc/self/fd/{descriptor}" if stat.S_ISSOCK(os.fstat(descriptor).st_mode) else None
    finally:
        os.close(descriptor)


def taken_out():
    """
    Return the names of the processes that nginx may not enter, as a restart is at work on them, or was cut off.

    CLI Example:

    .. code-block:: bash

        salt-call synapse_rolling.taken_out
    """
    return [name for name, path in _public_sockets().items() if _is_shut(path)]


def _is_shut(path):
    with _socket(path) as opened:
        return opened is not None and os.stat(opened).st_mode & 0o777 == 0


def fault():
    """
    Return a sentence if a rolling restart is at work: it would start processes with what an apply writes meanwhile, beside
    others without it. None if none is.

    CLI Example:

    .. code-block:: bash

        salt-call synapse_rolling.fault
    """
    return AT_WORK if __salt__["synapse_runs.busy"](_lock_file()) else None


def _lock_file():
    return f"{__salt__['synapse_pillar.settings']()['directories']['run']}/root/rolling.lock"


def _alone():
    """Two runs could take a process and its peer."""
    return __salt__["synapse_runs.alone"](_lock_file(), AT_WORK)


def _drain(paths, seconds):
    """Wait until no request is in flight; return how many are after the time."""
    deadline = time.monotonic() + seconds
    while (left := _connections(paths)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left


def _connections(paths):
    """How many connections there are to sockets. The kernel lists them where the clients are, on this host: proc(5)."""
    ends = tuple(f" {path}" for path in paths)
    rows = pathlib.Path("/proc/net/unix").read_text(encoding="utf-8", errors="replace").splitlines()
    # Num RefCount Protocol Flags Type St Inode Path
    return sum(row.split()[5] in CONNECTED and row.endswith(ends) for row in rows[1:])


def _tell(text):
    __salt__["synapse_progress.tell"](EVENT, text)
