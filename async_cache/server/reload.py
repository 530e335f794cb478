"""`Reload`: one step that reads the settings anew, and uses those that are live."""

import asyncio
import logging
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import msgspec

from async_cache.cache import AsyncCache
from async_cache.config import CacheConfig, ServerConfig, Settings, hide_password
from async_cache.errors import AsyncCacheError
from async_cache.l2.urls.registry import from_urls
from async_cache.server.server import Server

log = logging.getLogger(__name__)

S = TypeVar("S", bound=Settings)
Read = Callable[[], tuple[CacheConfig, ServerConfig]]
"""Reads the settings, as they are now. Raises ConfigError."""


class Reloaded(NamedTuple):
    """The settings that were changed: those that are used from now on, and those that wait for a restart."""

    changed: list[str]
    waiting: list[str]


class Reload:
    """Reads the settings of a server that runs anew, and has it use what is live of them.

    What cannot be used changes nothing: not one setting of it.
    """

    def __init__(self, read: Read, cache: AsyncCache, server: Server, cache_config: CacheConfig, config: ServerConfig):
        self._read = read
        self._cache = cache
        self._server = server
        self._cache_config, self._config = cache_config, config
        self._alone = asyncio.Lock()

    async def __call__(self) -> Reloaded:
        """Do it, one at a time.

        Raises ConfigError for settings that cannot be used, BackendError for a backend that does not open.
        """
        async with self._alone:
            return await self._reload()

    async def _reload(self) -> Reloaded:
        cache_config, config = self._read()
        cache_live, cache_waiting = _changes(self._cache_config, cache_config)
        live, waiting = _changes(self._config, config)
        if "l2" in cache_live:
            await self._change_backends(cache_config)
        self._cache_config = _with(self._cache_config, cache_config, cache_live)
        self._config = _with(self._config, config, live)
        if cache_live:
            core = self._cache.core
            core.reconfigure(_with(core.config, cache_config, cache_live))
        if live:
            self._server.reconfigure(self._config)
            logging.getLogger().setLevel(self._config.log_level.upper())
        sections = [f"{config.SECTION}.{name}" for name in live], [f"{config.SECTION}.{name}" for name in waiting]
        reloaded = Reloaded(cache_live + sections[0], cache_waiting + sections[1])
        _tell(reloaded)
        return reloaded

    async def _change_backends(self, config: CacheConfig) -> None:
        """Remove the backends that are not in the settings any more, and add those that are new, each at its place.

        Those that were added by a command are in no settings, and stay.
        """
        before, after = self._cache_config.l2, config.l2
        old = {backend.name for backend in from_urls([url for url in before if url not in after])}
        for name in old & {status.name for status in await self._cache.backends()}:
            await self._cache.remove_backend(name)
        there = len(self._cache.core.guards.current)
        for position, url in enumerate(after):
            if url not in before:
                await self._cache.add_backend(url, position=min(position, there))
                there += 1


def _with(before: S, after: S, names: list[str]) -> S:
    """The settings from before, with these as they are now: what waits for a restart stays as it is until then."""
    return msgspec.structs.replace(before, **{name: getattr(after, name) for name in names})


def _changes(before: Settings, after: Settings) -> tuple[list[str], list[str]]:
    """The names of settings that differ: of those that are live, and of the others."""
    changed = [name for name in before.__struct_fields__ if getattr(before, name) != getattr(after, name)]
    at_start = before.AT_START
    return [name for name in changed if name not in at_start], [name for name in changed if name in at_start]


def _tell(reloaded: Reloaded) -> None:
    if reloaded.changed:
        log.info("settings are changed: %s", ", ".join(reloaded.changed))
    if reloaded.waiting:
        log.warning("settings wait for a restart: %s", ", ".join(reloaded.waiting))
    if not reloaded.changed and not reloaded.waiting:
        log.info("settings are as they were")


async def reload_or_say_why(reload: Reload) -> None:
    """Reload, for nobody who waits for it: what is wrong is a line in the log, and the server goes on as before."""
    try:
        await reload()
    except AsyncCacheError as error:
        log.error("settings are as they were: %s", hide_password(str(error)))
    except Exception:
        log.exception("settings could not be read anew")
