"""
What nginx needs to know to stand in front of Synapse.
"""

import hashlib
import json

TEMPLATES = ("salt://synapse/nginx/files/matrix-synapse.conf.jinja", "salt://synapse/nginx/files/macros.jinja")


def context():
    """
    Return the context of nginx's template: a dict with

    ``plan``
        Upstreams, routes and what is public: see ``synapse_workers.routing``.

    ``nginx``
        Listeners, limits and answers.

    ``digest``
        A digest of all that makes the configuration: the running nginx is asked for it on ``nginx.status_socket``.

    CLI Example:

    .. code-block:: bash

        salt-call synapse_nginx.context
    """
    settings = __salt__["synapse_pillar.settings"]()
    plan = __salt__["synapse_workers.plan"]()
    known = {
        "plan": {key: plan[key] for key in ("upstreams", "routes", "public")},
        "nginx": {
            "client": settings["nginx"]["client"],
            "internal": __salt__["synapse_appservice.listen"](),
            "federation": settings["nginx"]["federation"],
            "server_names": [],
            "max_upload_size": settings["max_upload_size"],
            "admin_allow": settings["nginx"]["admin_allow"],
            "trusted_proxies": settings["nginx"]["trusted_proxies"],
            "well_known": well_known(settings),
            "status_socket": f"{settings['directories']['run']}/nginx/status.sock",
            "maintenance_switch": __salt__["synapse_maintenance.switch_file"](),
            "log_directory": "/var/log/nginx",
        },
    }
    templates = [__salt__["cp.hash_file"](url)["hsum"] for url in TEMPLATES]
    known["digest"] = hashlib.sha256(json.dumps([known, templates], sort_keys=True).encode()).hexdigest()
    return known


def well_known(settings):
    """
    Return what ``/.well-known/matrix/client`` and ``server`` answer, by name; None for one that is switched off.

    settings
        See ``synapse_pillar.settings``. What the pillar adds is merged over the formula's answer.

    Source: https://spec.matrix.org/latest/client-server-api/#well-known-uri and
    https://spec.matrix.org/latest/server-server-api/#getwell-knownmatrixserver

    CLI Example:

    .. code-block:: bash

        salt-call synapse_nginx.well_known '{"server_name": "example.org", "public_base_url": null, "nginx": ...}'
    """
    url = (settings["public_base_url"] or f"https://{settings['server_name']}").rstrip("/")
    host = url.split("://", 1)[1].split("/", 1)[0]
    answers = {
        "client": {"m.homeserver": {"base_url": url}},
        "server": {"m.server": host if ":" in host.rpartition("]")[2] else f"{host}:443"},
    }
    given = settings["nginx"]["well_known"]
    return {
        name: None if given[name] is None else __salt__["synapse_pillar.merge"](answer, given[name])
        for name, answer in answers.items()
    }
