"""How long it takes to hear how many of very many pages there are, known by an engine's digests, as SGLang asks.

    python benchmarks/digests.py [PAGES]

All of them are in a directory, none is in memory, and the server is another process. Least of interleaved rounds, in
milliseconds: `whole_ms` asks for all in one go, `parts_ms` as `integrations/asking` does; `..._cpu_ms` is what this
process took of the processors for it, `..._server_cpu_ms` the server. `hash_ms` is the hashing alone, and `missing_ms`
where only the first half is there.
"""

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from subprocess import PIPE, Popen

from async_cache import BlockingClient, ModelLayout, ObjectGroup, Prompt
from async_cache.integrations.asking import count_found, parts_of

PAGES, ROUNDS = int(sys.argv[1]) if len(sys.argv) > 1 else 131_072, 5
LAYOUT = ModelLayout("model", (ObjectGroup((64,), "uint8"),), chunk_tokens=64)
SERVER = """
import asyncio, sys
from async_cache import AsyncCache, CacheConfig, ServerConfig
from async_cache.server import Server

async def main():
    config = CacheConfig(l1_bytes=2**27, l2=["fs://" + sys.argv[1]])
    async with AsyncCache(config) as cache, Server(cache, ServerConfig(listen=(sys.argv[2],))):
        print("ready", flush=True)
        await asyncio.to_thread(sys.stdin.read)

asyncio.run(main())
"""


def prompt_of(keys: list[str]) -> Prompt:
    return LAYOUT.prompt_from_digests(list(map(bytes.fromhex, keys)))


def store(client: BlockingClient, keys: list[str]) -> None:
    for begin in range(0, len(keys), 4096):
        with client.store(prompt_of(keys[begin : begin + 4096])) as writer:
            for chunk in writer:
                chunk.commit()
        client.flush()
    client.clear("l1")


def ticks(process: int) -> float:
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK") * 1000


def main() -> None:
    keys = [os.urandom(32).hex() for _ in range(PAGES)]
    with tempfile.TemporaryDirectory() as name:
        url = f"unix://{name}/s"
        with Popen([sys.executable, "-c", SERVER, f"{name}/store", url], stdin=PIPE, stdout=PIPE, text=True) as server:
            assert server.stdout is not None and server.stdout.readline() == "ready\n"
            with BlockingClient(url) as client, ThreadPoolExecutor(1) as beside:
                store(client, keys)

                def lookup(prompt: Prompt) -> int:
                    return client.lookup(prompt).chunks

                def parts(asked: list[str]) -> int:
                    prompts = (prompt_of(asked[begin:end]) for begin, end in parts_of(len(asked)))
                    return count_found(prompts, lookup, beside)

                missing = [*keys[: PAGES // 2], "00" * 32, *keys[PAGES // 2 + 1 :]]
                ways: dict[str, Callable[[], int]] = {
                    "whole": lambda: lookup(prompt_of(keys)),
                    "parts": lambda: parts(keys),
                    "hash": lambda: len([prompt_of(keys[begin:end]) for begin, end in parts_of(PAGES)]),
                    "missing": lambda: parts(missing),
                }
                told: dict[str, float] = dict.fromkeys((f"{way}_ms" for way in ways), float("inf"))
                for _ in range(ROUNDS):
                    for way, ask in ways.items():
                        wall, cpu, theirs = time.perf_counter(), time.process_time(), ticks(server.pid)
                        found = ask()
                        assert way == "hash" or found == (PAGES // 2 if way == "missing" else PAGES), (way, found)
                        for what, spent in (
                            ("", (time.perf_counter() - wall) * 1000),
                            ("_cpu", (time.process_time() - cpu) * 1000),
                            ("_server_cpu", ticks(server.pid) - theirs),
                        ):
                            told[f"{way}{what}_ms"] = min(told.get(f"{way}{what}_ms", float("inf")), round(spent, 1))
            assert server.stdin is not None
            server.stdin.close()
    print(json.dumps({"pages": PAGES, **told}, indent=1))


if __name__ == "__main__":
    main()
