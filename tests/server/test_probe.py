"""What holds the event loop is seen, with where, and what it only waits for is told apart."""

import asyncio
import time

from async_cache import ModelLayout, ObjectGroup, connect
from async_cache.server.probe import Probe

from .programs import server

LAYOUT = ModelLayout("m", (ObjectGroup((16,), "uint8"),), chunk_tokens=1)


async def looked(probe, until):
    for _ in range(2000):
        if until(probe):
            return
        await asyncio.sleep(0.05)  # to look more often would be something to do
    raise AssertionError(f"{probe.recent}, {probe.longest}")


async def test_what_computes_in_the_loop_is_seen_with_its_place():
    probe = Probe()
    probe.open()
    try:
        await looked(probe, lambda probe: probe._latest)
        before = probe.held
        prompt = LAYOUT.prompt(range(300_000))
        began = time.thread_time()
        prompt.hash()
        computed = time.thread_time() - began
        await looked(probe, lambda probe: probe.longest.busy_seconds > computed / 2)
        assert probe.held > before and probe.recent == probe.longest
        assert "prompt/" in probe.longest.where, probe.longest
    finally:
        probe.close()


async def test_a_loop_that_only_waits_has_not_computed():
    probe = Probe()
    probe.open()
    try:
        await looked(probe, lambda probe: probe._latest)
        seen = []
        probe._note = seen.append
        time.sleep(0.3)  # noqa: ASYNC251
        await looked(probe, lambda probe: any(hold.seconds > 0.2 for hold in seen))
        assert max(hold.busy_seconds for hold in seen if hold.seconds > 0.2) < 0.1
    finally:
        probe.close()


async def test_a_loop_that_has_nothing_to_do_is_asked_less_often_until_it_has():
    probe, waits = Probe(), []
    stopped = probe._stop.wait
    probe._stop.wait = lambda seconds: waits.append(seconds) or stopped(seconds)
    probe.open()
    try:
        await looked(probe, lambda _: 0.08 in waits)
        del waits[:]
        while not waits or waits[-1] > 0.01:
            sum(range(100_000))
            await asyncio.sleep(0)
    finally:
        probe.close()


async def test_a_server_tells_of_its_loop(tmp_path):
    with server(tmp_path) as served:
        async with connect(served.url) as client:
            for _ in range(10_000):
                hold = (await client.stats()).hold
                if hold is not None and hold.seconds:
                    break
                await asyncio.sleep(0.01)
            assert hold is not None and hold.seconds > 0
