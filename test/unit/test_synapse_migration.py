"""What a cluster needs after the move, when others are at work on it."""

import pytest
from salt.exceptions import CommandExecutionError

DEADLOCK = 'vacuumdb: error: processing of database "synapse" failed: ERROR:  deadlock detected'


@pytest.fixture
def analyze(minion):
    """Have statistics made by a vacuumdb that fails with one error after the other; return how often it was run."""

    def run(*errors):
        left, runs = list(errors), []

        def client(*words):
            runs.append(words)
            if left:
                raise CommandExecutionError(left.pop(0))

        minion.salt["synapse_cluster.client"] = client
        minion.synapse_migration._analyze("18/main")
        return len(runs)

    return run


def test_statistics_are_begun_anew_after_a_deadlock(analyze):
    assert analyze(DEADLOCK, DEADLOCK) == 3


@pytest.mark.parametrize("errors", [["vacuumdb: error: no such thing"], [DEADLOCK] * 5], ids=["another error", "again"])
def test_statistics_that_can_not_be_made_are_a_failure(analyze, errors):
    with pytest.raises(CommandExecutionError, match="vacuumdb"):
        analyze(*errors)
