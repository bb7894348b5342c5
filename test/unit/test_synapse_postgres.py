"""An external database: what is not known of it is not taken for nothing."""

import pytest
from salt.exceptions import CommandExecutionError

EXTERNAL = {"postgres": {"managed": False, "host": "db.example.org"}}


@pytest.fixture
def postgres(minion, tmp_path):
    """The module, where the image that the database is asked from is missing."""
    minion.move_to(tmp_path).run(minion.good_pillar(EXTERNAL))
    minion.salt["synapse_image.wanted"] = lambda image: {"id": None, "reference": "synapse:wanted", "pycache": None}
    return minion.synapse_postgres


def test_before_anything_is_deployed_nobody_is_connected(postgres):
    assert postgres.sessions() == []


def test_without_the_image_a_deployment_cant_say_who_is_connected(minion, postgres):
    minion.write("config/homeserver.yaml", "")
    with pytest.raises(
        CommandExecutionError, match="can't be asked: the image synapse:wanted is not here.*apply synapse.image"
    ):
        postgres.sessions()


def test_a_database_without_tables_is_not_worth_remembering(minion, postgres, tmp_path):
    nothing = {"processes": [], "strays": [], "sessions": [], "sessions_fault": None}
    minion.salt["synapse_process.census"] = lambda memory: nothing
    with pytest.raises(CommandExecutionError, match="There is no table in Synapse's database"):
        postgres.remember()
    with pytest.raises(CommandExecutionError, match="Nothing was noted before"):
        postgres.verify()
