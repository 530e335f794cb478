"""A backend as the cache sees it: what stands before each, and which there are.

guard    one backend: every call ends, counts once, and is metered
breaker  leaves a failing backend alone for a while
fair     queues that the owners of chunks share
meter    what is queued for a backend, and how fast it is
guards   the backends of a cache, which may come and go
"""

from async_cache.l2.guard.guard import Call, CallTimeoutError, Guard, Listing

__all__ = ["Call", "CallTimeoutError", "Guard", "Listing"]
