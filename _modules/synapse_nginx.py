"""
What nginx needs to know to stand in front of Synapse.
"""

import hashlib
import json
import pathlib
import urllib.parse

FILES = "salt://synapse/nginx/files"
TEMPLATES = ("matrix-synapse.conf", "macros", "nginx.service", "gate.socket", "gate.service")

# Seconds that a request waits for a process that is about to be back.
GATE_WAIT = 120


def context():
    """
    Return the context of nginx's template: a dict with

    ``plan``
        Upstreams, routes, kinds of requests and what is public: see ``synapse_workers.routing``.

    ``nginx``
        Listeners, limits and answers.

    ``gates``
        The units of the sockets where requests wait for a process that is about to be back.

    ``digest``
        A digest of all that makes the configuration, nginx's and that of its units: the running nginx is asked for it on
        ``nginx.status_socket``.

    CLI Example:

    .. code-block:: bash

        salt-call synapse_nginx.context
    """
    settings = __salt__["synapse_pillar.settings"]()
    plan = __salt__["synapse_workers.plan"]()
    known = {
        "plan": {key: plan[key] for key in ("upstreams", "routes", "kinds", "public")},
        "gates": [f"synapse-gate@{pathlib.PurePath(path).stem}.socket" for path in _gates(plan["upstreams"])],
        "nginx": {
            "client": settings["nginx"]["client"],
            "internal": __salt__["synapse_appservice.listen"](),
            "federation": settings["nginx"]["federation"],
            "server_names": _server_names(settings),
            "max_upload_size": settings["max_upload_size"],
            "admin_allow": settings["nginx"]["admin_allow"],
            "trusted_proxies": settings["nginx"]["trusted_proxies"],
            "limits": {**settings["nginx"]["limits"], "exempt": _exempt(settings)},
            "media_cache": settings["nginx"]["media_cache"],
            "media_cache_directory": media_cache_directory(),
            "well_known": well_known(settings),
            "status_socket": f"{settings['directories']['run']}/nginx/status.sock",
            "back_door": back_door(),
            "maintenance_switch": __salt__["synapse_maintenance.switch_file"](),
            "log_directory": "/var/log/nginx",
            "user": settings["nginx"]["user"],
            "gate_wait": GATE_WAIT,
        },
    }
    templates = [__salt__["cp.hash_file"](f"{FILES}/{name}.jinja")["hsum"] for name in TEMPLATES]
    inputs = json.dumps([known, templates, _certificates(settings)], sort_keys=True)
    known["digest"] = hashlib.sha256(inputs.encode()).hexdigest()
    return known


def _gates(upstreams):
    """Each once, in the order of the processes."""
    return list(dict.fromkeys(path for upstream in upstreams for path in upstream["gates"]))


def back_door():
    """
    Return the path of the socket by which root, and nobody else, reaches Synapse through nginx while users get 503.

    CLI Example:

    .. code-block:: bash

        salt-call synapse_nginx.back_door
    """
    return f"{__salt__['synapse_pillar.settings']()['directories']['run']}/root/nginx.sock"


def media_cache_directory():
    """
    Return the path of the directory in which nginx keeps media, if it does.

    CLI Example:

    .. code-block:: bash

        salt-call synapse_nginx.media_cache_directory
    """
    return "/var/cache/nginx-matrix-synapse"


def _exempt(settings):
    """Whom limits do not hold for: bridges in the Docker network, and whom the pillar names."""
    return sorted({*settings["nginx"]["limits"]["exempt"], settings["docker"]["network"]["subnet"]})


def _server_names(settings):
    """The hosts that requests for the homeserver name, so that nginx can serve other sites on the same address."""
    urls = [settings["public_base_url"] or "", f"//{settings['server_name']}"]
    urls += __salt__["synapse_appservice.homeserver"]()["url"].values()
    hosts = {urllib.parse.urlsplit(url or "").hostname for url in urls} - {None}
    return sorted(f"[{host}]" if ":" in host else host for host in hosts)


def _certificates(settings):
    """A digest of each file that a listener's TLS needs: nginx reads it anew only when it is told to."""
    files = [path for server in ("client", "federation") for path in (settings["nginx"][server]["tls"] or {}).values()]
    there = [path for path in map(pathlib.Path, sorted(set(files))) if path.is_file()]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in there}


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
    url = __salt__["synapse_pillar.public_base_url"](settings).rstrip("/")
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
