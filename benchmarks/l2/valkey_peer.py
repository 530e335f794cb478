"""LMCache's `resp` client (C++, in its wheel) for `valkey.py`: a process of its own, in its own Python.

Arguments: port, objects, bytes of each, worker threads. It stores its values, says "ready", and for each line it reads
it loads all of them, and prints the seconds and the seconds of CPU that took.
"""

import asyncio
import os
import sys
import time


async def main(port, count, size, workers):
    from lmcache.v1.storage_backend.native_clients.resp_client import RESPClient

    client = RESPClient("127.0.0.1", port, workers)
    keys = [f"peer:{workers}:{n}" for n in range(count)]
    blobs = [bytearray(os.urandom(size)) for _ in keys]
    await client.batch_set(keys, list(map(memoryview, blobs)))
    arena = bytearray(count * size)
    buffers = [memoryview(arena)[n * size : (n + 1) * size] for n in range(count)]
    print("ready", flush=True)
    for _ in sys.stdin:
        cpu, begin = time.process_time(), time.perf_counter()
        await client.batch_get(keys, buffers)
        print(time.perf_counter() - begin, time.process_time() - cpu, flush=True)
        assert buffers[-1] == blobs[-1]
    client.close()


if __name__ == "__main__":
    asyncio.run(main(*map(int, sys.argv[1:])))
