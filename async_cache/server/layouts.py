"""Layouts that clients register, and the prompts that name them."""

import weakref
from collections.abc import Sequence
from typing import NamedTuple

from async_cache.cache import AsyncCache
from async_cache.errors import ConnectionLostError, LimitError
from async_cache.prompt.arguments import parts_of
from async_cache.prompt.layout import ModelLayout, Prompt
from async_cache.prompt.parts import Parts
from async_cache.protocol import messages
from async_cache.protocol.prompts import describe, layout_of, unpack
from async_cache.server import costs
from async_cache.server.access import Tenant
from async_cache.server.accounts import Account

_MAX_OTHERS = 4
_MAX_LAYOUTS = 256
_MAX_LAYOUT_OBJECTS = 2**18  # in a chunk of each of a connection's layouts, together
_FEW_OBJECTS = 64  # in a chunk of a layout that is made at once


_BY_DIGESTS = messages.Digests, messages.SegmentDigests


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


class Registered(NamedTuple):
    """A layout of a connection, and how many objects a chunk has."""

    layout: ModelLayout
    objects: int


def is_small(description: messages.Layout) -> bool:
    """Whether a layout is made in no time; else that is for a thread."""
    return len(description.groups) * description.world_size <= _FEW_OBJECTS


def make(description: messages.Layout) -> ModelLayout:
    """A layout that was sent, with all that is computed of it only once; may run in any thread.

    Raises ValueError or TypeError if it is impossible.
    """
    layout = layout_of(description)
    layout.know_all()
    return layout


class Layouts:
    """The layouts that one connection has registered, by the numbers that its client gave them.

    `most_objects`: in the prompts of one message, together.
    """

    def __init__(self, cache: AsyncCache, shared: SharedLayouts, tenant: Tenant, account: Account, most_objects: int):
        self._cache = cache
        self._shared = shared
        self._tenant = tenant
        self._account = account
        self._most_objects = most_objects
        self._layouts: dict[int, Registered] = {}
        self._numbers: dict[int, int] = {}  # the other way, by identity

    def check_new(self, message: messages.RegisterLayout) -> None:
        """Check that one more may be registered. Raises LimitError, and ValueError for one that is there."""
        if message.layout in self._layouts:
            raise ValueError(f"layout {message.layout} is registered already")
        if len(self._layouts) >= _MAX_LAYOUTS:
            raise LimitError(f"a connection registers up to {_MAX_LAYOUTS} layouts")

    def register(self, message: messages.RegisterLayout, layout: ModelLayout) -> messages.LayoutRegistered:
        """Register a layout that was made. Raises LimitError."""
        objects = costs.objects_of(layout)
        if sum(known.objects for known in self._layouts.values()) + objects > _MAX_LAYOUT_OBJECTS:
            raise LimitError(f"the layouts of a connection have up to {_MAX_LAYOUT_OBJECTS} objects in a chunk")
        layout = self._shared.same(layout)
        self._account.know_layout(layout, objects)
        self._layouts[message.layout] = Registered(layout, objects)
        self._numbers[id(layout)] = message.layout
        others = self._shared.announce(layout) if self._tenant.trusted else []
        return messages.LayoutRegistered(message.number, [describe(other) for other in others])

    def close(self) -> None:
        """Give up all layouts."""
        self._layouts.clear()

    def describe(self, layout: ModelLayout) -> int | messages.Layout:
        """The number of a layout, or a description if the client has not registered it."""
        number = self._numbers.get(id(layout))
        return number if number is not None else describe(layout)

    def check(self, wires: Sequence[messages.WirePrompt]) -> tuple[int, int]:
        """Check, before they are made, that prompts may be asked for together; their chunks, and what they cost.

        Raises AccessDeniedError if the tenant may not use one, LimitError if they are too long, and ValueError for a
        layout that is not registered.
        """
        chunks = cost = objects = 0
        for wire in wires:
            known = self._layouts.get(wire.layout)
            if known is None:
                raise ValueError(f"layout {wire.layout} is not registered")
            if isinstance(wire, _BY_DIGESTS):
                self._tenant.check_trusted("prompts by their digests")
            self._tenant.check_salt(wire.salt)
            more = costs.chunks_of(wire, known.layout)
            chunks += more
            objects += more * known.objects
            cost += costs.of_prompt(wire, more, known.objects)
        if objects > self._most_objects:
            raise LimitError(f"max_message_objects: a message has up to {self._most_objects} objects, not {objects}")
        return chunks, cost

    def parts(self, wires: Sequence[messages.WirePrompt]) -> Parts:
        """The prompts that a message names, as one request asks for them; otherwise as `prompt`."""
        return parts_of(list(map(self.prompt, wires)))

    def chunk_tokens(self, wire: messages.WirePrompt) -> int:
        """How many tokens a chunk has."""
        return self._layouts[wire.layout].layout.chunk_tokens

    def prompt(self, wire: messages.WirePrompt) -> Prompt:
        """The prompt that a message names, and that was checked; may run in any thread.

        Raises ValueError if it cannot be a prompt, and ConnectionLostError where the connection has ended since.
        """
        known = self._layouts.get(wire.layout)
        if known is None:
            raise ConnectionLostError("the connection was closed")
        prompt = unpack(wire, known.layout)
        prompt.hash()
        return prompt

    def check_fits(self, wires: Sequence[messages.WirePrompt], prompts: Sequence[Prompt]) -> None:
        """Check that digests do not name chunks of another layout. Raises ValueError."""
        for wire, prompt in zip(wires, prompts, strict=True):
            if isinstance(wire, _BY_DIGESTS) and not self._cache.core.fits(prompt):
                raise ValueError("the chunk hashes of the prompt belong to another layout")
