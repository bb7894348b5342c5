"""
Files that are whole or as they were, whatever happens meanwhile.
"""

import contextlib
import os


def write(path, content, gid=0, mode=0o600, uid=0):
    """
    Write a file: after a crash or a power failure it is the one before, or this one.

    path
        Its path, absolute. Who else may write to its directory can spoil this file, but no other: no link is followed.

    content
        A string or bytes.

    gid
        Its group's id.

    mode
        Its mode, a number.

    uid
        Its owner's id.

    Raises OSError.

    CLI Example:

    .. code-block:: bash

        salt-call synapse_files.write /etc/motd "hello" mode=420
    """
    draft = f"{path}.new"
    with contextlib.suppress(FileNotFoundError):
        os.unlink(draft)
    try:
        with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fchown(file.fileno(), uid, gid)
            os.fchmod(file.fileno(), mode)
            os.fsync(file.fileno())
        os.replace(draft, path)
    except BaseException:
        # It may hold a secret, and on a full disk it takes space.
        with contextlib.suppress(OSError):
            os.unlink(draft)
        raise
    sync(os.path.dirname(path))


def sync(path):
    """
    Have a file, or the names in a directory, on disk.

    path
        Its path.

    CLI Example:

    .. code-block:: bash

        salt-call synapse_files.sync /etc
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
