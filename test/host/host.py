#!/usr/bin/env python3
"""A disposable server: systemd as PID 1, with a Docker engine, PostgreSQL, Redis, nginx and Salt.

It is a container, and the formula is applied in it as on a server:

    with Host.up("synapse-demo", publish={8008: 8008}) as host:
        host.salt("saltutil.sync_all")
        host.salt("state.apply", "synapse", pillar={...})

By hand: ``host.py up``, ``host.py shell``, ``host.py exec -- journalctl -e``, ``host.py down``.

Whatever takes long is made once and kept under ``~/.cache/synapse-formula``: a Docker engine, where
none answers; the host's image, in that engine; and the Synapse image, as a file that every host loads
into its own engine. Needs Python's standard library only, root, and what setup.sh installs.
"""

import argparse
import configparser
import contextlib
import fcntl
import hashlib
import io
import ipaddress
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
IMAGES = HERE / "images"
ROOTFS = HERE / "rootfs"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "synapse-formula"
OUR_ENGINE = f"unix://{CACHE}/engine/docker.sock"
LABEL = "synapse-formula"
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

SYNAPSE_VERSION = (IMAGES / "synapse/requirements.txt").read_text().split("==")[1].strip()
SYNAPSE_IMAGE = f"matrixdotorg/synapse:v{SYNAPSE_VERSION}"

# What --privileged would give, less what not every machine has to give: see also _capabilities().
PRIVILEGES = [
    *("--security-opt", "seccomp=unconfined"),
    *("--security-opt", "apparmor=unconfined"),
    *("--security-opt", "systempaths=unconfined"),
    *("--device-cgroup-rule", "a *:* rwm"),
    *("--cgroupns", "private"),
]


class HostError(Exception):
    """A command in the host, or one that makes the host, failed."""


def progress(message):
    print(f"[{time.monotonic() - _START:6.1f} s] {message}", file=sys.stderr, flush=True)


_START = time.monotonic()


@contextlib.contextmanager
def locked(name):
    """Let one process at a time do what later ones then find done."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(CACHE / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def wait_until(condition, seconds, what):
    """Return the first true value of ``condition()``."""
    deadline = time.monotonic() + seconds
    while True:
        if value := condition():
            return value
        if time.monotonic() > deadline:
            raise HostError(f"gave up after {seconds} s: {what}")
        time.sleep(0.05)


# --- The engine ---------------------------------------------------------------------------------


def docker(*argv, check=True, **kwargs):
    """Run the docker client against the engine; standard output is in the result."""
    kwargs = {"text": True, "capture_output": True} | kwargs
    done = subprocess.run(["docker", *argv], env=os.environ | {"DOCKER_HOST": engine()}, **kwargs)
    if check and done.returncode:
        raise HostError(f"docker {shlex.join(argv)}: exit {done.returncode}\n{done.stderr}")
    return done


def engine():
    """Return the DOCKER_HOST of an engine that answers, starting one where there is none."""
    if not engine.address:
        candidates = [os.environ.get("DOCKER_HOST"), "unix:///var/run/docker.sock", OUR_ENGINE]
        with locked("engine"):
            engine.address = next(filter(_answers, candidates), None) or _start_engine()
    return engine.address


engine.address = None


def _answers(address):
    command = ["docker", "--host", address or "", "version"]
    return bool(address) and subprocess.run(command, capture_output=True).returncode == 0


def _start_engine():
    home = CACHE / "engine"
    home.mkdir(parents=True, exist_ok=True)
    for pid_file in [home / "docker.pid", *home.glob("exec/**/*.pid")]:
        pid_file.unlink(missing_ok=True)  # of an earlier boot: the number may be somebody else's now
    progress("starting a Docker engine")
    command = ["dockerd", "--host", OUR_ENGINE, "--pidfile", home / "docker.pid", "--group", "root"]
    command += ["--data-root", home / "data", "--exec-root", home / "exec"]
    command += ["--bridge", _bridge(), "--mtu", str(_mtu()), "--log-level", "warn"]
    with open(home / "dockerd.log", "w") as log:
        daemon = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, cwd="/"
        )

    def up():
        if daemon.poll() is not None:
            raise HostError(f"dockerd: exit {daemon.returncode}\n{(home / 'dockerd.log').read_text()}")
        return _answers(OUR_ENGINE)

    wait_until(up, 60, f"the Docker engine, see {home}/dockerd.log")
    return OUR_ENGINE


def _bridge():
    """Return the engine's network bridge: one of its own, as any other dockerd may remove docker0."""
    if not Path("/sys/class/net", LABEL).exists():
        commands = [
            f"ip link add {LABEL} mtu {_mtu()} type bridge",
            f"ip address add {_free_network()[1]}/24 dev {LABEL}",
            f"ip link set {LABEL} up",
        ]
        for command in commands:
            subprocess.run(command.split(), check=True)
    return LABEL


def _free_network():
    """Return a private network that no route of this machine leads to."""
    routes = subprocess.run(["ip", "-json", "-4", "route"], capture_output=True, check=True).stdout
    taken = [ipaddress.ip_network(route["dst"]) for route in json.loads(routes) if route["dst"] != "default"]
    candidates = ipaddress.ip_network("172.31.0.0/16").subnets(new_prefix=24)
    return next(network for network in candidates if not any(map(network.overlaps, taken)))


def _mtu():
    """Return what the way out of this machine carries in one packet."""
    for line in Path("/proc/net/route").read_text().splitlines()[1:]:
        interface, destination = line.split()[:2]
        if destination == "00000000":
            return int(Path(f"/sys/class/net/{interface}/mtu").read_text())
    return 1500


# --- What the host takes over from this machine ---------------------------------------------------


def mirrors(suite="bookworm"):
    """Return sources.list lines for ``suite`` from the mirrors that this machine uses itself."""
    here = next(
        line.partition("=")[2].strip('"')
        for line in Path("/etc/os-release").read_text().splitlines()
        if line.startswith("VERSION_CODENAME=")
    )
    command = ["apt-get", "indextargets", "--format", "$(REPO_URI) $(RELEASE) $(COMPONENT)"]
    targets = subprocess.run([*command, "Created-By: Packages"], text=True, capture_output=True, check=True).stdout
    wanted = {here, f"{here}-updates", f"{here}-security"}
    lines = {}
    for target in targets.splitlines():
        uri, release, component = target.split()
        if release in wanted and component == "main":
            lines.setdefault(f"deb {uri} {release.replace(here, suite, 1)} main")
    if not lines:
        raise HostError(f"no Debian mirror among this machine's apt sources for {here}")
    return "\n".join(lines) + "\n"


def pip_settings():
    """Return pip's [global] settings of this machine, those that hold elsewhere too."""
    names = ["index-url", "extra-index-url", "trusted-host", "proxy", "timeout", "default-timeout", "cert"]
    files = configparser.RawConfigParser()
    files.read(
        [
            "/etc/pip.conf",
            Path.home() / ".pip/pip.conf",
            Path.home() / ".config/pip/pip.conf",
            os.environ.get("PIP_CONFIG_FILE", os.devnull),
        ]
    )
    settings = {}
    for name in names:
        value = os.environ.get("PIP_" + name.upper().replace("-", "_"))
        value = value or files.get("global", name, fallback="")
        value = " ".join(word for word in value.split() if not word.startswith("file:"))
        if value:
            settings[name] = value
    return settings


def ca_bundle():
    candidates = [pip_settings().get("cert"), os.environ.get("SSL_CERT_FILE")]
    candidates.append("/etc/ssl/certs/ca-certificates.crt")
    return Path(next(path for path in candidates if path and Path(path).is_file()))


def pip_conf(cert):
    settings = pip_settings() | {"cert": cert, "disable-pip-version-check": "true"}
    return "[global]\n" + "".join(f"{name} = {value}\n" for name, value in settings.items())


# --- Images ---------------------------------------------------------------------------------------


def digest(*inputs):
    """Return twelve hex digits that change with any of the files, in directories or not."""
    files = [file for path in inputs for file in sorted([path, *path.rglob("*")]) if file.is_file()]
    total = hashlib.sha256()
    for file in files:
        total.update(f"{file.relative_to(HERE)} {file.stat().st_mode & 0o111:o}\0".encode())
        total.update(file.read_bytes())
    return total.hexdigest()[:12]


def host_image():
    """Return the host image's tag, having built it where the engine has none."""
    tag = f"synapse-formula-host:{digest(IMAGES / 'bootstrap', IMAGES / 'host')}"
    with locked("host-image"):
        if docker("image", "inspect", tag, check=False).returncode:
            _build("host", tag, [f"ENV PATH={PATH}", "ENV container=docker", "ENV LANG=C.UTF-8"])
    return tag


def synapse_image():
    """Return the file of the Synapse image, having pulled or built it where there is none."""
    file = CACHE / "images" / f"synapse-{digest(IMAGES / 'bootstrap', IMAGES / 'synapse')}.tar"
    with locked("synapse-image"):
        if not file.exists():
            file.parent.mkdir(exist_ok=True)
            if not _pull(SYNAPSE_IMAGE):
                changes = ['ENTRYPOINT ["/start.py"]', f"ENV PATH={PATH}"]
                changes += ["EXPOSE 8008/tcp 8009/tcp 8448/tcp"]
                changes += [
                    "HEALTHCHECK --start-period=5s --interval=15s --timeout=5s"
                    " CMD curl -fSs http://localhost:8008/health || exit 1"
                ]
                _build("synapse", SYNAPSE_IMAGE, changes)
            with tempfile.NamedTemporaryFile(dir=file.parent) as partial:
                docker("save", "--output", partial.name, SYNAPSE_IMAGE)
                os.link(partial.name, file)
    return file


def _pull(tag):
    try:
        return docker("pull", "--quiet", tag, check=False, timeout=120).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def _build(image, tag, changes):
    progress(f"building {tag}")
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        bundle = Path(scratch, "ca.crt")
        bundle.write_bytes(ca_bundle().read_bytes())
        conf = Path(scratch, "pip.conf")
        conf.write_text(pip_conf("/tmp/build/ca.crt"))
        # No more of the environment: REQUESTS_CA_BUNDLE, say, would outweigh pip's own settings.
        names = ["PATH", "HOME", "http_proxy", "https_proxy", "no_proxy"]
        environment = {name: os.environ[name] for name in names if name in os.environ}
        environment |= {"LANG": "C.UTF-8"}
        environment |= {"MIRRORS": mirrors(), "CA_BUNDLE": str(bundle), "PIP_CONF": str(conf)}
        log = CACHE / f"{image}-image.log"
        with open(log, "w") as stderr:
            bootstrap = subprocess.Popen(
                [IMAGES / image / "build"], env=environment, stdout=subprocess.PIPE, stderr=stderr
            )
            options = [word for change in changes for word in ("--change", change)]
            imported = docker("import", *options, "-", tag, stdin=bootstrap.stdout, check=False)
            bootstrap.stdout.close()
        if bootstrap.wait() or imported.returncode:
            docker("image", "rm", tag, check=False)
            raise HostError(f"building {tag} failed:\n{log.read_text()[-4000:]}{imported.stderr}")
    progress(f"built {tag} in {time.monotonic() - started:.0f} s")


def build():
    """Make both images, side by side."""
    engine()
    failures = []

    def attempt(make):
        try:
            make()
        except HostError as failure:
            failures.append(failure)

    makers = [threading.Thread(target=attempt, args=(f,)) for f in (host_image, synapse_image)]
    for maker in makers:
        maker.start()
    for maker in makers:
        maker.join()
    if failures:
        raise failures[0]


# --- The host -------------------------------------------------------------------------------------


class Host:
    """One running host. Its name is the container's name, the hostname and Salt's minion id."""

    def __init__(self, name="synapse-demo"):
        self.name = name
        self.volume = f"{name}-docker"

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.down()

    @classmethod
    def up(cls, name="synapse-demo", publish=None, synapse=True):
        """Boot a host, or take the one that runs if it is what would be booted now.

        ``publish`` maps this machine's loopback ports to the host's. ``synapse=False`` leaves the
        Synapse image out.
        """
        host = cls(name)
        publish = publish or {}
        ports = [f"127.0.0.1:{ours}:{theirs}" for ours, theirs in sorted(publish.items())]
        (ROOT / ".venv").mkdir(exist_ok=True)  # for host-init to hide
        image_file = synapse_image() if synapse else None
        image = host_image()
        arguments = [
            *("--name", name, "--hostname", name, "--label", f"{LABEL}={name}"),
            *_capabilities(),
            *PRIVILEGES,
            *("--stop-signal", "SIGRTMIN+3", "--stop-timeout", "120"),
            *("--tmpfs", "/run:exec", "--tmpfs", "/tmp:exec"),
            *("--volume", f"{host.volume}:/var/lib/docker"),
            *("--volume", f"{ROOT}:/srv/formula:ro"),
            *("--volume", f"{CACHE / 'images'}:/srv/images:ro"),
            *(word for port in ports for word in ("--publish", port)),
            *("--entrypoint", "/usr/local/sbin/host-init"),
            image,
        ]
        recipe = f"{digest(ROOTFS)} {shlex.join(arguments)}"
        if host._inspect(f'{{{{index .Config.Labels "{LABEL}.recipe"}}}}') != recipe:
            host.down()
            docker("volume", "create", "--label", f"{LABEL}={name}", host.volume)
            docker("create", "--label", f"{LABEL}.recipe={recipe}", *arguments)
            progress(f"{name} boots for the first time")
        if host._inspect("{{.State.Running}}") != "true":
            host._hand_over()
        host._start()
        if image_file:
            host._load(image_file)
        return host

    def down(self):
        """Remove the host and all that was in it."""
        docker("rm", "--force", "--volumes", self.name, check=False)
        docker("volume", "rm", "--force", self.volume)

    def restart(self):
        """Reboot: shut down in order, then boot."""
        docker("stop", self.name)
        self._start()

    def kill(self):
        """Lose power, then boot."""
        docker("kill", self.name)
        self._start()

    def run(self, *argv, check=True, input=None, timeout=600):
        """Run a command in the host and return its CompletedProcess, in text.

        When ``timeout`` seconds are over, the command is ended and its exit status is 124.
        """
        limit = ["timeout", "--kill-after=5", str(timeout)]
        stdin = {"stdin": subprocess.DEVNULL} if input is None else {"input": input}
        options = ["--interactive"] if input is not None else []
        done = docker("exec", *options, self.name, *limit, *argv, check=False, **stdin)
        if check and done.returncode:
            raise HostError(f"{self.name}: {shlex.join(argv)}: exit {done.returncode}\n{done.stdout}{done.stderr}")
        return done

    def sh(self, script, **kwargs):
        """Run a bash script, which ends at the first command that fails."""
        return self.run("bash", "-euo", "pipefail", "-c", script, **kwargs)

    def salt(self, fun, *args, pillar=None, timeout=1800, **kwargs):
        """Return what ``salt-call FUN ARGS...`` returns.

        Where Salt could not carry it out, as when an SLS does not render, this raises a HostError
        with all that Salt said. That a state failed is for the caller to see in what is returned.
        """
        if pillar is not None:
            kwargs["pillar"] = pillar
        words = [_salt_word(value) for value in args]
        words += [f"{name}={_salt_word(value)}" for name, value in kwargs.items()]
        command = ["salt-call", "--local", "--out=json", "--out-indent=-1", fun, *words]
        done = self.run(*command, check=False, timeout=timeout)
        try:
            result = json.loads(done.stdout)["local"]
        except (ValueError, KeyError):
            result = None
        refused = isinstance(result, str) and done.returncode
        if result is None or refused or (fun.startswith("state.") and not isinstance(result, dict)):
            raise HostError(f"{self.name}: {fun}: exit {done.returncode}\n{done.stdout}{done.stderr}")
        return result

    def write(self, path, text, mode="0644"):
        """Write a file of root's, with its directories."""
        self.run("install", "-D", "-m", mode, "/dev/stdin", path, input=text)

    def read(self, path):
        return self.run("cat", path).stdout

    @property
    def address(self):
        """The host's IP address, to be reached from this machine and from other hosts."""
        return self._inspect("{{.NetworkSettings.IPAddress}}")

    def _inspect(self, template):
        """Return what docker says of the container; nothing if there is none."""
        return docker("container", "inspect", "--format", template, self.name, check=False).stdout.strip()

    def _hand_over(self):
        """Put in place what the image leaves open, and what reaches package mirrors from here."""
        docker("cp", f"{ROOTFS}/.", f"{self.name}:/")
        bundle = "/etc/ssl/certs/ca-certificates.crt"
        files = {
            bundle: ca_bundle().read_bytes(),
            "/etc/pip.conf": pip_conf(bundle).encode(),
            "/etc/apt/sources.list": mirrors().encode(),
        }
        archive = io.BytesIO()
        with tarfile.open(fileobj=archive, mode="w") as tar:
            for path, content in files.items():
                entry = tarfile.TarInfo(path.lstrip("/"))
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
        docker("cp", "-", f"{self.name}:/", input=archive.getvalue(), text=False)

    def _start(self):
        docker("start", self.name)
        # Its exit status tells that one unit or another failed, which is no matter here.
        ready = "[[ $(systemctl is-system-running --wait || true) =~ ^(running|degraded)$ ]]"
        ready += " && systemctl is-active --quiet docker"

        def booted():
            if self._inspect("{{.State.Running}}") != "true":
                raise HostError(f"{self.name} stopped while it booted\n{docker('logs', self.name).stdout}")
            return self.sh(ready, check=False).returncode == 0

        wait_until(booted, 120, f"{self.name} boots")

    def _load(self, file):
        if self.run("docker", "image", "inspect", SYNAPSE_IMAGE, check=False).returncode:
            progress(f"{self.name} loads {SYNAPSE_IMAGE}")
            self.run("docker", "load", "--quiet", "--input", f"/srv/images/{file.name}")


def _capabilities():
    """Return the options that give all capabilities there are.

    Engines before 23 take "all" literally, and fail where CAP_SYS_RESOURCE is not to be had; later
    ones fail when they are told to drop it there.
    """
    major = int(docker("version", "--format", "{{.Server.Version}}").stdout.split(".")[0])
    return ["--cap-add", "ALL"] + (["--cap-drop", "SYS_RESOURCE"] if major < 23 else [])


def _salt_word(value):
    """Write a value such that Salt's reading of its command line gives it back."""
    plain = isinstance(value, str) and re.fullmatch(r"[A-Za-z_/.][\w/.-]*", value)
    constants = {"true", "false", "yes", "no", "on", "off", "null", "none", "y", "n"}
    return value if plain and value.lower() not in constants else json.dumps(value)


def clean():
    """Remove every host, and all that was made for hosts."""
    hosts = docker("ps", "--all", "--filter", f"label={LABEL}", "--format", "{{.Names}}").stdout
    for name in hosts.split():
        Host(name).down()
    tags = docker("images", "--format", "{{.Repository}}:{{.Tag}}", "synapse-formula-host").stdout
    docker("image", "rm", "--force", SYNAPSE_IMAGE, *tags.split(), check=False)
    if engine() == OUR_ENGINE:
        pid = int((CACHE / "engine/docker.pid").read_text())
        os.kill(pid, signal.SIGTERM)
        wait_until(lambda: not Path(f"/proc/{pid}").exists(), 30, "the Docker engine ends")
        subprocess.run(["ip", "link", "delete", LABEL], check=True)
    shutil.rmtree(CACHE)


# --- By hand --------------------------------------------------------------------------------------


def main():
    parser = argparse.ArgumentParser(description="The disposable host.")
    parser.add_argument("--name", default="synapse-demo")
    commands = parser.add_subparsers(dest="command", required=True)
    up = commands.add_parser("up", help="boot a host, or wait for the one that runs")
    up.add_argument("--publish", action="append", default=[], metavar="OURS:THEIRS")
    commands.add_parser("down", help="remove it")
    commands.add_parser("restart", help="reboot it")
    commands.add_parser("shell", help="a root shell in it")
    run = commands.add_parser("exec", help="run a command in it")
    run.add_argument("argv", nargs=argparse.REMAINDER)
    commands.add_parser("build", help="make the engine and the images")
    commands.add_parser("clean", help="remove all hosts, the images and the engine")
    commands.add_parser("env", help="print the DOCKER_HOST that the hosts run on")
    options = parser.parse_args()

    host = Host(options.name)
    if options.command == "up":
        Host.up(options.name, dict(map(int, port.split(":")) for port in options.publish))
        progress(f"{options.name} is up")
    elif options.command == "build":
        build()
    elif options.command == "clean":
        clean()
    elif options.command == "env":
        print(f"export DOCKER_HOST={engine()}")
    elif options.command in ("shell", "exec"):
        argv = ["bash", "-l"] if options.command == "shell" else options.argv
        argv = argv[1:] if argv[:1] == ["--"] else argv
        terminal = ["--tty"] if sys.stdin.isatty() else []
        os.environ["DOCKER_HOST"] = engine()
        os.execvp("docker", ["docker", "exec", "--interactive", *terminal, host.name, *argv])
    else:
        getattr(host, options.command)()


if __name__ == "__main__":
    try:
        main()
    except HostError as error:
        sys.exit(str(error))
