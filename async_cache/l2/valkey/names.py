"""The key under which a server keeps an object, and its slot in a cluster. Pure.

An object is one string, a record (see `l2.record`), under `<namespace>:{<chunk hash in hex>}.<rank>.<group>`. What
stands in braces decides the slot (https://valkey.io/topics/cluster-spec/), so the objects of a chunk are on one node.
"""

import re
from binascii import crc_hqx

from async_cache.l2.record import key_of
from async_cache.prompt.keys import ObjectKey

SLOTS = 16384

_REST = re.compile(rb"([0-9a-f]{64})\}\.(0|[1-9][0-9]{0,9})\.(0|[1-9][0-9]{0,9})")


class Names:
    """The names of objects in one namespace."""

    def __init__(self, namespace: str):
        self._prefix = f"{namespace}:{{".encode()
        self.pattern = self._prefix + b"*"
        """What the name of each object matches, as the pattern of a SCAN; other keys may match it, too."""

    def of(self, key: ObjectKey) -> bytes:
        """The name of an object."""
        chunk_hash, rank, group = key
        return b"%b%b}.%d.%d" % (self._prefix, chunk_hash.hex().encode(), rank, group)

    def parse(self, name: bytes) -> ObjectKey | None:
        """The object that has this name; None if none has it."""
        if not name.startswith(self._prefix):
            return None
        match = _REST.fullmatch(name, len(self._prefix))
        return match and key_of(bytes.fromhex(match[1].decode()), int(match[2]), int(match[3]))


def slot_of(key: ObjectKey) -> int:
    """The slot of an object in a cluster: CRC-16/XMODEM of what stands in the braces of its name."""
    return crc_hqx(key.chunk_hash.hex().encode(), 0) % SLOTS
