"""The suite that admits a backend: what `Backend` promises, one test for each promise.

    class TestMine(BackendSuite):
        async def make(self, tmp_path):
            return MyBackend(tmp_path)

The other methods are optional; the tests that need them are skipped without them. Needs `async-kv-cache[testing]`.

made     how the backends are made
stored   what is stored is loaded
missing  what is absent, deleted, damaged or unreadable
bounds   a full backend, and pins
calls    cancelled, and many at once
objects  objects that no other is like, and short ways to ask about them
"""

from async_cache.testing.conformance.bounds import Bounds
from async_cache.testing.conformance.calls import Calls
from async_cache.testing.conformance.missing import Missing
from async_cache.testing.conformance.objects import (
    CANARY,
    CANCEL_AFTER_STEPS,
    MIB,
    cancelled_after,
    content,
    find,
    get,
    holds_the_loop,
    key,
    load_sized,
    put,
    views,
)
from async_cache.testing.conformance.stored import Stored


class BackendSuite(Stored, Missing, Bounds, Calls):
    """The tests that every backend passes: name a subclass `Test...`, and say there how to make the backend."""


__all__ = [
    "CANARY",
    "CANCEL_AFTER_STEPS",
    "MIB",
    "BackendSuite",
    "cancelled_after",
    "content",
    "find",
    "get",
    "holds_the_loop",
    "key",
    "load_sized",
    "put",
    "views",
]
