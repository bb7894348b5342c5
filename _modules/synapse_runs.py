"""
What a run needs that takes its time: that no other is at work, and that nobody breaks off its way back.
"""

import contextlib
import fcntl
import signal
import threading

from salt.exceptions import CommandExecutionError

# How often something is tried that others at work may thwart.
ATTEMPTS = 5


@contextlib.contextmanager
def alone(path, otherwise):
    """
    A context in which no other run is at work. The kernel ends it with the process, if that dies.

    A terminal that goes away ends the run as Ctrl-C does, with its way back; by default it would end on the spot.

    path
        The file that is locked.

    otherwise
        What is said if another run is at work.

    Raises CommandExecutionError if another run is at work.

    Source: flock(2)
    """
    with open(path, "w", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as err:
            raise CommandExecutionError(otherwise) from err
        # Who runs it by nohup has said what to do then.
        ours = [signal.SIGHUP] if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL else []
        with _handling(_hang_up, *ours):
            yield


def _hang_up(*_):
    raise KeyboardInterrupt("its terminal was closed")


def busy(path):
    """
    Return whether a run is at work.

    path
        The file that :func:`alone` locks.

    CLI Example:

    .. code-block:: bash

        salt-call synapse_runs.busy /var/lib/matrix-synapse/postgres-upgrade.lock
    """
    try:
        with open(path, encoding="utf-8") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return False
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True


def persist(do, passing):
    """
    Do something that others at work may thwart, again and again until it succeeds; but not for ever.

    do
        A function.

    passing
        What stands in the error if it is worth another try.

    Raises CommandExecutionError if it fails for another reason, or too often.
    """
    for _ in range(ATTEMPTS - 1):
        try:
            return do()
        except CommandExecutionError as err:
            if passing not in str(err):
                raise
    return do()


def undisturbed():
    """
    A context that no signal ends but SIGKILL: neither the run, nor the programs that it starts meanwhile.
    """
    return _handling(signal.SIG_IGN, signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def _handling(handler, *numbers):
    # Only there can it be said, and only there it matters.
    numbers = numbers if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, former)
