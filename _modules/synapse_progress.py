"""
What long work tells of itself while it is at it.
"""

import contextlib
import sys


def tell(tag, text):
    """
    Show a line to whoever runs the work: on the console of ``salt-call``, or by the master's event bus, where the runner
    ``synapse_progress.follow`` prints it.

    tag
        The event's tag, such as ``synapse/rolling``.

    text
        A line.

    CLI Example:

    .. code-block:: bash

        salt-call synapse_progress.tell synapse/rolling "half of it is done"
    """
    if __opts__.get("__cli") == "salt-call":
        # A console that is gone is no reason to fail, least of all on a way back.
        with contextlib.suppress(OSError):
            print(f"{tag}: {text}", file=sys.stderr, flush=True)
    else:
        __salt__["event.fire_master"]({"text": text}, tag)
