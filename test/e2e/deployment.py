"""The formula in a host, and the homeserver that it makes: what the end-to-end tests ask of both."""

import contextlib
import json
import re
import secrets
import time
import typing
import urllib.error
import urllib.parse
import urllib.request

MAIN = "matrix-synapse"
LOG = "/var/log/nginx/matrix-synapse.access.log"


class Answer(typing.NamedTuple):
    """What nginx's log says of a request that went to a process."""

    method: str
    path: str
    status: int
    process: str
    agent: str


def until(condition, what, seconds=180, passing=False):
    """Return the first true value of ``condition()``; it fails after ``seconds``. The longer it takes, the less it is asked,
    as each command in a host takes from the machine what is waited for; but for what comes and is soon ``passing``."""
    begin = time.monotonic()
    while not (value := condition()):
        waited = time.monotonic() - begin
        assert waited < seconds, f"not within {seconds} s: {what}"
        time.sleep(0.05 if passing else min(0.05 + waited / 10, 1))
    return value


@contextlib.contextmanager
def salt_run(host):
    """``salt-run`` on a master whose only minion is this host, as a function of its words; both end afterwards."""
    host.run("systemctl", "start", "salt-master", "salt-minion")

    def run(*words, check=True):
        return host.run("salt-run", "--out=json", *words, check=check, timeout=600)

    def answers(function):
        # Orchestrations choose it by its pillar. An exit status of 0 may also say that there was nobody.
        asked = host.run("salt", "--pillar", "synapse:server_name:*", function, "--out=json", check=False)
        return asked.returncode == 0 and host.name in asked.stdout

    try:
        until(lambda: answers("test.ping"), "the minion is there, and its pillar known")
        until(lambda: answers("saltutil.sync_all"), "the minion has the modules")
        yield run
    finally:
        host.run("systemctl", "stop", "salt-minion", "salt-master")


class Deployment:
    """The formula, applied in a host with a pillar that tests may change: ``pillar`` is the mapping below ``synapse``."""

    def __init__(self, host, pillar):
        self.host, self.pillar = host, pillar
        host.write("/srv/pillar/top.sls", "base:\n  '*':\n    - synapse\n")

    def apply(self, sls="synapse", check=True, **kwargs):
        """Apply a state; return ``{state id: changes}`` of those that did, or would do, anything. With ``check``, all
        states succeed."""
        self.write_pillar()
        states = self.host.salt("state.apply", sls, **kwargs).values()
        failed = [f"{state['__id__']}: {state['comment']}" for state in states if state["result"] is False]
        assert not (check and failed), "\n".join(failed)
        return {state["__id__"]: state["changes"] for state in states if state["changes"] or state["result"] is None}

    def refused(self, sls="synapse", **kwargs):
        """Apply a state that fails; return the comments of the states that failed."""
        self.write_pillar()
        states = self.host.salt("state.apply", sls, **kwargs).values()
        failed = [state["comment"] for state in states if state["result"] is False]
        assert failed, "nothing failed"
        return "\n".join(failed)

    def write_pillar(self):
        self.host.write("/srv/pillar/synapse.sls", json.dumps({"synapse": self.pillar}), mode="0600")

    def names(self):
        """The names that the plan gave, main first: those of the units that are there."""
        files = self.host.sh("ls /etc/systemd/system | grep '^matrix-synapse.*service$' || true").stdout.split()
        names = [file.removesuffix(".service") for file in files]
        return sorted(names, key=lambda name: int(name.split("-")[3]) if name != MAIN else -1)

    def containers(self):
        """``docker inspect`` of every container of Synapse's, by name; nothing while the engine is down."""
        names = self.host.run("docker", "ps", "--all", "--format", "{{.Names}}", check=False).stdout.split()
        ours = [name for name in names if name.startswith(MAIN)]
        if not ours:
            return {}
        # One that went in between is not shown, and makes for an exit status.
        shown = self.host.run("docker", "container", "inspect", *ours, check=False).stdout
        inspected = json.loads(shown or "[]")
        return {container["Name"].lstrip("/"): container for container in inspected}

    def answers(self):
        """Every request that went to a process, in the order of their ends."""
        line = re.compile(r'^.*? "([A-Z]+) (\S+) \S+" (\d+) .* to unix:\S*/(\S+)[.]sock: .* "(.*)"$', re.MULTILINE)
        found = line.findall(self.host.read(LOG))
        return [Answer(method, path, int(status), *rest) for method, path, status, *rest in found]

    def starts(self):
        """When each container was started: a container that was restarted, or made anew, has another time."""
        return {name: container["State"]["StartedAt"] for name, container in self.containers().items()}

    def active(self, name):
        return self.host.run("systemctl", "is-active", f"{name}.service", check=False).stdout.strip()

    def healthy(self, *names):
        """Whether all of these answer /health."""
        ask = "curl --silent --fail --max-time 5 --output /dev/null http://localhost/health --unix-socket"
        script = [f"{ask} /run/matrix-synapse/private/{name}.sock" for name in names]
        return self.host.run("bash", "-c", " && ".join(script), check=False).returncode == 0

    def all_healthy(self):
        states = self.states()
        return set(states.values()) == {"active"} and self.healthy(*states)

    def states(self):
        """systemd's word for each unit."""
        names = self.names()
        words = self.host.run("systemctl", "is-active", *[f"{name}.service" for name in names], check=False).stdout
        return dict(zip(names, words.split(), strict=True))

    def status(self):
        return self.host.salt("synapse_process.census")["processes"]

    def systemctl(self, *words, **kwargs):
        return self.host.run("systemctl", *words, **kwargs)

    def kill(self, name):
        """SIGKILL the process in a container."""
        self.host.run("docker", "kill", "--signal", "KILL", name)

    @property
    def url(self):
        """nginx, as it is reached from outside the host."""
        command = ["sh", "-c", "hostname --ip-address | cut -d ' ' -f 1"]
        return f"http://{self.host.run(*command).stdout.strip()}:8008"

    def user(self, name=None):
        return User(self.url, name or f"user-{secrets.token_hex(4)}")


def owners_in(plan):
    """The names of a plan's processes by stream or type."""
    found = {}
    for process in plan["processes"]:
        found.setdefault(process["stream"] or process["type"], []).append(process["name"])
    return found


class Refused(Exception):
    """The homeserver answered with an error."""

    def __init__(self, status, body):
        super().__init__(f"{status} {body}")
        self.status, self.body = status, body


def request(url, method="GET", body=None, headers=None, timeout=180):
    """Return ``(JSON, headers)`` of an answer; any status but 2xx raises Refused."""
    data = json.dumps(body).encode() if isinstance(body, (dict, list)) else body
    asked = urllib.request.Request(url, method=method, data=data, headers=headers or {})
    try:
        with urllib.request.urlopen(asked, timeout=timeout) as answer:
            text, got = answer.read(), answer.headers
    except urllib.error.HTTPError as error:
        raise Refused(error.code, error.read().decode(errors="replace")) from None
    return (json.loads(text) if "json" in (got.get_content_type() or "") else text), got


class User:
    """A user of the homeserver, registered on the spot."""

    def __init__(self, url, name):
        self.url, self.token, self.since = url, None, None
        body = {"username": name, "password": secrets.token_hex(8), "auth": {"type": "m.login.dummy"}}
        answer = self.ask("POST", "/_matrix/client/v3/register", body)
        self.id, self.token = answer["user_id"], answer["access_token"]

    def ask(self, method, path, body=None, **headers):
        if self.token:
            headers["Authorization"] = f"Bearer {self.token}"
        return request(self.url + path, method, body, headers)[0]

    def room(self, invite=(), **options):
        body = {"invite": list(invite), "preset": "private_chat"} | options
        return self.ask("POST", "/_matrix/client/v3/createRoom", body)["room_id"]

    def join(self, room, via=""):
        self.ask("POST", f"/_matrix/client/v3/join/{quote(room)}" + (f"?via={quote(via)}" if via else ""), {})

    def say(self, room, text):
        path = f"/_matrix/client/v3/rooms/{quote(room)}/send/m.room.message/{secrets.token_hex(8)}"
        return self.ask("PUT", path, {"msgtype": "m.text", "body": text})["event_id"]

    def sync(self, timeout=0):
        since = f"&since={self.since}" if self.since else ""
        answer = self.ask("GET", f"/_matrix/client/v3/sync?timeout={timeout}{since}")
        self.since = answer["next_batch"]
        return answer

    def heard(self, room):
        """The texts in a room, the latest first."""
        path = f"/_matrix/client/v3/rooms/{quote(room)}/messages?dir=b&limit=50"
        return [event["content"].get("body") for event in self.ask("GET", path)["chunk"]]


def quote(text):
    return urllib.parse.quote(text, safe="")
