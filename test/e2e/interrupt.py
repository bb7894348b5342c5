#!/usr/bin/python3
"""
Runs in the host: interrupt PHASE FILE SIGNAL COMMAND... sends a command a signal as soon as the journal of PostgreSQL's upgrade
shows a phase and, unless FILE is "-", the file is there too; prints the phase that was reached, and the command's process id.
"""

import json
import os
import subprocess
import sys
import time

JOURNAL = "/var/lib/matrix-synapse/postgres-upgrade.json"


def phase():
    try:
        with open(JOURNAL, encoding="utf-8") as file:
            journal = json.load(file)
    except FileNotFoundError:
        return None
    return journal["phases"][-1]["name"] if journal["phases"] and not journal["outcome"] else None


def main(wanted, file, signal, *command):
    with open("/var/log/interrupted.log", "w", encoding="utf-8") as log:
        run = subprocess.Popen(command, stdout=log, stderr=log)
        while run.poll() is None and not (phase() == wanted and (file == "-" or os.path.exists(file))):
            time.sleep(0.0005)
        os.kill(run.pid, int(signal))
    print(phase(), run.pid)


if __name__ == "__main__":
    main(*sys.argv[1:])
