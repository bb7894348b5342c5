"""
What one release of Synapse answers, in the words of Synapse itself: it runs on that release's own modules.

Each kind of process is built as the process itself would build it, with a database of its own, up to the point where it
would listen. There its resources are taken from it: they know which request they would pass to which servlet, and which
they would answer with 404 or 405.

Reads kinds of processes from standard input, as ``{kind: {"app", "resources", "media"}}``; writes to standard output

    {"release": "1.163.2",
     "requests": {"METHOD /path": {kind: servlet}, ...},
     "own map": ["METHOD /path", ...],
     "streams": [stream, ...]}

``requests`` are concrete ones, at least one for each pattern that is registered; a kind that would not answer is not in it.
``own map`` are those of them that `synapse._scripts.generate_workers_map` says a worker can answer.
"""

import itertools
import json
import multiprocessing
import pathlib
import re
import sys
import tempfile
import types

import attr
from signedjson.key import generate_signing_key
from synapse._scripts import generate_workers_map
from synapse.api.errors import UnrecognizedRequestError
from synapse.app import _base, generic_worker, homeserver
from synapse.config._base import ConfigError
from synapse.config.homeserver import HomeServerConfig
from synapse.config.workers import WriterLocations
from synapse.http.server import JsonResource, UnrecognizedRequestResource
from twisted.web.resource import Resource, getChildForRequest
from twisted.web.static import File
from unpaddedbase64 import encode_base64

import synapse

METHODS = ("GET", "POST", "PUT", "DELETE")
MAIN = "synapse.app.homeserver"
FORK = multiprocessing.get_context("fork")

# Whoever has accounts of its own and whoever delegates them to the Matrix Authentication Service register different routes.
ACCOUNTS = [
    {
        "oidc_providers": [
            {
                "idp_id": "idp",
                "idp_name": "idp",
                "issuer": "https://idp.example.org",
                "client_id": "synapse",
                "client_secret": "no secret",
            }
        ],
        "cas_config": {"enabled": True, "server_url": "https://cas.example.org"},
        "email": {"notif_from": "synapse@example.org"},
    },
    {
        "matrix_authentication_service": {
            "enabled": True,
            "endpoint": "https://mas.example.org",
            "secret": "no secret",
        },
        "enable_registration": False,
        "password_config": {"enabled": False},
    },
]


def main():
    kinds = json.load(sys.stdin)
    requests, own_map = {}, set()
    for accounts in ACCOUNTS:
        with tempfile.TemporaryDirectory() as directory:
            ask(settings(pathlib.Path(directory), accounts), kinds, requests, own_map)
    found = {
        "release": synapse.__version__,
        "requests": dict(sorted(requests.items())),
        "own map": sorted(own_map),
        "streams": sorted(field.name for field in attr.fields(WriterLocations)),
    }
    json.dump(found, sys.stdout)


def ask(base, kinds, requests, own_map):
    """Add what is found with these settings."""
    processes = {}
    # Main comes first: it makes the database.
    for kind in sorted(kinds, key=lambda kind: kinds[kind]["app"] != MAIN):
        processes[kind] = Process(base, kinds[kind])
        if kinds[kind]["app"] == MAIN:
            processes[kind].registered()
    samples = set()
    for process in processes.values():
        samples.update(process.registered())
    for kind, process in processes.items():
        for (method, path), answering in process.answers(sorted(samples)).items():
            requests.setdefault(f"{method} {path}", {})[kind] = answering
    own_map |= in_its_own_process(lambda: own_map_of(base)).recv()


def in_its_own_process(*steps):
    """
    Run functions one after the other in a process of their own, and return a connection: what a function returns can be
    received there; it takes what was sent there, if it takes anything.
    """
    ours, theirs = FORK.Pipe()

    def run():
        for step in steps:
            theirs.send(step(theirs.recv()) if step.__code__.co_argcount else step())

    FORK.Process(target=run, daemon=True).start()
    theirs.close()
    return ours


class Process:
    """A process of a kind. Synapse keeps things in its modules that the next one must not find."""

    def __init__(self, base, kind):
        roots = []

        def build():
            roots.append(root_of(base, kind))
            return list(registered(roots[0]))

        def answer(samples):
            found = {sample: servlet(roots[0], *sample) for sample in samples}
            return {sample: who for sample, who in found.items() if who}

        self.connection = in_its_own_process(build, answer)
        self.found = None

    def registered(self):
        """Method and path of requests for all that it registers."""
        self.found = self.found or self.connection.recv()
        return self.found

    def answers(self, samples):
        """The servlet by method and path, of those requests that it answers."""
        self.connection.send(samples)
        return self.connection.recv()


def own_map_of(base):
    """What Synapse's own map says a worker can answer, as examples."""
    config = parse({**base, "enable_media_repo": False})
    found = generate_workers_map.get_registered_paths_for_default("synapse.app.generic_worker", config)
    return {f"{method} {path}" for method, pattern in found for path in examples(pattern)}


# --- A process, up to where it would listen ---------------------------------------------------------


def settings(directory, accounts):
    """The settings that all processes share, with everything switched on that makes Synapse answer more."""
    key = generate_signing_key("a")
    base = {
        "server_name": "example.org",
        "public_baseurl": "https://matrix.example.org",
        "report_stats": False,
        "signing_key": f"{key.alg} {key.version} {encode_base64(key.encode())}",
        "macaroon_secret_key": "no secret",
        "form_secret": "no secret",
        "worker_replication_secret": "no secret",
        "trusted_key_servers": [],
        "media_store_path": str(directory / "media"),
        "database": {"name": "sqlite3", "args": {"database": str(directory / "synapse.db")}},
        "federation_whitelist_endpoint_enabled": True,
        "enable_registration": True,
        "enable_registration_without_verification": True,
        "experimental_features": {},
        **accounts,
    }
    source = pathlib.Path(synapse.__file__).with_name("config") / "experimental.py"
    for name in re.findall(r'experimental\.get\(\s*"(\w+)",\s*False', source.read_text()):
        tried = {**base, "experimental_features": {**base["experimental_features"], name: True}}
        try:
            parse(tried)
        except ConfigError:
            continue
        base = tried
    return base


def parse(config):
    parsed = HomeServerConfig()
    parsed.parse_config_dict(config, "", "")
    return parsed


def root_of(base, kind):
    """The resources at the root of the listener of such a process."""
    listener = {"type": "http", "port": 8008, "resources": [{"names": kind["resources"]}]}
    config = {**base, "enable_media_repo": kind["media"]}
    if kind["app"] == MAIN:
        config["listeners"] = [listener]
        server, listen = homeserver.SynapseHomeServer, "_listener_http"
    else:
        config |= {
            "worker_app": kind["app"],
            "worker_name": "worker",
            "worker_listeners": [listener],
            "instance_map": {"main": {"host": "127.0.0.1", "port": 9093}},
        }
        server, listen = generic_worker.GenericWorkerServer, "_listen_http"
    parsed = parse(config)
    hs = server(parsed.server.server_name, config=parsed)
    hs.setup()
    taken = []
    homeserver.listen_http = _base.listen_http = lambda *args, **_: taken.extend(
        a for a in args if isinstance(a, Resource)
    )
    if kind["app"] == MAIN:
        getattr(hs, listen)(parsed, parsed.server.listeners[0])
    else:
        getattr(hs, listen)(parsed.worker.worker_listeners[0])
    return taken[0]


# --- What it answers ----------------------------------------------------------------------------------


def registered(resource, path=""):
    """Yield method and path of requests for all that is registered in a tree of resources."""
    if isinstance(resource, JsonResource):
        for pattern, methods in resource._routes.items():
            for method in methods:
                yield from ((method.decode(), example) for example in examples(pattern.pattern))
    elif path and answering(resource):
        for method in answering(resource):
            yield method, path
    for name, child in resource.children.items():
        yield from registered(child, f"{path}/{name.decode()}")


def answering(resource):
    """The methods that a resource answers by itself."""
    if isinstance(resource, UnrecognizedRequestResource):
        return []
    if isinstance(resource, File):
        return ["GET"]
    return [it for it in METHODS if hasattr(resource, f"_async_render_{it}") or f"render_{it}" in vars(type(resource))]


def servlet(root, method, path):
    """The name of the servlet that a request would be passed to, None if it would be answered with 404 or 405."""
    asked = types.SimpleNamespace(
        method=method.encode(), path=path.encode(), prepath=[], postpath=path.encode().split(b"/")[1:]
    )
    resource = getChildForRequest(root, asked)
    if isinstance(resource, JsonResource):
        try:
            return resource._get_handler_for_request(asked)[1]
        except UnrecognizedRequestError:
            return None
    return type(resource).__name__ if method in answering(resource) else None


# --- Examples of a pattern ------------------------------------------------------------------------------


def examples(pattern):
    """
    Texts that match a pattern: every alternative, what is optional with and without, everything else once; a group that may be
    anything is its own name.
    """
    parsed = re._parser.parse(pattern)
    names = {number: name for name, number in parsed.state.groupdict.items()}
    found = [text for text in texts(parsed, names) if re.match(pattern, text)]
    assert found, pattern
    return found


def texts(parsed, names):
    return ["".join(parts) for parts in itertools.product(*[part(*node, names) for node in parsed])]


def part(kind, value, names):
    kind = str(kind)
    if kind == "LITERAL":
        return [chr(value)]
    if kind == "ANY":
        # By itself it is a full stop that nobody escaped.
        return ["."]
    if kind == "NOT_LITERAL":
        return ["x"]
    if kind == "IN":
        negated = str(value[0][0]) == "NEGATE"
        return [next(it for it in "x1!$@#:._-/" if negated is not any(holds(it, *item) for item in value))]
    if kind == "SUBPATTERN":
        found = texts(value[-1], names)
        return [names[value[0]]] if found == ["x"] and value[0] in names else found
    if kind == "BRANCH":
        return [text for branch in value[1] for text in texts(branch, names)]
    if kind in ("MAX_REPEAT", "MIN_REPEAT"):
        least, most, repeated = value
        anything = [str(node) for node, _ in repeated] == ["ANY"]
        once = ["x" * max(least, 1)] if anything else [text * max(least, 1) for text in texts(repeated, names)]
        return ["", *once] if (least, int(most)) == (0, 1) else once
    # Ends, and what looks ahead: examples() sees whether they hold.
    return [""]


def holds(character, kind, value):
    kind = str(kind)
    if kind == "LITERAL":
        return character == chr(value)
    if kind == "RANGE":
        return value[0] <= ord(character) <= value[1]
    if kind == "CATEGORY":
        return bool(re.match({"CATEGORY_DIGIT": r"\d", "CATEGORY_WORD": r"\w"}[str(value)], character))
    return False


if __name__ == "__main__":
    main()
