"""What the chunks of a store are of: a record has a number for that, and a small file of that name says what it means.

A number is made from what it stands for, and given once: whoever finds it taken for something else takes the next one.
So all processes that use a directory agree. What blocks says so: it is for threads, one at a time.
"""

import os
from collections import Counter
from collections.abc import Collection, Iterable
from contextlib import suppress

import msgspec
from blake3 import blake3

from async_cache.l2.backend import Reader, Sealer
from async_cache.l2.filesystem.files import names_in
from async_cache.l2.filesystem.format import begun_name
from async_cache.prompt.origin import Origin

DIRECTORY = ".origins"
"""Where they are, in the directory of the store."""
MOST = 16_384
"""Origins of one store."""
MOST_OF_SALT = 1024
"""And of one salt: of what comes beyond that, only the salt is known."""
MOST_BYTES = 65_536
_TRIES = 16
_SAFE = os.O_NOFOLLOW | os.O_CLOEXEC


class Origins:
    """The numbers of origins in the store that is open at `directory`, and what they stand for. 0 is that of none.

    What is begun has the name of its `writer`.
    """

    def __init__(self, directory: int, writer: int, seal: Sealer, read: Reader):
        self._directory, self._writer, self._seal, self._read = directory, writer, seal, read
        self.known: dict[int, Origin | None] = {0: None}
        """What each number stands for that was met, None where nobody says."""
        self._numbers: dict[Origin, int] = {}
        self._of_salt: Counter[str] = Counter()

    def number_of(self, origin: Origin | None) -> int:
        """The number of an origin; 0 where it has none."""
        return self._numbers.get(origin, 0) if origin is not None else 0

    def lacks(self, origins: Iterable[Origin | None]) -> set[Origin]:
        """Those of these origins that have no number."""
        return {origin for origin in origins if origin is not None and origin not in self._numbers}

    def learn_all(self) -> None:
        """Learn what all numbers stand for. It blocks. Raises OSError."""
        self.learn([number for name in names_in(self._directory, DIRECTORY) if (number := _parse(name))])

    def learn(self, numbers: Collection[int]) -> None:
        """Learn what these numbers stand for. It blocks."""
        for number in numbers:
            with suppress(OSError):
                self._note(number, self._content(number))
            self.known.setdefault(number, None)

    def give(self, origins: Iterable[Origin]) -> None:
        """Give these origins numbers, where there is room for that. It blocks. Raises OSError."""
        for origin in origins:
            if origin not in self._numbers:
                self._numbers[origin] = self._give(origin)

    def forget(self, used: Collection[Origin | None]) -> None:
        """Take the numbers of all other origins away, which no record has. It blocks. Raises OSError."""
        for number, origin in list(self.known.items()):
            if origin is not None and origin not in used:
                os.unlink(_path(number), dir_fd=self._directory)
                del self.known[number]
        self._numbers = {origin: n for origin, n in self._numbers.items() if n in self.known}
        with suppress(OSError):  # where some are left
            os.rmdir(DIRECTORY, dir_fd=self._directory)

    def _give(self, origin: Origin) -> int:
        if self._of_salt[origin.salt] >= MOST_OF_SALT and origin != (coarse := Origin(origin.salt, "")):
            self.give([coarse])
            return self._numbers[coarse]
        if len(self._numbers) >= MOST:
            return 0
        encoded = msgspec.msgpack.encode(origin)
        for attempt in range(_TRIES):
            number = int.from_bytes(blake3(encoded + bytes([attempt])).digest(4), "little")
            if number and self._take(number, origin, encoded):
                return number
        return 0

    def _take(self, number: int, origin: Origin, encoded: bytes) -> bool:
        """Have a number stand for an origin; False if it stands for something else."""
        with suppress(FileExistsError):
            os.mkdir(DIRECTORY, 0o700, dir_fd=self._directory)
        begun = f"{DIRECTORY}/{begun_name(self._writer)}"
        fd = os.open(begun, _SAFE | os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600, dir_fd=self._directory)
        try:
            with os.fdopen(fd, "wb") as file:
                file.write(self._seal(_name(number), encoded))
                file.flush()
                os.fsync(file.fileno())
            os.link(begun, _path(number), src_dir_fd=self._directory, dst_dir_fd=self._directory)
        except FileExistsError:
            if self._content(number) != origin:
                return False
        finally:
            with suppress(OSError):
                os.unlink(begun, dir_fd=self._directory)
        self._note(number, origin)
        return True

    def _note(self, number: int, origin: Origin | None) -> None:
        if origin is not None and self.known.get(number) is None:
            self.known[number] = origin
            self._numbers[origin] = number
            self._of_salt[origin.salt] += 1

    def _content(self, number: int) -> Origin | None:
        fd = os.open(_path(number), _SAFE | os.O_RDONLY | os.O_NONBLOCK, dir_fd=self._directory)
        with os.fdopen(fd, "rb") as file:
            encoded = self._read(_name(number), file.read(MOST_BYTES))
        try:
            return msgspec.msgpack.decode(encoded, type=Origin) if encoded is not None else None
        except msgspec.DecodeError:
            return None


def _name(number: int) -> str:
    return f"{number:08x}"


def _path(number: int) -> str:
    return f"{DIRECTORY}/{_name(number)}"


def _parse(name: str) -> int:
    try:
        return int(name, 16) if len(name) == 8 else 0
    except ValueError:
        return 0
