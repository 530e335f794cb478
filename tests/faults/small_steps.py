"""What is done in steps for very much, done in steps for everything: so others come in between, wherever they may."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

STEPS = (
    "aio.backlog.FEW",
    "l1.store._AT_ONCE",
    "read.explain._OBJECTS_AT_ONCE",
    "read.batches._FEW_OBJECTS",
    "read.batches._FIRST_CHUNKS",
    "read.batches._MANY_CHUNKS",
    "read.decision._CAUGHT_UP_AT_ONCE",
    "read.decision._LOOKED_UP_AT_ONCE",
    "read.hits._AT_ONCE",
    "read.loads._RELEASED_AT_ONCE",
    "read.loads._SETTLED_AT_ONCE",
    "read.loads._TOLD_AT_ONCE",
    "read.lookup._TOUCHED_AT_ONCE",
    "read.lookup._UNPINNED_AT_ONCE",
    "read.plan._BLOCKS_AT_ONCE",
    "read.plan._EVICTED_AT_ONCE",
    "read.plan._PLANNED_AT_ONCE",
    "read.requests._ENTERED_AT_ONCE",
    "read.filling._LOOKED_AT_ONCE",
    "read.progress._TOLD_AT_ONCE",
    "read.search._AT_ONCE",
    "read.search._FEW_CHUNKS",
    "read.search._SECOND_CHUNKS",
    "read.streams._GIVEN_AT_ONCE",
    "write.removal._AT_ONCE",
    "write.retained._AT_ONCE",
    "write.deletions._LOOKED_UP_AT_ONCE",
    "write.removal._NAMED_AT_ONCE",
    "write.removal._SELECTED_AT_ONCE",
    "write.writing._AT_ONCE",
    "write.writing._DISCARDED_AT_ONCE",
    "write.writing._ENQUEUED_AT_ONCE",
    "write.writing._RESERVED_AT_ONCE",
)


@contextmanager
def small_steps(size: int = 1) -> Iterator[None]:
    """Within the block, a step of the loop does no more than this."""
    with ExitStack() as stack:
        for name in STEPS:
            stack.enter_context(patch(f"async_cache.{name}", size))
        yield
