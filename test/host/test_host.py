"""The disposable host keeps its word: the tests in test/e2e rest on it."""

import pytest
from host import SYNAPSE_IMAGE, Host, HostError

BUNDLE = "/etc/ssl/certs/ca-certificates.crt"


@pytest.fixture(scope="module")
def host():
    with Host.up("synapse-formula-test-host") as host:
        yield host


def boot_id(host):
    return host.read("/proc/sys/kernel/random/boot_id")


def is_active(host, *units):
    return host.run("systemctl", "is-active", *units, check=False).stdout.split()


def test_runs_what_a_server_runs_and_no_more(host):
    assert host.run("systemctl", "is-system-running").stdout.strip() == "running"
    assert is_active(host, "docker", "postgresql@15-main") == ["active", "active"]
    assert set(is_active(host, "nginx", "redis-server", "docker-registry", "salt-minion")) == {"inactive"}
    assert host.run("docker", "info", "--format", "{{.Driver}}").stdout.strip() == "overlay2"


def test_up_takes_the_host_that_runs(host):
    before = boot_id(host)
    assert boot_id(Host.up(host.name)) == before


def test_salt_returns_what_its_function_returns(host):
    sent = [1, "1", "yes", "a: b", "{}", "", None, {"a": [True, 0.5]}]
    received = host.salt("test.arg", *sent, key="no")
    assert received["args"] == sent
    assert received["kwargs"]["key"] == "no"


def test_salt_sees_the_formula_and_the_given_pillar(host):
    assert "synapse" in host.salt("cp.list_states")
    host.write("/srv/salt/probe.sls", "{{ pillar['probe'] }}:\n  test.configurable_test_state:\n    - result: False\n")
    (state,) = host.salt("state.apply", "probe", pillar={"probe": "of fire"}).values()
    assert (state["name"], state["result"]) == ("of fire", False)


def test_salt_fails_with_the_reason_where_an_sls_does_not_render(host):
    host.write("/srv/salt/broken.sls", "{{ 1 / 0 }}")
    with pytest.raises(HostError, match="division by zero"):
        host.salt("state.apply", "broken")


def test_a_command_that_fails_says_why(host):
    with pytest.raises(HostError, match="(?s)exit 2.*No such file"):
        host.run("ls", "/nowhere")
    assert host.run("sleep", "60", check=False, timeout=0.1).returncode == 124


def test_containers_in_it_reach_the_package_mirrors(host):
    script = "python3 -m pip download --quiet --no-deps --dest /tmp six && ls /tmp"
    command = ["docker", "run", "--rm", "--entrypoint", "sh"]
    for source in (BUNDLE, "/etc/pip.conf"):
        command += ["--volume", f"{source}:{source}:ro"]
    assert "six-" in host.run(*command, SYNAPSE_IMAGE, "-c", script).stdout


def test_the_synapse_image_starts_as_the_official_one_does(host):
    command = ["docker", "run", "--rm", "--user", "1234:1234", SYNAPSE_IMAGE, "run", "-m", "synapse.app.homeserver"]
    assert "Synapse Homeserver" in host.run(*command, "--help").stdout


@pytest.mark.parametrize("boot_again", [Host.restart, Host.kill])
def test_state_survives(host, boot_again):
    before = boot_id(host)
    host.write("/srv/kept", "kept")
    host.sh("cd / && sudo -u postgres psql -qc 'CREATE TABLE IF NOT EXISTS kept ()'")
    boot_again(host)
    assert boot_id(host) != before
    assert host.read("/srv/kept") == "kept"
    host.sh("cd / && sudo -u postgres psql -qc 'TABLE kept'")
    host.run("docker", "image", "inspect", SYNAPSE_IMAGE)
