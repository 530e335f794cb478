"""Recovery: what is in the directory at the start becomes known, the newest first, while all else goes on."""

import logging
from contextlib import suppress

from async_cache.l2.filesystem.directory import Directory
from async_cache.l2.filesystem.following import Following
from async_cache.l2.filesystem.rewriting import Rewriting
from async_cache.l2.filesystem.work import Threads

logger = logging.getLogger(__name__)


async def recover(directory: Directory, following: Following, rewriting: Rewriting, threads: Threads) -> None:
    """Learn what is in the directory, as older than all that was used since the start.

    What very many dead writers left is taken over part by part.
    """
    writers = directory.writers
    learned: set[str] = set()
    try:
        while journals := [journal for journal in writers.all() if journal.name not in learned]:
            for journal in sorted(journals, key=lambda each: each.changed_ns, reverse=True):
                await following.learn_all(journal)
            learned |= {journal.name for journal in journals}
            following.answer_for_all()
            following.complete = not writers.has_unread
            with suppress(OSError):
                await following.sweep()
            await rewriting.fold()
            if following.complete:
                break
            await threads.run(threads.scans, writers.adopt_more)  # none, where there is no room to fold the others
        following.is_old()
    except Exception:  # the root of a task; what is not indexed is stored anew
        logger.exception("%s: recovery failed", directory.name)
    finally:
        following.recovered.set()
