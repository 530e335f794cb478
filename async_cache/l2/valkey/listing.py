"""All objects of a namespace that one server has, a page at a time."""

from collections.abc import AsyncIterator

from async_cache.l2.record import TRAILER_BYTES
from async_cache.l2.valkey.names import Names
from async_cache.l2.valkey.node import Node
from async_cache.l2.valkey.replies import command, items_of, number_of, text_of
from async_cache.prompt.keys import ObjectKey

PAGE_KEYS = 1000  # that a server looks at in one step, ours or not

Page = list[tuple[ObjectKey, int]]


async def list_node(node: Node, names: Names) -> AsyncIterator[Page]:
    """Objects with their sizes in bytes, without their trailers. Raises BackendError.

    https://valkey.io/commands/scan/: what is there all the time is listed; it may be so twice.
    """
    cursor = "0"
    while True:
        scan = command("SCAN", cursor, "MATCH", names.pattern, "COUNT", PAGE_KEYS, "TYPE", "string")
        async with node.commands.wire() as wire:
            following, found = items_of(await wire.ask_tree(scan))
        ours = [(key, name) for name in items_of(found) if isinstance(name, bytes) and (key := names.parse(name))]
        sizes = await node.ask((b"STRLEN",), [name for _, name in ours]) if ours else []
        page = []
        for (key, _), line in zip(ours, sizes, strict=True):
            size_bytes = number_of(line)
            if size_bytes is not None and size_bytes >= TRAILER_BYTES:
                page.append((key, size_bytes - TRAILER_BYTES))
        yield page
        cursor = text_of(following)
        if cursor == "0":
            return
