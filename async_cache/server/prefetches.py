"""What the connections share: which of them hold a request, and equal layouts."""

import weakref
from collections.abc import Hashable
from typing import Protocol

from async_cache.cache import AsyncCache
from async_cache.handles.prefetch import Prefetch
from async_cache.observe import Observer
from async_cache.prompt.layout import ModelLayout

_MAX_OTHERS = 4


class Holder(Protocol, Hashable):
    """Whoever has prefetched."""

    def request_over(self, number: int) -> None:
        """The request of its prefetch of that number is over."""

    def request_claimed(self, number: int, *, claimed: bool) -> None:
        """Its result was handed out, or given back."""


class Registry(Observer):
    """Requests by their holders: a request ends with the last of them."""

    def __init__(self, cache: AsyncCache):
        self._holders: dict[Prefetch, dict[tuple[Holder, int], None]] = {}
        self._prefetches: dict[str, Prefetch] = {}  # the latest of each id
        self._announced: weakref.WeakSet[ModelLayout] = weakref.WeakSet()
        self._layouts: weakref.WeakKeyDictionary[ModelLayout, weakref.ref[ModelLayout]] = weakref.WeakKeyDictionary()
        cache.core.observers.add(self)

    def hold(self, prefetch: Prefetch, holder: Holder, number: int) -> None:
        """A holder has prefetched this."""
        self._prefetches[prefetch.request_id] = prefetch
        self._holders.setdefault(prefetch, {})[holder, number] = None

    def let_go(self, prefetch: Prefetch, holder: Holder, number: int) -> bool:
        """A holder has gone. Whether it was the last."""
        holders = self._holders.get(prefetch)
        if holders is None:  # it is over
            return False
        del holders[holder, number]
        if not holders:
            self._forget(prefetch)
        return not holders

    def claimed(self, request_id: str, *, claimed: bool) -> None:
        """Its result was handed out, or given back."""
        prefetch = self._prefetches.get(request_id)
        for holder, number in self._holders[prefetch] if prefetch is not None else ():
            holder.request_claimed(number, claimed=claimed)

    def over(self, prefetch: Prefetch) -> None:
        """Tell all who hold it."""
        for holder, number in self._forget(prefetch):
            holder.request_over(number)

    def _forget(self, prefetch: Prefetch) -> "dict[tuple[Holder, int], None]":
        if self._prefetches.get(prefetch.request_id) is prefetch:
            del self._prefetches[prefetch.request_id]
        return self._holders.pop(prefetch, {})

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
