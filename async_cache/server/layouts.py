"""Layouts that clients register, and the prompts that name them."""

import weakref

from async_cache.cache import AsyncCache
from async_cache.errors import LimitError
from async_cache.prompt.layout import ModelLayout, Prompt
from async_cache.protocol import messages
from async_cache.protocol.prompts import describe, layout_of, unpack
from async_cache.server.access import Tenant

_MAX_OTHERS = 4
_MAX_LAYOUTS = 256
_MAX_LAYOUT_OBJECTS = 2**18  # in a chunk of each of a connection's layouts, together
_MAX_OBJECTS = 2**18  # in the prompt of a message: what the loop can look up in a fraction of a second


class SharedLayouts:
    """The layouts of all connections of a server, as long as somebody uses them."""

    def __init__(self) -> None:
        self._known: weakref.WeakKeyDictionary[ModelLayout, weakref.ref[ModelLayout]] = weakref.WeakKeyDictionary()
        self._announced: weakref.WeakSet[ModelLayout] = weakref.WeakSet()

    def same(self, layout: ModelLayout) -> ModelLayout:
        """The layout that others use, if one is equal: comparing them is then a matter of identity."""
        known = self._known.get(layout)
        shared = known() if known is not None else None
        if shared is None:
            self._known[layout] = weakref.ref(layout)
            return layout
        return shared

    def announce(self, layout: ModelLayout) -> list[ModelLayout]:
        """Announce a layout to those who come later; returns a few others of its model that are announced.

        This is for clients that may use every salt: other clients neither hear of layouts nor are they heard of.
        """
        alike = [other for other in self._announced if other.model == layout.model and other != layout]
        self._announced.add(layout)
        return alike[:_MAX_OTHERS]


class Layouts:
    """The layouts that one connection has registered, by the numbers that its client gave them."""

    def __init__(self, cache: AsyncCache, shared: SharedLayouts, tenant: Tenant):
        self._cache = cache
        self._shared = shared
        self._tenant = tenant
        self._layouts: dict[int, ModelLayout] = {}
        self._numbers: dict[int, int] = {}  # the other way, by identity

    def register(self, message: messages.RegisterLayout) -> messages.LayoutRegistered:
        """Register a layout. Raises LimitError for one too many, ValueError for one that cannot be."""
        number = message.layout
        if number in self._layouts:
            raise ValueError(f"layout {number} is registered already")
        if len(self._layouts) >= _MAX_LAYOUTS:
            raise LimitError(f"a connection registers up to {_MAX_LAYOUTS} layouts")
        layout = layout_of(message.description)
        if sum(map(_objects, self._layouts.values())) + _objects(layout) > _MAX_LAYOUT_OBJECTS:
            raise LimitError(f"the layouts of a connection have up to {_MAX_LAYOUT_OBJECTS} objects in a chunk")
        self._layouts[number] = layout = self._shared.same(layout)
        self._numbers[id(layout)] = number
        others = self._shared.announce(layout) if self._tenant.trusted else []
        return messages.LayoutRegistered(message.number, [describe(other) for other in others])

    def describe(self, layout: ModelLayout) -> int | messages.Layout:
        """The number of a layout, or a description if the client has not registered it."""
        number = self._numbers.get(id(layout))
        return number if number is not None else describe(layout)

    def prompt(self, wire: messages.WirePrompt) -> Prompt:
        """The prompt that a message names.

        Raises AccessDeniedError if the tenant may not use it, LimitError if it is too long, and ValueError if it cannot
        be a prompt.
        """
        layout = self._layouts.get(wire.layout)
        if layout is None:
            raise ValueError(f"layout {wire.layout} is not registered")
        if isinstance(wire, messages.Digests):
            self._tenant.check_trusted("prompts by their digests")
        self._tenant.check_salt(wire.salt)
        prompt = unpack(wire, layout)
        if len(prompt) * _objects(layout) > _MAX_OBJECTS:
            raise LimitError(f"the prompt of a message has up to {_MAX_OBJECTS} objects")
        if isinstance(wire, messages.Digests) and not self._cache.core.fits(prompt):
            raise ValueError("the chunk hashes of the prompt belong to another layout")
        return prompt


def _objects(layout: ModelLayout) -> int:
    """How many objects a chunk of this layout has."""
    return layout.objects.full_mask.bit_count()
