"""The image in a running deployment: pulled, extended, refused, and built without a registry."""

import json

import pytest
from conftest import ONE_WORKER
from deployment import until

PILLAR = ONE_WORKER

VERSION = "v1.163.2"
PULLED = f"matrixdotorg/synapse:{VERSION}"
BUILT = f"localhost/matrixdotorg/synapse:{VERSION}"
CUSTOMIZED = f"{BUILT}-customized"
# In the host itself. It is started by the test that pulls.
MIRROR = "127.0.0.1:5000/synapse"
MIRRORED = f"{MIRROR}:{VERSION}"
# What the host itself trusts; a build has to trust it as well.
CA_CERTIFICATES = "/etc/ssl/certs/ca-certificates.crt"


def image_id(deployed, reference):
    shown = deployed.host.run("docker", "image", "inspect", "--format", "{{.Id}}", reference, check=False)
    return shown.stdout.strip()


def images_that_run(deployed):
    return {container["Image"] for container in deployed.containers().values()}


def in_container(deployed, *command):
    return deployed.host.run("docker", "exec", "matrix-synapse-worker-0-generic", *command).stdout


@pytest.fixture
def mirror(deployed):
    """A registry that holds the image."""
    host = deployed.host
    host.run("systemctl", "start", "docker-registry")
    try:
        host.run("docker", "tag", PULLED, MIRRORED)
        until(lambda: host.run("docker", "push", MIRRORED, check=False).returncode == 0, "the registry takes the image")
        host.run("docker", "image", "rm", MIRRORED)
        yield
    finally:
        host.run("systemctl", "stop", "docker-registry")
        host.run("docker", "image", "rm", MIRRORED, check=False)
        host.run("rm", "--recursive", "--force", "/var/lib/docker-registry/docker")


def test_an_image_is_pulled_once_from_the_registry_that_the_pillar_names(deployed, mirror):
    before, state = deployed.starts(), "Synapse's image is present"
    deployed.pillar["image"] = {"repository": MIRROR}
    said = deployed.apply("synapse.image", test=True)
    assert said[state][MIRRORED] == {"old": None, "new": "to be pulled"}
    done = deployed.apply("synapse.image")
    assert image_id(deployed, MIRRORED) == image_id(deployed, PULLED)
    assert done == {state: {MIRRORED: {"old": None, "new": image_id(deployed, MIRRORED)}}}
    # It is there now, and that it goes by another name restarts nobody.
    assert deployed.apply() == {}
    assert deployed.starts() == before


def test_a_pull_that_fails_names_the_image_and_leaves_everything_as_it_is(deployed):
    before = deployed.starts()
    deployed.pillar["image"] = {"repository": MIRROR}
    deployed.host.run("touch", "/run/mark")
    assert MIRRORED in deployed.refused()
    written = "find /etc /var/lib/matrix-synapse /usr/local -newer /run/mark -type f | grep -v resolv.conf || true"
    assert deployed.host.sh(written).stdout == ""
    assert image_id(deployed, MIRRORED) == ""
    assert deployed.starts() == before
    assert deployed.all_healthy()


def test_an_extended_image_takes_the_pulled_ones_place_is_built_once_and_outlives_a_failed_build(deployed):
    assert images_that_run(deployed) == {image_id(deployed, PULLED)}
    deployed.pillar["image"] = {
        "ca_certificates": CA_CERTIFICATES,
        "customize": {"modules": {"ldap3": True}, "dockerfile": "RUN echo mine >/etc/customized"},
    }
    said, before = deployed.apply(test=True), deployed.starts()
    done = deployed.apply()
    assert set(said) == set(done)
    after = deployed.starts()
    assert all(after[name] > before[name] for name in before)

    built = image_id(deployed, CUSTOMIZED)
    assert images_that_run(deployed) == {built}
    assert in_container(deployed, "cat", "/etc/customized") == "mine\n"
    in_container(deployed, "python3", "-c", "import ldap_auth_provider")
    assert deployed.user().id

    assert deployed.apply() == {}
    assert image_id(deployed, CUSTOMIZED) == built

    # A build that fails leaves all as it is.
    before = deployed.starts()
    deployed.pillar["image"]["customize"]["dockerfile"] = "RUN echo the reason why; exit 3"
    comment = deployed.refused()
    assert "the reason why" in comment
    assert image_id(deployed, CUSTOMIZED) == built
    assert deployed.starts() == before
    until(deployed.all_healthy, "nobody noticed")


def test_self_built_without_a_registry_and_then_extended(deployed):
    """Self-build comes first, then the extension; both images are used as the official one is."""
    deployed.pillar["image"] = {
        "source": "build",
        "ca_certificates": CA_CERTIFICATES,
        "customize": {"dockerfile": "RUN echo mine >/etc/customized"},
    }
    deployed.apply("synapse.image")
    history = deployed.host.run("docker", "image", "history", "--quiet", "--no-trunc", CUSTOMIZED).stdout
    assert image_id(deployed, BUILT) in history
    for reference in (BUILT, CUSTOMIZED):
        shown = json.loads(deployed.host.run("docker", "image", "inspect", reference).stdout)[0]
        assert shown["Config"]["Entrypoint"] == ["/start.py"]

    deployed.apply()
    assert images_that_run(deployed) == {image_id(deployed, CUSTOMIZED)}
    assert not [mount for mount in deployed.containers()["matrix-synapse"]["Mounts"] if mount["Type"] == "volume"], (
        "byte code is in the image"
    )
    alice = deployed.user()
    alice.say(alice.room(), "from a self-built image")
