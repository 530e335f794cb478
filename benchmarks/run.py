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
import tempfile
from pathlib import Path

from l2 import local_store

HERE = Path(__file__).parent
TURNS = 3


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
    mine = medians(ours, "objects", ("known_us", "between_us", "loaded_us"))
    peer = medians(theirs, "K", ("lookup_phase_in_controller_us", "full_prefetch_us"))
    head = ["objects of 1 MiB in L2", "hits known", "between loads", "bytes in memory"]
    rows = [[count, *map(microseconds, row.values())] for count, row in mine.items()]
    if peer:
        head += ["LMCache's lookup ends", "LMCache's caller hears of it", "known earlier than by its caller"]
        for row in rows:
            lookup, caller = peer[row[0]].values()
            row += [microseconds(lookup), microseconds(caller), f"{caller / mine[row[0]]['between_us']:.0f} x"]
    table(head, rows)


def index():
    """A million chunks, and a restart."""
    found = run(sys.executable, HERE / "index.py")
    columns = {
        "lookup_and_lease_ns": "look up and lease, ns a chunk",
        "release_ns": "release, ns",
        "instructions": "instructions a chunk for both",
        "bytes": "bytes a chunk, both indices",
        "collection_ms": "garbage collection, ms",
    }
    rows = [[f"{row['chunks']:,}", *(row.get(name, "") for name in columns)] for row in found["index"]]
    table(("chunks in the index", *columns.values()), rows)
    restart = found["restart"]
    table(restart, [restart.values()])


def service(peers, peer_python):
    """The server, from another process; beside it the peer's own server, in turns."""
    ours, theirs = [], []
    for _ in range(TURNS):
        ours.append(run(sys.executable, HERE / "server.py"))
        if peers:
            rows = run(peer_python, peers / "e_server.py", "best")["runs"][0]["rows"]
            theirs.append({(row["op"], row.get("mode"), row.get("chunks")): row for row in rows})

    def mine(take):
        return statistics.median(take(rows) for rows in ours)

    def peer(figure, op, mode=None, chunks=None):
        return statistics.median(rows[op, mode, chunks][figure] for rows in theirs) if theirs else None

    rows = []

    def add(what, value, other, show=microseconds, aim="", *, is_rate=False):
        ratio = (value / other if is_rate else other / value) if other else None
        rows.append((what, show(value), show(other) if other else "", f"{ratio:.1f}" if other else "", aim))

    noop = peer("p50_us", "noop (SYNC handler) sequential")
    add("ping (its noop)", mine(lambda r: r["ping"]["p50_us"]), noop, aim="2")
    for n, count in enumerate((16, 128, 512)):
        wait = peer("p50_us", "lookup->count, all L1-resident", "wait", count)
        add(f"hit count, {count} chunks in L1", mine(lambda r, n=n: r["l1"][n]["p50_us"]), wait, aim="4")
    for n, count in enumerate((16, 128, 512)):
        wait = peer("p50_us", "lookup->count, all in L2 (page cache)", "wait", count)
        add(f"hit count, {count} chunks in L2", mine(lambda r, n=n: r["l2"][n]["p50_us"]), wait, aim="8")
    for n, count in enumerate((16, 128, 512)):
        wait = peer("p50_us", "lookup->count, all in L2 (page cache)", "wait", count)
        add(f"bytes in memory, {count} chunks from L2", mine(lambda r, n=n: r["l2"][n]["loaded_p50_us"]), wait)
    for n, depth in enumerate((8, 64)):
        rate = peer("req_per_s", f"lookup+wait+free+end, 16 chunks L1-resident, depth {depth}")
        value = mine(lambda r, n=n: r["whole"][n]["req_per_s"])
        add(
            f"whole requests a second, {depth} at a time",
            value,
            rate,
            lambda rate: f"{rate:,.0f}",
            aim="8" * (depth == 64),
            is_rate=True,
        )
    table(("from another process", "ours", "LMCache's server", "ratio", "aim"), rows)
    table(
        ("alone", "figure", "aim"),
        [
            ("ping, idle", microseconds(mine(lambda r: r["ping_idle"]["p50_us"])), ""),
            (
                "ping, while 100 status calls wait",
                microseconds(mine(lambda r: r["ping_waiting"]["p50_us"])),
                "2 x idle",
            ),
            (
                "1,000 connections, one prefetch each: median",
                microseconds(mine(lambda r: r["connections"]["p50_us"])),
                "",
            ),
            ("... 99th percentile", microseconds(mine(lambda r: r["connections"]["p99_us"])), "10 x the median"),
            ("... memory of a connection", f"{mine(lambda r: r['connections']['kib_each']):.0f} KiB", "64 KiB"),
            ("storing 64 MiB, of memcpy's speed", f"{mine(lambda r: r['storing']['store_of_memcpy']):.2f}", "0.5"),
            ("... that are in place", f"{mine(lambda r: r['storing']['commit_of_memcpy']):.2f}", ""),
            ("ready to serve", f"{mine(lambda r: r['idle']['ready_s']):.2f} s", "1.5 s"),
            ("resident beside the arena", f"{mine(lambda r: r['idle']['rss_mib_beyond_l1']):.0f} MiB", "120 MiB"),
        ],
    )


def main():
    peers, peer_python = os.environ.get("PEERS"), os.environ.get("PEER_PYTHON")
    hashing()
    index()
    hits(Path(peers) if peers else None, peer_python)
    with tempfile.TemporaryDirectory() as directory:
        os.environ["PEER_DATA"] = os.environ["PEER_RESULTS"] = directory
        service(Path(peers) if peers else None, peer_python)
    local_store.main()


if __name__ == "__main__":
    main()
