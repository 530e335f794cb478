"""When is it faster to compute than to load? `python examples/advice.py`.

A simulated engine: paged memory for its sequences, chunked prefill in batches of so many tokens a step, one step after
the other. Prompts of 8,192 tokens, all of which are cached in storage, come at once, and there is only one pipe to that
storage. What is timed is each request's first token, from its arrival on, for three engines:

    load     always loads what is cached, and computes the last chunk
    compute  never asks the cache
    advice   does as `LookupHits.recompute_from` says: it ends the request for what is faster to compute

The advice rests on what the cache has measured of the storage and what is queued there, and on how fast the engine
computes, which it was told (`prefill_tokens_per_second`). The clock is virtual, so the figures are the same on every
machine: they say nothing of the cache's own speed.
"""

import asyncio
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from async_cache import AsyncCache, CacheConfig, ModelLayout, ObjectGroup, Prompt
from async_cache.l2.memory import MemoryBackend
from async_cache.testing import ThrottledBackend
from async_cache.testing.virtual import run_virtual

PROMPT_TOKENS, CHUNK_TOKENS, PAGE_TOKENS = 8192, 256, 16
TOKENS_PER_SECOND = 20_000
STEP_TOKENS = 2048
ENGINE_PAGES = 64 * PROMPT_TOKENS // PAGE_TOKENS
KV_BYTES_PER_TOKEN = 16
REQUESTS = (1, 8, 64)
LOAD_TIME = (0.1, 0.5, 1.0, 2.0, 8.0)
"""How long the storage takes to load a prompt, in the time that the engine takes to compute it."""
ENGINES = ("load", "compute", "advice")

LAYOUT = ModelLayout("8b", (ObjectGroup((CHUNK_TOKENS, KV_BYTES_PER_TOKEN), "uint8"),), chunk_tokens=CHUNK_TOKENS)


@dataclass(eq=False)
class Waiting:
    """A sequence that waits to be computed: so many tokens are left, and it has so many pages of memory."""

    left: int
    pages: int
    done: asyncio.Event


class Engine:
    """Computes sequences in the order in which they come, so many tokens in a step."""

    def __init__(self) -> None:
        self._running: deque[Waiting] = deque()
        self._free = ENGINE_PAGES
        self._room = asyncio.Condition()
        self._wake = asyncio.Event()

    async def prefill(self, tokens: int) -> None:
        """Compute so many tokens of a prompt, when there are pages for all of it. Returns with its first token."""
        pages = ceil(PROMPT_TOKENS / PAGE_TOKENS)
        async with self._room:
            await self._room.wait_for(lambda: self._free >= pages)
            self._free -= pages
        sequence = Waiting(tokens, pages, asyncio.Event())
        self._running.append(sequence)
        self._wake.set()
        await sequence.done.wait()
        async with self._room:
            self._free += pages
            self._room.notify_all()

    async def run(self) -> None:
        """Do one step after the other, as long as there is something to compute."""
        while True:
            await self._wake.wait()
            budget, finished = STEP_TOKENS, []
            for sequence in self._running:
                step = min(sequence.left, budget)
                sequence.left -= step
                budget -= step
                if not sequence.left:
                    finished.append(sequence)
                if not budget:
                    break
            await asyncio.sleep((STEP_TOKENS - budget) / TOKENS_PER_SECOND)
            for sequence in finished:
                self._running.remove(sequence)
                sequence.done.set()
            if not self._running:
                self._wake.clear()


async def first_token(cache: AsyncCache, engine: Engine, prompt: Prompt, how: str) -> float:
    """How long a prompt takes until its first token."""
    clock = asyncio.get_running_loop().time
    began, loaded = clock(), 0
    if how != "compute":
        prefetch = cache.prefetch(prompt)
        hits = await prefetch.lookup_done
        if how == "load" or hits.recompute_from is None:
            loaded = (await prefetch.load_done).tokens
        await cache.end_request(prefetch.request_id)  # what it holds, or what is under way
    await engine.prefill(max(PROMPT_TOKENS - loaded, CHUNK_TOKENS))
    return clock() - began


async def measure(how: str, requests: int, load_time: float) -> list[float]:
    """The times to the first token of prompts that come at once, the shortest first."""
    seconds = PROMPT_TOKENS / TOKENS_PER_SECOND * load_time
    config = CacheConfig(
        l1_bytes=4 * requests * PROMPT_TOKENS * KV_BYTES_PER_TOKEN,
        l2=[],
        prefetch_share=1.0,
        load_timeout_seconds=1000,
        prefill_tokens_per_second=TOKENS_PER_SECOND,
        load_inflight_bytes=PROMPT_TOKENS * KV_BYTES_PER_TOKEN,
    )
    storage = ThrottledBackend(MemoryBackend(), bytes_per_second=PROMPT_TOKENS * KV_BYTES_PER_TOKEN / seconds)
    prompts = [LAYOUT.prompt(range(n * PROMPT_TOKENS, (n + 1) * PROMPT_TOKENS)) for n in range(requests + 1)]
    async with AsyncCache(config, backends=[storage]) as cache:
        for prompt in prompts:
            async with cache.store(prompt) as writer:
                for chunk in writer:
                    chunk.commit()
            await cache.flush()
        await cache.clear(tier="l1")
        await cache.warm(prompts.pop())  # the storage was used before: it is known how fast it is
        engine = Engine()
        running = asyncio.create_task(engine.run())
        took = await asyncio.gather(*(first_token(cache, engine, prompt, how) for prompt in prompts))
        running.cancel()
        return sorted(took)


def percentile(times: Sequence[float], part: float) -> float:
    """What so many of the times do not exceed."""
    return times[ceil(part * len(times)) - 1]


def main() -> None:
    """Print, for each speed of the storage and number of requests, the times to the first token."""
    print(f"{'':25}  time to the first token in seconds, median / 99th percentile")
    print(
        "  ".join([f"{'to load takes':15}{'requests':>10}", *(f"{how:>15}" for how in ENGINES), "99th: advice / best"])
    )
    for load_time in LOAD_TIME:
        for requests in REQUESTS:
            taken = {how: run_virtual(measure(how, requests, load_time)) for how in ENGINES}
            shown = [f"{percentile(times, 0.5):7.2f} /{percentile(times, 0.99):6.2f}" for times in taken.values()]
            best = min(percentile(taken[how], 0.99) for how in ("load", "compute"))
            ratio = percentile(taken["advice"], 0.99) / best
            print("  ".join([f"{f'{load_time:g} x computing':15}{requests:>10}", *shown, f"{ratio:19.2f}"]), flush=True)


if __name__ == "__main__":
    main()
