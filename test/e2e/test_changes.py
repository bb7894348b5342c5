"""What an apply restarts: exactly the processes whose inputs changed, each once; and what it removes."""

import base64
import copy
import json
import secrets

import pytest
from deployment import MAIN, request, until

PROCESSES = "Synapse's processes are running"
BACKGROUND = "matrix-synapse-worker-3-background"


def restarted(deployed, before):
    after = deployed.starts()
    return {name for name in before if name in after and after[name] != before[name]}


def worker(deployed, kind):
    return next(entry for entry in deployed.pillar["workers"]["list"] if entry["type"] == kind)


def applied_exactly(deployed):
    """Apply; what a test run says before is what the run does, and after it there is nothing left to do."""
    said = deployed.apply(test=True)
    done = deployed.apply()
    assert set(said) == set(done)
    assert said.get(PROCESSES) == done.get(PROCESSES)
    assert deployed.apply(test=True) == {}
    return done


def test_a_change_of_one_worker_restarts_only_that_worker(deployed):
    before = deployed.starts()
    worker(deployed, "background")["config"] = {"enable_metrics": False}
    done = applied_exactly(deployed)
    assert restarted(deployed, before) == {BACKGROUND}
    assert done[PROCESSES] == {BACKGROUND: {"old": "outdated", "new": "running"}}


def test_a_new_log_level_or_limit_of_one_worker_restarts_only_that_worker(deployed):
    before = deployed.starts()
    worker(deployed, "background").update(log_level="DEBUG", memory="400M")
    applied_exactly(deployed)
    assert restarted(deployed, before) == {BACKGROUND}
    assert deployed.containers()[BACKGROUND]["HostConfig"]["Memory"] == 400 * 1024 * 1024


def test_one_more_generic_worker_restarts_nobody(deployed):
    before = deployed.starts()
    worker(deployed, "generic")["count"] = 3
    applied_exactly(deployed)
    assert restarted(deployed, before) == set()
    assert "matrix-synapse-worker-5-generic" in deployed.starts()
    nginx = deployed.host.read("/etc/nginx/conf.d/matrix-synapse.conf")
    assert "matrix-synapse-worker-5-generic.sock" in nginx


def test_a_worker_that_left_the_pillar_leaves_nothing(deployed):
    before = deployed.starts()
    worker(deployed, "generic")["count"] = 1
    done = applied_exactly(deployed)
    gone = "matrix-synapse-worker-1-generic"
    assert gone in done["Nothing is left of removed workers"]
    assert restarted(deployed, before) == set()
    host = deployed.host
    assert gone not in deployed.starts()
    assert (
        host.run("systemctl", "show", "--property=LoadState", "--value", f"{gone}.service").stdout.strip()
        == "not-found"
    )
    assert gone not in host.run("systemctl", "list-units", "--all", "--plain").stdout
    found = host.sh(f"find /etc /run /var/lib/matrix-synapse -name '*{gone}*' 2>/dev/null || true").stdout
    assert found == ""
    assert gone not in host.read("/etc/nginx/conf.d/matrix-synapse.conf")


def test_a_worker_that_failed_leaves_no_ghost_when_it_is_removed(deployed):
    host = deployed.host
    host.sh(
        f"echo 'worker_app: nonsense' > /etc/matrix-synapse/workers/{BACKGROUND}.yaml; systemctl kill -s KILL {BACKGROUND}"
    )
    deployed.pillar["workers"]["list"] = [e for e in deployed.pillar["workers"]["list"] if e["type"] != "background"]
    deployed.apply()
    assert BACKGROUND not in host.run("systemctl", "list-units", "--all", "--plain").stdout
    assert deployed.apply(test=True) == {}


def test_a_worker_that_all_know_of_leaves_before_the_others_restart(deployed):
    gone, now = "matrix-synapse-worker-2-stream-writer-typing", deployed.host.sh("date '+%F %T'").stdout.strip()
    before = deployed.starts()
    worker(deployed, "stream-writer")["count"] = 0
    done = applied_exactly(deployed)
    assert restarted(deployed, before) == set(before) - {gone} == set(done[PROCESSES])
    journal = deployed.host.run("journalctl", "--since", now, "--output", "cat", "--unit", f"{gone}.service").stdout
    assert f"Stopped {gone}.service" in journal
    assert f"Started {gone}.service" not in journal


def test_the_order_of_the_pillar_changes_nothing(deployed):
    deployed.pillar["workers"]["list"].reverse()
    assert deployed.apply() == {}


def test_a_shared_change_restarts_every_process_once(deployed):
    before = deployed.starts()
    deployed.pillar["config"]["presence"] = {"enabled": False}
    done = applied_exactly(deployed)
    assert restarted(deployed, before) == set(before)
    assert set(done[PROCESSES]) == set(before)
    assert {process["restarts"] for process in deployed.status()} == {0}


def test_a_run_that_was_killed_before_the_restart_is_put_right_by_the_next(deployed):
    before = deployed.starts()
    worker(deployed, "background")["config"] = {"enable_metrics": False}
    # The files of a run that got no further.
    deployed.apply("synapse.config")
    assert restarted(deployed, before) == set()
    applied_exactly(deployed)
    assert restarted(deployed, before) == {BACKGROUND}


@pytest.mark.parametrize(
    "moment",
    [
        pytest.param("compgen -G '/etc/matrix-synapse/.candidate-*'", id="while Synapse checks the configuration"),
        pytest.param(
            f"grep --quiet 'enable_metrics: false' /etc/matrix-synapse/workers/{BACKGROUND}.yaml",
            id="when the configuration is written",
        ),
        pytest.param(
            f"! cmp --silent /run/unit-before /etc/systemd/system/{BACKGROUND}.service", id="when the unit is written"
        ),
        pytest.param(f"! systemctl is-active --quiet {BACKGROUND}.service", id="while the process restarts"),
    ],
)
def test_a_run_that_is_killed_is_put_right_by_the_next(deployed, moment):
    before = deployed.starts()
    worker(deployed, "background")["config"] = {"enable_metrics": False}
    deployed.write_pillar()
    # SIGKILL to the run and all that it started, at the moment; this fails if it was over before.
    deployed.host.sh(
        f"""cp /etc/systemd/system/{BACKGROUND}.service /run/unit-before
        setsid salt-call --local state.apply synapse >/dev/null 2>&1 &
        until {moment} >/dev/null; do kill -0 $!; sleep 0.01; done
        kill -KILL -- -$!
        status=0; wait $! || status=$?
        test $status = 137"""
    )
    until(lambda: deployed.active(BACKGROUND) == "active", "systemd has done what the run may have asked for")
    applied_exactly(deployed)
    assert restarted(deployed, before) == {BACKGROUND}
    left = r"find /etc/matrix-synapse /etc/systemd/system \( -name '.candidate-*' -o -name '*.new' \)"
    assert deployed.host.sh(left).stdout == ""


def test_a_run_that_was_killed_before_nginx_reloaded_is_put_right_by_the_next(deployed):
    file = "/etc/nginx/conf.d/matrix-synapse.conf"
    deployed.pillar["max_upload_size"] = "60M"
    deployed.apply()
    good = deployed.host.read(file)
    # As if the file was written, but nginx never told: it runs the one before.
    deployed.host.sh(
        f'sed -i \'s/60M/50M/; s/return 200 "[0-9a-f]*"/return 200 "other"/\' {file}; systemctl reload nginx'
    )
    deployed.host.write(file, good)
    assert set(deployed.apply()) == {"nginx runs with this configuration"}


def test_a_configuration_that_synapse_refuses_replaces_nothing(deployed):
    before, good = deployed.starts(), deployed.host.read("/etc/matrix-synapse/homeserver.yaml")
    deployed.pillar["config"]["turn_uris"] = 5
    deployed.pillar["config"]["media_retention"] = "nonsense"
    comment = deployed.refused()
    assert "Synapse does not accept the configuration" in comment
    assert deployed.host.read("/etc/matrix-synapse/homeserver.yaml") == good
    assert restarted(deployed, before) == set()
    assert deployed.host.sh("ls -A /etc/matrix-synapse | grep candidate || true").stdout == ""


def test_a_configuration_that_reads_the_operators_files_is_accepted(deployed):
    host, before = deployed.host, copy.deepcopy(deployed.pillar)
    host.write("/etc/matrix-synapse/turn", "secret", mode="0644")
    host.sh(
        """mkdir --parents /srv/templates /etc/matrix-synapse/consent/en
        echo the terms | tee /etc/matrix-synapse/consent/en/1.0.html > /etc/matrix-synapse/consent/en/success.html"""
    )
    deployed.pillar["config"] |= {
        "turn_shared_secret_path": "/etc/matrix-synapse/turn",
        "templates": {"custom_template_directory": "/srv/templates"},
        "user_consent": {"template_dir": "/etc/matrix-synapse/consent", "version": "1.0"},
    }
    # A directory that no process is shown is none.
    assert "/srv/templates" in deployed.refused()
    volume = "--volume=/srv/templates:/srv/templates:ro"
    deployed.pillar["process"]["arguments"] = [volume]
    # Arguments of its own take their place.
    worker(deployed, "media-repository")["arguments"].append(volume)
    applied_exactly(deployed)
    assert deployed.all_healthy()
    assert request(f"{deployed.url}/_matrix/consent")[0].strip() == b"the terms"
    deployed.pillar = before
    deployed.apply()
    host.sh("rm --recursive /etc/matrix-synapse/turn /etc/matrix-synapse/consent /srv/templates")


def postgres(deployed, query):
    words = ["runuser", "--user", "postgres", "--", "psql", "--no-psqlrc", "--tuples-only", "--no-align", "--command"]
    return deployed.host.run(*words, query).stdout.strip()


@pytest.mark.parametrize(
    "options", [{"shared_bufers": "1GB"}, {"work_mem": "banana"}], ids=lambda options: next(iter(options))
)
def test_settings_that_postgresql_refuses_replace_nothing(deployed, options):
    file, started = "/etc/postgresql/15/main/conf.d/matrix-synapse.conf", "select pg_postmaster_start_time()"
    good, before, processes = deployed.host.read(file), postgres(deployed, started), deployed.starts()
    deployed.pillar["postgres"] = {"options": options}
    assert next(iter(options)) in deployed.refused()
    assert deployed.host.read(file) == good
    assert postgres(deployed, started) == before
    assert restarted(deployed, processes) == set()
    deployed.pillar["postgres"] = {"options": {"work_mem": "5MB"}}
    applied_exactly(deployed)
    assert postgres(deployed, "show work_mem") == "5MB"
    assert postgres(deployed, started) == before


def test_postgresql_is_not_restarted_into_a_configuration_that_it_cannot_read(deployed):
    file, started = "/etc/postgresql/15/main/postgresql.conf", "select pg_postmaster_start_time()"
    before = postgres(deployed, started)
    deployed.pillar["postgres"] = {"options": {"shared_buffers": "130MB"}}
    deployed.host.sh(f"echo half a li >> {file}")
    try:
        assert "postgres -D /etc/postgresql/15/main -C" in deployed.refused()
    finally:
        deployed.host.sh(f"sed -i '$d' {file}")
    # Debian's psql does not read such a configuration either.
    assert postgres(deployed, started) == before
    applied_exactly(deployed)
    assert postgres(deployed, "show shared_buffers") == "130MB"


def test_connections_that_postgresql_allows_already_stay(deployed):
    deployed.pillar["postgres"] = {"options": {"max_connections": 500}}
    deployed.apply()
    assert postgres(deployed, "show max_connections") == "500"
    started = "select pg_postmaster_start_time()"
    before = postgres(deployed, started)
    del deployed.pillar["postgres"]
    assert deployed.apply() == {}
    assert (postgres(deployed, "show max_connections"), postgres(deployed, started)) == ("500", before)


def test_a_configuration_that_nginx_refuses_replaces_nothing(deployed):
    file = "/etc/nginx/conf.d/matrix-synapse.conf"
    good = deployed.host.read(file)
    deployed.pillar["nginx"]["client"]["tls"] = {"certificate": "/nowhere/cert.pem", "key": "/nowhere/key.pem"}
    deployed.refused()
    assert deployed.host.read(file) == good
    deployed.host.run("nginx", "-t")


def test_an_nginx_that_is_not_managed_is_left_alone(deployed):
    look = "stat --format '%Y %i' /etc/nginx/conf.d/matrix-synapse.conf; pgrep nginx"
    before = deployed.host.sh(look).stdout
    deployed.pillar["nginx"]["managed"] = False
    # Which nginx would have to know of.
    worker(deployed, "generic")["count"] = 3
    done = applied_exactly(deployed)
    assert "matrix-synapse-worker-5-generic" in done[PROCESSES]
    assert not [state for state in done if "nginx" in state]
    assert deployed.host.sh(look).stdout == before


def test_the_media_cache_comes_and_goes_while_every_process_runs_on(deployed):
    starts, directory = deployed.starts(), "/var/cache/nginx-matrix-synapse"
    deployed.pillar["nginx"]["media_cache"] = "100M"
    done = {"nginx is configured for Synapse", "nginx runs with this configuration"}
    assert set(deployed.apply()) == done
    assert deployed.host.run("stat", "--format", "%a %U", directory).stdout.split() == ["700", "www-data"]
    assert deployed.apply() == {}
    del deployed.pillar["nginx"]["media_cache"]
    assert set(deployed.apply()) == {*done, "nginx keeps no media"}
    assert deployed.host.run("test", "-e", directory, check=False).returncode == 1
    assert deployed.starts() == starts


def test_a_gate_that_nginx_can_not_enter_is_opened_to_it_by_the_next_run(deployed):
    """As when nginx:user changed, and the run was cut off before nginx was told."""
    gate = "/run/matrix-synapse/gate/matrix-synapse.sock"
    deployed.host.run("chgrp", "root", gate)
    assert set(deployed.apply()) == {"nginx runs with this configuration"}
    assert deployed.host.run("stat", "--format=%G", gate).stdout.strip() == "www-data"


def test_tls_from_given_certificate_files(deployed):
    host, directory = deployed.host, "/etc/ssl/synapse-test"
    host.sh(
        f"mkdir -p {directory}; openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=example.org"
        f" -keyout {directory}/key.pem -out {directory}/cert.pem 2>/dev/null"
    )
    deployed.pillar["nginx"]["client"] = {
        "listen": ["8443"],
        "tls": {"certificate": f"{directory}/cert.pem", "key": f"{directory}/key.pem"},
    }
    deployed.apply()
    url = "https://127.0.0.1:8443/_matrix/client/versions"
    assert "versions" in json.loads(host.run("curl", "--silent", "--insecure", url).stdout)


@pytest.mark.parametrize(
    ("change", "path"),
    [
        ({"workers": {"list": [{"type": "pushr"}]}}, "synapse:workers:list:0:type"),
        ({"workers": {"list": [{"type": "background", "count": 2}]}}, "synapse:workers:list:0"),
        ({"config": {"run_background_tasks_on": "nobody"}}, "synapse:config:run_background_tasks_on"),
        ({"server_name": "another.example"}, "synapse:server_name"),
        # A new key, but nobody would know the old one any more.
        ({"signing_key": {"current": "ed25519 a_next " + "A" * 43}}, "synapse:signing_key:current"),
    ],
)
def test_a_bad_pillar_gets_a_clear_error_and_changes_nothing(deployed, change, path):
    fingerprint = (
        "find /etc /var/lib/matrix-synapse /usr/local -newer /run/mark -type f | grep -v -e resolv.conf || true"
    )
    before = deployed.starts()
    deployed.pillar = {**copy.deepcopy(deployed.pillar), **change}
    deployed.host.run("touch", "/run/mark")
    comment = deployed.refused()
    assert path in comment
    assert deployed.refused(test=True) == comment
    assert deployed.host.sh(fingerprint).stdout == ""
    assert deployed.starts() == before


def test_the_signing_key_and_the_generated_secrets_stay(deployed):
    read = "sha256sum /var/lib/matrix-synapse/secrets/*"
    before = deployed.host.sh(read).stdout
    deployed.pillar["config"]["presence"] = {"enabled": False}
    deployed.apply()
    assert deployed.host.sh(read).stdout == before


def test_a_replaced_signing_key_is_still_published_as_an_old_one(deployed):
    def published():
        return request(deployed.url.replace(":8008", ":8448") + "/_matrix/key/v2/server")[0]

    before = published()["verify_keys"]
    old = {key: {**value, "expired_ts": 1700000000000} for key, value in before.items()}
    version, seed = f"t_{secrets.token_hex(4)}", base64.b64encode(secrets.token_bytes(32)).decode().rstrip("=")
    deployed.pillar["signing_key"] = {"current": f"ed25519 {version} {seed}", "old": old}
    applied_exactly(deployed)
    keys = published()
    assert keys["old_verify_keys"] == old
    assert set(keys["verify_keys"]) == {f"ed25519:{version}"}
    assert set(keys["signatures"]["example.org"]) == {f"ed25519:{version}"}
    alice = deployed.user()
    alice.say(alice.room(), "signed by the new key")


def test_a_secret_of_the_pillar_takes_the_place_of_the_generated_one(deployed):
    before = deployed.starts()
    deployed.pillar["secrets"] = {"macaroon": "a-secret-of-the-operator-0123456789"}
    applied_exactly(deployed)
    assert deployed.host.read("/var/lib/matrix-synapse/secrets/macaroon") == "a-secret-of-the-operator-0123456789"
    assert restarted(deployed, before) == set(before)


def test_processes_that_shall_not_run_are_stopped_and_stay_in_place(deployed):
    deployed.pillar["process"]["running"] = False
    applied_exactly(deployed)
    assert {container["State"]["Status"] for container in deployed.containers().values()} == {"exited"}
    assert deployed.active(MAIN) == "inactive"
    deployed.pillar["process"]["running"] = True
    applied_exactly(deployed)
    until(deployed.all_healthy, "all run again")
