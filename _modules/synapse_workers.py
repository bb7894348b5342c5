"""
The plan: which Synapse processes the pillar asks for, and everything that follows from it.

:func:`build` is the specification: pure Python, from settings and roster to plan. What it knows about Synapse is data in
``synapse/data/workers.yaml`` and ``routes.yaml``. The functions for the command line read the pillar and the roster and
call it.

Words: the *main process* is ``synapse.app.homeserver``; a *worker* is any other process; a *stream writer* is the worker
that writes one of Synapse's streams; the *roster* is the record of the names already given.
"""

import hashlib
import json
import math
import pathlib
import re

import salt.utils.hashutils
import salt.utils.yaml
from salt.exceptions import CommandExecutionError

MAIN = "matrix-synapse"
MAIN_UPSTREAM = "synapse_main"
WORKER_PREFIX = "matrix-synapse-worker-"

# The main process has two more names in Synapse's settings.
MAIN_IN_STREAM_WRITERS = "master"
MAIN_IN_INSTANCE_MAP = "main"

# A Unix socket's path has at most 107 bytes (unix(7)), and Synapse puts a lock of the name PATH.lock beside it.
LONGEST_SOCKET_PATH = 107 - len(".lock")

MOST_WORKERS = 1024
# PostgreSQL's own limit of max_connections.
MOST_CONNECTIONS = 262143
ENTRY_OPTIONS = ("config", "log_level", "memory", "cpus", "arguments")

# What the plan itself writes; anybody else's value would cut a process off from nginx, its health check or its unit.
PLANNED_SETTINGS = ("worker_app", "worker_name", "worker_listeners", "worker_log_config", "listeners", "log_config")

# What a job gets in the place of any other setting.
NOT_SHOWN = "(not shown)"

# What has a place of its own in the pillar. Of a secret the formula gives the path, and Synapse refuses the secret beside it.
SETTINGS_ELSEWHERE = {
    "macaroon_secret_key": "synapse:secrets:macaroon",
    "form_secret": "synapse:secrets:form",
    "registration_shared_secret": "synapse:secrets:registration",
    "worker_replication_secret": "synapse:secrets:replication",
    "signing_key": "synapse:signing_key:current",
    "old_signing_keys": "synapse:signing_key:old",
    "server_name": "synapse:server_name",
    "app_service_config_files": "synapse:appservices",
    "max_upload_size": "synapse:max_upload_size",
    "public_baseurl": "synapse:public_base_url",
}

# What a part of what is public may have: see data/routes.yaml.
TRAITS = ("media", "upload", "admin")

# What the rest of the formula rests on.
SETTINGS_REFUSED = {
    **dict.fromkeys(PLANNED_SETTINGS, "leave it out, the formula sets it"),
    **dict.fromkeys(("daemonize", "worker_daemonize"), "leave it out: a container ends with the process it started"),
    "media_store_path": "leave it out: media are kept below synapse:directories:data, the one place that containers can write to",
}


def plan(**kwargs):
    """
    Return the whole plan of the pillar: see :func:`build`. A job of its own gets no value of a worker's own settings, which
    may be secrets.

    Raises CommandExecutionError that lists every fault of the pillar.

    CLI Example:

    .. code-block:: bash

        salt-call synapse_workers.plan
    """
    # Where the roster is, only a pillar of the right form can say.
    _refuse(_faults_of_form())
    settings = __salt__["synapse_pillar.settings"]()
    inputs = repr([settings, roster(settings)])
    known = __context__.get("synapse_workers.plan")
    if not known or known[0] != inputs:
        _refuse(_faults_of_content())
        data = __salt__["synapse_pillar.knowledge"]()
        planned = build(settings, data["workers"], data["routes"], roster(settings))
        known = __context__["synapse_workers.plan"] = (inputs, planned)
    return _without_secrets(known[1]) if __salt__["synapse_pillar.is_job"](kwargs) else known[1]


def _without_secrets(planned):
    def shown(config):
        return {key: value if key in PLANNED_SETTINGS else NOT_SHOWN for key, value in config.items()}

    return {
        **planned,
        "processes": [{**process, "config": shown(process["config"])} for process in planned["processes"]],
    }


def _refuse(found):
    if found:
        raise CommandExecutionError("The pillar has faults:\n" + "\n".join(f"- {line}" for line in found))


def names():
    """
    Return the names of all processes, the main process first.

    CLI Example:

    .. code-block:: bash

        salt-call synapse_workers.names
    """
    return [process["name"] for process in plan()["processes"]]


def validate():
    """
    Return a list of all faults of the pillar, a sentence each; an empty list says that it can be applied.

    CLI Example:

    .. code-block:: bash

        salt-call synapse_workers.validate
    """
    return _faults_of_form() or _faults_of_content()


def _faults_of_form():
    former = __pillar__.get("matrix_synapse_workers_enabled_list")
    if former is not None:
        return [_former_list_fault("matrix_synapse_workers_enabled_list", former)]
    return former_fault(__pillar__.get("synapse")) or __salt__["synapse_pillar.faults"]()


def _faults_of_content():
    settings = __salt__["synapse_pillar.settings"]()
    known = __salt__["synapse_pillar.knowledge"]()
    found = faults(settings, known["workers"], roster(settings))
    return found + __salt__["synapse_appservice.faults"]() + __salt__["synapse_config.faults"]()


def outdated_modules():
    """
    Return a fault for each of the formula's modules that the minion runs in another version than the file server has.

    Salt syncs custom modules at a highstate, not at ``state.apply synapse``, and only after the pillar was rendered.

    CLI Example:

    .. code-block:: bash

        salt-call synapse_workers.outdated_modules
    """
    cache = pathlib.Path(__opts__["extension_modules"])
    found = []
    for directory in ("modules", "states"):
        for source in __salt__["cp.list_master"](prefix=f"_{directory}/synapse_"):
            if source.endswith(".py"):
                synced = cache / directory / pathlib.Path(source).name
                if not synced.exists() or not _is_served(synced, __salt__["cp.hash_file"](f"salt://{source}")):
                    found.append(
                        f"{source} changed since the minion synced it: run `salt-call saltutil.sync_all` first"
                    )
    return found


def _is_served(path, served):
    # The master's `hash_type` says which digest the file server gives.
    return salt.utils.hashutils.get_hash(str(path), form=served["hash_type"]) == served["hsum"]


def diagram():
    """
    Return a picture of who talks to whom, as Mermaid text.

    CLI Example:

    .. code-block:: bash

        salt-call synapse_workers.diagram
    """
    return draw(plan())


def roster(settings):
    """
    Return the roster that is kept on this minion, ``{}`` before the first run.

    Raises CommandExecutionError if it can't be read.

    CLI Example:

    .. code-block:: bash

        salt-call synapse_workers.roster '{"directories": {"data": "/var/lib/matrix-synapse"}}'
    """
    path = pathlib.Path(settings["directories"]["data"], "roster.json")
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(kept, dict):
            raise ValueError("it holds no mapping")
        return kept
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as err:
        raise CommandExecutionError(
            f"{path}: {err}. It keeps the workers' names; put it back from a backup, or remove it to have all named anew"
        ) from err


def build(settings, workers, routes_data, roster):
    """
    Return the plan: a pure function of its arguments.

    settings
        The pillar below ``synapse`` over the defaults, without faults: see ``synapse_pillar.settings``.

    workers
        ``data/workers.yaml``.

    routes_data
        ``data/routes.yaml``.

    roster
        The roster of the run before, ``{}`` if there was none.

    The plan is a dict of

    ``processes``
        A list, the main process first, then the workers by index. Each has ``name``, ``type``, ``stream`` (or None),
        ``index`` (None for main), ``about``, ``app``, ``config_files`` (paths in the order Synapse reads them),
        ``config`` (the worker's own settings; empty for main), ``public_socket`` (or None), ``private_socket``,
        ``log_level``, ``memory``, ``cpus``, ``arguments``.

    ``shared``
        The settings of homeserver.yaml that bind the processes together.

    ``upstreams``, ``routes``, ``kinds``, ``public``
        What nginx needs: see :func:`routing`.

    ``max_connections``
        How many connections the database must allow.

    ``roster``
        The roster after this run.
    """
    wanted = [entry for entry in _expand(settings, workers) for _ in range(entry.get("count", 1))]
    numbered = sorted(_number(wanted, roster.get("workers", {})), key=lambda pair: pair[0])
    processes = [_main(settings, workers)]
    processes += [_worker(index, {**_blank(settings), **entry}, settings, workers) for index, entry in numbered]
    shared = _shared(processes, settings, workers)
    for process in processes:
        _listen(process, shared, settings)
    return {
        "processes": processes,
        "shared": shared,
        **routing(processes, routes_data, settings["image"]["version"]),
        "max_connections": max_connections(len(processes), settings),
        "roster": {
            "server_name": settings["server_name"],
            "workers": {
                process["name"]: _identity(index, entry)
                for (index, entry), process in zip(numbered, processes[1:], strict=True)
            },
        },
    }


def _blank(settings):
    """What every process gets where its entry says nothing."""
    return {"stream": None, "config": {}, **{key: settings["process"][key] for key in ENTRY_OPTIONS if key != "config"}}


def _expand(settings, workers):
    """The entries of the preset, then those of the list."""
    return list(workers["presets"].get(settings["workers"]["preset"], [])) + list(settings["workers"]["list"])


def _identity(index, entry):
    """What the roster keeps of a worker, to know it again: of its own entry, so that no change elsewhere makes it another."""
    options = json.dumps([entry.get(key) for key in ENTRY_OPTIONS], sort_keys=True, default=str)
    return {
        "index": index,
        "type": entry["type"],
        "stream": entry.get("stream"),
        "options": hashlib.sha256(options.encode()).hexdigest()[:16],
    }


def _number(wanted, known):
    """
    Pair each wanted worker with an index: the one it bore before, else the lowest that nobody bears.

    A worker is known again by type, stream and options; failing that, by type and stream, so that changed options do not
    rename it.
    """
    bearers = sorted(known.values(), key=lambda bearer: bearer["index"])
    numbered, rest = [], list(wanted)
    for likeness in (("type", "stream", "options"), ("type", "stream")):
        nameless = []
        for entry in rest:
            identity = _identity(None, entry)
            match = next((b for b in bearers if all(b[key] == identity[key] for key in likeness)), None)
            if match:
                bearers.remove(match)
                numbered.append((match["index"], entry))
            else:
                nameless.append(entry)
        rest = nameless
    taken = {index for index, _ in numbered}
    free = (index for index in range(len(wanted)) if index not in taken)
    return numbered + [(next(free), entry) for entry in rest]


def _main(settings, workers):
    own = {key: value for key, value in settings["main"].items() if value is not None}
    main, config = workers["main"], settings["config"]
    return {
        **_blank(settings),
        **own,
        "name": MAIN,
        "type": "main",
        "index": None,
        "about": main["about"],
        "app": main["app"],
        "serves": main["serves"] + [resource for key, resource in main["serves_with"].items() if config.get(key)],
        "config_files": [f"{settings['directories']['config']}/homeserver.yaml"],
        "own_config": {},
    }


def _worker(index, entry, settings, workers):
    stream = entry["stream"]
    kind = {**workers["types"][entry["type"]], **(workers["streams"][stream] if stream else {})}
    name = f"{WORKER_PREFIX}{index}-{entry['type']}"
    if stream:
        name += "-" + stream.replace("_", "-")
    about = f"{kind['about']}: {stream}" if stream else kind["about"]
    directory = settings["directories"]["config"]
    return {
        **{key: value for key, value in entry.items() if key not in ("count", "config")},
        "name": name,
        "index": index,
        "about": about,
        "app": kind["app"],
        "serves": kind.get("serves", []),
        "config_files": [f"{directory}/homeserver.yaml", f"{directory}/workers/{name}.yaml"],
        "own_config": {**kind.get("config", {}), **entry["config"]},
    }


def _shared(processes, settings, workers):
    """The settings that bind the processes together, each with the names that the plan gave."""
    shared, writers = {}, {}
    for process in processes[1:]:
        kind = workers["types"][process["type"]]
        shared.update(kind.get("shared", {}))
        if "listed_in" in kind:
            shared.setdefault(kind["listed_in"], []).append(process["name"])
        if "named_in" in kind:
            shared.setdefault(kind["named_in"], process["name"])
        if process["stream"]:
            writers.setdefault(process["stream"], []).append(process["name"])
    for stream, traits in workers["streams"].items():
        others = [process["name"] for process in processes if process["type"] == traits.get("else_written_by")]
        if others and stream not in writers:
            writers[stream] = others
    proxies = settings["config"].get("outbound_federation_restricted_to") or []
    called = [MAIN, *(name for names in writers.values() for name in names), *proxies]
    shared["stream_writers"] = writers
    shared["instance_map"] = {
        MAIN_IN_INSTANCE_MAP if process["type"] == "main" else process["name"]: {
            "path": _socket(settings, "private", process["name"])
        }
        for process in processes
        if process["name"] in called
    }
    return shared


def _socket(settings, side, name):
    return f"{settings['directories']['run']}/{side}/{name}.sock"


def _listen(process, shared, settings):
    """
    Give the process its listeners.

    Every process has a private one, for health, metrics and replication, which only Synapse may enter. One that serves
    requests has a public one besides, which nginx may enter too. A process that answers /health has bound both.
    """
    name, is_main = process["name"], process["type"] == "main"
    called = MAIN_IN_INSTANCE_MAP if is_main else name
    private = (
        ["health"] + ["metrics"] * settings["metrics"] + ["replication"] * (called in shared.get("instance_map", {}))
    )
    serves = process.pop("serves")
    if is_main and not shared.get("enable_media_repo", True):
        serves = [resource for resource in serves if resource != "media"]
    process["log_config"] = f"{settings['directories']['config']}/log-{process['log_level'].lower()}.yaml"
    process["private_socket"] = _socket(settings, "private", name)
    process["public_socket"] = _socket(settings, "public", name) if serves else None
    listeners = [_listener(process["private_socket"], private, x_forwarded=False)]
    if serves:
        listeners.append(_listener(process["public_socket"], serves, x_forwarded=True))
    own = process.pop("own_config")
    if is_main:
        process["config"] = {"listeners": listeners}
    else:
        process["config"] = {
            "worker_app": process["app"],
            "worker_name": name,
            "worker_listeners": listeners,
            "worker_log_config": process["log_config"],
            **own,
        }


def _listener(path, names, x_forwarded):
    # Who may enter a socket is decided by its directory, so the socket itself is open to all.
    return {
        "type": "http",
        "path": path,
        "mode": 0o666,
        "x_forwarded": x_forwarded,
        "request_id_header": "X-Request-ID",
        "resources": [{"names": list(names)}],
    }


def max_connections(processes, settings):
    """
    Return the ``max_connections`` that suffices for a number of processes.

    It grows in doublings, so that a new worker seldom costs a restart of the database.

    CLI Example:

    .. code-block:: bash

        salt-call synapse_workers.max_connections 17 '{"postgres": {"connections": {"max": 10}}}'
    """
    # 20 for the operator, backups and PostgreSQL's own reserve.
    needed = processes * settings["postgres"]["connections"]["max"] + 20
    allowed = 100
    while allowed < needed:
        allowed *= 2
    return allowed


def routing(processes, routes_data, version):
    """
    Return what nginx needs to send each request to a process that can answer it, as a dict of

    ``upstreams``
        A list, main's first. Each has ``name``, ``balance`` (``user``, ``room``, ``origin`` or None), ``servers``, the
        sockets of its processes, and ``gates``, the sockets where requests wait for these.

    ``routes``
        A list in the order of precedence. Each has ``match``, a regular expression over ``METHOD:/raw/path?``, with
        ``initial`` at the end for a sync that begins anew, and ``upstream``, the name of one. What none of them matches is
        main's.

    ``kinds``
        What else is to be known of a request: a list of dicts with ``match``, as above, and ``kind``.

    ``public``
        What each of nginx's servers, ``client`` and ``federation``, lets in: a list of dicts with ``path``, what the request
        begins with, and the flags ``media``, ``upload`` and ``admin``.

    processes
        Dicts with at least ``name``, ``type``, ``stream`` (or None) and ``public_socket`` (None: serves no requests).

    routes_data
        ``data/routes.yaml``.

    version
        The release of Synapse, such as ``v1.163.2``; one that is no number is newer than all.
    """
    main = next(process["public_socket"] for process in processes if process["type"] == "main")
    upstreams = {MAIN_UPSTREAM: {"name": MAIN_UPSTREAM, "balance": None, "servers": [main], "gates": [_gate(main)]}}
    found = []
    for route, match in matches(routes_data, version):
        upstream = _upstream(route, processes) or upstreams[MAIN_UPSTREAM]
        upstreams.setdefault(upstream["name"], upstream)
        found.append({"match": match, "upstream": upstream["name"]})
    # Main is the default: a route to it is only of use where it keeps a later one from matching.
    while found and found[-1]["upstream"] == MAIN_UPSTREAM:
        found.pop()
    public = {
        server: [{"path": path, **dict.fromkeys(TRAITS, False), **(traits or {})} for path, traits in paths.items()]
        for server, paths in routes_data["public"].items()
    }
    kinds = [
        {"match": match, "kind": kind}
        for kind, requests in routes_data["kinds"].items()
        for request in requests
        for match in _matches(request, request["methods"], routes_data["names"])
    ]
    return {"upstreams": list(upstreams.values()), "routes": found, "kinds": kinds, "public": public}


def matches(routes_data, version):
    """
    Return a list of pairs in the order of precedence: a route of ``data/routes.yaml``, and a regular expression over
    ``METHOD:/raw/path?`` for one of its paths. Routes that do not hold for a release of Synapse are left out.
    """
    return [
        (route, match)
        for route in routes_data["routes"]
        if _holds(route, version)
        for match in _matches(route, _and_asked_alike(route.get("methods")), routes_data["names"])
    ]


def _matches(requests, methods, names):
    method = f"(?:{'|'.join(methods)})" if methods else "[A-Z]+"
    end = "initial$" if requests.get("initial") else ""
    return [f"^{method}:{_regex(path, names)}\\?{end}" for path in requests["paths"]]


def _holds(route, version):
    minor = _minor(version)
    return _minor(route.get("since", "0.0")) <= minor <= _minor(route.get("until", "latest"))


def _minor(version):
    """A release without its patch, to compare."""
    numbers = re.match(r"v?(\d+)\.(\d+)", version)
    return tuple(map(int, numbers.groups())) if numbers else (math.inf,)


def _upstream(route, processes):
    """The upstream of those who own a route, None if that is main."""
    for key, owner in [("stream", route.get("stream"))] + [("type", kind) for kind in route.get("workers", [])]:
        servers = [p["public_socket"] for p in processes if owner and p[key] == owner and p["public_socket"]]
        if servers:
            # There is nothing to balance over one process.
            balance = route.get("balance") if len(servers) > 1 else None
            words = ["synapse", "stream" if key == "stream" else None, owner.replace("-", "_"), balance]
            name = "_".join(filter(None, words))
            return {"name": name, "balance": balance, "servers": servers, "gates": [_gate(path) for path in servers]}
    return None


def _gate(public_socket):
    """Where requests wait for a process: see ``synapse/nginx/files/gate.py``."""
    path = pathlib.PurePath(public_socket)
    return str(path.parents[1] / "gate" / path.name)


def _and_asked_alike(methods):
    """The methods with those that go the same way."""
    return methods and [*methods, *["HEAD"] * ("GET" in methods), "OPTIONS"]


def _regex(path, names):
    """The regular expression of a path such as ``<client>/rooms/*/{join,leave}``; ``routes.yaml`` explains the signs."""
    path = re.sub(r"<(\w+)>", lambda name: names[name[1]], path)
    signs = {"**": ".*", "*": "[^/]*", "{": "(?:", ",": "|", "}": ")"}
    return re.sub(r"\*\*|[^\w/-]", lambda sign: signs.get(sign[0], re.escape(sign[0])), path)


def faults(settings, workers, roster):
    """
    Return the faults of the workers that the settings ask for, a sentence each.

    The arguments are those of :func:`build`; every value alone is right.
    """
    entries = _located_entries(settings, workers)
    found = [line for where, entry in entries for line in _entry_faults(where, entry, workers)]
    found += _crowd_faults(entries, workers)
    found += _setting_faults("synapse:config", settings["config"])
    found += _redis_faults(entries, settings["config"])
    found += _name_setting_faults(settings["config"], workers)
    found += _roster_faults(settings, roster)
    if found:
        return found
    planned = build(settings, workers, {"routes": [], "kinds": {}, "names": {}, "public": {}}, roster)
    found += _socket_faults(planned, settings)
    found += _connection_faults(planned, settings)
    found += _ghost_faults(planned, settings["config"], workers)
    found += _other_writers_faults(planned, settings["config"])
    return found


def _located_entries(settings, workers):
    preset = settings["workers"]["preset"]
    located = [(f"synapse:workers:preset ({preset})", entry) for entry in workers["presets"].get(preset, [])]
    return located + [(f"synapse:workers:list:{i}", entry) for i, entry in enumerate(settings["workers"]["list"])]


def _fault(*args, **kwargs):
    return __salt__["synapse_pillar.fault"](*args, **kwargs)


def _did_you_mean(*args):
    return __salt__["synapse_pillar.did_you_mean"](*args)


def _entry_faults(where, entry, workers):
    if entry["type"] == "stream-writer" and "stream" not in entry:
        yield f"{where}:stream: is missing: a stream-writer needs one of {', '.join(workers['streams'])}"
    if entry["type"] != "stream-writer" and "stream" in entry:
        yield _fault(f"{where}:stream", entry["stream"], f"only a stream-writer has a stream, not a {entry['type']}")
    config = entry.get("config", {})
    yield from _setting_faults(f"{where}:config", config)
    for key in ("instance_map", "stream_writers", *workers["settings_with_names"]):
        if key in config:
            right = "all processes must agree on it: it belongs into synapse:config"
            yield _fault(f"{where}:config:{key}", config[key], right)


def _setting_faults(where, config):
    """Settings that have another place, or none."""
    for key, right in SETTINGS_REFUSED.items():
        if key in config:
            yield _fault(f"{where}:{key}", config[key], right)
    for key, path in SETTINGS_ELSEWHERE.items():
        for name in (key, f"{key}_path"):
            if name in config:
                secret = path.startswith(("synapse:secrets", "synapse:signing_key"))
                yield _fault(f"{where}:{name}", config[name], f"it belongs into {path}", secret)


def _redis_faults(entries, config):
    """Without Redis, workers would hear of nothing."""
    if not any(entry.get("count", 1) for _, entry in entries):
        return
    given = [("synapse:config", config)] + [(f"{where}:config", entry.get("config", {})) for where, entry in entries]
    for where, redis in [(where, own["redis"]) for where, own in given if "redis" in own]:
        if not isinstance(redis, dict):
            yield _fault(f"{where}:redis", redis, "it must be a mapping")
        elif not redis.get("enabled", True):
            yield _fault(f"{where}:redis:enabled", redis["enabled"], "it must be true, since there are workers")


def _crowd_faults(entries, workers):
    """More workers than there may be, of a type, of a stream, or in all."""
    crowds = {}
    for where, entry in entries:
        crowd = crowds.setdefault((entry["type"], entry.get("stream")), {"count": 0})
        crowd["count"] += entry.get("count", 1)
        crowd["where"] = where
    for (kind, stream), crowd in crowds.items():
        if kind == "stream-writer":
            key, value, who = "stream", stream, "writers of this stream"
            most = 1 if stream and not workers["streams"][stream]["sharded"] else MOST_WORKERS
        else:
            key, value, who = "type", kind, "workers of this type"
            most = workers["types"][kind].get("at_most", MOST_WORKERS)
        if crowd["count"] > most:
            right = f"Synapse allows {most}, and there are {crowd['count']} {who}"
            yield _fault(f"{crowd['where']}:{key}", value, right)
    total = sum(crowd["count"] for crowd in crowds.values())
    if total > MOST_WORKERS:
        yield _fault("synapse:workers", total, f"there may be {MOST_WORKERS} workers at most")


def _roster_faults(settings, roster):
    known = roster.get("server_name", settings["server_name"])
    if known != settings["server_name"]:
        right = f"it must stay {known}, as this homeserver was made: Synapse's server name can never change"
        yield _fault("synapse:server_name", settings["server_name"], right)


def _socket_faults(planned, settings):
    longest = max((process["private_socket"] for process in planned["processes"]), key=len)
    if len(longest) > LONGEST_SOCKET_PATH:
        right = (
            f"it must be shorter: a socket's path may have {LONGEST_SOCKET_PATH} bytes, {longest} has {len(longest)}"
        )
        yield _fault("synapse:directories:run", settings["directories"]["run"], right)


def _connection_faults(planned, settings):
    needed, count = planned["max_connections"], len(planned["processes"])
    given = settings["postgres"]["options"].get("max_connections", needed)
    if needed > MOST_CONNECTIONS:
        right = f"it must be less: {count} processes would need {needed} connections, and PostgreSQL allows {MOST_CONNECTIONS}"
        yield _fault("synapse:postgres:connections:max", settings["postgres"]["connections"]["max"], right)
    elif not re.fullmatch("[0-9]{1,9}", str(given)) or not needed <= int(given) <= MOST_CONNECTIONS:
        right = f"it must be from {needed}, for as many processes, to {MOST_CONNECTIONS}; leave it out to get the least"
        yield _fault("synapse:postgres:options:max_connections", given, right)


def _name_setting_faults(config, workers):
    """Settings that hold names of processes, but not as Synapse wants them."""
    single = {kind.get("named_in") for kind in workers["types"].values()}
    for key in workers["settings_with_names"]:
        value = config.get(key)
        if value is not None and key in single and not isinstance(value, str):
            yield _fault(f"synapse:config:{key}", value, "it must be the name of a process")
        elif value is not None and key not in single and not _is_list_of_names(value):
            # With an empty list, nobody would do it.
            yield _fault(f"synapse:config:{key}", value, "it must be a list of names of processes, and not be empty")
    for key in ("instance_map", "stream_writers"):
        if not isinstance(config.get(key, {}), dict):
            yield _fault(f"synapse:config:{key}", config[key], "it must be a mapping")
    for stream, value in _writers(config).items():
        where = f"synapse:config:stream_writers:{stream}"
        if stream not in workers["streams"]:
            yield f"{where}: there is no such stream: {_did_you_mean(stream, workers['streams'])}"
        elif not isinstance(value, str) and not _is_list_of_names(value):
            yield _fault(where, value, "it must be the name of a process, or a list of names that is not empty")
        elif not isinstance(value, str) and len(value) > 1 and not workers["streams"][stream]["sharded"]:
            yield _fault(where, value, "Synapse allows one writer of this stream")


def _is_list_of_names(value):
    return isinstance(value, list) and value != [] and all(isinstance(name, str) for name in value)


def _writers(config):
    writers = config.get("stream_writers")
    return writers if isinstance(writers, dict) else {}


def _ghost_faults(planned, config, workers):
    """Names in the operator's own settings that no process bears: Synapse itself would take them."""
    own = {process["name"] for process in planned["processes"]} - {MAIN}
    others = set(config.get("instance_map", {}))
    for name in sorted(others & (own | {MAIN_IN_INSTANCE_MAP, MAIN_IN_STREAM_WRITERS})):
        value = config["instance_map"][name]
        yield _fault(f"synapse:config:instance_map:{name}", value, "leave it out, the formula sets it")
    used = {key: config[key] for key in workers["settings_with_names"] if config.get(key) is not None}
    used |= {f"stream_writers:{stream}": value for stream, value in _writers(config).items()}
    for key, value in used.items():
        borne = sorted(own | others)
        if key != "outbound_federation_restricted_to":
            # Only a worker can be one of those.
            borne.insert(0, MAIN_IN_STREAM_WRITERS)
        for name in [value] if isinstance(value, str) else value:
            if name not in borne:
                yield _fault(f"synapse:config:{key}", name, f"no process bears this name: {_did_you_mean(name, borne)}")


def _other_writers_faults(planned, config):
    """Writers of ours that are not those of the plan: nginx would send requests to who can't answer them."""
    ours = {MAIN_IN_STREAM_WRITERS, *(process["name"] for process in planned["processes"])}
    for stream, value in _writers(config).items():
        planned_writers = planned["shared"]["stream_writers"].get(stream, [MAIN_IN_STREAM_WRITERS])
        named = ours.intersection([value] if isinstance(value, str) else value)
        if named and named != set(planned_writers):
            right = (
                f"this stream is written by {' and '.join(planned_writers)}: leave it out,"
                " and add or remove an entry of the type stream-writer instead"
            )
            yield _fault(f"synapse:config:stream_writers:{stream}", value, right)


def former_fault(pillar):
    """
    Return the fault of a pillar that carries the playbook's list of workers, as a list; ``[]`` for any other.

    The fault says what to write instead.
    """
    if not isinstance(pillar, dict):
        return []
    if "matrix_synapse_workers_enabled_list" in pillar:
        return [
            _former_list_fault(
                "synapse:matrix_synapse_workers_enabled_list", pillar["matrix_synapse_workers_enabled_list"]
            )
        ]
    value = pillar.get("workers")
    entries = value.get("list") if isinstance(value, dict) else value
    if isinstance(entries, list) and any(_is_former(entry) for entry in entries):
        return [_former_list_fault("synapse:workers" + ":list" * isinstance(value, dict), entries)]
    return []


FORMER_NAME = re.compile(r"matrix-synapse-worker[_-](?P<type>[a-z_-]+?)[_-]\d+(?:-stream-(?P<stream>[a-z_]+))?")


def _is_former(entry):
    if isinstance(entry, str):
        return bool(FORMER_NAME.fullmatch(entry))
    return isinstance(entry, dict) and bool({"port", "metrics_port", "name", "webserving"} & set(entry))


def _former_list_fault(where, entries):
    known = __salt__["synapse_pillar.knowledge"]()["workers"]
    return (
        f"{where}: this is the playbook's list of workers, which has no place here: names and sockets follow from types"
        f" alone. Write instead:\n{translate(entries, known)}"
    )


def translate(entries, workers):
    """
    Return the pillar text that means the same as the playbook's list of workers.

    entries
        A list of maps with ``type`` (and ``stream_writer_stream``), or of names like
        ``matrix-synapse-worker_generic_worker-18111``.
    """
    counts = {}
    for entry in entries if isinstance(entries, list) else []:
        if isinstance(entry, str):
            match = FORMER_NAME.fullmatch(entry)
            entry = match.groupdict() if match else {}
        if not isinstance(entry, dict):
            continue
        former, stream = entry.get("type"), entry.get("stream_writer_stream", entry.get("stream"))
        former = former.replace("-", "_") if isinstance(former, str) else ""
        kind = workers["former_types"].get(former, former.replace("_", "-"))
        if kind in workers["types"]:
            stream = stream if isinstance(stream, str) and stream in workers["streams"] else None
            key = (kind, stream or "STREAM") if kind == "stream-writer" else (kind, None)
            counts[key] = counts.get(key, 0) + 1
    lines = [
        {"type": kind, **({"stream": stream} if stream else {}), **({"count": count} if count > 1 else {})}
        for (kind, stream), count in counts.items()
    ]
    return salt.utils.yaml.safe_dump({"synapse": {"workers": {"list": lines}}}, sort_keys=False)


def draw(planned):
    """
    Return a plan as a Mermaid flowchart (https://mermaid.js.org/syntax/flowchart.html): who talks to whom.

    planned
        What :func:`build` returns.
    """
    ids = {process["name"]: f"p{i}" for i, process in enumerate(planned["processes"])}
    writers = {name for names in planned["shared"].get("stream_writers", {}).values() for name in names}
    lines = ["flowchart LR", "  clients([clients and homeservers]) --> nginx[nginx]"]
    for process in planned["processes"]:
        lines.append(f'  {ids[process["name"]]}["{process["name"]}<br/>{process["about"]}"]')
        if process["public_socket"]:
            lines.append(f"  nginx --> {ids[process['name']]}")
    lines += [f"  workers{{{{every worker}}}} -- replication --> {ids[name]}" for name in [MAIN, *sorted(writers)]]
    lines.append("  p0 & workers -- pub/sub --> redis[(Redis)]")
    lines.append("  p0 & workers --> postgres[(PostgreSQL)]")
    return "\n".join(lines) + "\n"
