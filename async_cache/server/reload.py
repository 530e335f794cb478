"""`Reload`: one step that reads the settings anew, and uses those that are live."""

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

import aiofiles
import msgspec

from async_cache.cache import AsyncCache
from async_cache.config import CacheConfig, ServerConfig, Settings, hide_password
from async_cache.errors import AsyncCacheError, ConfigError
from async_cache.l2.urls.registry import from_urls
from async_cache.server.server import Server

log = logging.getLogger(__name__)

_SETTLED_SECONDS = 0.1  # for which a file says the same before it is believed
_MOST_READS = 50
_READ_SECONDS = 20.0

S = TypeVar("S", bound=Settings)


class Source(NamedTuple):
    """Where settings come from: the file that is changed, and what reads it, and the rest. That raises ConfigError."""

    path: Path
    read: Callable[[], tuple[CacheConfig, ServerConfig]]


class Reloaded(NamedTuple):
    """The settings that were changed: those that are used from now on, and those that wait for a restart."""

    changed: list[str]
    waiting: list[str]


class Reload:
    """Reads the settings of a server that runs anew, and has it use what is live of them.

    What cannot be used changes nothing: not one setting of it. Nor does a file that somebody is in the middle of
    writing: an empty one would have no tenants.
    """

    def __init__(
        self, source: Source, cache: AsyncCache, server: Server, cache_config: CacheConfig, config: ServerConfig
    ):
        self._source = source
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
        try:
            async with asyncio.timeout(_READ_SECONDS):  # by threads: a file may be on a disk that does not answer
                await settled(self._source.path)
                cache_config, config = await asyncio.to_thread(self._source.read)
        except TimeoutError as error:
            raise ConfigError(f"{self._source.path} cannot be read within {_READ_SECONDS:g} s") from error
        await self._server.renew_certificates()
        cache_live, cache_waiting = _changes(self._cache_config, cache_config)
        live, waiting = _changes(self._config, config)
        if {"record", "record_bytes"} & set(live):
            await self._server.record(config)
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


async def settled(path: Path) -> None:
    """Return when a file says the same for a while, or is not there: whoever writes it may be in the middle of that."""
    said = await _bytes_of(path)
    for _ in range(_MOST_READS):
        await asyncio.sleep(_SETTLED_SECONDS)
        before, said = said, await _bytes_of(path)
        if before == said:
            return


async def _bytes_of(path: Path) -> bytes | None:
    try:
        async with aiofiles.open(path, "rb") as file:
            return await file.read()
    except OSError:
        return None


async def reload_or_say_why(reload: Reload) -> None:
    """Reload, for nobody who waits for it: what is wrong is a line in the log, and the server goes on as before."""
    try:
        await reload()
    except AsyncCacheError as error:
        log.error("settings are as they were: %s", hide_password(str(error)))
    except Exception:
        log.exception("settings could not be read anew")
