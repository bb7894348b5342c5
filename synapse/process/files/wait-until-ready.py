#!/usr/bin/python3 -IS
"""
Waits until a Synapse process is ready, without polling: wait-until-ready MAINPID NOTIFY_SOCKET HEALTH_SOCKET

Synapse reports READY=1 by sd_notify(3) when all its listeners are bound. systemd would refuse the message, because it
comes out of a container's control group, so this program takes it: an ExecStartPost= of the process's unit. It gives up
as soon as the unit's main process ends; the unit's TimeoutStartSec= bounds the rest.
"""

import contextlib
import os
import select
import socket
import sys


def bind(path):
    """A datagram socket at the path, which any user can send to."""
    receiver = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    os.umask(0o111)
    receiver.bind(path)
    return receiver


def answers(path):
    """Whether the process answers GET /health on its Unix socket."""
    with socket.socket(socket.AF_UNIX) as health:
        # No timeout: READY=1 comes only once, and on a busy machine the answer may be long in coming after it.
        try:
            health.connect(path)
            health.sendall(b"GET /health HTTP/1.0\r\n\r\n")
            return b" 200 " in health.recv(64)
        except OSError:
            return False


def main(pid, notify_path, health_path):
    process = os.pidfd_open(pid)
    with bind(notify_path) as receiver:
        events = select.poll()
        events.register(receiver, select.POLLIN)
        events.register(process, select.POLLIN)
        # It may have been ready before the socket was there.
        ready = answers(health_path)
        while not ready:
            if any(descriptor == process for descriptor, _ in events.poll()):
                sys.exit("the process ended before it was ready")
            ready = b"READY=1" in receiver.recv(4096).split() and answers(health_path)
    os.unlink(notify_path)


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
