"""`HostDevice`: pages in the memory of a CPU, and one thread that copies."""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress

import torch

from async_cache.integrations.paged.device import Copy, DeviceError, Fence, Mark
from async_cache.integrations.paged.orders import NO_BLOCK, Geometry

Caches = Sequence[torch.Tensor]
"""The pages of each layer of a group, block numbers first."""


class HostDevice:
    """A CPU as a `Device`. What its engine has submitted is computed, so marks are nothing, and who holds waits.

    `caches` are the pages by layer, block numbers first.
    """

    pin_bytes = 0

    def __init__(self, geometry: Geometry, caches: Mapping[str, torch.Tensor]):
        self._groups = [[caches[layer] for layer in pages.layers] for pages in geometry.pages]
        self._copier = ThreadPoolExecutor(1, "async_cache copy", initializer=leave_the_engines_core)

    def mark(self) -> Mark:
        """Nothing: it is computed."""

    def hold(self, copies: Iterable[Copy]) -> None:
        """Wait until these saves have read their blocks."""
        wait([copy.read for copy in copies])

    def pin(self, view: memoryview, *, writable: bool) -> None:
        """Do nothing: all memory is alike."""

    def save(self, group: int, blocks: Sequence[int], host: torch.Tensor, after: Mark) -> Copy:
        """Begin to copy blocks out."""
        return self._begin(_gather, self._groups[group], blocks, host)

    def load(self, group: int, blocks: Sequence[int], host: torch.Tensor, after: Mark) -> Copy:
        """Begin to copy into blocks, but for those that are NO_BLOCK."""
        return self._begin(_scatter, self._groups[group], blocks, host)

    def close(self) -> None:
        """Wait for all copies."""
        self._copier.shutdown()

    def _begin(
        self,
        copy: Callable[[Caches, Sequence[int], torch.Tensor], None],
        caches: Caches,
        blocks: Sequence[int],
        host: torch.Tensor,
    ) -> Copy:
        def run() -> None:
            try:
                with torch.inference_mode():  # pages may be tensors of that mode
                    copy(caches, blocks, host)
            except Exception as error:
                raise DeviceError(f"blocks were not copied: {error}") from error

        try:
            ended: Fence = self._copier.submit(run)
        except RuntimeError as error:
            raise DeviceError("the device is closed") from error
        return Copy(ended, ended)


def _gather(caches: Caches, blocks: Sequence[int], host: torch.Tensor) -> None:
    rows = torch.tensor(blocks)
    for cache, part in zip(caches, host, strict=True):
        torch.index_select(cache, 0, rows, out=_as_pages(part, cache))


def _scatter(caches: Caches, blocks: Sequence[int], host: torch.Tensor) -> None:
    kept = [n for n, block in enumerate(blocks) if block != NO_BLOCK]
    if not kept:
        return
    rows = torch.tensor([blocks[n] for n in kept])
    first, end = kept[0], kept[-1] + 1
    stored = host[:, first:end] if len(kept) == end - first else host[:, kept]
    for cache, part in zip(caches, stored, strict=True):
        cache.index_copy_(0, rows, _as_pages(part.contiguous(), cache))


def _as_pages(part: torch.Tensor, cache: torch.Tensor) -> torch.Tensor:
    """The bytes of a layer in an object, as the pages of that layer."""
    return part.view(-1).view(cache.dtype).view(-1, *cache.shape[1:])


def leave_the_engines_core() -> None:
    """An engine on a CPU binds its threads to cores, and those that it starts: these are not to compete with it."""
    with suppress(OSError, AttributeError):
        os.sched_setaffinity(0, range(os.cpu_count() or 1))
