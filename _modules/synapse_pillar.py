"""
The pillar below ``synapse``: what it says, merged with the formula's defaults, and what is wrong with it.

Every other module of the formula asks this one for its settings. ``synapse/data/schema.yaml`` says what may stand where;
a rule that needs more than one value stands here, or in the module that knows the subject.
"""

import difflib
import ipaddress
import itertools
import json
import re

import salt.utils.yaml
from salt.exceptions import CommandExecutionError

DATA_FILES = {
    "defaults": "salt://synapse/defaults.yaml",
    "schema": "salt://synapse/data/schema.yaml",
    "workers": "salt://synapse/data/workers.yaml",
    "routes": "salt://synapse/data/routes.yaml",
    "modules": "salt://synapse/data/modules.yaml",
}

# What Salt 3008 shows instead of a pillar's secrets outside of rendering: never a value that somebody chose.
MASKED = "**********"

# What stands in the place of a value that may hold a secret, or not.
NOT_SHOWN = "(not shown)"

MOST_LISTED = 32


def settings(**kwargs):
    """
    Return the pillar below ``synapse``, merged over the formula's defaults.

    Templates and other modules get secrets as they stand in the pillar. A job of its own, whose return is shown and may be
    kept by a master, gets none: ``data/schema.yaml`` says what is a secret, or may hold some.

    CLI Example:

    .. code-block:: bash

        salt-call synapse_pillar.settings
    """
    pillar, known = __pillar__.get("synapse"), knowledge()
    merged = merge(known["defaults"], pillar if isinstance(pillar, dict) else {})
    return _without_secrets(merged, known["schema"]["pillar"]) if is_job(kwargs) else merged


def is_job(kwargs):
    """
    Return whether a function was called as a job of its own, by ``salt`` or ``salt-call``, not by a template or a module.

    kwargs
        What the function got by ``**kwargs``: Salt tells it of the job there.
    """
    # Of several functions in one job it is a list.
    return "__pub_fun" in kwargs


def _without_secrets(value, node):
    if value is None:
        return None
    # What stands where nothing belongs may be anything.
    keys, others = node.get("keys", {}), node.get("values", {"type": "secret"})
    if node["type"] == "secret":
        return MASKED
    if node["type"] == "map" and isinstance(value, dict):
        if node.get("secret"):
            return dict.fromkeys(value, NOT_SHOWN)
        return {key: _without_secrets(item, keys.get(key, others)) for key, item in value.items()}
    if node["type"] == "list" and isinstance(value, list) and not node.get("secret"):
        return [_without_secrets(item, node["items"]) for item in value]
    misplaced = isinstance(value, (dict, list)) and node["type"] != "any"
    return NOT_SHOWN if misplaced or _holds_secrets(node) else value


def faults():
    """
    Return a list of all faults of the pillar that show without a look at the workers it asks for, a sentence each.

    CLI Example:

    .. code-block:: bash

        salt-call synapse_pillar.faults
    """
    known = knowledge()
    pillar = __pillar__.get("synapse")
    found = check(pillar, known["schema"]["pillar"], "synapse", known)
    # A rule about several values makes no sense while one of them is of the wrong type.
    return found or relations(merge(known["defaults"], pillar))


def knowledge():
    """
    Return the formula's data files as a dict: ``defaults``, ``schema``, ``workers``, ``routes`` and ``modules``.

    They are read once a run.

    CLI Example:

    .. code-block:: bash

        salt-call synapse_pillar.knowledge
    """
    if "synapse_pillar.knowledge" not in __context__:
        __context__["synapse_pillar.knowledge"] = {name: _data_file(url) for name, url in DATA_FILES.items()}
    return __context__["synapse_pillar.knowledge"]


def _data_file(url):
    text = __salt__["cp.get_file_str"](url)
    if not text:
        raise CommandExecutionError(f"{url} is not on the file server: is the formula in file_roots?")
    return salt.utils.yaml.safe_load(text)


def merge(base, over):
    """
    Return ``base`` with ``over`` laid over it: maps are merged, everything else (lists too) is replaced.
    """
    merged = dict(base)
    for key, value in over.items():
        if isinstance(value, dict) and isinstance(merged.get(key), dict):
            value = merge(merged[key], value)
        merged[key] = value
    return merged


def public_base_url(settings):
    """
    Return the URL that clients use.

    settings
        The pillar merged over the defaults.
    """
    return settings["public_base_url"] or f"https://{settings['server_name']}/"


def fault(path, value, right, secret=False):
    """
    Return the one sentence that says what is wrong: the pillar path, the value, and what would be right.

    path
        Where it stands, as Salt writes it: ``synapse:workers:list:0:type``.

    value
        What stands there.

    right
        What would be right, in words.

    secret
        Do not show the value.
    """
    shown = "(a secret, not shown)" if secret else _shown(value)
    return f"{path}: {shown}: {right}"


def _shown(value):
    try:
        text = json.dumps(value, default=str, ensure_ascii=False)
    except TypeError:
        # YAML has keys that JSON has not.
        text = str(value)
    return text if len(text) <= 120 else text[:117] + "..."


def did_you_mean(value, known):
    """
    Return "did you mean X? Known are ..." for a name that is not among the known ones.
    """
    plain = {name.lower().replace("_", "-"): name for name in known}
    if not plain:
        return "there are none"
    close = difflib.get_close_matches(str(value).lower().replace("_", "-"), plain, n=1)
    known = list(plain.values())
    listed = ", ".join(known[:MOST_LISTED]) + ", ..." * (len(known) > MOST_LISTED)
    return f"did you mean {plain[close[0]]}? Known are {listed}" if close else f"known are {listed}"


def check(value, node, path, known):
    """
    Return the faults of a value against a node of ``data/schema.yaml``.

    value
        What stands in the pillar.

    node
        The schema's node: a dict with at least ``type``.

    path
        The value's pillar path.

    known
        The formula's data files, see :func:`knowledge`.
    """
    if value is None:
        return [] if node.get("null") else [fault(path, value, f"it needs {_expected(node, known)}")]
    return CHECKS[node["type"]](value, node, path, known)


def _check_map(value, node, path, known):
    if not isinstance(value, dict):
        return [_of_another_kind(value, node, path, known)]
    found = []
    keys = node.get("keys")
    for key, item in value.items():
        where = f"{path}:{key}"
        if not isinstance(key, str):
            found.append(fault(where, key, "a key must be a string: put it in quotes"))
        elif keys is not None and key not in keys:
            found.append(f"{where}: there is no such key: {did_you_mean(key, keys)}")
        elif "names_of" in node and key not in known[node["names_of"]]:
            found.append(f"{where}: there is no such name: {did_you_mean(key, known[node['names_of']])}")
        elif "name" in node and not re.fullmatch(node["name"], key):
            found.append(fault(where, key, f"the name must be {node.get('name_expected', 'like ' + node['name'])}"))
        else:
            found += check(item, keys[key] if keys is not None else node["values"], where, known)
    for key, child in (keys or {}).items():
        if child.get("required") and key not in value:
            found.append(f"{path}:{key}: is missing: it needs {_expected(child, known)}")
    return found


def _check_list(value, node, path, known):
    if not isinstance(value, list):
        return [_of_another_kind(value, node, path, known)]
    if node.get("not_empty") and not value:
        return [fault(path, value, "it needs at least one item")]
    return [line for i, item in enumerate(value) for line in check(item, node["items"], f"{path}:{i}", known)]


def _of_another_kind(value, node, path, known):
    right = f"it must be {_expected(node, known)}"
    if not _holds_secrets(node):
        return fault(path, value, right)
    kinds = {dict: "a mapping", list: "a list", str: "a string"}
    kind = next((name for kind, name in kinds.items() if isinstance(value, kind)), "a " + type(value).__name__)
    return f"{path}: {kind}: {right}"


def _holds_secrets(node):
    """Whether what stands at a node, or below it, must not be shown."""
    children = [*node.get("keys", {}).values(), *(node[key] for key in ("values", "items") if key in node)]
    return node["type"] == "secret" or node.get("secret", False) or any(map(_holds_secrets, children))


def _check_string(value, node, path, known):
    secret, most = node["type"] == "secret", node.get("max_length", 1 << 20)
    if secret and value == MASKED:
        return [fault(path, value, "it must be the secret itself, not the mask that Salt shows in its place", secret)]
    if not isinstance(value, str) or not re.fullmatch(node["pattern"], value, re.ASCII):
        return [fault(path, value, f"it must be {_expected(node, known)}", secret)]
    if len(value) > most:
        return [fault(path, value, f"it must be {_expected(node, known)}, of at most {most} characters", secret)]
    return []


def _check_number(value, node, path, known):
    kinds = (int,) if node["type"] == "integer" else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not node["min"] <= value <= node["max"]:
        return [fault(path, value, f"it must be {_expected(node, known)}")]
    return []


def _check_boolean(value, node, path, known):
    return [] if isinstance(value, bool) else [fault(path, value, "it must be true or false")]


def _check_choice(value, node, path, known):
    choices = _choices(node, known)
    if isinstance(value, str) and value in choices:
        return []
    former = known["workers"]["former_types"].get(value) if isinstance(value, str) else None
    if former in choices:
        return [fault(path, value, f"the playbook's type {value} is called {former} here")]
    return [fault(path, value, did_you_mean(value, choices))]


def _check_size(value, node, path, known):
    if (
        not isinstance(value, str)
        or not re.fullmatch(r"[1-9][0-9]{0,14}[KMG]", value)
        or not size(node["min"]) <= size(value) <= size(node["max"])
    ):
        return [fault(path, value, f"it must be {_expected(node, known)}")]
    return []


def _check_scalar(value, node, path, known):
    if isinstance(value, (dict, list)) or "\n" in str(value) or "\0" in str(value):
        return [fault(path, value, "it must be one string, number or boolean, in one line")]
    return []


def _check_any(value, node, path, known):
    if isinstance(value, dict):
        return _check_map(value, {"values": node}, path, known)
    if isinstance(value, list):
        return _check_list(value, {"items": node}, path, known)
    return []


def _check_server_name(value, node, path, known):
    # https://spec.matrix.org/latest/appendices/#server-name
    if isinstance(value, str) and len(value) <= 230:
        host, port = re.fullmatch(r"(.*?)(?::([0-9]{1,5}))?", value, re.DOTALL).groups()
        if port is None or 0 < int(port) < 65536:
            if re.fullmatch(r"[A-Za-z0-9](-*[A-Za-z0-9])*(\.[A-Za-z0-9](-*[A-Za-z0-9])*)*", host):
                return []
            if host.startswith("[") and host.endswith("]") and _parses(ipaddress.IPv6Address, host[1:-1]):
                return []
    return [fault(path, value, f"it must be {_expected(node, known)}")]


def _check_listen(value, node, path, known):
    address, port = listen_address(value)
    return [] if port else [fault(path, value, f"it must be {_expected(node, known)}")]


def listen_address(value):
    """
    Return ``(address, port)`` of a listen address; ``(None, None)`` where it is none. No address means all of them.
    """
    match = re.fullmatch(r"(?:(.+):)?([0-9]{1,5})", str(value)) if isinstance(value, (str, int)) else None
    if isinstance(value, bool) or not match or not 0 < int(match[2]) < 65536:
        return None, None
    address = match[1] or "*"
    plain = address[1:-1] if address.startswith("[") and address.endswith("]") else address
    kind = ipaddress.IPv6Address if plain != address else ipaddress.IPv4Address
    return (address, int(match[2])) if address == "*" or _parses(kind, plain) else (None, None)


def _check_address(value, node, path, known):
    if isinstance(value, str) and _parses(ipaddress.ip_network, value):
        return []
    return [fault(path, value, f"it must be {_expected(node, known)}")]


def _check_subnet(value, node, path, known):
    if isinstance(value, str) and "/" in value and _parses(ipaddress.IPv4Network, value):
        network = ipaddress.IPv4Network(value)
        if network.is_private and 8 <= network.prefixlen <= 29:
            return []
    return [fault(path, value, f"it must be {_expected(node, known)}")]


def _parses(kind, value):
    try:
        kind(value)
    except ValueError:
        return False
    # An IPv6 address with a zone: anything may stand after its "%".
    return "%" not in value


CHECKS = {
    "map": _check_map,
    "list": _check_list,
    "string": _check_string,
    "secret": _check_string,
    "integer": _check_number,
    "number": _check_number,
    "boolean": _check_boolean,
    "choice": _check_choice,
    "size": _check_size,
    "scalar": _check_scalar,
    "any": _check_any,
    "server_name": _check_server_name,
    "listen": _check_listen,
    "address": _check_address,
    "subnet": _check_subnet,
}


def _choices(node, known):
    return node["choices"] if "choices" in node else list(known["workers"][node["choices_of"]])


def _expected(node, known):
    if "expected" in node:
        return node["expected"]
    if node["type"] == "choice":
        return "one of " + ", ".join(_choices(node, known))
    if "min" in node:
        kind = "a whole number" if node["type"] == "integer" else "a number"
        return f"{kind} from {node['min']} to {node['max']}"
    return {"map": "a mapping", "list": "a list", "boolean": "true or false"}.get(node["type"], "a value")


def size(text):
    """
    Return the number of bytes that ``64M`` and the like mean.
    """
    return int(text[:-1]) << {"K": 10, "M": 20, "G": 30}[text[-1]]


def relations(settings):
    """
    Return the faults that only show between several values.

    settings
        The pillar merged over the defaults; every value alone is right.
    """
    return [line for rule in RELATIONS for line in rule(settings)]


def _directories_are_apart(settings):
    found = []
    directories = settings["directories"]
    for name, path in directories.items():
        parts = path.split("/")[1:]
        if len(parts) < 2 or set(parts) & {".", ".."} or any(_holds(path, other) for other in OTHERS_DIRECTORIES):
            # synapse.clean removes these directories: they can be nobody else's.
            right = "it must be a directory of Synapse's own, such as /srv/matrix-synapse"
            found.append(fault(f"synapse:directories:{name}", path, right))
    for name, other in itertools.permutations(directories, 2):
        path, other_path = directories[name], directories[other]
        if _holds(path, other_path) and (path != other_path or name > other):
            right = f"it must not hold synapse:directories:{other}, which is {other_path}"
            found.append(fault(f"synapse:directories:{name}", path, right))
    return found


# No directory of Synapse's may be one of these, or above one.
OTHERS_DIRECTORIES = (
    "/etc/nginx/conf.d",
    "/etc/systemd/system",
    "/run/postgresql",
    "/run/redis-synapse",
    "/run/systemd",
    "/usr/lib/systemd",
    "/usr/local/lib/matrix-synapse",
    "/var/cache/apt",
    "/var/lib/docker",
    "/var/lib/postgresql",
    "/var/lib/redis",
    "/var/log/nginx",
)


def _holds(path, other):
    return f"{other}/".startswith(f"{path}/")


def _backups_are_apart(settings):
    path = settings["backup"]["directory"]
    return [
        # synapse.clean may remove that one; and a backup that holds it would hold itself.
        fault("synapse:backup:directory", path, f"it must be apart from synapse:directories:{name}, which is {other}")
        for name, other in settings["directories"].items()
        if _holds(path, other) or _holds(other, path)
    ]


def _listeners_are_apart(settings):
    seen, found = {}, []
    servers = ["client"] + ["federation"] * settings["nginx"]["federation"]["enabled"]
    for server in servers if settings["nginx"]["managed"] else []:
        for i, value in enumerate(settings["nginx"][server]["listen"]):
            where = f"synapse:nginx:{server}:listen:{i}"
            address, port = listen_address(value)
            ip = ipaddress.ip_address("0.0.0.0" if address == "*" else address.strip("[]"))
            other = next((o for o, (o_ip, o_port) in seen.items() if port == o_port and _overlap(ip, o_ip)), None)
            if other:
                right = f"it collides with {other}: give each listener an address or a port of its own"
                found.append(fault(where, value, right))
            seen[where] = (ip, port)
    return found


def _overlap(ip, other):
    # nginx's IPv6 sockets take no IPv4.
    return ip == other or (ip.version == other.version and (ip.is_unspecified or other.is_unspecified))


def _databases_are_reachable(settings):
    found = []
    for service, name in (("postgres", "PostgreSQL"), ("redis", "Redis")):
        values, path = settings[service], f"synapse:{service}"
        if values["managed"]:
            for key in ("host", "password"):
                if values[key] is not None:
                    found.append(
                        fault(
                            f"{path}:{key}",
                            values[key],
                            f"leave it out: the formula's own {name} is reached by its Unix socket; an external one wants {path}:managed to be false",
                            secret=key == "password",
                        )
                    )
        elif not values["host"]:
            found.append(f"{path}:host: is missing: an external {name} ({path}:managed is false) needs a host")
    postgres = settings["postgres"]
    if not postgres["managed"] and not postgres["password"] and not str(postgres["host"] or "/").startswith("/"):
        found.append("synapse:postgres:password: is missing: a database that is reached by network needs it")
    if postgres["managed"] and postgres["user"] not in (None, settings["user"]["name"]):
        found.append(
            fault(
                "synapse:postgres:user",
                postgres["user"],
                f"peer authentication wants the role to be named as the system user, {settings['user']['name']}",
            )
        )
    if postgres["connections"]["min"] > postgres["connections"]["max"]:
        found.append(
            fault(
                "synapse:postgres:connections:min",
                postgres["connections"]["min"],
                f"it must be at most synapse:postgres:connections:max, {postgres['connections']['max']}",
            )
        )
    return found


def _accounts_are_ordinary(settings):
    return [
        fault(f"synapse:user:{key}", "root", "it must be Synapse's own, as Synapse does not run as root")
        for key in ("name", "group")
        if settings["user"][key] == "root"
    ]


def _image_can_be_built(settings):
    image = settings["image"]
    if image["source"] == "build" and image["version"] in ("latest", "develop"):
        return [
            fault("synapse:image:version", image["version"], "a self-built image needs a release, such as v1.163.2")
        ]
    return []


RELATIONS = (
    _directories_are_apart,
    _backups_are_apart,
    _listeners_are_apart,
    _databases_are_reachable,
    _accounts_are_ordinary,
    _image_can_be_built,
)
