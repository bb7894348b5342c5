"""The image in a running deployment: extended, refused, and built without a registry."""

import json

from deployment import until

VERSION = "v1.163.2"
PULLED = f"matrixdotorg/synapse:{VERSION}"
BUILT = f"localhost/matrixdotorg/synapse:{VERSION}"
CUSTOMIZED = f"{BUILT}-customized"
# What the host itself trusts; a build has to trust it as well.
CA_CERTIFICATES = "/etc/ssl/certs/ca-certificates.crt"


def image_id(deployed, reference):
    shown = deployed.host.run("docker", "image", "inspect", "--format", "{{.Id}}", reference, check=False)
    return shown.stdout.strip()


def images_that_run(deployed):
    return {container["Image"] for container in deployed.containers().values()}


def in_container(deployed, *command):
    return deployed.host.run("docker", "exec", "matrix-synapse-worker-0-generic", *command).stdout


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
