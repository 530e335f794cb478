"""Which server has an object: the only one, or the node of a cluster that has its slot, wherever that moves.

A slot's node is looked up in a map that the cluster's own redirections keep true: MOVED changes it, ASK is for one
command, and both are followed at once. The whole map is asked for anew where a node moved something or cannot be
reached, by one task at a time, and not more often than `FIRST_PAUSE_SECONDS`, twice as long after each failure.
"""

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Sequence

from async_cache.errors import BackendError
from async_cache.l2.valkey.items import Item
from async_cache.l2.valkey.names import SLOTS, slot_of
from async_cache.l2.valkey.node import Node
from async_cache.l2.valkey.replies import Reply, command, is_port, items_of, text_of
from async_cache.l2.valkey.settings import Address, Settings

log = logging.getLogger(__name__)

ROUNDS = 5  # redirections of one command, after which something is wrong
FIRST_PAUSE_SECONDS = 0.25
LONGEST_PAUSE_SECONDS = 2.0

Work = Callable[[Node, list[Item], bool], Awaitable[None]]
"""Does something about objects at one node, and notes in each what became of it. With True, says ASKING before each."""


class Router:
    """The nodes of a backend, and who of them is asked about what."""

    def __init__(self, settings: Settings):
        self._settings = settings
        self._nodes: dict[Address, Node] = {}
        self._slots: list[Node | None] = [None] * SLOTS
        self.only: Node | None = None if settings.is_cluster else self._node(settings.addresses[0])
        """The one server, where it is no cluster."""
        self._refreshing: asyncio.Task[None] | None = None
        self._refresh_at = 0.0
        self._pause_seconds = FIRST_PAUSE_SECONDS
        self._why = BackendError("the map of the cluster was not asked for yet")

    async def open(self) -> None:
        """Connect once, to know whether that is possible. Raises BackendError."""
        if self.only is not None:
            async with self.only.commands.wire():
                return
        await self._know()

    async def run(self, items: Sequence[Item], work: Work) -> None:
        """Do some work about objects, at all nodes side by side; where a node fails, its items have an error."""
        todo = list(items)
        if self.only is not None:
            await self._at(self.only, todo, False, work)
            for item in todo:
                if item.redirect is not None:
                    item.error = BackendError(f"{item.error}: it is a node of a cluster, for the scheme +cluster")
            return
        if not any(self._slots):
            await self._know()
        for _ in range(ROUNDS):
            groups: dict[tuple[Node | None, bool], list[Item]] = {}
            for item in todo:
                groups.setdefault(self._place(item), []).append(item)
            await all_of([self._at(node, group, asking, work) for (node, asking), group in groups.items()])
            todo = [item for item in todo if item.redirect is not None]
            if not todo:
                return
        self._refresh_soon()

    async def _at(self, node: Node | None, items: list[Item], asking: bool, work: Work) -> None:
        try:
            if node is None:
                raise BackendError(f"{self._settings.name}: no node has this slot")
            await work(node, items, asking)
        except BackendError as error:
            for item in items:
                item.error = item.error or error
        if self.only is None and any(item.error is not None or item.redirect is not None for item in items):
            self._refresh_soon()

    def _place(self, item: Item) -> tuple[Node | None, bool]:
        """The node to ask, and whether it must be told that it is asked on purpose (ASKING)."""
        slot = slot_of(item.key)
        redirect, item.redirect = item.redirect, None
        if redirect is None:
            return self._slots[slot], False
        item.error = None
        asked = self._slots[slot]
        host = redirect.host or (asked.address.host if asked is not None else "")
        node = self._node(Address(host, redirect.port))
        if redirect.is_moved:
            self._slots[slot] = node
        return node, not redirect.is_moved

    async def masters(self) -> list[Node]:
        """The nodes that have objects, each once. Raises BackendError."""
        if self.only is not None:
            return [self.only]
        if not any(self._slots):
            await self._know()
        return list(dict.fromkeys(node for node in self._slots if node is not None))

    async def close(self) -> None:
        """Close all connections; idempotent."""
        if self._refreshing is not None:
            self._refreshing.cancel()
            await asyncio.wait((self._refreshing,))
        await asyncio.gather(*(node.close() for node in self._nodes.values()))

    def _node(self, address: Address) -> Node:
        node = self._nodes.get(address)
        if node is None:
            node = self._nodes[address] = Node(self._settings, address)
        return node

    # The map of slots.

    async def _know(self) -> None:
        """Ask for the map, or wait for who asks already. Raises BackendError where nobody knows it."""
        self._refresh_soon()
        if self._refreshing is not None:
            await asyncio.wait((self._refreshing,))
        if not any(self._slots):
            raise BackendError(f"{self._settings.name}: {self._why}")

    def _refresh_soon(self) -> None:
        """Ask for the map anew, unless that goes on or has just been done."""
        loop = asyncio.get_running_loop()
        if (self._refreshing is None or self._refreshing.done()) and loop.time() >= self._refresh_at:
            self._refreshing = loop.create_task(self._refresh(), name=f"{self._settings.name} refresh")

    async def _refresh(self) -> None:
        loop = asyncio.get_running_loop()
        addresses = [*self._nodes, *self._settings.addresses]
        self._why = BackendError("no node could be asked for the map of the cluster")
        for address in random.sample(addresses, len(addresses)):
            try:
                self._learn(await self._ask_map(address), address)
                self._pause_seconds = FIRST_PAUSE_SECONDS
                break
            except BackendError as error:
                self._why = error
        else:
            log.warning("%s: %s", self._settings.name, self._why, extra={"backend": self._settings.name})
            self._pause_seconds = min(2 * self._pause_seconds, LONGEST_PAUSE_SECONDS)
        self._refresh_at = loop.time() + self._pause_seconds

    async def _ask_map(self, address: Address) -> Reply:
        try:
            async with (
                asyncio.timeout(self._settings.connect_timeout_seconds),
                self._node(address).commands.wire() as wire,
            ):
                return await wire.ask_tree(command("CLUSTER", "SLOTS"))
        except TimeoutError as error:
            raise BackendError(f"{address} did not say what the cluster looks like") from error

    def _learn(self, reply: Reply, asked: Address) -> None:
        """Take over the answer to CLUSTER SLOTS: [first slot, last slot, [host, port, ...] of the master, ...] each."""
        slots: list[Node | None] = [None] * SLOTS
        for entry in items_of(reply):
            first, last, master = [*items_of(entry)[:3], None, None, None][:3]
            host, port = [*items_of(master)[:2], None, None][:2]
            if not isinstance(first, int) or not isinstance(last, int) or not isinstance(port, int):
                raise BackendError("the map of the cluster is none")
            if not 0 <= first <= last < SLOTS or not is_port(port):
                raise BackendError(f"the map of the cluster is none: slots {first} to {last} at port {port}")
            node = self._node(Address((text_of(host) if host is not None else "") or asked.host, port))
            slots[first : last + 1] = [node] * (last - first + 1)
        if not any(slots):
            raise BackendError("the cluster has no slots yet")
        self._slots = slots
        for node in set(self._nodes.values()) - set(slots):
            node.retire()
            if node.address not in self._settings.addresses and not node.bulk.wires | node.commands.wires:
                del self._nodes[node.address]


async def all_of(works: Sequence[Awaitable[None]]) -> None:
    """Do all of them side by side, to their ends, also where the caller is cancelled; raises what the first raised."""
    if len(works) == 1:
        await works[0]
        return
    for result in await asyncio.gather(*works, return_exceptions=True):
        if isinstance(result, BaseException):
            raise result
