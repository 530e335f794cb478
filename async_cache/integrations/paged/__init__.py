"""What the engines have in common whose KV lies in pages: blocks of a few tokens, found through a table.

orders     what the scheduler's process tells the workers', and where a chunk lies in pages
scheduler  `PagedScheduler`: looks prompts up, decides when a load is worth its blocks, says what is to be saved
worker     `PagedWorker`: copies between leases and pages, behind the forward pass
"""

from async_cache.integrations.paged.orders import Geometry, LoadOrder, Orders, Pages, SaveOrder
from async_cache.integrations.paged.scheduler import EngineRequest, PagedScheduler
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
