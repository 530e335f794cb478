"""How much of real prompts over retrieved passages is found: `python benchmarks/ragpulse.py FILE [--requests N]`.

FILE is RAGPulse's week of a university's question answering (flashserve/RAGPulse, MIT), as JSON lines with `parts`, a
list of [kind, id, tokens] whose texts follow each other in a prompt. Its requests are asked of a cache, one after the
other, and all that it lacks is stored, without bytes: as prompts, of which a prefix is found, and as requests of many
parts, where passages, system prompts and histories are segments and the rest is computed anew. With PEER_PYTHON set to
a Python that has LMCache, its blend matcher takes the same prompts (`ragpulse_peer.py`).

What could be reused are all texts that stood in an earlier prompt, whole. The time is that of hashing and of the
request, to the end of it, in medians of the processor's time; of that, hashing by itself for 1,000 tokens.
"""

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import time
from array import array
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

from ragpulse_peer import Part, ids, read

from async_cache import AsyncCache, CacheConfig, ModelLayout, ObjectGroup, Prompt
from async_cache.config.texts import parse_bytes

CHUNK_TOKENS = 32
LAYOUT = ModelLayout("ragpulse", (ObjectGroup((1,), "uint8"),), chunk_tokens=CHUNK_TOKENS)
SEGMENTS = {"system", "passage", "history"}
CONTEXT = memoryview(array("i", range(320)).tobytes()).cast("i")  # packed once

Cut = Callable[[list[Part]], list[array]]
"""What a request asks for at once, as tokens."""


class Found(NamedTuple):
    """Tokens found in all requests, tokens stored at the end, and the processor's time of a request.

    `hashing_seconds`: of 1,000 tokens, where it is known.
    """

    tokens: int
    stored_tokens: int
    seconds: float
    hashing_seconds: float | None = None


@cache
def packed(part: Part) -> array:
    return array("i", ids(part))


def in_one(parts: list[Part]) -> list[array]:
    """The tokens of a prompt."""
    tokens = array("i")
    for part in parts:
        tokens += packed(part)
    return [tokens]


def apart(parts: list[Part]) -> list[array]:
    """The tokens of each segment."""
    return [packed(part) for part in parts if part.kind in SEGMENTS]


async def replay(requests: list[list[Part]], cut: Cut, prompt_of: Callable[[array], Prompt], l1_bytes: int) -> Found:
    """Ask for each request, and store what lacks."""
    found, seconds, hashing = 0, [], []
    async with AsyncCache(CacheConfig(l1_bytes=l1_bytes, l2=[])) as cache:
        for parts in requests:
            texts = cut(parts)
            began = time.thread_time()
            prompts = list(map(prompt_of, texts))
            if tokens := sum(prompt.tokens for prompt in prompts):
                hashing.append((time.thread_time() - began) / tokens * 1000)
            prefetch = cache.prefetch_segments(prompts)
            result = await prefetch.load_done
            await cache.end_request(prefetch.request_id)
            seconds.append(time.thread_time() - began)
            found += result.tokens
            for prompt, part in zip(prompts, result.parts, strict=True):
                if part.chunks < len(prompt):
                    async with cache.store(prompt) as writer:
                        for chunk in writer:
                            chunk.commit()
        stored = (await cache.stats()).l1_chunks * CHUNK_TOKENS
    return Found(found, stored, statistics.median(seconds), statistics.median(hashing))


def matched(path: Path, count: int) -> Found:
    """What LMCache's matcher finds."""
    program = [os.environ["PEER_PYTHON"], Path(__file__).parent / "ragpulse_peer.py", path]
    quiet = os.environ | {"LMCACHE_LOG_LEVEL": "ERROR"}  # it would write a line for each request
    done = subprocess.run([*program, str(CHUNK_TOKENS), str(count)], env=quiet, stdout=subprocess.PIPE, check=True)
    return Found(*json.loads(done.stdout))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--requests", type=int, help="so many of them, from the first on")
    parser.add_argument("--l1", default="2GiB", help="a page of 4 KiB for each chunk")
    options = parser.parse_args()
    l1_bytes = parse_bytes(options.l1)
    requests = list(read(options.file, options.requests))
    tokens = reusable = 0
    seen: set[int] = set()
    for parts in requests:
        tokens += sum(part.tokens for part in parts)
        reusable += sum(part.tokens for part in parts if part.name in seen)
        seen.update(part.name for part in parts)
    share = f"{reusable:,} ({reusable / tokens:.1%}) could be reused"
    print(f"{len(requests):,} requests of {tokens:,} tokens, of which {share}")
    print(f"chunks of {CHUNK_TOKENS} tokens\n")
    print(
        "| | found, of all tokens | of what could be reused | tokens stored | time a request | to hash 1,000 tokens |"
    )
    print("|---|---|---|---|---|---|")
    ways = {
        "prefixes alone": lambda: asyncio.run(replay(requests, in_one, LAYOUT.prompt, l1_bytes)),
        "segments": lambda: asyncio.run(replay(requests, apart, partial(LAYOUT.segment, context=CONTEXT), l1_bytes)),
    }
    if "PEER_PYTHON" in os.environ:
        ways["LMCache's blend matcher"] = lambda: matched(options.file, len(requests))
    for name, way in ways.items():
        it = way()
        hashing = "" if it.hashing_seconds is None else f"{it.hashing_seconds * 1e6:.0f} us"
        print(
            f"| {name} | {it.tokens / tokens:.1%} | {it.tokens / reusable:.3f} | {it.stored_tokens:,} "
            f"| {it.seconds * 1e6:,.0f} us | {hashing} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
