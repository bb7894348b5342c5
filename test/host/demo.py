#!/usr/bin/env python3
"""The demo: a homeserver with workers in a disposable host, used from outside of it.

    demo.py up      apply pillar.example, chat a little, show the processes
    demo.py down    remove the host

A second ``up`` finds nothing to change, and chats again. Needs what host.py needs.
"""

import argparse
import json
import os
import queue
import re
import secrets
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request

from host import ROOT, Host, HostError, docker, engine, progress

NGINX_PORT = 8008
ACCESS_LOG = "/var/log/nginx/matrix-synapse.access.log"
UNITS = "'matrix-synapse*.service'"

# nginx tells by it which requests were the demo's.
AGENT = f"synapse-demo/{secrets.token_hex(4)}"

# Runs on the host, as the admin API is open to nobody else, and the secret is nobody else's business. It is what
# Synapse's own register_new_matrix_user does.
REGISTER = f"""
import hashlib, hmac, json, sys, urllib.request
url = "http://127.0.0.1:{NGINX_PORT}/_synapse/admin/v1/register"
secret = open("/var/lib/matrix-synapse/secrets/registration", "rb").read().strip()
user = json.load(sys.stdin)
nonce = json.load(urllib.request.urlopen(url))["nonce"]
text = "\\0".join([nonce, user["username"], user["password"], "notadmin"])
mac = hmac.new(secret, text.encode(), hashlib.sha1).hexdigest()
data = json.dumps({{**user, "admin": False, "nonce": nonce, "mac": mac}}).encode()
print(json.load(urllib.request.urlopen(url, data))["user_id"])
"""


class DemoError(Exception):
    """The homeserver is not what it should be."""


def up(name):
    port = published_port(name)
    url = f"http://127.0.0.1:{port}"
    progress(f"booting the host {name}")
    host = Host.up(name, publish={port: NGINX_PORT})
    write_pillar(host, url)
    progress("syncing the formula's modules")
    host.salt("saltutil.sync_all")
    progress("state.apply synapse")
    report(apply(host))
    chat(host, url)
    progress("asking the processes how they are")
    show(host.salt("synapse_process.census")["processes"])
    print(GUIDE.format(url=url, host=f".venv/bin/python test/host/host.py --name {name}"))


GUIDE = """
The homeserver is at {url}

What to try next:
  {host} shell
      A root shell on the server. In it, for example:
        systemctl list-units 'matrix-synapse*'
        salt-call synapse_workers.names
        salt-call synapse_workers.diagram
        systemctl restart matrix-synapse    # and every worker with it
        journalctl --follow --unit 'matrix-synapse*'
  Change pillar.example, and run `make demo` again
      Only what the change concerns is restarted.
  make demo-down
      Remove it all."""


def published_port(name):
    """Return the port of this machine that is the demo's already, else 8008, else, where that is taken, a free one."""
    about = docker("container", "inspect", name, check=False)
    container = json.loads(about.stdout)[0] if about.returncode == 0 else {"HostConfig": {}}
    if bound := (container["HostConfig"].get("PortBindings") or {}).get(f"{NGINX_PORT}/tcp"):
        return int(bound[0]["HostPort"])
    with socket.socket() as candidate:
        candidate.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            candidate.bind(("127.0.0.1", NGINX_PORT))
        except OSError:
            candidate.bind(("127.0.0.1", 0))
        return candidate.getsockname()[1]


def write_pillar(host, url):
    # What the host publishes arrives at its own address, not at the loopback that pillar.example listens on.
    overlay = {"public_base_url": url, "nginx": {"client": {"listen": [str(NGINX_PORT)]}}}
    progress(f"pillar: pillar.example, and over it {json.dumps(overlay)}")
    host.write("/srv/pillar/top.sls", "base:\n  '*': [synapse, demo]\n")
    host.write("/srv/pillar/synapse.sls", (ROOT / "pillar.example").read_text())
    host.write("/srv/pillar/demo.sls", json.dumps({"synapse": overlay}, indent=2) + "\n")


# --- The state run --------------------------------------------------------------------------------


def apply(host):
    """Run state.apply, telling meanwhile what it is at; return its states."""
    command = ["docker", "exec", host.name, "salt-call", "--log-level=info", "--out=json", "--out-indent=-1"]
    # A run that somebody interrupted goes on in the host: wait for it.
    command += ["state.apply", "synapse", "queue=True"]
    environment = os.environ | {"DOCKER_HOST": engine()}
    log = []
    with tempfile.TemporaryFile("w+") as output:
        pipes = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": subprocess.PIPE, "text": True}
        with subprocess.Popen(command, env=environment, **pipes) as run:
            narrate(host, ticking(run.stderr, log))
        output.seek(0)
        answer = output.read()
    try:
        states = json.loads(answer)["local"]
    except (ValueError, KeyError):
        states = None
    if not isinstance(states, dict):
        raise DemoError(f"state.apply: exit {run.returncode}\n{answer or ''.join(log[-30:])}")
    return states


def ticking(stream, log):
    """Yield the lines of a stream as they come, "" whenever none came for half a second; keep them in ``log``."""
    lines = queue.SimpleQueue()

    def read():
        for line in stream:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    while True:
        try:
            line = lines.get(timeout=0.5)
        except queue.Empty:
            yield ""
            continue
        if line is None:
            return
        log.append(line)
        yield line


def narrate(host, lines):
    """Tell of each state that takes longer than a second, and of the processes that come up meanwhile."""
    running = told = healthy = None
    since = 0
    for line in lines:
        if begun := re.search(r"Executing state (\S+) for \[(.*)\]", line):
            running, since = begun.groups(), time.monotonic()
        elif "Completed state [" in line:
            running = None
        elif running and running != told and time.monotonic() - since > 1:
            told = running
            progress(f"  {running[0]}: {running[1][:80]}")
        if not line and running and running[0] == "synapse_process.running" and healthy != (now := census(host)):
            healthy = now
            progress(f"    {healthy}")


def census(host):
    # A unit is active as of when its process answers /health.
    count = f"systemctl list-units --plain --no-legend --state=active {UNITS} | wc -l; ls /etc/systemd/system/{UNITS[1:-1]} | wc -l"
    active, units = host.sh(count, check=False).stdout.split()
    return f"{active} of {units} processes are healthy"


def report(states):
    """Say what the run did; it must not have failed."""
    failed = [state for state in states.values() if state["result"] is False]
    # What only says that something else failed, says nothing.
    causes = [state for state in failed if not state["comment"].startswith("One or more requisite failed")]
    if failed:
        told = [f"{state['__sls__']}: {state['__id__']}\n{indent(state['comment'])}" for state in causes or failed]
        if causes and len(causes) < len(failed):
            told.append(f"{len(failed) - len(causes)} more were not run because of that.")
        raise DemoError(f"{len(failed)} of {len(states)} states failed:\n\n" + "\n\n".join(told))
    changed = sum(bool(state["changes"]) for state in states.values())
    progress(f"{len(states)} states, {f'{changed} of them changed something' if changed else 'nothing to change'}")


def indent(text):
    return "\n".join(f"    {line}" for line in text.splitlines())


# --- The homeserver, from outside -----------------------------------------------------------------


def chat(host, url):
    """Register a user, log in, create a room, say something, and hear it."""
    # So that it can be looked for among all the demo's users in clients, the user has a name and password to remember.
    user = {"username": f"demo-{secrets.token_hex(3)}", "password": secrets.token_urlsafe(9)}
    user_id = host.run("python3", "-c", REGISTER, input=json.dumps(user)).stdout.strip()
    progress(f"registered {user_id}, password {user['password']}")

    client = Client(url)
    identifier = {"type": "m.id.user", "user": user["username"]}
    login = {"type": "m.login.password", "identifier": identifier, "password": user["password"]}
    client.token = client.post("login", login)["access_token"]
    progress(f"logged in through {url}")

    room = client.post("createRoom", {"name": "A room for the demo", "preset": "private_chat"})["room_id"]
    progress(f"created the room {room}")

    since = client.get("sync", timeout=0)["next_batch"]
    sent = time.monotonic()
    message = {"msgtype": "m.text", "body": "Hello from outside the host"}
    event = client.put(f"rooms/{urllib.parse.quote(room)}/send/m.room.message/1", message)["event_id"]
    while not (heard := client.heard(room, event, since)):
        if time.monotonic() - sent > 30:
            raise DemoError(f"the message {event} was sent, and did not come back by sync within 30 s")
    progress(f"sent a message, and synced it back after {time.monotonic() - sent:.2f} s: {heard['content']['body']!r}")

    print("\nWho answered, says nginx:")
    for line in host.run("grep", "--fixed-strings", AGENT, ACCESS_LOG).stdout.splitlines():
        request = re.search(r'"(\S+) (\S+) [^"]*" (\d+) .* to unix:\S*/(\S+)\.sock', line)
        if request:
            method, path, status, process = request.groups()
            path = re.sub(r"rooms/[^/]+", "rooms/...", path)
            print(f"  {method:4} {path:58} {status}  {process}")


class Client:
    """The client-server API, with the standard library: https://spec.matrix.org/latest/client-server-api/"""

    def __init__(self, url):
        self.url = url
        self.token = None

    def get(self, path, **query):
        return self._request("GET", f"{path}?{urllib.parse.urlencode(query)}")

    def post(self, path, content):
        return self._request("POST", path, content)

    def put(self, path, content):
        return self._request("PUT", path, content)

    def heard(self, room, event, since):
        """Return the event if a sync brings it within five seconds."""
        joined = self.get("sync", since=since, timeout=5000).get("rooms", {}).get("join", {})
        events = joined.get(room, {}).get("timeline", {}).get("events", [])
        return next((item for item in events if item["event_id"] == event), None)

    def _request(self, method, path, content=None):
        url = f"{self.url}/_matrix/client/v3/{path}"
        headers = {"User-Agent": AGENT, "Content-Type": "application/json"}
        if self.token:
            headers["Authorization"] = f"Bearer {self.token}"
        data = None if content is None else json.dumps(content).encode()
        try:
            with OPENER.open(urllib.request.Request(url, data, headers, method=method), timeout=60) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as err:
            raise DemoError(f"{method} {url}: {err.code} {err.read().decode(errors='replace')}") from err
        except (OSError, ValueError) as err:
            raise DemoError(f"{method} {url}: {err}") from err


# The host is on this machine, whatever proxy is in the environment.
OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def show(processes):
    """Print the table of processes; they must all be healthy, and up to date."""
    rows = [("PROCESS", "TYPE", "HEALTH", "MEMORY", "STARTED")]
    for process in processes:
        health = "healthy" if process["healthy"] else f"unhealthy, {process['unit']}"
        memory = f"{process['memory'] >> 20} MiB" if process["memory"] else "-"
        rows.append((process["name"], process["type"], health, memory, process["since"] or "-"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    print()
    for name, kind, health, memory, started in rows:
        print(
            f"{name:{widths[0]}}  {kind:{widths[1]}}  {health:{widths[2]}}  {memory:>{widths[3]}}  {started}".rstrip()
        )
    for key, fault in (("healthy", "not healthy"), ("current", "not started from what the pillar and the formula say")):
        wrong = [process["name"] for process in processes if not process[key]]
        if wrong:
            raise DemoError(f"{fault}: {', '.join(wrong)}")


def main():
    sys.stdout.reconfigure(line_buffering=True)  # in order with progress, also in a pipe
    parser = argparse.ArgumentParser(description="The demo: a homeserver with workers in a disposable host.")
    parser.add_argument("--name", default="synapse-demo", help="the host's name")
    parser.add_argument("command", choices=["up", "down"])
    options = parser.parse_args()
    if options.command == "down":
        Host(options.name).down()
        progress(f"{options.name} is gone")
        return
    try:
        up(options.name)
    except (DemoError, HostError) as error:
        shell = f".venv/bin/python test/host/host.py --name {options.name} shell"
        sys.exit(f"\n{error}\n\nThe host stays as it is, to look into: {shell}")


if __name__ == "__main__":
    try:
        main()
    except HostError as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit(130)
