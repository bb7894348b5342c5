"""
nginx with the configuration that the formula generates, running by itself.
"""

import importlib.util
import os
import pathlib
import socket
import subprocess

import jinja2
import yaml

ROOT = pathlib.Path(__file__).parents[2]
LIMITS = yaml.safe_load((ROOT / "synapse/defaults.yaml").read_text())["nginx"]["limits"]
DIGEST = "0123456789abcdef"


class Front:
    """
    nginx before the processes of a plan.

    ``plan`` has what ``synapse_workers.routing`` returns; ``settings`` are those of the template that matter; ``beside`` is
    nginx configuration that stands beside the formula's.
    """

    def __init__(self, directory, plan, beside="", **settings):
        self.directory, self.plan = directory, plan
        self.client, self.federation = free_port(), free_port()
        self.settings = {
            "client": {"listen": [f"127.0.0.1:{self.client}"], "tls": None},
            "federation": {"listen": [f"127.0.0.1:{self.federation}"], "tls": None, "enabled": True},
            "server_names": [],
            "max_upload_size": "20M",
            "admin_allow": ["127.0.0.1"],
            "trusted_proxies": ["127.0.0.1"],
            "limits": LIMITS,
            "media_cache": None,
            "media_cache_directory": str(directory / "cache"),
            "well_known": {"client": None, "server": None},
            "status_socket": str(directory / "status.sock"),
            "back_door": str(directory / "back-door.sock"),
            "maintenance_switch": str(directory / "maintenance"),
            "log_directory": str(directory),
            "internal": None,
            "gate_wait": 120,
            **settings,
        }
        self.config = render(self.plan, self.settings)
        (directory / "matrix-synapse.conf").write_text(self.config)
        (directory / "nginx.conf").write_text(
            ("user root root;" if os.geteuid() == 0 else "")
            + f"pid {directory}/pid; worker_processes 2; events {{}} http {{ include {directory}/matrix-synapse.conf;"
            + "".join(
                f"{it}_temp_path {directory}/{it};" for it in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
            )
            + beside
            + "}"
        )

    def run(self, *arguments):
        at = self.directory
        command = ["nginx", "-p", at, "-c", at / "nginx.conf", "-e", at / "start.log", *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True)

    def __enter__(self):
        self.run()
        return self

    def __exit__(self, *_):
        self.run("-s", "stop")


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def module(name):
    """One of the formula's execution modules, by itself."""
    spec = importlib.util.spec_from_file_location(name, ROOT / f"_modules/{name}.py")
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def render(plan, settings, version=None):
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(ROOT), undefined=jinja2.StrictUndefined)
    template = environment.get_template("synapse/nginx/files/matrix-synapse.conf.jinja")

    def run_stderr(command, ignore_retcode):
        assert ignore_retcode
        return version or subprocess.run(command.split(), capture_output=True, text=True, check=False).stderr

    return template.render(plan=plan, nginx=settings, digest=DIGEST, salt={"cmd.run_stderr": run_stderr})
