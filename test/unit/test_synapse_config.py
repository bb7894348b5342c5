"""
The files that Synapse reads: what stands in them, who reads which, and what a run would write.
"""

import base64
import json
import os
import re
import shutil
import stat
import subprocess

import pytest
import salt.minion
import salt.utils.yaml
from salt.exceptions import CommandExecutionError

GENERIC = {"type": "generic"}
PUSHER = {"type": "pusher"}
TYPING = {"type": "stream-writer", "stream": "typing"}
REGISTRATION = {"url": None, "sender_localpart": "bot", "namespaces": {}, "as_token": "a" * 16, "hs_token": "b" * 16}
SECRET = "hush-0123456789abcdef"
OLD_KEY = f"ed25519 a_old {'A' * 43}\n"
IMAGE = {"reference": "image", "id": "sha256:0123", "pycache": None}
NEW_KEY = f"ed25519 a_new {'B' * 43}\n"
PROCESSES = [
    "matrix-synapse",
    "matrix-synapse-worker-0-generic",
    "matrix-synapse-worker-1-pusher",
    "matrix-synapse-worker-2-stream-writer-typing",
]


@pytest.fixture(autouse=True)
def account(minion):
    minion.salt |= {
        "file.user_to_uid": lambda name: os.getuid(),
        "file.group_to_gid": lambda name: os.getgid(),
        "file.remove": lambda path: shutil.rmtree(path) if os.path.isdir(path) else os.unlink(path),
        "synapse_image.wanted": lambda image: IMAGE,
    }


@pytest.fixture
def config(minion):
    return minion.synapse_config


def homeserver(minion, settings=None):
    planned = minion.plan(settings)
    registrations = minion.synapse_appservice.registrations()
    return minion.synapse_config.homeserver(minion.synapse_pillar.settings(), planned, registrations)


def write_everything(minion):
    """As a run does it, without Synapse's own check."""
    for path, text in minion.synapse_config.files().items():
        minion.write(os.path.relpath(path, minion.directory), text)
    minion.write("config/accepted-by", IMAGE["id"])


def texts(minion):
    """All that stands below the directory of the configuration."""
    paths = (minion.directory / "config").rglob("*")
    return {path: path.read_text() if path.is_file() else None for path in paths}


def relative(minion, paths):
    return sorted(os.path.relpath(path, minion.directory) for path in paths)


# homeserver.yaml


def test_the_least_homeserver(minion):
    data, settings = f"{minion.directory}/data", homeserver(minion)
    assert settings["server_name"] == "example.org"
    assert settings["public_baseurl"] == "https://example.org/"
    assert settings["report_stats"] is False
    assert settings["media_store_path"] == f"{data}/media"
    assert settings["log_config"] == f"{minion.directory}/config/log-info.yaml"
    assert settings["redis"] == {"enabled": True, "path": "/run/redis-synapse/redis.sock"}
    assert settings["app_service_config_files"] == []
    assert [listener["path"].rsplit("/", 2)[1] for listener in settings["listeners"]] == ["private", "public"]
    assert settings["database"] == {
        "name": "psycopg2",
        "args": {
            "user": "synapse",
            "dbname": "synapse",
            "host": "/run/postgresql",
            "port": 5432,
            "cp_min": 1,
            "cp_max": 10,
        },
    }


def test_secrets_are_named_by_their_files_alone(minion):
    given = {f"secrets:{name}": f"{SECRET}{name}" for name in ("replication", "macaroon", "form", "registration")}
    settings = homeserver(minion, {**given, "signing_key:current": NEW_KEY})
    data = f"{minion.directory}/data"
    assert {key: settings[key] for key in settings if key.endswith("_path") and key != "media_store_path"} == {
        "worker_replication_secret_path": f"{data}/secrets/replication",
        "macaroon_secret_key_path": f"{data}/secrets/macaroon",
        "form_secret_path": f"{data}/secrets/form",
        "registration_shared_secret_path": f"{data}/secrets/registration",
        "signing_key_path": f"{data}/secrets/signing.key",
    }
    texts = "".join(minion.synapse_config.files().values())
    assert SECRET not in texts
    assert NEW_KEY.strip() not in texts


def test_old_signing_keys_are_published(minion):
    old = {"ed25519:a_old": {"key": "A" * 43, "expired_ts": 1}}
    assert homeserver(minion, {"signing_key:old": old})["old_signing_keys"] == old


def test_what_the_plan_says_stands_in_it(minion):
    settings = homeserver(minion, {"workers:preset": "one-of-each"})
    shared = minion.synapse_workers.plan()["shared"]
    assert {key: settings[key] for key in shared} == shared
    assert settings["enable_media_repo"] is False


def test_the_operators_settings_win_and_are_merged_deeply(minion):
    settings = homeserver(
        minion,
        {
            "config": {
                "report_stats": True,
                "database": {"args": {"cp_max": 5, "keepalives_idle": 10}},
                "rc_message": {"per_second": 0.5},
                "federation_sender_instances": ["master"],
            },
            "workers:list": [{"type": "federation-sender"}],
        },
    )
    assert settings["report_stats"] is True
    assert settings["database"]["name"] == "psycopg2"
    assert settings["database"]["args"]["dbname"] == "synapse"
    assert settings["database"]["args"]["cp_max"] == 5
    assert settings["database"]["args"]["keepalives_idle"] == 10
    assert settings["rc_message"] == {"per_second": 0.5}
    # A list is one value.
    assert settings["federation_sender_instances"] == ["master"]


def test_an_external_database_is_reached_as_the_pillar_says(minion):
    postgres = {"managed": False, "host": "db.example.org", "port": 5433, "user": "matrix", "password": SECRET}
    assert homeserver(minion, {"postgres": postgres})["database"]["args"] == {
        "user": "matrix",
        "password": SECRET,
        "dbname": "synapse",
        "host": "db.example.org",
        "port": 5433,
        "cp_min": 1,
        "cp_max": 10,
    }


@pytest.mark.parametrize(
    ("redis", "expected"),
    [
        ({"host": "redis.example.org"}, {"host": "redis.example.org", "port": 6379}),
        ({"host": "::1", "port": 6380, "password": SECRET}, {"host": "::1", "port": 6380, "password": SECRET}),
        ({"host": "/run/redis/redis.sock"}, {"path": "/run/redis/redis.sock"}),
    ],
)
def test_an_external_redis_is_reached_as_the_pillar_says(minion, redis, expected):
    assert homeserver(minion, {"redis": {"managed": False, **redis}})["redis"] == {"enabled": True, **expected}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, ["/run/postgresql", "/run/redis-synapse"]),
        ({"redis": {"managed": False, "host": "/run/redis/redis.sock"}}, ["/run/postgresql", "/run/redis"]),
        ({"postgres": {"managed": False, "host": "/run/pg17"}}, ["/run/pg17", "/run/redis-synapse"]),
        (
            {
                "postgres": {"managed": False, "host": "db", "password": "x"},
                "redis": {"managed": False, "host": "redis.example.org"},
            },
            [],
        ),
    ],
)
def test_only_sockets_that_are_used_are_mounted(minion, config, settings, expected):
    minion.run(minion.good_pillar(settings))
    assert config.sockets_to_mount() == expected


# All files


def test_files_are_those_of_the_plan(minion, config):
    settings = {
        "workers:list": [GENERIC, {**PUSHER, "log_level": "DEBUG"}],
        "appservices:bridge:registration": REGISTRATION,
        "log:loggers": {"synapse.http": "WARNING"},
    }
    minion.run(minion.good_pillar(settings))
    files = {os.path.relpath(path, minion.directory): text for path, text in config.files().items()}
    assert sorted(files) == [
        "config/appservices/bridge.yaml",
        "config/homeserver.yaml",
        "config/log-debug.yaml",
        "config/log-info.yaml",
        "config/workers/matrix-synapse-worker-0-generic.yaml",
        "config/workers/matrix-synapse-worker-1-pusher.yaml",
        "data/roster.json",
    ]
    read = {path: salt.utils.yaml.safe_load(text) for path, text in files.items()}
    assert read["config/homeserver.yaml"] == homeserver(minion, settings)
    assert read["config/homeserver.yaml"]["app_service_config_files"] == [
        f"{minion.directory}/config/appservices/bridge.yaml"
    ]
    assert read["config/appservices/bridge.yaml"] == {"id": "bridge", **REGISTRATION}
    assert read["config/log-debug.yaml"]["root"] == {"level": "DEBUG", "handlers": ["console"]}
    assert read["config/log-debug.yaml"]["loggers"]["synapse.http"] == {"level": "WARNING"}
    plan = minion.synapse_workers.plan()
    assert read["config/workers/matrix-synapse-worker-1-pusher.yaml"] == plan["processes"][2]["config"]
    assert json.loads(files["data/roster.json"]) == plan["roster"]
    assert all(text.startswith("# Written by") for path, text in files.items() if path.endswith(".yaml"))


def test_a_section_of_a_worker_has_all_that_the_others_have_in_it(minion, config):
    own = {
        "caches": {"global_factor": 2, "per_cache_factors": {"a": 3}},
        "database": {"args": {"cp_max": 20}},
        "experimental_features": {"x": True},
        "rc_message": {"per_second": 1},
    }
    shared = {
        "caches": {"global_factor": 1, "per_cache_factors": {"a": 1, "b": 1}},
        "experimental_features": {"y": True},
        "rc_message": None,
    }
    minion.run(minion.good_pillar({"config": shared, "workers:list": [{**GENERIC, "config": own}, PUSHER]}))
    files = config.files()
    first, second = (
        salt.utils.yaml.safe_load(files[process["config_files"][1]])
        for process in minion.synapse_workers.plan()["processes"][1:]
    )
    assert first["caches"] == {"global_factor": 2, "per_cache_factors": {"a": 3, "b": 1}}
    assert first["database"]["args"]["dbname"] == "synapse"
    assert first["database"]["args"]["cp_max"] == 20
    assert first["experimental_features"] == {"x": True, "y": True}
    assert first["rc_message"] == {"per_second": 1}
    assert not set(own) & set(second)


def test_a_run_would_write_what_differs_and_nothing_twice(minion, config):
    minion.run(minion.good_pillar({"workers:list": [GENERIC]}))
    assert config.pending() == [*config.files(), f"{minion.directory}/config/accepted-by"]
    write_everything(minion)
    assert config.pending() == []
    minion.run(minion.good_pillar({"workers:list": [GENERIC, {**PUSHER, "log_level": "DEBUG"}]}))
    assert relative(minion, config.pending()) == [
        "config/homeserver.yaml",
        "config/log-debug.yaml",
        "config/workers/matrix-synapse-worker-1-pusher.yaml",
        "data/roster.json",
    ]
    minion.write("config/homeserver.yaml", "changed: by hand\n")
    minion.run(minion.good_pillar({"workers:list": [GENERIC]}))
    assert relative(minion, config.pending()) == ["config/homeserver.yaml"]


def test_another_generic_worker_leaves_the_files_of_others(minion, config):
    minion.run(minion.good_pillar({"workers:list": [GENERIC]}))
    write_everything(minion)
    minion.run(minion.good_pillar({"workers:list": [{**GENERIC, "count": 2}]}))
    assert relative(minion, config.pending()) == [
        "config/workers/matrix-synapse-worker-1-generic.yaml",
        "data/roster.json",
    ]


def test_files_of_what_is_gone_are_superfluous_and_others_are_not(minion, config):
    settings = {
        "workers:list": [GENERIC, {**PUSHER, "log_level": "DEBUG"}],
        "appservices:bridge:registration": REGISTRATION,
    }
    minion.run(minion.good_pillar(settings))
    write_everything(minion)
    for name in ("homeserver.yaml.bak", "workers/notes.txt", "own.yaml"):
        minion.write(f"config/{name}", "")
    assert config.superfluous() == []
    minion.run(minion.good_pillar({"workers:list": [GENERIC]}))
    assert relative(minion, config.superfluous()) == [
        "config/appservices/bridge.yaml",
        "config/log-debug.yaml",
        "config/workers/matrix-synapse-worker-1-pusher.yaml",
    ]


def test_a_file_that_cannot_be_read_is_told_by_its_path(minion, config):
    minion.run(minion.good_pillar())
    (minion.directory / "config/homeserver.yaml").mkdir(parents=True)
    with pytest.raises(CommandExecutionError, match=r"config/homeserver\.yaml"):
        config.pending()


# Who reads what


WORKERS = [GENERIC, PUSHER, TYPING]
ALL, NONE = PROCESSES, []
CHANGES = {
    "nothing": ({}, NONE),
    "the order": ({"workers:list": [TYPING, GENERIC, PUSHER]}, NONE),
    "another generic worker": ({"workers:list": [*WORKERS, GENERIC]}, NONE),
    "no generic worker": ({"workers:list": [PUSHER, TYPING]}, NONE),
    "a worker's limits": ({"workers:list": [{**GENERIC, "memory": "1G"}, PUSHER, TYPING]}, NONE),
    "a worker's config": ({"workers:list": [{**GENERIC, "config": {"a": 1}}, PUSHER, TYPING]}, [PROCESSES[1]]),
    "a worker's log level": ({"workers:list": [GENERIC, {**PUSHER, "log_level": "DEBUG"}, TYPING]}, [PROCESSES[2]]),
    "main's log level": ({"main:log_level": "DEBUG"}, ALL),
    "another pusher": ({"workers:list": [*WORKERS, PUSHER]}, ALL),
    "another writer": ({"workers:list": [*WORKERS, {"type": "stream-writer", "stream": "events"}]}, ALL),
    "no writer": ({"workers:list": [GENERIC, PUSHER]}, ALL),
    "homeserver.yaml": ({"config:report_stats": True}, ALL),
    "a logger": ({"log:loggers:synapse.http": "DEBUG"}, ALL),
    "a secret": ({"secrets:form": SECRET}, ALL),
    "the signing key": ({"signing_key:current": NEW_KEY}, ALL),
    "an appservice": ({"appservices:bridge:registration": REGISTRATION}, ALL),
    "nginx": ({"nginx:client:listen": [8009]}, NONE),
    "limits of all": ({"process:memory": "1G", "process:stop_grace": 5}, NONE),
}


@pytest.mark.parametrize(("change", "readers"), CHANGES.values(), ids=CHANGES)
def test_a_change_changes_the_digests_of_its_readers_alone(minion, config, change, readers):
    minion.run(minion.good_pillar({"workers:list": WORKERS}))
    write_everything(minion)
    before = config.digests()
    assert list(before) == PROCESSES
    after = minion.run(minion.good_pillar({"workers:list": WORKERS, **change})).synapse_config.digests()
    assert [name for name in before if name in after and before[name] != after[name]] == [
        name for name in readers if name in after
    ]


def test_another_log_level_is_read_by_its_readers_alone(minion, config):
    noisy = {**PUSHER, "log_level": "DEBUG"}
    before = minion.run(minion.good_pillar({"workers:list": [GENERIC, noisy]})).synapse_config.digests()
    after = minion.run(
        minion.good_pillar({"workers:list": [{**GENERIC, "log_level": "DEBUG"}, noisy]})
    ).synapse_config.digests()
    assert [name for name in before if before[name] != after[name]] == ["matrix-synapse-worker-0-generic"]


def test_digests_are_the_same_before_and_after_writing(minion, config):
    minion.run(minion.good_pillar({"workers:list": WORKERS, "secrets:form": SECRET, "signing_key:current": NEW_KEY}))
    minion.write("data/secrets/replication", "r")
    before = config.digests()
    write_everything(minion)
    minion.write("data/secrets/form", SECRET)
    minion.write("data/secrets/signing.key", NEW_KEY)
    assert config.digests() == before


def test_a_secret_changed_on_the_minion_is_read_by_all(minion, config):
    minion.run(minion.good_pillar({"workers:list": [GENERIC]}))
    minion.write("data/secrets/macaroon", "before")
    before = config.digests()
    minion.write("data/secrets/macaroon", "after")
    after = config.digests()
    assert all(before[name] != after[name] for name in before)


# Writing


@pytest.fixture
def parser(minion):
    """Synapse's parser, which says what the test lets it say; what it was asked is kept."""
    (minion.directory / "config").mkdir()
    asked = []

    def run_all(command, stdin=None, **kwargs):
        if command[0] == "cp":
            return {"retcode": subprocess.run(command).returncode}
        (mount,) = (word for word in command if f"target={minion.directory}/config," in word)
        candidate = re.search(r"source=([^,]+)", mount)[1]
        files = [os.path.join(path, name) for path, _, names in os.walk(candidate) for name in names]
        asked.append(
            {
                "command": command,
                "readers": json.loads(stdin),
                "files": sorted(os.path.relpath(f, candidate) for f in files),
            }
        )
        return run_all.answer

    run_all.answer = {"retcode": 0, "stdout": "", "stderr": ""}
    run_all.asked = asked
    minion.salt["cmd.run_all"] = run_all
    return run_all


def test_files_are_written_once_synapse_accepts_them(minion, config, parser):
    minion.run(minion.good_pillar({"workers:list": [GENERIC]}))
    changed = config.write("image")
    assert changed == [*config.files(), f"{minion.directory}/config/accepted-by"]
    assert config.pending() == []
    assert config.write("image") == []
    (asked,) = parser.asked
    assert list(asked["readers"]) == ["matrix-synapse", "matrix-synapse-worker-0-generic"]
    assert "homeserver.yaml" in asked["files"]
    assert {"--network=none", "--pull=never", "--read-only", "--cap-drop=ALL"} <= set(asked["command"])
    for path in config.files():
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o640
    assert not list((minion.directory / "config").glob(".candidate-*"))


def test_only_who_reads_a_changed_file_is_asked(minion, config, parser):
    minion.run(minion.good_pillar({"workers:list": WORKERS}))
    config.write("image")
    minion.run(minion.good_pillar({"workers:list": [GENERIC, {**PUSHER, "config": {"a": 1}}, TYPING]}))
    config.write("image")
    assert list(parser.asked[-1]["readers"]) == ["matrix-synapse-worker-1-pusher"]


def test_synapse_is_shown_the_operators_own_files(minion, config, parser):
    minion.run(minion.good_pillar({"workers:list": [GENERIC]}))
    minion.write("config/turn", SECRET)
    minion.write("config/templates/a/notice.html", "<p>")
    minion.write("config/.candidate-x/homeserver.yaml", "left")
    config.write("image")
    (asked,) = parser.asked
    assert {"turn", "templates/a/notice.html", "homeserver.yaml"} <= set(asked["files"])
    assert not [path for path in asked["files"] if "candidate" in path]
    assert (minion.directory / "config/turn").read_text() == SECRET


def test_synapse_is_shown_what_each_process_is_shown_and_no_other_argument(minion, config, parser):
    settings = {
        "process:arguments": ["--volume=/srv/all:/srv/all:ro", "--ip=172.29.88.9"],
        "workers:list": [GENERIC, {**PUSHER, "arguments": ["-v/srv/one:/srv/one:ro", "--env=A=b"]}],
        "appservices:bridge": {"registration": REGISTRATION, "arguments": ["--group-add=5", "--add-host=a:10.0.0.1"]},
    }
    minion.salt["synapse_image.wanted"] = lambda image: {**IMAGE, "pycache": "bytecode"}
    minion.run(minion.good_pillar(settings))
    config.write("image")
    base = minion.synapse_process.base_arguments("CANDIDATE")
    assert "--mount=type=volume,source=bytecode,target=/var/cache/python,readonly" in base
    added = []
    for asked in parser.asked:
        words = asked["command"][5 : asked["command"].index("--entrypoint=python3")]
        assert len(words[: len(base)]) == len(base)
        added.append((list(asked["readers"]), words[len(base) :]))
    assert added == [
        (PROCESSES[:2], ["--group-add=5", "--volume=/srv/all:/srv/all:ro"]),
        (PROCESSES[2:3], ["--group-add=5", "-v/srv/one:/srv/one:ro", "--env=A=b"]),
    ]


def test_what_synapse_does_not_accept_changes_nothing(minion, config, parser):
    minion.run(minion.good_pillar())
    config.write("image")
    before = texts(minion)
    parser.answer = {"retcode": 1, "stdout": "Error in configuration:\n  it is bad", "stderr": ""}
    minion.run(minion.good_pillar({"config:presence": "bad", "workers:list": [GENERIC]}))
    with pytest.raises(CommandExecutionError, match=r"does not accept the configuration:\n.*\n  it is bad"):
        config.write("image")
    assert texts(minion) == before


def spoil_owner(path):
    os.chown(path, 12345, -1)


def spoil_group(path):
    os.chown(path, -1, 12345)


def spoil_mode(path):
    os.chmod(path, 0o644)


SPOILERS = [spoil_owner, spoil_group, spoil_mode]


def attributes(path):
    there = os.stat(path)
    return there.st_uid, there.st_gid, stat.S_IMODE(there.st_mode)


OURS = (0, os.getgid(), 0o640)


@pytest.mark.parametrize("spoil", SPOILERS)
@pytest.mark.parametrize("name", ["config/homeserver.yaml", "data/roster.json", "config/accepted-by"])
def test_owner_group_and_mode_are_put_right_without_asking_synapse(minion, config, parser, spoil, name):
    minion.run(minion.good_pillar())
    config.write("image")
    before, digests, asked = texts(minion), config.digests(), list(parser.asked)
    spoil(minion.directory / name)
    assert relative(minion, config.pending()) == [name]
    assert relative(minion, config.write("image")) == [name]
    assert attributes(minion.directory / name) == OURS
    assert (texts(minion), config.digests(), parser.asked) == (before, digests, asked)
    assert config.pending() == []


def test_an_account_of_another_group_makes_every_file_pending(minion, config, parser):
    minion.run(minion.good_pillar())
    config.write("image")
    minion.salt["file.group_to_gid"] = lambda name: 12345
    assert config.pending() == [*config.files(), f"{minion.directory}/config/accepted-by"]


def test_no_umask_keeps_files_from_synapse(minion, config, parser):
    minion.run(minion.good_pillar())
    before = os.umask(0o077)
    try:
        config.write("image")
    finally:
        os.umask(before)
    assert {attributes(path) for path in config.files()} == {OURS}


LEFT = [
    "config/.candidate-x",
    "config/appservices/bridge.yaml.new",
    "config/homeserver.yaml.new",
    "config/workers/matrix-synapse-worker-0-generic.yaml.new",
    "data/roster.json.new",
    "data/secrets/form.new",
]


def test_what_a_killed_run_left_is_superfluous(minion, config, parser):
    minion.run(minion.good_pillar())
    config.write("image")
    minion.write("config/.candidate-x/homeserver.yaml", SECRET)
    for name in LEFT[1:]:
        minion.write(name, SECRET)
    assert relative(minion, config.superfluous()) == LEFT
    (minion.directory / "config/homeserver.yaml").unlink()
    assert relative(minion, config.superfluous()) == [name for name in LEFT if "homeserver.yaml" not in name]
    config.write("image")
    assert not (minion.directory / "config/homeserver.yaml.new").exists()


def test_another_image_is_asked_about_all_though_nothing_else_changed(minion, config, parser):
    minion.run(minion.good_pillar({"workers:list": WORKERS}))
    config.write("image")
    minion.salt["synapse_image.wanted"] = lambda image: {**IMAGE, "id": "sha256:4567"}
    assert relative(minion, config.pending()) == ["config/accepted-by"]
    parser.answer = {"retcode": 1, "stdout": "no", "stderr": ""}
    with pytest.raises(CommandExecutionError, match="does not accept"):
        config.write("image")
    assert relative(minion, config.pending()) == ["config/accepted-by"]
    parser.answer = {"retcode": 0, "stdout": "", "stderr": ""}
    assert relative(minion, config.write("image")) == ["config/accepted-by"]
    assert list(parser.asked[-1]["readers"]) == PROCESSES
    assert "sha256:4567" in parser.asked[-1]["command"]
    assert (minion.directory / "config/accepted-by").read_text() == "sha256:4567"
    assert config.pending() == []


def test_an_image_that_is_not_there_yet_is_foreseen(minion, config, parser):
    minion.run(minion.good_pillar())
    config.write("image")
    minion.salt["synapse_image.wanted"] = lambda image: {**IMAGE, "id": None}
    assert relative(minion, config.pending()) == ["config/accepted-by"]


def test_what_another_image_accepts_is_not_taken_for_accepted_by_the_wanted_one(minion, config, parser):
    minion.run(minion.good_pillar())
    config.write("other")
    assert relative(minion, config.pending()) == ["config/accepted-by"]


def test_a_job_gets_paths_alone(minion, config):
    minion.run(minion.good_pillar({"config:email": {"smtp_pass": SECRET}}))
    paths = list(config.files())
    assert SECRET in "".join(config.files().values())
    _, kwargs = salt.minion.load_args_and_kwargs(config.files, [], data={"fun": "synapse_config.files"})
    assert config.files(**kwargs) == paths


# The account


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ({}, []),
        ({"uid": 999, "gid": 998}, []),
        (
            {"uid": 1234},
            ["synapse:user:uid: 1234: the account synapse has 999 already; change it by hand while nothing runs"],
        ),
        (
            {"gid": 1234},
            ["synapse:user:gid: 1234: the group synapse has 998 already; change it by hand while nothing runs"],
        ),
    ],
)
def test_an_account_keeps_its_ids(minion, config, ids, expected):
    minion.salt |= {"file.user_to_uid": lambda name: 999, "file.group_to_gid": lambda name: 998}
    minion.run(minion.good_pillar({f"user:{key}": value for key, value in ids.items()}))
    assert config.faults() == expected
    minion.salt |= {"file.user_to_uid": lambda name: "", "file.group_to_gid": lambda name: ""}
    assert config.faults() == []


# What cannot be done to the homeserver that is there


def test_data_that_are_elsewhere_are_moved_by_hand(minion, config):
    minion.run(minion.good_pillar())
    write_everything(minion)
    minion.write("data/secrets/signing.key", OLD_KEY)
    assert config.faults() == []
    moved = minion.good_pillar({"server_name": "example.com", "directories:data": f"{minion.directory}/moved"})
    there = f'"{minion.directory}/moved": this homeserver\'s data are in {minion.directory}/data'
    right = "stop Synapse and move them by hand first"
    assert minion.run(moved).synapse_workers.validate() == [f"synapse:directories:data: {there}; {right}"]
    # A copy, or nothing left to move.
    minion.write("moved/secrets/signing.key", OLD_KEY)
    assert config.faults() == []
    minion.write("moved/secrets/signing.key", NEW_KEY)
    assert len(config.faults()) == 1
    (minion.directory / "data/secrets/signing.key").unlink()
    assert config.faults() == []


def test_a_docker_network_keeps_its_subnet(minion, config):
    minion.salt["cmd.run_stdout"] = lambda command, **kwargs: "172.29.88.0/24\nfd00::/64\n"
    assert minion.run(minion.good_pillar()).synapse_workers.validate() == []
    (line,) = minion.run(minion.good_pillar({"docker:network:subnet": "10.1.0.0/16"})).synapse_workers.validate()
    assert line.startswith(
        'synapse:docker:network:subnet: "10.1.0.0/16": the network matrix-synapse has 172.29.88.0/24'
    )


def test_a_network_is_asked_for_once_a_run_and_needs_no_engine(minion, config):
    asked = []

    def no_docker(command, **kwargs):
        asked.append(command)
        raise CommandExecutionError("no such program")

    minion.salt["cmd.run_stdout"] = no_docker
    minion.run(minion.good_pillar())
    assert config.faults() == config.faults() == []
    assert len(asked) == 1


# Secrets


@pytest.fixture
def secrets(minion):
    directory = minion.directory / "data/secrets"
    directory.mkdir(parents=True)
    return directory


NAMES = ["form", "macaroon", "registration", "replication", "signing.key"]


def test_missing_secrets_are_made_once_and_readable_by_synapse_alone(minion, config, secrets):
    minion.run(minion.good_pillar())
    assert sorted(config.pending_secrets()) == sorted(config.write_secrets()) == NAMES
    assert sorted(path.name for path in secrets.iterdir()) == NAMES
    assert {stat.S_IMODE(path.stat().st_mode) for path in secrets.iterdir()} == {0o640}
    made = [path.read_text() for path in secrets.iterdir()]
    assert len(set(made)) == len(made)
    assert min(map(len, made)) > 32
    assert config.pending_secrets() == config.write_secrets() == []
    assert [path.read_text() for path in secrets.iterdir()] == made


def test_a_new_signing_key_is_one_that_synapse_reads(minion, config, secrets):
    minion.run(minion.good_pillar())
    config.write_secrets()
    algorithm, version, seed = (secrets / "signing.key").read_text().split(" ")
    assert algorithm == "ed25519"
    assert re.fullmatch(r"a_[A-Za-z]{4}", version)
    assert len(base64.b64decode(seed.strip() + "=")) == 32
    assert (
        minion.run(
            minion.good_pillar({"signing_key:current": f"{algorithm} {version} {seed}"})
        ).synapse_workers.validate()
        == []
    )


def test_the_pillars_secrets_are_taken_and_stay_when_it_forgets_them(minion, config, secrets):
    minion.run(minion.good_pillar({"secrets:form": SECRET, "signing_key:current": NEW_KEY.strip()}))
    config.write_secrets()
    assert (secrets / "form").read_text() == SECRET
    assert (secrets / "signing.key").read_text() == NEW_KEY
    minion.run(minion.good_pillar())
    assert config.pending_secrets() == []


def test_an_empty_secret_is_made_anew_and_an_empty_signing_key_is_lost(minion, config, secrets):
    minion.run(minion.good_pillar())
    config.write_secrets()
    (secrets / "form").write_text("")
    assert config.pending_secrets() == config.write_secrets() == ["form"]
    assert (secrets / "form").read_text()
    (secrets / "signing.key").write_text("")
    assert config.pending_secrets() == []
    (line,) = config.faults()
    assert line.startswith(f"synapse:signing_key:current: is missing: {secrets}/signing.key is empty; put the key back")
    minion.run(minion.good_pillar({"signing_key:current": OLD_KEY}))
    assert config.faults() == []
    assert config.write_secrets() == ["signing.key"]
    assert (secrets / "signing.key").read_text() == OLD_KEY
    assert sorted(path.name for path in secrets.iterdir()) == NAMES


def test_what_replaces_a_file_is_on_the_disk_before(minion, config, secrets, monkeypatch):
    events = []
    fsync, replace = os.fsync, os.replace

    def syncs(descriptor):
        events.append(("sync", os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def replaces(source, target):
        events.append(("replace", target))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", syncs)
    monkeypatch.setattr(os, "replace", replaces)
    minion.run(minion.good_pillar())
    for name in config.write_secrets():
        path = f"{secrets}/{name}"
        assert [event for event in events if event[1] in (path, f"{path}.new")] == [
            ("sync", f"{path}.new"),
            ("replace", path),
        ]
    assert events[-1] == ("sync", str(secrets))


@pytest.mark.parametrize("spoil", SPOILERS)
@pytest.mark.parametrize("name", NAMES)
def test_a_secret_whose_owner_group_or_mode_is_put_right_stays(minion, config, secrets, spoil, name):
    minion.run(minion.good_pillar())
    config.write_secrets()
    before = {path.name: path.read_text() for path in secrets.iterdir()}
    spoil(secrets / name)
    assert config.pending_secrets() == config.write_secrets() == [name]
    assert attributes(secrets / name) == OURS
    assert {path.name: path.read_text() for path in secrets.iterdir()} == before


def test_the_pillars_secret_replaces_a_random_one(minion, config, secrets):
    minion.run(minion.good_pillar())
    config.write_secrets()
    minion.run(minion.good_pillar({"secrets:form": SECRET}))
    assert config.pending_secrets() == ["form"]
    assert config.write_secrets() == ["form"]
    assert (secrets / "form").read_text() == SECRET


def test_a_signing_key_is_replaced_only_if_the_old_one_is_named_and_is_kept_beside(minion, config, secrets):
    minion.write("data/secrets/signing.key", OLD_KEY)
    (line,) = minion.run(minion.good_pillar({"signing_key:current": NEW_KEY})).synapse_config.signing_key_faults()
    assert "signs with ed25519:a_old" in line
    assert config.faults() == [line]
    old = {"ed25519:a_old": {"key": "A" * 43, "expired_ts": 1}}
    minion.run(minion.good_pillar({"signing_key:current": NEW_KEY, "signing_key:old": old}))
    assert config.faults() == config.signing_key_faults() == []
    config.write_secrets()
    assert (secrets / "signing.key").read_text() == NEW_KEY
    assert (secrets / "signing.key.ed25519_a_old").read_text() == OLD_KEY


def test_the_same_signing_key_is_no_change(minion, config, secrets):
    minion.write("data/secrets/signing.key", OLD_KEY)
    minion.run(minion.good_pillar({"signing_key:current": OLD_KEY.strip()}))
    assert config.signing_key_faults() == []
    assert "signing.key" not in config.pending_secrets()
