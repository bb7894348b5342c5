"""The rolling restart: sockets that are shut, requests that are counted, arguments that are none."""

import pathlib
import socket
import threading

import pytest
from salt.exceptions import CommandExecutionError, SaltInvocationError


@pytest.fixture
def rolling(minion):
    minion.run(minion.good_pillar())
    minion.salt["synapse_maintenance.fault"] = lambda: None
    return minion.synapse_rolling


@pytest.fixture
def listener(tmp_path):
    path = tmp_path / "public.sock"
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen()
        path.chmod(0o666)
        yield path


def mode(path):
    return pathlib.Path(path).stat().st_mode & 0o777


def test_a_socket_is_shut_for_a_while(rolling, listener):
    with rolling.shut(str(listener)):
        assert mode(listener) == 0
        assert rolling._is_shut(str(listener))
    assert mode(listener) == 0o666
    assert not rolling._is_shut(str(listener))


def test_a_socket_that_a_new_process_bound_is_left_alone(rolling, listener):
    with rolling.shut(str(listener)), socket.socket(socket.AF_UNIX) as new:
        listener.unlink()
        new.bind(str(listener))
        listener.chmod(0o640)
    assert mode(listener) == 0o640


def test_a_process_without_a_public_socket_has_nothing_to_shut(rolling, tmp_path):
    for path in (None, str(tmp_path / "none")):
        with rolling.shut(path):
            assert not rolling._is_shut(path)


def test_no_link_is_followed(rolling, listener):
    link = listener.with_name("link.sock")
    link.symlink_to(listener)
    with rolling.shut(str(link)):
        assert mode(listener) == 0o666
    listener.chmod(0)
    assert not rolling._is_shut(str(link))


def test_requests_in_flight_are_the_connections_of_the_socket(rolling, listener):
    with socket.socket(socket.AF_UNIX) as first, socket.socket(socket.AF_UNIX) as second:
        assert rolling._connections([str(listener)]) == 0
        first.connect(str(listener))
        second.connect(str(listener))
        # Also those that are not accepted yet.
        assert rolling._connections(["/run/another.sock", str(listener)]) == 2


@pytest.mark.parametrize("managed", [True, False])
def test_what_restarts_together_is_shut_until_it_has(rolling, minion, listener, managed):
    directory = listener.parent / "run"
    for name in ("public", "root"):
        (directory / name).mkdir(parents=True)
    public = directory / "public/matrix-synapse.sock"
    listener.rename(public)
    minion.run(minion.good_pillar({"directories:run": str(directory), "nginx:managed": managed}))
    seen = []
    minion.salt["synapse_process.restart"] = lambda name, alone: seen.append((name, alone, mode(public)))
    rolling.restart_together(["matrix-synapse"])
    assert seen == [("matrix-synapse", False, 0 if managed else 0o666)]
    assert mode(public) == 0o666


@pytest.mark.parametrize(("patience", "left"), [(5, 0), (0.1, 1)])
def test_what_restarts_together_has_some_seconds_for_its_requests(
    rolling, minion, tmp_path, monkeypatch, patience, left
):
    directory, seen = tmp_path / "run", []
    for name in ("public", "root"):
        (directory / name).mkdir(parents=True)
    path = str(directory / "public/matrix-synapse.sock")
    minion.run(minion.good_pillar({"directories:run": str(directory)}))
    monkeypatch.setattr(rolling, "TOGETHER", patience)
    minion.salt["synapse_process.restart"] = lambda *name, **how: seen.append(rolling._connections([path]))
    with socket.socket(socket.AF_UNIX) as listening, socket.socket(socket.AF_UNIX) as client:
        listening.bind(path)
        listening.listen()
        client.connect(path)
        served = listening.accept()[0]
        if not left:
            threading.Timer(0.4, lambda: (client.close(), served.close())).start()
        rolling.restart_together(["matrix-synapse"])
    assert seen == [left]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"names": "matrix-synapse"}, "names: 'matrix-synapse' is not a list"),
        (
            {"names": ["matrix-synapse-worker-99-generic"]},
            "there is no matrix-synapse-worker-99-generic; there are matrix-synapse",
        ),
        ({"drain": "long"}, "drain: 'long' is not a number of seconds"),
        ({"drain": -1}, "drain: -1 is not a number of seconds"),
    ],
)
def test_what_is_no_argument_is_told_before_anything_restarts(rolling, arguments, said):
    with pytest.raises(SaltInvocationError, match=said):
        rolling.restart(**{"names": [], **arguments})


def test_under_maintenance_nothing_restarts(rolling, minion):
    minion.salt["synapse_maintenance.fault"] = lambda: "Synapse is under maintenance"
    with pytest.raises(CommandExecutionError, match="under maintenance"):
        rolling.restart(["matrix-synapse"])
