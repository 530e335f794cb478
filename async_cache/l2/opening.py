"""Opens backends, each in its time, all or none."""

import asyncio
from collections.abc import Sequence

from async_cache.config import CacheConfig
from async_cache.errors import BackendError, ConfigError
from async_cache.l2.backend import Backend


async def open_all(backends: Sequence[Backend], config: CacheConfig) -> None:
    """Open backends one after the other. Where one cannot, all that began to open are closed again.

    Raises the ConfigError or BackendError of a backend; BackendError for whatever else it raises, and for one that is
    not open within its `load_timeout`.
    """
    openings: dict[Backend, asyncio.Task[None]] = {}
    try:
        for backend in backends:
            timeout = backend.limits.load_timeout_seconds or config.load_timeout_seconds
            openings[backend] = opening = asyncio.create_task(backend.open())
            await asyncio.wait((opening,), timeout=timeout)
            if not opening.done():
                raise BackendError(f"{backend.name} was not open within {timeout} s")
            _check_opened(backend, opening)
    except BaseException:
        for opening in openings.values():
            opening.cancel()
        ends = [*openings.values(), *(asyncio.create_task(backend.close()) for backend in openings)]
        for end in ends:
            end.add_done_callback(lambda end: end.cancelled() or end.exception())  # looked at: one error is enough
        _, stuck = await asyncio.wait(ends, timeout=config.close_timeout_seconds)
        for end in stuck:
            end.cancel()
        raise


def _check_opened(backend: Backend, opening: "asyncio.Task[None]") -> None:
    """Raise what a backend that could not be opened raised: as an error of ours, whatever it was."""
    if opening.cancelled():
        raise BackendError(f"{backend.name} gave up while it was opened")
    error = opening.exception()
    if isinstance(error, ConfigError | BackendError):
        raise error
    if error is not None:
        raise BackendError(f"{backend.name} cannot be opened: {error!r}") from error
