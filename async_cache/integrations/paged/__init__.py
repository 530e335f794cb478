"""What engines have in common that keep KV in pages: blocks of a few tokens, found through a table.

orders     the orders of the scheduler's process to the workers', and where a chunk lies in pages
saves      how the scheduler's process hears, also between steps, that saves have ended
records    the scheduler's record of a request, from its lookup to its end
reports    what lookups came to, and what the server's events say of an engine's blocks
wishes     what a request says of its own future
resets     the emptying of the server, at once or as soon as it is possible
scheduler  `PagedScheduler`: looks prompts up, decides when a load is worth its blocks, says what is to be saved
device     `Device`: the protocol of what copies between pages and host memory, beside what an engine computes
host       `HostDevice`: that of an engine on a CPU
rows       pages as rows of bytes, by what their tensors say of themselves
pins       host memory that a GPU can copy from and to by itself
lanes      copies of one direction between the pages of a GPU and the host, through a ring of staging slots
cuda       `CudaDevice`: that of an engine on a GPU. Nothing of it has run on one
copies     `Copies`: loads and saves, chunk by chunk, with a client and a device
worker     `PagedWorker`: the same in a thread of its own, for an engine that waits for nothing
"""

from async_cache.integrations.paged.device import Copy, Device, DeviceError
from async_cache.integrations.paged.host import HostDevice
from async_cache.integrations.paged.orders import Geometry, LoadOrder, Orders, Pages, SaveOrder, Tables
from async_cache.integrations.paged.records import EngineRequest
from async_cache.integrations.paged.scheduler import PagedScheduler
from async_cache.integrations.paged.wishes import Wishes, wishes_of
from async_cache.integrations.paged.worker import AbsentWorker, PagedWorker

__all__ = [
    "AbsentWorker",
    "Copy",
    "Device",
    "DeviceError",
    "EngineRequest",
    "Geometry",
    "HostDevice",
    "LoadOrder",
    "Orders",
    "PagedScheduler",
    "PagedWorker",
    "Pages",
    "SaveOrder",
    "Tables",
    "Wishes",
    "wishes_of",
]
