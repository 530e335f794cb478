"""A thread of one's own: the loop's default executor is everybody's, and may be full of what blocks."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


class Worker:
    """One thread for short work that would hold the loop. It is started with the first call."""

    def __init__(self, name: str):
        self._executor = ThreadPoolExecutor(1, name)

    async def run(self, work: Callable[[], T]) -> T:
        """Do work in the thread. Where the caller is cancelled, what has begun ends all the same.

        Raises RuntimeError after `close`.
        """
        return await asyncio.get_running_loop().run_in_executor(self._executor, work)

    def close(self, *, wait: bool = False) -> None:
        """Begin nothing more. The thread ends after what it was given; to `wait` for that is for other threads."""
        self._executor.shutdown(wait=wait)
