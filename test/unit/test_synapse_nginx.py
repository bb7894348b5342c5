"""What nginx is told: whose requests it takes, and when it has to read its files again."""

import pytest


@pytest.fixture
def nginx(minion, tmp_path):
    minion.salt |= {"cp.hash_file": lambda url: {"hsum": url}}
    minion.move_to(tmp_path)

    def context(**changes):
        changes = {key.replace("__", ":"): value for key, value in changes.items()}
        return minion.run(minion.good_pillar(changes)).synapse_nginx.context()

    return context


def test_it_takes_the_requests_that_name_the_homeserver(nginx):
    context = nginx(server_name="example.org:8448", public_base_url="https://matrix.example.org/")
    assert context["nginx"]["server_names"] == ["127.0.0.1", "172.29.88.1", "example.org", "matrix.example.org"]
    assert "[::1]" in nginx(server_name="[::1]:8448")["nginx"]["server_names"]


def test_no_limit_holds_for_bridges_in_the_docker_network_and_whom_the_pillar_names(nginx):
    assert nginx()["nginx"]["limits"]["exempt"] == ["172.29.88.0/24"]
    context = nginx(nginx__limits__exempt=["192.0.2.7", "172.29.90.0/24"], docker__network__subnet="172.29.90.0/24")
    assert context["nginx"]["limits"]["exempt"] == ["172.29.90.0/24", "192.0.2.7"]


def test_a_renewed_certificate_is_another_configuration(nginx, tmp_path):
    files = {"certificate": str(tmp_path / "cert.pem"), "key": str(tmp_path / "key.pem")}
    before = nginx(nginx__client__tls=files)["digest"]
    (tmp_path / "cert.pem").write_text("new")
    renewed = nginx(nginx__client__tls=files)["digest"]
    assert renewed != before
    assert nginx(nginx__client__tls=files)["digest"] == renewed


def test_whatever_makes_its_units_is_part_of_the_configuration(nginx, minion):
    def of(changed):
        minion.salt["cp.hash_file"] = lambda url: {"hsum": "new" if url.endswith(f"/{changed}") else url}
        return nginx()["digest"]

    templates = [
        "matrix-synapse.conf.jinja",
        "macros.jinja",
        "nginx.service.jinja",
        "gate.socket.jinja",
        "gate.service.jinja",
    ]
    digests = [of(None), *map(of, templates), nginx(nginx__user="nginx")["digest"]]
    assert len(set(digests)) == 1 + len(templates) + 1
