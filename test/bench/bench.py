#!/usr/bin/env python3
"""
Measures the formula in a disposable host, each figure beside its floor in the same run: bench.py [SECTION ...]

Prints a table, and writes the figures to results.json beside this file; a section updates its own. Times on a shared
machine mean little by themselves, so what has a goal is mostly a ratio.
"""

import json
import statistics
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "host"))

from host import Host, progress  # noqa: E402

RESULTS = HERE / "results.json"
MAIN = "matrix-synapse"
ROUNDS = 3

# What each figure is, and what it shall be at most.
FIGURES = {
    "start_s": ("start of main and 16 workers until all answer /health, by their units", None),
    "start_floor_s": ("the same containers, all together, by plain docker start", None),
    "start_ratio": ("units over floor", 1.15),
    "rolling_s": ("restart of the 16 workers, one after the other", None),
    "rolling_floor_s": ("sum of the workers' own start-up times", None),
    "rolling_ratio": ("restart over start-up times", 1.15),
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
}


class Bench:
    """A host with the formula applied; what is measured runs in it, by probe.py."""

    def __init__(self):
        self.host = Host.up("synapse-bench")
        self.host.write("/srv/pillar/top.sls", "base:\n  '*':\n    - synapse\n")
        self.host.run("install", "-m", "0755", "/srv/formula/test/bench/probe.py", "/usr/local/bin/probe")
        self.host.salt("saltutil.sync_all")

    def apply(self, workers, running=True):
        pillar = {"server_name": "bench.example.org", "workers": workers, "process": {"running": running}}
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
        "rolling_floor_s": statistics.median(row["start_up"] for row in rounds),
        "rolling_ratio": statistics.median(row["restart"] / row["start_up"] for row in rounds),
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


SECTIONS = {
    "start": bench_start,
    "rolling": bench_rolling,
    "ready": bench_ready,
    "memory": bench_memory,
    "apply": bench_apply,
}


def table(results):
    rows = [("figure", "value", "goal", "what it is")]
    for name, (about, goal) in FIGURES.items():
        if name in results:
            verdict = "" if goal is None else f"<= {goal} {'met' if results[name] <= goal else 'MISSED'}"
            rows.append((name, f"{results[name]:.2f}", verdict, about))
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
