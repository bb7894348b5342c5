"""
A major upgrade of Synapse's PostgreSQL, and the way back: the journal, the phases, and what undoes each.

The phases of one run need each other, so all of them are one call on the minion, and each is in the journal, with its time,
before it does anything. Whoever calls next, after a crash, reads there how far the last one came. Until users are served by
the new cluster, the way is back; from then on, it is forward.

``synapse_postgres`` is the face of it.
"""

import contextlib
import datetime
import functools
import json
import os
import pathlib
import secrets
import shutil

from salt.exceptions import CommandExecutionError, SaltInvocationError

HOLDER = "synapse_postgres.upgrade"
EVENT = "synapse/postgres/upgrade"
# A file system with less is called full.
FULL = 16 << 20
# Kept beside the journal, so that a disk that the upgrade fills has room for the journal and the lock on the way back.
RESERVE = 1 << 20

# What Synapse itself checks when it starts, before anybody notices a sequence that lags behind.
POSITIONS = "select stream_name as name, max(stream_id) as position from stream_positions group by stream_name"
SEQUENCES = "select sequencename as name, coalesce(last_value, 0) as value from pg_sequences"

# Who else has a session in the cluster, when Synapse has none.
OTHERS = """
select distinct application_name as program, datname from pg_stat_activity
where backend_type = 'client backend' and pid <> pg_backend_pid()
"""


def journal_file():
    """
    Return the path of the journal.

    CLI Example:

    .. code-block:: bash

        salt-call synapse_upgrade.journal_file
    """
    return f"{_data()}/postgres-upgrade.json"


def record_file():
    """
    Return the path of the record: a file that says which cluster holds Synapse's data.

    CLI Example:

    .. code-block:: bash

        salt-call synapse_upgrade.record_file
    """
    return f"{_data()}/postgres.json"


def _served_file():
    """The last upgrade whose new cluster serves: to it belongs the way back, whatever was tried since."""
    return f"{_data()}/postgres-upgrade-served.json"


def _left_file():
    """Clusters that are left behind, and where their data are."""
    return f"{_data()}/postgres-left-behind.json"


def _contents_file():
    return f"{_data()}/postgres-contents.json"


def _lock_file():
    return f"{_data()}/postgres-upgrade.lock"


def _progress_file():
    return f"{__salt__['synapse_pillar.settings']()['directories']['run']}/root/postgres-upgrade.progress"


def _reserve_file():
    return f"{_data()}/postgres-upgrade.reserve"


def _data():
    return __salt__["synapse_pillar.settings"]()["directories"]["data"]


def record():
    """
    Return the cluster that holds Synapse's data, as it is recorded here: ``15/main``; None if nothing is recorded.

    CLI Example:

    .. code-block:: bash

        salt-call synapse_upgrade.record
    """
    found = _read(record_file())
    return found and found["cluster"]


def write_record(cluster):
    """
    Record which cluster holds Synapse's data.

    cluster
        Its name.

    CLI Example:

    .. code-block:: bash

        salt-call synapse_upgrade.write_record 15/main
    """
    if record() != cluster:
        _write(record_file(), {"cluster": cluster, "since": _now()})


def journal():
    """
    Return what the last upgrade did, or is doing: a dict with ``old`` and ``new`` (clusters), ``method``, ``phases`` (a list
    of dicts with ``name``, ``began`` and ``ended``), ``outcome`` (None while it is not over, ``done``,
    ``rolled back``) and ``error``; None if there never was one.

    CLI Example:

    .. code-block:: bash

        salt-call synapse_upgrade.journal
    """
    return _read(journal_file())


def _read(path):
    try:
        return json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None


def _write(path, content):
    __salt__["synapse_files.write"](path, json.dumps(content, indent=1), mode=0o644)


def _now():
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")


def _alone():
    return __salt__["synapse_runs.alone"](
        _lock_file(), "Another run is at work on Synapse's PostgreSQL: see salt-call synapse_postgres.status"
    )


def _undisturbed():
    return __salt__["synapse_runs.undisturbed"]()


def running():
    """
    Return whether a process is at work on it.

    CLI Example:

    .. code-block:: bash

        salt-call synapse_upgrade.running
    """
    return __salt__["synapse_runs.busy"](_lock_file())


# --- The run --------------------------------------------------------------------------------------


def run(version, method=None, jobs=None, kill=False, grace=None, gated=False):
    """
    Move Synapse's data to a newer major version: see ``synapse_postgres.upgrade``.

    CLI Example:

    .. code-block:: bash

        salt-call synapse_upgrade.run 18
    """
    known = __salt__["synapse_migration.methods"]()
    for argument, value, is_right, right in (
        ("version", version, isinstance(version, int), "a major version, such as 18"),
        ("method", method, method is None or method in known, f"one of {', '.join(known)}"),
        ("jobs", jobs, jobs is None or (isinstance(jobs, int) and jobs > 0), "a number of processes"),
        ("gated", gated, isinstance(gated, bool), "true or false"),
    ):
        if not is_right:
            raise SaltInvocationError(f"{argument}: {value!r} is not {right}")
    with _alone():
        changed = _put_right()
        current = __salt__["synapse_postgres.cluster"]()
        if current != f"{version}/main":
            jobs = jobs or os.cpu_count()
            entry = _begin(current, f"{version}/main", method=method, jobs=jobs, kill=kill, grace=grace, gated=gated)
            _go_through(entry, "preflight")
            changed = True
        elif "care" not in (served := _served() or {"care": []}):
            _go_through({**served, "outcome": None}, "after-care")
            changed = True
        entry = _served() or {}
        return {
            "cluster": f"{version}/main",
            "changed": changed,
            "method": entry.get("method"),
            "kept": entry.get("old"),
            "settings_left_behind": entry.get("left_behind", []),
            "seconds": {phase["name"]: round(_seconds(phase), 1) for phase in entry.get("phases", [])},
        }


def preflight(version, method=None, gated=False):
    """
    Do the first phase alone: see ``synapse_postgres.preflight``.

    CLI Example:

    .. code-block:: bash

        salt-call synapse_upgrade.preflight 18
    """
    with _alone():
        _put_right()
        current = __salt__["synapse_postgres.cluster"]()
        if current == f"{version}/main":
            raise CommandExecutionError(f"Synapse's data are on {current} already")
        entry = _begin(
            current, f"{version}/main", method=method, jobs=os.cpu_count(), kill=False, grace=None, gated=gated
        )
        try:
            _enter(entry, "preflight")
            _preflight(entry)
        except BaseException as err:
            raise CommandExecutionError(_fail(entry, err)) from err
        _go_back(entry)
        return {"cluster": entry["new"], "method": entry["method"], "settings_left_behind": entry["left_behind"]}


def _begin(old, new, **how):
    last = journal() or {}
    entry = {
        "old": old,
        "new": new,
        **how,
        "phases": [],
        # Whether the new cluster was made, and whether the way back is gone.
        "made": False,
        "final": False,
        # Test users, until they are removed.
        "probes": last.get("probes", []),
        "outcome": None,
        "error": None,
    }
    try:
        with open(_reserve_file(), "wb") as reserve:
            os.posix_fallocate(reserve.fileno(), 0, RESERVE)
        _write(journal_file(), entry)
    except OSError as err:
        raise CommandExecutionError(f"Not even the journal can be written: {err}") from err
    return entry


def _go_through(entry, first):
    """Every phase from this one on. What fails is undone, as long as users are not served by the new cluster."""
    try:
        for name in list(PHASES)[list(PHASES).index(first) :]:
            _enter(entry, name)
            PHASES[name](entry)
    except BaseException as err:
        # Also Ctrl-C, and the minion's SIGTERM.
        raise CommandExecutionError(_fail(entry, err)) from err
    entry["error"] = None
    _end(entry, "done")


def _enter(entry, name):
    _leave(entry)
    entry["phases"].append({"name": name, "began": _now(), "ended": None})
    _forget_progress()
    _write(journal_file(), entry)
    _tell(f"{name} ...")


def _leave(entry):
    if entry["phases"] and entry["phases"][-1]["ended"] is None:
        phase = entry["phases"][-1]
        phase["ended"] = _now()
        _tell(f"{phase['name']}: {_seconds(phase):.1f} s")


def _end(entry, outcome):
    _use_reserve()
    _leave(entry)
    entry["outcome"] = outcome
    _forget_progress()
    if outcome == "done":
        _write(_served_file(), entry)
    _write(journal_file(), entry)


def _served():
    """The upgrade by which the data came to where they are; None if there was none."""
    entry = _read(_served_file())
    return entry if entry and entry["new"] == __salt__["synapse_postgres.cluster"]() else None


def _leave_behind(cluster, data):
    _write(_left_file(), {**(_read(_left_file()) or {}), cluster: data})


def _use_reserve():
    pathlib.Path(_reserve_file()).unlink(missing_ok=True)


def _phase(entry):
    return entry["phases"][-1]["name"] if entry["phases"] else "preflight"


def _seconds(phase):
    began = datetime.datetime.fromisoformat(phase["began"])
    ended = datetime.datetime.fromisoformat(phase["ended"] or _now())
    return (ended - began).total_seconds()


def _tell(text):
    __salt__["synapse_progress.tell"](EVENT, text)


def _progress(entry):
    """What is called with the number of bytes in the new cluster."""

    def tell(done):
        progress = {"done": done, "total": entry["about"]["size"]}
        # Not into the journal: to have that on disk would wait for what the tool writes.
        with contextlib.suppress(OSError):
            pathlib.Path(_progress_file()).write_text(json.dumps(progress), encoding="utf-8")
        _tell(f"{_phase(entry)}: {_of(progress)}")

    return tell


def _forget_progress():
    with contextlib.suppress(OSError):
        os.unlink(_progress_file())


def _of(progress):
    done, total = progress["done"], progress["total"]
    return f"{done >> 20} of about {total >> 20} MiB, {min(100, 100 * done // max(total, 1))} %"


# --- The ways out ---------------------------------------------------------------------------------


def _fail(entry, err):
    """Undo what a phase did that failed; return a text that says all that an operator has to know."""
    with _undisturbed():
        # Whatever still writes would take what the reserve gives.
        __salt__["synapse_migration.end_tools"]()
        phase = _phase(entry)
        said = f"The upgrade failed in the phase {phase}: {_cause(err)}"
        # A tool that can't write its log does not say so.
        if entry["made"] and shutil.disk_usage(__salt__["synapse_cluster.existing"](entry["data"])).free < FULL:
            said += f"\nThe file system of {entry['data']} is full."
        _use_reserve()
        entry["error"] = said
        # The way back does without, and makes room.
        with contextlib.suppress(OSError):
            _write(journal_file(), entry)
        if phase in SERVED:
            return (
                f"{said}\nSynapse runs on {entry['new']}, and users are served. The same command goes on from here;"
                " salt-call synapse_postgres.rollback goes back all the same."
            )
        if entry["final"]:
            return (
                f"{said}\nWith method link there is no way back once {entry['new']} was started. Synapse stays locked, and"
                " users get 503. When the cause is mended, the same command goes on from here; else restore a backup."
            )
        try:
            return f"{said}\nUndone: {_go_back(entry)}."
        except Exception as worse:
            return (
                f"{said}\nTo go back failed as well: {worse}\nNo data of {entry['old']} are lost. When the cause is mended,"
                " the same command puts it right."
            )


def _cause(err):
    # What a signal makes says nothing, or the number that salt-call would exit with.
    return str(err) if str(err).strip("0123456789") else type(err).__name__


def _go_back(entry):
    """From any phase before users are served by the new cluster, to the old one and a healthy Synapse."""
    with _undisturbed():
        __salt__["synapse_migration.end_tools"]()
        _use_reserve()
        reached = entry.setdefault("back_from", _phase(entry))
        touched = reached not in ("preflight", "stop")
        if reached in ("upgrade", "verify") and _is_ours():
            # Before anything is written, as it may be what filled the disk. Nobody ever wrote to it.
            _drop_new(entry)
        with contextlib.suppress(OSError):
            _enter(entry, "back")
        if touched:
            __salt__["synapse_process.stop"](HOLDER, f"PostgreSQL goes back to {entry['old']}", kill=True, force=True)
        undone = []
        if entry["made"]:
            _drop_new(entry)
            undone.append(f"the cluster {entry['new']} is removed")
        if touched:
            __salt__["synapse_cluster.make_usable"](entry["old"])
            _serve(entry, "old")
            undone.append(f"PostgreSQL {entry['old']} serves, untouched")
        if reached != "preflight" and (_is_ours() or not __salt__["synapse_maintenance.holder"]()):
            names = __salt__["synapse_process.start"](HOLDER, force=True)
            undone.append(f"all {len(names)} processes of Synapse are healthy")
        _end(entry, "rolled back")
        _try_to_remove_probes(entry)
        return "; ".join(undone) or "nothing was done yet"


def _drop_new(entry):
    # First the record: no run could ask a cluster that is gone who is connected to it.
    write_record(entry["old"])
    __salt__["synapse_cluster.drop"](entry["new"], entry["data"])


def _is_ours():
    return (__salt__["synapse_maintenance.holder"]() or {}).get("holder") == HOLDER


def _put_right():
    """Bring a run to its end that was cut off. Return whether anything changed."""
    entry = journal()
    if entry is None or entry["outcome"]:
        return False
    phase = _phase(entry)
    _tell(f"a run was cut off in the phase {phase}")
    if entry.get("returning"):
        _return(entry)
    elif phase in SERVED or (entry["final"] and phase != "back"):
        __salt__["synapse_migration.end_tools"]()
        _go_through(entry, phase)
    elif phase in ("start", "check") and _is_open():
        # Somebody has let users in by hand: what they wrote since is in the new cluster alone.
        _go_through(entry, "open")
    else:
        entry["error"] = f"The upgrade was cut off in the phase {phase}"
        _go_back(entry)
    return True


def _is_open():
    return not __salt__["synapse_maintenance.holder"]() and not __salt__["synapse_maintenance.closed"]()


def go_back(confirm=False, kill=False, grace=None, gated=False):
    """
    Go back to the cluster of before the last upgrade: see ``synapse_postgres.rollback``.

    CLI Example:

    .. code-block:: bash

        salt-call synapse_upgrade.go_back
    """
    with _alone():
        entry = journal() or {"outcome": "none"}
        if not entry["outcome"] and _phase(entry) in SERVED:
            # Users are served; what is left to do must not keep anybody from going back.
            _open(entry)
            _end(entry, "done")
        elif _put_right():
            serves = __salt__["synapse_postgres.cluster"]()
            return {
                "serves": serves,
                "lost": "Nothing: the last run was cut off, and is put right now",
                "changed": True,
            }
        entry = _served()
        if not entry:
            raise CommandExecutionError("There is no upgrade to go back from")
        if entry["final"]:
            raise CommandExecutionError(
                f"There is no way back from method link: {entry['old']} shares its files with {entry['new']}"
            )
        if entry["old"] not in __salt__["synapse_cluster.clusters"]():
            raise CommandExecutionError(f"There is no way back: the cluster {entry['old']} was discarded")
        lost = f"All that was written since {entry['served_since']} stays behind in {entry['new']}"
        if not confirm:
            return {"would_serve": entry["old"], "lost": f"{lost}. To do it: confirm=True", "changed": False}
        ungated = _fault_of_gate(gated)
        if ungated:
            raise CommandExecutionError(ungated)
        # Those that were removed from the new cluster are still in the old one.
        entry.update(outcome=None, returning=True, kill=kill, grace=grace, probes=entry["met_on_old"])
        _return(entry)
        return {"serves": entry["old"], "lost": f"{lost}, which is stopped and kept", "changed": True}


def _return(entry):
    """The way back on request, as often as needed until it came to its end."""
    try:
        _enter(entry, "return")
        reason = f"PostgreSQL goes back to {entry['old']}"
        __salt__["synapse_process.stop"](HOLDER, reason, entry["kill"], entry["grace"], force=True)
        _serve(entry, "old")
        _start(entry)
        _check(entry)
        _leave_behind(entry["new"], entry["data"])
        entry["returning"] = False
        _end(entry, "returned")
    except BaseException as err:
        with _undisturbed():
            said = f"To go back to {entry['old']} failed: {_cause(err)}"
            entry.update(returning=False, error=said)
            _serve_again(entry)
            _end(entry, "done")
        raise CommandExecutionError(f"{said}\nSynapse runs on {entry['new']} as before.") from err
    # From here on users write to the old one, and nothing leads back to the new one.
    __salt__["synapse_maintenance.open"]()
    _try_to_remove_probes(entry)


def _serve_again(entry):
    if __salt__["synapse_postgres.cluster"]() != entry["new"] or _is_ours():
        __salt__["synapse_process.stop"](HOLDER, f"PostgreSQL stays on {entry['new']}", kill=True, force=True)
        _serve(entry, "new")
        __salt__["synapse_process.start"](HOLDER, force=True)


def discard(cluster):
    """
    Remove a cluster that an upgrade left behind: see ``synapse_postgres.discard_old``.

    CLI Example:

    .. code-block:: bash

        salt-call synapse_upgrade.discard 15/main
    """
    with _alone():
        left = _read(_left_file()) or {}
        if cluster == __salt__["synapse_postgres.cluster"]():
            raise CommandExecutionError(f"{cluster} holds Synapse's data")
        if _is_cut_off(journal()):
            raise CommandExecutionError("An upgrade did not come to its end: salt-call synapse_postgres.upgrade first")
        if cluster not in left:
            raise CommandExecutionError(f"{cluster} is no cluster that an upgrade left behind")
        was_there = __salt__["synapse_cluster.drop"](cluster, left.pop(cluster))
        _write(_left_file(), left)
        return was_there


def _is_cut_off(entry):
    """Whether a run that nobody is at any more left something that nobody else may touch."""
    # In the after-care users are served, and it can be done at any time.
    return bool(entry) and not entry["outcome"] and _phase(entry) != "after-care"


def fault():
    """
    Return a sentence that says which work on PostgreSQL keeps everything else from changing; None if nothing does.

    CLI Example:

    .. code-block:: bash

        salt-call synapse_upgrade.fault
    """
    entry = journal()
    if entry is None or entry["outcome"] or not (running() or _is_cut_off(entry)):
        return None
    if running():
        return f"PostgreSQL is being moved from {entry['old']} to {entry['new']}: see salt-call synapse_postgres.status"
    return (
        f"A move of PostgreSQL from {entry['old']} to {entry['new']} was cut off in the phase {_phase(entry)}."
        f" To put it right: salt-call synapse_postgres.upgrade version={entry['new'].split('/')[0]}"
    )


def status():
    """
    Return the last upgrade as text for people: see ``synapse_postgres.status``.

    CLI Example:

    .. code-block:: bash

        salt-call synapse_upgrade.status
    """
    entry = journal()
    if entry is None:
        return "There never was an upgrade"
    state = entry["outcome"] or ("at work" if running() else "cut off")
    lines = [f"{entry['old']} to {entry['new']}, method {entry['method'] or '(not chosen yet)'}: {state}"]
    width = max(len(phase["name"]) for phase in [{"name": ""}, *entry["phases"]])
    lines += [
        f"  {phase['name'].ljust(width)}  {phase['began'][:19]}  {_seconds(phase):7.1f} s{'' if phase['ended'] else ' ...'}"
        for phase in entry["phases"]
    ]
    # It may be half written.
    with contextlib.suppress(OSError, ValueError):
        lines.append(f"  {_of(json.loads(pathlib.Path(_progress_file()).read_text(encoding='utf-8')))}")
    if entry["error"]:
        lines.append(entry["error"])
    left = _read(_left_file()) or {}
    lines += [f"Left behind: {name}, in {data}" for name, data in left.items() if os.path.isdir(data)]
    return "\n".join(lines)


# --- Phases ---------------------------------------------------------------------------------------


def _preflight(entry):
    """All that can be done while users are served, and all that can be found out."""
    faults = _faults_of_synapse(entry["gated"])
    if faults:
        raise CommandExecutionError("; ".join(faults))
    old, new = entry["old"], entry["new"]
    version = int(new.split("/")[0])
    about = __salt__["synapse_cluster.about"](old)
    if version <= about["version"]:
        raise CommandExecutionError(f"Synapse's data are on {old}: PostgreSQL {version} is no newer major version")
    if new in __salt__["synapse_cluster.clusters"]():
        raise CommandExecutionError(
            f"The cluster {new} is there already. If nobody needs what is in it: salt-call synapse_postgres.discard_old"
            f" {new}, where it is from an upgrade, else pg_dropcluster --stop {new.replace('/', ' ')}"
        )
    _tell(f"preflight: PostgreSQL {version} is installed, if it is not")
    __salt__["synapse_cluster.install"](version)
    data = __salt__["synapse_cluster.place"](about, version)
    if os.path.isdir(data) and os.listdir(data):
        raise CommandExecutionError(f"The directory {data}, which {new} needs, is not empty")
    if entry["method"] is None:
        clones = __salt__["synapse_migration.can_clone"](about["data"], data)
        entry["method"] = "clone" if clones else "copy"
    faults = _faults_of_cluster(about, version, data, entry["method"]) or lagging_sequences(_asking(old))
    if faults:
        raise CommandExecutionError("; ".join(faults))
    spare, parking = __salt__["synapse_cluster.free_ports"](2)
    kept = {key: about[key] for key in ("version", "size", "port", "data")}
    entry.update(about=kept, data=data, spare=spare, parking=parking, made=True)
    _write(journal_file(), entry)
    entry["left_behind"] = __salt__["synapse_cluster.create"](new, about, spare)
    _tell("preflight: pg_upgrade --check")
    __salt__["synapse_migration.check"](old, new, entry["method"], entry["jobs"])
    if entry["method"] == "dump":
        # To load a dump it has to run.
        __salt__["synapse_cluster.start"](new)
    _meet(entry)
    entry["met_on_old"] = list(entry["probes"])
    # What is not on disk yet, its stop would have to write.
    __salt__["synapse_cluster.query"](old, "checkpoint")


def _meet(entry):
    """Have a test user, who remains known until it is removed."""
    name = f"synapse-formula-{secrets.token_hex(6)}"
    server_name = __salt__["synapse_pillar.settings"]()["server_name"]
    # Before it is registered: it is an administrator.
    entry["probes"].append({"user": f"@{name}:{server_name}", "room": None})
    _write(journal_file(), entry)
    entry["probes"][-1] = __salt__["synapse_probe.begin"](name)
    _write(journal_file(), entry)


def _fault_of_gate(gated):
    """Without nginx of the formula's nobody here keeps users out until all is checked: what they wrote would be lost."""
    if gated or __salt__["synapse_pillar.settings"]()["nginx"]["managed"]:
        return None
    return (
        "synapse:nginx:managed: false: users would be let in before anything is checked, and what they wrote would be lost"
        " if it fails. Have your own proxy keep them out until this has ended, and say so: gated=True"
    )


def _others_at_work():
    """What else might start or stop things, or write, in the middle."""
    states = [job["fun"] for job in __salt__["saltutil.is_running"]("state.*")]
    if states:
        yield f"Salt is at work here, let it end first: {', '.join(states)}"
    restart = __salt__["synapse_rolling.fault"]()
    if restart:
        yield restart
    restore = __salt__["synapse_backup.fault"]()
    if restore:
        yield restore
    elif __salt__["synapse_backup.busy"]():
        yield "A backup, its verification or a restore is running, let it end first"


def _faults_of_synapse(gated):
    """What keeps Synapse from being stopped and started again."""
    settings = __salt__["synapse_pillar.settings"]()
    ungated = _fault_of_gate(gated)
    faults = [*([ungated] if ungated else []), *_others_at_work()]
    held = __salt__["synapse_maintenance.fault"]()
    if held:
        faults.append(held)
    image = __salt__["synapse_image.wanted"](settings["image"])
    if not image["id"]:
        faults.append(f"The image {image['reference']} is not there: salt-call state.apply synapse brings it")
    counted = __salt__["synapse_process.census"](memory=False)
    planned = [process for process in counted["processes"] if process["type"]]
    sick = [process["name"] for process in planned if not process["healthy"]]
    if sick and not held:
        faults.append(f"Not healthy, and an upgrade mends nothing: {', '.join(sick)}")
    return faults


def _faults_of_cluster(about, version, data, method):
    """What would make the upgrade fail, or lose something."""
    faults = []
    settings = __salt__["synapse_pillar.settings"]()
    synapse = settings["postgres"]["database"]
    sql = "select pg_encoding_to_char(encoding) as encoding, datcollate, datctype from pg_database where datname = '{}'"
    rows = __salt__["synapse_cluster.query"](f"{about['version']}/main", sql.format(synapse))
    if not rows:
        faults.append(f"The database {synapse} is not in {about['version']}/main")
    elif list(rows[0].values()) != ["UTF8", "C", "C"]:
        faults.append(f"The database {synapse} is not UTF8 with C collation, as Synapse wants it: {rows[0]}")
    if about["slots"]:
        faults.append(f"These replication slots would be lost, drop them first: {', '.join(about['slots'])}")
    missing = __salt__["synapse_migration.missing_extensions"](version, about["extensions"])
    if missing:
        listed = ", ".join(missing)
        faults.append(f"PostgreSQL {version} has not these extensions, install their packages first: {listed}")
    strange = __salt__["synapse_migration.strange_options"](version, about["column_options"])
    if strange:
        faults.append(
            f"This release of PostgreSQL {version} does not know what the old one keeps with columns ({', '.join(strange)}):"
            " install one that is as new as the old one's minor release"
        )
    if method == "link" and not _same_file_system(about["data"], data):
        faults.append(f"method link needs {about['data']} and {data} on one file system")
    if method == "clone" and not __salt__["synapse_migration.can_clone"](about["data"], data):
        faults.append(f"method clone: there are no reflinks from {about['data']} to {data}; copy does without")
    return [*faults, *_faults_of_space(about, data, method)]


def _same_file_system(one, other):
    return os.stat(one).st_dev == os.stat(__salt__["synapse_cluster.existing"](other)).st_dev


def _faults_of_space(about, data, method):
    """Each file system has what the method needs on it. A dump goes where the cluster is, tablespaces or not."""
    sizes = {data: about["size"] - sum(about["tablespaces"].values()), **about["tablespaces"]}
    share, margin = __salt__["synapse_migration.methods"]()[method]["space"], __salt__["synapse_migration.margin"]()
    needs = {}
    for path, size in sizes.items():
        directory = __salt__["synapse_cluster.existing"](path)
        file_system = os.stat(directory).st_dev
        _, need = needs.get(file_system, (directory, margin))
        needs[file_system] = (directory, need + int(size * share))
    for directory, need in needs.values():
        free = shutil.disk_usage(directory).free
        if free < need:
            yield f"The file system of {directory} has {free >> 20} MiB free, method {method} needs {need >> 20}"


def _stop(entry):
    __salt__["synapse_process.stop"](
        HOLDER, f"PostgreSQL moves from {entry['old']} to {entry['new']}", entry["kill"], entry["grace"], force=True
    )


def _upgrade(entry):
    old = entry["old"]
    others = __salt__["synapse_cluster.query"](old, OTHERS)
    entry["others"] = [f"{row['program'] or 'a nameless program'} on {row['datname']}" for row in others]
    if others:
        _tell(f"upgrade: these are cut off until the switch: {', '.join(entry['others'])}")
        # Where nobody finds it who would go on writing to it.
        __salt__["synapse_cluster.stop"](old)
        __salt__["synapse_cluster.place_at"](old, entry["parking"], "manual")
        __salt__["synapse_cluster.start"](old)
    if entry["method"] == "dump":
        # It runs all the while, and who comes now would write what stays behind.
        __salt__["synapse_cluster.set_read_only"](old, True)
    _write(_contents_file(), __salt__["synapse_migration.contents"](old, entry["method"]))
    if entry["method"] != "dump":
        __salt__["synapse_cluster.stop"](old)
        # Nor does anybody start it, in the middle of the copy.
        __salt__["synapse_cluster.place_at"](old, entry["parking"], "disabled")
    __salt__["synapse_migration.move"](old, entry["new"], entry["method"], entry["jobs"], _progress(entry))
    __salt__["synapse_cluster.stop"](old, entry["new"])
    __salt__["synapse_cluster.place_at"](old, entry["parking"], "disabled")


def _verify(entry):
    if entry["method"] == "link":
        # From its start on both share files, and only the new one may use them.
        entry["final"] = True
        _write(journal_file(), entry)
    # Already where it shall serve, which spares a restart; but not by itself, and not if others would find it there.
    port = entry["spare"] if entry["others"] else entry["about"]["port"]
    __salt__["synapse_cluster.place_at"](entry["new"], port, "manual")
    __salt__["synapse_cluster.start"](entry["new"])
    faults = __salt__["synapse_migration.differences"](
        _read(_contents_file()), __salt__["synapse_migration.contents"](entry["new"], entry["method"])
    )
    faults += lagging_sequences(_asking(entry["new"]))
    if faults:
        more = f"; and {len(faults) - 10} more" if len(faults) > 10 else ""
        raise CommandExecutionError(f"The new cluster is not as the old one was: {'; '.join(faults[:10])}{more}")


def _asking(cluster):
    """What asks Synapse's database in a cluster."""
    database = __salt__["synapse_pillar.settings"]()["postgres"]["database"]
    return functools.partial(__salt__["synapse_cluster.query"], cluster, database=database)


def lagging_sequences(ask):
    """
    Return the sequences of Synapse's database that would give a number to two things, a sentence each.

    ask
        A function that returns the rows of a query in the database, a dict for each.
    """
    known = __salt__["synapse_pillar.knowledge"]()["sequences"]
    # In this order, as Synapse may be at work, and a sequence only grows.
    positions = [(known.get(row["name"]), row["name"], int(row["position"])) for row in ask(POSITIONS)]
    sequences = {row["name"]: int(row["value"]) for row in ask(SEQUENCES)}
    return [
        f"the sequence {sequence} is at {sequences[sequence]}, but the stream {stream} at {position}"
        for sequence, stream, position in positions
        if sequence in sequences and sequences[sequence] < position
    ]


def _serve(entry, serving):
    """One cluster is at Synapse's port, the other is down and can't start by accident. What is so already stays so."""
    cluster, other = (entry["old"], entry["new"]) if serving == "old" else (entry["new"], entry["old"])
    port = entry["about"]["port"]
    clusters = __salt__["synapse_cluster.clusters"]()
    if other in clusters:
        __salt__["synapse_cluster.stop"](other)
        __salt__["synapse_cluster.place_at"](other, entry["parking"], "disabled")
    if clusters[cluster]["port"] != port:
        __salt__["synapse_cluster.stop"](cluster)
    __salt__["synapse_cluster.place_at"](cluster, port, "auto")
    __salt__["synapse_cluster.start"](cluster)
    if serving == "old":
        # As a dump has left it.
        __salt__["synapse_cluster.set_read_only"](cluster, False)
    write_record(cluster)


def _switch(entry):
    _serve(entry, "new")


def _start(entry):
    __salt__["synapse_process.start"](HOLDER, opened=False, force=True)


def _check(entry):
    if not __salt__["synapse_probe.has_begun"]():
        _meet(entry)
    __salt__["synapse_probe.attempt"]()


def _open(entry):
    __salt__["synapse_maintenance.open"]()
    entry["served_since"] = entry.get("served_since") or _now()
    _leave_behind(entry["old"], entry["about"]["data"])


def _care(entry):
    entry["care"] = __salt__["synapse_migration.care"](entry["new"], entry["method"])
    _remove_probes(entry)


def _try_to_remove_probes(entry):
    """After all else is done: what can't be removed now is so by the next run."""
    try:
        _remove_probes(entry)
    except (CommandExecutionError, OSError) as err:
        _tell(f"the test users {', '.join(probe['user'] for probe in entry['probes'])} are still there: {err}")


def _remove_probes(entry):
    """Remove the test users. Synapse may answer 500 where its background updates are at work, on a database that was just made."""
    if not entry["probes"]:
        return
    if not __salt__["synapse_probe.has_begun"]():
        _meet(entry)
    __salt__["synapse_runs.persist"](
        lambda: __salt__["synapse_probe.end"](entry["probes"]), "answered a test user with 500"
    )
    entry["probes"] = []
    _write(journal_file(), entry)


PHASES = {
    "preflight": _preflight,
    "stop": _stop,
    "upgrade": _upgrade,
    "verify": _verify,
    "switch": _switch,
    "start": _start,
    "check": _check,
    "open": _open,
    "after-care": _care,
}
# From here on users are served by the new cluster.
SERVED = ("open", "after-care")
