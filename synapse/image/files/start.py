#!/usr/bin/python3 -IS
"""
Entry point of the self-built image, called as the official image's is:

    run -m synapse.app.generic_worker -c /data/homeserver.yaml -c /data/worker.yaml

It preloads jemalloc and becomes the Synapse process. It changes no owner and no user:
the container's --user is the identity.
"""

import os
import sys

PYTHON = "/usr/bin/python3"
JEMALLOC = f"/usr/lib/{os.uname().machine}-linux-gnu/libjemalloc.so.2"


def main(mode="run", *args):
    if mode != "run":
        sys.exit(f"start.py: unknown mode '{mode}', this image knows only 'run'")
    if "-m" not in args:
        args = ("-m", os.environ.get("SYNAPSE_WORKER", "synapse.app.homeserver"), *args)
    if not any(arg.startswith(("-c", "--config-path")) for arg in args):
        args += ("-c", os.environ.get("SYNAPSE_CONFIG_PATH", "/data/homeserver.yaml"))
    if os.path.isfile(JEMALLOC):
        os.environ.setdefault("LD_PRELOAD", JEMALLOC)
    os.execv(PYTHON, [PYTHON, *args])


main(*sys.argv[1:])
