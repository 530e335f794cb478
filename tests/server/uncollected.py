"""A server whose garbage is not collected, as a program: `python -m server.uncollected serve ...`.

On SIGUSR1 it says, as a line of JSON, how many objects wait for a collection, by their types.
"""

import gc
import json
import signal
from collections import Counter
from contextlib import asynccontextmanager

from async_cache.cli import app as cli
from async_cache.server import process

from .programs import say


@asynccontextmanager
async def collecting_nothing():
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    yield


def tell(*_):
    gc.collect()
    say(json.dumps(Counter(type(found).__name__ for found in gc.garbage)))
    gc.garbage.clear()


if __name__ == "__main__":
    process.collecting_briefly = collecting_nothing
    signal.signal(signal.SIGUSR1, tell)
    cli.main()
