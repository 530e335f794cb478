"""What a policy costs: `python benchmarks/policies.py [--policies NAMES] [CHUNKS ...]`; microseconds and bytes.

Sessions whose prompts grow by some chunks a turn, most of which end after a few; a tier of so many chunks. A use is all
that is told of a chunk on a path: that it was asked for, that it came, that it was used at the end of its lease. A
victim is one that is asked for, and left. Learning is counted where it happens. The policies take turns. `ms at once`:
the longest that one request, or one victim, has taken, in time of the processor.
"""

import argparse
import time
import tracemalloc
from collections.abc import Callable
from hashlib import blake2b
from random import Random
from typing import Any
from unittest.mock import patch

from msgspec import Struct

from async_cache.retention.policies import NAMES, make_policy
from async_cache.values import Removal

SIZES = (10_000, 100_000, 300_000)
TURN_CHUNKS, SESSIONS, AT_ONCE = 12, 64, 16
ROUNDS = 3


class Item(Struct, gc=False, eq=False):
    """What the index of a tier has of a chunk, as far as a policy needs it."""

    chunk_hash: bytes
    older: Any = None
    newer: Any = None
    node: Any = None


class Tier:
    """A policy, and the chunks that it knows."""

    def __init__(self, name: str, chunks: int):
        self.now = self.latest = 0.0
        self.policy = make_policy(name, lambda: self.now)
        self.chunks = chunks
        self.items: dict[bytes, Item] = {}
        self.random = Random(0)
        self.sessions: list[list[bytes]] = []
        self.seconds = {"use": 0.0, "victim": 0.0}
        self.counts = {"use": 0, "victim": 0}

    def turns(self) -> None:
        """Some requests: sessions go on, or begin. The clock is asked for all together: that may take long, too."""
        requests = [self._next() for _ in range(AT_ONCE)]
        missing = {chunk_hash for _, path, _ in requests for chunk_hash in path} - self.items.keys()
        began = time.process_time()
        self._make_room(len(missing))
        between = time.process_time()
        for self.now, path, output_tokens in requests:
            self._serve(path, output_tokens)
        self.seconds["victim"] += between - began
        self.seconds["use"] += time.process_time() - between

    def _next(self) -> tuple[float, list[bytes], int]:
        random = self.random
        self.latest += random.random()
        if len(self.sessions) < SESSIONS:
            self.sessions.append([])
        number = random.randrange(len(self.sessions))
        path = self.sessions[number]
        path += [blake2b(random.randbytes(16)).digest()[:32] for _ in range(random.randrange(1, 2 * TURN_CHUNKS))]
        if random.random() < 0.2:
            del self.sessions[number]
        return self.latest, list(path), random.randrange(1000)

    def _serve(self, path: list[bytes], output_tokens: int) -> None:
        policy, items = self.policy, self.items
        policy.asked(path, len(path) * 256, 256, output_tokens)
        before = None
        for chunk_hash in path:
            item = items.get(chunk_hash)
            if item is None:
                item = items[chunk_hash] = Item(chunk_hash)
                policy.enter(item, before, kept=True)
            before = item
        policy.use_all(map(items.__getitem__, reversed(path)))
        self.counts["use"] += len(path)

    def _make_room(self, count: int) -> None:
        while len(self.items) + count > self.chunks and self.items:
            self._evict()

    def _evict(self) -> None:
        victim = next(self.policy.victims())
        del self.items[victim.chunk_hash]
        self.policy.left(victim, Removal.CAPACITY)
        self.counts["victim"] += 1

    def fill(self) -> None:
        """Have the tier be full."""
        while not self.counts["victim"]:
            self.turns()

    def run(self, uses: int) -> None:
        """Have so many chunks be used."""
        until = self.counts["use"] + uses
        while self.counts["use"] < until:
            self.turns()

    def costs(self) -> dict[str, float]:
        """Microseconds of each since it was asked last."""
        told = {what: 1e6 * self.seconds[what] / max(self.counts[what], 1) for what in self.seconds}
        self.seconds, self.counts = dict.fromkeys(self.seconds, 0.0), dict.fromkeys(self.counts, 0)
        return told


def longest_ms(tier: Tier, uses: int) -> float:
    """The longest of so many uses that one request, or one victim, takes. Asking for the time is no part of it."""
    longest = 0.0

    def timed(step: Callable[..., None]) -> Callable[..., None]:
        def run(*arguments: Any) -> None:
            nonlocal longest
            began = time.thread_time()
            step(*arguments)
            longest = max(longest, time.thread_time() - began)

        return run

    with patch.multiple(tier, _serve=timed(tier._serve), _evict=timed(tier._evict)):
        tier.run(uses)
    return 1000 * longest


def held_bytes(name: str, chunks: int) -> float:
    """What a policy holds for each chunk that is there, with what it remembers, beside the items themselves."""
    tracemalloc.start()
    tier = Tier(name, chunks)
    tier.fill()
    tier.run(2 * chunks)
    total = tracemalloc.take_snapshot().filter_traces([tracemalloc.Filter(True, "*/retention/*")])
    tracemalloc.stop()
    return sum(stat.size for stat in total.statistics("filename")) / chunks


def main() -> None:
    """Print a row for each size and policy."""
    parser = argparse.ArgumentParser(description="What a policy costs.")
    parser.add_argument("sizes", metavar="CHUNKS", type=int, nargs="*", default=SIZES)
    parser.add_argument("--policies", default="lru,prefix", help=f"of {', '.join(NAMES)}")
    arguments = parser.parse_args()
    policies = arguments.policies.split(",")
    print(
        f"{'chunks':>9}  {'policy':7}  {'us a use':>9}  {'us a victim':>11}  {'ms at once':>10}  {'bytes a chunk':>13}"
    )
    for chunks in arguments.sizes:
        tiers = {name: Tier(name, chunks) for name in policies}
        for tier in tiers.values():
            tier.fill()
            tier.costs()
        rounds: dict[str, list[dict[str, float]]] = {name: [] for name in policies}
        for _ in range(ROUNDS):
            for name, tier in tiers.items():
                tier.run(max(chunks // 20, 20_000))
                rounds[name].append(tier.costs())
        for name, costs in rounds.items():
            use, victim = (sorted(cost[what] for cost in costs)[ROUNDS // 2] for what in ("use", "victim"))
            longest = longest_ms(tiers.pop(name), 20_000)
            held = held_bytes(name, min(chunks, 50_000))
            row = f"{chunks:>9,}  {name:7}  {use:9.2f}  {victim:11.2f}  {longest:10.2f}  {held:13.0f}"
            print(row, flush=True)


if __name__ == "__main__":
    main()
