"""The plugin of pytest, in a project of somebody else: a scheduler whose patience is tested without waiting for it."""

import subprocess
import sys
from pathlib import Path

CONFTEST = 'pytest_plugins = ["async_cache.testing.plugin"]\n'
TEST = '''
import asyncio

from async_cache import AsyncCache, CacheConfig, ModelLayout, ObjectGroup, Shortfall
from async_cache.l2.memory import MemoryBackend
from async_cache.testing import ThrottledBackend

LAYOUT = ModelLayout("toy", (ObjectGroup((64,), "uint8"),), chunk_tokens=4)
PROMPT = LAYOUT.prompt(range(8))


async def schedule(cache, patience_seconds):
    """Takes what is there in time, and how long that took."""
    prefetch = cache.prefetch(PROMPT, deadline_seconds=patience_seconds)
    result = await prefetch.load_done
    return result.chunks, result.shortfall, asyncio.get_running_loop().time()


def test_a_slow_store_is_waited_for_no_longer_than_that(virtual_time):
    async def main():
        backend = ThrottledBackend(MemoryBackend(), latency_seconds=600)
        timeouts = dict.fromkeys(("lookup_timeout_seconds", "load_timeout_seconds", "store_timeout_seconds"), 3600)
        config = CacheConfig(l1_bytes=2**20, **timeouts)
        async with AsyncCache(config, [backend]) as cache:
            async with cache.store(PROMPT) as writer:
                for chunk in writer:
                    chunk.commit()
            await cache.flush()
            await cache.clear("l1")
            began = asyncio.get_running_loop().time()
            chunks, shortfall, at = await schedule(cache, 900)
            assert (chunks, shortfall, round(at - began)) == (0, Shortfall.DEADLINE, 900)

    virtual_time(main())
'''


def test_it_gives_a_project_virtual_time(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "test_scheduler.py").write_text(TEST)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=150, check=False)
    assert "1 passed" in done.stdout, done.stdout
