"""Sockets to listen at: Unix, which only their owner may open, and TCP."""

import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from async_cache.errors import ConfigError
from async_cache.protocol.address import Address

_BACKLOG = 1024


class Listener:
    """A socket that listens until it is closed."""

    def __init__(self, address: Address):
        """Listen at an address. Raises ConfigError, which says what is in the way."""
        self._inode = 0
        try:
            if address.path:
                self.socket = self._bind_unix(Path(address.path))
            else:
                self.socket = self._bind_tcp(address)
                address = Address(host=address.host, port=self.socket.getsockname()[1])
        except OSError as error:
            raise ConfigError(f"cannot listen at {address}: {error.strerror or error}") from error
        self.address = address

    def _bind_unix(self, path: Path) -> socket.socket:
        """Bind under another name first, so that clients can connect from the moment when the right name is there."""
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if path.parent.stat().st_uid not in (0, os.getuid()):
            raise ConfigError(f"cannot listen at {path}: its directory belongs to somebody else")
        made = socket.socket(socket.AF_UNIX)
        new = path.with_name(f".{os.getpid():x}")
        try:
            with suppress(FileNotFoundError):
                new.unlink()
            self._bind_in(made, new)
            new.chmod(0o600)
            made.listen(_BACKLOG)
            self._inode = new.stat().st_ino
            with _alone_in(path.parent):
                _check_free(path)
                new.rename(path)
        except BaseException:
            made.close()
            with suppress(FileNotFoundError):
                new.unlink()
            raise
        made.setblocking(False)
        return made

    @staticmethod
    def _bind_in(made: socket.socket, path: Path) -> None:
        """Bind by way of the directory, since this name may be too long for a socket."""
        directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            made.bind(f"/proc/self/fd/{directory}/{path.name}")
        finally:
            os.close(directory)

    def _bind_tcp(self, address: Address) -> socket.socket:
        family, kind, _, _, where = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)[0]
        made = socket.socket(family, kind)
        try:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            made.bind(where)
            made.listen(_BACKLOG)
        except BaseException:
            made.close()
            raise
        made.setblocking(False)
        return made

    def close(self) -> None:
        """Stop listening, and remove the Unix socket, unless another one has taken its place."""
        self.socket.close()
        path = self.address.path
        if path:
            with suppress(OSError), _alone_in(Path(path).parent):
                if os.stat(path).st_ino == self._inode:
                    os.unlink(path)


@contextmanager
def _alone_in(directory: Path) -> Iterator[None]:
    """Let one server at a time find an address free and take it, or give it up."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _check_free(path: Path) -> None:
    """Check that no server listens there; the socket of a dead one may be replaced. Raises ConfigError."""
    if not path.exists():
        return
    if not path.is_socket():
        raise ConfigError(f"cannot listen at {path}: it is there, and not a socket")
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            return
        except OSError as error:
            if error.errno != errno.EAGAIN:  # that is one whose backlog is full
                raise
    raise ConfigError(f"cannot listen at {path}: a server is listening there already")
