"""
The pillar below ``synapse``, as a state.
"""


def right(name, faults):
    """
    The pillar has no faults. It fails in a test run as well: nothing can be said of a run that will not take place.

    name
        A sentence; only shown.

    faults
        A list of sentences, each a fault: see ``synapse_workers.validate``.
    """
    return {"name": name, "result": not faults, "comment": "\n".join(faults), "changes": {}}
