"""A real cluster: its map, slots that move under load, a master that fails, and what no node has."""

import asyncio
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from async_cache.errors import BackendError
from async_cache.l2.backend import LoadOutcome
from async_cache.l2.valkey.backend import ValkeyBackend
from async_cache.l2.valkey.names import Names, slot_of
from async_cache.testing.conformance import content, find, get, key, put

from .servers import Cluster, Server, running_cluster
from .support import eventually, opened

LOADED, GONE, CORRUPT, FAILED = LoadOutcome
SIZE = 50_000
NAMES = Names("akv")


@pytest.fixture
def replicated(tmp_path: Path) -> Iterator[Cluster]:
    """Three masters with a replica each, for one test."""
    with running_cluster(tmp_path / "cluster", replicas=True) as cluster:
        yield cluster


async def migrate(cluster: Cluster, slot: int, source: Server, target: Server, pause: asyncio.Event | None) -> None:
    """Move a slot with its keys, as `valkey-cli --cluster reshard` does; `pause` is waited for half way."""
    source_id, target_id = await cluster.id_of(source), await cluster.id_of(target)
    await target.say("CLUSTER", "SETSLOT", slot, "IMPORTING", source_id)
    await source.say("CLUSTER", "SETSLOT", slot, "MIGRATING", target_id)
    keys = await source.say("CLUSTER", "GETKEYSINSLOT", slot, 1000)
    assert isinstance(keys, list)
    for name in keys:
        assert isinstance(name, bytes)
        await source.say("MIGRATE", "127.0.0.1", target.port, name, 0, 5000)
    if pause is not None:
        await pause.wait()
    for server in (target, source):
        await server.say("CLUSTER", "SETSLOT", slot, "NODE", target_id)


async def test_objects_are_where_the_cluster_looks_for_them(cluster: Cluster) -> None:
    for server in cluster.masters:
        await server.say("FLUSHALL")
    async with opened(f"valkey+cluster://{cluster.hosts}") as backend:
        assert await put(backend, range(60), SIZE) == [True] * 60
        for n in range(60):
            assert await cluster.masters[0].say("CLUSTER", "KEYSLOT", NAMES.of(key(n))) == slot_of(key(n))
            assert await cluster.master_of(slot_of(key(n))).say("EXISTS", NAMES.of(key(n))) == 1
        assert {slot_of(key(1, rank, group)) for rank in range(8) for group in range(4)} == {slot_of(key(1))}
        counts = [await server.say("DBSIZE") for server in cluster.masters]
        assert all(counts) and sum(map(int, counts)) == 60  # type: ignore[arg-type]


async def test_any_node_is_enough_to_find_the_others(cluster: Cluster) -> None:
    last = cluster.masters[-1].port
    async with opened(f"valkey+cluster://127.0.0.1:1,127.0.0.1:{last},127.0.0.1:2") as backend:
        await put(backend, range(20), SIZE)
        assert await get(backend, range(20), SIZE) == [content(n, SIZE) for n in range(20)]


async def test_a_node_of_a_cluster_asked_as_a_single_server_says_what_to_do(cluster: Cluster) -> None:
    async with opened(f"valkey://127.0.0.1:{cluster.masters[0].port}") as backend:
        elsewhere = [n for n in range(100) if cluster.master_of(slot_of(key(n))) is not cluster.masters[0]][:3]
        with pytest.raises(BackendError, match=r"\+cluster"):
            await find(backend, elsewhere)


async def test_a_slot_that_moves_is_followed_in_every_state(cluster: Cluster) -> None:
    async with opened(f"valkey+cluster://{cluster.hosts}") as backend:
        source = cluster.master_of(slot_of(key(1005)))
        target = next(server for server in cluster.masters if server is not source)
        keys = [key(1005, rank) for rank in range(6)]
        blobs = [memoryview(content(rank, SIZE)) for rank in range(6)]
        await backend.delete(keys)
        assert await backend.store(keys[:4], blobs[:4]) == [True] * 4
        half_way = asyncio.Event()
        moving = asyncio.ensure_future(migrate(cluster, slot_of(key(1005)), source, target, half_way))
        while await target.say("CLUSTER", "COUNTKEYSINSLOT", slot_of(key(1005))) != 4:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        for _ in range(2):  # first by ASK, then by MOVED
            buffers = [bytearray(SIZE) for _ in keys]
            assert await backend.lookup(keys) == [True] * 4 + [False] * 2
            assert await backend.load(keys, list(map(memoryview, buffers))) == [LOADED] * 4 + [GONE] * 2
            assert buffers[:4] == blobs[:4]
            assert await backend.store(keys[4:], blobs[4:]) == [True] * 2
            assert await backend.delete(keys[4:]) == 2
            half_way.set()
            await moving
        assert await backend.delete(keys) == 4
        await migrate(cluster, slot_of(key(1005)), target, source, None)


async def use(backend: ValkeyBackend, numbers: range, rng: random.Random, stop: asyncio.Event) -> tuple[int, int]:
    """Store, load and delete until told to stop; every byte is checked. How much was right, how often it failed."""
    right = failed = 0
    while not stop.is_set():
        some = rng.sample(numbers, 8)
        try:
            await put(backend, some, SIZE)
            for n, one in zip(some, await get(backend, some, SIZE), strict=True):
                assert one in (content(n, SIZE), GONE, FAILED)
                right += one == content(n, SIZE)
            if rng.random() < 0.2:
                await backend.delete([key(n) for n in some[:2]])
        except BackendError:
            failed += 1
            await asyncio.sleep(0.01)
        await asyncio.sleep(0)
    return right, failed


async def test_slots_move_under_load_and_nobody_notices(cluster: Cluster) -> None:
    async with opened(f"valkey+cluster://{cluster.hosts}") as backend:
        numbers = range(40)
        await put(backend, numbers, SIZE)
        stop = asyncio.Event()
        users = [asyncio.ensure_future(use(backend, numbers, random.Random(n), stop)) for n in range(3)]
        for n in numbers[:12]:
            source = cluster.master_of(slot_of(key(n)))
            target = cluster.masters[(cluster.masters.index(source) + 1) % 3]
            await migrate(cluster, slot_of(key(n)), source, target, None)
            await migrate(cluster, slot_of(key(n)), target, source, None)
        stop.set()
        results = await asyncio.gather(*users)
        assert sum(right for right, _ in results) > 100
        assert sum(failed for _, failed in results) == 0


async def test_a_master_that_dies_is_replaced_by_its_replica_under_load(replicated: Cluster) -> None:
    async with opened(f"valkey+cluster://{replicated.hosts}?connect_timeout=0.5") as backend:
        numbers = range(40)
        assert all(await put(backend, numbers, SIZE))
        for server in replicated.masters:
            await server.say("WAIT", 1, 5000)
        stop = asyncio.Event()
        users = [asyncio.ensure_future(use(backend, numbers, random.Random(n), stop)) for n in range(3)]
        dead = replicated.masters[1]
        dead.kill()
        others = [n for n in numbers if replicated.master_of(slot_of(key(n))) is not dead]
        lost = [n for n in numbers if n not in others]
        assert all(isinstance(one, bytes) or one is GONE for one in await get(backend, others, SIZE))

        async def is_back() -> bool:
            try:
                return all(await put(backend, lost, SIZE)) and FAILED not in await get(backend, lost, SIZE)
            except BackendError:
                return False

        async with asyncio.timeout(100):
            while not await is_back():  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        stop.set()
        await asyncio.gather(*users)
        await put(backend, numbers, SIZE)
        assert await get(backend, numbers, SIZE) == [content(n, SIZE) for n in numbers]
        assert len([entry async for entry in backend.keys()]) >= len(numbers)


async def test_a_cluster_that_is_away_is_found_when_it_is_back(tmp_path: Path) -> None:
    with running_cluster(tmp_path / "cluster") as cluster:
        async with opened(f"valkey+cluster://{cluster.hosts}") as backend:
            assert all(await put(backend, range(9), SIZE))
            for server in cluster.masters:
                server.stop()
            for server in cluster.masters:
                server.kill()
            for _ in range(3):
                with pytest.raises(BackendError, match="valkey\\+cluster"):
                    await find(backend, range(9))
            for server in cluster.masters:
                server.start()
            loop = asyncio.get_running_loop()
            begin = loop.time()

            async def is_back() -> bool:
                try:
                    return all(await put(backend, range(9), SIZE))
                except BackendError:
                    return False

            while not await is_back():
                assert loop.time() - begin < 100
                await asyncio.sleep(0.02)
            assert await get(backend, range(9), SIZE) == [content(n, SIZE) for n in range(9)]
            await eventually(lambda: backend.usage().objects == 9)
