#!/usr/bin/env python3
"""
Measures the formula in a disposable host, each figure beside its floor in the same run: bench.py [SECTION ...]

Prints a table, and writes the figures to results.json beside this file; a section updates its own. Times on a shared
machine mean little by themselves, so what has a goal is mostly a ratio.
"""

import json
import re
import statistics
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "host"), str(HERE.parent / "e2e")]

from deployment import Deployment, User, quote  # noqa: E402
from host import Host, progress  # noqa: E402
from load import Load  # noqa: E402

RESULTS = HERE / "results.json"
MAIN = "matrix-synapse"
ROUNDS = 3

# What each figure is, and what it shall be at most.
FIGURES = {
    "start_s": ("start of main and 16 workers until all answer /health, by their units", None),
    "start_floor_s": ("the same containers, all together, by plain docker start", None),
    "start_ratio": ("units over floor", 1.15),
    "rolling_s": ("restart of the 16 workers, one after the other", None),
    "rolling_start_up_s": ("sum of the workers' own start-up times in it, as systemd-analyze blame counts them", None),
    "rolling_floor_s": ("sum of their start-up times by plain docker start", None),
    "rolling_ratio": ("restart over start-up times", 1.15),
    "rolling_over_floor": ("restart over plain docker start", None),
    "rolling_with_delay_s": ("the same with a delay of 5 s in each unit", None),
    "ready_lag_ms": ("from /health being true to systemd calling the unit active, the worst", 250),
    "worker_mb": ("memory of a worker's container, proportional set size", None),
    "worker_overhead_mb": ("memory of what comes on top of it: docker's client and shim", None),
    "ping_s": ("salt-call --local test.ping", None),
    "noop_1_s": ("apply that changes nothing, with 1 worker", None),
    "noop_16_s": ("apply that changes nothing, with 16 workers", None),
    "noop_64_s": ("apply that changes nothing, with 64 workers", None),
    "noop_256_s": ("apply that changes nothing, with 256 workers", None),
    "noop_ratio_16": ("apply with 16 workers over test.ping", 4),
    "noop_ms_per_worker": ("for each further worker, from 16 to 256", 5),
    **{
        f"{request}_{way}_{what}": (f"{request} {about}: {unit}", None)
        for request in ("versions", "sync", "send")
        for way, about in (
            ("unix", "through nginx and a Unix socket"),
            ("tcp", "through nginx, TCP on a Docker network and its name server"),
            ("direct", "of the process itself"),
        )
        for what, unit in (
            ("p50", "milliseconds, median"),
            ("p99", "milliseconds, 99 of 100"),
            ("rps", "requests per second, eight clients"),
        )
    },
    "nginx_added_ms_p50": ("what nginx adds to versions at the median, milliseconds", 0.3),
    "unix_over_tcp_rps": ("requests per second by Unix socket over those by TCP, versions", 1),
    "nginx_reload_256_s": ("reload of nginx with 256 workers, until it answers with the new configuration", 0.5),
    "rolling_sent_requests": ("requests sent during a rolling restart of all processes", None),
    "rolling_failed_requests": ("those of them that failed", 0),
    **{
        f"downtime_{method}_{size}_s": (f"PostgreSQL upgrade by {method}, {about}: seconds without service", None)
        for size, about in (("100m", "100 MB"), ("1g", "1 GB"), ("4g", "4 GB"))
        for method in ("link", "copy", "dump")
    },
    **{
        f"downtime_{method}_{size}_bare_s": (
            f"the same, {about}, by hand: Synapse's stop, the tool, Synapse's start",
            None,
        )
        for size, about in (("100m", "100 MB"), ("1g", "1 GB"), ("4g", "4 GB"))
        for method in ("link", "copy", "dump")
    },
    "downtime_link_4g_over_100m": ("link at 4 GB over link at 100 MB", 1.5),
    "downtime_over_bare_tool": ("downtime over that by hand, the worst of all methods and sizes", 1.2),
    "downtime_dump_over_default_4g": ("dump by hand over the default method, at 4 GB", 3),
}

# Of these the goal is the least, not the most.
AT_LEAST = {"downtime_dump_over_default_4g", "unix_over_tcp_rps"}


class Bench:
    """A host with the formula applied; what is measured runs in it, by probe.py."""

    def __init__(self):
        self.host = Host.up("synapse-bench")
        self.host.write("/srv/pillar/top.sls", "base:\n  '*':\n    - synapse\n")
        self.host.run("install", "-m", "0755", "/srv/formula/test/bench/probe.py", "/usr/local/bin/probe")
        self.host.salt("saltutil.sync_all")

    def apply(self, workers, running=True, **more):
        pillar = {"server_name": "bench.example.org", "workers": workers, "process": {"running": running}, **more}
        self.host.write("/srv/pillar/synapse.sls", json.dumps({"synapse": pillar}))
        states = self.host.salt("state.apply", "synapse").values()
        failed = [f"{state['__id__']}: {state['comment']}" for state in states if state["result"] is False]
        if failed:
            sys.exit("\n".join(failed))

    def one_of_each(self):
        """All processes of the preset running; return their names, main first."""
        progress("applying one-of-each")
        self.apply({"preset": "one-of-each"})
        return self.host.salt("synapse_workers.names")

    def probe(self, *words):
        return json.loads(self.host.run("probe", *words).stdout)


def bench_start(bench):
    names = bench.one_of_each()
    units, floor = [], []
    for number in range(ROUNDS):
        progress(f"start, round {number + 1} of {ROUNDS}")
        units.append(bench.probe("start-units", *names))
        floor.append(bench.probe("start-containers", *names))
    return {
        "start_s": statistics.median(units),
        "start_floor_s": statistics.median(floor),
        "start_ratio": statistics.median(units) / statistics.median(floor),
    }


def bench_rolling(bench):
    workers = bench.one_of_each()[1:]
    rounds = []
    for number in range(ROUNDS):
        progress(f"rolling restart, round {number + 1} of {ROUNDS}")
        rounds.append(bench.probe("restart-one-by-one", *workers))
    progress("rolling restart with a delay of 5 s in each unit")
    return {
        "rolling_s": statistics.median(row["restart"] for row in rounds),
        "rolling_start_up_s": statistics.median(row["start_up"] for row in rounds),
        "rolling_floor_s": statistics.median(row["floor"] for row in rounds),
        "rolling_ratio": statistics.median(row["restart"] / row["start_up"] for row in rounds),
        "rolling_over_floor": statistics.median(row["restart"] / row["floor"] for row in rounds),
        "rolling_with_delay_s": bench.probe("restart-with-delay", *workers),
    }


def bench_ready(bench):
    names = bench.one_of_each()
    progress("readiness")
    return {"ready_lag_ms": max(bench.probe("ready-lags", *names[1:6], names[0]))}


def bench_memory(bench):
    workers = bench.one_of_each()[1:]
    progress("memory")
    found = [bench.probe("memory", name) for name in workers]
    return {
        "worker_mb": statistics.median(row["container"] for row in found),
        "worker_overhead_mb": statistics.median(row["overhead"] for row in found),
    }


def bench_apply(bench):
    found = {}
    for count in (1, 16, 64, 256):
        progress(f"applying {count} workers, which need not run")
        bench.apply({"list": [{"type": "generic", "count": count}]}, running=False)
        found[f"noop_{count}_s"] = statistics.median(
            bench.probe("time", "salt-call", "--local", "state.apply", "synapse") for _ in range(ROUNDS)
        )
        if count == 16:
            pings = [bench.probe("time", "salt-call", "--local", "test.ping") for _ in range(ROUNDS)]
            found["ping_s"] = statistics.median(pings)
    found["noop_ratio_16"] = found["noop_16_s"] / found["ping_s"]
    found["noop_ms_per_worker"] = (found["noop_256_s"] - found["noop_16_s"]) * 1000 / (256 - 16)
    return found


# For clients outside of the host that register, and ask as much as they can.
OPEN = {
    "nginx": {"client": {"listen": ["8008"]}},
    "config": {
        "enable_registration": True,
        "enable_registration_without_verification": True,
        **{name: {"per_second": 10000, "burst_count": 10000} for name in ("rc_message", "rc_registration")},
    },
}
# nginx of the host, in a container on Synapse's network.
TCP_NGINX = """
user root; pid /tmp/tcp.pid; daemon off; worker_processes 2; error_log stderr;
events {{}}
http {{
    resolver 127.0.0.11;
    {configuration}
}}
"""


def by_tcp(configuration, worker):
    """The formula's configuration of nginx, with the worker's TCP port, found by its name, in the place of all sockets."""
    configuration = re.sub(r"^ *listen (?!8008).*\n", "", configuration, flags=re.MULTILINE)
    configuration = configuration.replace("listen 8008;", "listen 8009;")
    passed = f"set $synapse_worker {worker}; proxy_pass http://$synapse_worker:8083;"
    return TCP_NGINX.format(configuration=configuration.replace("proxy_pass http://$synapse_upstream;", passed))


def bench_nginx(bench):
    """What a request costs by nginx and a Unix socket, beside nginx and TCP, and beside the process itself."""
    host, worker = bench.host, f"{MAIN}-worker-0-generic"
    workers = {"list": [{"type": "generic"}, {"type": "stream-writer", "stream": "typing"}]}
    bench.apply(workers, **OPEN)
    # The same process listens at a TCP port besides.
    host.run("cp", f"/etc/matrix-synapse/workers/{worker}.yaml", "/var/tmp/worker.yaml")
    listener = "{port: 8083, bind_addresses: [0.0.0.0], type: http, x_forwarded: true, resources: [{names: [client]}]}"
    host.sh(f"sed -i 's/^worker_listeners:.*/&\\n- {listener}/' /etc/matrix-synapse/workers/{worker}.yaml")
    host.write("/var/tmp/tcp.conf", by_tcp(host.read("/etc/nginx/conf.d/matrix-synapse.conf"), worker))
    host.sh(
        f"""systemctl restart {worker}
        image=$(docker inspect --format '{{{{.Config.Image}}}}' {worker})
        docker run --detach --name tcp-nginx --network matrix-synapse --volume /:/host --user 0 --entrypoint chroot \
          "$image" /host nginx -c /var/tmp/tcp.conf"""
    )
    address = host.run(
        "docker", "inspect", "--format", "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}", "tcp-nginx"
    )
    alice = User(Deployment(host, {}).url, "alice")
    room = quote(alice.room())
    alice.sync()
    given = {
        "ways": {
            "unix": "127.0.0.1:8008",
            "tcp": f"{address.stdout.strip()}:8009",
            "direct": f"/run/matrix-synapse/public/{worker}.sock",
        },
        "requests": {
            "versions": ["GET", "/_matrix/client/versions", None],
            "sync": ["GET", f"/_matrix/client/v3/sync?timeout=0&since={alice.since}", alice.token],
            "send": [
                "PUT",
                f"/_matrix/client/v3/rooms/{room}/send/m.room.message/UNIQUE",
                alice.token,
                '{"msgtype": "m.text", "body": "hello"}',
            ],
        },
    }
    host.write("/var/tmp/requests.json", json.dumps(given), mode="0600")
    progress("requests by three ways")
    measured = bench.probe("requests", "/var/tmp/requests.json")
    host.sh(f"docker rm --force tcp-nginx; mv /var/tmp/worker.yaml /etc/matrix-synapse/workers/{worker}.yaml")
    found = {
        f"{key.replace(' ', '_')}_{what}": value for key, values in measured.items() for what, value in values.items()
    }
    progress("reload of nginx with 256 workers")
    bench.apply({"list": [{"type": "generic", "count": 256}]}, running=False)
    return {
        **found,
        "nginx_added_ms_p50": found["versions_unix_p50"] - found["versions_direct_p50"],
        "unix_over_tcp_rps": found["versions_unix_rps"] / found["versions_tcp_rps"],
        "nginx_reload_256_s": statistics.median(
            bench.probe("reload-nginx", f"{number:064}") for number in range(ROUNDS)
        ),
    }


def bench_requests(bench):
    """Clients that don't stop asking, during a rolling restart of main and all 16 workers."""
    bench.apply({"preset": "one-of-each"}, **OPEN)
    progress("a rolling restart under load")
    with Load(Deployment(bench.host, {})) as load:
        bench.host.salt("synapse_rolling.restart")
    for failure in load.failed:
        print(failure, file=sys.stderr)
    return {"rolling_sent_requests": load.sent, "rolling_failed_requests": len(load.failed)}


# Messages, about 4 kB each with all that Synapse writes of them.
DOWNTIME_MESSAGES = {"100m": 20_000, "1g": 243_000, "4g": 990_000}


def bench_downtime(bench):
    """Each method beside the same done by hand, on tables of Synapse's that grow."""
    workers = {"list": [{"type": "generic"}, {"type": "stream-writer", "stream": "typing"}]}
    # The newer PostgreSQL of the host is built without it.
    bench.apply(workers, postgres={"options": {"ssl": "off", "max_wal_size": "4GB"}})
    bench.host.salt("synapse_postgres.preflight", version=18)
    found = {}
    for size, messages in DOWNTIME_MESSAGES.items():
        progress(f"filling the tables to {size}")
        bench.probe("fill", str(messages))
        # The one without a way back is last.
        for method in ("copy", "dump", "link"):
            rounds = []
            # Each dump of 4 GB takes two minutes.
            for _ in range(1 if (method, size) == ("dump", "4g") else ROUNDS):
                progress(f"upgrade by {method}, {size}")
                rounds.append((bench.probe("upgrade-by-hand", method), bench.probe("upgrade", method)))
            by_hand, ours = map(statistics.median, zip(*rounds, strict=True))
            found |= {f"downtime_{method}_{size}_bare_s": by_hand, f"downtime_{method}_{size}_s": ours}
            print(method, size, rounds, file=sys.stderr)
    ratios = [found[f"downtime_{name}_s"] / found[f"downtime_{name}_bare_s"] for name in _downtimes()]
    return {
        **found,
        "downtime_link_4g_over_100m": found["downtime_link_4g_s"] / found["downtime_link_100m_s"],
        "downtime_over_bare_tool": max(ratios),
        "downtime_dump_over_default_4g": found["downtime_dump_4g_bare_s"] / found["downtime_copy_4g_s"],
    }


def _downtimes():
    return [f"{method}_{size}" for size in DOWNTIME_MESSAGES for method in ("link", "copy", "dump")]


SECTIONS = {
    "start": bench_start,
    "rolling": bench_rolling,
    "ready": bench_ready,
    "memory": bench_memory,
    "apply": bench_apply,
    "nginx": bench_nginx,
    "requests": bench_requests,
    "downtime": bench_downtime,
}


def verdict(name, value, goal):
    if goal is None:
        return ""
    sign, met = (">=", value >= goal) if name in AT_LEAST else ("<=", value <= goal)
    return f"{sign} {goal} {'met' if met else 'MISSED'}"


def table(results):
    rows = [("figure", "value", "goal", "what it is")]
    for name, (about, goal) in FIGURES.items():
        if name in results:
            rows.append((name, f"{results[name]:.2f}", verdict(name, results[name], goal), about))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join(
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]) for row in rows
    )


def main(sections):
    unknown = set(sections) - set(SECTIONS)
    if unknown:
        sys.exit(f"no such section: {', '.join(unknown)}; there are {', '.join(SECTIONS)}")
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    bench = Bench()
    try:
        for section in sections or SECTIONS:
            results.update(SECTIONS[section](bench))
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    finally:
        bench.host.down()
    print(table(results))


if __name__ == "__main__":
    main(sys.argv[1:])
