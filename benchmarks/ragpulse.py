"""How much of real prompts over retrieved passages is found: `python benchmarks/ragpulse.py FILE [--requests N]`.

FILE is RAGPulse's week of a university's question answering (flashserve/RAGPulse, MIT), as JSON lines with `parts`, a
list of [kind, id, tokens] whose texts follow each other in a prompt. Its requests are asked of a cache, one after the
other, and all that it lacks is stored, without bytes: as prompts, of which a prefix is found, and as requests of many
parts, where passages, system prompts and histories are segments and the rest is computed anew. With PEER_PYTHON set to
a Python that has LMCache, its blend matcher takes the same prompts (`ragpulse_peer.py`).

What could be reused are all texts that stood in an earlier prompt, whole. The time is that of hashing and of the
request, to the end of it, in medians of the processor's time.
"""

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import time
from array import array
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from ragpulse_peer import Part, ids, read

from async_cache import AsyncCache, CacheConfig, ModelLayout, ObjectGroup, Prompt
from async_cache.config.texts import parse_bytes

CHUNK_TOKENS = 32
LAYOUT = ModelLayout("ragpulse", (ObjectGroup((1,), "uint8"),), chunk_tokens=CHUNK_TOKENS)
SEGMENTS = {"system", "passage", "history"}
CONTEXT = array("i", range(320))


class Found(NamedTuple):
    """Tokens found in all requests, tokens stored at the end, and the processor's time of a request."""

    tokens: int
    stored_tokens: int
    seconds: float


@cache
def packed(part: Part) -> array:
    return array("i", ids(part))


def as_prompt(parts: list[Part]) -> list[Prompt]:
    tokens = array("i")
    for part in parts:
        tokens += packed(part)
    return [LAYOUT.prompt(tokens)]


def as_segments(parts: list[Part]) -> list[Prompt]:
    return [LAYOUT.segment(packed(part), context=CONTEXT) for part in parts if part.kind in SEGMENTS]


async def replay(requests: list[list[Part]], prompts_of: Any, l1_bytes: int) -> Found:
    """Ask for each request, and store what lacks."""
    found, seconds = 0, []
    async with AsyncCache(CacheConfig(l1_bytes=l1_bytes, l2=[])) as cache:
        for parts in requests:
            for part in parts:
                packed(part)  # made up beforehand
            began = time.thread_time()
            prompts = prompts_of(parts)
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
    return Found(found, stored, statistics.median(seconds))


def matched(path: Path, count: int) -> Found:
    """What LMCache's matcher finds."""
    program = [os.environ["PEER_PYTHON"], Path(__file__).parent / "ragpulse_peer.py", path]
    done = subprocess.run([*program, str(CHUNK_TOKENS), str(count)], stdout=subprocess.PIPE, check=True)
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
    print("| | found, of all tokens | of what could be reused | tokens stored | time a request |")
    print("|---|---|---|---|---|")
    ways = {
        "prefixes alone": lambda: asyncio.run(replay(requests, as_prompt, l1_bytes)),
        "segments": lambda: asyncio.run(replay(requests, as_segments, l1_bytes)),
    }
    if "PEER_PYTHON" in os.environ:
        ways["LMCache's blend matcher"] = lambda: matched(options.file, len(requests))
    for name, way in ways.items():
        it = way()
        print(
            f"| {name} | {it.tokens / tokens:.1%} | {it.tokens / reusable:.3f} | {it.stored_tokens:,} "
            f"| {it.seconds * 1e6:,.0f} us |",
            flush=True,
        )


if __name__ == "__main__":
    main()
