"""The tables and plots of docs/eviction.md: `python benchmarks/eviction.py [--ragpulse FILE] [--trace FILE ...]`.

Hits in percent of the tokens that the last half of the requests asked for, by policy and capacity, and of what lies
between `lru` and perfect foresight, the share that `prefix` closes: from the least to the most of several seeds. Both
traces of Mooncake are here. RAGPulse's is not: its release (flashserve/RAGPulse, MIT) is taken from a file of JSON
lines with `timestamp` (seconds), `output_length` and `parts`, a list of [kind, id, tokens], whose texts follow each
other in a prompt; equal ids are equal texts. As prefixes: two prompts share a chunk as far as all before it is the
same. `--save DIRECTORY` draws the plots there.
"""

import argparse
import gzip
import json
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from hashlib import blake2b
from pathlib import Path
from statistics import mean

from async_cache.recording.trace import Hint, Trace, TracedHint, TracedRequest, read_trace
from async_cache.replay.foresight import PerfectForesight
from async_cache.replay.plot import plot_hits
from async_cache.replay.run import Clock, replay
from async_cache.replay.sweep import FORESIGHT, Point
from async_cache.retention.policies import NAMES, make_policy
from async_cache.retention.prefix import PrefixPolicy

GIB = 2**30
BYTES_PER_TOKEN = 320 * 1024  # of Llama 3.1 70B in bf16
HERE = Path(__file__).parent / "traces"
MOONCAKE_GIB = 64, 256, 915, 4096
RAGPULSE_GIB = 2, 4, 8, 16
RAGPULSE_CHUNK_TOKENS = 256


def ragpulse(path: Path) -> Trace:
    """Requests whose parts follow each other, cut into chunks: each stands for its parts and all before it."""
    with gzip.open(path, "rt") as file:
        rows = [json.loads(line) for line in file]
    begin = min(row["timestamp"] for row in rows)
    requests = []
    for row in rows:
        path_of, parent, left, pieces = [], b"", RAGPULSE_CHUNK_TOKENS, []
        for kind, part, tokens in row["parts"]:
            at = 0
            while at < tokens:
                taken = min(left, tokens - at)
                pieces.append((kind, part, at, taken))
                at, left = at + taken, left - taken
                if not left:
                    parent = blake2b(parent + repr(pieces).encode(), digest_size=32).digest()
                    path_of.append(parent)
                    left, pieces = RAGPULSE_CHUNK_TOKENS, []
        total = sum(tokens for _, _, tokens in row["parts"])
        at_seconds = float(row["timestamp"] - begin)
        requests.append(TracedRequest(at_seconds, total, row["output_length"], path_of, RAGPULSE_CHUNK_TOKENS))
    return Trace(sorted(requests, key=lambda request: request.at_seconds))


@cache
def trace_of(path: Path) -> Trace:
    return ragpulse(path) if "ragpulse" in path.name else read_trace(path)


def found(cell, outputs, ends):
    """One replay; with `ends`, the policy is told truthfully which requests nobody goes on from."""
    path, policy_name, gib, seed = cell
    trace, clock = trace_of(path), Clock()
    if policy_name == FORESIGHT:
        policy = PerfectForesight(trace)
    else:
        policy = PrefixPolicy(clock, seed) if policy_name == "prefix" else make_policy(policy_name, clock)
    if ends:
        trace = Trace(trace.requests, ends_of(trace))
    half = len(trace.requests) // 2
    return cell, replay(trace, gib * GIB, BYTES_PER_TOKEN, policy, clock, measured_from=half, outputs=outputs)


def ends_of(trace: Trace) -> list[TracedHint]:
    """Of each request whose last whole chunk nobody asks for later: its session has ended."""
    last_use = {chunk: number for number, request in enumerate(trace.requests) for chunk in request.path}
    hints = []
    for number, request in enumerate(trace.requests):
        whole = request.path[: request.tokens // request.chunk_tokens]
        if whole and last_use[whole[-1]] == number:
            of = request.at_seconds, request.tokens, request.path, request.chunk_tokens
            hints.append(TracedHint(*of, Hint(returns=False)))
    return hints


def table(title: str, cells: dict, sizes, policies, seeds: int) -> None:
    """Hits by policy and capacity, and the share that each seed of `prefix` closes."""
    print(f"\n{title}\n\n| | " + " | ".join(f"{gib:,} GiB" for gib in sizes) + " |\n" + "|---" * (len(sizes) + 1) + "|")
    rates = {cell[1:]: 100 * of.hit_rate for cell, of in cells.items()}
    for name in policies:
        of_seeds = [[rates[name, gib, seed] for seed in seeds_of(name, seeds)] for gib in sizes]
        print(f"| `{name}` | " + " | ".join(f"{mean(of):.1f}" for of in of_seeds) + " |")
    if {"lru", "prefix", FORESIGHT} <= set(policies):
        shares = []
        for gib in sizes:
            least, most = rates["lru", gib, 0], rates[FORESIGHT, gib, 0]
            own = sorted(100 * (rates["prefix", gib, seed] - least) / (most - least) for seed in range(seeds))
            shares.append(f"{mean(own):.0f} % ({own[0]:.0f} to {own[-1]:.0f})")
        print("| share of the gap | " + " | ".join(shares) + " |", flush=True)


def seeds_of(policy: str, seeds: int) -> range:
    """Only `prefix` throws dice."""
    return range(seeds if policy == "prefix" else 1)


def main() -> None:
    parser = argparse.ArgumentParser(description="The tables and plots of docs/eviction.md.")
    parser.add_argument("--ragpulse", type=Path, help="RAGPulse's requests, as JSON lines with gzip")
    parser.add_argument("--trace", type=Path, action="append", default=[], help="another trace, at the same sizes")
    parser.add_argument("--only", help="part of the names of traces to take")
    parser.add_argument("--policies", default=",".join((*NAMES, FORESIGHT)))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--no-outputs", action="store_true", help="tell nothing of outputs")
    parser.add_argument("--ends", action="store_true", help="tell truthfully when a session has ended")
    parser.add_argument("--save", type=Path, help="the directory to draw plots into")
    arguments = parser.parse_args()
    policies = sorted(arguments.policies.split(","), key=[*NAMES, FORESIGHT].index)
    paths = {HERE / f"mooncake_{name}_trace.jsonl.gz": MOONCAKE_GIB for name in ("conversation", "synthetic")}
    paths |= dict.fromkeys(arguments.trace, MOONCAKE_GIB)
    paths |= {arguments.ragpulse: RAGPULSE_GIB} if arguments.ragpulse else {}
    run = partial(found, outputs=not arguments.no_outputs, ends=arguments.ends)
    with ProcessPoolExecutor(arguments.jobs) as pool:
        for path, sizes in paths.items():
            if arguments.only and arguments.only not in path.name:
                continue
            names = [(name, seed) for name in policies for seed in seeds_of(name, arguments.seeds)]
            cells = dict(pool.map(run, [(path, name, gib, seed) for name, seed in names for gib in sizes]))
            table(path.name, cells, sizes, policies, arguments.seeds)
            if arguments.save is not None:
                points = [Point(name, gib * GIB, of) for (_, name, gib, seed), of in cells.items() if not seed]
                name = path.name.partition(".")[0]
                plot_hits(points, arguments.save / f"hits_{name}.svg", name.replace("_", " "))


if __name__ == "__main__":
    main()
