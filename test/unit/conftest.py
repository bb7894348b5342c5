"""
What unit tests share: the formula's modules, loaded by path, on a minion that needs no Salt daemon.
"""

import copy
import functools
import importlib.util
import json
import pathlib
import signal
import types

import pytest

ROOT = pathlib.Path(__file__).parents[2]
KNOWLEDGE = "synapse_pillar.knowledge"


@functools.cache
def served(url):
    """The file server, which serves the checkout."""
    path = ROOT / url.removeprefix("salt://")
    return path.read_text(encoding="utf-8") if path.is_file() else ""


class Minion:
    """
    The formula's modules on a minion: its pillar, roster and files are the test's.

    A module is an attribute (``minion.synapse_workers``); what they call of Salt stands in ``salt``.
    """

    def __init__(self):
        self.pillar, self.context = {}, {}
        # There is neither the account nor the group, nor a Docker network.
        self.salt = {
            "cp.get_file_str": served,
            "file.user_to_uid": lambda name: "",
            "file.group_to_gid": lambda name: "",
            "cmd.run_stdout": lambda command, **kwargs: "",
        }
        dunders = {
            "__salt__": self.salt,
            "__pillar__": self.pillar,
            "__context__": self.context,
            "__opts__": {"test": False},
            "__grains__": {},
        }
        for path in sorted(ROOT.glob("_modules/synapse_*.py")):
            spec = importlib.util.spec_from_file_location(path.stem, path)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            vars(module).update(dunders)
            setattr(self, path.stem, module)
            self.salt |= {
                f"{path.stem}.{name}": value
                for name, value in vars(module).items()
                if isinstance(value, types.FunctionType) and not name.startswith("_")
            }
        self.move_to(pathlib.Path("/nonexistent"))
        self.own = dict(self.salt)

    def move_to(self, directory):
        """Be a new minion, whose files are below a directory."""
        self.directory = directory
        self.directories = {name: f"{directory}/{name}" for name in ("config", "data")}
        return self.run({})

    def run(self, pillar, **beside):
        """Begin a run with a pillar below ``synapse``, and others beside it."""
        self.pillar.clear()
        self.pillar.update({"synapse": pillar}, **beside)
        for key in self.context.keys() - {KNOWLEDGE}:
            del self.context[key]
        return self

    def good_pillar(self, settings=None):
        """The least pillar, with other values by path: ``{"workers:preset": "one-of-each"}``; ``...`` leaves one out."""
        pillar = {"server_name": "example.org", "directories": dict(self.directories)}
        for path, value in (settings or {}).items():
            *parents, key = path.split(":")
            mapping = functools.reduce(lambda found, parent: found.setdefault(parent, {}), parents, pillar)
            if value is ...:
                del mapping[key]
            else:
                mapping[key] = copy.deepcopy(value)
        return pillar

    def plan(self, settings=None):
        """The plan of a good pillar."""
        return self.run(self.good_pillar(settings)).synapse_workers.plan()

    def keep_roster(self, roster):
        self.write("data/roster.json", json.dumps(roster))

    def write(self, path, text):
        path = self.directory / path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        path.chmod(0o640)


@pytest.fixture(autouse=True)
def signals_as_usual():
    """Whoever started the tests, as from `nohup` or a job in the background, may have them ignored."""
    usual = {signal.SIGHUP: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def formula():
    """A minion without files, for what may be shared between tests."""
    return Minion()


@pytest.fixture
def minion(formula, tmp_path):
    """A minion with a directory of its own."""
    formula.salt.clear()
    formula.salt.update(formula.own)
    yield formula.move_to(tmp_path)
    formula.move_to(pathlib.Path("/nonexistent"))


@pytest.fixture
def formula_state(minion):
    """A module of states, under test=True."""

    def load(name):
        spec = importlib.util.spec_from_file_location(f"states_{name}", ROOT / f"_states/{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        vars(module).update({"__salt__": minion.salt, "__opts__": {"test": True}})
        return module

    return load
