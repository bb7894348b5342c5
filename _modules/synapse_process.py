"""
Synapse's processes on this machine: their units, their containers, and what they are at.

systemd alone starts and stops them. A container bears the digest of everything its process was started from, so that what
runs can be told from what should run at any time, also after a run that was cut off.
"""

import contextlib
import hashlib
import http.client
import json
import os
import pathlib
import signal
import socket
import time

import jinja2
import salt.utils.user
from salt.exceptions import CommandExecutionError, SaltInvocationError

UNITS = pathlib.Path("/etc/systemd/system")
MAIN = "matrix-synapse"
WORKER_PREFIX = "matrix-synapse-worker-"

PROCESS_LABEL = "org.matrix.synapse.process"
INPUTS_LABEL = "org.matrix.synapse.process.inputs"
INPUTS_PLACE = "INPUTS"

# What systemd says of a unit of which nothing runs, nor is about to.
ENDED = ("inactive", "failed")

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
    common = common_arguments()
    appservices = __salt__["synapse_appservice.registrations"]()
    common += [argument for appservice in appservices for argument in appservice["arguments"]]
    template = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True).from_string(
        __salt__["cp.get_file_str"]("salt://synapse/process/files/process.service.jinja")
    )
    return {
        process["name"]: _unit(process, common, image["id"] or image["reference"], digests, settings, template)
        for process in __salt__["synapse_workers.plan"]()["processes"]
    }


def common_arguments():
    """
    Return the arguments that `docker create` is given for whatever runs Synapse's image: those of :func:`base_arguments`,
    the network, the sockets.

    CLI Example:

    .. code-block:: bash

        salt-call synapse_process.common_arguments
    """
    settings = __salt__["synapse_pillar.settings"]()
    directories = settings["directories"]
    return [
        *base_arguments(directories["config"]),
        f"--network={settings['docker']['network']['name']}",
        f"--health-interval={settings['process']['health_interval']}s",
        "--health-timeout=10s",
        _mount(directories["run"]),
        *[_mount(path, "readonly") for path in __salt__["synapse_config.sockets_to_mount"]()],
    ]


def base_arguments(config):
    """
    Return the arguments by which Synapse's image can do as much as it needs to read its configuration: identity,
    confinement, files.

    config
        The directory that stands where the processes see ``synapse:directories:config``.

    CLI Example:

    .. code-block:: bash

        salt-call synapse_process.base_arguments /etc/matrix-synapse
    """
    settings = __salt__["synapse_pillar.settings"]()
    image = __salt__["synapse_image.wanted"](settings["image"])
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
        # The journal has it, by `docker start --attach`.
        "--log-driver=none",
        f"--mount=type=bind,source={config},target={directories['config']},readonly",
        _mount(f"{directories['data']}/secrets", "readonly"),
        _mount(f"{directories['data']}/media"),
    ]
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
    # Where Synapse can make no file: it could lead root, who writes here, anywhere.
    roots = f"{settings['directories']['run']}/units/{name}"
    notify_socket = f"{roots}.notify"
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
        "stopped": f"{roots}.stopped",
        "sockets": [path for path in (process["private_socket"], process["public_socket"]) if path],
        "stop_grace": settings["process"]["stop_grace"],
        "start_timeout": settings["process"]["start_timeout"],
        "lock": __salt__["synapse_maintenance.lock_file"](),
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
    return _states(names, _loaded()) if names else {}


def _states(names, loaded):
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
    return _present(containers(), _loaded())


def _present(there, loaded):
    files = {path.stem for pattern in _patterns() for path in UNITS.glob(pattern)}
    return sorted(files | set(loaded) | set(there))


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
        names of what runs, but not with the inputs that it should, or that a rolling restart took from nginx and did not
        give back,

    ``start``
        names of what does not run, but should,

    ``stop``
        names of what runs, but should not: only if ``synapse:process:running`` is false.

    Raises CommandExecutionError if Synapse is under maintenance, or a rolling restart is at work.

    CLI Example:

    .. code-block:: bash

        salt-call synapse_process.pending
    """
    fault = __salt__["synapse_maintenance.fault"]() or __salt__["synapse_rolling.fault"]()
    if fault:
        raise CommandExecutionError(fault)
    wanted = units()
    running = __salt__["synapse_pillar.settings"]()["process"]["running"]
    known, there = states(list(wanted)), containers()
    shut = __salt__["synapse_rolling.taken_out"]()

    def active(name):
        return known[name]["ActiveState"] in ("active", "reloading")

    enabled = [name for name in wanted if known[name]["UnitFileState"] == "enabled"]
    alive = [name for name in wanted if active(name) or known[name]["ActiveState"] == "activating"]
    outdated = [name for name in alive if there.get(name, {}).get("inputs") != wanted[name]["inputs"] or name in shut]
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
    if restarts_together(todo):
        # Main takes along the workers that run, and starts all that are enabled: not those that are about to go.
        leaving = [name for name in present() if name not in wanted and _text(name)]
        if leaving:
            _systemctl("disable", "--now", *_services(leaving))
        workers = [name for name in wanted if name != MAIN]
        steps = [(__salt__["synapse_rolling.restart_together"], [MAIN, *workers]), (_start, workers)]
    else:
        # Peers that are down come first, so that they can take over.
        steps = [(_start, todo["start"]), (__salt__["synapse_rolling.restart"], todo["restart"])]
    failures = []
    for do, names in steps:
        try:
            if names:
                do(names)
        except CommandExecutionError as err:
            failures.append(str(err))
    if failures:
        raise CommandExecutionError("\n".join(failures))


def restarts_together(todo):
    """
    Return whether something changed that all share: processes that know it and others that don't must not run side by side.

    todo
        What :func:`pending` returned.

    CLI Example:

    .. code-block:: bash

        salt-call synapse_process.restarts_together '{restart: [matrix-synapse], start: []}'
    """
    workers = [name for name in units() if name != MAIN]
    changed = [name for name in workers if name in todo["restart"] or name in todo["start"]]
    return MAIN in todo["restart"] and changed == workers != []


def _start(names):
    """Have systemd start units, all together, and wait until they are healthy."""
    done = _systemctl_result("start", *_services(names))
    if done["retcode"] == 0:
        return
    known = states(names)
    failed = [name for name in names if known[name]["ActiveState"] != "active"]
    if failed:
        raise CommandExecutionError("\n".join([*map(_obituary, failed), done["stderr"]]))


def restart(name, alone=True):
    """
    Restart one process, and wait until it is healthy.

    name
        The process's name.

    alone
        Whether the main process leaves its workers as they are; otherwise it takes those along that run, and all that are
        enabled start once it is healthy.

    Raises CommandExecutionError if it does not become healthy, with the end of its journal.

    CLI Example:

    .. code-block:: bash

        salt-call synapse_process.restart matrix-synapse-worker-0-generic
    """
    # Source: systemctl(1), --job-mode=.
    mode = ["--job-mode=ignore-dependencies"] if alone else []
    done = _systemctl_result(*mode, "restart", *_services([name]))
    if done["retcode"] != 0:
        raise CommandExecutionError(f"{_obituary(name)}\n{done['stderr']}")


def _reload_is_due():
    loaded = _loaded()
    return loaded and "yes" in [unit["NeedDaemonReload"] for unit in _properties(loaded, "NeedDaemonReload").values()]


def _write_unit(name, text):
    __salt__["synapse_files.write"](UNITS / f"{name}.service", text, mode=0o644)


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
        for side in ("public", "private", "units"):
            for path in (run / side).glob(f"{name}.*"):
                path.unlink(missing_ok=True)
    return gone


def census(memory=True):
    """
    Return what really runs of Synapse on this machine, whether the formula started it or not: a dict with

    ``maintenance``
        Who holds the lock, see ``synapse_maintenance.holder``; None if nobody does.

    ``closed``
        Whether nginx answers 503.

    ``processes``
        A list of dicts, one for each process of the plan and for each that left a trace here: ``name``, ``type`` (None if
        it is not of the plan), ``unit`` (systemd's word), ``container`` (Docker's word), ``healthy``, ``current`` (whether
        it runs what the pillar says), ``sessions`` (how many of the database's; None if it can't be asked), ``restarts``, ``memory`` (bytes) and
        ``since``.

    ``strays``
        A list of dicts, one for each container or process that runs Synapse, or holds its files, without a unit that is
        active: ``kind`` (``container``, ``process``), ``id`` (the container's, or a PID) and ``about``.

    ``sessions``
        Every session of Synapse's role in the database: see ``synapse_postgres.sessions``.

    ``sessions_fault``
        Why the database can't be asked, as when it recovers from a crash, so that there may be others; None if it can.

    memory
        Whether to ask for the memory, which takes Docker two seconds.

    CLI Example:

    .. code-block:: bash

        salt-call synapse_process.census
    """
    wanted, counted = units(), _count()
    planned = {process["name"]: process for process in __salt__["synapse_workers.plan"]()["processes"]}
    names = [process["name"] for process in counted["processes"]]
    known = _properties(names, "NRestarts", "ActiveEnterTimestamp")
    used = _memory(
        [process["name"] for process in counted["processes"] if memory and process["container"] == "running"]
    )
    for process in counted["processes"]:
        name, inputs = process["name"], process.pop("inputs")
        process.update(
            {
                "type": _type(planned.get(name)),
                "healthy": healthy(_private_socket(name)),
                "current": name in planned and inputs == wanted[name]["inputs"],
                "sessions": _sessions_of(name, counted),
                "restarts": int(known[name].get("NRestarts") or 0),
                "memory": used.get(name),
                "since": known[name]["ActiveEnterTimestamp"],
            }
        )
    maintenance = __salt__["synapse_maintenance.holder"]()
    return {"maintenance": maintenance, "closed": __salt__["synapse_maintenance.closed"](), **counted}


def _sessions_of(name, counted):
    if counted["sessions_fault"]:
        return None
    return sum(session["process"] == name for session in counted["sessions"])


def _count():
    """The part of the census that says what is there at all, quick enough to be asked again and again during a stop."""
    there, loaded = containers(), _loaded()
    names = __salt__["synapse_workers.names"]()
    names += [name for name in _present(there, loaded) if name not in names]
    known = _states(names, loaded)
    processes = [
        {
            "name": name,
            "unit": known[name]["ActiveState"],
            "container": there.get(name, {}).get("state"),
            "inputs": there.get(name, {}).get("inputs"),
        }
        for name in names
    ]
    try:
        sessions, fault = __salt__["synapse_postgres.sessions"](), None
    except CommandExecutionError as err:
        sessions, fault = [], str(err)
    return {
        "processes": processes,
        "strays": _strays([process["name"] for process in processes if _runs(process)]),
        "sessions": sessions,
        "sessions_fault": fault,
    }


def _runs(process):
    return process["unit"] not in ENDED


def _type(process):
    return process and (f"{process['type']} ({process['stream']})" if process["stream"] else process["type"])


def _private_socket(name):
    return f"{__salt__['synapse_pillar.settings']()['directories']['run']}/private/{name}.sock"


def _strays(active):
    """What runs Synapse or holds its files, but belongs to no unit that is active: see :func:`census`."""
    running = _running_containers()
    owned = {id_ for id_, container in running.items() if container["process"] in active}
    found = {
        id_: {"kind": "container", "id": container["name"], "about": container["about"]}
        for id_, container in running.items()
        if container["ours"] and id_ not in owned
    }
    for pid, arguments, group in _synapse_processes():
        # Docker names the control group of a container by its id, whichever cgroup driver it uses.
        within = next((id_ for id_ in running if id_ in group), None)
        if within in owned:
            continue
        if within:
            container = running[within]
            found[within] = {"kind": "container", "id": container["name"], "about": container["about"]}
        else:
            found[pid] = {"kind": "process", "id": pid, "about": " ".join(arguments)}
    return list(found.values())


def _running_containers():
    """Every container that runs, whoever made it, by id; ``ours`` has our label, or mounts of our directories."""
    ids = __salt__["cmd.run_all"](
        ["docker", "container", "ls", "--quiet", "--no-trunc"],
        python_shell=False,
        ignore_retcode=True,
        output_loglevel="debug",
    )
    if ids["retcode"] != 0 or not ids["stdout"]:
        return {}
    directories = __salt__["synapse_pillar.settings"]()["directories"]
    ours = [directories[name] for name in ("config", "data", "run")]
    # One that ends between the two commands is no error, and no container that runs.
    shown = __salt__["cmd.run_all"](
        ["docker", "container", "inspect", *ids["stdout"].split()],
        python_shell=False,
        ignore_retcode=True,
        output_loglevel="quiet",
    )
    return {
        container["Id"]: {
            "name": container["Name"].removeprefix("/"),
            "process": (container["Config"]["Labels"] or {}).get(PROCESS_LABEL),
            "about": f"{container['Config']['Image']} {' '.join(container['Args'])}"[:200],
            "ours": PROCESS_LABEL in (container["Config"]["Labels"] or {})
            or any(_is_below(mount.get("Source") or "", ours) for mount in container["Mounts"]),
        }
        for container in json.loads(shown["stdout"] or "[]")
    }


def _is_below(path, directories):
    return any(path == directory or path.startswith(f"{directory}/") for directory in directories)


def _synapse_processes():
    """Yield PID, arguments and control groups of every process of this machine that runs one of Synapse's programs."""
    for entry in pathlib.Path("/proc").iterdir():
        if not entry.name.isdecimal():
            continue
        try:
            arguments = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
            group = (entry / "cgroup").read_text(encoding="utf-8")
        except OSError:
            # It has ended.
            continue
        # `docker create ... -m synapse.app.X` is no Synapse.
        if "python" in arguments[0] and any(word.startswith("synapse.app.") for word in arguments):
            yield int(entry.name), arguments, group


def status():
    """
    Return :func:`census` as text for people: a table of the processes, and what stands out below it.

    CLI Example:

    .. code-block:: bash

        salt-call synapse_process.status
    """
    counted = census()
    rows = [("name", "unit", "healthy", "as planned", "db sessions", "restarts", "memory", "since")]
    rows += [
        (
            process["name"],
            process["unit"],
            _yes(process["healthy"]),
            _yes(process["current"]) if process["type"] else "not of the plan",
            str(process["sessions"]) if process["sessions"] is not None else "-",
            str(process["restarts"]),
            f"{process['memory'] / (1 << 20):.0f} MiB" if process["memory"] is not None else "-",
            process["since"] or "-",
        )
        for process in counted["processes"]
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines += [f"A stray: {_stray(stray)}" for stray in counted["strays"]]
    lines += [f"A stray: {_session(session)}" for session in _foreign(counted)]
    lines += [
        f"No requests: a restart has taken {name} from nginx; if that was cut off: salt-call state.apply synapse"
        for name in __salt__["synapse_rolling.taken_out"]()
    ]
    faults = [
        counted["sessions_fault"],
        __salt__["synapse_maintenance.fault"]() or __salt__["synapse_maintenance.unfinished"](),
        __salt__["synapse_maintenance.closed_fault"](),
    ]
    return "\n".join([*lines, *filter(None, faults)])


def _yes(value):
    return "yes" if value else "no"


def _stray(stray):
    return f"the {stray['kind']} {stray['id']} ({stray['about']})"


def _session(session):
    return f"the database session {session['pid']} of {session['process'] or 'a nameless program'} from {session['client']}"


def _foreign(counted):
    """The database sessions that belong to no process of the census."""
    names = [process["name"] for process in counted["processes"] if _runs(process)]
    return [session for session in counted["sessions"] if session["process"] not in names]


def left(counted):
    """
    Return a list of all that a census found running, or could not find out, a phrase each; an empty list proves that Synapse
    is stopped.

    counted
        What :func:`census` returned.

    CLI Example:

    .. code-block:: bash

        salt-call synapse_process.left '{processes: [], strays: [], sessions: [], sessions_fault: null}'
    """
    found = [
        f"the unit {process['name']} ({process['unit']})"
        for process in counted["processes"]
        if _runs(process) or process["container"] in ("running", "paused", "restarting")
    ]
    found += [_stray(stray) for stray in counted["strays"]]
    # The session of a unit that runs goes with it.
    found += [_session(session) for session in _foreign(counted)]
    return found + ([f"perhaps database sessions ({counted['sessions_fault']})"] if counted["sessions_fault"] else [])


def stop(holder=None, reason="an operator's stop", kill=False, grace=None, force=False):
    """
    Stop Synapse and prove it: nginx answers 503, a lock keeps all units from starting, and a census finds nothing more.

    Strays are stopped as well. What does not end by SIGTERM within the grace time is named, and killed only if that is
    allowed; if it is not, all that ran before is started again.

    holder
        In whose name the lock is taken. Who holds it already may stop again. Defaults to the user who runs it, so that one
        operator does not end what another has begun.

    reason
        What for; whoever meets the lock reads it.

    kill
        Whether what does not end by itself may be killed, database sessions of others included.

    grace
        Seconds that processes have to end. Defaults to ``synapse:process:stop_grace``.

    force
        Whether to stop while an upgrade of PostgreSQL or a restore is at work, as these themselves do.

    Returns a dict with ``stopped`` (names and strays that ran) and ``killed`` (what had to be).

    Raises CommandExecutionError if somebody else holds the lock, if an upgrade or a restore is at work, or if the census still
    finds something in the end; SaltInvocationError for an argument that is none.

    CLI Example:

    .. code-block:: bash

        salt-call synapse_process.stop reason="new disks"
    """
    holder = _caller() if holder is None else holder
    if grace is None:
        grace = __salt__["synapse_pillar.settings"]()["process"]["stop_grace"]
    for argument, value, is_right, right in (
        ("holder", holder, isinstance(holder, str) and holder.strip(), "a name"),
        ("kill", kill, isinstance(kill, bool), "true or false"),
        ("grace", grace, _is_number(grace) and grace > 0, "a number of seconds"),
    ):
        if not is_right:
            raise SaltInvocationError(f"{argument}: {value!r} is not {right}")
    at_work = not force and __salt__["synapse_maintenance.at_work"]()
    if at_work:
        raise CommandExecutionError(at_work)
    taken, before, closed = __salt__["synapse_maintenance.lock"](holder, reason), {"processes": []}, False
    try:
        before = _count()
        ran = left(before)
        closed = __salt__["synapse_maintenance.close"]()
        remaining = _terminate(before, grace)
        killed = []
        if remaining and kill:
            killed = remaining
            _kill(_count())
            remaining = _wait_until_nothing_is_left(10)
        if remaining:
            raise CommandExecutionError(
                f"Synapse did not stop within {grace} s; still there: {'; '.join(remaining)}. With kill=True they are killed"
            )
    except Exception:
        if taken:
            _start_again(holder, before, closed)
        raise
    return {"stopped": ran, "killed": killed}


def _caller():
    """The user who runs it, also behind sudo: ``root``, ``sudo_alice``."""
    return salt.utils.user.get_specific_user()


def _is_number(value):
    return isinstance(value, int | float) and not isinstance(value, bool)


def _terminate(counted, grace):
    """Have everything end by SIGTERM that a census found; return what is left after the grace time."""
    # The units' own `ExecStop=` kills after its grace time. SIGTERM first, so that nothing is killed unasked: the units'
    # automatic restart meets the lock. A unit that was past the lock already shows up later.
    asked, deadline, remaining = set(), time.monotonic() + grace, True
    while remaining and time.monotonic() < deadline:
        asked = _ask_to_end(counted, asked)
        if _have_ended(min(deadline, time.monotonic() + 1)):
            # Nothing is left that it would kill, but perhaps a start that is only about to be.
            _systemctl_result("stop", *_patterns())
        counted = _count()
        remaining = left(counted)
    processes = counted["processes"]
    if any(map(_runs, processes)) and "running" not in [process["container"] for process in processes]:
        _systemctl_result("stop", *_patterns())
        remaining = _wait_until_nothing_is_left(10)
    return remaining


def _have_ended(deadline):
    """Wait until no unit runs, as a census takes longer than most processes take to end. Return whether none does."""
    while any(unit["active"] not in ENDED for unit in _loaded().values()):
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.05)
    return True


def _ask_to_end(counted, asked):
    """Send SIGTERM to all that a census found running, but for what was asked already; return what that was."""
    running = {("container", process["name"]) for process in counted["processes"] if process["container"] == "running"}
    running |= {(stray["kind"], stray["id"]) for stray in counted["strays"]}
    for kind, id_ in running - asked:
        if kind == "process":
            _signal(id_, signal.SIGTERM)
    named = [id_ for kind, id_ in running - asked if kind == "container"]
    if named:
        _docker("kill", "--signal=TERM", *named)
    return running


def _wait_until_nothing_is_left(seconds):
    deadline = time.monotonic() + seconds
    while (remaining := left(_count())) and time.monotonic() < deadline:
        time.sleep(0.1)
    return remaining


def _kill(counted):
    names = [name for name, container in containers().items() if container["state"] == "running"]
    names += [stray["id"] for stray in counted["strays"] if stray["kind"] == "container"]
    if names:
        _docker("kill", "--signal=KILL", *dict.fromkeys(names))
    for stray in counted["strays"]:
        if stray["kind"] == "process":
            _signal(stray["id"], signal.SIGKILL)
    _systemctl_result("stop", *_services(present()))
    __salt__["synapse_postgres.terminate_sessions"]()


def _signal(pid, number):
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _docker(*words):
    # What ended meanwhile is no error: the census tells.
    __salt__["cmd.run_all"](["docker", *words], python_shell=False, ignore_retcode=True, output_loglevel="debug")


def _start_again(holder, before, closed):
    """After a stop that failed: everything that ran, runs, and nginx passes requests on if it did."""
    __salt__["synapse_maintenance.unlock"](holder)
    ran = [process["name"] for process in before["processes"] if process["unit"] in ("active", "activating")]
    if ran:
        _systemctl_result("start", *_services(ran))
    if closed:
        __salt__["synapse_maintenance.open"]()


def start(holder=None, opened=True, force=False):
    """
    Undo :func:`stop`: the lock goes, every process of the plan starts, the main process first, and once all are healthy,
    nginx passes requests on again.

    holder
        In whose name the lock was taken. Defaults to the user who runs it.

    opened
        Whether nginx passes requests on in the end.

    force
        Whether to start in the middle of an upgrade of PostgreSQL or a restore, as these themselves do.

    Returns the names of the processes, all healthy.

    Raises CommandExecutionError if somebody else holds the lock, or if an upgrade or a restore is not finished; or if a process does not become healthy, with the end of
    its journal: nginx answers 503 still, and the next call goes on.

    CLI Example:

    .. code-block:: bash

        salt-call synapse_process.start
    """
    holder = _caller() if holder is None else holder
    unfinished = not force and __salt__["synapse_maintenance.unfinished"]()
    if unfinished:
        raise CommandExecutionError(unfinished)
    wanted = __salt__["synapse_workers.names"]()
    __salt__["synapse_maintenance.unlock"](holder)
    _start(wanted)
    sick = [name for name in wanted if not healthy(_private_socket(name))]
    if sick:
        raise CommandExecutionError(f"Started, but not healthy: {', '.join(sick)}")
    if opened:
        __salt__["synapse_maintenance.open"]()
    return wanted


def _memory(names):
    """Bytes that each container uses, as `docker stats` counts them."""
    if not names:
        return {}
    # One that ends meanwhile makes for an exit status.
    shown = __salt__["cmd.run_all"](
        ["docker", "stats", "--no-stream", "--format", "{{json .}}", *names],
        python_shell=False,
        ignore_retcode=True,
        output_loglevel="debug",
    )["stdout"]
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
