"""
References, Dockerfiles, digests and what follows from them, without Docker.
"""

import copy
import importlib.util
import io
import pathlib
import re
import tarfile

import pytest
from salt.exceptions import CommandExecutionError, SaltInvocationError

ROOT = pathlib.Path(__file__).parents[2]

IMAGE = {
    "version": "v1.163.2",
    "source": "build",
    "repository": "matrixdotorg/synapse",
    "build": {"base": "debootstrap", "suite": "bookworm", "mirror": None, "extras": ["redis"]},
    "network": None,
    "ca_certificates": None,
    "build_arguments": {},
    "customize": {"modules": {}, "dockerfile": ""},
}


def load(path):
    spec = importlib.util.spec_from_file_location(f"{path.parent.name}_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def settings(changed=None, **kwargs):
    """``IMAGE`` with other values, by path: ``{"build:suite": "trixie"}``."""
    image = copy.deepcopy(IMAGE)
    for path, value in {**(changed or {}), **kwargs}.items():
        *parents, key = path.split(":")
        mapping = image
        for parent in parents:
            mapping = mapping[parent]
        mapping[key] = value
    return image


@pytest.fixture
def module():
    module = load(ROOT / "_modules/synapse_image.py")
    module.__opts__ = {"saltenv": None}
    module.__salt__ = {"cp.get_file_str": lambda url, saltenv: (ROOT / url.removeprefix("salt://")).read_text()}
    return module


@pytest.fixture
def state():
    return load(ROOT / "_states/synapse_image.py")


def dockerfile(module, image):
    return module.dockerfiles(image)[module.references(image)["wanted"]]


def digest(module, image):
    return module._links(image)[-1].digest


def test_pulled_image_bears_repository_and_version(module):
    assert module.references(settings(source="pull", repository="registry.example:5000/synapse")) == {
        "base": None,
        "synapse": "registry.example:5000/synapse:v1.163.2",
        "customized": None,
        "wanted": "registry.example:5000/synapse:v1.163.2",
    }


def test_self_built_image_has_a_base_below_and_an_extension_above(module):
    assert module.references(settings({"build:base": "debian:bookworm-slim", "customize:dockerfile": "RUN true"})) == {
        "base": "debian:bookworm-slim",
        "synapse": "localhost/matrixdotorg/synapse:v1.163.2",
        "customized": "localhost/matrixdotorg/synapse:v1.163.2-customized",
        "wanted": "localhost/matrixdotorg/synapse:v1.163.2-customized",
    }


@pytest.mark.parametrize("customize", [{"ldap3": False}, {}, None])
def test_nothing_switched_on_extends_nothing(module, customize):
    image = settings({"customize:modules": customize, "customize:dockerfile": " \n"})
    assert module.references(image)["customized"] is None


def test_debootstrap_base_is_named_after_its_inputs(module):
    bases = {
        module.references(settings({"build:suite": suite, "build:mirror": mirror}))["base"]
        for suite in ("bookworm", "trixie")
        for mirror in (None, "http://mirror.example/debian")
    }
    assert len(bases) == 4
    for base in bases:
        assert re.fullmatch(r"localhost/matrixdotorg/synapse-base:(bookworm|trixie)-[0-9a-f]{12}", base)


def test_self_build_comes_before_the_extension(module):
    image = settings({"customize:modules": {"ldap3": True}})
    files = module.dockerfiles(image)
    assert list(files) == [
        "localhost/matrixdotorg/synapse:v1.163.2",
        "localhost/matrixdotorg/synapse:v1.163.2-customized",
    ]
    synapse, customized = files.values()
    assert synapse.startswith(f"FROM {module.references(image)['base']}\n")
    assert "pip install 'matrix-synapse[redis]==1.163.2'" in synapse
    assert customized.startswith("FROM localhost/matrixdotorg/synapse:v1.163.2\n")
    assert "matrix-synapse-ldap3==" in customized


def test_extension_of_a_pulled_image_is_from_it(module):
    image = settings({"customize:dockerfile": "RUN true"}, source="pull")
    assert list(module.dockerfiles(image)) == ["localhost/matrixdotorg/synapse:v1.163.2-customized"]
    assert dockerfile(module, image).startswith("FROM matrixdotorg/synapse:v1.163.2\n")


def test_pulled_image_is_built_by_no_dockerfile(module):
    assert module.dockerfiles(settings(source="pull")) == {}


def test_operators_steps_come_after_modules_and_before_byte_code(module):
    image = settings({"customize:modules": {"ldap3": True}, "customize:dockerfile": "RUN one\nRUN two\n"})
    text = dockerfile(module, image)
    order = [text.index(part) for part in ("ldap3", "\nRUN one\nRUN two\n", "compile.py")]
    assert order == sorted(order)


def test_extension_keeps_no_user_of_a_step(module):
    text = dockerfile(module, settings({"customize:dockerfile": "USER daemon"}))
    assert text.rindex("USER daemon") < text.rindex("USER root")


def test_every_known_module_is_pinned_and_complete(module):
    for name, known in module._known_modules().items():
        assert set(known) == {"requirement", "import", "packages"}, name
        assert re.fullmatch(r"[\w-]+==[\w.]+", known["requirement"]), name


def test_unknown_module_is_named_beside_the_known(module):
    with pytest.raises(SaltInvocationError, match="Unknown Synapse modules: ldap. Known are: .*ldap3"):
        module.dockerfiles(settings({"customize:modules": {"ldap": True}}))


@pytest.mark.parametrize("version", ["latest", "develop", "v1.163"])
def test_only_releases_can_be_built(module, version):
    with pytest.raises(SaltInvocationError, match="write a release"):
        module.dockerfiles(settings(version=version))


@pytest.mark.parametrize(
    ("version", "release"),
    [("v1.163.2", "1.163.2"), ("1.163.2", "1.163.2"), ("v1.164.0rc1", "1.164.0rc1"), ("v1.163.2-own", "1.163.2")],
)
def test_release_is_read_from_the_version(module, version, release):
    assert module._release(version) == release


@pytest.mark.parametrize(
    ("changed", "security"),
    [
        ({}, True),
        ({"build:suite": "sid"}, False),
        ({"build:mirror": "http://mirror.example/debian"}, False),
        ({"build:base": "debian:bookworm-slim"}, False),
    ],
)
def test_security_updates_are_added_where_debian_has_them_and_the_base_has_not(module, changed, security):
    assert ("bookworm-security" in dockerfile(module, settings(changed))) is security


@pytest.mark.parametrize(
    "changed",
    [
        {"version": "v1.163.1"},
        {"build:base": "debian:bookworm-slim"},
        {"build:suite": "trixie"},
        {"build:mirror": "http://mirror.example/debian"},
        {"build:extras": ["redis", "saml2"]},
        {"build_arguments": {"PIP_INDEX_URL": "http://pip.example/simple"}},
        {"customize:modules": {"s3_storage_provider": True}},
        {"customize:dockerfile": "RUN false"},
    ],
)
def test_every_input_changes_the_digest(module, changed):
    image = settings({"customize:dockerfile": "RUN true"})
    other = settings({"customize:dockerfile": "RUN true", **changed})
    assert digest(module, other) != digest(module, image)


@pytest.mark.parametrize(
    "changed",
    [
        {"network": "host"},
        {"ca_certificates": "/etc/ssl/certs/ca-certificates.crt"},
        {"build:extras": ["redis"]},
        {"repository": "mirror.example/synapse"},
        {"customize:modules": {"ldap3": False}},
        {"customize:dockerfile": "\nRUN true\n\n"},
    ],
)
def test_what_is_no_input_does_not_change_the_digest(module, changed):
    image = settings({"customize:dockerfile": "RUN true"})
    assert digest(module, settings({"customize:dockerfile": "RUN true", **changed})) == digest(module, image)


def test_source_files_are_inputs(module):
    before = digest(module, settings())
    read = module.__salt__["cp.get_file_str"]
    module.__salt__["cp.get_file_str"] = lambda url, saltenv: read(url, saltenv) + ("#" if "start.py" in url else "")
    assert digest(module, settings()) != before


def test_missing_source_file_is_named(module):
    module.__salt__["cp.get_file_str"] = lambda url, saltenv: False
    with pytest.raises(CommandExecutionError, match="salt://synapse/image/files/start.py"):
        module.dockerfiles(settings())


def test_build_arguments_are_declared_but_their_values_are_not_written(module):
    text = dockerfile(module, settings(build_arguments={"PIP_INDEX_URL": "http://pip.example/simple"}))
    assert "\nARG PIP_INDEX_URL\n" in text
    assert "pip.example" not in text


def test_certificates_are_in_the_context_only_if_asked_for(module, tmp_path):
    bundle = tmp_path / "bundle.pem"
    bundle.write_text("certificates")
    for path, files in ((None, set()), (str(bundle), {"apt.conf", "ca-certificates.crt"})):
        image = settings(ca_certificates=path)
        link = module._links(image)[-1]
        with tarfile.open(fileobj=module._context(link, path)) as tar:
            assert set(tar.getnames()) == {"Dockerfile", "start.py", "compile.py"} | files
            assert tar.getmember("start.py").mode == 0o755
        assert ("PIP_CERT" in link.dockerfile) is bool(path)


def test_context_is_the_same_each_time(module):
    link = module._links(settings())[-1]
    first, second = (module._context(link, None) for _ in range(2))
    assert isinstance(first, io.BytesIO)
    assert first.read() == second.read()


def test_output_is_put_together_to_lines_and_its_end_kept(module):
    lines = module._Lines("image")
    lines.feed(["Step 1/2 : RUN a\n", "on", "e\ntwo", "\n", b"10 %\r100 %\n", "\n"])
    assert list(lines.last) == ["Step 1/2 : RUN a", "one", "two", "100 %"]
    lines.feed(f"line {i}\n" for i in range(30))
    assert lines.failure("Building it").splitlines() == [
        "Building it failed at Step 1/2 : RUN a. The end of its output:",
        *[f"line {i}" for i in range(10, 30)],
    ]


def test_output_shows_no_password_of_an_address(module, caplog):
    lines = module._Lines("image")
    with caplog.at_level("INFO"):
        lines.feed(["Looking in indexes: https://user:secret@pip.example/simple\n"])
    assert list(lines.last) == ["Looking in indexes: https://****@pip.example/simple"]
    assert "secret" not in caplog.text


def test_byte_code_volume_follows_from_the_image_id(module):
    details = {"Id": "sha256:" + "0123456789abcdef" * 4, "Config": {"Labels": None}}
    assert module._pycache(details) == "matrix-synapse-pycache-0123456789ab"
    details["Config"]["Labels"] = {module.INPUTS_LABEL: "x"}
    assert module._pycache(details) is None


@pytest.mark.parametrize("missing", ["engine", "sdk"])
def test_machine_without_docker_has_no_image_yet(module, monkeypatch, missing):
    monkeypatch.delenv("DOCKER_HOST", raising=False)
    monkeypatch.setattr(module, "SOCKET", "/nonexistent")
    if missing == "sdk":
        monkeypatch.setattr(module, "SOCKET", "/")
        monkeypatch.setattr(module, "sdk_installed", lambda: False)
    image = settings(source="pull")
    assert module.wanted(image) == {"reference": "matrixdotorg/synapse:v1.163.2", "id": None, "pycache": None}
    assert module.pending(image) == {
        "matrixdotorg/synapse:v1.163.2": {"old": None, "new": "to be pulled"},
        "pycache": {"old": None, "new": "to be filled"},
    }
    assert module.remove(image) == {"images": {}, "volumes": [], "used": []}


def test_engine_that_does_not_answer_is_an_error(module, monkeypatch):
    monkeypatch.setenv("DOCKER_HOST", "unix:///nonexistent/docker.sock")
    for function in (module.wanted, module.pending, module.ensure, module.remove):
        with pytest.raises(CommandExecutionError, match="DockerException"):
            function(settings(source="pull"))


def test_states_turn_errors_into_results(module, state):
    def fail(image, **kwargs):
        raise CommandExecutionError("no engine")

    for test in (True, False):
        state.__opts__ = {"test": test}
        state.__salt__ = dict.fromkeys(
            (f"synapse_image.{name}" for name in ("pending", "ensure", "removable", "remove")), fail
        )
        state.__salt__["synapse_image.references"] = module.references
        failed = {"name": "localhost/matrixdotorg/synapse:v1.163.2", "result": False, "changes": {}}
        assert state.present(failed["name"], IMAGE) == {**failed, "comment": "no engine"}
        assert state.absent(failed["name"], IMAGE) == {**failed, "comment": "no engine"}


def test_state_refuses_a_name_that_the_settings_do_not_make(module, state):
    state.__opts__ = {"test": False}
    state.__salt__ = {"synapse_image.references": module.references}
    ret = state.present("matrixdotorg/synapse:v1.0.0", IMAGE)
    assert ret["result"] is False
    assert "localhost/matrixdotorg/synapse:v1.163.2" in ret["comment"]
