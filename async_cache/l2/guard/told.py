"""A backend as it is told what happens, and asked what it knows at once: what it raises then is logged."""

import asyncio
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from async_cache.l2.backend import Backend, Coming
from async_cache.prompt.keys import ObjectKey
from async_cache.prompt.layout import Prompt
from async_cache.prompt.objects import ChunkObjects
from async_cache.retention.quotas import Bounds
from async_cache.values import BackendUsage

T = TypeVar("T")

log = logging.getLogger(__name__)


class Told:
    """A backend and how many use it. No call raises what the backend does, and only `wait_until_unused` waits."""

    def __init__(self, backend: Backend):
        self.backend = backend
        self.bounds = Bounds(most=lambda quota: quota.l2_bytes)
        """What owners have of it, and may have at most."""
        self.uses = 0
        """Pins that are held, and those who need the backend to stay: it is not closed before they are gone."""
        self._unused: asyncio.Event | None = None  # while somebody waits for that

    @property
    def name(self) -> str:
        """The name of the backend."""
        return self.backend.name

    @property
    def about(self) -> dict[str, str]:
        """What a line of the log is about."""
        return {"backend": self.backend.name}

    def unpin(self, keys: Sequence[ObjectKey]) -> None:
        """Give back one pin of each key. What the backend raises is logged."""
        self._tell(self.backend.unpin, keys)
        self._no_longer_used(len(keys))

    def unpin_found(self, keys: Sequence[ObjectKey], found: Sequence[bool]) -> None:
        """Give back the pins of those keys that were found. There may be fewer or more answers than keys."""
        self.unpin(those_found(keys, found))

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Have the backend stay open within the block."""
        self.uses += 1
        try:
            yield
        finally:
            self._no_longer_used(1)

    def _no_longer_used(self, uses: int) -> None:
        self.uses -= uses
        if self._unused is not None and self.uses <= 0:
            self._unused.set()

    async def wait_until_unused(self) -> None:
        """Wait until nobody uses the backend: it has an end where nobody begins to, since every call has."""
        while self.uses > 0:
            self._unused = asyncio.Event()
            await self._unused.wait()

    @contextmanager
    def in_use(self, chunk_hashes: Sequence[bytes]) -> Iterator[None]:
        """Chunks in front of what is looked up or stored: they stay meanwhile, and were used as recently.

        They come in the order of their prefix. What the backend raises is logged.
        """
        self._tell(self.backend.pin_prefix, chunk_hashes)
        try:
            yield
        finally:
            self._tell(self.backend.unpin_prefix, chunk_hashes)

    def touch_prefix(self, chunk_hashes: Sequence[bytes]) -> None:
        """Say that these chunks were used just now, in the order of their prefix."""
        with self.in_use(chunk_hashes):
            pass

    def asked(self, prompts: Sequence[Prompt]) -> None:
        """Tell a backend that learns from it what a request asked for. What it raises is logged."""
        for prompt in prompts if self.backend.learns or self.bounds else ():
            self._asked(prompt)

    def _asked(self, prompt: Prompt) -> None:
        of = prompt.tokens, prompt.layout.chunk_tokens, prompt.origin
        self._tell(lambda path: self.backend.asked(path, *of), prompt.chunk_hashes)

    def hint(
        self, prompt: Prompt, output_tokens: int | None, returns: bool | None, within_seconds: float | None
    ) -> None:
        """Tell a backend that learns from it what is known of the future of a prompt. What it raises is logged."""
        if self.backend.learns:
            known = output_tokens, returns, within_seconds
            self._tell(lambda path: self.backend.hint(path, *known), prompt.chunk_hashes)

    def coming(self, chunks: Sequence[Coming]) -> None:
        """Tell the backend what is about to be stored. What it raises is logged."""
        self._tell(self.backend.coming, chunks)

    def retain(self, chunk_hashes: Sequence[bytes]) -> None:
        """Have the backend keep these chunks, there or not, until `unretain`. What it raises is logged."""
        self._tell(self.backend.retain, chunk_hashes)

    def unretain(self, chunk_hashes: Sequence[bytes]) -> None:
        """Have the backend keep these chunks no longer. What it raises is logged."""
        self._tell(self.backend.unretain, chunk_hashes)

    def chunks_without_origin(self) -> int | None:
        """How many chunks the backend has of which it does not know what they are of; None: it knows that of none."""
        try:
            return self.backend.chunks_without_origin()
        except (Exception, asyncio.CancelledError):
            log.exception("backend %s could not say what it knows", self.name, extra=self.about)
            return None

    def room_bytes(self, objects: ChunkObjects) -> int:
        """What all objects of a chunk take of what the backend has room for."""
        return objects.bytes_in_units(self.backend.unit_bytes, self.backend.least_object_bytes)

    def usage(self) -> BackendUsage | None:
        """What the backend holds, as far as it knows; None if it cannot say."""
        try:
            return self.backend.usage()
        except (Exception, asyncio.CancelledError):
            log.exception("backend %s could not say what it holds", self.name, extra=self.about)
            return None

    def _tell(self, verb: Callable[[Sequence[T]], None], what: Sequence[T]) -> None:
        if not what:
            return
        try:
            verb(what)
        except (Exception, asyncio.CancelledError):
            log.exception("backend %s could not %s", self.name, getattr(verb, "__name__", verb), extra=self.about)


def those_found(keys: Sequence[ObjectKey], found: Sequence[bool]) -> list[ObjectKey]:
    """The keys of what was found. There may be fewer or more answers than keys."""
    return [key for key, there in zip(keys, found, strict=False) if there]
