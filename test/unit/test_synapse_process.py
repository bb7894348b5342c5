"""
Units: what stands in them, when a process counts as changed, and what a run would do about it.
"""

import http.server
import json
import os
import re
import socketserver
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st
from salt.exceptions import CommandExecutionError

GENERIC = {"type": "generic"}
PUSHER = {"type": "pusher"}
MAIN, FIRST, SECOND = NAMES = [
    "matrix-synapse",
    "matrix-synapse-worker-0-generic",
    "matrix-synapse-worker-1-pusher",
]
IMAGE = {"reference": "matrixdotorg/synapse:v1.163.2", "id": "sha256:0123", "pycache": None}
SECRET = "hush-0123456789abcdef"


@pytest.fixture
def process(minion, tmp_path, monkeypatch):
    minion.salt |= {
        "file.user_to_uid": lambda name: 991,
        "file.group_to_gid": lambda name: 992,
        "synapse_image.wanted": lambda image: IMAGE,
    }
    monkeypatch.setattr(minion.synapse_process, "UNITS", tmp_path / "units")
    return minion.synapse_process


def units(minion, settings=None):
    settings = {"workers:list": [GENERIC, PUSHER], **(settings or {})}
    return minion.run(minion.good_pillar(settings)).synapse_process.units()


def directives(text):
    """The directives of a unit, a list of values for each name."""
    found = {}
    for line in text.splitlines():
        if line and line[0] not in "[#":
            name, _, value = line.partition("=")
            found.setdefault(name, []).append(value)
    return found


def split(line):
    """The words of a command line as systemd reads it: systemd.service(5) and systemd.syntax(7)."""
    words, word, quote, signs = [], None, None, iter(line)
    for sign in signs:
        if sign == "\\":
            word = (word or "") + next(signs)
        elif quote:
            word, quote = (word, None) if sign == quote else (word + sign, quote)
        elif sign in "\"'":
            word, quote = word or "", sign
        elif sign in " \t":
            words, word = words + [word] * (word is not None), None
        else:
            word = (word or "") + sign
    assert quote is None
    assert all("%" not in found.replace("%%", "") and "$" not in found.replace("$$", "") for found in words)
    return [found.replace("%%", "%").replace("$$", "$") for found in words + [word] * (word is not None)]


def create(text):
    """The words of `docker create` in a unit, after the program, the container's name and its inputs' digest."""
    return create_container(text)[3:]


def create_container(text):
    (line,) = (line for line in directives(text)["ExecStartPre"] if "create-container" in line)
    return split(line)


# Command lines


@pytest.mark.parametrize(
    "words",
    [
        ["--env=A=b c"],
        ["--env=A='b'", '--env=B="c"'],
        ["--env=A=100%", "--env=B=%h%%"],
        ["--env=A=$HOME", "--env=B=${HOME}", "--env=C=$$"],
        ["--env=A=\\n\\", "\\", "a\\ b"],
        ["--health-cmd=curl --fail x", ";", "a;b", "&&", "|", ">", "*", "#"],
    ],
)
def test_systemd_reads_the_words_that_were_meant(process, words):
    assert split(process._quote(words)) == words


@given(words=st.lists(st.text(st.characters(exclude_categories=["C", "Zl", "Zp"]), min_size=1)))
def test_systemd_reads_any_words_that_were_meant(formula, words):
    assert split(formula.synapse_process._quote(words)) == words


def test_arguments_of_the_pillar_arrive_as_they_stand_there(minion, process):
    arguments = ["--env=A=b c", "--env=D=$HOME 100% \"quoted\" 'too' \\n", "--ulimit=nofile=65536"]
    text = units(minion, {"main:arguments": arguments})[MAIN]["text"]
    words = create(text)
    at = words.index(arguments[0])
    assert words[at : at + 3] == arguments
    assert create(units(minion)[FIRST]["text"]).count("--ulimit=nofile=65536") == 0


# What stands in a unit


def test_a_container_runs_its_process_from_the_image_by_id(minion, process):
    config = f"{minion.directory}/config"
    found = {name: create(unit["text"]) for name, unit in units(minion).items()}
    assert list(found) == NAMES
    assert found[MAIN][-6:] == ["sha256:0123", "run", "-m", "synapse.app.homeserver", "-c", f"{config}/homeserver.yaml"]
    assert found[FIRST][-8:] == [
        *("sha256:0123", "run", "-m", "synapse.app.generic_worker"),
        *("-c", f"{config}/homeserver.yaml", "-c", f"{config}/workers/{FIRST}.yaml"),
    ]


def test_a_container_may_do_as_little_as_possible(minion, process):
    for unit in units(minion).values():
        words = create(unit["text"])
        assert {
            "--init",
            "--read-only",
            "--user=991:992",
            "--cap-drop=ALL",
            "--security-opt=no-new-privileges",
            "--pull=never",
            "--tmpfs=/tmp:rw,nosuid,nodev,mode=1777",
        } <= set(words)
        assert not [word for word in words if re.match(r"--(privileged|cap-add|restart|rm|publish|env=[UG]ID)", word)]
        writable = [word for word in words if word.startswith("--mount") and not word.endswith(",readonly")]
        assert sorted(re.search("target=(.*)", word)[1] for word in writable) == sorted(
            [f"{minion.directory}/data/media", "/run/matrix-synapse"]
        )


def test_limits_are_those_of_the_pillar_and_none_by_default(minion, process):
    def limits(settings):
        words = {name: create(unit["text"]) for name, unit in units(minion, settings).items()}
        return [[word for word in found if re.match("--(memory|cpus)=", word)] for found in words.values()]

    assert limits({}) == [[], [], []]
    assert limits({"process:cpus": 2, "workers:list": [{**GENERIC, "memory": "1G"}, {**PUSHER, "cpus": None}]}) == [
        ["--cpus=2"],
        ["--memory=1G", "--cpus=2"],
        [],
    ]


def test_every_process_is_asked_for_its_health_on_its_own_socket(minion, process):
    for name, unit in units(minion).items():
        (health,) = (word for word in create(unit["text"]) if word.startswith("--health-cmd="))
        assert f"--unix-socket /run/matrix-synapse/private/{name}.sock http://localhost/health" in health
        (post,) = directives(unit["text"])["ExecStartPost"]
        assert post.endswith(f"/run/matrix-synapse/private/{name}.sock")


def test_dependencies_make_the_cascade(minion, process):
    found = {name: directives(unit["text"]) for name, unit in units(minion).items()}
    assert found[MAIN]["WantedBy"] == ["multi-user.target"]
    assert "Requires" not in found[MAIN]
    for name in (FIRST, SECOND):
        assert found[name]["Requires"] == found[name]["PartOf"] == ["matrix-synapse.service"]
        assert "matrix-synapse.service" in found[name]["After"][0].split()
        assert found[name]["WantedBy"] == ["matrix-synapse.service"]
    for unit in found.values():
        assert unit["Restart"] == ["always"]
        assert unit["StartLimitIntervalSec"] == ["0"]


def test_no_unit_sleeps_or_starts_by_docker_exec(minion, process):
    for unit in units(minion).values():
        assert not re.search(r"\bsleep\b|RestartSec|docker exec|PIDFile|@\.service", unit["text"])


def test_a_stop_has_a_grace_time_that_systemd_waits_for(minion, process):
    for grace in (1, 30, 3600):
        unit = directives(units(minion, {"process:stop_grace": grace})[FIRST]["text"])
        assert unit["ExecStop"][0].endswith(f"http://localhost/containers/{FIRST}/stop?t={grace}")
        assert int(unit["TimeoutStopSec"][0]) > grace


def test_what_a_crash_left_is_removed_before_a_start(minion, process):
    found = {name: directives(unit["text"])["ExecStartPre"][0] for name, unit in units(minion).items()}
    for side in ("public", "private"):
        path = f"/run/matrix-synapse/{side}/{FIRST}.sock"
        assert {path, f"{path}.lock"} <= set(found[FIRST].split())
    assert "/public/" not in found[SECOND]


def test_no_unit_holds_a_secret(minion, process):
    settings = {f"secrets:{name}": SECRET for name in ("replication", "macaroon", "form", "registration")}
    settings["postgres"] = {"managed": False, "host": "db", "password": SECRET}
    assert not [name for name, unit in units(minion, settings).items() if SECRET in unit["text"]]


def test_a_host_name_is_never_too_long(minion, process):
    writers = [{"type": "stream-writer", "stream": "quarantined_media_changes", "count": 101}]
    for unit in units(minion, {"workers:list": writers}).values():
        (name,) = (word.removeprefix("--hostname=") for word in create(unit["text"]) if word.startswith("--hostname="))
        assert len(name) <= 63


def test_byte_code_of_a_pulled_image_is_mounted(minion, process):
    minion.salt["synapse_image.wanted"] = lambda image: {**IMAGE, "pycache": "volume"}
    for unit in units(minion).values():
        words = create(unit["text"])
        assert "--mount=type=volume,source=volume,target=/var/cache/python,readonly" in words
        assert "--env=PYTHONPYCACHEPREFIX=/var/cache/python" in words


def test_while_the_image_is_not_there_its_reference_stands_for_it(minion, process):
    minion.salt["synapse_image.wanted"] = lambda image: {**IMAGE, "id": None}
    assert IMAGE["reference"] in create(units(minion)[MAIN]["text"])


# When a process counts as changed


def test_a_container_bears_the_digest_of_what_it_was_made_from(minion, process):
    for name, unit in units(minion).items():
        assert create_container(unit["text"])[1:3] == [name, unit["inputs"]]
        assert f"--label=org.matrix.synapse.process={name}" in create(unit["text"])


CHANGES = {
    "nothing": ({}, []),
    "the order": ({"workers:list": [PUSHER, GENERIC]}, []),
    "another generic worker": ({"workers:list": [GENERIC, PUSHER, GENERIC]}, []),
    "nginx": ({"nginx:client:listen": [8009]}, []),
    "whether it runs": ({"process:running": False}, []),
    "a worker's memory": ({"workers:list": [{**GENERIC, "memory": "1G"}, PUSHER]}, [FIRST]),
    "a worker's arguments": ({"workers:list": [GENERIC, {**PUSHER, "arguments": ["--ipc=none"]}]}, [SECOND]),
    "a worker's config": ({"workers:list": [GENERIC, {**PUSHER, "config": {"a": 1}}]}, [SECOND]),
    "main's memory": ({"main:memory": "1G"}, [MAIN]),
    "everybody's memory": ({"process:memory": "1G"}, NAMES),
    "the grace time": ({"process:stop_grace": 5}, NAMES),
    "homeserver.yaml": ({"config:report_stats": True}, NAMES),
    "an appservice's arguments": (
        {
            "appservices:bridge": {
                "registration": {"url": None, "sender_localpart": "bot", "namespaces": {}},
                "arguments": ["--add-host=bridge:10.0.0.1"],
            }
        },
        NAMES,
    ),
}


@pytest.mark.parametrize(("change", "changed"), CHANGES.values(), ids=CHANGES)
def test_a_change_changes_the_inputs_of_whom_it_concerns_alone(minion, process, change, changed):
    planned = minion.plan({"workers:list": [GENERIC, PUSHER]})
    minion.keep_roster(planned["roster"])
    before, after = units(minion), units(minion, change)
    assert [name for name in before if before[name]["inputs"] != after[name]["inputs"]] == changed
    assert [name for name in before if before[name]["text"] != after[name]["text"]] == changed


def test_another_image_changes_all(minion, process):
    before = units(minion)
    minion.salt["synapse_image.wanted"] = lambda image: {**IMAGE, "id": "sha256:4567"}
    after = units(minion)
    assert all(before[name]["inputs"] != after[name]["inputs"] for name in NAMES)


# What a run would do


def enabling_link(process, name):
    return process.UNITS / ("multi-user.target.wants" if name == MAIN else f"{MAIN}.service.wants") / f"{name}.service"


@pytest.fixture
def host(minion, process):
    """What systemd and Docker say of the three processes: everything as it should be, unless the test changes it."""
    wanted = units(minion)
    process.UNITS.mkdir()
    for name, unit in wanted.items():
        (process.UNITS / f"{name}.service").write_text(unit["text"])
    states = dict.fromkeys(wanted, "active")
    for name in wanted:
        enabling_link(process, name).parent.mkdir(exist_ok=True)
        enabling_link(process, name).symlink_to(f"../{name}.service")
    inputs = {name: unit["inputs"] for name, unit in wanted.items()}

    def run_all(command, **kwargs):
        if command[0] == "docker":
            lines = [f"{name}\t{digest}\trunning" for name, digest in inputs.items()]
        elif command[1] == "show":
            lines = [f"Id={name}\nNeedDaemonReload=no\n" for name in command if name.endswith(".service")]
        else:
            assert command[:2] == ["systemctl", "list-units"]
            loaded = [{"unit": f"{name}.service", "active": state, "sub": "any"} for name, state in states.items()]
            lines = [json.dumps(loaded)]
        return {"retcode": 0, "stdout": "\n".join(lines), "stderr": ""}

    minion.salt["cmd.run_all"] = run_all
    run_all.states, run_all.inputs = states, inputs
    return run_all


NOTHING = {"write": [], "enable": [], "disable": [], "restart": [], "start": [], "stop": []}


def test_nothing_is_to_be_done_where_all_is_as_it_should_be(process, host):
    assert process.pending() == NOTHING


def test_everything_is_to_be_done_on_a_new_host(process, host):
    for name in NAMES:
        (process.UNITS / f"{name}.service").unlink()
        enabling_link(process, name).unlink()
    host.states.clear()
    host.inputs.clear()
    assert process.pending() == {**NOTHING, "write": NAMES, "enable": NAMES, "start": NAMES}


def test_a_unit_that_was_changed_is_written_even_if_its_process_is_right(process, host):
    (process.UNITS / f"{FIRST}.service").write_text("[Unit]\n")
    assert process.pending() == {**NOTHING, "write": [FIRST]}


def test_a_disabled_unit_is_enabled_and_not_restarted(process, host):
    enabling_link(process, FIRST).unlink()
    assert process.pending() == {**NOTHING, "enable": [FIRST]}


def test_what_runs_from_other_inputs_is_restarted_though_its_unit_is_right(process, host):
    host.inputs[FIRST] = "of a run that died before it restarted"
    del host.inputs[SECOND]
    assert process.pending() == {**NOTHING, "restart": [FIRST, SECOND]}


@pytest.mark.parametrize("state", ["inactive", "failed", "activating", "deactivating"])
def test_what_does_not_run_is_started(process, host, state):
    host.states[SECOND] = state
    assert process.pending() == {**NOTHING, "start": [SECOND]}


def test_what_should_not_run_is_stopped_and_neither_started_nor_restarted(minion, process, host):
    host.states[FIRST] = "failed"
    host.inputs[SECOND] = "others"
    minion.pillar["synapse"]["process"] = {"running": False}
    assert process.pending() == {**NOTHING, "disable": NAMES, "stop": [MAIN, SECOND]}


def test_what_should_not_run_is_not_enabled_so_that_no_boot_starts_it(minion, process, host):
    host.states.clear()
    for name in (MAIN, SECOND):
        enabling_link(process, name).unlink()
    minion.pillar["synapse"]["process"] = {"running": False}
    assert process.pending() == {**NOTHING, "disable": [FIRST]}


@pytest.mark.parametrize("stop", [[MAIN, FIRST], [FIRST, SECOND]])
def test_all_that_should_not_run_is_stopped_and_disabled_in_one_call_each(minion, process, host, stop):
    asked = []

    def run_all(command, **kwargs):
        if command[1] in ("show", "list-units"):
            return host(command)
        asked.append(command)
        return {"retcode": 0, "stdout": "", "stderr": ""}

    minion.salt["cmd.run_all"] = run_all
    process.apply({**NOTHING, "disable": NAMES, "stop": stop})
    assert asked == [
        ["systemctl", "disable", *(f"{name}.service" for name in NAMES)],
        ["systemctl", "stop", *(f"{name}.service" for name in stop)],
    ]


def test_the_state_tells_of_units_that_are_disabled(minion, process, host, formula_state):
    todo = {**NOTHING, "disable": NAMES, "stop": [MAIN]}
    minion.salt |= {"synapse_process.pending": lambda: todo, "synapse_process.present": lambda: NAMES}
    assert formula_state("synapse_process").running("all")["changes"] == {
        MAIN: {"old": "running", "new": "stopped"},
        FIRST: {"old": "unit", "new": "unit disabled"},
        SECOND: {"old": "unit", "new": "unit disabled"},
    }


def test_a_worker_that_came_new_is_all_that_is_to_be_done(minion, process, host):
    minion.keep_roster(minion.synapse_workers.plan()["roster"])
    minion.run(minion.good_pillar({"workers:list": [GENERIC, PUSHER, GENERIC]}))
    new = ["matrix-synapse-worker-2-generic"]
    assert process.pending() == {**NOTHING, "write": new, "enable": new, "start": new}


def test_a_command_that_fails_is_told_with_what_it_said(minion, process):
    minion.salt["cmd.run_all"] = lambda command, **kwargs: {"retcode": 1, "stdout": "", "stderr": "no bus"}
    with pytest.raises(CommandExecutionError, match=r"systemctl list-units .*: no bus"):
        process.states([MAIN])
    assert process.containers() == {}
    assert process.states([]) == {}


# How it is


@pytest.mark.parametrize(
    ("text", "expected"),
    [("0B", 0), ("512KiB", 1 << 19), ("88.5MiB", 92798976), ("1.5GiB", 3 << 29), ("2TiB", 2 << 40)],
)
def test_memory_is_read_as_docker_writes_it(process, text, expected):
    assert process._bytes(text) == expected


def test_a_container_that_does_not_run_has_no_memory(process):
    assert process._bytes("--") is None


@pytest.fixture
def listener(tmp_path):
    """An HTTP server on a Unix socket, which answers with the status in `code`."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(server.code if self.path == "/health" else 404)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def address_string(self):
            return "unix"

        def log_message(self, *args):
            pass

    path = str(tmp_path / "s")
    with socketserver.ThreadingUnixStreamServer(path, Handler) as server:
        server.daemon_threads = True
        server.code, server.path = 200, path
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_a_process_is_healthy_if_it_says_so(process, listener):
    assert process.healthy(listener.path) is True
    listener.code = 503
    assert process.healthy(listener.path) is False


def test_a_process_that_does_not_answer_is_not_healthy(process, listener, tmp_path):
    assert process.healthy(str(tmp_path / "none")) is False
    os.unlink(listener.path)
    assert process.healthy(listener.path) is False


@pytest.mark.parametrize(
    ("outdated", "together"),
    [([MAIN], False), ([FIRST], False), ([FIRST, SECOND], False), ([MAIN, FIRST], False), (NAMES, True)],
)
def test_only_what_all_share_restarts_them_together(minion, process, host, outdated, together):
    asked, rolled, restarted = [], [], []

    def run_all(command, **kwargs):
        if command[0] == "docker" or command[1] in ("show", "list-units"):
            return host(command)
        asked.append(command)
        return {"retcode": 0, "stdout": "", "stderr": ""}

    minion.salt["cmd.run_all"] = run_all
    minion.salt["synapse_rolling.restart"] = rolled.append
    minion.salt["synapse_rolling.restart_together"] = restarted.append
    for name in outdated:
        host.inputs[name] = "others"
    todo = process.pending()
    assert todo == {**NOTHING, "restart": outdated}
    process.apply(todo)
    assert restarted == ([NAMES] if together else [])
    assert asked == ([["systemctl", "start", f"{FIRST}.service", f"{SECOND}.service"]] if together else [])
    assert rolled == ([] if together else [outdated])


@pytest.mark.parametrize(("alone", "options"), [(True, ["--job-mode=ignore-dependencies"]), (False, [])])
def test_main_restarts_with_its_workers_or_without(minion, process, alone, options):
    asked = []
    minion.salt["cmd.run_all"] = lambda command, **kwargs: asked.append(command) or {"retcode": 0}
    process.restart(MAIN, alone)
    assert asked == [["systemctl", *options, "restart", f"{MAIN}.service"]]


def test_what_a_rolling_restart_did_not_give_back_is_restarted(minion, process, host):
    minion.salt["synapse_rolling.taken_out"] = lambda: [FIRST]
    assert process.pending() == {**NOTHING, "restart": [FIRST]}
