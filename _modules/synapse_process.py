"""
Synapse's processes on this machine: their units, their containers, and what they are at.

systemd alone starts and stops them. A container bears the digest of everything its process was started from, so that what
runs can be told from what should run at any time, also after a run that was cut off.
"""

import hashlib
import http.client
import json
import pathlib
import socket

import jinja2
from salt.exceptions import CommandExecutionError

UNITS = pathlib.Path("/etc/systemd/system")
MAIN = "matrix-synapse"
WORKER_PREFIX = "matrix-synapse-worker-"

PROCESS_LABEL = "org.matrix.synapse.process"
INPUTS_LABEL = "org.matrix.synapse.process.inputs"
INPUTS_PLACE = "INPUTS"

HELPERS = "/usr/local/lib/matrix-synapse"
PYTHON_CACHE = "/var/cache/python"


def units():
    """
    Return the text of every unit that the pillar asks for, without touching any: a dict from process name to
    ``{"text", "inputs"}``, where ``inputs`` is the digest of all that the process is started from.

    While the image is not there as the pillar wants it, its id is not known, and so no digest is that of a running
    container.

    CLI Example:

    .. code-block:: bash

        salt-call synapse_process.units
    """
    settings = __salt__["synapse_pillar.settings"]()
    image = __salt__["synapse_image.wanted"](settings["image"])
    digests = __salt__["synapse_config.digests"]()
    common = _common_arguments(settings, image)
    appservices = __salt__["synapse_appservice.registrations"]()
    common += [argument for appservice in appservices for argument in appservice["arguments"]]
    template = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True).from_string(
        __salt__["cp.get_file_str"]("salt://synapse/process/files/process.service.jinja")
    )
    return {
        process["name"]: _unit(process, common, image["id"] or image["reference"], digests, settings, template)
        for process in __salt__["synapse_workers.plan"]()["processes"]
    }


def _common_arguments(settings, image):
    """What `docker create` is told of every process."""
    directories = settings["directories"]
    uid, gid = __salt__["synapse_config.identity"]()
    arguments = [
        # PID 1 of its own: Python as PID 1 ignores SIGTERM until Synapse has set its handlers.
        "--init",
        "--pull=never",
        f"--user={uid}:{gid}",
        "--read-only",
        "--tmpfs=/tmp:rw,nosuid,nodev,mode=1777",
        "--cap-drop=ALL",
        "--security-opt=no-new-privileges",
        f"--network={settings['docker']['network']['name']}",
        # The journal has it, by `docker start --attach`.
        "--log-driver=none",
        f"--health-interval={settings['process']['health_interval']}s",
        "--health-timeout=10s",
        _mount(directories["config"], "readonly"),
        _mount(f"{directories['data']}/secrets", "readonly"),
        _mount(f"{directories['data']}/media"),
        _mount(directories["run"]),
    ]
    arguments += [_mount(path, "readonly") for path in __salt__["synapse_config.sockets_to_mount"]()]
    if image["pycache"]:
        arguments += [
            f"--mount=type=volume,source={image['pycache']},target={PYTHON_CACHE},readonly",
            f"--env=PYTHONPYCACHEPREFIX={PYTHON_CACHE}",
        ]
    return arguments


def _mount(path, *options):
    # Where a process finds a file is where the operator finds it.
    return ",".join([f"--mount=type=bind,source={path},target={path}", *options])


def _unit(process, common, image, digests, settings, template):
    name = process["name"]
    private = f"{settings['directories']['run']}/private/{name}"
    notify_socket = f"{private}.notify"
    arguments = [
        f"--hostname={name[:63]}",
        f"--label={PROCESS_LABEL}={name}",
        *common,
        f"--health-cmd=curl --fail --silent --show-error --unix-socket {process['private_socket']} http://localhost/health",
        f"--env=NOTIFY_SOCKET={notify_socket}",
        # https://www.postgresql.org/docs/current/libpq-envars.html: the session says whose it is.
        f"--env=PGAPPNAME={name}",
    ]
    arguments += [f"--{limit}={process[limit]}" for limit in ("memory", "cpus") if process[limit] is not None]
    arguments += process["arguments"]
    command = [image, "run", "-m", process["app"]]
    command += [word for path in process["config_files"] for word in ("-c", path)]
    values = {
        "process": process,
        "notify_socket": notify_socket,
        "stopped": f"{private}.stopped",
        "sockets": [path for path in (process["private_socket"], process["public_socket"]) if path],
        "stop_grace": settings["process"]["stop_grace"],
        "start_timeout": settings["process"]["start_timeout"],
        "after": "postgresql.service redis-server@synapse.service",
        "helpers": HELPERS,
    }
    # The digest covers the unit as well, so it is taken before it stands in there.
    draft = template.render(create=_quote([*arguments, *command]), inputs=INPUTS_PLACE, **values)
    inputs = hashlib.sha256((digests[name] + draft).encode()).hexdigest()
    return {"text": draft.replace(INPUTS_PLACE, inputs, 1), "inputs": inputs}


def _quote(words):
    """Words as a command line of a unit file: see "COMMAND LINES" in systemd.service(5)."""
    return " ".join(_quote_word(word) for word in words)


def _quote_word(word):
    escaped = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    return f'"{escaped}"' if set(word) & set(" \t'\";\\") else escaped


def states(names):
    """
    Return what systemd makes of units: a dict from name to ``ActiveState``, ``SubState`` and ``UnitFileState``, in
    systemd's words.

    systemd is asked once for all that it has loaded, and the links that enable a unit are looked at (systemctl(1),
    ``enable``): it would read the files of each other unit to answer, six milliseconds for each.

    names
        A list of process names.

    CLI Example:

    .. code-block:: bash

        salt-call synapse_process.states '[matrix-synapse]'
    """
    if not names:
        return {}
    loaded = _loaded()
    enabled = {path.stem for pattern in _patterns() for path in UNITS.glob(f"*.wants/{pattern}")}
    unloaded = {"active": "inactive", "sub": "dead"}
    return {
        name: {
            "ActiveState": loaded.get(name, unloaded)["active"],
            "SubState": loaded.get(name, unloaded)["sub"],
            "UnitFileState": "enabled" if name in enabled else "disabled",
        }
        for name in names
    }


def _loaded():
    """What systemd has loaded of ours, also what has no file any more, by name."""
    listed = json.loads(_systemctl("list-units", "--all", "--full", "--output=json", *_patterns()))
    return {unit["unit"].removesuffix(".service"): unit for unit in listed}


def _properties(names, *properties):
    """What `systemctl show` says of units, by name."""
    shown = _systemctl("show", f"--property=Id,{','.join(properties)}", *_services(names))
    blocks = [dict(line.split("=", 1) for line in block.splitlines()) for block in shown.split("\n\n") if block.strip()]
    return {block["Id"].removesuffix(".service"): block for block in blocks}


def containers():
    """
    Return the containers of Synapse's processes: a dict from name to ``{"inputs", "state"}``.

    CLI Example:

    .. code-block:: bash

        salt-call synapse_process.containers
    """
    columns = "\t".join(["{{.Names}}", '{{.Label "' + INPUTS_LABEL + '"}}', "{{.State}}"])
    shown = __salt__["cmd.run_all"](
        ["docker", "container", "ls", "--all", f"--filter=label={PROCESS_LABEL}", "--format", columns],
        python_shell=False,
        output_loglevel="debug",
        ignore_retcode=True,
    )
    # Without an engine there are no containers, which is what a first run under test=True finds.
    lines = shown["stdout"].splitlines() if shown["retcode"] == 0 else []
    return {name: {"inputs": inputs, "state": state} for name, inputs, state in (line.split("\t") for line in lines)}


def present():
    """
    Return the names of all processes that left any trace here: a unit file, a unit that systemd knows, a container.

    CLI Example:

    .. code-block:: bash

        salt-call synapse_process.present
    """
    files = {path.stem for pattern in _patterns() for path in UNITS.glob(pattern)}
    return sorted(files | set(_loaded()) | set(containers()))


def _patterns():
    return f"{MAIN}.service", f"{WORKER_PREFIX}*.service"


def pending():
    """
    Return what a run would do so that the processes are as the pillar says: a dict with

    ``write``
        names whose unit file differs,

    ``enable``
        names whose unit is not enabled, but should be,

    ``disable``
        names whose unit is enabled, but should not: only if ``synapse:process:running`` is false, so that the host boots
        without them,

    ``restart``
        names of what runs, but not with the inputs that it should, and of all that the main process takes along,

    ``start``
        names of what does not run, but should,

    ``stop``
        names of what runs, but should not: only if ``synapse:process:running`` is false.

    CLI Example:

    .. code-block:: bash

        salt-call synapse_process.pending
    """
    wanted = units()
    running = __salt__["synapse_pillar.settings"]()["process"]["running"]
    known, there = states(list(wanted)), containers()

    def active(name):
        return known[name]["ActiveState"] in ("active", "reloading")

    enabled = [name for name in wanted if known[name]["UnitFileState"] == "enabled"]
    alive = [name for name in wanted if active(name) or known[name]["ActiveState"] == "activating"]
    outdated = [name for name in alive if there.get(name, {}).get("inputs") != wanted[name]["inputs"]]
    if MAIN in outdated:
        # It takes them all along.
        outdated = alive
    return {
        "write": [name for name, unit in wanted.items() if _text(name) != unit["text"]],
        "enable": [name for name in wanted if name not in enabled] if running else [],
        "disable": [] if running else enabled,
        "restart": outdated if running else [],
        # One that is still starting may be failing over and over: it is waited for, and told of.
        "start": [name for name in wanted if name not in outdated and not active(name)] if running else [],
        "stop": [] if running else alive,
    }


def _text(name):
    try:
        return (UNITS / f"{name}.service").read_text(encoding="utf-8")
    except FileNotFoundError:
        return None


def apply(todo):
    """
    Do what :func:`pending` returned, each process started or restarted at most once.

    todo
        What :func:`pending` returned.

    Raises CommandExecutionError that names the processes that did not become healthy, with the end of their journals.

    CLI Example:

    .. code-block:: bash

        salt-call synapse_process.apply '{write: [], enable: [], disable: [], restart: [], start: [matrix-synapse], stop: []}'
    """
    wanted = units()
    for name in todo["write"]:
        _write_unit(name, wanted[name]["text"])
    if todo["write"] or _reload_is_due():
        _systemctl("daemon-reload")
    for verb in ("enable", "disable", "stop"):
        if todo[verb]:
            _systemctl(verb, *_services(todo[verb]))
    # The main process takes along the workers that run, and starts the others.
    restart = [MAIN] if MAIN in todo["restart"] else todo["restart"]
    start = [name for name in wanted if name in todo["start"] or (MAIN in restart and name != MAIN)]
    failed = []
    for verb, names in (("restart", restart), ("start", start)):
        if names and _systemctl_result(verb, *_services(names))["retcode"] != 0:
            failed += [name for name in names if states([name])[name]["ActiveState"] != "active"]
    if failed:
        raise CommandExecutionError("\n".join(_obituary(name) for name in dict.fromkeys(failed)))


def _reload_is_due():
    loaded = _loaded()
    return loaded and "yes" in [unit["NeedDaemonReload"] for unit in _properties(loaded, "NeedDaemonReload").values()]


def _write_unit(name, text):
    path = UNITS / f"{name}.service"
    candidate = path.with_suffix(".service.new")
    candidate.write_text(text, encoding="utf-8")
    candidate.chmod(0o644)
    candidate.rename(path)


def _obituary(name):
    state = states([name])[name]
    journal = __salt__["cmd.run_all"](
        ["journalctl", "--unit", f"{name}.service", "--lines", "15", "--output", "cat", "--no-pager"],
        python_shell=False,
        output_loglevel="debug",
    )["stdout"]
    return f"{name} did not become healthy, it is {state['ActiveState']} ({state['SubState']}); its journal ends:\n{journal}"


def prune(keep):
    """
    Remove every trace of the processes that are not to be kept: unit, container, sockets, systemd's memory of a failure.

    keep
        A list of process names.

    Returns the names of the processes that were removed.

    CLI Example:

    .. code-block:: bash

        salt-call synapse_process.prune '[matrix-synapse, matrix-synapse-worker-0-generic]'
    """
    gone = [name for name in present() if name not in keep]
    if not gone:
        return []
    services = _services(gone)
    _systemctl_result("stop", *services)
    _systemctl_result("disable", *services)
    for name in gone:
        (UNITS / f"{name}.service").unlink(missing_ok=True)
    _systemctl("daemon-reload")
    _systemctl_result("reset-failed", *services)
    left = [name for name in gone if name in containers()]
    if left:
        _run(["docker", "rm", "--force", *left])
    run = pathlib.Path(__salt__["synapse_pillar.settings"]()["directories"]["run"])
    for name in gone:
        for side in ("public", "private"):
            for path in (run / side).glob(f"{name}.*"):
                path.unlink(missing_ok=True)
    return gone


def status():
    """
    Return what every process of the plan is at: a list of dicts with ``name``, ``type``, ``unit`` (systemd's word),
    ``healthy``, ``current`` (whether it runs what the pillar says), ``restarts``, ``memory`` (bytes) and ``since``.

    CLI Example:

    .. code-block:: bash

        salt-call synapse_process.status
    """
    wanted, there = units(), containers()
    known, memory = _properties(wanted, "ActiveState", "NRestarts", "ActiveEnterTimestamp"), _memory(list(there))
    return [
        {
            "name": process["name"],
            "type": process["type"] if not process["stream"] else f"{process['type']} ({process['stream']})",
            "unit": known[process["name"]]["ActiveState"],
            "healthy": healthy(process["private_socket"]),
            "current": there.get(process["name"], {}).get("inputs") == wanted[process["name"]]["inputs"],
            "restarts": int(known[process["name"]].get("NRestarts") or 0),
            "memory": memory.get(process["name"]),
            "since": known[process["name"]]["ActiveEnterTimestamp"],
        }
        for process in __salt__["synapse_workers.plan"]()["processes"]
    ]


def _memory(names):
    """Bytes that each container uses, as `docker stats` counts them."""
    if not names:
        return {}
    shown = _run(["docker", "stats", "--no-stream", "--format", "{{json .}}", *names])
    usage = {row["Name"]: row["MemUsage"].split(" / ")[0] for row in map(json.loads, shown.splitlines())}
    return {name: _bytes(text) for name, text in usage.items()}


def _bytes(text):
    for unit, factor in (("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10), ("B", 1)):
        if text.endswith(unit):
            return int(float(text.removesuffix(unit)) * factor)
    # Of a container that does not run.
    return None


def healthy(path):
    """
    Return whether a process answers ``/health`` on its Unix socket.

    path
        The socket's path.

    CLI Example:

    .. code-block:: bash

        salt-call synapse_process.healthy /run/matrix-synapse/private/matrix-synapse.sock
    """
    connection = http.client.HTTPConnection("localhost", timeout=5)
    connection.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.sock.settimeout(5)
    try:
        connection.sock.connect(path)
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _services(names):
    return [f"{name}.service" for name in names]


def _systemctl(*words):
    return _run(["systemctl", *words])


def _systemctl_result(*words):
    return __salt__["cmd.run_all"](
        ["systemctl", *words], python_shell=False, ignore_retcode=True, output_loglevel="debug"
    )


def _run(command):
    done = __salt__["cmd.run_all"](command, python_shell=False, ignore_retcode=True, output_loglevel="debug")
    if done["retcode"] != 0:
        raise CommandExecutionError(f"{' '.join(command)}: {done['stderr'] or done['stdout']}")
    return done["stdout"]
