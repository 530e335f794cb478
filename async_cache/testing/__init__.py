"""Tools for tests of a cache, and of a backend.

    backends     backends that wait at a gate, run at a set speed, fail the Nth call, or flip a bit
    conformance  the suite that admits a backend: subclass `BackendSuite`
    plugin       for pytest: the fixture `virtual_time`
    proxy        a TCP proxy that delays, throttles, stalls, cuts and resets
    virtual      `run_virtual` runs a coroutine on a clock that jumps

The backends and the proxy are exported here. The others need the extra `async-kv-cache[testing]`, so they are
imported from their own modules.
"""

from async_cache.testing.backends import (
    BitFlipBackend,
    FailingBackend,
    GatedBackend,
    ThrottledBackend,
    Verb,
    WrappedBackend,
    flip_bit,
)
from async_cache.testing.proxy import Proxy

__all__ = [
    "BitFlipBackend",
    "FailingBackend",
    "GatedBackend",
    "Proxy",
    "ThrottledBackend",
    "Verb",
    "WrappedBackend",
    "flip_bit",
]
