#!/usr/bin/python3
"""Runs in the bench's host and prints what it measured as JSON: probe WHAT ARGUMENTS..."""

import json
import os
import re
import shlex
import socket
import subprocess
import sys
import time

RUN = "/run/matrix-synapse"
MAIN = "matrix-synapse"
POLL = 0.05


def answers(name):
    with socket.socket(socket.AF_UNIX) as health:
        health.settimeout(10)
        try:
            health.connect(f"{RUN}/private/{name}.sock")
            health.sendall(b"GET /health HTTP/1.0\r\n\r\n")
            return b" 200 " in health.recv(64)
        except OSError:
            return False


def wait_for(names, interval=POLL):
    left = list(names)
    while left := [name for name in left if not answers(name)]:
        time.sleep(interval)


def run(*command):
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def systemctl(verb, *names):
    run("systemctl", verb, *[f"{name}.service" for name in names])


def timed(action):
    begin = time.monotonic()
    action()
    return time.monotonic() - begin


def create(name):
    """Create a new container of a process by hand, as its unit does."""
    run("docker", "rm", "--force", name)
    with open(f"/etc/systemd/system/{name}.service") as file:
        unit = file.read()
    line = re.search(r"^ExecStartPre=(.*/create-container .*)$", unit, re.MULTILINE)[1]
    for socket_path in (f"{RUN}/private/{name}.sock", f"{RUN}/public/{name}.sock"):
        for path in (socket_path, socket_path + ".lock"):
            if os.path.lexists(path):
                os.unlink(path)
    run(*shlex.split(line.replace("$$", "$").replace("%%", "%")))


def start_units(*names):
    systemctl("stop", MAIN)

    def start():
        started = subprocess.Popen(["systemctl", "start", f"{MAIN}.service"])
        wait_for(names)
        started.wait()

    return timed(start)


def start_containers(*names):
    systemctl("stop", MAIN)
    for name in names:
        create(name)

    def start():
        for name in names:
            subprocess.Popen(["docker", "start", name], stdout=subprocess.DEVNULL)
        wait_for(names)

    seconds = timed(start)
    run("docker", "rm", "--force", *names)
    systemctl("start", *names)
    return seconds


def restart_one_by_one(*names):
    """Seconds that it takes to restart each in turn; and, for each in the same minute, from `docker start` until it answers."""
    restart = start_up = 0
    for name in names:
        restart += timed(lambda name=name: systemctl("restart", name))
        systemctl("stop", name)
        create(name)
        start_up += timed(lambda name=name: (run("docker", "start", name), wait_for([name])))
        run("docker", "rm", "--force", name)
        systemctl("start", name)
    return {"restart": restart, "start_up": start_up}


def restart_with_delay(*names):
    directories = [f"/run/systemd/system/{name}.service.d" for name in names]
    for directory in directories:
        os.makedirs(directory, exist_ok=True)
        with open(f"{directory}/delay.conf", "w") as drop_in:
            drop_in.write("[Service]\nExecStartPre=/bin/sleep 5\n")
    run("systemctl", "daemon-reload")
    seconds = timed(lambda: [systemctl("restart", name) for name in names])
    for directory in directories:
        os.unlink(f"{directory}/delay.conf")
    run("systemctl", "daemon-reload")
    return seconds


def ready_lags(*names):
    """Milliseconds from /health being true to systemd calling the unit active, for each."""
    lags = []
    for name in names:
        systemctl("stop", name)
        starting = subprocess.Popen(["systemctl", "start", f"{name}.service"])
        wait_for([name], interval=0.01)
        healthy = time.monotonic()
        starting.wait()
        shown = ["systemctl", "show", "--property=ActiveEnterTimestampMonotonic", "--value", f"{name}.service"]
        active = int(subprocess.run(shown, check=True, capture_output=True, text=True).stdout) / 1e6
        lags.append((active - healthy) * 1000)
    return lags


def memory(name):
    """Megabytes of proportional set size: of the container's processes, and of those that serve only it."""
    inspected = json.loads(subprocess.run(["docker", "inspect", name], check=True, capture_output=True).stdout)[0]
    listed = subprocess.run(["docker", "top", name, "-o", "pid"], check=True, capture_output=True, text=True).stdout
    inside = [int(line) for line in listed.split()[1:]]
    outside = [
        int(pid)
        for pid in os.listdir("/proc")
        if pid.isdecimal() and (inspected["Id"] in command_line(pid) or f" --attach {name} " in command_line(pid) + " ")
    ]
    return {"container": megabytes(inside), "overhead": megabytes(outside)}


def command_line(pid):
    try:
        with open(f"/proc/{pid}/cmdline") as file:
            return file.read().replace("\0", " ").strip()
    except OSError:
        return ""


def megabytes(pids):
    total = 0
    for pid in pids:
        with open(f"/proc/{pid}/smaps_rollup") as file:
            total += int(re.search(r"^Pss: +(\d+)", file.read(), re.MULTILINE)[1])
    return total / 1024


def time_command(*command):
    return timed(lambda: run(*command))


PROBES = {
    "start-units": start_units,
    "start-containers": start_containers,
    "restart-one-by-one": restart_one_by_one,
    "restart-with-delay": restart_with_delay,
    "ready-lags": ready_lags,
    "memory": memory,
    "time": time_command,
}

if __name__ == "__main__":
    print(json.dumps(PROBES[sys.argv[1]](*sys.argv[2:])))
