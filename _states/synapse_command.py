"""
Commands that run where they are needed.
"""


def run(name, done_if):
    """
    A command has run, unless another one says that there is nothing left to do.

    It is ``cmd.run`` with ``unless``, without the third of a run's time that this costs: for any of its own conditions on a
    state, Salt looks for the function ``cmd.mod_run_check``, which nobody defines, in each states module that it has
    (``State.call`` in salt/state.py).

    name
        The shell command.

    done_if
        The shell command whose exit status 0 says that it need not run.
    """
    if __salt__["cmd.retcode"](done_if, python_shell=True, ignore_retcode=True) == 0:
        return {"name": name, "result": True, "comment": "Nothing to do", "changes": {}}
    return __states__["cmd.run"](name)
