"""What the objects of a codec are called in the store: never as those of another one, or of another key.

The group of a key takes 12 bits of its 32. The others get a tag, a fingerprint of how the object is encoded, so that a
lookup finds only what can be decoded here: plain objects, those of another codec and those under another key may be
stored side by side, and neither is found, replaced or removed by who does not have it. The chunk hash stays, so that
the store still knows what belongs together.
"""

from collections.abc import Sequence

from blake3 import blake3

from async_cache.prompt.keys import ObjectKey
from async_cache.prompt.objects import MAX_OBJECTS_PER_CHUNK

_TAGS = 2**32 // MAX_OBJECTS_PER_CHUNK


class Names:
    """The names of objects that are encoded in one way: `codec` says how, `key_id` under which key, if there is one."""

    def __init__(self, codec: str, key_id: bytes = b""):
        digest = blake3(b"async_cache codec 1\n" + codec.encode() + b"\n" + key_id).digest()
        tag = 1 + int.from_bytes(digest[:8], "little") % (_TAGS - 1)  # 0 is that of plain objects
        self._first_group = tag * MAX_OBJECTS_PER_CHUNK

    def objects(self, objects: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        """The (rank, group) that objects, given as (rank, group), have in the store."""
        return [(rank, self._first_group + group) for rank, group in objects]

    def name(self, key: ObjectKey) -> ObjectKey:
        """The key that an object has in the store. Raises ValueError for a group that no layout has."""
        chunk_hash, rank, group = key
        if not 0 <= group < MAX_OBJECTS_PER_CHUNK:
            raise ValueError(f"group {group} is not in 0..{MAX_OBJECTS_PER_CHUNK - 1}")
        return ObjectKey(chunk_hash, rank, self._first_group + group)

    def key(self, name: ObjectKey) -> ObjectKey | None:
        """The object that has this key in the store; None if it is none of these."""
        chunk_hash, rank, group = name
        group -= self._first_group
        return ObjectKey(chunk_hash, rank, group) if 0 <= group < MAX_OBJECTS_PER_CHUNK else None
