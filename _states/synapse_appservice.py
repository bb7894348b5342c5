"""
Register appservices (bridges and bots) with the homeserver.

The formula of a bridge uses :func:`registered`, and then the states of this formula, or its next run, bring
the registration to Synapse:

.. code-block:: yaml

    The WhatsApp bridge is registered:
      synapse_appservice.registered:
        - name: whatsapp
        - registration:
            url: http://matrix-whatsapp:29318
            sender_localpart: whatsappbot
            namespaces:
              users:
                - exclusive: true
                  regex: '@whatsapp_.*:example\\.org'
"""

from salt.exceptions import CommandExecutionError, SaltInvocationError


def registered(name, registration=None, file=None, arguments=None):
    """
    An appservice is registered with the homeserver, beside those of the pillar.

    Tokens that the registration lacks are made and then stay: ``synapse_appservice.tokens`` tells them.

    name
        The appservice's id.

    registration
        Its registration, a mapping as in the Matrix specification.

    file
        In place of it, the file that holds it: an absolute path on the minion, or ``salt://...``. It must be
        there when this state runs.

    arguments
        A list of arguments of ``docker create`` for the main process and every worker, such as
        ``--volume=...``.

    Changes show no tokens.
    """
    ret = {"name": name, "result": True, "comment": f"The appservice {name} is registered", "changes": {}}
    try:
        old = __salt__["synapse_appservice.entry"](name)
        new = __salt__["synapse_appservice.wanted_entry"](name, registration, file, arguments)
        made = __salt__["synapse_appservice.store"](name, registration, file, arguments, test=__opts__["test"])
        ret["changes"] = __salt__["synapse_appservice.difference"](old, new)
        if made:
            ret["changes"]["tokens"] = {"old": None, "new": made}
        if not ret["changes"]:
            return ret
        if __opts__["test"]:
            ret["result"] = None
            ret["comment"] = f"The appservice {name} would be {'updated' if old else 'registered'}"
            return ret
        ret["comment"] = f"The appservice {name} has been {'updated' if old else 'registered'}"
    except (CommandExecutionError, SaltInvocationError) as err:
        ret.update(result=False, comment=str(err), changes={})
    return ret


def absent(name):
    """
    An appservice that :func:`registered` registered is not any more.

    Its tokens are kept, for when it comes back.

    name
        The appservice's id.
    """
    ret = {"name": name, "result": True, "comment": f"No state registered an appservice {name}", "changes": {}}
    try:
        if not __salt__["synapse_appservice.remove"](name, test=__opts__["test"]):
            return ret
        ret["changes"] = {name: {"old": "registered", "new": None}}
        if __opts__["test"]:
            ret["result"] = None
            ret["comment"] = f"The appservice {name} would be removed"
            return ret
        ret["comment"] = f"The appservice {name} has been removed"
    except (CommandExecutionError, SaltInvocationError) as err:
        ret.update(result=False, comment=str(err), changes={})
    return ret


def tokens_exist(name):
    """
    Every registered appservice has its tokens: those of its registration, else random ones that are made once
    and then stay.

    name
        Any name; only shown.

    Changes name the tokens that were made, and show none.
    """
    ret = {"name": name, "result": True, "comment": "All appservices have their tokens", "changes": {}}
    try:
        found = __salt__["synapse_appservice.faults"]()
        if found:
            raise CommandExecutionError("\n".join(found))
        made = __salt__["synapse_appservice.ensure_tokens"](test=__opts__["test"])
        ret["changes"] = {item: {"old": None, "new": tokens} for item, tokens in made.items()}
        if not made:
            return ret
        if __opts__["test"]:
            ret["result"] = None
            ret["comment"] = f"Tokens would be made for {', '.join(made)}"
            return ret
        ret["comment"] = f"Tokens have been made for {', '.join(made)}"
    except (CommandExecutionError, SaltInvocationError) as err:
        ret.update(result=False, comment=str(err), changes={})
    return ret
