"""
The image against a Docker engine of its own, with the stand-in for the official image in it.

No test reaches for the network. The self-build is tested in a disposable host, see test/e2e.
"""

import contextlib
import copy
import hashlib
import http.server
import importlib.util
import io
import json
import pathlib
import shutil
import subprocess
import tarfile
import threading
import time

import docker
import pytest

ROOT = pathlib.Path(__file__).parents[2]
# With none at all, dockerd deletes docker0, and with it the network of another engine.
BRIDGE = "synapse-images"
PULLED = "matrixdotorg/synapse:v1.163.2"
CUSTOMIZED = "localhost/matrixdotorg/synapse:v1.163.2-customized"

IMAGE = {
    "version": "v1.163.2",
    "source": "pull",
    "repository": "matrixdotorg/synapse",
    "build": {"base": "debootstrap", "suite": "bookworm", "mirror": None, "extras": ["redis"]},
    "network": None,
    "ca_certificates": None,
    "build_arguments": {},
    "customize": {"modules": {}, "dockerfile": ""},
}

# What a process imports at start, and for which of it there is no byte code.
UNCOMPILED = """
import os, sys
import synapse.app.generic_worker, synapse.app.homeserver
for module in list(sys.modules.values()):
    cached = getattr(module, "__cached__", None)
    if cached and not os.path.exists(cached):
        print(module.__name__, cached)
"""


def load(path):
    spec = importlib.util.spec_from_file_location(f"{path.parent.name}_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def settings(dockerfile="", modules=None, **kwargs):
    image = copy.deepcopy({**IMAGE, **kwargs})
    image["customize"] = {"modules": modules or {}, "dockerfile": dockerfile}
    return image


@pytest.fixture(scope="module")
def engine():
    """
    The client of an engine that holds nothing else: one test removes all there is of Synapse.

    Tests find ``test/stand-in`` in it, which contains no byte code, as the official image does not, and
    ``test/compiled``, which does: most tests build on that one, as it saves them compiling.
    """
    host = load(ROOT / "test/host/host.py")
    archive = host.synapse_image()
    home = host.CACHE / "image-tests"
    home.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(home / "exec", ignore_errors=True)
    (home / "docker.pid").unlink(missing_ok=True)
    command = ["dockerd", "--host", f"unix://{home}/docker.sock", "--pidfile", home / "docker.pid"]
    command += ["--data-root", home / "data", "--exec-root", home / "exec", "--group", "root"]
    command += ["--bridge", BRIDGE, "--iptables=false", "--log-level", "warn"]
    subprocess.run(["ip", "link", "add", BRIDGE, "type", "bridge"], check=False)
    subprocess.run(["ip", "address", "replace", "192.168.254.1/24", "dev", BRIDGE], check=True)
    with open(home / "dockerd.log", "w") as log:
        daemon = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd="/")
    try:
        client = connected(daemon, home)
        loaded = home / "stand-in"
        if not loaded.exists() or loaded.read_text() != archive.name:
            with open(archive, "rb") as file:
                client.images.load(file)[0].tag("test/stand-in")
            loaded.write_text(archive.name)
        steps = "FROM test/stand-in\nCOPY compile.py /\nRUN python /compile.py && rm /compile.py\n"
        context = tar({"Dockerfile": steps, "compile.py": (ROOT / "synapse/image/files/compile.py").read_text()})
        client.images.build(fileobj=context, custom_context=True, tag="test/compiled", rm=True)
        yield client
    finally:
        daemon.terminate()
        daemon.wait(60)
        subprocess.run(["ip", "link", "delete", BRIDGE], check=True)


def connected(daemon, home):
    deadline = time.monotonic() + 30
    while True:
        try:
            client = docker.DockerClient(f"unix://{home}/docker.sock", timeout=300)
            client.ping()
            return client
        except Exception:
            if daemon.poll() is not None or time.monotonic() > deadline:
                pytest.fail((home / "dockerd.log").read_text())
            time.sleep(0.05)


@pytest.fixture(autouse=True)
def _clean(engine):
    sweep(engine)
    yield
    sweep(engine)


def sweep(engine):
    for container in engine.containers.list(all=True):
        container.remove(force=True, v=True)
    for volume in engine.volumes.list():
        volume.remove()
    for tag in tags(engine):
        engine.images.remove(tag)
    engine.images.prune({"dangling": True})


def tags(engine):
    """The references that there are, without those of the tests themselves."""
    return {tag for image in engine.images.list() for tag in image.tags if not tag.startswith("test/")}


def everything(engine):
    """All images by id, with their tags, and all containers and volumes."""
    return (
        {image.id: image.tags for image in engine.images.list(all=True)},
        {container.id for container in engine.containers.list(all=True)},
        {volume.name for volume in engine.volumes.list()},
    )


@pytest.fixture
def pulled(engine):
    """The stand-in under the official name, as if it had been pulled."""
    engine.images.get("test/stand-in").tag(PULLED)
    return engine.images.get(PULLED).id


@pytest.fixture
def compiled(engine):
    engine.images.get("test/compiled").tag(PULLED)
    return engine.images.get(PULLED).id


@pytest.fixture
def module(engine, monkeypatch):
    home = load(ROOT / "test/host/host.py").CACHE / "image-tests"
    monkeypatch.setenv("DOCKER_HOST", f"unix://{home}/docker.sock")
    module = load(ROOT / "_modules/synapse_image.py")
    module.__opts__ = {}
    module.__salt__ = {"cp.get_file_str": lambda url, saltenv: (ROOT / url.removeprefix("salt://")).read_text()}
    return module


@pytest.fixture
def state(module):
    state = load(ROOT / "_states/synapse_image.py")
    names = ("references", "pending", "ensure", "removable", "remove")
    state.__salt__ = {f"synapse_image.{name}": getattr(module, name) for name in names}
    return state


@pytest.fixture
def _compiling_nothing(module):
    """For tests of what is around the byte code: it takes the most time of all."""
    read = module._source
    module._source = lambda name: (
        "import sys; [open(name, 'w') for name in sys.argv[1:]]" if name == "compile.py" else read(name)
    )


@pytest.fixture
def present(state, module):
    def present(image, test=False):
        state.__opts__ = {"test": test}
        return state.present(module.references(image)["wanted"], image)

    return present


@pytest.fixture
def absent(state):
    def absent(image, test=False):
        state.__opts__ = {"test": test}
        return state.absent("Synapse's images are absent", image)

    return absent


def tar(files):
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as archived:
        for name, text in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(text.encode())
            archived.addfile(member, io.BytesIO(text.encode()))
    archive.seek(0)
    return archive


def run(engine, image, *command, entrypoint="python", **kwargs):
    """What a command prints in a container as Synapse's are: any user, no rights, nothing to write to."""
    return engine.containers.run(
        image,
        list(command),
        entrypoint=[entrypoint],
        user="12345:12345",
        read_only=True,
        cap_drop=["ALL"],
        security_opt=["no-new-privileges"],
        network_mode="none",
        remove=True,
        stderr=True,
        **kwargs,
    ).decode()


def mounted(volume):
    return {"volumes": {volume: {"bind": "/pycache", "mode": "ro"}}, "environment": {"PYTHONPYCACHEPREFIX": "/pycache"}}


# --- Pulled -----------------------------------------------------------------------------------------


def test_pulled_image_gets_its_byte_code_once(engine, module, present, pulled):
    volume = f"matrix-synapse-pycache-{pulled[7:19]}"
    expected = {"pycache": {"old": None, "new": volume}}
    assert module.wanted(IMAGE) == {"reference": PULLED, "id": pulled, "pycache": volume}

    ret = present(IMAGE, test=True)
    assert (ret["result"], ret["changes"]) == (None, expected)
    assert engine.volumes.list() == []

    ret = present(IMAGE)
    assert (ret["result"], ret["changes"]) == (True, expected)
    assert engine.containers.list(all=True) == []
    assert run(engine, PULLED, "-c", UNCOMPILED) != ""
    assert run(engine, PULLED, "-c", UNCOMPILED, **mounted(volume)) == ""

    for test in (True, False):
        ret = present(IMAGE, test=test)
        assert (ret["result"], ret["changes"]) == (True, {})


@pytest.mark.usefixtures("_compiling_nothing")
def test_byte_code_that_was_not_completed_is_made_again(engine, module, present, pulled):
    volume = module.wanted(IMAGE)["pycache"]
    engine.volumes.create(volume, labels={"org.matrix.synapse.purpose": "pycache"})
    expected = {"pycache": {"old": None, "new": volume}}
    assert present(IMAGE, test=True)["changes"] == expected
    assert present(IMAGE)["changes"] == expected
    assert present(IMAGE, test=True)["changes"] == {}


@pytest.mark.usefixtures("_compiling_nothing")
def test_byte_code_of_earlier_images_is_removed_unless_in_use(engine, module, present, pulled):
    label = {"org.matrix.synapse.purpose": "pycache"}
    for name in ("matrix-synapse-pycache-000000000000", "matrix-synapse-pycache-111111111111"):
        engine.volumes.create(name, labels=label)
    engine.volumes.create("matrix-synapse-pycache-of-somebody-else")
    used = {"matrix-synapse-pycache-111111111111": {"bind": "/pycache", "mode": "ro"}}
    engine.containers.create(PULLED, volumes=used)
    present(IMAGE)
    assert {volume.name for volume in engine.volumes.list()} == {
        module.wanted(IMAGE)["pycache"],
        "matrix-synapse-pycache-111111111111",
        "matrix-synapse-pycache-of-somebody-else",
    }


@pytest.mark.usefixtures("_compiling_nothing")
def test_image_is_pulled_from_a_registry(engine, module, present, caplog):
    with registry(engine.images.get("test/stand-in").save()) as address:
        image = settings(repository=f"{address}/mirror/synapse")
        reference = f"{address}/mirror/synapse:v1.163.2"
        assert present(image, test=True)["changes"] == {
            reference: {"old": None, "new": "to be pulled"},
            "pycache": {"old": None, "new": "to be filled"},
        }
        assert reference not in tags(engine)
        with caplog.at_level("INFO"):
            ret = present(image)
    assert f"Downloaded newer image for {reference}" in caplog.text
    new = engine.images.get(reference).id
    assert ret["changes"] == {
        reference: {"old": None, "new": new},
        "pycache": {"old": None, "new": f"matrix-synapse-pycache-{new[7:19]}"},
    }
    assert present(image)["changes"] == {}


def test_pull_that_fails_changes_nothing(engine, present):
    before = everything(engine)
    with registry(None) as address:
        ret = present(settings(repository=f"{address}/synapse"))
    assert ret["result"] is False
    assert ret["comment"].startswith(f"Pulling {address}/synapse:v1.163.2 failed: ")
    assert "manifest unknown" in ret["comment"]
    assert ret["changes"] == {}
    assert everything(engine) == before


def test_pulled_image_without_synapse_is_removed_again(engine, present):
    empty = json.loads(engine.api.import_image_from_data(tar({"file": "text"}).read()).splitlines()[-1])["status"]
    archive = list(engine.images.get(empty).save())
    engine.images.remove(empty)
    before = everything(engine)
    with registry(archive) as address:
        ret = present(settings(repository=f"{address}/synapse"))
    assert ret["result"] is False
    assert ret["changes"] == {}
    assert everything(engine) == before


@contextlib.contextmanager
def registry(saved):
    """A registry of one image, from what ``docker save`` gives, for any name and tag."""
    blobs = {}
    manifest = None
    if saved is not None:

        def blob(content):
            digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
            blobs[digest] = content
            return {"size": len(content), "digest": digest}

        with tarfile.open(fileobj=io.BytesIO(b"".join(saved))) as archive:
            [image] = json.load(archive.extractfile("manifest.json"))
            kind = "application/vnd.docker"
            manifest = {
                "schemaVersion": 2,
                "mediaType": f"{kind}.distribution.manifest.v2+json",
                "config": {
                    "mediaType": f"{kind}.container.image.v1+json",
                    **blob(archive.extractfile(image["Config"]).read()),
                },
                "layers": [
                    {"mediaType": f"{kind}.image.rootfs.diff.tar", **blob(archive.extractfile(layer).read())}
                    for layer in image["Layers"]
                ],
            }

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            *_, kind, name = self.path.split("/")
            status, content, content_type = 200, b"{}", "application/json"
            if kind == "blobs":
                content, content_type = blobs[name], "application/octet-stream"
            elif kind == "manifests" and manifest:
                content, content_type = json.dumps(manifest).encode(), manifest["mediaType"]
            elif kind == "manifests":
                status, content = 404, b'{"errors": [{"code": "MANIFEST_UNKNOWN", "message": "manifest unknown"}]}'
            self.send_response(status)
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", len(content))
            self.send_header("Docker-Content-Digest", f"sha256:{hashlib.sha256(content).hexdigest()}")
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()


# --- Extended ---------------------------------------------------------------------------------------


def test_extension_is_built_once_and_works_like_the_official_image(engine, module, present, pulled):
    image = settings("RUN echo extended > /extended")
    assert module.wanted(image) == {"reference": CUSTOMIZED, "id": None, "pycache": None}
    ret = present(image, test=True)
    assert (ret["result"], ret["changes"]) == (None, {CUSTOMIZED: {"old": None, "new": "to be built"}})
    assert tags(engine) == {PULLED}

    ret = present(image)
    new = engine.images.get(CUSTOMIZED).id
    assert (ret["result"], ret["changes"]) == (True, {CUSTOMIZED: {"old": None, "new": new}})
    assert module.wanted(image) == {"reference": CUSTOMIZED, "id": new, "pycache": None}
    assert engine.containers.list(all=True) == []

    assert run(engine, CUSTOMIZED, "/extended", entrypoint="cat") == "extended\n"
    assert run(engine, CUSTOMIZED, "-c", UNCOMPILED) == ""
    usage = run(
        engine, CUSTOMIZED, "run", "-m", "synapse.app.generic_worker", "-c", "/dev/null", "-h", entrypoint="/start.py"
    )
    assert "usage: generic_worker.py" in usage

    for test in (True, False):
        ret = present(image, test=test)
        assert (ret["result"], ret["changes"]) == (True, {})
    assert engine.images.get(CUSTOMIZED).id == new


def test_changed_step_builds_again_and_leaves_no_old_image(engine, module, present, compiled):
    old = present(settings("RUN echo one > /extended"))["changes"][CUSTOMIZED]["new"]
    image = settings("RUN echo two > /extended")
    assert module.wanted(image)["id"] is None
    assert present(image, test=True)["changes"] == {CUSTOMIZED: {"old": old, "new": "to be built"}}
    new = present(image)["changes"][CUSTOMIZED]["new"]
    assert run(engine, CUSTOMIZED, "/extended", entrypoint="cat") == "two\n"
    assert engine.images.get(CUSTOMIZED).id == new
    with pytest.raises(docker.errors.ImageNotFound):
        engine.images.get(old)


def test_old_image_stays_while_a_container_uses_it(engine, present, compiled):
    old = present(settings("RUN echo one > /extended"))["changes"][CUSTOMIZED]["new"]
    container = engine.containers.create(CUSTOMIZED)
    present(settings("RUN echo two > /extended"))
    assert engine.images.get(old).tags == []
    container.remove()
    present(settings("RUN echo three > /extended"))
    with pytest.raises(docker.errors.ImageNotFound):
        engine.images.get(old)


def test_other_image_below_builds_again_and_none_does_not(engine, module, present, compiled):
    image = settings("RUN true")
    first = present(image)["changes"][CUSTOMIZED]["new"]
    engine.images.build(
        fileobj=tar({"Dockerfile": "FROM test/compiled\nLABEL newer=yes"}), custom_context=True, tag=PULLED
    )
    assert present(image, test=True)["changes"] == {CUSTOMIZED: {"old": first, "new": "to be built"}}
    second = present(image)["changes"][CUSTOMIZED]["new"]
    assert engine.images.get(CUSTOMIZED).labels["newer"] == "yes"

    engine.images.remove(PULLED)
    assert module.wanted(image)["id"] == second
    assert present(image, test=True)["changes"] == {}
    assert present(image)["changes"] == {}


def test_failing_step_shows_its_output_and_changes_nothing(engine, present, compiled):
    good = present(settings("RUN echo good"))["changes"][CUSTOMIZED]["new"]
    before = everything(engine)
    steps = "RUN echo unheard-of > /file\nRUN seq 1000 1040; echo it does not work; exit 3\nRUN echo never"
    ret = present(settings(steps))
    assert (ret["result"], ret["changes"]) == (False, {})
    what, *output = ret["comment"].splitlines()
    assert f"Building {CUSTOMIZED} failed at Step " in what
    assert "RUN seq 1000 1040" in what
    assert {"1040", "it does not work"} <= set(output)
    assert "1000" not in output
    assert "returned a non-zero code: 3" in output[-1]
    assert engine.images.get(CUSTOMIZED).id == good
    assert everything(engine) == before


def test_image_in_which_synapse_does_not_start_is_not_tagged(engine, present, compiled):
    good = present(settings("RUN echo good"))["changes"][CUSTOMIZED]["new"]
    before = everything(engine)
    ret = present(settings("RUN rm -r /usr/local/lib/python3.*/*-packages/signedjson"))
    assert (ret["result"], ret["changes"]) == (False, {})
    assert f"Synapse does not start in {CUSTOMIZED}" in ret["comment"]
    assert "No module named 'signedjson'" in ret["comment"]
    assert engine.images.get(CUSTOMIZED).id == good
    assert everything(engine) == before


def test_image_in_which_a_module_cannot_be_imported_is_not_tagged(engine, module, present, compiled):
    before = everything(engine)
    # pip finds this requirement satisfied, so it asks no index.
    known = {"broken": {"requirement": "signedjson", "import": "no_such_module", "packages": []}}
    module._known_modules = lambda: known
    ret = present(settings(modules={"broken": True}))
    assert (ret["result"], ret["changes"]) == (False, {})
    assert "No module named 'no_such_module'" in ret["comment"]
    assert everything(engine) == before

    known["broken"]["import"] = "signedjson"
    assert set(present(settings(modules={"broken": True}))["changes"]) == {CUSTOMIZED}


def test_image_with_another_synapse_than_wanted_is_not_tagged(engine, present, compiled):
    engine.images.get(PULLED).tag("matrixdotorg/synapse:v1.160.0")
    ret = present(settings("RUN true", version="v1.160.0"))
    assert ret["result"] is False
    assert "contains Synapse 1.163.2 instead of v1.160.0" in ret["comment"]
    assert tags(engine) == {PULLED, "matrixdotorg/synapse:v1.160.0"}


def test_certificates_and_arguments_are_there_during_the_build_only(engine, present, compiled, tmp_path):
    bundle = tmp_path / "bundle.pem"
    bundle.write_text("certificates")
    steps = """
        RUN test "$(cat $PIP_CERT $SSL_CERT_FILE)" = certificatescertificates
        RUN apt-config dump Acquire::https::CaInfo | grep --quiet "$PIP_CERT"
        RUN test "$PIP_INDEX_URL" = http://pip.example/simple
    """
    arguments = {"PIP_INDEX_URL": "http://pip.example/simple"}
    image = settings(steps, ca_certificates=str(bundle), build_arguments=arguments)
    assert present(image)["comment"] == "The image has been brought about"
    code = (
        "import os; print(os.path.exists('/tmp/synapse-build'), [n for n in os.environ if n[:4] in ('PIP_', 'SSL_')])"
    )
    assert run(engine, CUSTOMIZED, "-c", code) == "False []\n"

    bundle.write_text("renewed")
    assert present(image)["changes"] == {}


def test_unreadable_certificates_are_named(engine, present, compiled):
    ret = present(settings("RUN true", ca_certificates="/nonexistent/bundle.pem"))
    assert ret["result"] is False
    assert "synapse:image:ca_certificates" in ret["comment"]
    assert "/nonexistent/bundle.pem" in ret["comment"]


def test_what_a_killed_run_left_is_removed(engine, present, compiled):
    label = {"org.matrix.synapse.purpose": "check"}
    left = engine.containers.create(PULLED, labels=label)
    present(settings("RUN true"))
    assert left.id not in {container.id for container in engine.containers.list(all=True)}


def test_question_for_the_image_is_cheap(module, present, compiled):
    image = settings("RUN true")
    present(image)
    module.wanted(image)
    times = []
    for _ in range(10):
        start = time.perf_counter()
        module.wanted(image)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.05


# --- Removed ----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_compiling_nothing")
def test_absent_removes_what_was_made_here_and_nothing_else(engine, present, absent, pulled):
    present(IMAGE)
    image = settings("RUN true")
    present(image)
    engine.images.get(PULLED).tag("somebody/else:v1")
    engine.images.get(PULLED).tag("localhost/matrixdotorg/synapse:somebody-elses")
    ids = {tag: engine.images.get(tag).id for tag in (PULLED, CUSTOMIZED)}
    expected = {tag: {"old": image_id, "new": None} for tag, image_id in ids.items()}
    assert engine.volumes.list() == []

    for test, result in ((True, None), (False, True)):
        ret = absent(image, test=test)
        assert (ret["result"], ret["changes"]) == (result, expected)
    assert tags(engine) == {"somebody/else:v1", "localhost/matrixdotorg/synapse:somebody-elses"}

    for test in (True, False):
        ret = absent(image, test=test)
        assert (ret["result"], ret["changes"], ret["comment"]) == (True, {}, "No image is left")


@pytest.mark.usefixtures("_compiling_nothing")
def test_absent_removes_byte_code_with_its_image(engine, module, present, absent, pulled):
    present(IMAGE)
    volume = module.wanted(IMAGE)["pycache"]
    assert absent(IMAGE)["changes"] == {
        PULLED: {"old": pulled, "new": None},
        volume: {"old": volume, "new": None},
    }
    assert tags(engine) == set()
    assert engine.volumes.list() == []


@pytest.mark.usefixtures("_compiling_nothing")
def test_absent_leaves_what_containers_use(engine, module, present, absent, pulled):
    present(IMAGE)
    volume = module.wanted(IMAGE)["pycache"]
    container = engine.containers.create(PULLED, volumes={volume: {"bind": "/pycache", "mode": "ro"}})
    for test in (True, False):
        ret = absent(IMAGE, test=test)
        assert (ret["result"], ret["changes"]) == (True, {})
        assert ret["comment"].endswith(f"left, as containers use them: {volume}, {PULLED}")
    assert tags(engine) == {PULLED}
    container.remove()
    assert set(absent(IMAGE)["changes"]) == {PULLED, volume}
