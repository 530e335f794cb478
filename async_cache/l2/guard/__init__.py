"""A backend as the cache sees it: what stands before each, and which there are.

guard     one backend: every call ends, counts once, and is metered
told      what it is told, and says at once: what it raises then is logged
call      one call to it
listing   all that it holds, part by part
breaker   leaves a failing backend alone for a while
failures  what failed in a row, and for how many reasons
fair      queues that the owners of chunks share
budget    how much may be written to a backend in a day
meter     what is queued for a backend, and how fast it is
guards    the backends of a cache, which may come and go
"""

from async_cache.l2.guard.call import Call, CallTimeoutError
from async_cache.l2.guard.guard import Guard
from async_cache.l2.guard.listing import Listing

__all__ = ["Call", "CallTimeoutError", "Guard", "Listing"]
