"""What the connections share: which of them hold a request, and equal layouts."""

import weakref
from collections.abc import Hashable
from typing import Protocol

from async_cache.cache import AsyncCache
from async_cache.prompt.layout import ModelLayout

_MAX_OTHERS = 4


class Holder(Protocol, Hashable):
    """Whoever has prefetched."""

    def request_over(self, number: int) -> None:
        """The request of its prefetch of that number is over."""

    def request_claimed(self, number: int, *, claimed: bool) -> None:
        """Its result was handed out, or given back."""


class Registry:
    """Requests by their holders: a request ends with the last of them."""

    def __init__(self, cache: AsyncCache):
        self._holders: dict[str, dict[tuple[Holder, int], None]] = {}
        self._announced: weakref.WeakSet[ModelLayout] = weakref.WeakSet()
        self._layouts: weakref.WeakKeyDictionary[ModelLayout, weakref.ref[ModelLayout]] = weakref.WeakKeyDictionary()
        cache.core.controller.on_over = self._over

    def hold(self, request_id: str, holder: Holder, number: int) -> None:
        """A holder has prefetched this."""
        self._holders.setdefault(request_id, {})[holder, number] = None

    def let_go(self, request_id: str, holder: Holder, number: int) -> bool:
        """A holder has gone. Whether it was the last."""
        holders = self._holders[request_id]
        del holders[holder, number]
        if not holders:
            del self._holders[request_id]
        return not holders

    def claimed(self, request_id: str) -> None:
        """Its result was handed out."""
        for holder, number in self._holders.get(request_id, ()):
            holder.request_claimed(number, claimed=True)

    def unclaimed(self, request_id: str) -> None:
        """It was given back."""
        for holder, number in self._holders.get(request_id, ()):
            holder.request_claimed(number, claimed=False)

    def _over(self, request_id: str) -> None:
        for holder, number in self._holders.pop(request_id, ()):
            holder.request_over(number)

    def same(self, layout: ModelLayout) -> ModelLayout:
        """The layout that others use, if one is equal: comparing is then a matter of identity."""
        known = self._layouts.get(layout)
        shared = known() if known is not None else None
        if shared is None:
            self._layouts[layout] = weakref.ref(layout)
            return layout
        return shared

    def announce(self, layout: ModelLayout) -> list[ModelLayout]:
        """Tell of a layout those who come later; a few others of its model that were announced, and are in use.

        For those who may use every salt: nobody else is to hear of them, or be heard of.
        """
        alike = [other for other in self._announced if other.model == layout.model and other != layout]
        self._announced.add(layout)
        return alike[:_MAX_OTHERS]
