"""A forked child shares what its parent had open, and does not stand for it.

Whoever comes when the parent is dead has its store and its socket, and its connections end, though the child lives.
"""

import asyncio

import pytest
from client.servers import serve, short_directory

from async_cache import ConnectionLostError, connect
from async_cache.l2.filesystem import FileSystemBackend
from faults.disk import process
from faults.local_store.forking import PROMPT

SECONDS = 120  # against a hang, and no more


async def all_of(events):
    async for _ in events:
        pass


@pytest.mark.parametrize(
    ("how", "loop"),
    [("fork", "asyncio"), ("fork", "uvloop"), ("multiprocessing", "asyncio"), ("multiprocessing", "uvloop")],
)
async def test_a_child_does_not_stand_for_its_dead_parent(tmp_path, how, loop):
    directory = tmp_path / "kv"
    with (
        short_directory() as sockets,
        process("faults.local_store.forking", directory, f"{sockets}/s", how, loop) as parent,
    ):
        url = f"unix://{sockets}/s"
        assert await asyncio.to_thread(parent.stdout.readline) == "serving\n"
        async with asyncio.timeout(SECONDS), connect(url) as client:
            waiting = asyncio.create_task(all_of(client.events()))
            await client.ping()
            parent.stdin.write("fork\n")
            said = {await asyncio.to_thread(parent.stdout.readline) for _ in range(2)}
            assert said == {"forked\n", "parent ok\n"}
            parent.kill()
            parent.wait()
            with pytest.raises(ConnectionLostError):
                await waiting
        async with serve(url):
            pass  # nobody listens there
        backend = FileSystemBackend(directory)
        await backend.open()
        assert not backend._log.directory.writers.has_others
        assert len([key async for key in backend.keys()]) == len(PROMPT)
        backend.check_integrity()
        await backend.close()
        parent.stdin.close()
        assert await asyncio.to_thread(parent.stdout.read) == ""  # the child has ended
