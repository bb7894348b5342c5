"""What systemd makes of the units: who takes whom along, and who comes back."""

import time

import pytest
from deployment import MAIN, Refused, until

GENERIC = "matrix-synapse-worker-0-generic"
BACKGROUND = "matrix-synapse-worker-3-background"


@pytest.fixture(autouse=True)
def _all_healthy(deployed):
    """Every test finds all processes healthy, and has to leave them so."""
    yield
    deployed.systemctl("start", *[f"{name}.service" for name in deployed.names()])
    until(deployed.all_healthy, "every process is healthy again")


def workers(deployed):
    return [name for name in deployed.names() if name != MAIN]


def monotonic(deployed, name, event):
    """When a unit entered a state, in microseconds since boot."""
    return int(deployed.systemctl("show", f"--property={event}", "--value", f"{name}.service").stdout)


def test_stopping_main_stops_every_process(deployed):
    deployed.systemctl("stop", f"{MAIN}.service")
    assert set(deployed.states().values()) == {"inactive"}
    assert {container["State"]["Status"] for container in deployed.containers().values()} == {"exited"}
    assert deployed.host.sh("find /run/matrix-synapse -name '*.notify'").stdout == ""


def test_starting_main_starts_every_worker_in_parallel_once_main_is_healthy(deployed):
    deployed.systemctl("stop", f"{MAIN}.service")
    deployed.systemctl("start", f"{MAIN}.service")
    # systemctl waits for main alone.
    assert deployed.healthy(MAIN)
    until(lambda: set(deployed.states().values()) == {"active"}, "every worker is started")
    assert deployed.all_healthy()
    ready = monotonic(deployed, MAIN, "ActiveEnterTimestampMonotonic")
    begun = [monotonic(deployed, name, "InactiveExitTimestampMonotonic") for name in workers(deployed)]
    done = [monotonic(deployed, name, "ActiveEnterTimestampMonotonic") for name in workers(deployed)]
    assert all(ready <= time <= ready + 1_000_000 for time in begun), "each as soon as main is ready"
    assert max(begun) < min(done), "all begin before the first is done"


def test_restarting_main_restarts_each_worker_once(deployed):
    before = deployed.starts()
    now = deployed.host.sh("date '+%F %T'").stdout.strip()
    deployed.systemctl("restart", f"{MAIN}.service")
    until(lambda: set(deployed.states().values()) == {"active"}, "every process is started")
    after = deployed.starts()
    assert all(after[name] > before[name] for name in before)
    script = f"journalctl --since '{now}' --output cat --unit '{{}}.service' | grep --count '^Started'"
    assert {deployed.host.sh(script.format(name)).stdout.strip() for name in deployed.names()} == {"1"}


def test_starting_one_worker_pulls_main_in(deployed):
    deployed.systemctl("stop", f"{MAIN}.service")
    deployed.systemctl("start", f"{GENERIC}.service")
    assert deployed.states()[MAIN] == "active"
    assert deployed.healthy(MAIN)
    assert deployed.healthy(GENERIC)


def test_stopping_one_worker_stops_only_it(deployed):
    before = deployed.starts()
    deployed.systemctl("stop", f"{BACKGROUND}.service")
    found = deployed.states()
    assert found.pop(BACKGROUND) == "inactive"
    assert set(found.values()) == {"active"}
    # Its container stays, to be started again.
    assert deployed.starts() == before
    assert [name for name, it in deployed.containers().items() if not it["State"]["Running"]] == [BACKGROUND]


@pytest.mark.parametrize("name", [GENERIC, BACKGROUND])
def test_a_killed_worker_comes_back_by_itself_and_alone(deployed, name):
    before = deployed.starts()
    deployed.kill(name)
    until(lambda: deployed.starts().get(name, "") > before[name] and deployed.healthy(name), "it is back")
    after = deployed.starts()
    assert {other for other in before if after[other] != before[other]} == {name}


def test_a_killed_main_comes_back_by_itself_and_no_worker_stays_dead(deployed):
    before = deployed.starts()[MAIN]
    deployed.kill(MAIN)
    until(lambda: deployed.starts().get(MAIN, "") > before and deployed.all_healthy(), "all are back")


def test_a_killed_docker_client_brings_the_process_back(deployed):
    """The unit's main process is the client, not Synapse."""
    before = deployed.starts()[GENERIC]
    pid = deployed.systemctl("show", "--property=MainPID", "--value", f"{GENERIC}.service").stdout.strip()
    deployed.host.run("kill", "-KILL", pid)
    until(lambda: deployed.starts().get(GENERIC, "") > before and deployed.healthy(GENERIC), "it is back")


@pytest.mark.parametrize("how", ["systemctl restart docker", "systemctl kill --signal=KILL docker"])
def test_all_come_back_after_the_docker_daemon(deployed, how):
    before = deployed.starts()
    deployed.host.sh(how)
    until(
        lambda: (
            (after := deployed.starts()) and after.keys() == before.keys() and all(after[n] > before[n] for n in before)
        ),
        "every container is started anew",
        180,
    )
    until(deployed.all_healthy, "all are healthy")


@pytest.mark.parametrize("how", ["restart", "kill"])
def test_all_come_back_after_the_machine(deployed, how):
    """An orderly reboot, and a power failure."""
    getattr(deployed.host, how)()
    until(deployed.all_healthy, "all are healthy")
    alice = deployed.user()
    alice.say(alice.room(), "still here")
    assert deployed.apply() == {}


def test_synapse_finds_the_database_again(deployed):
    before, alice = deployed.starts(), deployed.user()
    deployed.systemctl("restart", "postgresql@15-main", "redis-server@synapse")

    def talks():
        try:
            return bool(alice.say(alice.room(), "the database is back"))
        except Refused:
            # Synapse finds out by failing that a connection of its pool is dead, and it has several in each process.
            return False

    until(lambda: all(talks() for _ in range(10)), "ten rooms in a row")
    assert deployed.starts() == before, "nobody had to be restarted"


def test_what_a_crash_left_behind_blocks_no_start(deployed):
    deployed.systemctl("stop", f"{GENERIC}.service")
    public, private = (f"/run/matrix-synapse/{side}/{GENERIC}.sock" for side in ("public", "private"))
    units = f"/run/matrix-synapse/units/{GENERIC}"
    left = f"touch {public} {private}; ln -s 1 {public}.lock; ln -s 1 {private}.lock; touch {units}.notify"
    deployed.host.sh(f"{left}; docker rm {GENERIC}; docker create --name {GENERIC} matrixdotorg/synapse:v1.163.2 run")
    deployed.systemctl("start", f"{GENERIC}.service")
    assert deployed.healthy(GENERIC)


def test_a_container_that_cannot_start_makes_room_for_a_new_one(deployed):
    deployed.systemctl("stop", f"{GENERIC}.service")
    label = "org.matrix.synapse.process.inputs"
    inputs = deployed.containers()[GENERIC]["Config"]["Labels"][label]
    create = f"docker create --name {GENERIC} --label {label}={inputs} matrixdotorg/synapse:v1.163.2 run -m nonsense"
    deployed.host.sh(f"docker rm {GENERIC}; {create}")
    deployed.systemctl("start", f"{GENERIC}.service", check=False)
    until(lambda: deployed.healthy(GENERIC), "it is back by itself")


def test_a_container_that_was_stopped_in_order_is_used_again(deployed):
    before = deployed.containers()[GENERIC]["Id"]
    deployed.systemctl("restart", f"{GENERIC}.service")
    assert deployed.containers()[GENERIC]["Id"] == before


def test_a_start_that_is_called_off_leaves_nothing_that_runs(deployed):
    unit = f"{GENERIC}.service"
    deployed.systemctl("stop", unit)
    for moment in (0.1, 0.3, 0.6):
        deployed.systemctl("start", "--no-block", unit)
        time.sleep(moment)
        deployed.systemctl("stop", unit)
        left = deployed.containers().get(GENERIC)
        assert not left or not left["State"]["Running"], f"called off after {moment} s"


def test_nginx_answers_at_once_after_a_process_was_restarted(deployed):
    alice = deployed.user()
    for name in (GENERIC, "matrix-synapse-worker-1-generic"):
        deployed.systemctl("restart", f"{name}.service")
        for _ in range(10):
            alice.ask("GET", "/_matrix/client/v3/account/whoami")


def test_a_unit_that_is_after_main_starts_when_main_answers(deployed):
    host = deployed.host
    probe = "curl --silent --fail --unix-socket /run/matrix-synapse/public/matrix-synapse.sock http://localhost/health"
    host.write(
        "/run/systemd/system/after-synapse.service",
        f"[Unit]\nWants={MAIN}.service\nAfter={MAIN}.service\n[Service]\nType=oneshot\nExecStart={probe}\n",
    )
    host.sh(f"systemctl daemon-reload; systemctl stop {MAIN}; systemctl start after-synapse")
    assert host.run("systemctl", "show", "--property=Result", "--value", "after-synapse").stdout.strip() == "success"


def test_no_unit_sleeps_and_systemd_finds_no_fault(deployed):
    files = [f"/etc/systemd/system/{name}.service" for name in deployed.names()]
    text = deployed.host.run("cat", *files).stdout
    assert "sleep" not in text
    assert "RestartSec" not in text
    assert deployed.host.run("systemd-analyze", "verify", *files).stderr == ""


def test_a_bad_start_is_given_up_at_once(deployed):
    """A process that dies before it is ready does not cost the whole time-out."""
    path = f"/etc/matrix-synapse/workers/{BACKGROUND}.yaml"
    good = deployed.host.read(path)
    deployed.host.sh(f"systemctl stop {BACKGROUND}; echo 'worker_app: synapse.app.nonsense' > {path}")
    done = deployed.host.run("timeout", "60", "systemctl", "start", f"{BACKGROUND}.service", check=False)
    assert done.returncode == 1
    deployed.host.sh(f"systemctl stop {BACKGROUND}; cat > {path}", input=good)
