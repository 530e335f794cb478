"""The edge of a device: copies between the blocks of an engine and the objects of chunks, beside what it computes.

A copy has two fences, since two parties wait for it: whoever owns its source, and whoever wants its bytes. Nothing here
waits on the engine's thread or on a loop: a fence is a future, which resolves in a thread of the device.
"""

from collections.abc import Iterable, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

import torch

from async_cache.errors import AsyncCacheError

Fence: TypeAlias = "Future[None]"
"""A point that the device's work passes, or DeviceError where it never will. Nobody but the device resolves it."""

Mark: TypeAlias = object
"""A point in what the engine had submitted, as `Device.mark` gives it. Only its device knows what it is."""


class DeviceError(AsyncCacheError):
    """A device could not copy; the cause is chained. What it was to write to may hold anything."""


@dataclass(eq=False)
class Copy:
    """A copy that has begun. `done` fails where `read` has; `read` may have passed where `done` fails.

    `read`: its source may change, the blocks of a save, the leased memory of a load. `done`: the bytes are there.
    """

    read: Fence = field(default_factory=Future)
    done: Fence = field(default_factory=Future)

    def end(self, error: DeviceError | None = None) -> None:
        """Resolve what is not resolved yet: the device is done with it, or has failed."""
        resolve(self.read, error)
        resolve(self.done, error)


def resolve(fence: Fence, error: DeviceError | None = None) -> None:
    """Resolve a fence, unless it is resolved: a device that is closed does not wait for its own threads for ever."""
    with suppress(InvalidStateError):
        fence.set_exception(error) if error is not None else fence.set_result(None)


class Device(Protocol):
    """The pages of one rank, by group. `mark` and `hold` are for the engine's thread, all else for one other.

    An object is (layers, blocks, ...): `host` is contiguous, and stays as it is until the copy's fences say otherwise.
    `blocks` has a number for each of its blocks. Copies in one direction begin in the order of the calls.
    """

    pin_bytes: int
    """How much of the memory that saves go to is worth to be pinned."""

    def mark(self) -> Mark:
        """What the engine has submitted so far, for copies that come after it."""

    def hold(self, copies: Iterable[Copy]) -> None:
        """Have what the engine submits from now on wait until these saves have read their blocks.

        A device may give up what it has not begun to read, in place of waiting for it: then the save fails.
        """

    def pin(self, view: memoryview, *, writable: bool) -> None:
        """Make host memory faster to copy to and from, in the background; nothing depends on it. It is kept."""

    def save(self, group: int, blocks: Sequence[int], host: torch.Tensor, after: Mark) -> Copy:
        """Begin to copy blocks out. None of them is NO_BLOCK."""

    def load(self, group: int, blocks: Sequence[int], host: torch.Tensor, after: Mark) -> Copy:
        """Begin to copy into blocks, but for those that are NO_BLOCK."""

    def close(self) -> None:
        """Wait for the copies that have begun, for a while, and fail the others. Nothing begins from then on."""
