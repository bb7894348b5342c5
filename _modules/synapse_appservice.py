"""
Appservices (bridges and bots): their registrations and tokens, and what they need to know of the homeserver.

A registration comes from the pillar, below ``synapse:appservices``, or from another formula, by the state
``synapse_appservice.registered``. Such entries, and the tokens that the formula makes, are kept in
``{data}/appservices``, which is root's alone: what stands there ends up in ``docker create``.
"""

import ipaddress
import json
import os
import pathlib
import re
import secrets
import stat
import urllib.parse

import salt.utils.yaml
from salt.exceptions import CommandExecutionError, SaltException, SaltInvocationError

TOKENS = ("as_token", "hs_token")
# What stands for a token that the next run makes, in what a test run shows.
TOKEN_TO_COME = "(made by the next run)"
MAIN_UNIT = "matrix-synapse.service"
NGINX_UNIT = "nginx.service"
PLAIN_PORT = 8008
LARGEST_REGISTRATION = 1 << 20

NAMESPACES = ("users", "aliases", "rooms")
# https://spec.matrix.org/latest/application-service-api/#registration, and the extensions that Synapse knows.
BOOLEANS = (
    "rate_limited",
    "receive_ephemeral",
    "de.sorunome.msc2409.push_ephemeral",
    "org.matrix.msc3202",
    "io.element.msc4190",
)
LISTS_OF_STRINGS = ("protocols", "io.element.msc4502.scopes")
# Where Synapse takes null for nothing, as some bridges write it.
NULLABLE = (
    "rate_limited",
    "receive_ephemeral",
    "de.sorunome.msc2409.push_ephemeral",
    "protocols",
    "ip_range_whitelist",
)
# The keys of a registration that hold no secret; any other's value is not shown.
SHOWN = ("id", "url", "sender_localpart", "namespaces", "ip_range_whitelist", *BOOLEANS, *LISTS_OF_STRINGS)


def faults():
    """
    Return a list of all faults of the appservices, a sentence each. No sentence shows a token.

    CLI Example:

    .. code-block:: bash

        salt-call synapse_appservice.faults
    """
    settings = __salt__["synapse_pillar.settings"]()
    try:
        return _faults(settings, _hooked(settings))
    except CommandExecutionError as err:
        return [str(err)]


def registrations(**kwargs):
    """
    Return the registrations that Synapse shall know, a list of dicts sorted by id:

    ``id``
        The appservice's id.

    ``path``
        The file that Synapse reads it from.

    ``registration``
        What stands in that file. It holds secrets, which a job of its own does not get.

    ``missing_tokens``
        Whether it still lacks a token, because :func:`ensure_tokens` did not run yet.

    ``arguments``
        Arguments of ``docker create`` for the main process and every worker.

    CLI Example:

    .. code-block:: bash

        salt-call synapse_appservice.registrations
    """
    settings = _settings()
    found = [_complete(settings, *located) for located in sorted(_located(settings, _hooked(settings)))]
    return [{**item, "registration": _for(kwargs, item["registration"])} for item in found]


def tokens(name, **kwargs):
    """
    Return ``as_token`` and ``hs_token`` of an appservice, for the configuration of the appservice itself. A job of its own
    does not get them.

    While they are not made yet, a test run gets a text in their place, and any other an error: so let
    ``file.managed`` call this from a template, which is rendered when its turn has come, not from an SLS.

    name
        The appservice's id.

    CLI Example:

    .. code-block:: bash

        salt-call synapse_appservice.tokens whatsapp
    """
    complete = registration(name, **kwargs)
    return {token: complete[token] for token in TOKENS}


def registration(name, **kwargs):
    """
    Return the complete registration of an appservice, for an appservice that reads it itself. A job of its own does not get
    the secrets in it.

    As for :func:`tokens`, a test run gets a text in the place of a token that is not made yet.

    name
        The appservice's id.

    CLI Example:

    .. code-block:: bash

        salt-call synapse_appservice.registration whatsapp
    """
    settings = _settings()
    located = next((item for item in _located(settings, _hooked(settings)) if item[0] == name), None)
    if located is None:
        raise CommandExecutionError(f"No appservice {name} is registered, in the pillar or by a state")
    complete = _complete(settings, *located)["registration"]
    lacking = _lacking(complete)
    if lacking and not __opts__.get("test"):
        raise CommandExecutionError(f"The tokens of the appservice {name} are not made yet")
    return _for(kwargs, {**complete, **dict.fromkeys(lacking, TOKEN_TO_COME)})


def homeserver(appservice=None):
    """
    Return what the formula of an appservice needs to know of the homeserver, whichever homeserver it is:

    ``server_name``
        The domain in the users' ids.

    ``url``
        The address of the client API: ``host`` for a program on the host, ``container`` for one in a
        container. Without the formula's nginx both are the URL that clients use.

    ``host_address``
        The address of the host as the homeserver sees it, for the ``url`` of an appservice that runs on the
        host.

    ``unit``
        The systemd unit to want, and to be ``After=``.

    ``after``
        All units that have a part in answering, for a unit to be ``After=``, ``unit`` among them. The
        homeserver answers once they are started.

    ``arguments``
        Arguments of ``docker create`` for the appservice's container to reach the homeserver by ``url``,
        and to be reached by its name.

    ``registrations``
        The directory of the registrations.

    ``registration``, ``mounts``
        With an ``appservice``: the file of its registration, and the arguments of ``docker create`` that
        show it to a container as ``/registration.yaml``. It can be read by ``group``.

    ``group``
        The group of the homeserver's account.

    There is no secret in it.

    appservice
        The id of an appservice. It need not be registered yet.

    CLI Example:

    .. code-block:: bash

        salt-call synapse_appservice.homeserver
    """
    settings = _settings()
    url = {key: f"http://{address}" for key, address in _addresses(settings).items()}
    public = __salt__["synapse_pillar.public_base_url"](settings)
    about = {
        "server_name": settings["server_name"],
        "url": url or {"host": public, "container": public},
        "host_address": _gateway(settings),
        "unit": MAIN_UNIT,
        "after": [f"{process['name']}.service" for process in _processes(settings)],
        "arguments": [f"--network={settings['docker']['network']['name']}"],
        "registrations": _directory(settings),
        "group": settings["user"]["group"],
    }
    if settings["nginx"]["managed"]:
        about["after"].append(NGINX_UNIT)
    if appservice is not None:
        _check_name(appservice)
        path = _path(settings, appservice)
        about["registration"] = path
        about["mounts"] = [f"--mount=type=bind,source={path},target=/registration.yaml,readonly"]
    return about


def listen():
    """
    Return the ``ADDRESS:PORT`` on which nginx has to serve the client API, without TLS, to containers.

    It is on the gateway of the formula's own Docker network. None if the formula does not manage nginx.

    CLI Example:

    .. code-block:: bash

        salt-call synapse_appservice.listen
    """
    return _addresses(__salt__["synapse_pillar.settings"]()).get("container")


def ensure_tokens(name=None, test=False):
    """
    Make the tokens that the appservices' registrations lack, and keep them.

    They stay for an id, also while nothing is registered by it; see :func:`renew_tokens`. Return what was
    made, a dict from id to the names of the tokens.

    name
        The id of the one appservice to do it for. All by default.

    test
        Return what would be made, and make nothing.

    CLI Example:

    .. code-block:: bash

        salt-call synapse_appservice.ensure_tokens
    """
    settings = _settings()
    made = {}
    for located in sorted(_located(settings, _hooked(settings))):
        if name in (None, located[0]):
            lacking = _lacking(_complete(settings, *located)["registration"])
            if lacking:
                made[located[0]] = lacking
    expected = __context__.setdefault("synapse_appservice.expected_tokens", {}) if test else {}
    made = {item: lacking for item, lacking in made.items() if item not in expected}
    expected.update(made)
    for item, lacking in made.items() if not test else ():
        _write(_tokens_path(settings, item), {**_kept(settings, item), **_new(lacking)})
    return made


def renew_tokens(name):
    """
    Make new tokens in place of those that the formula made for an appservice before. Return their names.

    Synapse and the appservice get to know them by the next ``state.apply``. Tokens that stand in the
    registration itself are the operator's to renew.

    name
        The appservice's id.

    CLI Example:

    .. code-block:: bash

        salt-call synapse_appservice.renew_tokens whatsapp
    """
    settings = _settings()
    _check_name(name)
    kept = _kept(settings, name)
    if not kept:
        raise CommandExecutionError(f"The formula made no tokens for the appservice {name}")
    _write(_tokens_path(settings, name), _new(kept))
    return sorted(kept)


def entry(name, **kwargs):
    """
    Return what the state ``synapse_appservice.registered`` stored for an appservice, None if nothing. A job of its own does
    not get the secrets in it.

    name
        The appservice's id.

    CLI Example:

    .. code-block:: bash

        salt-call synapse_appservice.entry whatsapp
    """
    _check_name(name)
    found = _hooked(_settings()).get(name)
    if found and "registration" in found:
        return {**found, "registration": _for(kwargs, found["registration"])}
    return found


def store(name, registration=None, file=None, arguments=None, test=False):
    """
    Store an appservice beside those of the pillar. Return the names of the tokens that were made for it.

    Raises CommandExecutionError if anything is wrong with it, and then has stored nothing.

    name
        The appservice's id.

    registration
        Its registration, a mapping. Tokens that it lacks are made and kept.

    file
        In place of it, the file that holds it: an absolute path on the minion, or ``salt://...``.

    arguments
        A list of arguments of ``docker create`` for the main process and every worker.

    test
        Store nothing, but let this run take it for stored.

    CLI Example:

    .. code-block:: bash

        salt-call synapse_appservice.store whatsapp file=/etc/mautrix-whatsapp/registration.yaml
    """
    settings = _settings()
    wanted = wanted_entry(name, registration, file, arguments)
    hooked = _hooked(settings)
    others = {key: value for key, value in hooked.items() if key != name}
    known = set(_faults(settings, others))
    found = [line for line in _faults(settings, {**others, name: wanted}) if line not in known]
    if found:
        raise CommandExecutionError("\n".join(found))
    if test:
        _expect(name, wanted)
    else:
        _write(_entry_path(settings, name), wanted)
    return ensure_tokens(name, test=test).get(name, [])


def wanted_entry(name, registration=None, file=None, arguments=None):
    """
    Return the entry that these arguments of :func:`store` make.

    Raises SaltInvocationError if they make none.
    """
    _check_name(name)
    if registration is not None and not isinstance(registration, dict):
        raise SaltInvocationError(f"{_where(name)}: registration must be a mapping")
    given = {"registration": registration, "file": file, "arguments": arguments or None}
    wanted = {key: value for key, value in given.items() if value is not None}
    known = __salt__["synapse_pillar.knowledge"]()
    node = known["schema"]["pillar"]["keys"]["appservices"]["values"]
    found = __salt__["synapse_pillar.check"](wanted, node, _where(name), known)
    if found:
        raise SaltInvocationError("\n".join(found))
    if "registration" in wanted:
        wanted["registration"] = _plain(_where(name) + ":registration", registration)
    return wanted


def difference(old, new):
    """
    Return how an entry differs from another, as a dict from what differs to old and new values.

    Values that are or might be secret are not shown.

    old, new
        Entries as from :func:`entry` and :func:`wanted_entry`.

    CLI Example:

    .. code-block:: bash

        salt-call synapse_appservice.difference null '{"file": "/etc/mautrix-whatsapp/registration.yaml"}'
    """
    old, new = _flat(old or {}), _flat(new or {})
    return {
        key: {"old": _shown(key, old.get(key)), "new": _shown(key, new.get(key))}
        for key in {**old, **new}
        if old.get(key) != new.get(key)
    }


def _flat(entry):
    """The file and the arguments of an entry, and each key of its registration."""
    return {**{key: value for key, value in entry.items() if key != "registration"}, **entry.get("registration", {})}


def _for(kwargs, registration):
    """A registration for who called a function with these ``**kwargs``: see ``synapse_pillar.is_job``."""
    if not __salt__["synapse_pillar.is_job"](kwargs):
        return registration
    return {key: _shown(key, value) for key, value in registration.items()}


def _shown(key, value):
    return value if value is None or key in (*SHOWN, "file", "arguments") else "(not shown)"


def remove(name, test=False):
    """
    Remove an appservice that :func:`store` stored. Return whether there was one. Its tokens stay.

    name
        The appservice's id.

    test
        Remove nothing, but let this run take it for removed.

    CLI Example:

    .. code-block:: bash

        salt-call synapse_appservice.remove whatsapp
    """
    if entry(name) is None:
        return False
    if test:
        _expect(name, None)
    else:
        os.unlink(_entry_path(_settings(), name))
    return True


def _settings():
    """The settings, of a pillar without faults. One pillar is looked at once: registrations are asked for per process."""
    pillar = __pillar__.get("synapse")
    if pillar is None or __context__.get("synapse_appservice.right_pillar") is not pillar:
        found = __salt__["synapse_pillar.faults"]()
        if found:
            raise CommandExecutionError("The pillar has faults:\n" + "\n".join(f"- {line}" for line in found))
        __context__["synapse_appservice.right_pillar"] = pillar
    return __salt__["synapse_pillar.settings"]()


def _fault(*args, **kwargs):
    return __salt__["synapse_pillar.fault"](*args, **kwargs)


def _check_name(name):
    node = __salt__["synapse_pillar.knowledge"]()["schema"]["pillar"]["keys"]["appservices"]
    if not isinstance(name, str) or not re.fullmatch(node["name"], name):
        raise SaltInvocationError(f"{name!r} is no appservice's id: it must be {node['name_expected']}")


def _processes(settings):
    """
    The planned processes.

    Not synapse_workers.plan: that refuses a plan with a faulty appservice, whose own formula might be the one
    that asks, to put it right.
    """
    known = __salt__["synapse_pillar.knowledge"]()
    roster = __salt__["synapse_workers.roster"](settings)
    found = __salt__["synapse_workers.faults"](settings, known["workers"], roster)
    if found:
        raise CommandExecutionError("The pillar has faults:\n" + "\n".join(f"- {line}" for line in found))
    return __salt__["synapse_workers.build"](settings, known["workers"], known["routes"], roster)["processes"]


# Where things stand


def _directory(settings):
    return f"{settings['directories']['config']}/appservices"


def _path(settings, name):
    return f"{_directory(settings)}/{name}.yaml"


def _store(settings):
    return f"{settings['directories']['data']}/appservices"


def _entry_path(settings, name):
    return f"{_store(settings)}/{name}.json"


def _tokens_path(settings, name):
    return f"{_store(settings)}/{name}.tokens.json"


def _where(name):
    return f"synapse_appservice.registered {name}"


def _addresses(settings):
    """Where nginx serves the client API without TLS, for programs on the host and in containers."""
    if not settings["nginx"]["managed"]:
        return {}
    client = settings["nginx"]["client"]
    address, port = __salt__["synapse_pillar.listen_address"](client["listen"][0])
    if client["tls"]:
        return dict.fromkeys(("host", "container"), f"{_gateway(settings)}:{PLAIN_PORT}")
    host = {"*": "127.0.0.1", "0.0.0.0": "127.0.0.1", "[::]": "[::1]"}.get(address, address)
    return {"host": f"{host}:{port}", "container": f"{_gateway(settings)}:{port}"}


def _gateway(settings):
    """The host in the Docker network."""
    return str(next(ipaddress.IPv4Network(settings["docker"]["network"]["subnet"]).hosts()))


# What is kept on the minion


def _hooked(settings):
    """The entries that states stored, by id; in a test run, as they would be."""
    found = {}
    directory = _store(settings)
    name = __salt__["synapse_pillar.knowledge"]()["schema"]["pillar"]["keys"]["appservices"]["name"]
    for path in sorted(pathlib.Path(directory).glob("*.json")) if _is_private(directory) else []:
        if re.fullmatch(name, path.stem):
            found[path.stem] = _read(path)
    for item, expected in __context__.get("synapse_appservice.expected", {}).items():
        found.pop(item, None)
        if expected is not None:
            found[item] = expected
    return found


def _expect(name, wanted):
    __context__.setdefault("synapse_appservice.expected", {})[name] = wanted


def _is_private(directory):
    """
    Whether the directory exists; it must be root's alone then.

    Synapse may own the directory around it, and must not be able to put arguments of docker create there.
    """
    try:
        status = os.lstat(directory)
    except FileNotFoundError:
        return False
    except OSError as err:
        raise CommandExecutionError(f"{directory}: {err.strerror}") from err
    private = status.st_uid == os.geteuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    if not stat.S_ISDIR(status.st_mode) or not private:
        raise CommandExecutionError(f"{directory} must be a directory that only root can write to")
    return True


def _kept(settings, name):
    """The tokens that the formula made for an appservice."""
    path = _tokens_path(settings, name)
    if not _is_private(_store(settings)) or not os.path.lexists(path):
        return {}
    kept = _read(path)
    if set(kept) - set(TOKENS) or not all(isinstance(token, str) and token for token in kept.values()):
        raise CommandExecutionError(f"{path} holds something else than tokens; {_way_out(path)}")
    return kept


def _way_out(path):
    if path.endswith(".tokens.json"):
        return "put it back from a backup, or remove it to have new ones made"
    return "remove it, and apply the state that registers the appservice again"


def _read(path):
    path = str(path)
    try:
        data = json.loads(_text(path))
    except (ValueError, RecursionError) as err:
        raise CommandExecutionError(f"{path} is not JSON; {_way_out(path)}") from err
    if not isinstance(data, dict):
        raise CommandExecutionError(f"{path} does not hold a mapping; {_way_out(path)}")
    return data


def _text(path):
    """What is in a file of the minion, which can be anything that somebody called a registration."""
    try:
        # Neither wait for the other end of a pipe, nor read a device to its end.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as handle:
            if not stat.S_ISREG(os.fstat(handle.fileno()).st_mode):
                raise CommandExecutionError(f"{path}: it is not a regular file")
            content = handle.read(LARGEST_REGISTRATION + 1)
    except (OSError, ValueError) as err:
        raise CommandExecutionError(f"{path}: {getattr(err, 'strerror', None) or err}") from err
    if len(content) > LARGEST_REGISTRATION:
        raise CommandExecutionError(f"{path}: it is larger than {LARGEST_REGISTRATION} bytes")
    try:
        return content.decode()
    except UnicodeDecodeError as err:
        raise CommandExecutionError(f"{path}: it is not a text in UTF-8") from err


def _write(path, data):
    """Replace a file as a whole. It is root's alone, and so is its directory."""
    directory = os.path.dirname(path)
    try:
        if not _is_private(directory):
            os.makedirs(os.path.dirname(directory), mode=0o755, exist_ok=True)
            os.mkdir(directory, 0o700)
        __salt__["synapse_files.write"](path, json.dumps(data, indent=1))
    except OSError as err:
        raise CommandExecutionError(f"{path}: {err.strerror}") from err


def _new(names):
    return {name: secrets.token_hex(32) for name in names}


def _missing(given, kept):
    return {token: kept[token] for token in _lacking(given) if token in kept}


# What a registration may be


def _located(settings, hooked):
    """Every appservice: id, where it comes from, entry."""
    return [(name, f"synapse:appservices:{name}", entry) for name, entry in settings["appservices"].items()] + [
        (name, _where(name), entry) for name, entry in hooked.items()
    ]


def _complete(settings, name, where, entry):
    """An appservice as :func:`registrations` returns it."""
    _, given = _load(where, entry)
    complete = {"id": name, **{key: value for key, value in given.items() if key not in _lacking(given)}}
    complete.update(_missing(given, _kept(settings, name)))
    return {
        "id": name,
        "path": _path(settings, name),
        "registration": complete,
        "missing_tokens": bool(_lacking(complete)),
        "arguments": list(entry.get("arguments", [])),
    }


def _lacking(registration):
    return [token for token in TOKENS if registration.get(token) is None]


def _load(where, entry):
    """Return where the registration stands, and the registration itself, as plain data."""
    if ("file" in entry) == ("registration" in entry):
        raise CommandExecutionError(f"{where}: it needs either registration or file, not both and not neither")
    if "registration" in entry:
        where += ":registration"
        return where, _plain(where, entry["registration"])
    path = entry["file"]
    where += f":file ({path})"
    try:
        data = salt.utils.yaml.safe_load(_served(path) if path.startswith("salt://") else _text(path))
    except CommandExecutionError as err:
        raise CommandExecutionError(f"{where}: {str(err).removeprefix(path + ': ')}") from err
    except salt.utils.yaml.YAMLError as err:
        # The error's own text quotes the file.
        mark = getattr(err, "problem_mark", None)
        line = f", see its line {mark.line + 1}" if mark else ""
        raise CommandExecutionError(f"{where}: it is not YAML{line}") from err
    except (AttributeError, RecursionError, TypeError, ValueError) as err:
        raise CommandExecutionError(f"{where}: it is not YAML of plain data") from err
    if not isinstance(data, dict):
        raise CommandExecutionError(f"{where}: it must hold a mapping, a registration")
    return where, _plain(where, data)


def _served(url):
    """The text of a file on the file server, asked for once a run."""
    known = __context__.setdefault("synapse_appservice.served", {})
    if url not in known:
        try:
            known[url] = __salt__["cp.get_file_str"](url)
        except (OSError, SaltException, ValueError) as err:
            raise CommandExecutionError(f"{url}: {type(err).__name__}: {err}") from err
    if not known[url]:
        raise CommandExecutionError(f"{url}: it is not on the file server, or empty")
    return known[url]


def _plain(where, value):
    """The value without anything that JSON, and so Synapse, does not know."""
    try:
        text = json.dumps(value, allow_nan=False, ensure_ascii=False)
        text.encode()
        return json.loads(text)
    except (RecursionError, TypeError, ValueError) as err:
        raise CommandExecutionError(
            f"{where}: all in it must be plain data: mappings, lists, strings, numbers, true, false and null"
        ) from err


def _faults(settings, hooked):
    found, loaded = [], []
    twice = set(settings["appservices"]) & set(hooked)
    for name in sorted(twice):
        found.append(
            f"synapse:appservices:{name}: it is also registered by a state, {_where(name)}, which stored it in"
            f" {_entry_path(settings, name)}: leave it out of the pillar, or have the state"
            " synapse_appservice.absent"
        )
    for name, origin, entry in sorted(_located(settings, hooked)):
        try:
            where, given = _load(origin, entry)
            kept = _kept(settings, name)
        except CommandExecutionError as err:
            found.append(str(err))
            continue
        lines = list(_registration_faults(where, name, given, settings["server_name"]))
        found += lines
        if not lines and name not in twice:
            loaded.append((where, given, _missing(given, kept)))
    return found + list(_twins(loaded))


def _registration_faults(where, name, given, server_name):
    given = {key: value for key, value in given.items() if value is not None or key not in NULLABLE}
    if given.get("id", name) != name:
        yield _fault(f"{where}:id", given["id"], f"it must be the name it is registered by, {name}")
    yield from _url_faults(where, given)
    yield from _sender_faults(where, given, server_name)
    yield from _token_faults(where, given)
    yield from _namespaces_faults(where, given)
    for key in BOOLEANS:
        if key in given and not isinstance(given[key], bool):
            yield _fault(f"{where}:{key}", given[key], "it must be true or false")
    for key in LISTS_OF_STRINGS:
        if key in given and not _is_list_of(lambda item: isinstance(item, str), given[key]):
            yield _fault(f"{where}:{key}", given[key], "it must be a list of strings")
    if not _is_list_of(_is_network, given.get("ip_range_whitelist", [])):
        yield _fault(
            f"{where}:ip_range_whitelist",
            given["ip_range_whitelist"],
            "it must be a list of IP addresses and networks",
        )


def _is_list_of(right, value):
    return isinstance(value, list) and all(right(item) for item in value)


def _url_faults(where, given):
    right = "the URL that Synapse reaches the appservice by, such as http://bridge:29318, or null if it has none"
    if "url" not in given:
        # Without it, Synapse would not start.
        yield f"{where}:url: is missing: it needs {right}"
    elif given["url"] is not None and not _is_url(given["url"]):
        yield _fault(f"{where}:url", given["url"], f"it must be {right}")


def _is_url(value):
    if not isinstance(value, str) or not re.fullmatch(r"https?://[\x21-\x7e]+", value):
        return False
    try:
        parts = urllib.parse.urlsplit(value)
        return bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


def _sender_faults(where, given, server_name):
    right = "the local part of the appservice's own user: letters, digits and . _ - / only"
    sender = given.get("sender_localpart")
    if sender is None:
        yield f"{where}:sender_localpart: is missing: it needs {right}"
    elif not isinstance(sender, str) or not re.fullmatch(r"[A-Za-z0-9._/-]+", sender):
        yield _fault(f"{where}:sender_localpart", sender, f"it must be {right}")
    elif len(f"@{sender}:{server_name}") > 255:
        yield _fault(f"{where}:sender_localpart", sender, "a user's id has at most 255 characters")


def _token_faults(where, given):
    known = __salt__["synapse_pillar.knowledge"]()
    node = known["schema"]["definitions"]["secret"]
    for key in TOKENS:
        if given.get(key) is not None:
            yield from __salt__["synapse_pillar.check"](given[key], node, f"{where}:{key}", known)


def _namespaces_faults(where, given):
    where += ":namespaces"
    namespaces = given.get("namespaces")
    if namespaces is None:
        yield f"{where}: is missing: it needs a mapping, with {', '.join(NAMESPACES)}, or {{}}"
        return
    if not isinstance(namespaces, dict):
        yield _fault(where, namespaces, f"it must be a mapping, with {', '.join(NAMESPACES)}")
        return
    for key, items in namespaces.items():
        if key not in NAMESPACES:
            hint = __salt__["synapse_pillar.did_you_mean"](key, NAMESPACES)
            yield _fault(f"{where}:{key}", items, f"there is no such namespace; {hint}")
        elif not isinstance(items, list):
            yield _fault(f"{where}:{key}", items, "it must be a list")
        else:
            for i, item in enumerate(items):
                yield from _namespace_faults(f"{where}:{key}:{i}", item)


def _namespace_faults(where, item):
    if not isinstance(item, dict):
        yield _fault(where, item, "it must be a mapping with exclusive and regex")
        return
    if not isinstance(item.get("exclusive"), bool):
        yield _fault(f"{where}:exclusive", item.get("exclusive"), "it must be true or false")
    regex = item.get("regex")
    if not isinstance(regex, str):
        yield _fault(f"{where}:regex", regex, "it must be a regular expression")
        return
    try:
        re.compile(regex)
    except (re.error, OverflowError, RecursionError, ValueError) as err:
        yield _fault(f"{where}:regex", regex, f"it is no regular expression: {err}")


def _is_network(value):
    try:
        return isinstance(value, str) and bool(ipaddress.ip_network(value, strict=False))
    except ValueError:
        return False


def _twins(loaded):
    """What two appservices have in common, and must not."""
    senders, owners = {}, {}
    for where, given, kept in loaded:
        sender = given["sender_localpart"]
        other = senders.setdefault(sender, where)
        if other != where:
            yield _fault(
                f"{where}:sender_localpart", sender, f"{other} has the same: each appservice needs a user of its own"
            )
        for key in TOKENS:
            token = given.get(key) or kept.get(key)
            place = f"{where}:{key}"
            other = owners.setdefault(token, place) if token else place
            if other != place:
                yield _fault(place, None, f"{other} is the same: each token must be another", secret=True)
