"""Where something was opened, as it is seen from threads, other loops and forked children."""

import asyncio
import os
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import uvloop

from async_cache.aio.home import Home

_FORKED = """
import asyncio, os, sys
import uvloop
from async_cache.aio.home import Home

async def look(home):
    return home.is_elsewhere()

async def main():
    home = Home()
    child = os.fork()
    if not child:
        asyncio._set_running_loop(None)  # as it is from Python 3.12 on
        os._exit([asyncio, uvloop][sys.argv[1] == "uvloop"].run(look(home)) + 2 * home.is_elsewhere())
    assert not home.is_elsewhere()
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))

[asyncio, uvloop][sys.argv[1] == "uvloop"].run(main())
"""

Run = Callable[[Any], Any]


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run])
def test_only_another_loop_is_elsewhere(run: Run) -> None:
    async def look(home: Home) -> bool:
        return home.is_elsewhere()

    async def main() -> Home:
        home = Home()
        assert not home.is_elsewhere()
        assert await asyncio.to_thread(home.is_elsewhere), "a thread without a loop, beside the one that runs"
        assert await asyncio.to_thread(lambda: run(look(home)))
        return home

    home = run(main())
    assert not home.is_elsewhere(), "the loop is closed, and none runs"
    assert run(look(home)), "another one in the same thread"
    seen: list[bool] = []
    thread = threading.Thread(target=lambda: seen.append(home.is_elsewhere()))
    thread.start()
    thread.join()
    assert seen == [False], "no loop runs anywhere"


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
async def test_all_of_a_forked_child_is_elsewhere_though_its_thread_is_the_same_and_without_a_loop(loop: str) -> None:
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", _FORKED, loop, env=dict(os.environ))
    assert await process.wait() == 1 + 2
