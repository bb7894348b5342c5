"""
Shows on the console of ``salt-run`` what minions tell while they are at work.
"""

import sys
import time

import salt.utils.event


def follow(tag, seconds):
    """
    Print what minions tell under a tag, each line with the minion's name, until :func:`end`.

    tag
        The event's tag.

    seconds
        When to give up.

    CLI Example:

    .. code-block:: bash

        salt-run synapse_progress.follow synapse/postgres/upgrade 600
    """
    deadline = time.monotonic() + seconds
    with salt.utils.event.get_event("master", __opts__["sock_dir"], opts=__opts__, listen=True) as bus:
        while time.monotonic() < deadline:
            event = bus.get_event(wait=1, tag=tag, full=True)
            if event is None:
                continue
            if event["tag"] == f"{tag}/end":
                return True
            # Standard output is the result, which may be read by a program.
            print(
                f"{event['data'].get('id')}: {event['data'].get('data', {}).get('text')}", file=sys.stderr, flush=True
            )
    return False


def end(tag):
    """
    Have :func:`follow` end.

    tag
        The event's tag.

    CLI Example:

    .. code-block:: bash

        salt-run synapse_progress.end synapse/postgres/upgrade
    """
    return __salt__["event.send"](f"{tag}/end")
