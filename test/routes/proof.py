#!/usr/bin/env python3
"""
The proof of the routes: every request that Synapse answers reaches a process that can answer it.

    proof.py            the pinned release, and some older ones
    proof.py 1.164.0    the pinned release, and this one

A release is installed from PyPI into a directory of its own and asked what each kind of process answers (ask_synapse.py).
An nginx with the configuration that the formula generates for a layout is asked who gets each request. Prints a report;
exits with 1 if a request goes wrong.
"""

import functools
import http.client
import importlib.util
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

import yaml
from front import ROOT, Front

sys.path.insert(0, str(ROOT / "test/host"))

from host import CACHE, SYNAPSE_VERSION, locked, progress  # noqa: E402

HERE = pathlib.Path(__file__).parent
DATA = {name: yaml.safe_load((ROOT / f"synapse/data/{name}.yaml").read_text()) for name in ("routes", "workers")}
OLDER = ("1.162.0", "1.156.0", "1.150.0")

# The pillar's `workers`.
LAYOUTS = {
    **{preset: {"preset": preset} for preset in DATA["workers"]["presets"]},
    "no workers": {},
    "two generic workers": {"list": [{"type": "generic", "count": 2}]},
    **{
        f"{kind} alone": {"list": [{"type": kind}]}
        for kind, it in DATA["workers"]["types"].items()
        if it.get("serves") and kind != "stream-writer"
    },
    "every stream writer alone": {
        "list": [{"type": "stream-writer", "stream": it} for it in DATA["workers"]["streams"]]
    },
    "some streams": {
        "list": [
            {"type": "generic"},
            *({"type": "stream-writer", "stream": it} for it in ("typing", "receipts", "push_rules")),
        ]
    },
    "every type and every stream": {
        "list": [{"type": it} for it in DATA["workers"]["types"] if it != "stream-writer"]
        + [{"type": "stream-writer", "stream": it} for it in DATA["workers"]["streams"]]
    },
    "specialised workers and the last streams": {
        "preset": "specialized-workers",
        "list": [
            {"type": "stream-writer", "stream": it} for it in ("thread_subscriptions", "quarantined_media_changes")
        ],
    },
}

# Servlets that answer 500 on a process that does not write the stream; of the others any process passes the write on. Found
# by asking each, see test/e2e/test_streams.py.
WRITERS = {
    "RoomTypingRestServlet": ("typing", ["PUT"]),
    "SendToDeviceRestServlet": ("to_device", ["PUT"]),
    "ReceiptRestServlet": ("receipts", ["POST"]),
    "ReadMarkerRestServlet": ("receipts", ["POST"]),
    "PushRuleRestServlet": ("push_rules", ["PUT", "DELETE"]),
    "ThreadSubscriptionsRestServlet": ("thread_subscriptions", ["PUT", "DELETE"]),
    "QuarantineMediaInRoom": ("quarantined_media_changes", ["POST"]),
    "QuarantineMediaByUser": ("quarantined_media_changes", ["POST"]),
    "QuarantineMediaByID": ("quarantined_media_changes", ["POST"]),
    "UnquarantineMediaByID": ("quarantined_media_changes", ["POST"]),
}

# What any process registers, and none but main may answer: it answers 500, or keeps a login's state in its memory.
MAIN_ALONE = {
    "OpenIdUserInfo",
    "SsoRedirectServlet",
    "CasTicketServlet",
    "PickIdpResource",
    "AvailabilityCheckResource",
    "AccountDetailsResource",
    "NewUserConsentResource",
    "SsoRegisterResource",
    "OIDCCallbackResource",
    "OIDCBackchannelLogoutResource",
    "MSC4108RendezvousSessionResource",
}

# Not for the public: nginx answers these itself, or not at all.
NOT_PUBLIC = re.compile("/(health|_synapse/(metrics|replication|mas)(/.*)?|[.]well-known/.*)")

# The query of a sync that does not begin anew.
GOES_ON = "?since=s1&pos=s1"

# Together they do what a generic worker does.
SPECIALISED = {"room", "sync", "client-reader", "federation-reader"}


def main(releases):
    pinned = answers(SYNAPSE_VERSION)
    faults = stale(pinned)
    for release in [SYNAPSE_VERSION, *(releases or OLDER)]:
        known = answers(release)
        reasons = {}
        print(f"\nSynapse {release}: {len(known['requests'])} kinds of requests\n")
        print(f"  {'layout':42} {'asked':>6} {'to workers':>11} {'to main':>8} {'wrong':>6}")
        for layout in LAYOUTS:
            found = compare(known, layout)
            faults += [f"Synapse {release}, {layout}: {line}" for line in found["wrong"]]
            counts = found["asked"], found["to workers"], found["to main"], len(found["wrong"])
            print("  {:42} {:6} {:11} {:8} {:6}".format(layout, *counts))
            for why, requests in found["reasons"].items():
                reasons.setdefault(why, set()).update(requests)
        print("\n  Of those to main, a worker could take, in one layout or another:")
        for why, requests in reasons.items():
            print(f"    {len(requests):4}  {why}")
        if release != SYNAPSE_VERSION:
            print(f"\n  What it answers otherwise than {SYNAPSE_VERSION}:")
            for line in [*differences(pinned, known), *stale(known)] or ["nothing"]:
                print(f"    {line}")
    print(f"\n{len(faults)} faults", *faults, sep="\n")
    return 1 if faults else 0


# --- What Synapse answers -------------------------------------------------------------------------------


@functools.cache
def answers(release):
    """What ask_synapse.py finds of a release, of every kind of process that is in a layout."""
    script = HERE / "ask_synapse.py"
    kinds = {
        kind_of(process): json.loads(kind_of(process))
        for layout in LAYOUTS
        for process in plan(layout, release)["processes"]
        if process["public_socket"]
    }
    progress(f"Synapse {release} is asked")
    done = subprocess.run(
        [sys.executable, "-s", "-W", "ignore", script],
        input=json.dumps(kinds),
        env={**os.environ, "PYTHONPATH": str(installed(release))},
        text=True,
        capture_output=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"Synapse {release}: {done.stderr[-5000:]}")
    return json.loads(done.stdout)


def installed(release):
    """The directory that a release is installed in."""
    target = CACHE / "routes" / f"synapse-{release}"
    with locked("routes"):
        if not target.exists():
            progress(f"Synapse {release} is installed from PyPI")
            making = target.with_name(f"{target.name}.new")
            shutil.rmtree(making, ignore_errors=True)
            pip = [sys.executable, "-m", "pip", "install", "-qq", "--disable-pip-version-check", "--no-compile"]
            pip += ["--only-binary", ":all:", "--target", making, f"matrix-synapse[oidc]=={release}"]
            done = subprocess.run(pip, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"Synapse {release} could not be installed:\n{done.stderr}")
            making.rename(target)
    return target


def kind_of(process):
    """What decides what a process registers: the app, the resources of its public listener, the media repository."""
    public = [
        it
        for it in process["config"].get("listeners", process["config"].get("worker_listeners"))
        if it["path"] == process["public_socket"]
    ]
    resources = public[0]["resources"][0]["names"]
    media = process["config"].get("enable_media_repo", "media" in resources)
    return json.dumps({"app": process["app"], "resources": resources, "media": media})


# --- What nginx does ------------------------------------------------------------------------------------


@functools.cache
def minion():
    """A minion as the unit tests have it."""
    spec = importlib.util.spec_from_file_location("unit_conftest", ROOT / "test/unit/conftest.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Minion()


def plan(layout, release, run="/run/matrix-synapse"):
    workers = {f"workers:{key}": value for key, value in LAYOUTS[layout].items()}
    return minion().plan({**workers, "directories:run": run, "image:version": f"v{release}"})


def asked(planned, requests, directory):
    """Who gets each of the requests: a process's name, or the status that nginx answers with by itself."""
    (directory / "public").mkdir()
    names = {process["public_socket"]: process["name"] for process in planned["processes"] if process["public_socket"]}
    beside = "".join(
        f"server {{ listen unix:{path}; access_log off; location / {{ add_header X-Process {name}; return 200; }} }}\n"
        for path, name in names.items()
    )
    found = {}
    with Front(directory, planned, beside) as front:
        homeservers, clients = (http.client.HTTPConnection("127.0.0.1", it) for it in (front.federation, front.client))
        for request in requests:
            method, path = request.split(" ", 1)
            connection = homeservers if path.startswith(("/_matrix/federation/", "/_matrix/key/")) else clients
            connection.request(method, path)
            answer = connection.getresponse()
            answer.read()
            found[request] = answer.headers.get("X-Process", answer.status)
        homeservers.close()
        clients.close()
    return found


# --- The comparison -------------------------------------------------------------------------------------


def compare(known, layout):
    """What is wrong in a layout, a sentence each; how many requests went where; what main answers for which reason."""
    release = known["release"]
    requests = [*known["requests"], *(f"HEAD {it[4:]}" for it in known["requests"] if it.startswith("GET "))]
    begins = [
        match for route, match in minion().synapse_workers.matches(DATA["routes"], release) if route.get("initial")
    ]
    requests += [f"{it}{GOES_ON}" for it in requests if any(re.match(match, key(it)) for match in begins)]
    with tempfile.TemporaryDirectory(prefix="routes") as directory:
        planned = plan(layout, release, run=directory)
        found = asked(planned, requests, pathlib.Path(directory))
    processes = {process["name"]: process for process in planned["processes"]}
    main_name = planned["processes"][0]["name"]
    result = {"asked": len(found), "to workers": 0, "to main": 0, "wrong": [], "reasons": {}}
    for request, who in found.items():
        able = [name for name, process in processes.items() if can_answer(process, request, known, planned)]
        unused = {processes[name]["type"] for name in able} - {"main"}
        result["to main"] += who == main_name
        result["to workers"] += who in processes and who != main_name
        if NOT_PUBLIC.fullmatch(request.split(" ", 1)[1]):
            if who != 404:
                result["wrong"].append(f"{request} is not for the public, and reaches {who}")
        elif who not in able and registers(processes.values(), request, known):
            result["wrong"].append(f"{request} reaches {who}, and should reach {' or '.join(able) or 'nobody here'}")
        elif who == main_name and unused:
            why = reason(request, release, unused)
            if why:
                result["reasons"].setdefault(why, []).append(request)
            else:
                could = " or ".join(sorted(unused))
                result["wrong"].append(f"{request} reaches main for no reason given, and {could} could take it")
    return result


def key(request):
    """What nginx matches a request against."""
    method, path = request.removesuffix(GOES_ON).split(" ", 1)
    return f"{method}:{path}?{'' if request.endswith(GOES_ON) else 'initial'}"


def registers(processes, request, known):
    """Whether any of the processes has a servlet for a request."""
    return any(servlet_of(process, request, known) for process in processes)


def servlet_of(process, request, known):
    kinds = known["requests"][request.replace("HEAD ", "GET ").removesuffix(GOES_ON)]
    return kinds.get(kind_of(process)) if process["public_socket"] else None


def can_answer(process, request, known, planned):
    """Whether a process would answer a request neither with 404 or 405, nor with 500 for being the wrong one."""
    servlet = servlet_of(process, request, known)
    stream, methods = WRITERS.get(servlet, (None, []))
    if stream and request.split()[0] in methods:
        return process["name"] in planned["shared"]["stream_writers"].get(stream, [planned["processes"][0]["name"]])
    return bool(servlet) and (process["type"] == "main" or servlet not in MAIN_ALONE)


def reason(request, release, unused):
    """Why the data leaves a request to main that workers of these types could take; None if it does not say."""
    routes = minion().synapse_workers.matches(DATA["routes"], release)
    route = next((route for route, match in routes if re.match(match, key(request))), None)
    if route is None:
        return None
    if "why" in route:
        return route["why"]
    if "generic" in unused or unused >= SPECIALISED or unused & set(route.get("workers", [])):
        return None
    return "it is not what such a worker is for"


def stale(known):
    """What the data and this proof know otherwise than a release, a sentence each."""
    release, requests = known["release"], known["requests"]
    keys = [key(request) for request in requests]
    servlets = {servlet for kinds in requests.values() for servlet in kinds.values()}
    lines = [
        f"routes.yaml has a route that Synapse {release} does not register: {match}"
        for _, match in minion().synapse_workers.matches(DATA["routes"], release)
        if not any(re.match(match, key) for key in keys)
    ]
    lines += [
        f"workers.yaml and Synapse {release} do not both have the stream {stream}"
        for stream in sorted({*DATA["workers"]["streams"]} ^ {*known["streams"]})
    ]
    lines += [
        f"proof.py has a servlet that Synapse {release} does not register: {name}"
        for name in sorted({*WRITERS, *MAIN_ALONE} - servlets)
    ]
    lines += [
        f"Synapse {release}'s own map says that a worker answers {request}, and none does"
        for request in known["own map"]
        if not any("generic_worker" in kind for kind in requests.get(request, []))
    ]
    return lines


def differences(before, after):
    """What a release registers otherwise than another, a line each."""

    def by(known):
        return {
            request: "workers too" if any("generic_worker" in kind for kind in kinds) else "main alone"
            for request, kinds in known["requests"].items()
        }

    old, new = by(before), by(after)
    lines = [f"more: {request} ({new[request]})" for request in sorted(new.keys() - old.keys())]
    lines += [f"less: {request} ({old[request]})" for request in sorted(old.keys() - new.keys())]
    both = sorted(old.keys() & new.keys())
    return lines + [f"{it}: {new[it]}, not {old[it]}" for it in both if new[it] != old[it]]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
