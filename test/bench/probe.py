#!/usr/bin/python3
"""Runs in the bench's host and prints what it measured as JSON: probe WHAT ARGUMENTS..."""

import http.client
import itertools
import json
import os
import re
import shlex
import socket
import statistics
import subprocess
import sys
import threading
import time

RUN = "/run/matrix-synapse"
MAIN = "matrix-synapse"
POLL = 0.05


def answers(name):
    with socket.socket(socket.AF_UNIX) as health:
        health.settimeout(10)
        try:
            health.connect(f"{RUN}/private/{name}.sock")
            health.sendall(b"GET /health HTTP/1.0\r\n\r\n")
            return b" 200 " in health.recv(64)
        except OSError:
            return False


def wait_for(names, interval=POLL):
    left = list(names)
    while left := [name for name in left if not answers(name)]:
        time.sleep(interval)


def run(*command):
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def systemctl(verb, *names):
    run("systemctl", verb, *[f"{name}.service" for name in names])


def timed(action):
    begin = time.monotonic()
    action()
    return time.monotonic() - begin


def create(name):
    """Create a new container of a process by hand, as its unit does."""
    run("docker", "rm", "--force", name)
    with open(f"/etc/systemd/system/{name}.service") as file:
        unit = file.read()
    line = re.search(r"^ExecStartPre=(.*/create-container .*)$", unit, re.MULTILINE)[1]
    for socket_path in (f"{RUN}/private/{name}.sock", f"{RUN}/public/{name}.sock"):
        for path in (socket_path, socket_path + ".lock"):
            if os.path.lexists(path):
                os.unlink(path)
    run(*shlex.split(line.replace("$$", "$").replace("%%", "%")))


def start_units(*names):
    systemctl("stop", MAIN)

    def start():
        started = subprocess.Popen(["systemctl", "start", f"{MAIN}.service"])
        wait_for(names)
        started.wait()

    return timed(start)


def start_containers(*names):
    systemctl("stop", MAIN)
    for name in names:
        create(name)

    def start():
        for name in names:
            subprocess.Popen(["docker", "start", name], stdout=subprocess.DEVNULL)
        wait_for(names)

    seconds = timed(start)
    run("docker", "rm", "--force", *names)
    systemctl("start", *names)
    return seconds


def restart_one_by_one(*names):
    """
    Seconds that it takes to restart each in turn; what of it was their start-up, as `systemd-analyze blame` counts it; and, for
    each in the same minute, from `docker start` until it answers.
    """
    restart = start_up = floor = 0
    for name in names:
        restart += timed(lambda name=name: systemctl("restart", name))
        start_up += monotonic(name, "ActiveEnter") - monotonic(name, "InactiveExit")
        systemctl("stop", name)
        create(name)
        floor += timed(lambda name=name: (run("docker", "start", name), wait_for([name])))
        run("docker", "rm", "--force", name)
        systemctl("start", name)
    return {"restart": restart, "start_up": start_up, "floor": floor}


def monotonic(name, event):
    """Seconds since the boot at which systemd saw something happen to a unit."""
    shown = ["systemctl", "show", f"--property={event}TimestampMonotonic", "--value", f"{name}.service"]
    return int(subprocess.run(shown, check=True, capture_output=True, text=True).stdout) / 1e6


def restart_with_delay(*names):
    directories = [f"/run/systemd/system/{name}.service.d" for name in names]
    for directory in directories:
        os.makedirs(directory, exist_ok=True)
        with open(f"{directory}/delay.conf", "w") as drop_in:
            drop_in.write("[Service]\nExecStartPre=/bin/sleep 5\n")
    run("systemctl", "daemon-reload")
    seconds = timed(lambda: [systemctl("restart", name) for name in names])
    for directory in directories:
        os.unlink(f"{directory}/delay.conf")
    run("systemctl", "daemon-reload")
    return seconds


def ready_lags(*names):
    """Milliseconds from /health being true to systemd calling the unit active, for each."""
    lags = []
    for name in names:
        systemctl("stop", name)
        starting = subprocess.Popen(["systemctl", "start", f"{name}.service"])
        wait_for([name], interval=0.01)
        healthy = time.monotonic()
        starting.wait()
        lags.append((monotonic(name, "ActiveEnter") - healthy) * 1000)
    return lags


def memory(name):
    """Megabytes of proportional set size: of the container's processes, and of those that serve only it."""
    inspected = json.loads(subprocess.run(["docker", "inspect", name], check=True, capture_output=True).stdout)[0]
    listed = subprocess.run(["docker", "top", name, "-o", "pid"], check=True, capture_output=True, text=True).stdout
    inside = [int(line) for line in listed.split()[1:]]
    outside = [
        int(pid)
        for pid in os.listdir("/proc")
        if pid.isdecimal() and (inspected["Id"] in command_line(pid) or f" --attach {name} " in command_line(pid) + " ")
    ]
    return {"container": megabytes(inside), "overhead": megabytes(outside)}


def command_line(pid):
    try:
        with open(f"/proc/{pid}/cmdline") as file:
            return file.read().replace("\0", " ").strip()
    except OSError:
        return ""


def megabytes(pids):
    total = 0
    for pid in pids:
        with open(f"/proc/{pid}/smaps_rollup") as file:
            total += int(re.search(r"^Pss: +(\d+)", file.read(), re.MULTILINE)[1])
    return total / 1024


def time_command(*command):
    return timed(lambda: run(*command))


OLD_DATA, PRISTINE = "/var/lib/postgresql/15/main", "/var/lib/postgresql/pristine"
NEW_BIN = "/usr/lib/postgresql/18/bin"


def script(text):
    run("bash", "-euo", "pipefail", "-c", text)


# What Synapse writes of a message, roughly in the proportions of a server with large rooms. Text does not compress. The order is
# that of backfilled messages, whose numbers grow downwards and so are in nobody's way.
FILL = """
create temporary table message as select n, '!bench' || n % 500 || ':example.org' as room, '@user' || n % 3000 || ':example.org' as sender,
    '$' || rtrim(translate(encode(sha256(n::text::bytea), 'base64'), '+/', '-_'), '=') as id
  from generate_series((select count(*) from event_json) + 1, {events}) n;
insert into event_json (event_id, room_id, internal_metadata, json, format_version)
  select id, room, '{{}}', (select string_agg(md5(n::text || m::text), '') from generate_series(1, 30) m), 4 from message;
insert into events (topological_ordering, event_id, type, room_id, processed, outlier, depth, origin_server_ts, received_ts, sender,
    contains_url, instance_name, stream_ordering)
  select n, id, 'm.room.message', room, true, false, n, 1600000000000 + n, 1600000000000 + n, sender, n % 20 = 0, 'master', -n
  from message;
insert into event_edges (event_id, prev_event_id, room_id) select id, md5(n::text) || id, room from message;
insert into event_auth select id, md5(n::text) || m, room from message, generate_series(1, 3) m;
insert into event_to_state_groups select id, 1000000000 + n / 10 from message;
insert into state_groups_state select 1000000000 + n / 10, room, 'm.room.member', sender || m, md5(n::text) || m from message, generate_series(1, 2) m;
insert into event_search (event_id, room_id, sender, key, vector, origin_server_ts, stream_ordering)
  select id, room, sender, 'content.body', (select to_tsvector(string_agg('word' || n * m * 31 % 7919, ' ')) from generate_series(1, 12) m),
    1600000000000 + n, -n from message;
select setval('events_backfill_stream_seq', {events} + 1);
"""


def fill(events):
    """Have Synapse's tables hold so many messages."""
    script(
        f"""cd /
        runuser -u postgres -- psql --quiet --cluster 15/main --set ON_ERROR_STOP=1 synapse >/dev/null <<'END'
        {FILL.format(events=int(events))}
END
        runuser -u postgres -- psql --quiet --cluster 15/main synapse --command "vacuum analyze" --command checkpoint"""
    )


def serves():
    connection = http.client.HTTPConnection("127.0.0.1", 8008, timeout=2)
    try:
        connection.request("GET", "/_matrix/client/versions")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def outage(action):
    """Seconds from the last good request before an action's worst gap to the first one after it."""
    good, over = [], threading.Event()

    def ask():
        while not over.is_set():
            if serves():
                good.append(time.monotonic())
            time.sleep(0.02)

    def wait_for_a_good_one():
        begin = time.monotonic()
        while not good or good[-1] < begin:
            time.sleep(0.02)

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    wait_for_a_good_one()
    action()
    wait_for_a_good_one()
    over.set()
    asking.join()
    return max(after - before for before, after in itertools.pairwise(good))


def keep_pristine():
    script(
        f"""systemctl stop {MAIN} postgresql@15-main
        rm -rf {PRISTINE}; cp -a {OLD_DATA} {PRISTINE}; sync
        systemctl start postgresql@15-main {MAIN}"""
    )
    wait_until_all_serve()


def restore_pristine():
    script(
        f"""systemctl stop {MAIN} postgresql@15-main
        for name in main hand; do ! test -d /etc/postgresql/18/$name || pg_dropcluster --stop 18 $name; done
        rm -rf {OLD_DATA}; mv {PRISTINE} {OLD_DATA}
        echo auto >/etc/postgresql/15/main/start.conf
        pg_conftool 15 main set port 5432
        systemctl --quiet enable postgresql@15-main
        echo '{{"cluster": "15/main", "since": "now"}}' >/var/lib/matrix-synapse/postgres.json
        systemctl start postgresql@15-main {MAIN}"""
    )
    wait_until_all_serve()


def wait_until_all_serve():
    wait_for(sorted(name.removesuffix(".sock") for name in os.listdir(f"{RUN}/private") if name.endswith(".sock")))


def upgrade(method):
    if method == "link":
        keep_pristine()
    words = ["salt-call", "--local", "synapse_postgres.upgrade", "version=18", f"method={method}"]
    seconds = outage(lambda: run(*words))
    if method == "link":
        restore_pristine()
    else:
        run("salt-call", "--local", "synapse_postgres.rollback", "confirm=True")
        run("salt-call", "--local", "synapse_postgres.discard_old", "18/main")
    return seconds


# By somebody who knows that pg_ctlcluster goes on waiting for two seconds after the server answers.
START_BY_HAND = (
    "systemctl start --no-block postgresql@18-hand; until pg_isready --quiet --cluster 18/hand; do sleep .05; done"
)


def upgrade_by_hand(method):
    """Stop Synapse and PostgreSQL, run the bare tool, start both: by somebody who types without a pause."""
    if method == "link":
        keep_pristine()
    script(
        """pg_createcluster --port 5440 --start-conf manual --locale C.UTF-8 -o ssl=off 18 hand -- --no-data-checksums >/dev/null
        cp /etc/postgresql/15/main/conf.d/*.conf /etc/postgresql/18/hand/conf.d/
        cp /etc/postgresql/15/main/pg_hba.conf /etc/postgresql/18/hand/"""
    )
    if method == "dump":
        tool = f"""{START_BY_HAND}
        {{ runuser -u postgres -- {NEW_BIN}/pg_dumpall --host /run/postgresql --port 5432 |
          sed '/^CREATE ROLE postgres;$/d' |
          runuser -u postgres -- {NEW_BIN}/psql --no-psqlrc --quiet --host /run/postgresql --port 5440 postgres; }} >/dev/null
        systemctl stop postgresql@15-main
        pg_ctlcluster 18 hand stop"""
    else:
        tool = f"""systemctl stop postgresql@15-main
        runuser -u postgres -- {NEW_BIN}/pg_upgrade --old-bindir /usr/lib/postgresql/15/bin --new-bindir {NEW_BIN} \
          --old-datadir {OLD_DATA} --new-datadir /var/lib/postgresql/18/hand --jobs {os.cpu_count()} \
          --old-options '-c config_file=/etc/postgresql/15/main/postgresql.conf' \
          --new-options '-c config_file=/etc/postgresql/18/hand/postgresql.conf' \
          --socketdir /tmp {"--link" if method == "link" else ""} >/dev/null"""
    seconds = outage(
        lambda: (
            script(
                f"""cd /tmp; systemctl stop {MAIN}
                {tool}
                pg_conftool 18 hand set port 5432
                {START_BY_HAND}
                systemctl start {MAIN}"""
            ),
            wait_until_all_serve(),
        )
    )
    if method == "link":
        restore_pristine()
    else:
        script(f"systemctl stop {MAIN}; pg_dropcluster --stop 18 hand; systemctl start postgresql@15-main {MAIN}")
        wait_until_all_serve()
    return seconds


def connection_to(way):
    """An HTTP connection: to a Unix socket where it begins with a slash, else to HOST:PORT."""
    connection = http.client.HTTPConnection(way if way[0] != "/" else "localhost", timeout=30)
    if way[0] == "/":
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.connect(way)
    return connection


def ask_on(connection, method, path, token, body=None):
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    connection.request(method, path.replace("UNIQUE", os.urandom(8).hex()), body, headers)
    answer = connection.getresponse()
    answer.read()
    assert answer.status == 200, f"{method} {path}: {answer.status}"


def ask_again_and_again(way, seconds, durations, *request):
    connection, end = connection_to(way), time.monotonic() + seconds
    while (begin := time.monotonic()) < end:
        ask_on(connection, *request)
        durations.append((time.monotonic() - begin) * 1000)


def requests(file):
    """
    Milliseconds of a request, and requests per second of eight clients, for each of several requests and ways. The file holds
    {"ways": {NAME: WAY}, "requests": {NAME: [METHOD, PATH, TOKEN, BODY]}}.
    """
    with open(file) as opened:
        given = json.load(opened)
    found = {}
    for request, way in itertools.product(given["requests"], given["ways"]):
        found[f"{request} {way}"] = {"ms": [], "rps": []}
    # All ways in turn, so that each has its share of the machine's good and bad moments.
    for _ in range(5):
        for key in found:
            request, way = key.split()
            arguments = given["requests"][request]
            ask_again_and_again(given["ways"][way], 1.5, found[key]["ms"], *arguments)
            many = [[] for _ in range(8)]
            threads = [
                threading.Thread(target=ask_again_and_again, args=(given["ways"][way], 2, mine, *arguments))
                for mine in many
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            found[key]["rps"].append(sum(map(len, many)) / 2)
    return {
        key: {
            "p50": statistics.median(measured["ms"]),
            "p99": statistics.quantiles(measured["ms"], n=100)[98],
            "rps": statistics.median(measured["rps"]),
        }
        for key, measured in found.items()
    }


def reload_nginx(digest):
    """Seconds until nginx answers with a configuration that has another digest."""
    file = "/etc/nginx/conf.d/matrix-synapse.conf"
    run("sed", "--in-place", f's/return 200 "[0-9a-f]*"/return 200 "{digest}"/', file)
    listed = ["systemctl", "list-units", "--plain", "--no-legend", "synapse-gate@*.socket"]
    shown = subprocess.run(listed, check=True, capture_output=True, text=True).stdout
    gates = [line.split()[0] for line in shown.splitlines()]
    arguments = [f"{RUN}/nginx/status.sock", digest, f"{RUN}/gate", "www-data", *gates]
    return timed(lambda: run("/usr/local/lib/matrix-synapse/load-nginx", *arguments))


PROBES = {
    "requests": requests,
    "reload-nginx": reload_nginx,
    "start-units": start_units,
    "start-containers": start_containers,
    "restart-one-by-one": restart_one_by_one,
    "restart-with-delay": restart_with_delay,
    "ready-lags": ready_lags,
    "memory": memory,
    "time": time_command,
    "fill": fill,
    "upgrade": upgrade,
    "upgrade-by-hand": upgrade_by_hand,
}

if __name__ == "__main__":
    print(json.dumps(PROBES[sys.argv[1]](*sys.argv[2:])))
