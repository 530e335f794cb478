"""Encryption: AES-256-GCM, with a key for each chunk. Needs `async-kv-cache[codecs]`.

The key of a chunk is HKDF-SHA256 (RFC 5869) of the master key, without a salt, with "async_cache aes 1\\n" and the
chunk hash as info. The chain of chunk hashes starts from the tenant's salt (`docs/keys.md`), so no two tenants have a
key in common, nor do two prompts that differ. A nonce is random, and a key meets few of them: one for each rank and
group, and each time that they are stored anew.
"""

from collections.abc import Sequence
from os import urandom
from threading import Event

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers import AEADEncryptionContext, Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import GCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from async_cache.l2.codec.header import Header
from async_cache.l2.codec.steps import Part, pieces
from async_cache.prompt.keys import ObjectKey

_KEY_ID_BYTES = 8
_NONCE_BYTES = 12


class Aes:
    """AES-256-GCM under the first of some master keys of 32 bytes each; what any of them encrypted is decrypted."""

    number = 1
    name = "aes"
    tag_bytes = 16

    def __init__(self, keys: Sequence[bytes]):
        self._keys = {_derive(key, b"async_cache key id 1\n", _KEY_ID_BYTES): key for key in keys}
        self.key_ids = tuple(self._keys)

    def nonce(self) -> bytes:
        """Random bytes."""
        return urandom(_NONCE_BYTES)

    def seal(self, key: ObjectKey, header: Header) -> "_Seal":
        """Begin to encrypt an object, of which the header says under which key."""
        encryptor = self._cipher(key, header).encryptor()
        encryptor.authenticate_additional_data(header.associated(key))
        return _Seal(encryptor)

    def open(
        self, key: ObjectKey, header: Header, payload: memoryview, tag: bytes, into: memoryview, stop: Event
    ) -> bool:
        """Decrypt a payload, and say whether it is genuine; if it is not, what is in `into` must not be used."""
        if header.key_id not in self._keys:
            return False
        decryptor = self._cipher(key, header).decryptor()
        decryptor.authenticate_additional_data(header.associated(key))
        for part, piece in zip(pieces(payload, stop), pieces(into, stop), strict=True):
            decryptor.update_into(part, piece)
        try:
            decryptor.finalize_with_tag(tag)
        except InvalidTag:
            return False
        return True

    def _cipher(self, key: ObjectKey, header: Header) -> Cipher[GCM]:
        derived = _derive(self._keys[header.key_id], b"async_cache aes 1\n" + key.chunk_hash, 32)
        return Cipher(AES256(derived), GCM(header.nonce))


class _Seal:
    def __init__(self, encryptor: AEADEncryptionContext):
        self._encryptor = encryptor

    def update_into(self, part: Part, into: memoryview) -> int:
        return self._encryptor.update_into(part, into)

    def tag(self) -> bytes:
        self._encryptor.finalize()
        return self._encryptor.tag


def _derive(key: bytes, info: bytes, size_bytes: int) -> bytes:
    return HKDF(SHA256(), size_bytes, None, info).derive(key)
