"""What engines have in common that keep KV in pages: blocks of a few tokens, found through a table.

orders     the orders of the scheduler's process to the workers', and where a chunk lies in pages
saves      how the scheduler's process hears, also between steps, that saves have ended
records    the scheduler's record of a request, from its lookup to its end
reports    what lookups came to, and what the server's events say of an engine's blocks
resets     the emptying of the server, at once or as soon as it is possible
scheduler  `PagedScheduler`: looks prompts up, decides when a load is worth its blocks, says what is to be saved
worker     `PagedWorker`: copies between leases and pages, behind the forward pass
"""

from async_cache.integrations.paged.orders import Geometry, LoadOrder, Orders, Pages, SaveOrder
from async_cache.integrations.paged.records import EngineRequest
from async_cache.integrations.paged.scheduler import PagedScheduler
from async_cache.integrations.paged.worker import PagedWorker

__all__ = [
    "EngineRequest",
    "Geometry",
    "LoadOrder",
    "Orders",
    "PagedScheduler",
    "PagedWorker",
    "Pages",
    "SaveOrder",
]
