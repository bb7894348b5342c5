"""
Appservices: what is wrong with a registration, which tokens are made, and what the states tell.
"""

import functools
import importlib.util
import json
import os
import pathlib
import stat
import types

import pytest
import yaml
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from salt.exceptions import CommandExecutionError, SaltInvocationError

ROOT = pathlib.Path(__file__).parents[2]
TOKEN = "0123456789abcdef"
MASKED = "**********"


def load(path, **dunders):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name, value in dunders.items():
        setattr(module, name, value)
    return module


@functools.cache
def served(url):
    path = ROOT / url.removeprefix("salt://")
    return path.read_text() if path.is_file() else False


KNOWLEDGE = load(ROOT / "_modules/synapse_pillar.py", __salt__={"cp.get_file_str": served}, __context__={}).knowledge()


class Minion:
    """The formula's modules on a minion whose pillar and directories are the test's."""

    def __init__(self, directory):
        self.directory = directory
        self.pillar = {
            "server_name": "example.org",
            "directories": {name: f"{directory}/{name}" for name in ("config", "data")},
        }
        self.new_run()

    def new_run(self, test=False):
        functions, opts = {"cp.get_file_str": served}, {"test": test}
        context = {"synapse_pillar.knowledge": KNOWLEDGE}
        dunders = {"__salt__": functions, "__context__": context, "__opts__": opts}
        for name in ("synapse_files", "synapse_pillar", "synapse_workers", "synapse_appservice"):
            pillar = {"synapse": self.pillar}
            module = load(ROOT / f"_modules/{name}.py", __pillar__=pillar, **dunders)
            public = {key: value for key, value in vars(module).items() if isinstance(value, types.FunctionType)}
            functions.update({f"{name}.{key}": value for key, value in public.items()})
            setattr(self, name, module)
        self.functions = functions
        self.states = load(ROOT / "_states/synapse_appservice.py", **dunders)
        return self

    @property
    def store(self):
        return self.directory / "data/appservices"

    def faults(self, **appservices):
        self.pillar["appservices"] = appservices
        assert self.synapse_pillar.faults() == []
        return self.synapse_appservice.faults()


@pytest.fixture
def minion(tmp_path):
    return Minion(tmp_path)


def a_registration(**changes):
    registration = {
        "url": "http://bridge:29318",
        "sender_localpart": "bot",
        "namespaces": {"users": [{"exclusive": True, "regex": "@bridge_.*:example\\.org"}]},
    }
    registration.update(changes)
    return {key: value for key, value in registration.items() if value is not ...}


def an_entry(**changes):
    return {"registration": a_registration(**changes)}


RIGHT = {
    "the least": {},
    "no url": {"url": None},
    "no namespaces": {"namespaces": {}},
    "https": {"url": "https://[2001:db8::1]:8443/path"},
    "its own id": {"id": "bridge"},
    "given tokens": {"as_token": TOKEN + "a", "hs_token": TOKEN + "b"},
    "tokens of null are made": {"as_token": None, "hs_token": None},
    "an extension": {"de.sorunome.msc2409.push_ephemeral": True, "com.example.anything": {"a": [1]}},
    "null for nothing": {"protocols": None, "rate_limited": None},
    "protocols and networks": {"protocols": ["whatsapp"], "ip_range_whitelist": ["10.0.0.0/8", "::1"]},
    "an empty namespace": {"namespaces": {"users": [], "aliases": [], "rooms": []}},
}


@pytest.mark.parametrize("changes", RIGHT.values(), ids=RIGHT)
def test_right_registrations_have_no_fault(minion, changes):
    assert minion.faults(bridge=an_entry(**changes)) == []


WRONG = [
    ({"url": ...}, "url: is missing"),
    ({"url": ""}, 'url: ""'),
    ({"url": "bridge:29318"}, "such as http://bridge:29318"),
    ({"url": "http://"}, "url:"),
    ({"url": "http://bridge:99999"}, "url:"),
    ({"url": "http://bridge:port"}, "url:"),
    ({"url": "http://[::1"}, "url:"),
    ({"url": "ftp://bridge"}, "url:"),
    ({"url": 29318}, "url: 29318"),
    ({"url": ["http://bridge"]}, "url:"),
    ({"sender_localpart": ...}, "sender_localpart: is missing"),
    ({"sender_localpart": ""}, "sender_localpart:"),
    ({"sender_localpart": "@bot:example.org"}, "letters, digits"),
    ({"sender_localpart": 5}, "sender_localpart: 5"),
    ({"sender_localpart": "b" * 250}, "at most 255 characters"),
    ({"namespaces": ...}, "namespaces: is missing"),
    ({"namespaces": []}, "namespaces: []"),
    ({"namespaces": {"user": []}}, "did you mean users?"),
    ({"namespaces": {"users": None}}, "namespaces:users: null"),
    ({"namespaces": {"users": {"exclusive": True, "regex": "a"}}}, "it must be a list"),
    ({"namespaces": {"users": ["@a:b"]}}, "namespaces:users:0"),
    ({"namespaces": {"rooms": [{"regex": "!a"}]}}, "namespaces:rooms:0:exclusive"),
    ({"namespaces": {"rooms": [{"regex": "!a", "exclusive": "yes"}]}}, "true or false"),
    ({"namespaces": {"aliases": [{"exclusive": True}]}}, "namespaces:aliases:0:regex"),
    ({"namespaces": {"users": [{"exclusive": True, "regex": "@(a"}]}}, "no regular expression"),
    ({"namespaces": {"users": [{"exclusive": True, "regex": "a{9999999999999}"}]}}, "no regular expression"),
    ({"id": "other"}, 'id: "other"'),
    ({"id": 1}, "id: 1"),
    ({"as_token": "short"}, "as_token: (a secret, not shown)"),
    ({"as_token": MASKED}, "as_token: (a secret, not shown)"),
    ({"hs_token": 12345678901234567890}, "hs_token: (a secret, not shown)"),
    ({"hs_token": "with a space in it"}, "hs_token: (a secret, not shown)"),
    ({"as_token": TOKEN, "hs_token": TOKEN}, "each token must be another"),
    ({"rate_limited": "no"}, "rate_limited"),
    ({"org.matrix.msc3202": None}, "org.matrix.msc3202"),
    ({"de.sorunome.msc2409.push_ephemeral": 1}, "push_ephemeral"),
    ({"protocols": "whatsapp"}, "protocols"),
    ({"protocols": [1]}, "protocols"),
    ({"ip_range_whitelist": ["10.0.0.0/33"]}, "ip_range_whitelist"),
    ({"ip_range_whitelist": [5]}, "ip_range_whitelist"),
    ({"com.example": b"bytes"}, "plain data"),
    ({"com.example": float("nan")}, "plain data"),
    ({"com.example": "\ud800"}, "plain data"),
]


@pytest.mark.parametrize(
    ("changes", "said"), WRONG, ids=lambda value: str(value)[:60].encode("ascii", "replace").decode()
)
def test_each_fault_is_told_with_its_place_and_without_a_token(minion, changes, said):
    found = minion.faults(bridge=an_entry(**changes))
    assert len(found) == 1
    assert found[0].startswith("synapse:appservices:bridge:registration")
    assert said in found[0]
    for token in ("as_token", "hs_token"):
        assert changes.get(token, TOKEN) not in (found[0] if isinstance(changes.get(token, TOKEN), str) else [])


def test_all_faults_are_told_at_once(minion):
    found = minion.faults(a={}, b=an_entry(url=..., sender_localpart=...), c={"file": "/nowhere"})
    assert [line.split(" ")[0] for line in found] == [
        "synapse:appservices:a:",
        "synapse:appservices:b:registration:url:",
        "synapse:appservices:b:registration:sender_localpart:",
        "synapse:appservices:c:file",
    ]


def test_either_file_or_registration(minion):
    for entry in ({}, {"file": "/a", **an_entry()}, {"arguments": ["--ipc=private"]}):
        assert "not both and not neither" in minion.faults(bridge=entry)[0]


def test_no_two_appservices_share_a_user_or_a_token(minion):
    tokens = {"as_token": TOKEN + "a", "hs_token": TOKEN + "b"}
    found = minion.faults(a=an_entry(**tokens), b=an_entry(hs_token=TOKEN + "a"))
    assert found == [
        'synapse:appservices:b:registration:sender_localpart: "bot":'
        " synapse:appservices:a:registration has the same: each appservice needs a user of its own",
        "synapse:appservices:b:registration:hs_token: (a secret, not shown):"
        " synapse:appservices:a:registration:as_token is the same: each token must be another",
    ]


FILES = {
    "not YAML": (b"as_token: *0123456789abcdef\n", "it is not YAML, see its line 1"),
    "a double key": (
        b"url: null\nas_token: 0123456789abcdef\nas_token: 0123456789abcdef\n",
        "it is not YAML, see its line",
    ),
    "a list": (b"- 0123456789abcdef\n", "it must hold a mapping"),
    "empty": (b"", "it must hold a mapping"),
    "itself": (b"&a {as_token: 0123456789abcdef, a: *a}\n", "plain data"),
    "no number": (b"a: !!int 0123456789abcdef\n", "it is not YAML of plain data"),
    "bytes": (b"a: !!binary MDEyMzQ1Njc4OWFiY2RlZg==\n", "plain data"),
    "a key of a list": (b"? [0123456789abcdef]\n: 1\n", "it is not YAML"),
    "not UTF-8": (b"\xff0123456789abcdef", "not a text in UTF-8"),
    "a control character": (b"\x00", "it is not YAML"),
    "large": (b"#" * (1 << 20) + b"\n", "it is larger than"),
}


@pytest.mark.parametrize(("content", "said"), FILES.values(), ids=FILES)
def test_a_file_that_is_no_registration_is_a_fault_that_does_not_quote_it(minion, tmp_path, content, said):
    path = tmp_path / "registration.yaml"
    path.write_bytes(content)
    found = minion.faults(bridge={"file": str(path)})
    assert len(found) == 1
    assert found[0].startswith(f"synapse:appservices:bridge:file ({path}): ")
    assert said in found[0]
    assert TOKEN not in found[0]


@pytest.mark.parametrize("kind", ["missing", "directory", "pipe", "device", "loop"])
def test_a_path_that_is_no_file_is_a_fault(minion, tmp_path, kind):
    path = tmp_path / "registration.yaml"
    if kind == "directory":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "loop":
        path.symlink_to(path)
    found = minion.faults(bridge={"file": "/dev/zero" if kind == "device" else str(path)})
    assert len(found) == 1
    assert found[0].startswith("synapse:appservices:bridge:file (")


def test_a_registration_comes_from_a_file_of_the_minion_or_of_the_file_server(minion, tmp_path):
    text = yaml.safe_dump(a_registration(id="bridge", as_token=TOKEN + "a", hs_token=TOKEN + "b"))
    (tmp_path / "registration.yaml").write_text(text)
    minion.functions["cp.get_file_str"] = lambda url: text if url == "salt://bridge/registration.yaml" else served(url)
    for file in (str(tmp_path / "registration.yaml"), "salt://bridge/registration.yaml"):
        assert minion.faults(bridge={"file": file}) == []
        assert minion.synapse_appservice.registrations()[0]["registration"] == yaml.safe_load(text)
    assert "not on the file server" in minion.faults(bridge={"file": "salt://bridge/other.yaml"})[0]


def test_tokens_are_made_once_and_stay_while_the_appservice_is_gone(minion):
    minion.faults(bridge=an_entry())
    before = minion.synapse_appservice.registrations()[0]
    assert before["missing_tokens"] is True
    assert not {"as_token", "hs_token"} & set(before["registration"])
    assert not minion.store.exists()

    assert minion.synapse_appservice.ensure_tokens() == {"bridge": ["as_token", "hs_token"]}
    made = minion.synapse_appservice.registrations()[0]
    assert made["missing_tokens"] is False
    assert made["path"] == f"{minion.directory}/config/appservices/bridge.yaml"
    assert len({made["registration"][token] for token in ("as_token", "hs_token")}) == 2
    assert minion.faults(bridge=an_entry()) == []

    minion.faults()
    assert minion.synapse_appservice.ensure_tokens() == {}
    minion.faults(bridge=an_entry())
    assert minion.synapse_appservice.ensure_tokens() == {}
    assert minion.synapse_appservice.registrations()[0] == made


def test_only_a_token_that_lacks_is_made(minion):
    minion.faults(bridge=an_entry(as_token=TOKEN))
    assert minion.synapse_appservice.ensure_tokens() == {"bridge": ["hs_token"]}
    assert minion.synapse_appservice.tokens("bridge")["as_token"] == TOKEN
    minion.faults(bridge=an_entry())
    kept = json.loads((minion.store / "bridge.tokens.json").read_text())["hs_token"]
    assert minion.synapse_appservice.ensure_tokens() == {"bridge": ["as_token"]}
    assert minion.synapse_appservice.tokens("bridge")["hs_token"] == kept


def test_tokens_can_be_renewed(minion):
    minion.faults(bridge=an_entry())
    with pytest.raises(CommandExecutionError, match="made no tokens"):
        minion.synapse_appservice.renew_tokens("bridge")
    minion.synapse_appservice.ensure_tokens()
    before = minion.synapse_appservice.tokens("bridge")
    assert minion.synapse_appservice.renew_tokens("bridge") == ["as_token", "hs_token"]
    after = minion.synapse_appservice.tokens("bridge")
    assert not set(before.values()) & set(after.values())


def test_an_appservice_gets_its_own_registration(minion):
    minion.faults(bridge=an_entry())
    with pytest.raises(CommandExecutionError, match="not made yet"):
        minion.synapse_appservice.tokens("bridge")
    with pytest.raises(CommandExecutionError, match="No appservice other"):
        minion.synapse_appservice.tokens("other")
    assert minion.new_run(test=True).synapse_appservice.tokens("bridge") == dict.fromkeys(
        ("as_token", "hs_token"), "(made by the next run)"
    )
    minion.new_run().synapse_appservice.ensure_tokens()
    complete = minion.synapse_appservice.registration("bridge")
    assert complete == minion.synapse_appservice.registrations()[0]["registration"]


def test_what_is_stored_is_roots_alone(minion):
    minion.states.registered("bridge", a_registration())
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in [minion.store, *minion.store.iterdir()]}
    assert modes == {"appservices": 0o700, "bridge.json": 0o600, "bridge.tokens.json": 0o600}


@pytest.mark.parametrize("how", ["symlink", "writable", "foreign", "file"])
def test_a_store_that_others_can_write_to_is_refused(minion, tmp_path, how):
    minion.store.parent.mkdir()
    if how == "symlink":
        (tmp_path / "elsewhere").mkdir()
        minion.store.symlink_to(tmp_path / "elsewhere")
    elif how == "file":
        minion.store.touch()
    else:
        minion.store.mkdir()
        if how == "writable":
            minion.store.chmod(0o770)
        elif os.geteuid():
            pytest.skip("only root can give a directory away")
        else:
            os.chown(minion.store, 65534, 65534)
    assert "only root can write" in minion.faults()[0]
    ret = minion.states.registered("bridge", a_registration())
    assert ret["result"] is False
    assert "only root can write" in ret["comment"]


@pytest.mark.parametrize("name", ["bridge.json", "bridge.tokens.json"])
@pytest.mark.parametrize("content", [b"", b"[]", b"\xff", b'{"as_token": 5}', b"[" * 100000, b"{}"])
def test_a_damaged_store_is_a_fault_with_the_way_out(minion, name, content):
    minion.states.registered("bridge", a_registration())
    (minion.store / name).write_bytes(content)
    found = minion.faults()
    if (name, content) == ("bridge.tokens.json", b"{}"):
        assert found == []
    else:
        assert len(found) == 1
        assert "bridge" in found[0]


def test_an_appservice_in_the_pillar_and_from_a_state_is_a_fault_that_names_both(minion):
    assert minion.states.registered("bridge", a_registration())["result"] is True
    found = minion.faults(bridge=an_entry())
    assert len(found) == 1
    assert found[0].startswith("synapse:appservices:bridge: ")
    assert "synapse_appservice.registered bridge" in found[0]
    assert str(minion.store / "bridge.json") in found[0]


def test_registered_stores_what_the_formula_then_uses(minion):
    shown = {"result": None, "name": "bridge", "comment": "The appservice bridge would be registered"}
    made = {
        "url": {"old": None, "new": "http://bridge:29318"},
        "sender_localpart": {"old": None, "new": "bot"},
        "namespaces": {"old": None, "new": a_registration()["namespaces"]},
        "com.example.secret": {"old": None, "new": "(not shown)"},
        "arguments": {"old": None, "new": ["--ipc=private"]},
        "tokens": {"old": None, "new": ["as_token", "hs_token"]},
    }
    wanted = {"registration": a_registration(**{"com.example.secret": TOKEN}), "arguments": ["--ipc=private"]}
    minion.new_run(test=True)
    assert minion.states.registered("bridge", **wanted) == {**shown, "changes": made}
    assert not minion.store.exists()
    expected = minion.synapse_appservice.registrations()
    assert [(item["id"], item["missing_tokens"]) for item in expected] == [("bridge", True)]
    assert minion.states.tokens_exist("tokens")["changes"] == {}

    minion.new_run()
    assert minion.states.registered("bridge", **wanted) == {
        "name": "bridge",
        "result": True,
        "comment": "The appservice bridge has been registered",
        "changes": made,
    }
    (stored,) = minion.synapse_appservice.registrations()
    assert stored["arguments"] == ["--ipc=private"]
    assert stored["registration"] == {
        "id": "bridge",
        **wanted["registration"],
        **minion.synapse_appservice.tokens("bridge"),
    }

    for test in (True, False):
        minion.new_run(test)
        ret = minion.states.registered("bridge", **wanted)
        assert (ret["result"], ret["changes"]) == (True, {})


def test_registered_tells_what_changes_and_shows_no_token(minion):
    minion.states.registered("bridge", a_registration(as_token=TOKEN + "a", hs_token=TOKEN + "b"))
    ret = minion.states.registered("bridge", a_registration(url=None, as_token=TOKEN + "c", hs_token=TOKEN + "b"))
    assert ret["changes"] == {
        "url": {"old": "http://bridge:29318", "new": None},
        "as_token": {"old": "(not shown)", "new": "(not shown)"},
    }
    assert TOKEN not in json.dumps(ret)


BAD_STATES = {
    "no id": ("Not An Id", {"registration": a_registration()}),
    "nothing": ("bridge", {}),
    "both": ("bridge", {"registration": a_registration(), "file": "/etc/bridge.yaml"}),
    "no mapping": ("bridge", {"registration": f"as_token: {TOKEN}"}),
    "no file": ("bridge", {"file": "registration.yaml"}),
    "masked": ("bridge", {"registration": a_registration(as_token=MASKED)}),
    "no list": ("bridge", {"registration": a_registration(), "arguments": "--ipc=private"}),
    "no option": ("bridge", {"registration": a_registration(), "arguments": ["image"]}),
    "a taken user": ("bridge", {"registration": a_registration(sender_localpart="taken")}),
    "in the pillar": ("other", {"registration": a_registration()}),
}


@pytest.mark.parametrize("test", [True, False])
@pytest.mark.parametrize(("name", "arguments"), BAD_STATES.values(), ids=BAD_STATES)
def test_registered_refuses_what_is_wrong_and_stores_nothing(minion, name, arguments, test):
    minion.pillar["appservices"] = {"other": an_entry(sender_localpart="taken")}
    ret = minion.new_run(test).states.registered(name, **arguments)
    assert ret["result"] is False
    assert ret["changes"] == {}
    assert ret["comment"]
    assert TOKEN not in ret["comment"]
    assert not minion.store.exists()


def test_a_fault_elsewhere_does_not_keep_a_bridge_from_putting_its_own_right(minion):
    minion.pillar["appservices"] = {"other": {"file": "/nowhere"}}
    assert minion.states.registered("bridge", a_registration())["result"] is True
    (minion.store / "bridge.json").write_text('{"file": "/nowhere"}')
    assert minion.synapse_appservice.homeserver()["server_name"] == "example.org"
    assert minion.states.registered("bridge", a_registration())["changes"]["file"]["new"] is None


def test_absent_forgets_the_registration_and_keeps_the_tokens(minion):
    minion.states.registered("bridge", a_registration())
    tokens = minion.synapse_appservice.tokens("bridge")

    ret = minion.new_run(test=True).states.absent("bridge")
    assert (ret["result"], ret["changes"]) == (None, {"bridge": {"old": "registered", "new": None}})
    assert minion.synapse_appservice.registrations() == []
    assert minion.states.absent("bridge")["result"] is True

    ret = minion.new_run().states.absent("bridge")
    assert (ret["result"], ret["changes"]) == (True, {"bridge": {"old": "registered", "new": None}})
    assert [path.name for path in minion.store.iterdir()] == ["bridge.tokens.json"]
    for test in (True, False):
        ret = minion.new_run(test).states.absent("bridge")
        assert (ret["result"], ret["changes"]) == (True, {})

    minion.new_run().states.registered("bridge", a_registration())
    assert minion.synapse_appservice.tokens("bridge") == tokens


def test_tokens_exist_is_exact(minion):
    minion.pillar["appservices"] = {"a": an_entry(), "b": an_entry(sender_localpart="b", as_token=TOKEN)}
    made = {"a": {"old": None, "new": ["as_token", "hs_token"]}, "b": {"old": None, "new": ["hs_token"]}}
    ret = minion.new_run(test=True).states.tokens_exist("tokens")
    assert (ret["result"], ret["changes"]) == (None, made)
    assert not minion.store.exists()
    ret = minion.new_run().states.tokens_exist("tokens")
    assert (ret["result"], ret["changes"]) == (True, made)
    for test in (True, False):
        ret = minion.new_run(test).states.tokens_exist("tokens")
        assert (ret["result"], ret["changes"]) == (True, {})


def test_tokens_exist_makes_none_while_there_is_a_fault(minion):
    minion.pillar["appservices"] = {"a": an_entry(), "b": an_entry()}
    ret = minion.new_run().states.tokens_exist("tokens")
    assert ret["result"] is False
    assert "each appservice needs a user of its own" in ret["comment"]
    assert not minion.store.exists()


def test_the_homeserver_is_told_without_saying_which_it_is(minion):
    minion.pillar["workers"] = {"list": [{"type": "pusher"}]}
    about = minion.synapse_appservice.homeserver("bridge")
    assert about == {
        "server_name": "example.org",
        "url": {"host": "http://127.0.0.1:8008", "container": "http://172.29.88.1:8008"},
        "host_address": "172.29.88.1",
        "unit": "matrix-synapse.service",
        "after": ["matrix-synapse.service", "matrix-synapse-worker-0-pusher.service", "nginx.service"],
        "arguments": ["--network=matrix-synapse"],
        "group": "synapse",
        "registrations": f"{minion.directory}/config/appservices",
        "registration": f"{minion.directory}/config/appservices/bridge.yaml",
        "mounts": [
            f"--mount=type=bind,source={minion.directory}/config/appservices/bridge.yaml,"
            "target=/registration.yaml,readonly"
        ],
    }
    with pytest.raises(SaltInvocationError):
        minion.synapse_appservice.homeserver("../../etc/shadow")


TLS = {"certificate": "/etc/ssl/a.pem", "key": "/etc/ssl/a.key"}
LISTENERS = [
    ({"client": {"listen": ["8080"]}}, "127.0.0.1:8080", "172.29.88.1:8080"),
    ({"client": {"listen": [8081]}}, "127.0.0.1:8081", "172.29.88.1:8081"),
    ({"client": {"listen": ["[::]:8080"]}}, "[::1]:8080", "172.29.88.1:8080"),
    ({"client": {"listen": ["192.0.2.1:80", "127.0.0.1:81"]}}, "192.0.2.1:80", "172.29.88.1:80"),
    ({"client": {"listen": ["443"], "tls": TLS}}, "172.29.88.1:8008", "172.29.88.1:8008"),
]


@pytest.mark.parametrize(("nginx", "host", "container"), LISTENERS)
def test_bridges_get_an_address_without_tls(minion, nginx, host, container):
    minion.pillar["nginx"] = nginx
    assert minion.synapse_pillar.faults() == []
    assert minion.synapse_appservice.homeserver()["url"] == {
        "host": f"http://{host}",
        "container": f"http://{container}",
    }
    assert minion.synapse_appservice.listen() == container


@pytest.mark.parametrize(
    ("given", "expected"),
    [({"public_base_url": "https://matrix.example.org"}, "https://matrix.example.org"), ({}, "https://example.org/")],
)
def test_without_nginx_bridges_use_the_public_url(minion, given, expected):
    minion.pillar.update(nginx={"managed": False}, **given)
    about = minion.synapse_appservice.homeserver()
    assert set(about["url"].values()) == {expected}
    assert about["after"] == ["matrix-synapse.service"]
    assert minion.synapse_appservice.listen() is None


def test_a_faulty_pillar_is_an_error_and_no_crash(minion):
    minion.pillar["docker"] = {"network": {"subnet": "nonsense"}}
    for function in ("registrations", "homeserver", "ensure_tokens"):
        with pytest.raises(CommandExecutionError, match="synapse:docker:network:subnet"):
            getattr(minion.synapse_appservice, function)()
    assert minion.states.registered("bridge", a_registration())["result"] is False
    assert minion.states.absent("bridge")["result"] is False


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary() | st.dates(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
namespace_items = st.lists(
    st.fixed_dictionaries({}, optional={"exclusive": st.booleans() | values, "regex": st.text() | values})
)
registrations = st.fixed_dictionaries(
    {},
    optional={
        "id": st.just("a") | values,
        "url": st.sampled_from([None, "http://bridge:1", "https://x/y"]) | st.text() | values,
        "sender_localpart": st.from_regex(r"[a-z0-9._/-]{1,9}", fullmatch=True) | st.text() | values,
        "namespaces": st.dictionaries(st.sampled_from(["users", "aliases", "rooms"]), namespace_items) | values,
        "as_token": st.just(TOKEN + "a") | st.just(MASKED) | values,
        "hs_token": st.just(TOKEN + "b") | values,
        "protocols": st.lists(st.text()) | values,
        "rate_limited": st.booleans() | values,
        "org.matrix.msc3202": st.booleans() | values,
        "ip_range_whitelist": st.lists(st.ip_addresses().map(str)) | values,
        "com.example.extension": values,
    },
)
entries = st.fixed_dictionaries(
    {}, optional={"registration": registrations, "file": st.sampled_from(["/", "/dev/null", "salt://x", "/proc/1/mem"])}
)


@hypothesis_settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(appservices=st.dictionaries(st.sampled_from(["a", "b", "c-1"]), entries, max_size=3))
def test_no_pillar_makes_it_crash_and_what_has_no_fault_can_be_used(minion, appservices):
    minion.pillar["appservices"] = appservices
    minion.new_run()
    if minion.synapse_pillar.faults():
        return
    found = minion.synapse_appservice.faults()
    assert all(isinstance(line, str) and TOKEN not in line for line in found)
    if not found:
        minion.new_run(test=True).synapse_appservice.ensure_tokens(test=True)
        json.dumps(minion.synapse_appservice.registrations())
