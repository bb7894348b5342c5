"""
What holds for every pillar: none makes the validation or the plan crash; and of none that is accepted, however often it
is changed, come two processes with one name or one socket, or a worker that is called anew.
"""

import collections
import copy
import json
import re
import string

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from salt.exceptions import CommandExecutionError

bounded = settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.too_slow])

words = st.text(string.ascii_lowercase + string.digits + "-_:/. %*\n\0é٣", max_size=12)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | words | st.dates()
# YAML has keys that JSON hasn't.
anything = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words | st.integers() | st.dates(), inner, max_size=3),
    max_leaves=8,
)

PILLAR = {
    "server_name": "example.org",
    "public_base_url": "https://matrix.example.org",
    "user": {"name": "synapse", "group": "synapse", "uid": 991, "gid": 991},
    "directories": {"config": "/nonexistent/config", "data": "/nonexistent/data", "run": "/run/matrix-synapse"},
    "docker": {"managed": True, "network": {"name": "synapse", "subnet": "172.29.88.0/24"}},
    "image": {
        "version": "v1.163.2",
        "source": "build",
        "build": {"base": "debootstrap", "extras": ["redis"]},
        "build_arguments": {"A": "b"},
        "customize": {"modules": {"ldap3": True}, "dockerfile": "RUN true"},
    },
    "main": {"memory": "4G", "cpus": 2, "log_level": "INFO", "arguments": ["--ipc=private"]},
    "workers": {
        "preset": "one-of-each",
        "list": [
            {"type": "generic", "count": 2, "config": {"a": {"b": [1]}}, "memory": "1G"},
            {"type": "stream-writer", "stream": "events", "cpus": 0.5, "arguments": ["--ipc=private"]},
            {"type": "pusher", "log_level": "DEBUG"},
        ],
    },
    "process": {"running": True, "stop_grace": 30, "memory": "1G", "arguments": []},
    "config": {
        "instance_map": {"far": {"host": "b", "port": 1}},
        "stream_writers": {"events": ["far"]},
        "pusher_instances": ["far"],
        "run_background_tasks_on": "far",
        "outbound_federation_restricted_to": ["far"],
    },
    "log": {"loggers": {"synapse": "INFO"}},
    "secrets": {"form": "x" * 16},
    "signing_key": {"current": f"ed25519 a_1 {'A' * 43}", "old": {"ed25519:a_0": {"key": "A" * 43, "expired_ts": 1}}},
    "max_upload_size": "50M",
    "postgres": {
        "managed": False,
        "host": "db",
        "password": "p",
        "options": {"max_connections": 400},
        "connections": {"max": 10},
    },
    "redis": {"managed": False, "host": "::1", "port": 6379},
    "nginx": {
        "client": {"listen": ["127.0.0.1:8008", "[::1]:8008"], "tls": {"certificate": "/a", "key": "/b"}},
        "federation": {"enabled": True, "listen": [8448]},
        "admin_allow": ["10.0.0.0/8"],
        "well_known": {"client": {"a": {}}, "server": None},
    },
    "appservices": {
        "bridge": {
            "registration": {
                "url": None,
                "sender_localpart": "bot",
                "namespaces": {"users": [{"exclusive": True, "regex": "@b_.*"}]},
                "as_token": "y" * 16,
            }
        }
    },
}


def paths(value, path=()):
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from paths(item, (*path, key))


PATHS = [path for path in paths(PILLAR) if path]


@st.composite
def nearly_valid_pillars(draw):
    """A good pillar with a few values replaced, left out, doubled or put under another name."""
    pillar = copy.deepcopy(PILLAR)
    for path in draw(st.lists(st.sampled_from(PATHS), max_size=3)):
        parent = pillar
        for key in path[:-1]:
            parent = parent[key] if isinstance(parent, dict) and key in parent else None
            if isinstance(parent, list):
                break
        if isinstance(parent, list) and parent:
            parent[draw(st.integers(0, len(parent) - 1))] = draw(anything)
        elif isinstance(parent, dict) and path[-1] in parent:
            value = parent.pop(path[-1])
            change = draw(st.sampled_from(["replace", "remove", "rename", "wrap", "repeat"]))
            if change == "replace":
                parent[path[-1]] = draw(anything)
            elif change == "rename":
                parent[draw(words | st.integers())] = value
            elif change == "wrap":
                parent[path[-1]] = [value]
            elif change == "repeat":
                parent[path[-1]] = value * 2 if isinstance(value, (list, str)) else [value, value]
    return pillar


def is_told_or_planned(formula, pillar, **beside):
    found = formula.run(pillar, **beside).synapse_workers.validate()
    assert all(isinstance(line, str) and line for line in found)
    if found:
        with pytest.raises(CommandExecutionError):
            formula.synapse_workers.plan()
        return None
    planned = formula.synapse_workers.plan()
    json.dumps(planned, default=str)
    assert formula.synapse_workers.diagram()
    formula.synapse_config.files()
    return planned


def test_the_pillar_that_is_changed_here_is_good(formula):
    assert len(is_told_or_planned(formula, PILLAR)["processes"]) == 21


@bounded
@given(pillar=anything | st.dictionaries(st.sampled_from(sorted(PILLAR)), anything))
def test_no_pillar_makes_it_crash(formula, pillar):
    is_told_or_planned(formula, pillar)


@bounded
@given(pillar=nearly_valid_pillars())
def test_no_nearly_valid_pillar_makes_it_crash(formula, pillar):
    is_told_or_planned(formula, pillar)


@bounded
@given(entries=anything, where=st.sampled_from(["beside", "inside", "workers", "list"]))
def test_no_list_of_the_playbooks_makes_it_crash(formula, entries, where):
    key = "matrix_synapse_workers_enabled_list"
    pillar = {"server_name": "example.org", "directories": PILLAR["directories"]}
    pillar |= {"inside": {key: entries}, "workers": {"workers": entries}, "list": {"workers": {"list": entries}}}.get(
        where, {}
    )
    is_told_or_planned(formula, pillar, **({key: entries} if where == "beside" else {}))


STREAMS = ["events", "receipts", "device_lists", "thread_subscriptions", "quarantined_media_changes"]
SINGLE_STREAMS = ["typing", "to_device", "account_data", "presence", "push_rules"]

options = st.fixed_dictionaries(
    {},
    optional={
        "count": st.integers(0, 3),
        "memory": st.sampled_from(["512M", "1G", None]),
        "log_level": st.sampled_from(["INFO", "DEBUG"]),
        "config": st.sampled_from([{}, {"a": 1}, {"a": {"b": []}}]),
    },
)
many = st.builds(
    lambda entry, more: {**entry, **more},
    st.sampled_from(
        [{"type": kind} for kind in ("generic", "sync", "room", "pusher", "federation-sender", "media-repository")]
        + [{"type": "stream-writer", "stream": stream} for stream in STREAMS]
    ),
    options,
)
one = st.sampled_from(
    [{"type": kind} for kind in ("appservice", "user-directory", "background")]
    + [{"type": "stream-writer", "stream": stream} for stream in SINGLE_STREAMS]
)
worker_lists = st.builds(
    lambda first, second, order: order.sample(first + second, len(first) + len(second)),
    st.lists(many, max_size=5),
    st.lists(one, max_size=3, unique_by=lambda entry: (entry["type"], entry.get("stream"))),
    st.randoms(use_true_random=False),
)
pillars = st.builds(
    lambda listed, preset, process, metrics: {
        "server_name": "example.org",
        "workers": {"list": listed, "preset": preset},
        "process": process,
        "metrics": metrics,
    },
    worker_lists,
    st.sampled_from([None, None, "little-federation-helper"]),
    st.sampled_from([{}, {"memory": "2G"}, {"log_level": "ERROR"}]),
    st.booleans(),
)


def plan(formula, pillar, roster):
    formula.run({**pillar, "directories": PILLAR["directories"]})
    known = formula.synapse_pillar.knowledge()
    arguments = formula.synapse_pillar.settings(), known["workers"], known["routes"], roster
    assert formula.synapse_workers.faults(arguments[0], known["workers"], roster) == []
    return formula.synapse_workers.build(*arguments)


def wanted(formula, pillar):
    """How many workers of which kind a pillar asks for; a kind is what stands in an entry."""
    known = formula.synapse_pillar.knowledge()["workers"]["presets"]
    found = collections.Counter()
    for entry in known.get(pillar["workers"]["preset"], []) + pillar["workers"]["list"]:
        kind = {key: value for key, value in entry.items() if key != "count" and (key, value) != ("memory", None)}
        found[json.dumps(kind, sort_keys=True)] += entry.get("count", 1)
    return found


def identities(planned):
    """The names of a plan's workers, by what the roster knows them by."""
    found = collections.defaultdict(set)
    for name, known in planned["roster"]["workers"].items():
        found[known["type"], known["stream"], known["options"]].add(name)
    return found


def by_type(names_by_identity):
    found = collections.defaultdict(set)
    for (kind, stream, _), names in names_by_identity.items():
        found[kind, stream] |= names
    return found


@settings(bounded, max_examples=60)
@given(history=st.lists(pillars, min_size=1, max_size=4))
def test_names_are_stable_and_nothing_collides_through_all_changes(formula, history):
    roster, before, most = {}, {}, 0
    for pillar in history:
        planned = plan(formula, pillar, roster)
        roster = json.loads(json.dumps(planned["roster"]))
        assert plan(formula, pillar, roster) == planned
        names_are_apart(planned)
        count = sum(wanted(formula, pillar).values())
        most = max(most, count)
        assert len(planned["processes"]) == count + 1
        assert all(process["index"] < most for process in planned["processes"][1:])
        assert sorted(map(len, identities(planned).values())) == sorted(filter(None, wanted(formula, pillar).values()))
        after = identities(planned)
        for group, later in ((before, after), (by_type(before), by_type(after))):
            for key, names in group.items():
                assert len(names & later.get(key, set())) == min(len(names), len(later.get(key, set())))
        before = after


def names_are_apart(planned):
    processes = planned["processes"]
    sockets = [path for process in processes for path in (process["private_socket"], process["public_socket"]) if path]
    listeners = [
        listener
        for process in processes
        for listener in process["config"].get("listeners", process["config"].get("worker_listeners"))
    ]
    files = [process["config_files"][-1] for process in processes]
    for distinct in ([process["name"] for process in processes], sockets, files):
        assert len(set(distinct)) == len(distinct)
    assert sorted(listener["path"] for listener in listeners) == sorted(sockets)
    assert not any("port" in listener for listener in listeners)
    assert all(re.fullmatch(r"matrix-synapse(-worker-\d+-[a-z-]+)?", process["name"]) for process in processes)


@bounded
@given(pillar=pillars)
def test_every_name_in_the_shared_settings_is_borne_by_a_process(formula, pillar):
    planned = plan(formula, pillar, {})
    shared = dict(planned["shared"])
    names = {process["name"] for process in planned["processes"][1:]}
    replicating = {
        process["private_socket"]
        for process in planned["processes"]
        if any(
            "replication" in listener["resources"][0]["names"]
            for listener in process["config"].get("listeners", process["config"].get("worker_listeners"))
        )
    }
    instances = shared.pop("instance_map")
    assert instances.keys() - names == {"main"}
    assert {instance["path"] for instance in instances.values()} == replicating
    writers = shared.pop("stream_writers")
    assert {name for borne in writers.values() for name in borne} <= instances.keys()
    assert all(len(borne) == 1 or stream in STREAMS for stream, borne in writers.items())
    assert shared.pop("enable_media_repo", False) is False
    for value in shared.values():
        assert {value} <= names if isinstance(value, str) else set(value) <= names


@bounded
@given(pillar=pillars)
def test_another_generic_worker_changes_nothing_for_the_others(formula, pillar):
    before = plan(formula, pillar, {})
    listed = [*pillar["workers"]["list"], {"type": "generic", "arguments": ["--ipc=private"]}]
    after = plan(formula, {**pillar, "workers": {**pillar["workers"], "list": listed}}, before["roster"])
    processes = {process["name"]: process for process in after["processes"]}
    assert [processes[process["name"]] for process in before["processes"]] == before["processes"]
    assert len(processes) == len(before["processes"]) + 1
    assert after["shared"] == before["shared"]
