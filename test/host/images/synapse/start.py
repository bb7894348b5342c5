#!/usr/bin/python3
"""The official Synapse image's way in, as far as the formula may rely on it.

``run [ARGUMENT...]`` becomes ``python ARGUMENT...`` with jemalloc. A process started as root drops
to $UID:$GID, by default 991:991; one started as somebody else stays who it is.
"""

import os
import platform
import sys

JEMALLOC = f"/usr/lib/{platform.machine()}-linux-gnu/libjemalloc.so.2"


def main(mode="run", *arguments):
    if mode != "run":
        sys.exit(f"Unknown execution mode '{mode}'")

    command = [sys.executable]
    if "UID" in os.environ or os.getuid() == 0:
        owner = f"{os.environ.get('UID', 991)}:{os.environ.get('GID', 991)}"
        command = ["/usr/sbin/gosu", owner, *command]
    if "-m" not in arguments:
        command += ["-m", os.environ.get("SYNAPSE_WORKER", "synapse.app.homeserver")]
    command += arguments
    if not any(argument.startswith(("-c", "--config-path")) for argument in arguments):
        directory = os.environ.get("SYNAPSE_CONFIG_DIR", "/data")
        command += ["-c", os.environ.get("SYNAPSE_CONFIG_PATH", f"{directory}/homeserver.yaml")]

    print("Starting synapse with args", *command, file=sys.stderr, flush=True)
    os.execve(command[0], command, {**os.environ, "LD_PRELOAD": JEMALLOC})


if __name__ == "__main__":
    main(*sys.argv[1:])
