"""One tenant does what is named, in a process of its own; another's ping and prefetch of 16 chunks are measured then.

Prints JSON: for each attack the other's median and 99th percentile in milliseconds, idle in the same run and beside it,
also of what the server's process computed meanwhile, on which the load of the machine has little effect; the longest
that the server's loop computed at a time; how long SIGTERM takes under it; and by how much the server's own memory
grows. `nothing_but_computing` asks nothing of the server: what is felt beside it is the machine's doing.
FAIRNESS_SECONDS: how long each is measured; FAIRNESS_ATTACKS: which, with commas between.
"""

import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path

import psutil
import uvloop

from async_cache import AsyncCacheError, ModelLayout, ObjectGroup, connect

RED, BLUE = (f"token-of-{name:_<16}" for name in ("red", "blue"))
CONFIG = "[server]\nmax_message_objects = 262144\n" + "".join(
    f'[server.tenants.{name}]\ntokens = ["{token}"]\nsalts = ["{name}"]\n'
    for name, token in (("red", RED), ("blue", BLUE))
)
SECONDS = float(os.environ.get("FAIRNESS_SECONDS", "3"))
MANY = ModelLayout("many", tuple(ObjectGroup((1,), "uint8") for _ in range(4096)), chunk_tokens=1)
ONE = ModelLayout("one", (ObjectGroup((16,), "uint8"),), chunk_tokens=1)
KV = ModelLayout("kv", (ObjectGroup((4096,), "uint8"),), chunk_tokens=1)
LARGE = ModelLayout("large", (ObjectGroup((2**20,), "uint8"),), chunk_tokens=1)
now = time.perf_counter


def prompt(layout, number, chunks, salt="red"):
    return layout.prompt(range(number * chunks, (number + 1) * chunks), salt=salt)


async def fill(client, prompt):
    async with client.store(prompt) as writer:
        for chunk in writer:
            chunk.commit()
            await asyncio.sleep(0)


async def prefetches_of_very_many_objects(client):
    for number in range(10**6):
        some = [client.prefetch(prompt(MANY, number * 128 + n, 64)) for n in range(128)]
        await asyncio.gather(*(one.load_done for one in some))
        await asyncio.gather(*(client.end_request(one.request_id) for one in some))


async def lookups_of_absent_chunks(client):
    numbers = iter(range(10**9))
    await at_depth(64, lambda: client.lookup(prompt(ONE, next(numbers), 4096)))


async def prefetches_of_chunks_in_memory(client):
    there = prompt(KV, 1, 512)
    await fill(client, there)

    async def one():
        request = client.prefetch(there)
        await request.load_done
        await client.end_request(request.request_id)

    await at_depth(64, one)


async def reads_in_frames(client):
    there = prompt(LARGE, 1, 64)
    await fill(client, there)

    async def one():
        request = client.prefetch(there)
        await request.load_done
        async with client.read(request.request_id):
            pass

    await at_depth(4, one)


async def prefetches_that_nobody_reads(client):
    kept = []
    for number in range(100_000):
        kept.append(client.prefetch(prompt(ONE, number, 16)))
        if number % 64 == 63:
            with suppress(AsyncCacheError):
                await kept[-1].load_done
    await asyncio.sleep(3600)


async def retentions_of_long_prompts(client):
    """Kept, kept no more, and hinted at; of what is there and of what is not."""
    there = prompt(ONE, 1, 8192)
    await fill(client, there)

    async def one():
        await client.retain(there)
        await client.hint(prompt(ONE, 0, 65_536), output_tokens=8, returns=True, within_seconds=1)
        await client.retain(there, ttl_seconds=0)

    await at_depth(8, one)


async def warmings_of_what_is_stored(client):
    there = prompt(KV, 1, 2048)
    await fill(client, there)
    await client.flush()
    await at_depth(16, lambda: client.warm(there))


async def streams_in_frames(client):
    there = prompt(KV, 1, 2048)
    await fill(client, there)

    async def one():
        request = client.prefetch(there)
        async with client.stream(request.request_id) as stream:
            async for _ in stream:
                pass

    await at_depth(8, one)


async def prefetches_of_many_segments(client):
    parts = [ONE.segment(range(n * 512, (n + 1) * 512), salt="red") for n in range(256)]
    await fill(client, parts[0])

    async def one():
        request = client.prefetch_segments(parts)
        await request.load_done
        await client.end_request(request.request_id)
        await client.lookup_segments(parts)

    await at_depth(8, one)


async def deletions_of_models(client):
    numbers = iter(range(10**9))

    async def one():
        await fill(client, prompt(ONE, next(numbers), 1024))
        await client.delete_model("one")

    await at_depth(8, one)


async def nothing_but_computing(client):
    """What the machine does to a server that has to share its processors, whatever the server does."""
    while True:
        sum(range(10**6))


async def many_connections(client, url):
    async def one():
        async with connect(url, token=RED) as more:
            numbers = iter(range(10**9))
            while True:
                await more.lookup(prompt(ONE, next(numbers), 16))

    await asyncio.gather(*(one() for _ in range(200)))


async def at_depth(depth, call):
    async def repeat():
        while True:
            with suppress(AsyncCacheError):
                await call()

    await asyncio.gather(*(repeat() for _ in range(depth)))


ATTACKS = {
    attack.__name__: attack
    for attack in (
        nothing_but_computing,
        prefetches_of_very_many_objects,
        lookups_of_absent_chunks,
        prefetches_of_chunks_in_memory,
        reads_in_frames,
        prefetches_that_nobody_reads,
        retentions_of_long_prompts,
        warmings_of_what_is_stored,
        streams_in_frames,
        prefetches_of_many_segments,
        deletions_of_models,
        many_connections,
    )
}


async def attack(name, url):
    async with connect(url, token=RED) as client:
        print("connected", flush=True)
        await (ATTACKS[name](client, url) if name == "many_connections" else ATTACKS[name](client))


@asynccontextmanager
async def serving(directory):
    (directory / "c.toml").write_text(CONFIG)
    url = f"unix://{directory}/s"
    command = [sys.executable, "-m", "async_cache", "serve", "--config", str(directory / "c.toml"), "--listen", url]
    command += ["--l1-bytes", "512MiB", "--l2", f"fs://{directory}/kv", "--log-level", "error"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)  # noqa: ASYNC220
    try:
        async with connect(url, token=BLUE, connect_timeout_seconds=60) as client:
            yield client, url, process
    finally:
        process.kill()
        process.wait()


async def measure(client, there, seconds, pid):
    pings, prefetches, until = [], [], now() + seconds
    clock = (~pid << 3) | 2  # of the server's process, as clock_getcpuclockid(3) makes it

    @contextmanager
    def timed(times):
        began, computed = now(), time.clock_gettime(clock)
        yield
        times.append((now() - began, time.clock_gettime(clock) - computed))

    while now() < until:
        with timed(pings):
            await client.ping()
        with timed(prefetches):
            request = client.prefetch(there)
            assert (await request.lookup_done).chunks == len(there)
            assert (await request.load_done).chunks == len(there)
        await client.end_request(request.request_id)
        await asyncio.sleep(0.001)
    return {"ping": quantiles(pings), "prefetch": quantiles(prefetches)}


def quantiles(times):
    waited, computed = ([round(time * 1e3, 3) for time in sorted(of)] for of in zip(*times, strict=True))
    middle, late = len(times) // 2, int(len(times) * 0.99)
    return {"p50_ms": waited[middle], "p99_ms": waited[late], "p99_computed_ms": computed[late]}


async def beside(name):
    with tempfile.TemporaryDirectory() as directory:
        async with serving(Path(directory)) as (client, url, process):
            there = prompt(KV, 1, 16, "blue")
            await fill(client, there)
            await client.flush()
            idle = await measure(client, there, SECONDS, process.pid)
            memory = psutil.Process(process.pid).memory_full_info
            before = memory().uss
            attacker = subprocess.Popen([sys.executable, __file__, name, url], stdout=subprocess.PIPE)  # noqa: ASYNC220
            try:
                await asyncio.to_thread(attacker.stdout.readline)
                await asyncio.sleep(1.0)
                while_it_lasts = await measure(client, there, SECONDS, process.pid)
                grown = memory().uss - before
                async with connect(url) as operator:
                    hold = (await operator.stats()).hold
                began = now()
                process.send_signal(signal.SIGTERM)
                await asyncio.to_thread(process.wait, 30)
                ended = now() - began
            finally:
                attacker.kill()
                attacker.wait()
    return {
        "idle": idle,
        "beside": while_it_lasts,
        "held": {"ms": round(hold.busy_seconds * 1e3, 1), "where": hold.where},
        "grown_mib": round(grown / 2**20, 1),
        "sigterm_s": round(ended, 2),
        "load": os.getloadavg()[0],
    }


async def main():
    for name in ATTACKS:
        if name in os.environ.get("FAIRNESS_ATTACKS", name).split(","):
            print(json.dumps({name: await beside(name)}), flush=True)


if __name__ == "__main__":
    if len(sys.argv) == 3:
        with suppress(AsyncCacheError):
            uvloop.run(attack(*sys.argv[1:]))
    else:
        uvloop.run(main())
