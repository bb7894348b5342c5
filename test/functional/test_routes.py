"""
The proof of the routes for the pinned release of Synapse: test/routes/proof.py does the same for others.
"""

import proof
import pytest
import yaml
from host import SYNAPSE_VERSION

DEFAULTS = yaml.safe_load((proof.ROOT / "synapse/defaults.yaml").read_text())


@pytest.fixture(scope="module")
def known():
    """What this release of Synapse answers."""
    return proof.answers(SYNAPSE_VERSION)


def test_the_release_that_is_proven_is_the_one_that_is_installed_by_default():
    assert DEFAULTS["image"]["version"] == f"v{SYNAPSE_VERSION}"


def test_the_data_and_synapse_agree_about_routes_streams_and_servlets(known):
    assert proof.stale(known) == []


@pytest.mark.parametrize("layout", proof.LAYOUTS)
def test_every_request_reaches_a_process_that_can_answer_it(layout, known):
    found = proof.compare(known, layout)
    assert found["wrong"] == []
    assert found["asked"] > 1000


def test_a_worker_takes_most_requests_where_there_is_one_for_each(known):
    found = proof.compare(known, "specialised workers and the last streams")
    assert found["to workers"] > found["asked"] / 2
    assert sum(len(requests) for requests in found["reasons"].values()) < 50


def test_a_request_that_goes_wrong_is_found(known, monkeypatch):
    """Without the route of a stream, its writes reach main, which is not their writer."""
    routes = {
        **proof.DATA["routes"],
        "routes": [it for it in proof.DATA["routes"]["routes"] if it.get("stream") != "typing"],
    }
    knowledge = proof.minion().synapse_pillar.knowledge()
    monkeypatch.setitem(knowledge, "routes", routes)
    wrong = proof.compare(known, "every stream writer alone")["wrong"]
    assert wrong
    assert all(" /typing/" in line or "/typing/" in line for line in wrong)
    assert "PUT /_matrix/client/v3/rooms/room_id/typing/user_id reaches matrix-synapse, and should reach" in "\n".join(
        wrong
    )
