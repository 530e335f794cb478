"""What a scheduler gains by knowing early how much of a prompt is cached: `python examples/scheduler.py`.

Requests arrive at random. Most have all of their KV but the last chunk's in storage, the others have none of it. The
storage is one pipe, so loads queue. One worker computes what is not cached, one request at a time. Every request is
prefetched when it arrives; the schedulers differ in whom they give the worker to when it is free:

    in order         the oldest request, once its `load_done` has come: with that future alone, a miss that could start
                     and a hit that has to wait look the same
    loaded first     the oldest of those whose `load_done` has come: misses overtake the hits that still load
    at lookup_done   the same, but it knows from `lookup_done` what is cached and when that should be loaded. Where the
                     worker would idle, and could compute a hit in half of that time, it cancels the load and computes

Half, because the worker is wanted by others, too: to compute whatever is merely quicker can queue longer than "loaded
first" where misses keep the worker busy. The gain over "loaded first" is what the pipe cannot carry: it grows with
the queue there. It is nothing where loads do not queue, and next to nothing where the worker is the bottleneck.

The clock is virtual, so the figures are the same on every machine: they compare the schedulers, and say nothing of
the cache's own speed. The sizes are those of an 8B model with 128 KiB of KV per token, computed at 20,000 tokens a
second and loaded through 25 Gbit/s, with bytes and bandwidth scaled down alike.
"""

import asyncio
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import mean

from async_cache import AsyncCache, CacheConfig, ModelLayout, ObjectGroup, Prefetch, Prompt
from async_cache.l2.memory import MemoryBackend
from async_cache.testing import ThrottledBackend
from async_cache.testing.virtual import run_virtual

REQUESTS = 300
REQUESTS_PER_SECOND = (3, 5, 7)
HIT_SHARE = 0.7
PROMPT_TOKENS = (2048, 4096, 8192)
CHUNK_TOKENS = 256
TOKENS_PER_SECOND = 20_000
KV_BYTES_PER_TOKEN = 16
SCALE = KV_BYTES_PER_TOKEN / (128 * 2**10)
BYTES_PER_SECOND = 25e9 / 8 * SCALE
LATENCY_SECONDS = 0.001

LAYOUT = ModelLayout("8b", (ObjectGroup((CHUNK_TOKENS, KV_BYTES_PER_TOKEN), "uint8"),), chunk_tokens=CHUNK_TOKENS)
CONFIG = CacheConfig(l1_bytes=64 * 2**20, l2=[])


@dataclass(eq=False)
class Request:
    """One that has arrived. `load_ends` is an estimate, known from `lookup_done` on."""

    prefetch: Prefetch
    tokens: int
    arrived: float
    cached_tokens: int = 0
    load_ends: float = 0.0
    loaded: bool = False


@dataclass
class Times:
    """Seconds from the arrival of each request to its turn, and to its first token."""

    queueing: list[float] = field(default_factory=list)
    first_token: list[float] = field(default_factory=list)


# The schedulers: given who waits, the oldest first, whose turn it is, or None for nobody's.

Scheduler = Callable[[list[Request]], Request | None]


def in_order(waiting: list[Request]) -> Request | None:
    return waiting[0] if waiting and waiting[0].loaded else None


def loaded_first(waiting: list[Request]) -> Request | None:
    return next((request for request in waiting if request.loaded), None)


def at_lookup_done(waiting: list[Request]) -> Request | None:
    request = loaded_first(waiting) or next(filter(better_computed, waiting), None)
    if request is not None:
        request.prefetch.cancel()  # changes nothing if it has loaded
    return request


def better_computed(request: Request) -> bool:
    load_seconds = request.load_ends - asyncio.get_running_loop().time()
    return 2 * request.cached_tokens / TOKENS_PER_SECOND < load_seconds


SCHEDULERS: dict[str, Scheduler] = {
    "in order": in_order,
    "loaded first": loaded_first,
    "at lookup_done": at_lookup_done,
}


# The engine: arrivals, and the worker.


class Engine:
    """Serves each prompt once; `times` has the result."""

    def __init__(self, cache: AsyncCache, scheduler: Scheduler):
        self.times = Times()
        self._cache = cache
        self._scheduler = scheduler
        self._waiting: list[Request] = []
        self._news = asyncio.Event()
        self._clock = asyncio.get_running_loop().time

    async def serve(self, prompts: Sequence[Prompt], requests_per_second: float) -> Times:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._work(len(prompts)))
            dice = random.Random(1)
            for prompt in prompts:
                await asyncio.sleep(dice.expovariate(requests_per_second))
                request = Request(self._cache.prefetch(prompt), prompt.tokens, self._clock())
                self._waiting.append(request)
                tasks.create_task(self._follow(request))
        return self.times

    async def _follow(self, request: Request) -> None:
        """Note what the two futures say."""
        hits = await request.prefetch.lookup_done
        request.cached_tokens = hits.tokens
        request.load_ends = self._clock() + (hits.expected_load_seconds or 0)  # None before the first measurement
        self._news.set()
        await request.prefetch.load_done
        request.loaded = True
        self._news.set()

    async def _work(self, count: int) -> None:
        for _ in range(count):
            request = await self._next()
            self.times.queueing.append(self._clock() - request.arrived)
            result = await request.prefetch.load_done  # it has come, or was cancelled
            await asyncio.sleep((request.tokens - result.tokens) / TOKENS_PER_SECOND)
            self.times.first_token.append(self._clock() - request.arrived)
            await self._cache.end_request(request.prefetch.request_id)

    async def _next(self) -> Request:
        while (request := self._scheduler(self._waiting)) is None:
            self._news.clear()
            await self._news.wait()
        self._waiting.remove(request)
        return request


# The comparison.


async def fill(backend: MemoryBackend) -> list[Prompt]:
    """Prompts, most of them stored but for their last chunk."""
    dice = random.Random(0)
    prompts = []
    async with AsyncCache(CONFIG, backends=[backend]) as cache:
        for number in range(REQUESTS):
            begin = number * max(PROMPT_TOKENS)  # no two prompts have a token in common
            tokens = range(begin, begin + dice.choice(PROMPT_TOKENS))
            prompts.append(LAYOUT.prompt(tokens))
            if dice.random() < HIT_SHARE:
                async with cache.store(LAYOUT.prompt(tokens[:-CHUNK_TOKENS])) as writer:
                    for chunk in writer:
                        chunk.commit()
        await cache.flush()
    return prompts


async def compare(requests_per_second: float) -> list[Times]:
    """The times under each scheduler, on the same requests."""
    memory = MemoryBackend()
    prompts = await fill(memory)
    backend = ThrottledBackend(memory, latency_seconds=LATENCY_SECONDS, bytes_per_second=BYTES_PER_SECOND)
    times = []
    for scheduler in SCHEDULERS.values():
        async with AsyncCache(CONFIG, backends=[backend]) as cache:
            times.append(await Engine(cache, scheduler).serve(prompts, requests_per_second))
    return times


def main() -> None:
    print("Mean milliseconds from arrival to turn (queueing) / to the first token\n")
    print(f"{'requests/s':<12}" + "".join(f"{name:>18}" for name in SCHEDULERS))
    for rate in REQUESTS_PER_SECOND:
        means = [(mean(times.queueing) * 1000, mean(times.first_token) * 1000) for times in run_virtual(compare(rate))]
        print(f"{rate:<12}" + "".join(f"{f'{turn:.0f} / {token:.0f}':>18}" for turn, token in means))
    *others, (best, _) = means
    print(f"\nAt {rate} requests a second, admission at lookup_done queues")
    for name, (turn, _) in zip(SCHEDULERS, others, strict=False):
        print(f"  {turn - best:.0f} ms ({(turn - best) / turn:.0%}) less than {name!r}")


if __name__ == "__main__":
    main()
