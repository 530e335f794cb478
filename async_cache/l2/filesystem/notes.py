"""Notes beside the objects: one small file each, in a directory of their own. All of it blocks: it is for threads."""

import os
from contextlib import suppress
from secrets import token_hex

DIRECTORY = ".notes"
"""Where they are, in the directory of the store."""
MOST_BYTES = 16 * 2**20
_TEMPORARY = "tmp."
_SAFE = os.O_NOFOLLOW | os.O_CLOEXEC


def read(path: str) -> dict[str, bytes]:
    """All notes of a store, by their names. What cannot be read is left out. Raises OSError."""
    notes: dict[str, bytes] = {}
    try:
        names = os.listdir(os.path.join(path, DIRECTORY))
    except FileNotFoundError:
        return notes
    for name in names:
        if name.isalnum():
            with suppress(OSError):
                notes[name] = _content(os.path.join(path, DIRECTORY, name))
    return notes


def read_one(path: str, name: str) -> bytes | None:
    """The note of that name; None if there is none. Raises OSError."""
    try:
        return _content(os.path.join(path, DIRECTORY, name))
    except FileNotFoundError:
        return None


def _content(path: str) -> bytes:
    with os.fdopen(os.open(path, _SAFE | os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
        return file.read(MOST_BYTES)


def write(path: str, name: str, note: bytes | None) -> None:
    """Have a note of this name, whole or as it was before; None: have none. Raises OSError."""
    directory = os.path.join(path, DIRECTORY)
    if note is None:
        with suppress(FileNotFoundError):
            os.unlink(os.path.join(directory, name))
        return
    os.makedirs(directory, 0o700, exist_ok=True)
    temporary = os.path.join(directory, _TEMPORARY + token_hex(8))
    try:
        with os.fdopen(os.open(temporary, _SAFE | os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(note)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, os.path.join(directory, name))
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise
