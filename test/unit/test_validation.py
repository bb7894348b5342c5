"""
What is wrong with a pillar is said before anything is touched: where, what stands there, and what would be right.

Each row of the table is a pillar with one fault. "changes nothing" needs no proof here: to say what is wrong, nothing is
opened but files to read.
"""

import contextlib
import datetime
import hashlib
import json
import pathlib
import re
from collections import namedtuple

import pytest
import salt.minion
import salt.utils.yaml
from salt.exceptions import CommandExecutionError

ROOT = pathlib.Path(__file__).parents[2]
MASKED = "**********"
# Stands in every secret of this page: no message may hold it.
HUSH = "hush"
SECRET = "hush-0123456789abcdef"
SIGNING_KEY = f"ed25519 a_hush {HUSH:A<43}"
PUBLIC_KEY = "k" * 43
NO_SUCH_WORKER = "matrix-synapse-worker-7-pusher"

GENERIC = {"type": "generic"}
TYPING = {"type": "stream-writer", "stream": "typing"}
EVENTS = {"type": "stream-writer", "stream": "events"}
PUSHER = {"type": "pusher"}
REGISTRATION = {"url": None, "sender_localpart": "bot", "namespaces": {}}

Row = namedtuple("Row", "settings at words kept")


def row(settings, *words, at=None, kept=None):
    """
    A pillar with ``settings`` has one fault, at its last one or ``at``, which holds ``words``. ``kept`` is on the minion.
    """
    return Row(settings, at or list(settings)[-1], words, kept or {})


def workers(*entries, **others):
    return {**{f"workers:{key}": value for key, value in others.items()}, "workers:list": list(entries)}


def appservice(**changes):
    registration = {key: value for key, value in {**REGISTRATION, **changes}.items() if value is not ...}
    return {"appservices:bridge:registration": registration}


FORM = {
    "an unknown part": row({"wokers": {}}, "there is no such key", "did you mean workers?"),
    "an unknown key": row({"workers:lists": []}, "did you mean list?", "preset"),
    "a key without quotes": row({"config": {1: 2}}, "must be a string", "quotes", at="config:1"),
    "a key without quotes, deep": row({"config": {"a": [{"b": {2: 3}}]}}, "quotes", at="config:a:0:b:2"),
    "a part of nothing": row({"workers": None}, "null", "a mapping"),
    "a part of text": row({"user": "synapse"}, "a mapping"),
    "a list where a mapping is due": row({"nginx:client": ["8008"]}, "a mapping"),
    "a mapping where a list is due": row({"workers:list": GENERIC}, "a list"),
    "text for a truth": row({"metrics": "yes"}, "true or false"),
    "a number for a truth": row({"clean:remove_data": 1}, "true or false"),
}

IDENTITY = {
    "no server_name": row({"server_name": ...}, "is missing", "such as example.org"),
    "server_name of null": row({"server_name": None}, "such as example.org"),
    "server_name of nothing": row({"server_name": ""}, "such as example.org"),
    "server_name as a URL": row({"server_name": "https://example.org"}, "such as example.org"),
    "server_name with a sign that no domain has": row({"server_name": "my_server.org"}, "such as example.org"),
    "server_name with a port that is none": row({"server_name": "example.org:70000"}, "such as example.org"),
    "server_name of IPv6 without brackets": row({"server_name": "2001:db8::1"}, "such as example.org"),
    "server_name too long": row({"server_name": "a" * 231}, "such as example.org"),
    "server_name in digits that are not ASCII": row({"server_name": "example.org:٨٤٤٨"}, "such as example.org"),
    "server_name changed": row(
        {"server_name": "example.com"}, "it must stay example.org", kept={"roster": {"server_name": "example.org"}}
    ),
    "public_base_url without its scheme": row({"public_base_url": "matrix.example.org"}, "https://matrix.example.org"),
    "root": row({"user:name": "root"}, "does not run as root"),
    "root's group": row({"user:group": "root"}, "does not run as root"),
    "an account in capitals": row({"user:name": "Synapse"}, "lower-case"),
    "the id of root": row({"user:uid": 0}, "from 1 to 4294967294"),
    "an id in quotes": row({"user:gid": "991"}, "a whole number"),
    "an id of true": row({"user:uid": True}, "a whole number"),
}

DIRECTORIES = {
    "a relative directory": row({"directories:data": "var/synapse"}, "an absolute path"),
    "a directory with a space": row({"directories:data": "/srv/my synapse"}, "an absolute path", "letters"),
    "a directory that ends a Docker mount": row({"directories:data": "/srv/a,readonly"}, "an absolute path"),
    "a directory too long": row({"directories:config": "/a" * 200}, "at most 255 characters"),
    "a directory of everybody's": row({"directories:data": "/srv"}, "a directory of Synapse's own"),
    "a directory of the system's": row({"directories:config": "/etc/nginx"}, "a directory of Synapse's own"),
    "a directory of PostgreSQL's": row({"directories:data": "/var/lib/postgresql"}, "a directory of Synapse's own"),
    "a way out": row({"directories:data": "/srv/synapse/../../etc"}, "a directory of Synapse's own"),
    "one directory for two": row(
        {"directories:config": "/srv/synapse", "directories:data": "/srv/synapse"},
        "must not hold",
        at="directories:data",
    ),
    "one directory in the other": row(
        {"directories:data": "/srv/synapse/data", "directories:config": "/srv/synapse"},
        "must not hold synapse:directories:data",
        "/srv/synapse/data",
    ),
    "sockets too deep": row({"directories:run": "/run/" + "deep/" * 14 + "synapse"}, "102 bytes"),
    "sockets too deep for one worker": row(
        {
            **workers({"type": "stream-writer", "stream": "quarantined_media_changes"}),
            "directories:run": "/run/" + "d" * 24,
        },
        "quarantined-media-changes.sock has 106",
    ),
}

DOCKER = {
    "the host's network": row({"docker:network:name": "host"}, "of the formula's own"),
    "a public network": row({"docker:network:subnet": "8.8.8.0/24"}, "a private IPv4 network"),
    "a network without room": row({"docker:network:subnet": "10.0.0.0/30"}, "a private IPv4 network"),
    "a network with bits beside its mask": row({"docker:network:subnet": "10.0.0.1/24"}, "172.29.88.0/24"),
    "a network of IPv6": row({"docker:network:subnet": "fd00::/64"}, "a private IPv4 network"),
    "a package with options": row({"docker:package": "docker.io --yes"}, "a package's name"),
}

IMAGE = {
    "a version without quotes": row({"image:version": 1.163}, "such as v1.163.2"),
    "half a version": row({"image:version": "v1.163"}, "such as v1.163.2"),
    "a version of another image": row({"image:version": "v1.163.2-customized"}, "such as v1.163.2"),
    "a version in words": row({"image:version": "stable"}, "such as v1.163.2"),
    "the latest, self-built": row({"image:source": "build", "image:version": "latest"}, "needs a release"),
    "an unknown source": row({"image:source": "built"}, "did you mean build?"),
    "a repository with its tag": row({"image:repository": "matrixdotorg/synapse:v1.163.2"}, "without a tag"),
    "a short repository with its tag": row({"image:repository": "synapse:v1.163.2"}, "without a tag"),
    "a repository in capitals": row({"image:repository": "MatrixDotOrg/synapse"}, "such as matrixdotorg/synapse"),
    "a mirror without its scheme": row({"image:build:mirror": "deb.debian.org"}, "URL of a Debian mirror"),
    "extras in one string": row({"image:build:extras": "redis"}, "a list"),
    "an unknown module": row(
        {"image:customize:modules:s3-storage-provider": True}, "did you mean s3_storage_provider?"
    ),
    "a module of a version": row({"image:customize:modules:ldap3": "0.4.0"}, "true or false"),
    "Dockerfile steps in a list": row({"image:customize:dockerfile": ["RUN true"]}, "steps of a Dockerfile"),
    "a build argument of two lines": row({"image:build_arguments:A": "b\nRUN c"}, "in one line"),
    "a build argument with a hyphen": row({"image:build_arguments:A-B": "c"}, "the name must be"),
    "a certificate file by a relative path": row({"image:ca_certificates": "ca.pem"}, "an absolute path"),
}

PROCESSES = {
    "memory without a unit": row({"main:memory": "512"}, "with the unit M or G, from 64M"),
    "memory as a number": row({"main:memory": 536870912}, "with the unit M or G"),
    "memory that no Synapse fits in": row({"process:memory": "16M"}, "from 64M"),
    "memory that no machine has": row({"process:memory": "20000G"}, "to 16384G"),
    "memory of none": row({"process:memory": "0M"}, "from 64M"),
    "processors in words": row({"process:cpus": "two"}, "such as 1.5"),
    "no processor": row({"main:cpus": 0}, "from 0.01"),
    "processors that are no number": row({"main:cpus": float("nan")}, "such as 1.5"),
    "a log level in small letters": row({"process:log_level": "warning"}, "did you mean WARNING?"),
    "an unknown log level": row({"main:log_level": "TRACE"}, "DEBUG, INFO, WARNING"),
    "a logger without a level": row({"log:loggers:synapse.http": None}, "DEBUG, INFO"),
    "arguments in one string": row({"main:arguments": "--ulimit=nofile=65536"}, "a list"),
    "an argument that is no option": row(
        {"process:arguments": ["nofile=65536"]}, "such as --ulimit=nofile=65536", at="process:arguments:0"
    ),
    "an argument that names the container": row(
        {"main:arguments": ["--name=mine"]}, "none that the formula sets", at="main:arguments:0"
    ),
    "an argument that sets the identity": row(
        {"main:arguments": ["--ipc=private", "--user=0"]}, "none that the formula sets", at="main:arguments:1"
    ),
    "a value in the same string, but not after =": row(
        {"main:arguments": ["--ulimit nofile=65536"]}, "such as --ulimit=nofile=65536", at="main:arguments:0"
    ),
    **{
        f"an argument that undoes the formula, {argument}": row(
            {"main:arguments": [argument]}, "none that the formula sets", at="main:arguments:0"
        )
        for argument in (
            "--user 0",
            "-u0",
            "-iu0",
            "--init=false",
            "--read-only=false",
            "--network=host",
            "--net=host",
            "--cidfile=/tmp/id",
            "-d",
            "-it",
            "--tty",
            "--label=org.matrix.synapse.process.inputs=0",
            "-lorg.matrix.synapse.process=me",
            "--env=NOTIFY_SOCKET=/nowhere",
            "--env=PGAPPNAME",
            "-ePYTHONPYCACHEPREFIX=/nowhere",
        )
    },
    "an argument of two lines": row(
        {"main:arguments": ["--env=A=b\nExecStartPre=/bin/true"]}, "in one string", at="main:arguments:0"
    ),
    "no grace": row({"process:stop_grace": 0}, "from 1 to 3600"),
    "a timeout shorter than a start": row({"process:start_timeout": 5}, "from 10 to 86400"),
    "an interval of half a second": row({"process:health_interval": 0.5}, "a whole number"),
    "running in words": row({"process:running": "no"}, "true or false"),
    "an upload size as Synapse's documents never write it": row({"max_upload_size": "50MB"}, "such as 50M"),
    "an upload size as a date": row({"max_upload_size": {datetime.date(2026, 1, 1): None}}, "such as 50M"),
    "an upload size as a number": row({"max_upload_size": 52428800}, "such as 50M"),
}

WORKERS = {
    "an unknown preset": row({"workers:preset": "one_of_each_type"}, "did you mean one-of-each?"),
    "two presets": row({"workers:preset": ["one-of-each"]}, "did you mean one-of-each?"),
    "no type": row(workers({"count": 2}), "is missing", "generic", at="workers:list:0:type"),
    "an unknown type": row(workers(GENERIC, {"type": "generik"}), "did you mean generic?", at="workers:list:1:type"),
    "an unknown type, far from any": row(workers({"type": "x"}), "known are generic", at="workers:list:0:type"),
    "the playbook's type": row(workers({"type": "user_dir"}), "is called user-directory", at="workers:list:0:type"),
    "a type in a list": row(workers({"type": ["generic"]}), "did you mean generic?", at="workers:list:0:type"),
    "a worker that is a word": row(workers("generic"), "a mapping", at="workers:list:0"),
    "a worker that is nothing": row(workers(None), "a mapping", at="workers:list:0"),
    "an unknown option": row(workers({**GENERIC, "cuont": 2}), "did you mean count?", at="workers:list:0:cuont"),
    "a writer without a stream": row(
        workers({"type": "stream-writer"}), "is missing", "typing", at="workers:list:0:stream"
    ),
    "an unknown stream": row(
        workers({"type": "stream-writer", "stream": "to-devices"}),
        "did you mean to_device?",
        at="workers:list:0:stream",
    ),
    "a stream of null": row(workers({**TYPING, "stream": None}), "one of events", at="workers:list:0:stream"),
    "a stream where none is written": row(
        workers({**GENERIC, "stream": "typing"}), "only a stream-writer has a stream", at="workers:list:0:stream"
    ),
    "fewer than none": row(workers({**GENERIC, "count": -1}), "from 0 to 512", at="workers:list:0:count"),
    "more than any": row(workers({**GENERIC, "count": 513}), "from 0 to 512", at="workers:list:0:count"),
    "a count in quotes": row(workers({**GENERIC, "count": "2"}), "a whole number", at="workers:list:0:count"),
    "one and a half": row(workers({**GENERIC, "count": 1.5}), "a whole number", at="workers:list:0:count"),
    "more than a host bears": row(
        workers(*[{**GENERIC, "count": 512}] * 2, PUSHER), "1025", "1024 workers at most", at="workers"
    ),
    "two of a kind that is one": row(
        workers({"type": "background", "count": 2}), "Synapse allows 1, and there are 2", at="workers:list:0:type"
    ),
    "one twice": row(
        workers({"type": "appservice"}, GENERIC, {"type": "appservice"}),
        "Synapse allows 1, and there are 2",
        at="workers:list:2:type",
    ),
    "one in the preset and one in the list": row(
        workers({"type": "user-directory"}, preset="one-of-each"), "there are 2 workers", at="workers:list:0:type"
    ),
    "two writers of a stream that has one": row(
        workers({**TYPING, "count": 2}), "Synapse allows 1, and there are 2 writers", at="workers:list:0:stream"
    ),
    "a writer twice": row(
        workers(TYPING, EVENTS, {**TYPING, "memory": "1G"}), "there are 2 writers", at="workers:list:2:stream"
    ),
    "a writer in the preset and one in the list": row(
        workers(EVENTS, {"type": "stream-writer", "stream": "push_rules"}, preset="specialized-workers"),
        "there are 2 writers",
        at="workers:list:1:stream",
    ),
    "a worker's memory": row(workers({**GENERIC, "memory": "1GB"}), "M or G", at="workers:list:0:memory"),
    "a worker's config in a list": row(workers({**GENERIC, "config": []}), "a mapping", at="workers:list:0:config"),
    "a worker's own name": row(
        workers({**GENERIC, "config": {"worker_name": "me"}}),
        "the formula sets it",
        at="workers:list:0:config:worker_name",
    ),
    "a worker's own listeners": row(
        workers({**GENERIC, "config": {"worker_listeners": [{"port": 8083}]}}),
        "the formula sets it",
        at="workers:list:0:config:worker_listeners",
    ),
    "a worker's own opinion of who writes": row(
        workers({**GENERIC, "config": {"stream_writers": {"events": "master"}}}),
        "it belongs into synapse:config",
        at="workers:list:0:config:stream_writers",
    ),
    "a worker as a daemon": row(
        workers({**GENERIC, "config": {"worker_daemonize": True}}),
        "leave it out",
        at="workers:list:0:config:worker_daemonize",
    ),
    "a worker without Redis": row(
        workers({**GENERIC, "config": {"redis": {"enabled": False}}}),
        "since there are workers",
        at="workers:list:0:config:redis:enabled",
    ),
    "a secret in a worker's config": row(
        workers({**GENERIC, "config": {"worker_replication_secret": SECRET}}),
        "synapse:secrets:replication",
        at="workers:list:0:config:worker_replication_secret",
    ),
}

CONFIG = {
    "listeners": row({"config:listeners": [{"port": 8008}]}, "the formula sets it"),
    "a log config": row({"config:log_config": "/etc/log.yaml"}, "the formula sets it"),
    "the server's name": row({"config:server_name": "example.org"}, "synapse:server_name"),
    "registrations": row({"config:app_service_config_files": ["/etc/bridge.yaml"]}, "synapse:appservices"),
    "a secret with a place of its own": row({"config:macaroon_secret_key": SECRET}, "synapse:secrets:macaroon"),
    "a secret's file": row({"config:form_secret_path": "/etc/hush"}, "synapse:secrets:form"),
    "a signing key": row({"config:signing_key": SIGNING_KEY}, "synapse:signing_key:current"),
    "an upload size for Synapse alone": row({"config:max_upload_size": "100M"}, "belongs into synapse:max_upload_size"),
    "a URL for Synapse alone": row({"config:public_baseurl": "https://a.b/"}, "belongs into synapse:public_base_url"),
    "a media store elsewhere": row({"config:media_store_path": "/srv/media"}, "synapse:directories:data"),
    "a daemon": row({"config:daemonize": True}, "leave it out"),
    "workers as daemons": row({"config:worker_daemonize": True}, "leave it out"),
    "workers without Redis": row(
        {"workers:list": [GENERIC], "config:redis": {"enabled": False}},
        "since there are workers",
        at="config:redis:enabled",
    ),
    "workers with a Redis of nothing": row({"workers:list": [GENERIC], "config:redis": None}, "a mapping"),
    "a ghost that pushes": row(
        {"workers:list": [PUSHER], "config:pusher_instances": ["matrix-synapse-worker-0-pusher", NO_SUCH_WORKER]},
        NO_SUCH_WORKER,
        "did you mean matrix-synapse-worker-0-pusher?",
    ),
    "a ghost that sends": row({"config:federation_sender_instances": [NO_SUCH_WORKER]}, NO_SUCH_WORKER, "no process"),
    "nobody who sends": row({"config:federation_sender_instances": []}, "not be empty"),
    "a ghost in the background": row(
        {"config:run_background_tasks_on": NO_SUCH_WORKER}, "no process", "known are master"
    ),
    "two in the background": row({"config:run_background_tasks_on": ["master"]}, "the name of a process"),
    "a ghost for appservices": row({"config:notify_appservices_from_worker": NO_SUCH_WORKER}, "no process"),
    "a ghost of a directory": row({"config:update_user_directory_from_worker": NO_SUCH_WORKER}, "no process"),
    "a ghost that looks after media": row(
        {"config:media_instance_running_background_jobs": NO_SUCH_WORKER}, "no process"
    ),
    "a ghost as proxy": row({"config:outbound_federation_restricted_to": [NO_SUCH_WORKER]}, "no process"),
    "main as proxy": row({"config:outbound_federation_restricted_to": ["main"]}, "no process bears this name"),
    "proxies by number": row({"config:outbound_federation_restricted_to": 2}, "a list of names"),
    "a ghost that writes": row({"config:stream_writers:typing": NO_SUCH_WORKER}, "no process bears this name"),
    "a ghost beside a writer": row({"config:stream_writers:events": ["master", NO_SUCH_WORKER]}, NO_SUCH_WORKER),
    "main by its other name": row({"config:stream_writers:typing": ["main"]}, "no process bears this name", "master"),
    "a stream nobody knows": row({"config:stream_writers:typin": "master"}, "no such stream", "did you mean typing?"),
    "two writers in the operator's own words": row(
        {"workers:list": [GENERIC], "config:stream_writers:typing": ["master", "matrix-synapse-worker-0-generic"]},
        "Synapse allows one writer",
    ),
    "main in place of a writer": row(
        {"workers:list": [TYPING], "config:stream_writers:typing": "master"},
        "by matrix-synapse-worker-0-stream-writer-typing: leave",
    ),
    "the writer of another stream": row(
        {
            "workers:list": [TYPING, EVENTS],
            "config:stream_writers:typing": "matrix-synapse-worker-1-stream-writer-events",
        },
        "by matrix-synapse-worker-0-stream-writer-typing: leave",
        "add or remove an entry",
    ),
    "a writer that is none in the plan": row(
        {"workers:list": [GENERIC], "config:stream_writers:events": ["matrix-synapse-worker-0-generic"]},
        "written by master",
    ),
    "one writer of two": row(
        {
            "workers:list": [{**EVENTS, "count": 2}],
            "config:stream_writers:events": ["matrix-synapse-worker-1-stream-writer-events"],
        },
        "matrix-synapse-worker-0-stream-writer-events and matrix-synapse-worker-1-stream-writer-events: leave it out",
    ),
    "a writer by number": row({"config:stream_writers:typing": [{}]}, "the name of a process"),
    "writers in a list": row({"config:stream_writers": ["events"]}, "a mapping"),
    "a map of instances in a list": row({"config:instance_map": []}, "a mapping"),
    "main's address": row({"config:instance_map:main": {"host": "localhost"}}, "the formula sets it"),
    "config in lines": row({"config": "smtp_pass: hush"}, "a mapping"),
}

SECRETS = {
    "a secret too short": row({"secrets:replication": "hush"}, "16 to 1024"),
    "a masked secret": row({"secrets:macaroon": MASKED}, "not the mask"),
    "a secret with a space": row({"secrets:form": "hush hush hush hush"}, "without a space"),
    "a secret of digits": row({"secrets:registration": 1234567890123456}, "16 to 1024"),
    "a secret of nothing": row({"secrets:replication": None}, "16 to 1024"),
    "an unknown secret": row({"secrets:macaron": SECRET}, "did you mean macaroon?"),
    "secrets in one": row({"secrets": SECRET}, "a mapping"),
    "secrets in a list": row({"secrets": [{"form": SECRET}]}, "a mapping"),
    "a signing key without its name": row({"signing_key:current": f"{HUSH:A<43}"}, "ed25519 a_NAME"),
    "a masked signing key": row({"signing_key:current": MASKED}, "not the mask"),
    "a signing key where keys are": row({"signing_key": SIGNING_KEY}, "a mapping"),
    "the signing key replaced": row(
        {"signing_key:current": SIGNING_KEY},
        "this homeserver signs with ed25519:a_old",
        "synapse:signing_key:old",
        kept={"data/secrets/signing.key": f"ed25519 a_old {HUSH:B<43}\n"},
    ),
    "an old key without its algorithm": row(
        {"signing_key:old": {"a_old": {"key": PUBLIC_KEY, "expired_ts": 1}}},
        "ed25519:a_ABCD",
        at="signing_key:old:a_old",
    ),
    "an old key without its end": row(
        {"signing_key:old": {"ed25519:a_old": {"key": PUBLIC_KEY}}},
        "is missing",
        at="signing_key:old:ed25519:a_old:expired_ts",
    ),
    "an old key that is private": row(
        {"signing_key:old": {"ed25519:a_old": {"key": "short", "expired_ts": 1}}},
        "43 characters of base64",
        at="signing_key:old:ed25519:a_old:key",
    ),
}

EXTERNAL = {"postgres:managed": False, "postgres:host": "db.example.org", "postgres:password": SECRET}

DATABASES = {
    "PostgreSQL before our time": row({"postgres:version": 9}, "from 13 to 99"),
    "a host for the formula's own PostgreSQL": row(
        {"postgres:host": "db.example.org"}, "synapse:postgres:managed to be false"
    ),
    "a password for the formula's own PostgreSQL": row({"postgres:password": SECRET}, "Unix socket"),
    "an external PostgreSQL nowhere": row({**EXTERNAL, "postgres:host": None}, "needs a host", at="postgres:host"),
    "an external PostgreSQL without a password": row({**EXTERNAL, "postgres:password": None}, "is missing", "network"),
    "an external PostgreSQL with a masked password": row({**EXTERNAL, "postgres:password": MASKED}, "not the mask"),
    "an external PostgreSQL by URL": row(
        {**EXTERNAL, "postgres:host": "postgres://db"}, "a host name", at="postgres:host"
    ),
    "a password of two lines": row({**EXTERNAL, "postgres:password": "hush\nhush"}, "in one line"),
    "passwords in a list": row({"postgres": [{"password": SECRET}]}, "a mapping"),
    "a role that is not the account": row({"postgres:user": "matrix"}, "peer authentication", "synapse"),
    "a database of PostgreSQL's own": row({"postgres:database": "postgres"}, "of Synapse's own"),
    "a database with a quote": row({"postgres:database": "synapse'"}, "of Synapse's own"),
    "a port that is none": row({"postgres:port": 65536}, "from 1 to 65535"),
    "more connections at least than at most": row({"postgres:connections:min": 11}, "at most", "10"),
    "fewer connections than processes need": row(
        {"workers:preset": "one-of-each", "postgres:options:max_connections": 100}, "from 200"
    ),
    "connections in words": row({"postgres:options:max_connections": "many"}, "from 100"),
    "more connections than PostgreSQL takes": row(
        {**workers({**GENERIC, "count": 500}), "postgres:connections:max": 1000}, "PostgreSQL allows 262143"
    ),
    "an option of two values": row({"postgres:options:shared_buffers": ["1GB"]}, "one string, number or boolean"),
    "an option's name in capitals": row({"postgres:options:Shared-Buffers": "1GB"}, "the name must be"),
    "an external Redis nowhere": row({"redis:managed": False}, "is missing", "needs a host", at="redis:host"),
    "a password for the formula's own Redis": row({"redis:password": SECRET}, "Unix socket"),
}

NGINX = {
    "no listener": row({"nginx:client:listen": []}, "at least one item"),
    "a listener by name": row({"nginx:client:listen": ["localhost:8008"]}, "ADDRESS:PORT", at="nginx:client:listen:0"),
    "a listener without a port": row({"nginx:client:listen": ["[::1]"]}, "ADDRESS:PORT", at="nginx:client:listen:0"),
    "a listener on port 0": row({"nginx:client:listen": ["127.0.0.1:0"]}, "ADDRESS:PORT", at="nginx:client:listen:0"),
    "a listener in a zone": row(
        {"nginx:client:listen": ["[fe80::1%;]:80"]}, "ADDRESS:PORT", at="nginx:client:listen:0"
    ),
    "a listener twice": row(
        {"nginx:client:listen": ["[::1]:8008", "[0:0:0:0:0:0:0:1]:8008"]},
        "it collides with",
        at="nginx:client:listen:1",
    ),
    "a listener on the other server's": row(
        {"nginx:federation:listen": ["127.0.0.1:8008"]},
        "it collides with synapse:nginx:client:listen:0",
        at="nginx:federation:listen:0",
    ),
    "a listener everywhere": row(
        {"nginx:client:listen": [8448]},
        "it collides with synapse:nginx:client:listen:0",
        at="nginx:federation:listen:0",
    ),
    "TLS without a key": row({"nginx:client:tls": {"certificate": "/a.pem"}}, "is missing", at="nginx:client:tls:key"),
    "TLS by a switch": row({"nginx:client:tls": True}, "a mapping"),
    "TLS of no absolute path": row(
        {"nginx:federation:tls": {"certificate": "/a.pem", "key": "b.pem"}},
        "an absolute path",
        at="nginx:federation:tls:key",
    ),
    "TLS that ends nginx's directive": row(
        {"nginx:client:tls": {"certificate": "/a.pem; autoindex on", "key": "/b.pem"}},
        "an absolute path",
        at="nginx:client:tls:certificate",
    ),
    "everybody an admin": row({"nginx:admin_allow": ["all"]}, "an IP address, or a network", at="nginx:admin_allow:0"),
    "admins by name": row(
        {"nginx:admin_allow": ["127.0.0.1", "admin.example.org"]}, "an IP address", at="nginx:admin_allow:1"
    ),
    "admins in a string": row({"nginx:admin_allow": "127.0.0.1"}, "a list"),
    "admins of a network with bits beside its mask": row(
        {"nginx:admin_allow": ["10.0.0.1/8"]}, "such as 10.0.0.0/8", at="nginx:admin_allow:0"
    ),
    "a proxy by number": row({"nginx:trusted_proxies": [127]}, "an IP address", at="nginx:trusted_proxies:0"),
    "what is well known, in words": row({"nginx:well_known:server": "matrix.example.org:443"}, "a mapping"),
    "no logins at all": row({"nginx:limits:login:rate": 0}, "a whole number from 1"),
    "half a login": row({"nginx:limits:login:rate": 0.5}, "a whole number"),
    "a limit without its parts": row({"nginx:limits:login": 5}, "a mapping"),
    "a limit switched off by a word": row({"nginx:limits:open_requests": False}, "a whole number from 1 to 65535"),
    "a limit that nginx can't count": row({"nginx:limits:uploads:all": 65536}, "from 1 to 65535"),
    "a limit of nothing known": row({"nginx:limits:connections": 10}, "there is no such key"),
    "everybody exempt": row({"nginx:limits:exempt": ["all"]}, "an IP address", at="nginx:limits:exempt:0"),
    "no time for a header": row({"nginx:limits:header_timeout": None}, "a whole number from 1 to 3600"),
    "a header of a few bytes": row({"nginx:limits:header_size": "1K"}, "from 4K to 1M"),
    "a media cache by a switch": row({"nginx:media_cache": True}, "such as 1G"),
    "a media cache without a unit": row({"nginx:media_cache": 1024}, "such as 1G"),
    "a media cache that ends nginx's directive": row({"nginx:media_cache": "1G; autoindex on"}, "such as 1G"),
    "nginx's account in capitals": row({"nginx:user": "WWW"}, "lower-case"),
}

APPSERVICES = {
    "appservices in a list": row({"appservices": [{"registration": {"as_token": SECRET}}]}, "a mapping"),
    "an appservice's name in capitals": row({"appservices": {"Bridge": {}}}, "lower-case", at="appservices:Bridge"),
    "an appservice of nothing": row({"appservices:bridge": {}}, "either registration or file"),
    "an appservice twice": row(
        {"appservices:bridge": {"file": "/b.yaml", "registration": {"as_token": SECRET}}}, "either registration or file"
    ),
    "an unknown key of an appservice": row({"appservices:bridge:registraton": {}}, "did you mean registration?"),
    "an appservice's relative file": row({"appservices:bridge:file": "bridge.yaml"}, "salt://"),
    "an appservice's file that is not there": row(
        {"appservices:bridge:file": "/nonexistent/bridge.yaml"},
        "No such file",
        at="appservices:bridge:file (/nonexistent/bridge.yaml)",
    ),
    "a registration in text": row({"appservices:bridge:registration": f"as_token: {SECRET}"}, "a mapping"),
    "a registration without url": row(
        appservice(url=...), "is missing", "or null", at="appservices:bridge:registration:url"
    ),
    "a registration without a sender": row(
        appservice(sender_localpart=...), "is missing", at="appservices:bridge:registration:sender_localpart"
    ),
    "a registration without namespaces": row(
        appservice(namespaces=...), "is missing", at="appservices:bridge:registration:namespaces"
    ),
    "a registration by another name": row(
        appservice(id="bot"), "registered by, bridge", at="appservices:bridge:registration:id"
    ),
    "an unknown namespace": row(
        appservice(namespaces={"user": []}), "did you mean users?", at="appservices:bridge:registration:namespaces:user"
    ),
    "a regex that is none": row(
        appservice(namespaces={"users": [{"exclusive": True, "regex": "@(.*"}]}),
        "no regular expression",
        at="appservices:bridge:registration:namespaces:users:0:regex",
    ),
    "a token too short": row(appservice(as_token="hush"), "16 to 1024", at="appservices:bridge:registration:as_token"),
    "a masked token": row(appservice(hs_token=MASKED), "not the mask", at="appservices:bridge:registration:hs_token"),
    "one token for both": row(
        appservice(as_token=SECRET, hs_token=SECRET),
        "each token must be another",
        at="appservices:bridge:registration:hs_token",
    ),
    "one user for two": row(
        {"appservices:a:registration": REGISTRATION, "appservices:b:registration": REGISTRATION},
        "each appservice needs a user of its own",
        at="appservices:b:registration:sender_localpart",
    ),
    "an appservice's argument that sets the identity": row(
        {**appservice(), "appservices:bridge:arguments": ["--user=0"]},
        "none that the formula sets",
        at="appservices:bridge:arguments:0",
    ),
}

TABLE = {
    f"{part}: {name}": found
    for part, rows in {
        "form": FORM,
        "identity": IDENTITY,
        "directories": DIRECTORIES,
        "docker": DOCKER,
        "image": IMAGE,
        "processes": PROCESSES,
        "workers": WORKERS,
        "config": CONFIG,
        "secrets": SECRETS,
        "databases": DATABASES,
        "nginx": NGINX,
        "appservices": APPSERVICES,
    }.items()
    for name, found in rows.items()
}


def keep(minion, kept):
    for path, content in kept.items():
        if path == "roster":
            minion.keep_roster(content)
        else:
            minion.write(path, content)


def value_at(pillar, path):
    """The value at a path of the pillar, of which a part may hold a colon itself; ``...`` if nothing stands there."""
    if not path:
        return pillar
    items = dict(enumerate(pillar)) if isinstance(pillar, list) else pillar if isinstance(pillar, dict) else {}
    for key, value in items.items():
        if path == str(key) or path.startswith(f"{key}:"):
            return value_at(value, path[len(str(key)) + 1 :])
    return ...


# What a message says in place of a value: it is the key that is wrong, nothing stands there, or nobody may read it.
WITHOUT_VALUE = (
    "there is no such",
    "the name must be",
    "a key must be",
    "is missing",
    "it needs either",
    "No such file",
    "1025",  # the number of all workers
    "(a secret, not shown)",
)
KINDS = {dict: "a mapping", list: "a list", str: "a string"}


def shows(line, value):
    shown = [str(value), KINDS.get(type(value), "a value")]
    with contextlib.suppress(TypeError):
        shown.append(json.dumps(value, default=str, ensure_ascii=False)[:100])
    if isinstance(value, list):
        # Of several names, the wrong one is told.
        shown += map(json.dumps, value)
    return any(f": {text}" in line for text in shown) or any(f": {text}" in line for text in WITHOUT_VALUE)


@pytest.mark.parametrize("case", TABLE.values(), ids=TABLE)
def test_a_pillar_with_a_fault_is_told_where_what_and_what_would_be_right(minion, case):
    keep(minion, case.kept)
    pillar = minion.good_pillar(case.settings)
    (line,) = minion.run(pillar).synapse_workers.validate()
    assert line.startswith(f"synapse:{case.at}: ")
    assert [word for word in case.words if word not in line] == []
    assert shows(line, value_at(minion.synapse_pillar.settings(), case.at))
    assert HUSH not in line.removeprefix(f"synapse:{case.at}")
    with pytest.raises(CommandExecutionError, match=re.escape(line)):
        minion.synapse_workers.plan()


def test_the_table_is_long_enough():
    assert len(TABLE) >= 60


@pytest.mark.parametrize("pillar", [None, [], "server_name: example.org", 5, False])
def test_a_pillar_that_is_no_mapping_is_told_so(minion, pillar):
    (line,) = minion.run(pillar).synapse_workers.validate()
    assert line.startswith("synapse: ")
    assert "a mapping with at least server_name; see pillar.example" in line
    with pytest.raises(CommandExecutionError, match="see pillar.example"):
        minion.synapse_workers.plan()


def test_no_pillar_at_all_is_told_so(minion):
    minion.run(None).pillar.clear()
    (line,) = minion.synapse_workers.validate()
    assert "see pillar.example" in line


@pytest.mark.parametrize("hash_type", ["sha256", "sha512", "md5"])
def test_a_module_is_out_of_date_if_the_file_server_has_another_by_whatever_digest(minion, monkeypatch, hash_type):
    source = "_modules/synapse_workers.py"
    served = {"hsum": hashlib.new(hash_type, (ROOT / source).read_bytes()).hexdigest(), "hash_type": hash_type}
    monkeypatch.setitem(minion.synapse_workers.__opts__, "extension_modules", str(minion.directory))
    minion.salt |= {"cp.list_master": lambda prefix: [source][: prefix in source], "cp.hash_file": lambda url: served}
    changed = f"{source} changed since the minion synced it: run `salt-call saltutil.sync_all` first"
    assert minion.synapse_workers.outdated_modules() == [changed]
    minion.write("modules/synapse_workers.py", (ROOT / source).read_text())
    assert minion.synapse_workers.outdated_modules() == []
    minion.write("modules/synapse_workers.py", "# of before\n")
    assert minion.synapse_workers.outdated_modules() == [changed]


def test_all_faults_are_told_at_once(minion):
    settings = {
        "server_name": "a b",
        "wokers": {},
        "workers:list": [{"type": "generik"}, {"type": "generic", "count": -1}],
        "secrets:form": "hush",
        "image:version": 1,
    }
    found = minion.run(minion.good_pillar(settings)).synapse_workers.validate()
    assert sorted(line.split(": ")[0] for line in found) == [
        "synapse:image:version",
        "synapse:secrets:form",
        "synapse:server_name",
        "synapse:wokers",
        "synapse:workers:list:0:type",
        "synapse:workers:list:1:count",
    ]
    with pytest.raises(CommandExecutionError) as raised:
        minion.synapse_workers.plan()
    assert all(f"\n- {line}" in str(raised.value) for line in found)


def test_all_faults_between_settings_are_told_at_once(minion):
    minion.keep_roster({"server_name": "example.com"})
    settings = {
        "config": {"listeners": [], "form_secret": SECRET},
        "workers:list": [{**TYPING, "count": 2}, {"type": "pusher", "stream": "events"}],
        "appservices": {"bridge": {}},
    }
    found = minion.run(minion.good_pillar(settings)).synapse_workers.validate()
    assert [line.split(": ")[0] for line in found] == [
        "synapse:workers:list:1:stream",
        "synapse:workers:list:0:stream",
        "synapse:config:listeners",
        "synapse:config:form_secret",
        "synapse:server_name",
        "synapse:appservices:bridge",
    ]


def test_a_roster_that_cannot_be_read_stops_everything(minion):
    for text in ("{", "[]", '"\ud7ff'):
        minion.write("data/roster.json", text)
        with pytest.raises(CommandExecutionError, match=r"roster\.json.*put it back from a backup"):
            minion.plan()


GOOD = {
    "the least": {},
    "a server without a domain": {"server_name": "[2001:db8::1]:8448"},
    "every preset, and more": {"workers:preset": "one-of-each", "workers:list": [GENERIC, EVENTS, PUSHER]},
    "limits": {
        "main": {"memory": "2G", "cpus": 1.5},
        "process:memory": "512M",
        "workers:list": [{**GENERIC, "memory": None}],
    },
    "arguments of all kinds": {
        "process:arguments": [
            "--volume=/srv/turn:/srv/turn:ro",
            "-v/srv/a b:/srv/b",
            "--network-alias=synapse",
            "--ulimit=nofile=65536",
            "--label=org.example.backup=no",
            "--env=LANG=C.UTF-8",
            "--env=PGAPPNAMES=a=b",
            "-m1g",
            "--privileged",
        ]
    },
    "none of them": workers({**GENERIC, "count": 0}, {**TYPING, "count": 0}, TYPING),
    "both kinds of IP": {"nginx:client:listen": ["8008", "[::]:8008"], "nginx:federation:listen": [8448, "[::]:8448"]},
    "colliding listeners of nobody": {"nginx:managed": False, "nginx:federation:listen": ["127.0.0.1:8008"]},
    "no limits, and media kept": {
        "nginx:limits": {"login": None, "open_requests": None, "uploads": None, "exempt": ["192.0.2.0/24"]},
        "nginx:media_cache": "10G",
    },
    "an external database": EXTERNAL,
    "an external database by its socket": {"postgres:managed": False, "postgres:host": "/run/postgresql-17"},
    "an external Redis": {"redis:managed": False, "redis:host": "::1"},
    "main by its name": {"config": {"stream_writers": {"typing": "master"}, "run_background_tasks_on": "master"}},
    "writers as the plan has them": {
        "workers:list": [TYPING, EVENTS],
        "config:stream_writers": {
            "typing": ["matrix-synapse-worker-0-stream-writer-typing"],
            "events": ["matrix-synapse-worker-1-stream-writer-events", "far"],
        },
        "config:instance_map": {"far": {"host": "b", "port": 1}},
    },
    "a proxy": {
        "workers:list": [GENERIC],
        "config:outbound_federation_restricted_to": ["matrix-synapse-worker-0-generic"],
    },
    "a worker elsewhere": {"config": {"instance_map": {"far": {"host": "b", "port": 1}}, "pusher_instances": ["far"]}},
    "no proxies": {"config:outbound_federation_restricted_to": None},
    "no Redis for main alone": {"workers:list": [{**GENERIC, "count": 0}], "config:redis": {"enabled": False}},
    "a tuned Redis": {"workers:list": [GENERIC], "config:redis": {"dbid": 1}},
    "null and numbers": {"config": {"presence": None, "rc_message": {"per_second": 0.2, "burst_count": 10}}},
    "a signing key in a block": {"signing_key:current": SIGNING_KEY + "\n"},
    "a signing key replaced": {
        "signing_key:current": SIGNING_KEY,
        "signing_key:old": {"ed25519:a_old": {"key": PUBLIC_KEY, "expired_ts": 1}},
    },
    "enough connections": {"workers:preset": "one-of-each", "postgres:options:max_connections": "200"},
    "a registry with its port": {"image:repository": "registry.example:5000/synapse"},
}


@pytest.mark.parametrize("settings", GOOD.values(), ids=GOOD)
def test_a_good_pillar_has_no_fault(minion, settings):
    minion.write(
        "data/secrets/signing.key", f"ed25519 a_{'old' if 'signing_key:old' in settings else 'hush'} {HUSH:A<43}\n"
    )
    assert minion.run(minion.good_pillar(settings)).synapse_workers.validate() == []


EXAMPLE = (ROOT / "pillar.example").read_text(encoding="utf-8")


def test_the_example_has_no_fault(minion):
    pillar = salt.utils.yaml.safe_load(EXAMPLE)["synapse"]
    assert minion.run({**pillar, "directories": minion.directories}).synapse_workers.validate() == []


def test_the_example_shows_every_setting_and_each_is_right(minion):
    def settings(mapping, path=""):
        for key, value in mapping.items():
            yield path + key
            if isinstance(value, dict):
                yield from settings(value, f"{path}{key}:")

    known = minion.synapse_pillar.knowledge()
    # A comment's text begins with one space or stands in deeper lines; a setting follows the sign at once, or indented.
    shown = re.sub(r'^(\s*)#(?! \S)(\s*(?:- )?[\w".@:-]+:(?: .*)?)$', r"\1\2", EXAMPLE, flags=re.MULTILINE)
    pillar = salt.utils.yaml.safe_load(shown)["synapse"]
    assert minion.synapse_pillar.check(pillar, known["schema"]["pillar"], "synapse", known) == []
    assert sorted(set(settings(known["defaults"])) - set(settings(pillar))) == []


FORMER_ENTRIES = [
    {"id": "generic-worker-0", "type": "generic_worker", "name": "matrix-synapse-worker-generic-0", "port": 18111},
    {"id": "generic-worker-1", "type": "generic_worker", "name": "matrix-synapse-worker-generic-1", "port": 18112},
    {"type": "stream_writer", "stream_writer_stream": "to_device", "port": 0, "metrics_port": 19111},
    {"type": "user_dir", "webserving": True},
    {"type": "pusher", "port": 0},
]
FORMER_LIST = [
    {"type": "generic", "count": 2},
    {"type": "stream-writer", "stream": "to_device"},
    {"type": "user-directory"},
    {"type": "pusher"},
]
FORMER_NAMES = [
    "matrix-synapse-worker_generic_worker-18111",
    "matrix-synapse-worker-generic-worker-1",
    "matrix-synapse-worker-stream-writer-0-stream-to_device",
    "matrix-synapse-worker_user_dir-0",
    "matrix-synapse-worker-pusher-0",
]

FORMER = {
    "beside": ({"matrix_synapse_workers_enabled_list": FORMER_ENTRIES}, {}, "matrix_synapse_workers_enabled_list"),
    "by names, beside": (
        {"matrix_synapse_workers_enabled_list": FORMER_NAMES},
        {},
        "matrix_synapse_workers_enabled_list",
    ),
    "inside": (
        {},
        {"matrix_synapse_workers_enabled_list": FORMER_ENTRIES},
        "synapse:matrix_synapse_workers_enabled_list",
    ),
    "as workers": ({}, {"workers": FORMER_ENTRIES}, "synapse:workers"),
    "as the workers' list": ({}, {"workers:list": FORMER_ENTRIES}, "synapse:workers:list"),
    "by names, as workers": ({}, {"workers": FORMER_NAMES}, "synapse:workers"),
    "by names, as the workers' list": ({}, {"workers:list": FORMER_NAMES}, "synapse:workers:list"),
}


@pytest.mark.parametrize(("beside", "settings", "at"), FORMER.values(), ids=FORMER)
def test_the_playbooks_list_is_told_what_to_write_instead(minion, beside, settings, at):
    (line,) = minion.run(minion.good_pillar(settings), **beside).synapse_workers.validate()
    told, _, instead = line.partition("Write instead:\n")
    assert told.startswith(f"{at}: this is the playbook's list of workers")
    instead = salt.utils.yaml.safe_load(instead)
    assert instead == {"synapse": {"workers": {"list": FORMER_LIST}}}
    with pytest.raises(CommandExecutionError, match="the playbook's list"):
        minion.synapse_workers.plan()
    assert minion.run(minion.good_pillar(instead["synapse"])).synapse_workers.validate() == []


@pytest.mark.parametrize(
    "former", [[], {}, "", 5, [None, 5, {}, {"type": []}, {"type": "stream_writer"}], ["a", {"b": 1}]]
)
def test_whatever_the_playbooks_list_holds_it_is_told(minion, former):
    minion.run(minion.good_pillar(), matrix_synapse_workers_enabled_list=former)
    (line,) = minion.synapse_workers.validate()
    assert "this is the playbook's list" in line


def test_no_fault_shows_a_secret_wherever_it_stands(minion):
    """Every setting of the schema that is or holds a secret, given one in every wrong form."""

    def secret_places(node, path):
        if node["type"] == "secret" or node.get("secret"):
            yield path
        for key, child in node.get("keys", {}).items():
            yield from secret_places(child, [*path, key])
        if "values" in node and "keys" not in node:
            yield from secret_places(node["values"], [*path, "bridge"])
        if "items" in node:
            yield from secret_places(node["items"], [*path, 0])

    def laid(path, value):
        for key in reversed(path):
            value = [value] if key == 0 else {key: value}
        return value

    merge = minion.synapse_pillar.merge
    schema = minion.synapse_pillar.knowledge()["schema"]["pillar"]
    places = list(secret_places(schema, []))
    assert ["signing_key", "current"] in places
    assert ["appservices", "bridge", "registration"] in places
    for path in places:
        for depth in range(1, len(path) + 1):
            for value in (f"{HUSH} ", [f"{HUSH} "], {HUSH * 2: f"{HUSH} "}):
                wrong = laid(path[:depth], value)
                found = minion.run(merge(minion.good_pillar(), wrong)).synapse_workers.validate()
                # A key is no secret.
                said = [re.sub(f"{HUSH}{HUSH}", "", line) for line in found]
                assert [line for line in said if HUSH in line] == []


def as_job(function, *args):
    """Call a function as `salt` and `salt-call` do, with what they tell of the job."""
    args, kwargs = salt.minion.load_args_and_kwargs(function, list(args), data={"fun": function.__name__, "jid": "1"})
    return function(*args, **kwargs)


def test_settings_show_no_secret_to_who_asks_by_a_job(minion):
    pillar = minion.good_pillar(
        {
            "secrets:form": HUSH,
            "signing_key:current": HUSH,
            "postgres:password": HUSH,
            "config:email": {"smtp_pass": HUSH},
            "workers:list": [{"type": "generic", "config": {"a": HUSH}}],
            "appservices:bridge:registration": {"as_token": HUSH},
        }
    )
    settings = minion.run(pillar).synapse_pillar.settings
    assert settings()["config"] == {"email": {"smtp_pass": HUSH}}
    assert settings()["secrets"]["form"] == HUSH
    shown = as_job(settings)
    assert HUSH not in json.dumps(shown)
    assert shown["server_name"] == "example.org"
    assert shown["secrets"] == {**settings()["secrets"], "form": minion.synapse_pillar.MASKED}
    assert shown["config"] == {"email": "(not shown)"}
    assert shown["workers"]["list"] == [{"type": "generic", "config": {"a": "(not shown)"}}]
    assert shown["appservices"]["bridge"]["registration"] == {"as_token": "(not shown)"}
    assert shown["nginx"] == settings()["nginx"]


def test_no_job_shows_a_workers_settings_or_a_token(minion):
    registration = {**REGISTRATION, "as_token": SECRET, "com.example.password": HUSH}
    pillar = minion.good_pillar(
        {
            "workers:list": [{**GENERIC, "config": {"email": {"smtp_pass": HUSH}}}],
            "appservices:bridge:registration": registration,
            "appservices:other:registration": {**REGISTRATION, "sender_localpart": "other"},
        }
    )
    minion.run(pillar)
    minion.synapse_appservice.ensure_tokens()
    made = minion.synapse_appservice.tokens("other")["as_token"]
    workers, appservice = minion.synapse_workers, minion.synapse_appservice
    for function, *args in (
        (workers.plan,),
        (appservice.registrations,),
        (appservice.registration, "bridge"),
        (appservice.registration, "other"),
        (appservice.tokens, "bridge"),
        (appservice.tokens, "other"),
    ):
        assert re.search(f"{HUSH}|{made}", json.dumps(function(*args)))
        assert not re.search(f"{HUSH}|{made}", json.dumps(as_job(function, *args)))
    worker, shown = workers.plan()["processes"][1], as_job(workers.plan)["processes"][1]
    assert shown["config"] == {**worker["config"], "email": "(not shown)"}
    assert shown | {"config": None} == worker | {"config": None}
    assert as_job(appservice.registration, "bridge") == {
        "id": "bridge",
        **registration,
        "as_token": "(not shown)",
        "hs_token": "(not shown)",
        "com.example.password": "(not shown)",
    }
    minion.run(minion.good_pillar())
    appservice.store("stored", registration)
    assert appservice.entry("stored")["registration"] == registration
    assert HUSH not in json.dumps(as_job(appservice.entry, "stored"))


@pytest.mark.parametrize(
    "wrong",
    [
        {"secret": {"form": HUSH}},
        {"secrets": HUSH},
        {"secrets": {"form": [HUSH]}},
        {"config": [HUSH]},
        {"config": HUSH},
        {"workers": {"list": {"config": HUSH}}},
        {"postgres": [{"password": HUSH}]},
        {"log": {"level": {"password": HUSH}}},
    ],
)
def test_settings_show_no_secret_that_stands_in_the_wrong_place(minion, wrong):
    minion.run({**minion.good_pillar(), **wrong})
    assert HUSH not in json.dumps(as_job(minion.synapse_pillar.settings))
