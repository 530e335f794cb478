"""How large each tier must be, and what it must move: the tables of docs/deployment.md, `python benchmarks/sizing.py`.

The KV of a token has 2 x layers x KV heads x head size x bytes of the dtype: a key and a value for each (grouped-query
attention, arXiv:2305.13245). A model with latent attention keeps layers x (latent + rotary part) numbers instead
(DeepSeek-V2, arXiv:2405.04434, table 1). The figures of a model are those of its config.json, the dtype is bf16.

Computing costs 2 FLOP per active parameter and token (arXiv:2001.08361, section 2.1), without the part of attention
that grows with the prompt: long prompts are slower to compute, and pay earlier than is said here. A GPU is taken for
989 TFLOP/s, an H100's dense bf16, half of which is reached. Loading pays where a tier brings more bytes a second than

    KV bytes per token x tokens that the engine computes a second

The simulation is of conversations: each begins with one of 20 system prompts of 1,024 tokens (the nth is asked for 1/n
as often), three in ten go on with a document (log-normal, median 6,000 tokens); then come a question (median 200) and
an answer (median 300) at a time, 6 turns in the mean (geometric). The pause after an answer is exponential, of 30 s in
the mean, or in one case of five of 10 minutes. Hosts take each turn by chance, or all turns of a conversation ("kept").
With `--trace FILE`, the requests are those of a file in the format of Mooncake's (FAST '25), perhaps compressed: a JSON
object a line, with `timestamp` in milliseconds, `input_length`, and `hash_ids`, which name a prefix each by 512 tokens.

A host prefetches a prompt's longest prefix that its tiers have; blocks of 512 tokens leave each tier least recently
used first. What was computed is written to every tier. A tier, and the network of a host, are pipes that serve in order
of arrival; nodes share the blocks of a load evenly. Nothing is promoted from a slow tier to a fast one, and what a
write takes of a full-duplex link is not felt by loads. The second half of the time is counted. The figures are the same
on every machine, and say nothing of the cache's own speed.
"""

import argparse
import gzip
import json
import random
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import quantiles
from typing import NamedTuple

BLOCK_TOKENS = 512
GPU_FLOPS = 989e12 * 0.5
GBIT = 1e9 / 8
GIB = 2**30
SECONDS = 900
REQUESTS_PER_SECOND = 2.0  # of one host
HOSTS = (1, 4, 16)
OVERRUN_SECONDS = 30  # a load that takes longer waits in a queue that grows as long as one looks
FEW = 100  # loads, of which percentiles say nothing


@dataclass(frozen=True)
class Model:
    """A model as its config.json has it; `gpus` is what an engine of it usually takes."""

    name: str
    layers: int
    kv_heads: int
    head_size: int
    active_parameters: float
    gpus: int
    latent: int = 0  # numbers a layer, of latent attention

    @property
    def kv_bytes(self) -> int:
        """Of one token, in bf16, over all ranks."""
        return 2 * self.layers * (self.latent or 2 * self.kv_heads * self.head_size)

    def tokens_per_second(self, gpus: int) -> float:
        """That so many GPUs compute."""
        return gpus * GPU_FLOPS / (2 * self.active_parameters)


MODELS = (
    Model("SmolLM2 135M", 30, 3, 64, 0.135e9, 1),
    Model("Llama 3.1 8B", 32, 8, 128, 8.03e9, 1),
    Model("Mistral Small 24B", 40, 8, 128, 23.6e9, 2),
    Model("Qwen3 32B", 64, 8, 128, 32.8e9, 2),
    Model("Llama 3.3 70B", 80, 8, 128, 70.6e9, 4),
    Model("Qwen3 235B-A22B", 94, 4, 128, 22e9, 8),
    Model("DeepSeek V3 671B", 61, 0, 0, 37e9, 8, latent=512 + 64),
)
LINKS = {"10 Gbit/s": 10 * GBIT, "25 Gbit/s": 25 * GBIT, "NVMe, 7 GB/s": 7e9, "100 Gbit/s": 100 * GBIT}


class Tier(NamedTuple):
    """Where KV is kept: of each host its own, or of all hosts."""

    name: str
    node_bytes: float
    node_bytes_per_second: float
    latency_seconds: float
    nodes: int = 1
    of_each_host: bool = False


@dataclass(frozen=True)
class Fleet:
    """Hosts that are alike, with 8 GPUs each, and their tiers, the fastest first."""

    name: str
    tiers: tuple[Tier, ...]
    host_bytes_per_second: float = 100 * GBIT


L1 = Tier("L1", 512 * GIB, float("inf"), 0, of_each_host=True)
DISK = Tier("disk", 4096 * GIB, 7e9, 0.0002, of_each_host=True)
VALKEY = Tier("Valkey", 512 * GIB, 25 * GBIT, 0.0005, nodes=1)
BUCKET = Tier("bucket", float("inf"), 400 * GBIT, 0.05)
MACHINES = Fleet("machines", (L1, DISK))
RACK = Fleet("rack", (L1, VALKEY._replace(nodes=4)))
CLUSTER = Fleet("fleet", (L1, VALKEY._replace(nodes=16), BUCKET))


# Requests.


class Request(NamedTuple):
    """The blocks of a prompt, each of which stands for all before it as well; a tail shorter than a block has none."""

    at_seconds: float
    conversation: int
    blocks: Sequence[int]


def conversations(requests_per_second: float, seconds: float = SECONDS, seed: int = 1) -> list[Request]:
    """Requests in the order of their arrival; see the module's docstring for what they are like."""
    dice = random.Random(seed)
    found: list[Request] = []
    turns = 6
    at, number, next_block = -1200.0, 0, 1000  # conversations go on at the beginning
    while at < seconds:
        at += dice.expovariate(requests_per_second / turns)
        system = dice.choices(range(20), [1 / n for n in range(1, 21)])[0]
        blocks = [2 * system, 2 * system + 1]
        tokens = 1024.0 + (dice.lognormvariate(8.7, 0.8) if dice.random() < 0.3 else 0)
        now, goes_on = at, True
        while goes_on and now < seconds:
            tokens += dice.lognormvariate(5.3, 1)
            added = int(tokens) // BLOCK_TOKENS - len(blocks)
            blocks = blocks + list(range(next_block, next_block + added))
            next_block += added
            if now >= 0:
                found.append(Request(now, number, blocks))
            tokens += dice.lognormvariate(5.7, 0.7)
            now += dice.expovariate(1 / (600 if dice.random() < 0.2 else 30))
            goes_on = dice.random() < 1 - 1 / turns
        number += 1
    return sorted(found)


def trace(path: Path) -> list[Request]:
    """The requests of a file in Mooncake's format. Ends the program if it is none."""
    try:
        with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as lines:
            rows = [json.loads(line) for line in lines]
        return sorted(
            Request(row["timestamp"] / 1000, number, row["hash_ids"][: row["input_length"] // BLOCK_TOKENS])
            for number, row in enumerate(rows)
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SystemExit(f"{path} is no trace: {error!r}") from error


# The simulation.


class Counted:
    """What the second half brought, by tier."""

    def __init__(self, tiers: Sequence[Tier], seconds: float, model: Model):
        self.seconds = seconds
        self.requests = self.tokens = self.computed_tokens = self.paid = 0
        self.found_tokens = {tier.name: 0 for tier in tiers}
        self.read_bytes = dict(self.found_tokens)
        self.written_bytes = dict(self.found_tokens)
        self.load_seconds: list[float] = []  # of the loads that were not all of L1
        self._block_bytes = BLOCK_TOKENS * model.kv_bytes
        self._tokens_per_second = model.tokens_per_second(model.gpus)

    def count(self, blocks: int, found: dict[str, int], put: dict[str, int], load_seconds: float) -> None:
        """Count one request."""
        self.requests += 1
        self.tokens += blocks * BLOCK_TOKENS
        self.computed_tokens += (blocks - sum(found.values())) * BLOCK_TOKENS
        for name in found:
            self.found_tokens[name] += found[name] * BLOCK_TOKENS
            self.read_bytes[name] += found[name] * self._block_bytes
            self.written_bytes[name] += put[name] * self._block_bytes
        if loaded := sum(found.values()) - found[L1.name]:
            self.load_seconds.append(load_seconds)
            self.paid += load_seconds < loaded * BLOCK_TOKENS / self._tokens_per_second

    def loads(self) -> Sequence[str]:
        """The median and the 99th percentile of the milliseconds of loads, and how many were faster than computing."""
        if len(self.load_seconds) < FEW:
            return "", "", ""
        percentiles = quantiles(self.load_seconds, n=100)
        times = [f"{percentiles[n] * 1000:,.0f}" if percentiles[n] < OVERRUN_SECONDS else "grows" for n in (49, 98)]
        return *times, f"{self.paid / len(self.load_seconds):.0%}"


class Store:
    """The content of a tier at one place, and when its pipe is free."""

    def __init__(self, tier: Tier, block_bytes: int):
        self.tier = tier
        self._most = tier.node_bytes * tier.nodes / block_bytes
        self._blocks: OrderedDict[int, None] = OrderedDict()
        self._bytes_per_second = tier.node_bytes_per_second * tier.nodes
        self._free_at = 0.0

    def __contains__(self, block: int) -> bool:
        return block in self._blocks

    def use(self, blocks: Sequence[int]) -> int:
        """Put blocks there, or keep those that are: the last one is the most recently used. How many were put."""
        held, before = self._blocks, len(self._blocks)
        for block in blocks:
            held[block] = None
            held.move_to_end(block)
        put = len(held) - before
        while len(held) > self._most:
            held.popitem(last=False)
        return put

    def load(self, now: float, size_bytes: int) -> float:
        """When so many bytes have come that are asked for now."""
        self._free_at = max(self._free_at, now) + size_bytes / self._bytes_per_second
        return self._free_at + self.tier.latency_seconds


def simulate(requests: Sequence[Request], hosts: int, fleet: Fleet, model: Model, *, sticky: bool = False) -> Counted:
    """Serve all requests, and count what came in the second half of their time."""
    block_bytes = BLOCK_TOKENS * model.kv_bytes
    shared = [Store(tier, block_bytes) for tier in fleet.tiers if not tier.of_each_host]
    own = [[Store(tier, block_bytes) for tier in fleet.tiers if tier.of_each_host] for _ in range(hosts)]
    links = [Store(Tier("link", 0, fleet.host_bytes_per_second, 0), block_bytes) for _ in range(hosts)]
    dice, half = random.Random(2), requests[-1].at_seconds / 2
    counted = Counted(fleet.tiers, half, model)
    for now, conversation, blocks in requests:
        host = conversation % hosts if sticky else dice.randrange(hosts)
        stores = own[host] + shared
        found = {store.tier.name: 0 for store in stores}
        for block in blocks:
            holder = next((store for store in stores if block in store), None)
            if holder is None:
                break
            found[holder.tier.name] += 1
        end, over_network = now, 0
        for store in stores[1:]:
            if size_bytes := found[store.tier.name] * block_bytes:
                end = max(end, store.load(now, size_bytes))
                over_network += 0 if store.tier.of_each_host else size_bytes
        if over_network:
            end = max(end, links[host].load(now, over_network))
        put = {store.tier.name: store.use(blocks[::-1]) for store in stores}
        if now >= half:
            counted.count(len(blocks), found, put, end - now)
    return counted


# The tables.


def print_table(title: str, header: str, rows: Iterable[Sequence[str]]) -> None:
    """A table as it stands in the document."""
    columns = header.split(" | ")
    print(f"{title}\n\n| {header} |\n|{'---|' * len(columns)}")
    for row in rows:
        print(f"| {' | '.join(row)} |")
    print()


def sizes(model: Model) -> Sequence[str]:
    chunk_bytes, prompt_bytes = 256 * model.kv_bytes, 8192 * model.kv_bytes
    tokens = 2**40 / model.kv_bytes / 1e6
    per_token = f"{model.kv_bytes / 1024:.4g} KiB"
    return model.name, per_token, f"{chunk_bytes / 2**20:.4g} MiB", f"{prompt_bytes / GIB:.2f} GiB", f"{tokens:.1f}"


def break_even(model: Model) -> Sequence[str]:
    speed = model.tokens_per_second(model.gpus)
    needed = speed * model.kv_bytes
    gains = [f"{bandwidth / needed:.2f}" for bandwidth in LINKS.values()]
    return model.name, str(model.gpus), f"{speed:,.0f}", f"{needed / 1e9:.1f} GB/s", *gains


def tiers(
    fleet: Fleet, hosts: int, sticky: bool, requests: Sequence[Request], model: Model
) -> tuple[Sequence[str], Counted]:
    """A row of the third table."""
    counted = simulate(requests, hosts, fleet, model, sticky=sticky)
    shares, moved = [], []
    for name in (L1.name, DISK.name, VALKEY.name, BUCKET.name):
        there = name in counted.found_tokens
        shares.append(f"{counted.found_tokens[name] / counted.tokens:.0%}" if there else "")
        if there and name != L1.name:
            read, written = (of[name] / counted.seconds / 1e9 for of in (counted.read_bytes, counted.written_bytes))
            moved.append(f"{name} {read:.1f} / {written:.1f}")
    computed = f"{counted.computed_tokens / counted.tokens:.0%}"
    turns = "" if hosts == 1 else "kept" if sticky else "by chance"
    return (fleet.name, str(hosts), turns, *shares, computed, ", ".join(moved), *counted.loads()), counted


def queues(fleet: Fleet, hosts: int, model: Model, requests: Sequence[Request], read: float) -> Iterator[Sequence[str]]:
    """What loads wait for as Valkey's links fill up: the same requests, through ever narrower ones."""
    for used in (0.3, 0.5, 0.7, 0.8, 0.9):
        nodes = fleet.tiers[1].nodes
        narrow = fleet.tiers[1]._replace(node_bytes_per_second=read / used / nodes)
        counted = simulate(requests, hosts, replace(fleet, tiers=(L1, narrow, *fleet.tiers[2:])), model)
        yield f"{used:.0%}", *counted.loads()


def ends(name: str, tier: Tier, read_per_host: float, written_per_host: float) -> Sequence[str]:
    """At how many hosts the links of a tier are at seven tenths."""
    most = 0.7 * tier.nodes * tier.node_bytes_per_second
    per_host = max(read_per_host, written_per_host)
    links = f"{tier.nodes} x {tier.node_bytes_per_second / GBIT:.0f} Gbit/s"
    return (
        name,
        links,
        f"{read_per_host / 1e9:.2f} / {written_per_host / 1e9:.2f} GB/s",
        f"{most / per_host:.0f}" if per_host else "",
    )


def main() -> None:
    names = {model.name: model for model in MODELS}
    parser = argparse.ArgumentParser(description="The tables of docs/deployment.md.")
    parser.add_argument("--model", choices=names, default="Llama 3.3 70B")
    parser.add_argument("--requests-per-second", type=float, default=REQUESTS_PER_SECOND, help="of one host")
    parser.add_argument("--hosts", type=int, nargs="+", default=HOSTS)
    parser.add_argument("--trace", type=Path, help="requests in Mooncake's format, for all hosts together")
    arguments = parser.parse_args()
    model = names[arguments.model]

    print_table(
        "KV of a model", "model | a token | a chunk of 256 | 8,192 tokens | million tokens in 1 TiB", map(sizes, MODELS)
    )
    header = "model | GPUs | tokens/s computed | break-even | " + " | ".join(LINKS)
    print_table("Loading against computing", header, map(break_even, MODELS))

    rows, by_hosts = [], {}
    for hosts in arguments.hosts:
        known = trace(arguments.trace) if arguments.trace else conversations(hosts * arguments.requests_per_second)
        if not known or known[-1].at_seconds <= 0:
            raise SystemExit("there are no requests over time to simulate")
        for fleet in (MACHINES, RACK, CLUSTER):
            for sticky in (False, True) if hosts > 1 and not arguments.trace else (False,):
                row, counted = tiers(fleet, hosts, sticky, known, model)
                rows.append(row)
                if fleet is CLUSTER and not sticky:
                    by_hosts[hosts] = known, counted
    header = "tiers | hosts | turns | L1 | disk | Valkey | bucket | computed | read / written, GB/s"
    header += " | load p50, ms | load p99, ms | loads that paid"
    print_table(f"Where the KV of {model.name} is found", header, rows)

    hosts = max(arguments.hosts)
    known, counted = by_hosts[hosts]
    read, written = (
        {name: size / counted.seconds for name, size in of.items()}
        for of in (counted.read_bytes, counted.written_bytes)
    )
    if read[VALKEY.name]:
        title = f"Waiting as the links of Valkey fill up, {hosts} hosts"
        header = "links in use | load p50, ms | load p99, ms | loads that paid"
        print_table(title, header, queues(CLUSTER, hosts, model, known, read[VALKEY.name]))
    over_network = [(tier.name, tier) for tier in CLUSTER.tiers if not tier.of_each_host]
    print_table(
        "Hosts at which the links of a store are at seven tenths",
        "store | its links | of each host, read / written | hosts",
        [ends(name, tier, read[name] / hosts, written[name] / hosts) for name, tier in over_network],
    )


if __name__ == "__main__":
    main()
