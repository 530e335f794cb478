"""How one object is encoded and decoded: compressed, then encrypted, behind a header. All of it is for threads."""

from threading import Event

from async_cache.l2.codec.header import HEADER_BYTES, Header
from async_cache.l2.codec.names import Names
from async_cache.l2.codec.steps import Compression, Encryption, Plain, pieces
from async_cache.prompt.keys import ObjectKey


class Codec:
    """Compression, encryption, or both in this order. Calls from several threads do not disturb each other.

    Nothing that is read back is believed before it is checked. What is here to be encrypted has to be so: whoever can
    write to the store could replace it by something plain.
    """

    def __init__(self, compression: Compression | None = None, encryption: Encryption | None = None):
        self._compression = compression
        self._encryption: Encryption = encryption if encryption is not None else Plain()
        self.name = ",".join(step.name for step in (compression, encryption) if step is not None)
        self.names = [Names(self.name, key_id) for key_id in self._encryption.key_ids]
        """What is encoded here is named by the first; what the others name can only be decoded, with older keys."""

    def bound_bytes(self, size_bytes: int) -> int:
        """How long an object of this size can become."""
        bound = self._compression.bound_bytes(size_bytes) if self._compression is not None else size_bytes
        return HEADER_BYTES + bound + self._encryption.tag_bytes

    def encode(self, key: ObjectKey, body: memoryview, into: memoryview, stop: Event) -> int:
        """Encode an object, and say how long it has become. Raises InterruptedError once `stop` is set."""
        compression, encryption = self._compression, self._encryption
        compressed = compression.compress(body) if compression is not None else None
        if compression is not None and compressed is not None:
            how, parts = (compression.number, compressed.width), compressed.parts
        else:
            how, parts = (0, 0), pieces(body, stop)
        header = Header(*how, encryption.number, len(body), encryption.key_ids[0], encryption.nonce())
        seal = encryption.seal(key, header)
        into[:HEADER_BYTES] = header.pack()
        end = HEADER_BYTES
        for part in parts:
            if stop.is_set():
                raise InterruptedError
            begin, end = end, end + len(part)
            seal.update_into(part, into[begin:end])
        tag = seal.tag()
        into[end : end + len(tag)] = tag
        return end + len(tag)

    def decode(self, key: ObjectKey, encoded: memoryview, body: memoryview, stop: Event) -> bool:
        """Fill `body` from what is stored, and say whether that is the object that was asked for, whole and genuine.

        What is in `encoded` afterwards is of no use. Raises InterruptedError once `stop` is set.
        """
        compression, encryption = self._compression, self._encryption
        header = Header.parse(bytes(encoded[:HEADER_BYTES]))
        end = len(encoded) - encryption.tag_bytes
        if header is None or header.size_bytes != len(body) or header.encryption != encryption.number:
            return False
        if header.compression not in (0, compression.number if compression is not None else 0):
            return False
        payload, tag = encoded[HEADER_BYTES:end], bytes(encoded[end:])
        clear = payload if header.compression else body
        if end < HEADER_BYTES or len(payload) != len(clear):
            return False
        if not encryption.open(key, header, payload, tag, clear, stop):
            return False
        if compression is None or not header.compression:
            return True
        return compression.decompress(clear, header.width, body, stop)  # only now that it is known to be genuine
