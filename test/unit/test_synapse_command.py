"""
The state that runs a command where it is needed.
"""

import pytest


@pytest.mark.parametrize(("status", "ran"), [(0, []), (1, ["make it so"]), (127, ["make it so"])])
def test_a_command_runs_unless_nothing_is_left_to_do(minion, formula_state, status, ran):
    asked, done = [], []
    minion.salt["cmd.retcode"] = lambda command, **kwargs: asked.append(command) or status
    state = formula_state("synapse_command")
    state.__states__ = {
        "cmd.run": lambda command: done.append(command) or {"result": None, "changes": {"cmd": command}}
    }
    ret = state.run("make it so", done_if="is it so")
    assert (asked, done) == (["is it so"], ran)
    assert bool(ret["changes"]) == bool(ran)
