"""
Pull, build, extend and check the Docker image that every Synapse process runs in.

Every function takes ``image``, the value of the pillar ``synapse:image`` merged over the defaults:

.. code-block:: yaml

    version: v1.163.2
    source: pull                          # or: build
    repository: matrixdotorg/synapse      # source: pull
    build:                                # source: build
      base: debootstrap                   # or an image reference, such as debian:bookworm-slim
      suite: bookworm                     # the Debian release that debootstrap makes
      mirror: null                        # and from where (null: its own default)
      extras: [redis]                     # pip's extras of Synapse
    network: null                         # network of the build steps, such as host
    ca_certificates: null                 # a file on the minion that the build steps trust
    build_arguments: {}                   # no place for secrets: the image's history shows them
    customize:
      modules: {ldap3: true}              # known in synapse/data/modules.yaml
      dockerfile: ""                      # Dockerfile steps

An image comes into being link by link: a base (made by debootstrap, or pulled), Synapse on it
(built; or pulled, then it is the first link), and the extension ``FROM`` it, if one is asked for.
A link that is built bears the digest of its inputs and the id of the image below it as labels.
It is built again when, and only when, one of them differs from what is wanted now. That the image
below is gone, as after a prune, is no difference.

Nothing is tagged before it was seen to work, so a failure leaves images and containers as they
were. No Synapse process compiles byte code: images built here contain it, and for a pulled one
there is a volume that containers mount read-only and name in ``PYTHONPYCACHEPREFIX``.

The Docker engine is the one that ``DOCKER_HOST`` names, or that of the local default socket.
"""

import collections
import contextlib
import hashlib
import importlib.util
import io
import json
import logging
import os
import re
import shlex
import shutil
import subprocess
import tarfile

import jinja2
import salt.utils.yaml
from salt.exceptions import CommandExecutionError, SaltInvocationError

log = logging.getLogger(__name__)

__virtualname__ = "synapse_image"

REPOSITORY = "localhost/matrixdotorg/synapse"
BASE_REPOSITORY = f"{REPOSITORY}-base"

SOCKET = "/var/run/docker.sock"

# Labels: what an image was made of, and that a container or volume is of this module's making.
# What synapse_process puts on the containers of processes.
PROCESS_LABEL = "org.matrix.synapse.process"
INPUTS_LABEL = "org.matrix.synapse.inputs"
FROM_LABEL = "org.matrix.synapse.from"
PURPOSE_LABEL = "org.matrix.synapse.purpose"

PYCACHE = "matrix-synapse-pycache"
PYCACHE_PATH = "/pycache"
PYCACHE_MARKER = "complete"

PACKAGES = [
    "ca-certificates",
    "curl",
    "libjemalloc2",
    "libpq5",
    "openssl",
    "python3",
    "python3-pip",
    "python3-psycopg2",
]
PACKAGES_OF_EXTRAS = {"saml2": ["xmlsec1"], "all": ["xmlsec1"]}
SUITES_WITHOUT_SECURITY = ("sid", "unstable")

# Not needed in a container, and half of what debootstrap leaves.
NOT_IMPORTED = [
    "./dev/*",
    "./usr/share/doc/*",
    "./usr/share/locale/*",
    "./usr/share/man/*",
    "./var/cache/apt/*",
    "./var/lib/apt/lists/*",
]

# Seconds. A build step may be silent for long, a question to the engine is answered at once.
BUILD_TIMEOUT = 3600
READ_TIMEOUT = 60
RUN_TIMEOUT = 600

NOBODY = "65534:65534"

Link = collections.namedtuple("Link", "kind reference digest dockerfile context arguments imports", defaults=[None] * 5)


def __virtual__():
    return __virtualname__


def references(image):
    """
    Return the references of the images that an image is made of, without asking Docker.

    The keys are ``base`` (of a self-built image, else ``None``), ``synapse``, ``customized``
    (``None`` unless a module or a Dockerfile step is asked for), and ``wanted``: the last of
    them, which containers run.

    CLI Example:

    .. code-block:: bash

        salt-call synapse_image.references "$IMAGE"

    image
        The image's settings, a mapping as shown on top of this module.
    """
    version = image["version"]
    base = customized = None
    if image["source"] == "build":
        base = image["build"]["base"]
        if base == "debootstrap":
            suite = image["build"]["suite"]
            base = f"{BASE_REPOSITORY}:{suite}-{_digest(suite, image['build']['mirror'])[:12]}"
        synapse = f"{REPOSITORY}:{version}"
    else:
        synapse = f"{image['repository']}:{version}"
    customize = image["customize"]
    if any((customize["modules"] or {}).values()) or (customize["dockerfile"] or "").strip():
        customized = f"{REPOSITORY}:{version}-customized"
    return {
        "base": base,
        "synapse": synapse,
        "customized": customized,
        "wanted": customized or synapse,
    }


def sdk_installed():
    """
    Return whether Salt's Python has the Docker SDK, which the other functions need.

    CLI Example:

    .. code-block:: bash

        salt-call synapse_image.sdk_installed
    """
    return importlib.util.find_spec("docker") is not None


def dockerfiles(image):
    """
    Return the Dockerfiles that an image is built by, by reference, in the order of their builds.

    Raises ``SaltInvocationError`` for an unknown module, and for a version to be built that names
    no release of Synapse.

    CLI Example:

    .. code-block:: bash

        salt-call synapse_image.dockerfiles "$IMAGE"

    image
        The image's settings, a mapping as shown on top of this module.
    """
    return {link.reference: link.dockerfile for link in _links(image) if link.kind == "build"}


def wanted(image):
    """
    Return the image that containers are to run, as far as it exists. This changes nothing.

    ``reference`` is its name. ``id`` is its id if it is present and made of what ``image`` says,
    else ``None``. ``pycache`` is the name of the volume that holds its byte code, which follows
    from the id alone, or ``None`` where the image itself contains it, or there is no id.

    Raises ``CommandExecutionError`` when the Docker engine cannot be asked.

    CLI Example:

    .. code-block:: bash

        salt-call synapse_image.wanted "$IMAGE"

    image
        The image's settings, a mapping as shown on top of this module.
    """
    links = _links(image)
    last = None
    if _is_installed():
        with _docker() as client:
            found, stale = _survey(client, links)
        last = None if stale else found[-1]
    return {
        "reference": links[-1].reference,
        "id": last and last["Id"],
        "pycache": last and _pycache(last),
    }


def pending(image):
    """
    Return what :py:func:`ensure` would change, and change nothing.

    The result is a mapping of references, and of ``pycache`` for the volume of byte code, to
    mappings of ``old`` (an image id or ``None``) and ``new`` (words, as there is no id yet).

    Raises ``CommandExecutionError`` when the Docker engine cannot be asked.

    CLI Example:

    .. code-block:: bash

        salt-call synapse_image.pending "$IMAGE"

    image
        The image's settings, a mapping as shown on top of this module.
    """
    links = _links(image)
    found, stale = [None] * len(links), range(len(links))
    volume = None
    if _is_installed():
        with _docker() as client:
            found, stale = _survey(client, links)
            if not stale:
                volume = _pycache(found[-1])
                if volume and _is_complete(client, volume):
                    volume = None
    changes = {}
    for i in stale:
        new = "to be pulled" if links[i].kind == "pull" else "to be built"
        changes[links[i].reference] = {"old": found[i] and found[i]["Id"], "new": new}
    if stale and links[-1].kind == "pull":
        volume = "to be filled"
    if volume:
        changes["pycache"] = {"old": None, "new": volume}
    return changes


def ensure(image):
    """
    Bring the image about: pull it, or build it, extend and check it, and have its byte code ready.

    Returns what has changed, a mapping of references to mappings of ``old`` and ``new`` ids, with
    the key ``pycache`` for a volume of byte code that was filled. It is empty if all was there.

    Raises ``CommandExecutionError`` when a pull, debootstrap, a build or a check fails, with the
    step that failed and the last lines of its output. Then no reference was moved to an image
    that does not work, and what the attempt left was removed.

    CLI Example:

    .. code-block:: bash

        salt-call --log-level=info synapse_image.ensure "$IMAGE"

    image
        The image's settings, a mapping as shown on top of this module.
    """
    links = _links(image)
    changes = {}
    with _docker(BUILD_TIMEOUT) as client:
        found, stale = _survey(client, links)
        for i in stale:
            below = found[i - 1] if i else None
            old = found[i] and found[i]["Id"]
            found[i] = _make(client, links[i], below, image)
            changes[links[i].reference] = {"old": old, "new": found[i]["Id"]}

        volume = _pycache(found[-1])
        if volume and not _is_complete(client, volume):
            _fill(client, volume, found[-1]["Id"])
            changes["pycache"] = {"old": None, "new": volume}
        if changes:
            _remove_finished_containers(client)
            _remove_superseded(client, volume)
    return changes


def removable(image, without_processes=False):
    """
    Return what :py:func:`remove` would remove and what it would leave, and change nothing.

    ``images`` maps references to ids: all that were built here, whatever their version, and the
    pulled one. ``volumes`` lists volumes of byte code. ``used`` lists the references and volumes
    that would have to go as well, but which a container uses.

    Raises ``CommandExecutionError`` when the Docker engine cannot be asked.

    CLI Example:

    .. code-block:: bash

        salt-call synapse_image.removable "$IMAGE"

    image
        The image's settings, a mapping as shown on top of this module.

    without_processes
        Say what it will be once the containers of Synapse's processes are gone.
    """
    if not _is_installed():
        return {"images": {}, "volumes": [], "used": []}
    with _docker() as client:
        return _removable(client, image, without_processes)


def remove(image):
    """
    Remove images that were built here, the pulled one, and volumes of byte code.

    What a container uses stays. A base image that was pulled stays too, as others may build on it.
    Returns what :py:func:`removable` returned before.

    Raises ``CommandExecutionError`` when the Docker engine refuses.

    CLI Example:

    .. code-block:: bash

        salt-call synapse_image.remove "$IMAGE"

    image
        The image's settings, a mapping as shown on top of this module.
    """
    if not _is_installed():
        return removable(image)
    with _docker(BUILD_TIMEOUT) as client:
        _remove_finished_containers(client)
        targets = _removable(client, image)
        # An image goes before the one that it was built from.
        for reference in sorted(targets["images"], key=_from_top):
            client.remove_image(reference)
        for volume in targets["volumes"]:
            client.remove_volume(volume)
        _remove_superseded(client, None)
    return targets


def _links(image):
    """The links of the chain, the lowest first, the one that containers run last."""
    refs = references(image)
    links = []
    if image["source"] == "build":
        made = image["build"]["base"] == "debootstrap"
        links.append(Link("debootstrap" if made else "pull", refs["base"]))
        links.append(_synapse_link(image, refs))
    else:
        links.append(Link("pull", refs["synapse"]))
    if refs["customized"]:
        links.append(_customized_link(image, refs, links[-1].digest))
    return links


def _synapse_link(image, refs):
    build = image["build"]
    version = _release(image["version"])
    if version is None:
        raise SaltInvocationError(f"Cannot build Synapse '{image['version']}': write a release, such as v1.163.2")
    security = (
        build["base"] == "debootstrap" and build["mirror"] is None and build["suite"] not in SUITES_WITHOUT_SECURITY
    )
    extras = sorted(build["extras"] or [])
    settings = {
        "from": refs["base"],
        "version": version,
        "security_suite": f"{build['suite']}-security" if security else None,
        "packages": PACKAGES + sum((PACKAGES_OF_EXTRAS.get(extra, []) for extra in extras), []),
        "requirement": f"matrix-synapse[{','.join(extras)}]=={version}",
    }
    return _built(refs["synapse"], "Dockerfile.jinja", settings, image, ["start.py"])


def _customized_link(image, refs, digest_below):
    known = _known_modules()
    switched_on = sorted(name for name, on in (image["customize"]["modules"] or {}).items() if on)
    unknown = [name for name in switched_on if name not in known]
    if unknown:
        raise SaltInvocationError(
            f"Unknown Synapse modules: {', '.join(unknown)}. Known are: {', '.join(sorted(known))}"
        )
    modules = [known[name] for name in switched_on]
    settings = {
        "from": refs["synapse"],
        "packages": sorted({package for module in modules for package in module["packages"]}),
        "requirements": [module["requirement"] for module in modules],
        "dockerfile": (image["customize"]["dockerfile"] or "").strip(),
    }
    imports = [module["import"] for module in modules]
    return _built(
        refs["customized"],
        "Dockerfile-customized.jinja",
        settings,
        image,
        digest_below=digest_below,
        imports=imports,
    )


def _built(reference, template, settings, image, files=(), digest_below=None, imports=()):
    arguments = {name: str(value) for name, value in (image["build_arguments"] or {}).items()}
    settings["arguments"] = arguments
    context = {name: _source(name) for name in (*files, "compile.py")}
    # How the build reaches its sources is no input: the result is the same.
    bare = _render(template, ca_certificates=False, **settings)
    return Link(
        "build",
        reference,
        digest=_digest(bare, context, arguments, imports, digest_below),
        dockerfile=_render(template, ca_certificates=bool(image["ca_certificates"]), **settings),
        context=context,
        arguments=arguments,
        imports=imports,
    )


def _render(template, **settings):
    environment = jinja2.Environment(loader=jinja2.FunctionLoader(_source), undefined=jinja2.StrictUndefined)
    environment.filters["quote"] = shlex.quote
    return environment.get_template(template).render(**settings) + "\n"


def _source(name):
    return _file(f"salt://synapse/image/files/{name}")


def _known_modules():
    return salt.utils.yaml.safe_load(_file("salt://synapse/data/modules.yaml"))


def _file(url):
    text = __salt__["cp.get_file_str"](url, saltenv=__opts__.get("saltenv") or "base")
    if not text:
        raise CommandExecutionError(f"The file server has no {url}")
    return text


def _digest(*inputs):
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def _release(version):
    match = re.match(r"v?(\d+\.\d+\.\d+(?:rc\d+)?)", version)
    return match and match[1]


def _is_installed():
    """Whether there can be images at all: a fresh machine has none, and that is no error."""
    return sdk_installed() and bool(os.environ.get("DOCKER_HOST") or os.path.exists(SOCKET))


@contextlib.contextmanager
def _docker(timeout=READ_TIMEOUT):
    """The API of the Docker engine; its errors become Salt's."""
    try:
        # Not on top: this takes its time, and Salt loads this module for every state run.
        import docker
        import requests
    except ImportError as err:
        raise CommandExecutionError(
            "Salt's Python has no Docker SDK: install it, as by 'salt-pip install docker'"
        ) from err
    try:
        client = docker.from_env(timeout=timeout)
        with contextlib.closing(client):
            yield client.api
    except (docker.errors.DockerException, requests.exceptions.RequestException) as err:
        raise CommandExecutionError(f"{type(err).__name__}: {err}") from err


@contextlib.contextmanager
def _tolerated():
    """What may be missing or in use already, so that it is no fault if Docker refuses."""
    import docker

    try:
        yield
    except docker.errors.APIError as err:
        log.debug("Docker refused: %s", err)


def _survey(client, links):
    """Return what is found under each reference, and the indices of the links to be made."""
    found = [_inspect(client, link.reference) for link in links]
    good = []
    for i, link in enumerate(links):
        labels = _labels(found[i]) if found[i] else {}
        below = found[i - 1] if i else None
        good.append(
            bool(found[i])
            and (
                link.kind != "build"
                or labels.get(INPUTS_LABEL) == link.digest
                and (below is None or good[i - 1] and labels.get(FROM_LABEL) == below["Id"])
            )
        )
    stale = []
    for i in reversed(range(len(links))):
        if good[i]:
            break
        stale.insert(0, i)
    return found, stale


def _inspect(client, reference):
    import docker

    try:
        return client.inspect_image(reference)
    except docker.errors.ImageNotFound:
        return None


def _labels(details):
    return (details.get("Config") or {}).get("Labels") or {}


def _make(client, link, below, image):
    log.info("%s: %s", link.reference, "pulling" if link.kind == "pull" else "building")
    if link.kind == "debootstrap":
        return _debootstrap(client, link, image)

    if link.kind == "pull":
        _pull(client, link.reference)
        details = _inspect(client, link.reference)
        if image["source"] == "pull":
            try:
                _check(client, link.reference, details["Id"], image["version"])
            except Exception:
                client.remove_image(link.reference)
                raise
        return details

    present = {known["Id"] for known in client.images(all=True)}
    layers = []
    try:
        _build(client, link, below["Id"], image, layers)
        _check(client, link.reference, layers[-1], image["version"], link.imports)
    except BaseException:
        _discard(client, layers, present)
        raise
    _tag(client, layers[-1], link.reference)
    return _inspect(client, link.reference)


def _pull(client, reference):
    import docker

    repository, tag = docker.utils.parse_repository_tag(reference)
    seen = set()
    try:
        for message in client.pull(repository, tag or "latest", stream=True, decode=True):
            if "error" in message:
                raise CommandExecutionError(f"Pulling {reference} failed: {message['error']}")
            line = " ".join(filter(None, (message.get("id"), message.get("status"))))
            if line not in seen:
                seen.add(line)
                log.info("%s: %s", reference, line)
    except docker.errors.APIError as err:
        raise CommandExecutionError(f"Pulling {reference} failed: {err.explanation or err}") from err


def _debootstrap(client, link, image):
    """Make a base by debootstrap, without any registry."""
    build = image["build"]
    root = os.path.join(__opts__["cachedir"], "synapse_image", "debootstrap")
    # In a mount namespace of its own: whatever it mounts in there is gone when it ends, however
    # it ends, and nothing is left that could stand in the way of removing the directory.
    command = ["unshare", "--mount", "debootstrap", "--variant=minbase", build["suite"], root]
    if build["mirror"]:
        command.append(build["mirror"])
    excludes = [f"--exclude={path}" for path in NOT_IMPORTED]
    shutil.rmtree(root, ignore_errors=True)
    os.makedirs(os.path.dirname(root), exist_ok=True)
    try:
        lines = _Lines(link.reference)
        with _process(command, stderr=subprocess.STDOUT) as process:
            lines.feed(process.stdout)
        if process.returncode:
            raise CommandExecutionError(lines.failure(f"debootstrap of {build['suite']}"))
        with _process(["tar", "--create", "--numeric-owner", *excludes, "-C", root, "."]) as tar:
            answer = client.import_image_from_stream(
                tar.stdout, changes=[f"LABEL {INPUTS_LABEL}={link.reference.rpartition(':')[2]}"]
            )
        if tar.returncode:
            raise CommandExecutionError(f"tar of {root} failed with status {tar.returncode}")
    except OSError as err:
        raise CommandExecutionError(f"debootstrap of {build['suite']} failed: {err}") from err
    finally:
        shutil.rmtree(root, ignore_errors=True)
    _tag(client, json.loads(answer.splitlines()[-1])["status"], link.reference)
    return _inspect(client, link.reference)


def _process(command, **kwargs):
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, **kwargs)


def _build(client, link, base_id, image, layers):
    """Run a build, and append the ids of its layers to ``layers``: the last is the image."""
    lines = _Lines(link.reference)
    for message in client.build(
        fileobj=_context(link, image["ca_certificates"]),
        custom_context=True,
        decode=True,
        rm=True,
        forcerm=True,
        buildargs=link.arguments,
        network_mode=image["network"],
        labels={INPUTS_LABEL: link.digest, FROM_LABEL: base_id},
    ):
        if "stream" in message:
            lines.feed([message["stream"]])
            layers += re.findall(r"^ ---> ([0-9a-f]{12,})$", message["stream"], re.MULTILINE)
        elif "error" in message:
            lines.feed([message["error"], "\n"])
            raise CommandExecutionError(lines.failure(f"Building {link.reference}"))
        elif "ID" in message.get("aux", {}):
            layers.append(message["aux"]["ID"])


def _context(link, ca_certificates):
    files = {"Dockerfile": link.dockerfile, **link.context}
    if ca_certificates:
        try:
            with open(ca_certificates, encoding="utf-8") as file:
                files["ca-certificates.crt"] = file.read()
        except OSError as err:
            raise CommandExecutionError(f"Cannot read synapse:image:ca_certificates: {err}") from err
        files["apt.conf"] = 'Acquire::https::CaInfo "/tmp/synapse-build/ca-certificates.crt";\n'
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for name, text in files.items():
            content = text.encode()
            member = tarfile.TarInfo(name)
            member.size = len(content)
            member.mode = 0o755 if name == "start.py" else 0o644
            tar.addfile(member, io.BytesIO(content))
    archive.seek(0)
    return archive


class _Lines:
    """The output of a command: logged line by line as it comes, its end kept for an error."""

    def __init__(self, reference):
        self.reference = reference
        self.step = None
        self.last = collections.deque(maxlen=20)
        self._begun = ""

    def feed(self, chunks):
        for chunk in chunks:
            self._begun += chunk.decode(errors="replace") if isinstance(chunk, bytes) else chunk
            *whole, self._begun = self._begun.split("\n")
            for line in whole:
                # A progress bar rewrites its line, Docker colours what was written as an error,
                # and an address may contain a password.
                line = re.sub(r"\x1b\[[0-9;]*m", "", line).rstrip().rpartition("\r")[2]
                line = re.sub(r"://[^/@\s]+@", "://****@", line)
                if line.startswith("Step "):
                    self.step = line
                if line:
                    self.last.append(line)
                    log.info("%s: %s", self.reference, line)

    def failure(self, what):
        at = f" at {self.step}" if self.step else ""
        return "\n".join([f"{what} failed{at}. The end of its output:", *self.last])


def _discard(client, layers, present):
    """Remove what a build left that came to nothing, down to what was there before it."""
    for layer in reversed(layers):
        details = _inspect(client, layer)
        if details and details["Id"] not in present and not details["RepoTags"]:
            with _tolerated():
                client.remove_image(details["Id"])


def _tag(client, image_id, reference):
    repository, _, tag = reference.rpartition(":")
    client.tag(image_id, repository, tag)


def _check(client, reference, image_id, version, imports=()):
    """See that Synapse starts as any user without rights, and that modules can be imported."""
    # Synapse's processes have no --version. Their --help comes after all imports.
    status, output = _run(
        client,
        image_id,
        ["run", "-m", "synapse.app.homeserver", "-c", "/dev/null", "--help"],
        user=NOBODY,
    )
    if status:
        raise CommandExecutionError(f"Synapse does not start in {reference}:\n{_end(output)}")
    code = "\n".join(["import synapse", "print(synapse.__version__)"])
    code += "".join(f"\nimport {name}" for name in imports)
    status, output = _run(client, image_id, ["-c", code], entrypoint=["python"], user=NOBODY)
    if status:
        raise CommandExecutionError(f"A module cannot be imported in {reference}:\n{_end(output)}")
    found = output.partition("\n")[0]
    if _release(version) not in (None, found):
        raise CommandExecutionError(f"{reference} contains Synapse {found} instead of {version}")


def _end(output):
    return "\n".join(output.rstrip().splitlines()[-20:])


def _run(client, image_id, command, volume=None, **kwargs):
    """Run a command in a container without network and rights; return its status and output."""
    mounts = [{"Type": "volume", "Source": volume, "Target": PYCACHE_PATH}] if volume else []
    container = client.create_container(
        image_id,
        command,
        labels={PURPOSE_LABEL: "check"},
        host_config=client.create_host_config(
            cap_drop=["ALL"],
            mounts=mounts,
            network_mode="none",
            read_only=True,
            security_opt=["no-new-privileges"],
            tmpfs={"/tmp": ""},
        ),
        **kwargs,
    )["Id"]
    try:
        client.start(container)
        status = client.wait(container, timeout=RUN_TIMEOUT)["StatusCode"]
        return status, client.logs(container).decode(errors="replace")
    finally:
        client.remove_container(container, force=True, v=True)


def _pycache(details):
    """The volume of an image's byte code; an image that was built here has its own."""
    if INPUTS_LABEL in _labels(details):
        return None
    return f"{PYCACHE}-{details['Id'].removeprefix('sha256:')[:12]}"


def _is_complete(client, volume):
    import docker

    try:
        mountpoint = client.inspect_volume(volume)["Mountpoint"]
    except docker.errors.NotFound:
        return False
    return os.path.exists(os.path.join(mountpoint, PYCACHE_MARKER))


def _fill(client, volume, image_id):
    """Compile an image's Python files into a volume, and mark it as complete in the end."""
    log.info("%s: compiling", volume)
    client.create_volume(volume, labels={PURPOSE_LABEL: "pycache"})
    status, output = _run(
        client,
        image_id,
        ["-c", _source("compile.py"), f"{PYCACHE_PATH}/{PYCACHE_MARKER}"],
        volume=volume,
        entrypoint=["python"],
        environment={"PYTHONPYCACHEPREFIX": PYCACHE_PATH},
        user="0:0",
    )
    if status:
        raise CommandExecutionError(f"Filling the volume {volume} failed:\n{_end(output)}")


def _remove_finished_containers(client):
    """Remove what a run left that was killed."""
    for container in client.containers(all=True, filters={"label": PURPOSE_LABEL}):
        if container["State"] != "running":
            with _tolerated():
                client.remove_container(container["Id"], v=True)


def _remove_superseded(client, volume):
    """Remove images and volumes that others have taken the place of, unless they are in use."""
    for image in client.images(filters={"dangling": True, "label": INPUTS_LABEL}):
        with _tolerated():
            client.remove_image(image["Id"])
    for name in _volumes(client):
        if name != volume:
            with _tolerated():
                client.remove_volume(name)


def _volumes(client):
    found = client.volumes(filters={"label": f"{PURPOSE_LABEL}=pycache"})["Volumes"]
    return sorted(volume["Name"] for volume in found or [])


def _removable(client, image, without_processes=False):
    containers = client.containers(all=True)
    if without_processes:
        containers = [found for found in containers if PROCESS_LABEL not in found["Labels"]]
    used_images = {container["ImageID"] for container in containers}
    used_volumes = {mount.get("Name") for found in containers for mount in found["Mounts"]}

    images = {}
    for found in client.images(filters={"label": INPUTS_LABEL}):
        for reference in found["RepoTags"] or []:
            if reference.startswith((f"{REPOSITORY}:", f"{BASE_REPOSITORY}:")):
                images[reference] = found["Id"]
    pulled = references(image)["synapse"]
    details = image["source"] == "pull" and _inspect(client, pulled)
    if details:
        images[pulled] = details["Id"]

    volumes = _volumes(client)
    used = [reference for reference, found in images.items() if found in used_images]
    used += [volume for volume in volumes if volume in used_volumes]
    return {
        "images": {ref: images[ref] for ref in sorted(images) if ref not in used},
        "volumes": [volume for volume in volumes if volume not in used],
        "used": sorted(used),
    }


def _from_top(reference):
    return reference.startswith(f"{BASE_REPOSITORY}:"), not reference.endswith("-customized")
