"""The keys of an encryption, in a file: 32 bytes, or one key to a line in hex or base64, the first to encrypt with.

In a file of lines, those that are empty or begin with "#" do not count.
"""

import os
import re
import stat
from base64 import b64decode

from async_cache.errors import ConfigError

KEY_BYTES = 32

_MAX_BYTES = 64 * 1024
_HEX = re.compile("[0-9a-fA-F]{64}")
_BASE64 = re.compile("[0-9A-Za-z+/_-]{43}=?")


def read_keys(path: str) -> list[bytes]:
    """The keys in a file, 32 bytes each. Raises ConfigError, which shows nothing of what is in the file."""
    try:
        with open(path, "rb", opener=_open) as file:
            mode = os.fstat(file.fileno()).st_mode
            data = file.read(_MAX_BYTES + 1) if stat.S_ISREG(mode) else None
    except OSError as error:
        raise ConfigError(f"{path!r} cannot be read: {error.strerror}") from None
    if data is None:
        raise ConfigError(f"{path!r} is not a file")
    if mode & stat.S_IRWXO:
        raise ConfigError(f"{path!r} is open to every user of the machine: chmod o-rwx it")
    keys = [data] if len(data) == KEY_BYTES else _parse(path, data)
    if len(data) == KEY_BYTES and data.isascii():  # less than one random key in four thousand million
        raise ConfigError(f"{path!r} has text in place of 32 random bytes: a password is no key")
    if len(set(keys)) < len(keys):
        raise ConfigError(f"{path!r} has a key twice")
    return keys


def _open(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe must not block


def _parse(path: str, data: bytes) -> list[bytes]:
    lines = data.decode("ascii", "replace").splitlines() if len(data) <= _MAX_BYTES else []
    keys = []
    for number, line in enumerate(map(str.strip, lines), 1):
        if _HEX.fullmatch(line):
            keys.append(bytes.fromhex(line))
        elif _BASE64.fullmatch(line):
            keys.append(b64decode(line.rstrip("=") + "=", altchars=b"-_" if re.search("[-_]", line) else None))
        elif line and not line.startswith("#"):
            raise ConfigError(f"{path!r}, line {number}: a key is 32 bytes in hex or base64")
    if not keys:
        raise ConfigError(f"{path!r} has no key: it is 32 bytes, or one key to a line in hex or base64")
    return keys
