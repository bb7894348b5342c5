"""
The plan: which processes there are, what they are called, and what follows from it.
"""

import copy
import json
import random
import re

import pytest

GENERIC = {"type": "generic"}
PUSHER = {"type": "pusher"}
SENDER = {"type": "federation-sender"}
MEDIA = {"type": "media-repository"}


def writer(stream, **options):
    return {"type": "stream-writer", "stream": stream, **options}


def workers(*entries, **others):
    return {**{f"workers:{key}": value for key, value in others.items()}, "workers:list": list(entries)}


def run(minion, *entries, **others):
    """A run with these workers, which leaves its roster behind; return the plan's processes by name."""
    planned = minion.plan(workers(*entries, **others))
    minion.keep_roster(planned["roster"])
    return by_name(planned)


def by_name(planned):
    return {process["name"]: process for process in planned["processes"]}


def names(processes):
    return [name.removeprefix("matrix-synapse-worker-") for name in processes][1:]


def config_of(minion, *entries, settings=None):
    """The configuration that the formula gives the last of these workers."""
    return minion.plan({**workers(*entries), **(settings or {})})["processes"][-1]["config"]


def resources(process):
    """What each of a process's listeners serves, by path."""
    listeners = process["config"].get("listeners", process["config"].get("worker_listeners"))
    return {listener["path"]: listener["resources"][0]["names"] for listener in listeners}


# Names


def test_a_plan_without_workers_is_the_main_process(minion):
    (main,) = minion.plan()["processes"]
    assert main["name"] == "matrix-synapse"
    assert main["type"] == "main"
    assert main["index"] is None
    assert main["app"] == "synapse.app.homeserver"


def test_names_are_index_type_and_stream_without_underscores(minion):
    planned = minion.plan(workers(GENERIC, writer("typing"), PUSHER, writer("to_device"), MEDIA))
    assert [process["name"] for process in planned["processes"]] == [
        "matrix-synapse",
        "matrix-synapse-worker-0-generic",
        "matrix-synapse-worker-1-stream-writer-typing",
        "matrix-synapse-worker-2-pusher",
        "matrix-synapse-worker-3-stream-writer-to-device",
        "matrix-synapse-worker-4-media-repository",
    ]
    assert minion.synapse_workers.names() == list(by_name(planned))
    assert [process["index"] for process in planned["processes"]] == [None, 0, 1, 2, 3, 4]


def test_one_of_each_is_sixteen_workers(minion):
    assert names(by_name(minion.plan({"workers:preset": "one-of-each"}))) == [
        "0-generic",
        "1-stream-writer-events",
        "2-stream-writer-typing",
        "3-stream-writer-to-device",
        "4-stream-writer-account-data",
        "5-stream-writer-receipts",
        "6-stream-writer-presence",
        "7-stream-writer-push-rules",
        "8-stream-writer-device-lists",
        "9-stream-writer-quarantined-media-changes",
        "10-pusher",
        "11-media-repository",
        "12-appservice",
        "13-user-directory",
        "14-background",
        "15-federation-sender",
    ]


def test_specialized_workers_stand_in_for_the_generic_one(minion):
    each = names(by_name(minion.plan({"workers:preset": "one-of-each"})))
    special = names(by_name(minion.plan({"workers:preset": "specialized-workers"})))
    assert special[:4] == ["0-room", "1-sync", "2-client-reader", "3-federation-reader"]
    assert [name.split("-", 1)[1] for name in special[4:]] == [name.split("-", 1)[1] for name in each[1:]]


def test_the_little_federation_helper_is_one_federation_sender(minion):
    assert names(by_name(minion.plan({"workers:preset": "little-federation-helper"}))) == ["0-federation-sender"]


def test_the_list_comes_after_the_preset(minion):
    planned = minion.plan(workers(GENERIC, PUSHER, preset="little-federation-helper"))
    assert names(by_name(planned)) == ["0-federation-sender", "1-generic", "2-pusher"]


def test_a_count_makes_as_many_and_none_makes_none(minion):
    planned = minion.plan(workers({**GENERIC, "count": 2}, {**PUSHER, "count": 0}, SENDER))
    assert names(by_name(planned)) == ["0-generic", "1-generic", "2-federation-sender"]


# A worker that still exists keeps its name, its listeners and its config


@pytest.mark.parametrize(
    ("before", "after", "called"),
    [
        pytest.param([PUSHER, SENDER], [PUSHER, SENDER], "0-pusher 1-federation-sender", id="nothing"),
        pytest.param(
            [GENERIC, PUSHER], [{**GENERIC, "count": 3}, PUSHER], "0-generic 1-pusher 2-generic 3-generic", id="grown"
        ),
        pytest.param(
            [{**GENERIC, "count": 3}, PUSHER], [{**GENERIC, "count": 1}, PUSHER], "0-generic 3-pusher", id="shrunk"
        ),
        pytest.param([PUSHER, SENDER, MEDIA], [PUSHER, MEDIA], "0-pusher 2-media-repository", id="removed"),
        pytest.param([PUSHER, SENDER], [SENDER, PUSHER], "0-pusher 1-federation-sender", id="reordered"),
        pytest.param([PUSHER], [GENERIC, PUSHER], "0-pusher 1-generic", id="put in front"),
        pytest.param([PUSHER], [{**PUSHER, "memory": "1G"}], "0-pusher", id="edited"),
        pytest.param(
            [PUSHER, SENDER], [{"type": "sync"}, SENDER], "0-sync 1-federation-sender", id="index of a removed one"
        ),
        pytest.param(
            [PUSHER, SENDER, MEDIA],
            [MEDIA, GENERIC, GENERIC, GENERIC],
            "0-generic 1-generic 2-media-repository 3-generic",
            id="lowest free index",
        ),
        pytest.param(
            [writer("events"), writer("receipts")],
            [writer("receipts"), writer("events", count=2)],
            "0-stream-writer-events 1-stream-writer-receipts 2-stream-writer-events",
            id="sharded",
        ),
        pytest.param(
            [writer("typing")], [writer("presence")], "0-stream-writer-presence", id="another stream, another worker"
        ),
    ],
)
def test_names_after_a_change(minion, before, after, called):
    run(minion, *before)
    assert " ".join(names(run(minion, *after))) == called
    # And once more, as the roster now is.
    assert " ".join(names(run(minion, *after))) == called


def test_the_same_workers_by_preset_or_by_list_have_the_same_names(minion):
    each = minion.synapse_pillar.knowledge()["workers"]["presets"]["one-of-each"]
    before = run(minion, preset="one-of-each")
    assert run(minion, *reversed(each)) == before


def test_of_two_entries_of_a_type_each_keeps_its_own(minion):
    small, large = {**GENERIC, "memory": "512M"}, {**GENERIC, "memory": "2G", "config": {"a": 1}}
    before = run(minion, small, large)
    assert run(minion, large, small) == before
    after = run(minion, GENERIC, large, small)
    assert after.pop("matrix-synapse-worker-2-generic")["memory"] is None
    assert after == before
    assert run(minion, large)["matrix-synapse-worker-1-generic"] == before["matrix-synapse-worker-1-generic"]


def test_of_two_entries_of_a_type_each_keeps_its_own_while_what_they_share_changes(minion):
    small, large = {**GENERIC, "memory": "512M"}, {**GENERIC, "memory": "2G"}
    run(minion, small, large)
    settings = {**workers(large, small), "process:log_level": "DEBUG", "process:cpus": 2}
    processes = by_name(minion.plan(settings))
    assert processes["matrix-synapse-worker-0-generic"]["memory"] == "512M"
    assert processes["matrix-synapse-worker-1-generic"]["memory"] == "2G"


def test_of_two_entries_of_a_type_the_one_that_was_not_edited_keeps_its_name(minion):
    small, large = {**GENERIC, "memory": "512M"}, {**GENERIC, "memory": "2G"}
    run(minion, small, large)
    processes = run(minion, large, {**small, "memory": "768M"})
    assert processes["matrix-synapse-worker-0-generic"]["memory"] == "768M"
    assert processes["matrix-synapse-worker-1-generic"]["memory"] == "2G"


def test_the_roster_knows_the_workers_that_there_are_and_the_servers_name(minion):
    run(minion, PUSHER, GENERIC)
    roster = minion.plan(workers(GENERIC))["roster"]
    assert roster["server_name"] == "example.org"
    assert list(roster["workers"]) == ["matrix-synapse-worker-1-generic"]
    assert roster["workers"]["matrix-synapse-worker-1-generic"]["index"] == 1


def test_another_generic_worker_changes_nothing_for_the_others(minion):
    planned = minion.plan({"workers:preset": "one-of-each"})
    minion.keep_roster(planned["roster"])
    grown = minion.plan(workers(GENERIC, preset="one-of-each"))
    processes = by_name(grown)
    assert processes.pop("matrix-synapse-worker-16-generic")["type"] == "generic"
    assert processes == by_name(planned)
    assert grown["shared"] == planned["shared"]
    assert grown["max_connections"] == planned["max_connections"] == 200


# What binds the processes together


def test_one_of_each_binds_every_worker(minion):
    def name(worker):
        return f"matrix-synapse-worker-{worker}"

    shared = minion.plan({"workers:preset": "one-of-each"})["shared"]
    callable_workers = [
        "1-stream-writer-events",
        "2-stream-writer-typing",
        "3-stream-writer-to-device",
        "4-stream-writer-account-data",
        "5-stream-writer-receipts",
        "6-stream-writer-presence",
        "7-stream-writer-push-rules",
        "8-stream-writer-device-lists",
        "9-stream-writer-quarantined-media-changes",
    ]
    sockets = {name(worker): name(worker) for worker in callable_workers} | {"main": "matrix-synapse"}
    assert shared == {
        "stream_writers": {
            "events": [name("1-stream-writer-events")],
            "typing": [name("2-stream-writer-typing")],
            "to_device": [name("3-stream-writer-to-device")],
            "account_data": [name("4-stream-writer-account-data")],
            "receipts": [name("5-stream-writer-receipts")],
            "presence": [name("6-stream-writer-presence")],
            "push_rules": [name("7-stream-writer-push-rules")],
            "device_lists": [name("8-stream-writer-device-lists")],
            "quarantined_media_changes": [name("9-stream-writer-quarantined-media-changes")],
        },
        "instance_map": {
            called: {"path": f"/run/matrix-synapse/private/{socket}.sock"} for called, socket in sockets.items()
        },
        "pusher_instances": [name("10-pusher")],
        "media_instance_running_background_jobs": name("11-media-repository"),
        "enable_media_repo": False,
        "notify_appservices_from_worker": name("12-appservice"),
        "update_user_directory_from_worker": name("13-user-directory"),
        "run_background_tasks_on": name("14-background"),
        "federation_sender_instances": [name("15-federation-sender")],
    }


def test_without_workers_main_does_all(minion):
    assert minion.plan()["shared"] == {
        "stream_writers": {},
        "instance_map": {"main": {"path": "/run/matrix-synapse/private/matrix-synapse.sock"}},
    }


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, ["client", "federation", "media"]),
        ({"user_consent": None}, ["client", "federation", "media"]),
        ({"user_consent": {"version": "1.0"}}, ["client", "federation", "media", "consent"]),
    ],
)
def test_main_asks_for_consent_where_the_operator_does(minion, config, expected):
    main = minion.plan({"config": config})["processes"][0]
    (resources,) = main["config"]["listeners"][1]["resources"]
    assert resources == {"names": expected}


STREAMS = [
    "events",
    "typing",
    "to_device",
    "account_data",
    "receipts",
    "presence",
    "push_rules",
    "device_lists",
    "thread_subscriptions",
    "quarantined_media_changes",
]
SHARDED = ["events", "receipts", "device_lists", "thread_subscriptions", "quarantined_media_changes"]


def test_all_streams_are_known(minion):
    assert sorted(minion.synapse_pillar.knowledge()["workers"]["streams"]) == sorted(STREAMS)


@pytest.mark.parametrize("stream", STREAMS)
def test_each_stream_can_have_a_writer_that_others_reach(minion, stream):
    planned = minion.plan(workers(GENERIC, writer(stream)))
    process = planned["processes"][2]
    assert process["name"] == f"matrix-synapse-worker-1-stream-writer-{stream.replace('_', '-')}"
    assert planned["shared"]["stream_writers"] == {stream: [process["name"]]}
    assert planned["shared"]["instance_map"][process["name"]] == {"path": process["private_socket"]}
    assert "replication" in resources(process)[process["private_socket"]]
    assert "client" in resources(process)[process["public_socket"]]


@pytest.mark.parametrize("stream", SHARDED)
def test_what_synapse_can_share_out_has_as_many_writers_as_wanted(minion, stream):
    planned = minion.plan(workers(writer(stream, count=3), PUSHER, writer(stream, memory="1G")))
    writers = [process["name"] for process in planned["processes"] if process["stream"] == stream]
    assert len(writers) == 4
    assert planned["shared"]["stream_writers"] == {stream: writers}
    assert set(planned["shared"]["instance_map"]) == {"main", *writers}


def test_several_pushers_and_federation_senders_share_the_work(minion):
    shared = minion.plan(workers({**PUSHER, "count": 2}, {**SENDER, "count": 2}))["shared"]
    assert [name[-8:] for name in shared["pusher_instances"]] == ["0-pusher", "1-pusher"]
    assert [name[-19:] for name in shared["federation_sender_instances"]] == [
        "2-federation-sender",
        "3-federation-sender",
    ]


def test_media_is_served_by_its_workers_alone_and_one_of_them_cleans_up(minion):
    planned = minion.plan(workers(GENERIC, {**MEDIA, "count": 2}))
    main, generic, *media = planned["processes"]
    assert planned["shared"]["enable_media_repo"] is False
    assert planned["shared"]["media_instance_running_background_jobs"] == media[0]["name"]
    assert [process["config"]["enable_media_repo"] for process in media] == [True, True]
    assert "enable_media_repo" not in generic["config"]
    assert resources(main)[main["public_socket"]] == ["client", "federation"]
    assert resources(media[0])[media[0]["public_socket"]] == ["media"]


def test_without_a_media_worker_main_serves_media(minion):
    (main,) = minion.plan()["processes"]
    assert "media" in resources(main)[main["public_socket"]]


def test_quarantined_media_is_written_by_who_has_a_media_repository(minion):
    media = "matrix-synapse-worker-0-media-repository"
    shared = minion.plan(workers(MEDIA))["shared"]
    assert shared["stream_writers"] == {"quarantined_media_changes": [media]}
    assert media in shared["instance_map"]
    planned = minion.plan(workers(MEDIA, writer("quarantined_media_changes")))
    process = planned["processes"][2]
    assert planned["shared"]["stream_writers"] == {"quarantined_media_changes": [process["name"]]}
    assert process["config"]["enable_media_repo"] is True
    assert resources(process)[process["public_socket"]] == ["client", "media"]


def test_a_worker_that_federates_for_others_can_be_reached_by_them(minion):
    name = "matrix-synapse-worker-0-generic"
    settings = {**workers({**GENERIC, "count": 2}), "config:outbound_federation_restricted_to": [name]}
    planned = minion.plan(settings)
    proxy, other = planned["processes"][1:]
    assert set(planned["shared"]["instance_map"]) == {"main", name}
    assert "replication" in resources(proxy)[proxy["private_socket"]]
    assert "replication" not in resources(other)[other["private_socket"]]


# Each process


def test_every_process_answers_health_on_a_socket_of_its_own(minion):
    processes = minion.plan({"workers:preset": "specialized-workers"})["processes"]
    for process in processes:
        assert process["private_socket"] == f"/run/matrix-synapse/private/{process['name']}.sock"
        assert "health" in resources(process)[process["private_socket"]]
        assert process["public_socket"] in (None, f"/run/matrix-synapse/public/{process['name']}.sock")
        assert set(resources(process)) == {process["private_socket"], process["public_socket"]} - {None}


def test_who_serves_no_requests_has_no_public_socket(minion):
    processes = minion.plan({"workers:preset": "one-of-each"})["processes"]
    hidden = [process["type"] for process in processes if process["public_socket"] is None]
    assert hidden == ["pusher", "appservice", "background", "federation-sender"]


def test_only_what_nginx_enters_believes_forwarded_addresses(minion):
    for process in minion.plan({"workers:preset": "one-of-each"})["processes"]:
        listeners = process["config"].get("listeners", process["config"].get("worker_listeners"))
        assert all(listener["x_forwarded"] == (listener["path"] == process["public_socket"]) for listener in listeners)
        assert all(listener["type"] == "http" and isinstance(listener["mode"], int) for listener in listeners)


def test_metrics_can_be_switched_off(minion):
    with_metrics = minion.plan(workers(PUSHER))["processes"]
    without = minion.plan({**workers(PUSHER), "metrics": False})["processes"]
    assert ["metrics" in resources(process)[process["private_socket"]] for process in with_metrics] == [True, True]
    assert ["metrics" in resources(process)[process["private_socket"]] for process in without] == [False, False]


def test_a_worker_says_who_it_is_and_reads_the_shared_settings_first(minion):
    _, process = minion.plan({**workers(PUSHER), "directories:run": "/run/synapse"})["processes"]
    config = minion.directory / "config"
    assert process["config"]["worker_app"] == process["app"] == "synapse.app.generic_worker"
    assert process["config"]["worker_name"] == process["name"]
    assert process["config"]["worker_log_config"] == process["log_config"] == f"{config}/log-info.yaml"
    assert process["config_files"] == [f"{config}/homeserver.yaml", f"{config}/workers/{process['name']}.yaml"]
    assert process["private_socket"] == f"/run/synapse/private/{process['name']}.sock"


def test_an_entrys_config_is_in_its_workers_own(minion):
    assert config_of(minion, {**GENERIC, "config": {"send_federation": False}})["send_federation"] is False
    assert "send_federation" not in config_of(minion, {**GENERIC, "config": {"send_federation": False}}, GENERIC)


def test_an_entrys_config_goes_over_that_of_its_type(minion):
    assert config_of(minion, {**MEDIA, "config": {"enable_media_repo": False}})["enable_media_repo"] is False


def test_limits_log_level_and_arguments_are_the_entrys_else_the_processes(minion):
    settings = {
        "process": {"memory": "1G", "cpus": 2, "log_level": "WARNING", "arguments": ["--ipc=private"]},
        "main": {"memory": "4G", "cpus": None},
        "workers:list": [
            GENERIC,
            {**GENERIC, "memory": None, "cpus": 0.5, "log_level": "DEBUG", "arguments": ["--ipc=none"]},
        ],
    }
    options = ("memory", "cpus", "log_level", "arguments")
    processes = minion.plan(settings)["processes"]
    assert [[process[key] for key in options] for process in processes] == [
        ["4G", 2, "WARNING", ["--ipc=private"]],
        ["1G", 2, "WARNING", ["--ipc=private"]],
        [None, 0.5, "DEBUG", ["--ipc=none"]],
    ]
    assert [process["log_config"].rsplit("/")[-1] for process in processes] == [
        "log-warning.yaml",
        "log-warning.yaml",
        "log-debug.yaml",
    ]


@pytest.mark.parametrize(
    ("processes", "pool", "expected"),
    [(1, 10, 100), (8, 10, 100), (9, 10, 200), (17, 10, 200), (19, 10, 400), (2, 100, 400)],
)
def test_the_database_allows_enough_connections_in_doublings(minion, processes, pool, expected):
    settings = {"postgres": {"connections": {"max": pool}}}
    assert minion.synapse_workers.max_connections(processes, settings) == expected
    assert expected >= processes * pool + 20


# Routes


def test_requests_go_to_processes_that_are_there(minion):
    for preset in (None, "one-of-each", "specialized-workers"):
        planned = minion.plan({"workers:preset": preset})
        public = {process["public_socket"] for process in planned["processes"]} - {None}
        upstreams = {upstream["name"]: upstream["servers"] for upstream in planned["upstreams"]}
        assert list(upstreams)[0] == "synapse_main"
        assert all(servers and set(servers) <= public for servers in upstreams.values())
        assert {route["upstream"] for route in planned["routes"]} <= set(upstreams)
        assert all(re.compile(route["match"]) for route in planned["routes"])


def test_without_workers_everything_is_mains(minion):
    planned = minion.plan()
    assert planned["routes"] == []
    assert [upstream["name"] for upstream in planned["upstreams"]] == ["synapse_main"]


@pytest.mark.parametrize(
    ("request_line", "with_workers"),
    [
        ("GET:/_matrix/client/v3/sync?", "0-generic"),
        ("GET:/_matrix/client/v3/sync?initial", "16-initial-sync"),
        ("PUT:/_matrix/client/v3/rooms/!a:example.org/typing/@b:example.org?", "2-stream-writer-typing"),
        ("PUT:/_matrix/client/v3/sendToDevice/m.room_key/1?", "3-stream-writer-to-device"),
        ("POST:/_matrix/media/v3/upload?", "11-media-repository"),
        ("POST:/_matrix/client/v3/user_directory/search?", "13-user-directory"),
        ("PUT:/_matrix/federation/v1/send/1?", "0-generic"),
        ("POST:/_matrix/client/v3/logout?", None),
    ],
)
def test_a_request_goes_to_who_can_answer_it(minion, request_line, with_workers):
    planned = minion.plan({"workers:preset": "one-of-each", "workers:list": [{"type": "initial-sync"}]})
    upstreams = {upstream["name"]: upstream["servers"] for upstream in planned["upstreams"]}
    matching = (route["upstream"] for route in planned["routes"] if re.search(route["match"], request_line))
    name = f"matrix-synapse-worker-{with_workers}" if with_workers else "matrix-synapse"
    assert upstreams[next(matching, "synapse_main")] == [f"/run/matrix-synapse/public/{name}.sock"]


@pytest.mark.parametrize(
    ("version", "holds"),
    [
        ("v1.149.2", []),
        ("v1.150.0", ["since"]),
        ("1.150.3", ["since"]),
        ("v1.99.0", ["until"]),
        ("v1.100.7", ["until"]),
        ("v1.101.0rc1", []),
        ("v2.0.0", ["since"]),
        ("latest", ["since"]),
        ("develop", ["since"]),
    ],
)
def test_a_route_holds_from_its_first_to_its_last_release(minion, version, holds):
    data = {
        "names": {},
        "routes": [{"since": "1.150", "paths": ["/since"]}, {"until": "1.100", "paths": ["/until"]}],
    }
    found = minion.synapse_workers.matches(data, version)
    assert [route["paths"][0].strip("/") for route, _ in found] == holds


def test_the_routes_are_those_of_the_release_that_the_pillar_names(minion):
    def matching(version):
        planned = minion.plan({"workers:list": [GENERIC], "image:version": version})
        return [route for route in planned["routes"] if "auth_issuer" in route["match"]]

    assert matching("v1.160.0")
    assert not matching("v1.161.0")


# The function itself


def inputs(minion, settings):
    minion.run(minion.good_pillar(settings))
    known = minion.synapse_pillar.knowledge()
    return minion.synapse_pillar.settings(), known["workers"], known["routes"]


def test_the_plan_is_a_pure_function(minion):
    arguments = *inputs(minion, workers(GENERIC, MEDIA, preset="one-of-each")), {}
    before = copy.deepcopy(arguments)
    first = minion.synapse_workers.build(*arguments)
    assert arguments == before
    assert minion.synapse_workers.build(*copy.deepcopy(arguments)) == first
    arguments = *arguments[:3], first["roster"]
    before = copy.deepcopy(arguments)
    assert minion.synapse_workers.build(*arguments) == first
    assert arguments == before


@pytest.mark.parametrize(
    ("allowed", "given", "expected"),
    [(None, {}, 100), (50, {}, 100), (500, {}, 500), (500, {"max_connections": 200}, 200)],
)
def test_connections_that_a_cluster_allows_stay(minion, monkeypatch, allowed, given, expected):
    minion.run(minion.good_pillar({"postgres": {"version": 15, "options": {**given, "work_mem": "5MB"}}}))
    monkeypatch.setattr(minion.synapse_postgres, "CLUSTERS", minion.directory)

    def server_is_down(command, **kwargs):
        return {"retcode": 2, "stdout": ""} if "psql" in command else {"retcode": 0, "stdout": f"{allowed}\n"}

    minion.salt["cmd.run_all"] = server_is_down
    if allowed:
        (minion.directory / "15/main").mkdir(parents=True)
    assert minion.synapse_postgres.options() == {"max_connections": expected, "work_mem": "5MB"}


def test_the_plan_is_plain_data(minion):
    planned = minion.plan({"workers:preset": "one-of-each"})
    assert json.loads(json.dumps(planned)) == planned


def test_a_plan_made_anew_from_a_shuffled_roster_is_the_same(minion):
    arguments = inputs(minion, workers({**GENERIC, "count": 12}))
    first = minion.synapse_workers.build(*arguments, {})
    entries = list(first["roster"]["workers"].items())
    random.Random(1).shuffle(entries)
    assert minion.synapse_workers.build(*arguments, {**first["roster"], "workers": dict(entries)}) == first


def test_a_plan_asked_for_twice_in_a_run_is_made_once(minion):
    assert minion.plan() is minion.synapse_workers.plan()
    minion.pillar["synapse"]["workers"] = {"list": [GENERIC]}
    assert len(minion.synapse_workers.plan()["processes"]) == 2


def test_the_diagram_is_a_mermaid_flowchart_of_every_process(minion):
    planned = minion.plan({"workers:preset": "one-of-each"})
    first, *lines = minion.synapse_workers.diagram().splitlines()
    assert first == "flowchart LR"
    node = r'[a-z0-9]+(?:\(\[[^"]+\]\)|\[\([^"]+\)\]|\{\{[^"]+\}\}|\["[^"]+"\]|\[[^"]+\])?'
    link = rf"{node}(?: & {node})*(?: -- [a-z/]+)? --> {node}"
    assert [line for line in lines if not re.fullmatch(rf"  (?:{node}|{link})", line)] == []
    for process in planned["processes"]:
        assert sum(f'["{process["name"]}<br/>' in line for line in lines) == 1
    assert sum("nginx --> " in line for line in lines) == sum(
        process["public_socket"] is not None for process in planned["processes"]
    )
