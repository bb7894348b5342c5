"""
What the documentation names exists, and pillar.example says all that can be said, and nothing else.
"""

import ast
import importlib.util
import pathlib
import re

import pytest
import yaml

ROOT = pathlib.Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
EXAMPLE = (ROOT / "pillar.example").read_text()
README = PAGES[0].read_text()
SCHEMA = yaml.safe_load((ROOT / "synapse/data/schema.yaml").read_text())["pillar"]
DEFAULTS = yaml.safe_load((ROOT / "synapse/defaults.yaml").read_text())
WORKERS = yaml.safe_load((ROOT / "synapse/data/workers.yaml").read_text())

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


@pytest.fixture
def minion(tmp_path):
    """A minion as the unit tests have it."""
    spec = importlib.util.spec_from_file_location("unit_conftest", ROOT / "test/unit/conftest.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Minion().move_to(tmp_path)


def faults(minion, pillar):
    return minion.run({"directories": minion.directories, **pillar}).synapse_workers.validate()


def uncommented(text):
    """The example with its commented settings: those have no space after the `#`, or more than one."""
    return yaml.safe_load(re.sub(r"(?m)^( *)#(?! \S)(?=\S| )", r"\1", text))["synapse"]


def functions(directory):
    return {
        # As `__func_alias__` has it.
        f"{path.stem}.{node.name.rstrip('_')}"
        for path in (ROOT / directory).glob("synapse_*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")
    }


@pages
def test_links_and_paths_lead_to_files(page):
    text = page.read_text()
    links = [link for link in re.findall(r"\]\(([\w./:#-]+)\)", text) if not link.startswith("http")]
    assert [link for link in links if not (page.parent / link.partition("#")[0]).exists()] == []
    top = "_modules|_states|docs|synapse|test"
    paths = re.findall(rf"`((?:{top})/[\w./-]*|pillar\.example|Makefile)`", text)
    assert [path for path in paths if not (ROOT / path).exists()] == []


@pages
def test_functions_exist(page):
    text = page.read_text()
    called = set(re.findall(r"salt-call (?:-\S+ )*(synapse_\w+\.\w+)", text))
    assert called - functions("_modules") == set()
    named = {f"{module}.{name}" for module, name in re.findall(r"\b(synapse_[a-z]+)\.([a-z_]+)\b(?!\()", text)}
    named = {name for name in named if not name.startswith("synapse_formula.") and not name.endswith(".py")}
    assert named - functions("_modules") - functions("_states") == set()


@pages
def test_states_to_apply_exist(page):
    text = page.read_text()
    applied = {name for names in re.findall(r"state\.apply (synapse[\w.]*)", text) for name in [names.rstrip(".")]}
    files = {name: [ROOT / f"{name.replace('.', '/')}{end}" for end in (".sls", "/init.sls")] for name in applied}
    assert [name for name, candidates in files.items() if not any(map(pathlib.Path.exists, candidates))] == []


@pages
def test_make_targets_exist(page):
    targets = set(re.findall(r"(?m)^([a-z-]+):", (ROOT / "Makefile").read_text()))
    assert set(re.findall(r"(?m)(?:^# |`)make ([a-z-]+)", page.read_text())) - targets == set()


def test_the_example_has_no_faults(minion):
    assert faults(minion, yaml.safe_load(EXAMPLE)["synapse"]) == []


def test_the_example_makes_at_least_eight_workers_of_different_types(minion):
    minion.run({"directories": minion.directories, **yaml.safe_load(EXAMPLE)["synapse"]})
    types = [process["type"] for process in minion.synapse_workers.plan()["processes"][1:]]
    assert len(set(types)) >= 8


def test_the_commented_settings_of_the_example_are_right_as_well(minion):
    known = minion.synapse_pillar.knowledge()
    assert minion.synapse_pillar.check(uncommented(EXAMPLE), SCHEMA, "synapse", known) == []


def keys(node):
    """Every path of the schema that names a setting, a list's items and an open map's values on the path of their owner."""
    for key, child in node.get("keys", {}).items():
        yield key
        yield from (f"{key}:{below}" for below in keys(child))
    for inner in ("items", "values"):
        if inner in node:
            yield from keys(node[inner])


def used(node, value):
    """The paths of the schema that a pillar uses."""
    for key, child in node.get("keys", {}).items():
        if isinstance(value, dict) and key in value:
            yield key
            yield from (f"{key}:{below}" for below in used(child, value[key]))
    if "items" in node and isinstance(value, list):
        yield from (below for item in value for below in used(node["items"], item))
    if "values" in node and isinstance(value, dict):
        yield from (below for item in value.values() for below in used(node["values"], item))


def test_the_example_has_every_key_of_the_schema():
    assert sorted(set(keys(SCHEMA)) - set(used(SCHEMA, uncommented(EXAMPLE)))) == []


def other_than_default(value, default, path=""):
    for key in value:
        if isinstance(value[key], dict) and isinstance(default.get(key), dict):
            yield from other_than_default(value[key], default[key], f"{path}{key}:")
        elif default.get(key) not in (None, "", []) and value[key] != default[key]:
            yield f"{path}{key}"


def test_the_example_shows_the_default_where_there_is_one():
    assert list(other_than_default(uncommented(EXAMPLE), DEFAULTS)) == []


def test_the_example_explains_before_it_shows():
    lines = EXAMPLE.splitlines()
    for key in SCHEMA["keys"]:
        at = next(i for i, line in enumerate(lines) if re.match(rf"  #?{key}:", line))
        inside = next(line for line in lines[at + 1 :] if line.strip())
        assert re.match(r" *(# |#  # )\S", lines[at - 1]) or re.match(r" *#? *# \S", inside), f"{key}: not explained"


@pytest.mark.parametrize("text", [README, EXAMPLE], ids=["README.md", "pillar.example"])
@pytest.mark.parametrize("kind", ["types", "streams", "presets"])
def test_types_streams_and_presets_are_all_named(text, kind):
    assert [name for name in WORKERS[kind] if not re.search(rf"\b{name}\b", text)] == []


def test_the_readme_counts_presets_right():
    counted = {name: int(count) for name, count in re.findall(r"(?m)^\| `([a-z-]+)` \| (\d+): ", README)}
    assert counted == {name: sum(entry.get("count", 1) for entry in p) for name, p in WORKERS["presets"].items()}


@pages
def test_pillars_in_pages_have_no_faults(minion, page):
    blocks = re.findall(r"(?ms)^ *```yaml\n(.*?)^ *```", page.read_text())
    pillars = [yaml.safe_load(block) for block in blocks if re.match(r" *synapse:\n", block)]
    wrong = [faults(minion, {"server_name": "example.org", **pillar["synapse"]}) for pillar in pillars]
    # A file that an example names is not on this machine.
    assert [line for lines in wrong for line in lines if "No such file" not in line] == []


def test_the_readme_calls_the_playbooks_types_as_they_are_called_here(minion):
    rows = re.findall(r"(?m)^\| ([^|]*`\w+_\w+`[^|]*) \| ([^|]*) \|$", README)
    pairs = [
        (was, now)
        for left, right in rows
        for was, now in zip(re.findall(r"`(\w+)`", left), re.findall(r"`([\w-]+)`", right), strict=False)
        if was in WORKERS["former_types"]
    ]
    assert len(pairs) >= 7
    assert [pair for pair in pairs if WORKERS["former_types"][pair[0]] != pair[1]] == []


def test_the_formula_file_is_what_salt_packages_by():
    formula = yaml.safe_load((ROOT / "FORMULA").read_text())
    wanted = {"name", "os", "os_family", "version", "release", "summary", "description", "top_level_dir"}
    assert wanted - formula.keys() == set()
    assert (ROOT / formula["top_level_dir"] / "init.sls").exists()
