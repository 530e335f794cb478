"""Runs the benchmarks and prints tables in Markdown: `make bench`.

Alone, it measures this project. With PEERS set to a directory that holds the peers' driver (`drive.py`, `c_lookup.py`)
and PEER_PYTHON to the Python of their environment, every system is measured in the same run, taking turns, and the
ratios are printed beside the figures. Compare what stands in one table, and nothing else: machines are noisy.
"""

import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

HERE = Path(__file__).parent
TURNS = 3
OURS, PEER, FLOOR = "ours:fs", "lmcache:fs_native", "ref:2"
NAMES = {OURS: "ours", PEER: "LMCache fs_native", FLOOR: "bare reads"}
COUNTS = (16, 64, 256)


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


class Systems:
    """A process for each system, which take turns."""

    def __init__(self, peers, peer_python, l1_bytes):
        self.workers = {spec: drive(peers).Worker(spec, peer_python) for spec in (PEER, FLOOR)}
        self.workers[OURS] = drive(peers).Worker(OURS, sys.executable)
        for worker in self.workers.values():
            worker.call("open", l1_bytes=l1_bytes)

    def each(self, cmd, **arguments):
        return {spec: worker.call(cmd, **arguments) for spec, worker in self.workers.items()}

    def close(self):
        for worker in self.workers.values():
            worker.close()

    def latency(self, scenario, size, count, reps, total, offset, chill):
        """Seconds to the result: ours inside the loop, the others as their interface has it."""
        seconds = {}
        for spec in (PEER, FLOOR, OURS) if offset // reps % 2 else (OURS, FLOOR, PEER):
            chill()
            if spec == OURS:
                label = scenario.removesuffix("_skip")
                what = {"label": label, "count": count, "total": 256 if label == "l1" else total}
                answer = self.workers[spec].call("extra", name="inside", size=size, reps=reps, offset=offset, **what)
                seconds[spec] = answer["loaded"]
            else:
                what = {"scenario": scenario, "K": count, "n": total, "mode": "wait", "verify": offset == 0}
                answer = self.workers[spec].call("latency", size=size, reps=reps, offset=offset, **what)
                assert answer["verified"], spec
                seconds[spec] = answer["total"]
        return seconds


def drive(peers):
    """The peers' driver, as a module."""
    if str(peers) not in sys.path:
        sys.path.insert(0, str(peers))
    return importlib.import_module("drive")


def chill(directory, size):
    """Drop the objects of about this size from the page cache."""
    for path in directory.rglob("*"):
        if path.is_file() and size <= path.stat().st_size < 2 * size:
            fd = os.open(path, os.O_RDONLY)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)


def latency(peers, peer_python, rounds, *, cold):
    """Submit -> result. The first round warms up, and verifies the contents."""
    systems = Systems(peers, peer_python, 2 * 2**30)
    sizes = {64 * 2**10: 2048, 256 * 2**10: 2048, 2**20: 512, 4 * 2**20: 256}  # and how many there are
    for size, total in sizes.items():
        systems.each("populate", size=size, n=total)
    systems.each("populate_l1", size=min(sizes), n=256)
    os.sync()
    cells = [("l2", size, count) for size in sizes for count in COUNTS]
    if not cold:
        cells += [(scenario, min(sizes), count) for scenario in ("l1_skip", "miss") for count in COUNTS]
    seconds = {}
    for turn in range(rounds + 1):
        for cell in cells:
            scenario, size, count = cell
            reps = 1 if cold or not turn else 20 if scenario != "l2" else max(1, min(10, 2**26 // (size * count)))
            dropped = partial(chill, Path(os.environ["PEER_DATA"]), size) if cold else lambda: None
            for spec, times in systems.latency(scenario, size, count, reps, sizes[size], turn * reps, dropped).items():
                seconds.setdefault((cell, spec), []).extend(times if turn else ())
    systems.close()
    us = {key: statistics.median(times) * 1e6 for key, times in seconds.items()}
    names = {"l2": "{} from L2", "l1_skip": "in L1", "miss": "not cached"}
    rows = []
    for cell in cells:
        ours, peer, floor = (us[cell, spec] for spec in (OURS, PEER, FLOOR))
        what = names[cell[0]].format(f"{cell[1] >> 20} MiB" if cell[1] >> 20 else f"{cell[1] >> 10} KiB")
        ratios = (f"{peer / ours:.2f}", f"{floor / ours:.2f}")
        rows.append([what, cell[2], *map(microseconds, (ours, peer, floor)), *ratios])
    head = ("objects" + ", cold page cache" * cold, "number", "ours", "LMCache fs_native", "bare reads, 2 threads")
    table((*head, "LMCache / ours", "bare / ours"), rows)


def burst(peers, peer_python, rounds):
    """Many prefetches at once, of prompts of their own and of one prompt: 16 objects of 256 KiB each."""
    systems = Systems(peers, peer_python, 4 * 2**30)
    systems.each("populate", size=2**18, n=512 * 16)
    os.sync()
    cases = [("1", 1, 512), ("64", 64, 512), ("1000", 1000, 512), ("1000, of one prompt", 1000, 1)]
    ways = [(spec, "burst", {"mode": "poll"}) for spec in systems.workers]
    ways.append((OURS, "extra", {"name": "inside_burst"}))
    answers = {}
    for turn in range(rounds + 1):
        for name, at_once, prompts in cases:
            for spec, command, how in ways:
                what = {"c": at_once, "size": 2**18, "K": 16, "nsets": prompts, "offset": turn * at_once}
                answer = systems.workers[spec].call(command, **what, **how)
                print(f"{name}: {spec} {command} {answer['wall']:.1f} s", file=sys.stderr, flush=True)
                if turn:
                    system = NAMES[spec] + ", inside the loop" * (command == "extra")
                    answers.setdefault((name, system), []).append(answer)
    systems.close()
    rows = []
    for (name, system), some in answers.items():
        figures = [(a["n"] / a["wall"], a["p50"] * 1e3, a["p99"] * 1e3) for a in some]
        rate, p50, p99 = map(statistics.median, zip(*figures, strict=True))
        if system == NAMES[PEER]:
            peer_rate, peer_p99 = rate, p99
        short, loads = sum(a["short"] for a in some), {a.get("loads", "") for a in some}
        ratios = (f"{rate / peer_rate:.2f}", f"{p99 / peer_p99:.2f}")
        rows.append([name, system, round(rate), f"{p50:.1f}", f"{p99:.1f}", short, max(loads), *ratios])
    head = ("at once", "system", "requests/s", "p50 ms", "p99 ms", "fell short", "objects loaded")
    table((*head, "requests/s / LMCache", "p99 / LMCache"), rows)


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
    rounds = int(os.environ.get("ROUNDS", "3"))
    hashing()
    index()
    hits(Path(peers) if peers else None, peer_python)
    with tempfile.TemporaryDirectory() as directory:
        os.environ["PEER_DATA"] = os.environ["PEER_RESULTS"] = directory
        service(Path(peers) if peers else None, peer_python)
        if peers:
            os.environ["PYTHONPATH"] = str(HERE)
            latency(Path(peers), peer_python, rounds, cold=False)
            latency(Path(peers), peer_python, rounds, cold=True)
            burst(Path(peers), peer_python, rounds)


if __name__ == "__main__":
    main()
