"""The local store, beside what it is measured by, with the aims: `python benchmarks/l2/local_store.py [TABLE ...]`.

The tables are `warm`, `cold`, `burst`, `store` and `index`; without arguments, all of them. `warm`, `cold` and `burst`
want PEERS, the directory of the peers' driver, and PEER_PYTHON, the Python of their environment: LMCache's `fs_native`,
bare reads of a file an object (`ref:2`) and of a log (`seg:2`) take turns with ours. `store` compares with the former
store, of a file an object, as the revision FORMER had it; `strace` counts its system calls. Each row says whether it
reached what was aimed at. ROUNDS, 3 by default, is how often all take their turn.
"""

import asyncio
import importlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

HERE = Path(__file__).resolve().parent
OURS, PEER, FILES, LOG = "ours:fs", "lmcache:fs_native", "ref:2", "seg:2"
NAMES = {OURS: "ours", PEER: "LMCache fs_native", FILES: "bare reads", LOG: "bare log"}
FORMER = os.environ.get("FORMER", "6e6d4881^")
ROUNDS = int(os.environ.get("ROUNDS", "3"))
COUNTS = (16, 64, 256)
KIB, MIB = 2**10, 2**20
SIZES = {64 * KIB: 2048, 256 * KIB: 2048, MIB: 512, 4 * MIB: 256}  # and how many there are
OF_PEER = {64 * KIB: 3.0, 256 * KIB: 1.6, MIB: 1.3, 4 * MIB: 1.1}  # times as fast
OF_FILES = {64 * KIB: 1.0, 256 * KIB: 1.0, MIB: 0.85, 4 * MIB: 0.85}
OF_LOG = 0.7
MISS_US = 100
MOST_BYTES = 256 * MIB  # of one call of `store`
STORED_BYTES = 64 * MIB  # by the calls of one turn, but two at least


def table(head, rows):
    print("\n| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    for row in rows:
        print("| " + " | ".join(str(cell) for cell in row) + " |", flush=True)


def show_us(value):
    return f"{value / 1000:.1f} ms" if value >= 1000 else f"{value:.0f} us"


def show_bytes(value):
    return f"{value // MIB} MiB" if value >= MIB else f"{value // KIB} KiB"


def verdict(*reached):
    return "reached" if all(reached) else "not reached"


# Loads, beside the peers.


class Systems:
    """A process for each system, which take turns."""

    def __init__(self, peers, peer_python, l1_bytes, peers_too=(PEER, FILES, LOG)):
        self.workers = {spec: drive(peers).Worker(spec, peer_python) for spec in peers_too}
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
        for spec in sorted(self.workers, reverse=bool(offset // reps % 2)):
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


def drop_from_the_page_cache(directory):
    for path in directory.rglob("*"):
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)


def latency(peers, peer_python, *, cold):
    """From the prefetch to the bytes in memory. The first round warms up, and verifies the contents."""
    systems = Systems(peers, peer_python, 2 * 2**30)
    for size, total in SIZES.items():
        systems.each("populate", size=size, n=total)
    systems.each("populate_l1", size=min(SIZES), n=256)
    os.sync()
    cells = [("l2", size, count) for size in SIZES for count in COUNTS]
    if not cold:
        cells += [("l1_skip", min(SIZES), count) for count in COUNTS]
        cells += [("miss", min(SIZES), count) for count in (*COUNTS, 4096)]
    seconds = {}
    for turn in range(ROUNDS + 1):
        for cell in cells:
            scenario, size, count = cell
            reps = 1 if cold or not turn else 20 if scenario != "l2" else max(1, min(10, 2**26 // (size * count)))
            drop = partial(drop_from_the_page_cache, Path(os.environ["PEER_DATA"])) if cold else lambda: None
            for spec, times in systems.latency(scenario, size, count, reps, SIZES[size], turn * reps, drop).items():
                seconds.setdefault((cell, spec), []).extend(times if turn else ())
        print(f"round {turn} of {ROUNDS}", file=sys.stderr, flush=True)
    systems.close()
    us = {key: statistics.median(times) * 1e6 for key, times in seconds.items()}
    rows = [_latency_row(cell, *(us[cell, spec] for spec in (OURS, PEER, FILES, LOG)), cold=cold) for cell in cells]
    what = "objects" + ", cold page cache" * cold
    head = (what, "number", *NAMES.values(), "LMCache / ours", "bare reads / ours", "bare log / ours", "aims", "")
    table(head, rows)


def _latency_row(cell, ours, peer, files, log, *, cold):
    scenario, size, count = cell
    ratios = peer / ours, files / ours, log / ours
    if scenario == "l2":
        what = f"{show_bytes(size)} from L2"
        aims = (1.0,) if cold else (OF_PEER[size], OF_FILES[size], OF_LOG)
        reached = verdict(*(ratio >= aim for ratio, aim in zip(ratios, aims, strict=False)))
        aims = " / ".join(map(str, aims))
    elif scenario == "miss":
        what, aims = "not cached", f"{MISS_US} us" + ", 1/5 of LMCache's" * (count == 256)
        reached = verdict(ours <= MISS_US, count != 256 or ratios[0] >= 5)
    else:
        what, aims, reached = "in L1", "", ""
    return what, count, *map(show_us, (ours, peer, files, log)), *(f"{ratio:.2f}" for ratio in ratios), aims, reached


def burst(peers, peer_python):
    """Many prefetches at once, of prompts of their own and of one prompt: 16 objects of 256 KiB each."""
    systems = Systems(peers, peer_python, 4 * 2**30, (PEER, FILES))
    systems.each("populate", size=256 * KIB, n=512 * 16)
    os.sync()
    cases = [("1", 1, 512), ("64", 64, 512), ("1000", 1000, 512), ("1000, of one prompt", 1000, 1)]
    ways = [(spec, "burst", {"mode": "poll"}) for spec in systems.workers]
    ways.append((OURS, "extra", {"name": "inside_burst"}))
    answers = {}
    for turn in range(ROUNDS + 1):
        for name, at_once, prompts in cases:
            for spec, command, how in ways:
                what = {"c": at_once, "size": 256 * KIB, "K": 16, "nsets": prompts, "offset": turn * at_once}
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
        has_aim = name == "1000" and system == NAMES[OURS]
        told = ("3 / 0.4", verdict(rate >= 3 * peer_rate, p99 <= 0.4 * peer_p99)) if has_aim else ("", "")
        ratios = f"{rate / peer_rate:.2f}", f"{p99 / peer_p99:.2f}"
        rows.append([name, system, round(rate), f"{p50:.1f}", f"{p99:.1f}", short, max(loads), *ratios, *told])
    head = ("at once", "system", "requests/s", "p50 ms", "p99 ms", "fell short", "objects loaded")
    table((*head, "requests/s / LMCache", "p99 / LMCache", "aims", ""), rows)


# Stores, beside the former store.


async def store_some(size, count, turns):
    """Each `store` of so many objects, in a new directory. It runs with the code of either revision."""
    from async_cache.l2.filesystem import FileSystemBackend
    from async_cache.prompt.keys import ObjectKey

    rng = random.Random(1)
    bodies = [memoryview(bytearray(rng.randbytes(size))) for _ in range(count)]
    seconds = []
    with tempfile.TemporaryDirectory(dir=os.environ.get("PEER_DATA")) as directory:
        backend = FileSystemBackend(directory, capacity_bytes=None)
        await backend.open()
        for _ in range(turns):
            keys = [ObjectKey(rng.randbytes(32), 0, 0) for _ in range(count)]
            began = time.perf_counter()
            assert all(await backend.store(keys, bodies))
            seconds.append(time.perf_counter() - began)
        await backend.close()
    return {"median_s": statistics.median(seconds), "seconds": seconds}


def stored(code, size, count, turns, *wrapped_in):
    """The seconds of each store, by a process with the code of a revision."""
    command = [*wrapped_in, sys.executable, __file__, "store_some", str(size), str(count), str(turns)]
    environment = os.environ | {"PYTHONPATH": str(code)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=600)
    return json.loads(done.stdout)["seconds"]


def calls(code, size, count):
    """How many system calls a store makes: the difference between a few stores and a few more."""
    totals = []
    with tempfile.TemporaryDirectory() as directory:
        for turns in (2, 4):
            out = Path(directory) / "calls"
            stored(code, size, count, turns, "strace", "-f", "-c", "-q", "-U", "calls,name", "-o", str(out))
            lines = [line.split() for line in out.read_text().splitlines()]
            totals.append(
                sum(
                    int(words[0])
                    for words in lines
                    if len(words) == 2 and words[0].isdigit() and words[1] not in ("total", "futex")
                )
            )
    return (totals[1] - totals[0]) / 2


def stores():
    """What a store takes, and how many system calls; the page cache takes it, and the disk's own time is not in it."""
    with tempfile.TemporaryDirectory(prefix="kv-revision-") as former:
        command = ("git", "archive", FORMER, "async_cache")
        archive = subprocess.run(command, cwd=HERE.parents[1], capture_output=True, check=True)
        subprocess.run(["tar", "-x", "-C", former], input=archive.stdout, check=True)
        rows = []
        for size in SIZES:
            for count in COUNTS:
                if size * count > MOST_BYTES:
                    continue
                turns = max(3, min(10, STORED_BYTES // (size * count)))
                ours, theirs = [], []
                for _ in range(ROUNDS):
                    ours += stored(HERE.parents[1], size, count, turns)[1:]
                    theirs += stored(former, size, count, turns)[1:]
                us = [statistics.median(times) * 1e6 for times in (ours, theirs)]
                made = [calls(code, size, count) for code in (HERE.parents[1], former)]
                ratios = us[1] / us[0], made[1] / made[0]
                told = verdict(ratios[0] >= 1, ratios[1] >= 10)
                both = *map(show_us, us), f"{ratios[0]:.2f}", *(f"{n:.0f}" for n in made), f"{ratios[1]:.1f}"
                rows.append((show_bytes(size), count, *both, told))
                print(*rows[-1], file=sys.stderr, flush=True)
    head = (
        "objects",
        "number",
        "a store",
        "of the former store",
        "former / ours",
        "system calls",
        "of the former store",
    )
    table((*head, "former / ours", "aims 1 / 10"), rows)


# The index: memory, recovery and disk.

OBJECTS = 1_000_000


def fill(directory):
    """An index file that a writer left who is dead; nobody reads the bodies."""
    from async_cache.l2.filesystem.format import MARKER, MARKER_LINE, VERSION, Kind, header, index_name, record

    (directory / MARKER).write_bytes(MARKER_LINE % VERSION)
    with (directory / index_name(1, 0)).open("wb") as file:
        file.write(header(1))
        for number in range(OBJECTS):
            which = (number * 0x9E3779B97F4A7C15 % 2**64).to_bytes(8, "little") * 4, 0, 0
            file.write(record(Kind.PUT, which, (1, *divmod(number, 2**15)), 4096, number))


async def recover(directory):
    """A directory is opened: when all is known, what that took of the processor, and how long the loop was held."""
    from async_cache.l2.filesystem import FileSystemBackend

    backend = FileSystemBackend(directory, capacity_bytes=None)
    before, began, cpu = resident_bytes(), time.perf_counter(), time.process_time()
    await backend.open()
    slowest = 0
    while backend.usage().objects < OBJECTS:
        turn = time.thread_time()  # others have the processor, too
        await asyncio.sleep(0)
        slowest = max(slowest, time.thread_time() - turn)
    return {
        "known after, s": (round(time.perf_counter() - began, 2), 3),
        "processor, s": (round(time.process_time() - cpu, 2), 3),
        "loop held at most, ms of the processor": (round(slowest * 1e3, 1), 20),
        "memory, bytes an object": (round((resident_bytes() - before) / OBJECTS), 200),
    }


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


async def churn(size):
    """What the directory takes on the disk, in percent of its bodies, when all was made room for several times."""
    from async_cache.l2.filesystem import FileSystemBackend
    from async_cache.prompt.keys import ObjectKey

    rng, body, most = random.Random(1), memoryview(bytearray(size)), 256 * MIB
    with tempfile.TemporaryDirectory(dir=os.environ.get("PEER_DATA")) as directory:
        backend = FileSystemBackend(directory, capacity_bytes=most)
        await backend.open()
        shares = []
        for turn in range(3 * most // size // 256):
            await backend.store([ObjectKey(rng.randbytes(32), 0, 0) for _ in range(256)], [body] * 256)
            if turn % 16 == 0 and backend.usage().used_bytes > most * 0.9:
                await backend._log.work.idle()  # while an index is written anew, it is there twice
                blocks = sum(entry.stat().st_blocks for entry in os.scandir(directory))
                shares.append((blocks * 512 / backend.usage().used_bytes - 1) * 100)
        await backend.close()
    return round(max(shares), 2)


def index():
    with tempfile.TemporaryDirectory(dir=os.environ.get("PEER_DATA")) as directory:
        alone("fill", directory)
        figures = alone("recover", directory)
    rows = [(what, value, aim, verdict(value <= aim)) for what, (value, aim) in figures.items()]
    for size in (4 * KIB, 16 * KIB, 64 * KIB):
        share = alone("churn", size)
        rows.append((f"disk beyond bodies of {show_bytes(size)}, %, churned", share, 1, verdict(share <= 1)))
    table((f"{OBJECTS:,} objects of one page", "figure", "aim", ""), rows)


def alone(what, *arguments):
    """A figure from a process of its own."""
    command = (sys.executable, __file__, what, *map(str, arguments))
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True, timeout=3600).stdout)


def with_peers(names):
    """The tables that have the peers beside ours."""
    peers, peer_python = os.environ.get("PEERS"), os.environ.get("PEER_PYTHON")
    if not (peers and peer_python):
        print(f"{', '.join(names)}: set PEERS and PEER_PYTHON", file=sys.stderr)
        return
    os.environ["PYTHONPATH"] = os.pathsep.join((str(HERE.parent), os.environ.get("PYTHONPATH", "")))
    given = os.environ.get("PEER_DATA")
    for name in names:
        with tempfile.TemporaryDirectory(dir=given) as directory:
            os.environ["PEER_DATA"] = os.environ["PEER_RESULTS"] = directory
            if name == "burst":
                burst(Path(peers), peer_python)
            else:
                latency(Path(peers), peer_python, cold=name == "cold")


def main(*names):
    chosen = names or ("warm", "cold", "burst", "store", "index")
    if beside := [name for name in chosen if name in ("warm", "cold", "burst")]:
        with_peers(beside)
    if "store" in chosen:
        stores()
    if "index" in chosen:
        index()


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["store_some", *numbers]:
            print(json.dumps(asyncio.run(store_some(*map(int, numbers)))))
        case ["fill", directory]:
            print(json.dumps(fill(Path(directory))))
        case ["recover", directory]:
            print(json.dumps(asyncio.run(recover(directory))), flush=True)
        case ["churn", size]:
            print(json.dumps(asyncio.run(churn(int(size)))))
        case names:
            main(*names)
