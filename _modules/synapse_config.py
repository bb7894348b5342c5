"""
The files that Synapse reads: what stands in them, what they hold now, and whether Synapse accepts them.
"""

import base64
import hashlib
import json
import os
import pathlib
import re
import secrets as random_secrets
import shutil
import stat
import string
import tempfile

import salt.utils.files
import salt.utils.yaml
from salt.exceptions import CommandExecutionError

SECRETS = ("replication", "macaroon", "form", "registration")
SIGNING_KEY = "signing.key"

# Synapse takes each of these from a file, so that homeserver.yaml holds none of them.
# https://element-hq.github.io/synapse/latest/usage/configuration/config_documentation.html
SECRET_PATH_SETTINGS = {
    "worker_replication_secret_path": "replication",
    "macaroon_secret_key_path": "macaroon",
    "form_secret_path": "form",
    "registration_shared_secret_path": "registration",
    "signing_key_path": SIGNING_KEY,
}

# Of every file written here: Synapse reads, and cannot write, its own configuration.
OWNER, MODE = 0, 0o640

POSTGRES_SOCKETS = "/run/postgresql"
REDIS_SOCKETS = "/run/redis-synapse"

# Stands beside the files until Synapse has accepted them.
CANDIDATE = ".candidate-"

# The options of `docker create` that decide what a process can read. Some others need a network.
READING_OPTIONS = ("--mount=", "--volume", "-v", "--tmpfs=", "--env", "-e", "--group-add=")

CHECK_SCRIPT = "salt://synapse/config/files/check.py"
HEADER = "# Written by synapse-formula from the pillar: a change made here is lost at the next state.apply.\n"


def files(**kwargs):
    """
    Return the files that the pillar asks for, without touching any: a dict from path to text. A job of its own gets the
    paths alone, since there may be secrets in the text.

    CLI Example:

    .. code-block:: bash

        salt-call synapse_config.files
    """
    texts = _texts()
    return list(texts) if __salt__["synapse_pillar.is_job"](kwargs) else texts


def _texts():
    settings = __salt__["synapse_pillar.settings"]()
    plan = __salt__["synapse_workers.plan"]()
    registrations = __salt__["synapse_appservice.registrations"]()
    inputs = json.dumps([settings, plan["roster"], registrations], default=str)
    known = __context__.get("synapse_config.files")
    if not known or known[0] != inputs:
        known = __context__["synapse_config.files"] = (inputs, _files(settings, plan, registrations))
    return known[1]


def _files(settings, plan, registrations):
    directory = settings["directories"]["config"]
    shared = homeserver(settings, plan, registrations)
    wanted = {f"{directory}/homeserver.yaml": shared}
    for process in plan["processes"]:
        wanted[process["log_config"]] = _log(settings, process["log_level"])
        if process["type"] != "main":
            wanted[process["config_files"][-1]] = _whole_sections(shared, process["config"])
    wanted.update({registration["path"]: registration["registration"] for registration in registrations})
    texts = {path: HEADER + _yaml(data) for path, data in wanted.items()}
    # Among the data: names outlive `synapse.clean`, as the database does.
    texts[f"{settings['directories']['data']}/roster.json"] = json.dumps(plan["roster"], indent=1) + "\n"
    return texts


def _whole_sections(shared, own):
    """
    A worker's own settings. Synapse takes each section from the last file that has it, so what the others say in it stands
    here as well.
    """
    sections = {key: shared[key] for key, value in own.items() if isinstance(value, dict) and key in shared}
    return __salt__["synapse_pillar.merge"](sections, own)


def _read_by_each(processes):
    """The paths of the files that each process reads, by its name."""
    registrations = [registration["path"] for registration in __salt__["synapse_appservice.registrations"]()]
    return {process["name"]: [*process["config_files"], process["log_config"], *registrations] for process in processes}


def _yaml(data):
    return salt.utils.yaml.safe_dump(data, default_flow_style=False, sort_keys=False, width=120)


def homeserver(settings, plan, registrations):
    """
    Return homeserver.yaml as a dict: what the formula says, what the plan says, and over both the operator's ``config``.

    settings
        See ``synapse_pillar.settings``.

    plan
        See ``synapse_workers.build``.

    registrations
        See ``synapse_appservice.registrations``.
    """
    data = settings["directories"]["data"]
    main = plan["processes"][0]
    config = {
        "server_name": settings["server_name"],
        "public_baseurl": __salt__["synapse_pillar.public_base_url"](settings),
        "report_stats": False,
        "suppress_key_server_warning": True,
        "enable_metrics": settings["metrics"],
        "max_upload_size": settings["max_upload_size"],
        "media_store_path": f"{data}/media",
        "log_config": main["log_config"],
        **{key: f"{data}/secrets/{name}" for key, name in SECRET_PATH_SETTINGS.items()},
        "old_signing_keys": settings["signing_key"]["old"],
        "database": _database(settings),
        "redis": _redis(settings),
        "app_service_config_files": [registration["path"] for registration in registrations],
        **plan["shared"],
        **main["config"],
    }
    return __salt__["synapse_pillar.merge"](config, settings["config"])


def _database(settings):
    postgres = settings["postgres"]
    arguments = {
        "user": postgres["user"] or settings["user"]["name"],
        "password": postgres["password"],
        "dbname": postgres["database"],
        "host": POSTGRES_SOCKETS if postgres["managed"] else postgres["host"],
        "port": postgres["port"],
        "cp_min": postgres["connections"]["min"],
        "cp_max": postgres["connections"]["max"],
    }
    return {"name": "psycopg2", "args": {key: value for key, value in arguments.items() if value is not None}}


def _redis(settings):
    redis = settings["redis"]
    if redis["managed"]:
        return {"enabled": True, "path": f"{REDIS_SOCKETS}/redis.sock"}
    host = redis["host"]
    where = {"path": host} if host.startswith("/") else {"host": host, "port": redis["port"]}
    return {"enabled": True, **where, **({"password": redis["password"]} if redis["password"] else {})}


def _log(settings, level):
    """https://element-hq.github.io/synapse/latest/usage/configuration/logging_sample_config.html"""
    return {
        "version": 1,
        # The journal adds the time and the process.
        "formatters": {"journal": {"format": "%(name)s - %(lineno)d - %(levelname)s - %(request)s - %(message)s"}},
        "handlers": {"console": {"class": "logging.StreamHandler", "formatter": "journal"}},
        "loggers": {name: {"level": level} for name, level in settings["log"]["loggers"].items()},
        "root": {"level": level, "handlers": ["console"]},
        "disable_existing_loggers": False,
    }


def sockets_to_mount():
    """
    Return the directories of the host's sockets that Synapse enters besides its own: of PostgreSQL and Redis.

    CLI Example:

    .. code-block:: bash

        salt-call synapse_config.sockets_to_mount
    """
    settings = __salt__["synapse_pillar.settings"]()
    found = []
    for service, directory in (("postgres", POSTGRES_SOCKETS), ("redis", REDIS_SOCKETS)):
        host = settings[service]["host"] or ""
        if settings[service]["managed"]:
            found.append(directory)
        elif host.startswith("/"):
            # Of Redis the socket itself is named, of PostgreSQL its directory.
            found.append(os.path.dirname(host) if service == "redis" else host)
    return found


def identity():
    """
    Return ``(uid, gid)`` that Synapse runs as, ``(None, None)`` while the account does not exist yet.

    CLI Example:

    .. code-block:: bash

        salt-call synapse_config.identity
    """
    user = __salt__["synapse_pillar.settings"]()["user"]
    uid, gid = __salt__["file.user_to_uid"](user["name"]), __salt__["file.group_to_gid"](user["group"])
    return (None, None) if "" in (uid, gid) else (uid, gid)


def pending():
    """
    Return the paths of the files that a run would write: those of :func:`files` that differ from what is there in text,
    owner, group or mode, and ``accepted-by``, unless it names the image that is wanted.

    CLI Example:

    .. code-block:: bash

        salt-call synapse_config.pending
    """
    settings = __salt__["synapse_pillar.settings"]()
    return _pending(settings, __salt__["synapse_image.wanted"](settings["image"])["id"])


def _pending(settings, image_id):
    _, gid = identity()
    wanted = {**files(), _accepted_by(settings): image_id}
    return [path for path, text in wanted.items() if text is None or _read(path) != text or not _is_ours(path, gid)]


def _accepted_by(settings):
    """The file that names the image whose Synapse has accepted the configuration: another one may not accept it."""
    return f"{settings['directories']['config']}/accepted-by"


def _is_ours(path, gid):
    there = os.stat(path)
    return (there.st_uid, there.st_gid, stat.S_IMODE(there.st_mode)) == (OWNER, gid, MODE)


def superfluous():
    """
    Return the paths of configuration files that nothing in the pillar asks for any more, and of what a killed run left.

    CLI Example:

    .. code-block:: bash

        salt-call synapse_config.superfluous
    """
    settings = __salt__["synapse_pillar.settings"]()
    directory = pathlib.Path(settings["directories"]["config"])
    there = [
        path for pattern in ("workers/*.yaml", "appservices/*.yaml", "log-*.yaml") for path in directory.glob(pattern)
    ]
    # What a run is about to write makes use of its own leftover.
    used = {f"{path}.new" for path in pending()}
    left = [path for path in _leftovers(settings) if path not in used]
    wanted = files()
    return sorted([*(str(path) for path in there if str(path) not in wanted), *left])


def _leftovers(settings):
    """The paths of what a run that was killed while it wrote has left: it may hold a password."""
    config, data = (pathlib.Path(settings["directories"][name]) for name in ("config", "data"))
    patterns = {
        config: (f"{CANDIDATE}*", "*.new", "workers/*.new", "appservices/*.new"),
        data: ("secrets/*.new", "appservices/*.new", "roster.json.new"),
    }
    return [str(path) for directory in patterns for pattern in patterns[directory] for path in directory.glob(pattern)]


def _read(path):
    try:
        return pathlib.Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as err:
        raise CommandExecutionError(f"{path}: {err}") from err


def write(image):
    """
    Write the files that differ, once Synapse's own parser has accepted them all; return their paths.

    The parser reads what changed in text, and everything while ``accepted-by`` names another image.

    image
        The reference or id of the image whose Synapse shall accept them.

    Raises CommandExecutionError with everything the parser said, and then has changed nothing.

    CLI Example:

    .. code-block:: bash

        salt-call synapse_config.write matrixdotorg/synapse:v1.163.2
    """
    settings = __salt__["synapse_pillar.settings"]()
    wanted, accepted_by = __salt__["synapse_image.wanted"](settings["image"]), _accepted_by(settings)
    changed = _pending(settings, wanted["id"])
    if not changed:
        return []
    if image == wanted["reference"]:
        image = wanted["id"] or image
    # Last, so that it never tells of files that are not written yet.
    texts = {**files(), accepted_by: image}
    directory = settings["directories"]["config"]
    _, gid = identity()
    candidate = tempfile.mkdtemp(prefix=CANDIDATE, dir=directory)
    try:
        os.chmod(candidate, 0o750)
        os.chown(candidate, OWNER, gid)
        own = {
            os.path.relpath(path, directory): text for path, text in files().items() if path.startswith(directory + "/")
        }
        _copy_operators_files(directory, candidate, {path.split("/")[0] for path in own})
        for path, text in own.items():
            _put(os.path.join(candidate, path), text, gid)
        other = {path for path in changed if _read(path) != texts[path]}
        _check(candidate, set(texts) if accepted_by in other else other, image)
        for path in changed:
            _replace(path, texts[path], gid)
    finally:
        shutil.rmtree(candidate, ignore_errors=True)
    return changed


def _make_directory(path, gid):
    if not os.path.isdir(path):
        os.mkdir(path, 0o750)
        os.chown(path, OWNER, gid)


def _replace(path, text, gid):
    _make_directory(os.path.dirname(path), gid)
    __salt__["synapse_files.write"](path, text, gid, MODE)


def _put(path, text, gid):
    _make_directory(os.path.dirname(path), gid)
    with salt.utils.files.fopen(path, "w", encoding="utf-8", opener=lambda p, flags: os.open(p, flags, MODE)) as handle:
        handle.write(text)
    os.chown(path, OWNER, gid)
    # Whatever the umask has taken away.
    os.chmod(path, MODE)


def _copy_operators_files(directory, candidate, own):
    """What else stands in the directory of the configuration, Synapse may read while it parses: as it is."""
    others = [
        os.path.join(directory, name)
        for name in os.listdir(directory)
        if name not in own and not name.startswith(CANDIDATE)
    ]
    if others:
        command = ["cp", "--archive", f"--target-directory={candidate}", "--", *others]
        done = __salt__["cmd.run_all"](command, python_shell=False, output_loglevel="debug")
        if done["retcode"] != 0:
            raise CommandExecutionError(done["stderr"])


def _check(candidate, changed, image):
    """
    Have Synapse parse the configuration of each process that reads a changed file, in a container that shows it what the
    process's own does; one for all that are shown the same.
    """
    processes = __salt__["synapse_workers.plan"]()["processes"]
    common = [word for appservice in __salt__["synapse_appservice.registrations"]() for word in appservice["arguments"]]
    read, readers = _read_by_each(processes), {}
    for process in processes:
        if changed.intersection(read[process["name"]]):
            words = [*common, *process["arguments"]]
            shown = tuple(dict.fromkeys(word for word in words if word.startswith(READING_OPTIONS)))
            readers.setdefault(shown, {})[process["name"]] = process["config_files"]
    base, script = __salt__["synapse_process.base_arguments"](candidate), __salt__["cp.get_file_str"](CHECK_SCRIPT)
    said = []
    for shown, files_of in readers.items():
        command = ["docker", "run", "--rm", "--interactive", "--network=none", *base, *shown]
        command += ["--entrypoint=python3", image, "-c", script]
        done = __salt__["cmd.run_all"](command, stdin=json.dumps(files_of), python_shell=False, output_loglevel="debug")
        if done["retcode"] != 0:
            said += (done["stdout"] or done["stderr"]).strip().splitlines()[-20:]
    if said:
        raise CommandExecutionError("Synapse does not accept the configuration:\n" + "\n".join(said))


def pending_secrets():
    """
    Return the names of the secrets that a run would write: those missing, those the pillar gives another value, and those
    of another owner, group or mode.

    CLI Example:

    .. code-block:: bash

        salt-call synapse_config.pending_secrets
    """
    settings = __salt__["synapse_pillar.settings"]()
    given = _given_secrets(settings)
    _, gid = identity()
    pending = []
    for name in (*SECRETS, SIGNING_KEY):
        there = _kept_secret(settings, name)
        if there is None or given.get(name, there) != there or not _is_ours(_secret_path(settings, name), gid):
            pending.append(name)
    return pending


def write_secrets():
    """
    Write the secrets that :func:`pending_secrets` names: the pillar's, or new random ones, which then stay.

    A signing key that is replaced stays beside the new one, as ``signing.key.ID``.

    CLI Example:

    .. code-block:: bash

        salt-call synapse_config.write_secrets
    """
    settings = __salt__["synapse_pillar.settings"]()
    given = _given_secrets(settings)
    _, gid = identity()
    pending = pending_secrets()
    for name in pending:
        path, there = _secret_path(settings, name), _kept_secret(settings, name)
        text = given.get(name, there)
        if text is None:
            text = _new_signing_key() if name == SIGNING_KEY else random_secrets.token_urlsafe(48)
        if name == SIGNING_KEY and (there or "").split() not in ([], text.split()):
            _replace(f"{path}.{_key_id(there).replace(':', '_')}", there, gid)
        _replace(path, text, gid)
    return pending


def _kept_secret(settings, name):
    """What a secret's file holds, None if it is to be made. Not a signing key that is empty: that is a homeserver's, and lost."""
    text = _read(_secret_path(settings, name))
    return text if text or name == SIGNING_KEY else None


def faults():
    """
    Return the faults of a pillar that asks for what cannot be done to the homeserver that is there, a sentence each.

    CLI Example:

    .. code-block:: bash

        salt-call synapse_config.faults
    """
    settings = __salt__["synapse_pillar.settings"]()
    return _identity_faults() + _move_faults(settings) + _network_faults(settings) + signing_key_faults()


def _identity_faults():
    # `usermod` would pull the files from under running processes.
    user = __salt__["synapse_pillar.settings"]()["user"]
    found = []
    for key, what, name, function in (
        ("uid", "account", user["name"], "file.user_to_uid"),
        ("gid", "group", user["group"], "file.group_to_gid"),
    ):
        there = "" if user[key] is None else __salt__[function](name)
        if there not in ("", user[key]):
            right = f"the {what} {name} has {there} already; change it by hand while nothing runs"
            found.append(__salt__["synapse_pillar.fault"](f"synapse:user:{key}", user[key], right))
    return found


def _move_faults(settings):
    """Elsewhere, a homeserver would be made anew: with another signing key, without names and media."""
    written = _read(f"{settings['directories']['config']}/homeserver.yaml") or ""
    former = re.search(r"^signing_key_path: (.+)/secrets/[^/]+$", written, re.MULTILINE)
    data = settings["directories"]["data"]
    if not former or former[1] == data:
        return []
    key = _read(_secret_path({"directories": {"data": former[1]}}, SIGNING_KEY))
    if key in (None, _read(_secret_path(settings, SIGNING_KEY))):
        return []
    right = f"this homeserver's data are in {former[1]}; stop Synapse and move them by hand first"
    return [__salt__["synapse_pillar.fault"]("synapse:directories:data", data, right)]


def _network_faults(settings):
    # Docker can't change it.
    network = settings["docker"]["network"]
    there = _subnets(network["name"])
    if not there or network["subnet"] in there:
        return []
    right = (
        f"the network {network['name']} has {' and '.join(there)}; give another name as well, or stop Synapse and all else in"
        " it, and remove its containers and the network, by hand first"
    )
    return [__salt__["synapse_pillar.fault"]("synapse:docker:network:subnet", network["subnet"], right)]


def _subnets(network):
    """The subnets of a Docker network, asked for once a run; none while there is no such network, or no engine."""
    known = __context__.setdefault("synapse_config.subnets", {})
    if network not in known:
        template = "{{range .IPAM.Config}}{{println .Subnet}}{{end}}"
        command = ["docker", "network", "inspect", "--format", template, network]
        try:
            known[network] = __salt__["cmd.run_stdout"](
                command, python_shell=False, ignore_retcode=True, output_loglevel="quiet"
            ).split()
        except CommandExecutionError:
            known[network] = []
    return known[network]


def signing_key_faults():
    """
    Return the fault of a pillar that would replace the signing key without keeping the old one's public half, or that does not
    give it while its file is empty.

    CLI Example:

    .. code-block:: bash

        salt-call synapse_config.signing_key_faults
    """
    settings = __salt__["synapse_pillar.settings"]()
    path = _secret_path(settings, SIGNING_KEY)
    current, there = settings["signing_key"]["current"], _read(path)
    if there is not None and not there.strip():
        lost = (
            f"synapse:signing_key:current: is missing: {path} is empty; put the key back, here or there, from a backup"
        )
        return [] if current else [lost]
    if current is None or there is None or current.split() == there.split():
        return []
    if _key_id(there) in settings["signing_key"]["old"]:
        return []
    return [
        __salt__["synapse_pillar.fault"](
            "synapse:signing_key:current",
            None,
            f"this homeserver signs with {_key_id(there)}; to replace that key, name it below synapse:signing_key:old",
            secret=True,
        )
    ]


def _given_secrets(settings):
    given = {name: value for name, value in settings["secrets"].items() if value}
    if settings["signing_key"]["current"]:
        given[SIGNING_KEY] = settings["signing_key"]["current"].strip() + "\n"
    return given


def _secret_path(settings, name):
    return f"{settings['directories']['data']}/secrets/{name}"


def _key_id(text):
    """The id of a signing key file: ``ed25519:a_ABCD`` of ``ed25519 a_ABCD SEED``."""
    return ":".join(text.split()[:2])


def _new_signing_key():
    # As signedjson writes it: algorithm, version, unpadded base64 of the 32 bytes of the seed.
    version = "a_" + "".join(random_secrets.choice(string.ascii_letters) for _ in range(4))
    seed = base64.b64encode(random_secrets.token_bytes(32)).decode().rstrip("=")
    return f"ed25519 {version} {seed}\n"


def digests():
    """
    Return a digest of all that each process reads: a dict from process name to hexadecimal text.

    It tells of the files that the pillar asks for, whether they are written yet or not.

    CLI Example:

    .. code-block:: bash

        salt-call synapse_config.digests
    """
    settings = __salt__["synapse_pillar.settings"]()
    given = _given_secrets(settings)
    wanted = files()
    shared = [given.get(name) or _read(_secret_path(settings, name)) or "" for name in (*SECRETS, SIGNING_KEY)]
    read = _read_by_each(__salt__["synapse_workers.plan"]()["processes"])
    return {name: _digest(shared + [wanted[path] for path in paths]) for name, paths in read.items()}


def _digest(texts):
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()
