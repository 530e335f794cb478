"""Runs the benchmarks and prints tables in Markdown: `make bench`.

Alone, it measures this project. With PEERS set to a directory that holds the peers' driver (`drive.py`, `c_lookup.py`)
and PEER_PYTHON to the Python of their environment, every system is measured in the same run, taking turns, and the
ratios are printed beside the figures. Compare what stands in one table, and nothing else: machines are noisy.
"""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
TURNS = 3
OURS, PEER, FLOOR = "ours:fs", "lmcache:fs_native", "ref:2"
SIZES = {65536: "64 KiB", 262144: "256 KiB", 2**20: "1 MiB", 4 * 2**20: "4 MiB"}


def run(*command, **environment):
    """What a command prints, as JSON."""
    done = subprocess.run(command, stdout=subprocess.PIPE, env={**os.environ, **environment}, check=True, timeout=3600)
    return json.loads(done.stdout)


def table(head, rows):
    print("\n| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    for row in rows:
        print("| " + " | ".join(str(cell) for cell in row) + " |", flush=True)


def microseconds(value):
    return f"{value / 1000:.1f} ms" if value >= 1000 else f"{value:.0f} us"


def medians(runs, key, figures):
    """Over several runs of one script, the median of each figure, by the row's key."""
    rows = {}
    for row in (row for rows_of_run in runs for row in rows_of_run):
        rows.setdefault(row[key], []).append(row)
    return {k: {f: statistics.median(row[f] for row in same) for f in figures} for k, same in rows.items()}


def hashing():
    rows = run(sys.executable, HERE / "hashing.py")
    table(("hashing 131,072 tokens from", "million tokens/s"), [row.values() for row in rows])


def hits(peers, peer_python):
    """When the hits are known; beside it, when the peer's lookup knows them, and when its caller hears of them."""
    ours, theirs = [], []
    for _ in range(TURNS):
        ours.append(run(sys.executable, HERE / "hits.py"))
        if peers:
            rows = run(peer_python, peers / "c_lookup.py", C_ROUNDS="4")["rows"]
            theirs.append([row for row in rows if row["adapter"] == "fs_native" and row["keys"] == "l2"])
    mine = medians(ours, "objects", ("known_us", "loaded_us", "resident_us"))
    peer = medians(theirs, "K", ("lookup_phase_in_controller_us", "full_prefetch_us"))
    head = ["objects of 1 MiB in L2", "hits known", "bytes in memory", "all in L1"]
    rows = [[count, *map(microseconds, row.values())] for count, row in mine.items()]
    if peer:
        head += ["LMCache's lookup ends", "LMCache's caller hears of it", "known earlier than by its caller"]
        for row in rows:
            lookup, caller = peer[row[0]].values()
            row += [microseconds(lookup), microseconds(caller), f"{caller / mine[row[0]]['known_us']:.0f} x"]
    table(head, rows)


def latency(peers, peer_python, rounds):
    """Submit -> result, seen by a caller in another thread."""
    systems = f"{PEER},{FLOOR},{OURS}"
    drive = (peer_python, peers / "drive.py", "latency", "--systems", systems, "--rounds", str(rounds))
    found = run(*drive, PY_OURS=sys.executable, PYTHONPATH=str(HERE))
    cells = {(r["scenario"], r["size"], r["K"], r["mode"], r["system"]): r["total_us"] for r in found["rows"]}
    rows = []
    for scenario, size, count, mode, system in sorted(cells):
        if system == OURS and mode == "wait" and scenario in ("l2", "l1_skip", "miss"):
            us = {s: cells[scenario, size, count, mode, s] for s in (OURS, PEER, FLOOR)}
            what = {"l2": f"{SIZES[size]} from L2", "l1_skip": "in L1", "miss": "not cached"}[scenario]
            rows.append([what, count, *map(microseconds, us.values()), f"{us[PEER] / us[OURS]:.2f}"])
    table(("objects", "number", "ours", "LMCache fs_native", "bare reads, 2 threads", "LMCache / ours"), rows)


def burst(peers, peer_python, rounds):
    """Many prefetches at once."""
    drive = (peer_python, peers / "drive.py", "burst", "--systems", f"{PEER},{FLOOR},{OURS}", "--rounds", str(rounds))
    options = ("--modes", "poll", "--conc", "1,64,1000", "--l1", str(4 * 2**30))
    found = run(*drive, *options, PY_OURS=sys.executable, PYTHONPATH=str(HERE))
    rows = [
        [r["conc"], r["system"], round(r["req_per_s"]), r["p50_ms"], r["p99_ms"], r["short"]]
        for r in sorted(found["rows"], key=lambda r: (r["conc"], r["system"]))
    ]
    table(("at once, 16 x 256 KiB each", "system", "requests/s", "p50 ms", "p99 ms", "fell short"), rows)


def main():
    peers, peer_python = os.environ.get("PEERS"), os.environ.get("PEER_PYTHON")
    rounds = int(os.environ.get("ROUNDS", "3"))
    hashing()
    hits(Path(peers) if peers else None, peer_python)
    if peers:
        latency(Path(peers), peer_python, rounds)
        burst(Path(peers), peer_python, rounds)


if __name__ == "__main__":
    main()
