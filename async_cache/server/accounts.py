"""What the tenants of a server hold, each against its limits."""

import asyncio
import sys
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import partial

from async_cache.cache import AsyncCache
from async_cache.errors import LimitError
from async_cache.limits import UNLIMITED, TenantLimits
from async_cache.prompt.layout import ModelLayout
from async_cache.server.access import Tenant
from async_cache.values import LimitUse

_BURST_SECONDS = 4.0  # of stores at the allowed rate may come at once
_REQUEST_BYTES = 3072
_NO_LIMIT = 2**62
_CHUNK_BYTES = 160  # hash, entry, what is needed, and where it is
_OBJECT_BYTES = 8


def record_bytes(chunks: int, objects: int) -> int:
    """What is known of a request of so many chunks, with so many objects each, at the most."""
    return _REQUEST_BYTES + chunks * (_CHUNK_BYTES + _OBJECT_BYTES * min(objects, 8))


def _tell(gone: "weakref.WeakMethod[Callable[[int], None]]", objects: int) -> None:
    """A layout may outlive the server that counts it, and is not to keep it."""
    tell = gone()
    if tell is not None:
        tell(objects)


class Account:
    """What one tenant holds, over all of its connections: amounts by the names of its limits."""

    def __init__(self, name: str, limits: TenantLimits, l1_bytes: int, leased_bytes: Callable[[], int] = lambda: 0):
        self.name = name
        self._l1_bytes = l1_bytes
        self.change(limits)
        self.used: dict[str, int] = dict.fromkeys(_LIMITS, 0)
        self.refused = 0
        """How often it was over a limit."""
        self._layouts: weakref.WeakSet[ModelLayout] = weakref.WeakSet()
        self.listing = asyncio.Lock()
        """To look through all that there is, which takes memory meanwhile: one after the other."""
        self._leased_bytes = leased_bytes
        self._waiters: deque[asyncio.Future[None]] = deque()  # for room for what is not read yet
        self._stored_until = 0.0  # what it has stored is as much as it might until then
        self._loop = asyncio.get_running_loop()

    def change(self, limits: TenantLimits) -> None:
        """Have other limits from now on; what is held already stays."""
        self.limits = limits
        self.most = {name: self._in_bytes(getattr(limits, name)) for name in _LIMITS}
        """How much it may have: of a share, in bytes."""

    def _in_bytes(self, limit: int | float) -> int:
        if isinstance(limit, float):  # all of L1 is no limit: where that has no room, less is promised
            return int(limit * self._l1_bytes) if limit < 1 else sys.maxsize
        return limit

    def left(self, limit: str) -> int:
        """How much more it may have."""
        return max(self.most[limit] - self.used[limit], 0)

    def take(self, limit: str, amount: int = 1) -> None:
        """Have so much more. Raises LimitError."""
        used = self.used[limit] + amount
        if used > self.most[limit]:
            raise self.over(limit, f"{used} would be more than its {self.most[limit]}")
        self.used[limit] = used

    def give(self, limit: str, amount: int = 1) -> None:
        """Have so much less."""
        self.used[limit] -= amount

    def lease(self, loading_bytes: int) -> None:
        """Take note of a request that L1 holds chunks for, and of what it loads beside them. Raises LimitError."""
        used = self.held("leased_share") + loading_bytes
        if used > self.most["leased_share"]:
            raise self.over("leased_share", f"{used} bytes would be more than its {self.most['leased_share']}")
        self.used["leased_share"] += loading_bytes

    def know_layout(self, layout: ModelLayout, objects: int) -> None:
        """Know a layout of so many objects in a chunk, for as long as anything has it. Raises LimitError.

        What is known of one takes megabytes, and a request or a chunk in L1 keeps it longer than a connection does.
        """
        if layout not in self._layouts:
            self.take("layout_objects", objects)
            self._layouts.add(layout)
            weakref.finalize(layout, _tell, weakref.WeakMethod(self._layout_gone), objects).atexit = False

    def _layout_gone(self, objects: int) -> None:
        """Nothing has a layout any more: whichever thread was the last that had, only the loop's counts."""
        with suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self.give, "layout_objects", objects)

    def take_request(self, size_bytes: int) -> None:
        """Know one more request, of which so much is known. Raises LimitError."""
        self.take("requests")
        try:
            self.take("record_bytes", size_bytes)
        except LimitError:
            self.give("requests")
            raise

    def give_request(self, size_bytes: int) -> None:
        """Know one less."""
        self.give("requests")
        self.give("record_bytes", size_bytes)

    async def take_unread(self, size_bytes: int) -> None:
        """Wait until so much more may be sent, however slowly the clients of this tenant read."""
        while self.used["unread_bytes"] and self.used["unread_bytes"] + size_bytes > self.most["unread_bytes"]:
            waiter = self._loop.create_future()
            self._waiters.append(waiter)
            try:
                await waiter
            except asyncio.CancelledError:
                self._wake()
                raise
        self.used["unread_bytes"] += size_bytes

    def give_unread(self, size_bytes: int) -> None:
        """So much was read, or is not sent any more."""
        self.used["unread_bytes"] -= size_bytes
        self._wake()

    def _wake(self) -> None:
        while self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_result(None)
                break

    def store(self, size_bytes: int) -> None:
        """Take note of bytes that it stores now. Raises LimitError if it has stored too many of late."""
        rate = self.limits.stored_bytes_per_second
        if rate is not None:
            now = self._loop.time()
            if self._stored_until > now + _BURST_SECONDS:
                raise self.over("stored_bytes_per_second", f"it has stored more than {rate} bytes a second")
            self._stored_until = max(self._stored_until, now) + size_bytes / rate

    def told(self) -> dict[str, LimitUse]:
        """Its limits by their names, with what it has of them."""
        uses = {
            limit: LimitUse(self.held(limit), most if most < _NO_LIMIT else None) for limit, most in self.most.items()
        }
        rate = self.limits.stored_bytes_per_second
        if rate is not None:
            uses["stored_bytes_per_second"] = LimitUse(0, rate)
        return uses

    def held(self, limit: str) -> int:
        """How much it has."""
        return self.used[limit] + (self._leased_bytes() if limit == "leased_share" else 0)

    def over(self, limit: str, why: str) -> LimitError:
        """The error that says which limit it is over."""
        self.refused += 1
        return LimitError(f"{limit}: tenant {self.name!r} is at this limit, {why}")

    def __repr__(self) -> str:
        return f"<Account of {self.name!r}, {self.used}>"


_NOT_COUNTED = ("stored_bytes_per_second", "kept_share")
_LIMITS = tuple(name for name in TenantLimits.__struct_fields__ if name not in _NOT_COUNTED)


class Accounts:
    """The accounts of the tenants that have had connections: there are no more of them than there are tenants."""

    def __init__(self, limits: Mapping[str, TenantLimits], cache: AsyncCache):
        self._limits = limits
        self._cache = cache
        self._accounts: dict[str, Account] = {}

    def replace(self, limits: Mapping[str, TenantLimits]) -> None:
        """Have other limits from now on; what is held already stays."""
        self._limits = limits
        for name, account in self._accounts.items():
            account.change(limits.get(name, UNLIMITED))

    def of(self, tenant: Tenant) -> Account:
        """That of a tenant."""
        account = self._accounts.get(tenant.name)
        if account is None:
            limits = self._limits.get(tenant.name, UNLIMITED)
            l1_bytes, leased_bytes = len(self._cache.memory), partial(self._leased_bytes, tenant)
            account = self._accounts[tenant.name] = Account(tenant.name, limits, l1_bytes, leased_bytes)
        return account

    def _leased_bytes(self, tenant: Tenant) -> int:
        """What requests hold of L1 that belongs to a tenant's salts; for one that may use every salt, all."""
        l1 = self._cache.core.l1
        return l1.leased_bytes if tenant.salts is None else l1.uses.leased_of(tenant.salts).size_bytes

    def __iter__(self) -> Iterator[Account]:
        return iter(self._accounts.values())
