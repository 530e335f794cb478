"""Objects in Mooncake Store: a pool of the memory of many hosts, reached by RDMA or TCP."""

import asyncio
import logging
import mmap
import os
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import suppress
from importlib.util import find_spec
from typing import Any, Self

from async_cache.config import parse_bytes
from async_cache.errors import BackendError, ConfigError
from async_cache.l2.backend import Backend, LoadOutcome, check_lengths, telling
from async_cache.l2.faults import Faults
from async_cache.l2.index import Index
from async_cache.l2.mooncake.calls import Find, ListAll, Load, Page, Place, Remove, Setup, Store
from async_cache.l2.mooncake.process import HelperProcess
from async_cache.l2.mooncake.views import address
from async_cache.l2.urls.url import BackendURL, one_of, whole_number
from async_cache.prompt.keys import ObjectKey
from async_cache.values import BackendUsage, Removal

log = logging.getLogger(__name__)

PORT = 50051
METRICS_PORT = 9003
STAGING_BYTES = 256 * 2**20  # address space; only what is used of it is memory
STEP_BYTES = 2**20  # copied in one step of the loop
SETUP_SECONDS = 20.0  # registering a large L1 takes some; what hangs is killed, and started again
SLICE = 256  # objects whose sizes are asked for at a time
_MOST_KNOWN = 1_000_000  # objects that usage counts
LOAD_BYTES = 64 * 2**20  # asked of the helper at a time: if it dies, what came before has come
_STAGING, _ARENA = 0, 1  # the files of a Place

# Of Mooncake's `ErrorCode`: what is said of an object, and not of the master or the network.
_NO_ROOM = -200
_NOT_FOUND = -704
_FIRST_FAULT = -800  # transfer failed; -900 and below: no answer of the master


class MooncakeBackend(Backend):
    """The objects of one namespace in the pool of a Mooncake master. They leave by the master's rules.

    What a lookup finds is leased by the master for a time that it sets (10 s by default): that is the pin, and it
    cannot be given back earlier. What has left since its lookup is GONE. With `segment_bytes`, this host gives so much
    memory to the pool. `host` is the address by which the others reach this host.

    Raises ConfigError where `mooncake` is not installed, or cannot be imported.
    """

    shared = True

    def __init__(
        self,
        master: str,
        *,
        namespace: str = "akv",
        host: str | None = None,
        metadata: str = "P2PHANDSHAKE",
        segment_bytes: int = 0,
        protocol: str = "tcp",
        devices: str = "",
        replicas: int = 1,
        threads: int = 2,
        metrics_port: int = METRICS_PORT,
    ):
        if find_spec("mooncake") is None:
            raise ConfigError("mooncake:// needs async-kv-cache[mooncake], which is not installed")
        self.name = f"mooncake://{master}/{namespace}"
        self._setup = Setup(
            master, metrics_port, namespace, host, metadata, segment_bytes, protocol, devices, replicas, threads
        )
        self._arena: tuple[int, int, int] | None = None  # its descriptor, where it begins here, and its size
        self._known = Index(on_removed=telling(self))
        self._faults = Faults()
        self._helper: HelperProcess | None = None
        self._connecting: asyncio.Task[HelperProcess] | None = None
        self._mapped: list[bool] = []  # empty until the helper is a client of the pool
        self._staging: tuple[int, mmap.mmap] | None = None

    @classmethod
    def from_url(cls, url: BackendURL) -> Self:
        """The backend of a URL `mooncake://host:port?namespace=akv`. Raises ConfigError."""
        if not url.hostname:
            raise ConfigError("the host of the master is missing")
        if url.path.strip("/") or url.username or url.password:
            raise ConfigError("a master has no path and no password")
        try:
            port = url.port if url.port is not None else PORT
        except ValueError as error:
            raise ConfigError(str(error)) from error
        if not port:
            raise ConfigError("a master has a port from 1 to 65535")
        parameters = url.parameters(
            namespace=_namespace,
            host=_word,
            metadata=_word,
            segment=parse_bytes,
            protocol=one_of(tcp="tcp", rdma="rdma"),
            devices=_word,
            replicas=whole_number(most=16),
            threads=whole_number(most=64),
            metrics_port=whole_number(most=65535),
        )
        parameters["segment_bytes"] = parameters.pop("segment", 0)
        hostname = f"[{url.hostname}]" if ":" in url.hostname else url.hostname
        return cls(f"{hostname}:{port}", **parameters)

    # Life.

    def register(self, fd: int, memory: memoryview) -> None:
        self._arena = (fd, address(memory), len(memory))

    async def open(self) -> None:
        """Start the helper. A master that is not there may come later."""
        self._turn = asyncio.Lock()
        fd = os.memfd_create("async_cache mooncake", os.MFD_CLOEXEC)
        os.ftruncate(fd, STAGING_BYTES)
        self._staging = fd, mmap.mmap(fd, STAGING_BYTES)
        try:
            await self._connected()
        except BackendError as error:
            log.warning("%s; it is tried again when it is needed", error, extra={"backend": self.name})
        except BaseException:
            await self.close()
            raise

    async def _connected(self) -> HelperProcess:
        """The helper, as a client of the pool; a new one, if the last one has ended. Raises BackendError."""
        helper = self._helper
        if helper is not None and self._mapped and not helper.has_ended:
            return helper
        if self._staging is None:
            raise BackendError(f"{self.name} is closed")
        if self._connecting is None or self._connecting.done():
            self._connecting = asyncio.create_task(self._connect(self._staging[0]), name=f"{self.name} connect")
            self._connecting.add_done_callback(lambda task: task.cancelled() or task.exception())
        return await asyncio.shield(self._connecting)  # it goes on without those who wait no longer

    async def _connect(self, staging: int) -> HelperProcess:
        if self._helper is None or self._helper.has_ended:
            self._helper, self._mapped = None, []  # so `close` knows that what is connecting has none yet
            files = [(staging, STAGING_BYTES)]
            if self._arena is not None:
                files.append((self._arena[0], self._arena[2]))
            self._helper = await HelperProcess.start(self.name, files)
        helper = self._helper
        asked = asyncio.ensure_future(helper.ask(self._setup))
        await asyncio.wait((asked,), timeout=SETUP_SECONDS)
        if not asked.done():  # it took longer once, in some thirty starts; why is not known
            await helper.kill()
        self._mapped = await asked
        return helper

    async def close(self) -> None:
        staging, self._staging = self._staging, None
        connecting, self._connecting = self._connecting, None
        is_member = bool(self._mapped and self._setup.segment_bytes)
        try:
            if connecting is not None and self._helper is None:
                connecting.cancel()
                await asyncio.wait((connecting,))
            helper, self._helper = self._helper, None
            self._mapped = []
            if helper is not None and is_member:
                await helper.close()  # the master is told that the memory goes
            elif helper is not None:
                await helper.kill()
            if connecting is not None:
                await asyncio.wait((connecting,))
        finally:
            if staging is not None:
                os.close(staging[0])
                with suppress(BufferError):  # whoever copies from it unmaps it by letting go
                    staging[1].close()
        while self._known.clear(SLICE):  # noqa: ASYNC110 (nothing is waited for)
            await asyncio.sleep(0)

    # Objects.

    async def lookup(self, keys: Sequence[ObjectKey]) -> list[bool]:
        codes = await self._ask(Find(list(keys)))
        if codes and max(codes) < 0:
            raise BackendError(f"{self.name}: the master does not answer (code {codes[0]})")
        self._drop([key for key, code in zip(keys, codes, strict=True) if code == 0], Removal.LOST)
        return [code == 1 and not self._faults.hides(key) for key, code in zip(keys, codes, strict=True)]

    def unpin(self, keys: Sequence[ObjectKey]) -> None:
        """Nothing: a lease ends by its time."""

    async def load(self, keys: Sequence[ObjectKey], buffers: Sequence[memoryview]) -> list[LoadOutcome]:
        told = await self._load_all(keys, buffers, may_be_shorter=False)
        return [found if isinstance(found, LoadOutcome) else LoadOutcome.LOADED for found in told]

    async def load_sized(self, keys: Sequence[ObjectKey], buffers: Sequence[memoryview]) -> list[int | LoadOutcome]:
        return await self._load_all(keys, buffers, may_be_shorter=True)

    async def _load_all(
        self, keys: Sequence[ObjectKey], buffers: Sequence[memoryview], *, may_be_shorter: bool
    ) -> list[int | LoadOutcome]:
        """The bytes of each object, or what became of it."""
        check_lengths(keys, buffers)
        if not keys:
            return []
        helper = await self._connected()
        told: list[int | LoadOutcome] = [LoadOutcome.FAILED] * len(keys)
        places = [self._place(buffer) for buffer in buffers]
        try:
            for piece in _pieces(places):
                call = Load([keys[n] for n in piece], list(piece.values()), may_be_shorter)
                for n, value in zip(piece, await helper.ask(call), strict=True):
                    told[n] = _parse(value)
            for n, place in enumerate(places):
                if place is None and len(buffers[n]) <= STAGING_BYTES:
                    told[n] = await self._load_staged(helper, keys[n], buffers[n], may_be_shorter)
        except BackendError:  # the helper has ended
            if told.count(LoadOutcome.FAILED) == len(told):
                raise
        self._note(keys, told)
        await self._remove_corrupt([key for key, found in zip(keys, told, strict=True) if found is LoadOutcome.CORRUPT])
        if told.count(LoadOutcome.FAILED) == len(told):
            raise BackendError(f"{self.name}: nothing could be read")
        return told

    def _note(self, keys: Sequence[ObjectKey], told: Sequence[int | LoadOutcome]) -> None:
        for key, found in zip(keys, told, strict=True):
            if isinstance(found, int):
                self._put(key, found)
                self._faults.over((key,))
            elif found is LoadOutcome.FAILED:
                self._faults.suspect((key,))
            else:
                self._drop([key], Removal.LOST if found is LoadOutcome.GONE else Removal.DAMAGED)

    async def _remove_corrupt(self, keys: Sequence[ObjectKey]) -> None:
        """Remove damaged objects; what cannot be removed is not found by us, until it is stored anew."""
        self._faults.hide(keys)
        with suppress(BackendError):
            codes = await self._ask(Remove(list(keys)))
            self._faults.over(key for key, code in zip(keys, codes, strict=True) if code in (0, _NOT_FOUND))

    async def store(self, keys: Sequence[ObjectKey], buffers: Sequence[memoryview]) -> list[bool]:
        check_lengths(keys, buffers)
        helper = await self._connected() if keys else None
        codes = [_NO_ROOM] * len(keys)
        places = [self._place(buffer) for buffer in buffers]
        direct = [n for n, place in enumerate(places) if place is not None]
        if direct and helper is not None:
            stored = [keys[n] for n in direct]
            told = await helper.ask(
                Store(stored, [place for place in places if place is not None], self._suspects(stored))
            )
            for n, code in zip(direct, told, strict=True):
                codes[n] = code
        for n, place in enumerate(places):
            if place is None and helper is not None and len(buffers[n]) <= STAGING_BYTES:
                codes[n] = await self._store_staged(helper, keys[n], buffers[n])
        for key, buffer, code in zip(keys, buffers, codes, strict=True):
            if code == 0:
                self._put(key, len(buffer))
                self._faults.over((key,))
        if codes and max(codes) <= _FIRST_FAULT:
            raise BackendError(f"{self.name}: nothing could be stored (code {codes[0]})")
        return [code == 0 for code in codes]

    async def delete(self, keys: Sequence[ObjectKey]) -> int:
        codes = await self._ask(Remove(list(keys)))
        self._drop(keys, Removal.DELETED)
        if codes and min(codes) <= _FIRST_FAULT:
            raise BackendError(f"{self.name}: not everything could be removed (code {min(codes)})")
        return codes.count(0)

    async def keys(self) -> AsyncIterator[tuple[ObjectKey, int]]:
        """All objects, as the master's HTTP server lists them, each with its size. Raises BackendError."""
        number, count = await self._ask(ListAll())
        for begin in range(0, count, SLICE):
            for *fields, size_bytes in await self._ask(Page(number, begin, SLICE)):
                yield ObjectKey(*fields), size_bytes

    def usage(self) -> BackendUsage:
        """What this process stored or loaded, and has not seen to be gone: the pool tells nobody what it evicts."""
        return BackendUsage(self._known.objects, self._known.used_bytes, None)

    async def _ask(self, call: Any) -> list[Any]:
        """What the helper answers to a call about objects; nothing, if it is about none."""
        if not getattr(call, "keys", True):
            return []
        answer: list[Any] = await (await self._connected()).ask(call)
        return answer

    # Memory.

    def _place(self, buffer: memoryview) -> Place | None:
        """Where a buffer is in L1; None if it is elsewhere, or the helper could not map L1."""
        if self._arena is None or self._mapped[_ARENA:] != [True]:
            return None
        offset = address(buffer) - self._arena[1]
        inside = 0 <= offset <= self._arena[2] - len(buffer)
        return Place(_ARENA, offset, len(buffer)) if inside else None

    async def _load_staged(
        self, helper: HelperProcess, key: ObjectKey, buffer: memoryview, may_be_shorter: bool
    ) -> int | LoadOutcome:
        async with self._turn:
            (value,) = await helper.ask(Load([key], [Place(_STAGING, 0, len(buffer))], may_be_shorter))
            told = _parse(value)
            if isinstance(told, int):
                with self._staged(buffer[:told]) as staged:
                    await _copy(buffer[:told], staged)
            return told

    async def _store_staged(self, helper: HelperProcess, key: ObjectKey, buffer: memoryview) -> int:
        async with self._turn:
            with self._staged(buffer) as staged:
                await _copy(staged, buffer)
            (code,) = await helper.ask(Store([key], [Place(_STAGING, 0, len(buffer))], self._suspects([key])))
            return int(code)

    def _staged(self, buffer: memoryview) -> memoryview:
        if self._staging is None:
            raise BackendError(f"{self.name} is closed")
        with memoryview(self._staging[1]) as whole:
            return whole[: len(buffer)]

    # What is known.

    def _suspects(self, keys: Sequence[ObjectKey]) -> list[ObjectKey]:
        return [key for key in keys if key in self._faults]

    def _put(self, key: ObjectKey, size_bytes: int) -> None:
        self._known.put(key, size_bytes)
        if self._known.objects > _MOST_KNOWN:
            self._known.clear(SLICE)

    def _drop(self, keys: Sequence[ObjectKey], removal: Removal) -> None:
        for key in keys:
            self._known.drop(key, removal)


def _parse(value: int | str) -> int | LoadOutcome:
    """What the helper says of an object that it loaded."""
    return value if isinstance(value, int) else LoadOutcome(value)


def _pieces(places: Sequence[Place | None]) -> Iterator[dict[int, Place]]:
    """The places that there are, by their numbers: LOAD_BYTES together, or one that is longer."""
    piece: dict[int, Place] = {}
    left_bytes = LOAD_BYTES
    for n, place in enumerate(places):
        if place is not None:
            if piece and place.size_bytes > left_bytes:
                yield piece
                piece, left_bytes = {}, LOAD_BYTES
            piece[n] = place
            left_bytes -= place.size_bytes
    if piece:
        yield piece


async def _copy(target: memoryview, source: memoryview) -> None:
    """Copy step by step, so that the loop is not held."""
    for begin in range(0, len(source), STEP_BYTES):
        target[begin : begin + STEP_BYTES] = source[begin : begin + STEP_BYTES]
        await asyncio.sleep(0)


def _namespace(text: str) -> str:
    if not text.isascii() or not text.replace("-", "").replace("_", "").replace(".", "").isalnum():
        raise ConfigError(f"{text!r} must be of letters, digits, '-', '_' and '.'")
    return text


def _word(text: str) -> str:
    if not text or not text.isprintable() or " " in text:
        raise ConfigError(f"{text!r} cannot be used")
    return text
