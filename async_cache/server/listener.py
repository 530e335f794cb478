"""Sockets to listen at: Unix, which only their owner may open, and TCP, with TLS or without."""

import errno
import fcntl
import os
import socket
import ssl
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Self

from async_cache.aio.forks import keep_from_children
from async_cache.errors import ConfigError
from async_cache.protocol.address import MAX_PATH_BYTES, Address

_BACKLOG = 1024
_ALONE_SECONDS = 2.0  # how long others may keep a directory to themselves: one that starts needs a millisecond
_LOOK_SECONDS = 0.01
_FIRST_GIVEN = 3


class Listener:
    """A socket that listens until it is closed."""

    def __init__(self, address: Address):
        """Listen at an address. Raises ConfigError, which says what is in the way."""
        self._inode = 0
        self.tls: ssl.SSLContext | None = address.tls.server_context() if address.tls is not None else None
        """What its connections are secured by."""
        try:
            if address.path:
                self.socket = self._bind_unix(Path(address.path))
            else:
                self.socket = self._bind_tcp(address)
                address = replace(address, port=self.socket.getsockname()[1])
        except OSError as error:
            raise ConfigError(f"cannot listen at {address}: {error.strerror or error}") from error
        self.address = address
        keep_from_children(self)

    @classmethod
    def given(cls, sock: socket.socket) -> Self:
        """One at a socket that listens already, and whose name is somebody else's."""
        made = cls.__new__(cls)
        made.socket, made._inode, made.tls = sock, 0, None
        sock.setblocking(False)
        name = sock.getsockname()
        is_unix = sock.family == socket.AF_UNIX
        made.address = Address(path=os.fsdecode(name)) if is_unix else Address(host=name[0], port=name[1])
        keep_from_children(made)
        return made

    def renew(self) -> None:
        """Read the files of TLS anew, for those who connect from now on. Raises ConfigError; then nothing is changed.

        May run in any thread.
        """
        if self.address.tls is not None:
            self.tls = self.address.tls.server_context()

    def _bind_unix(self, path: Path) -> socket.socket:
        """Bind under the name that it keeps: who sweeps the directory learns from the system that it is in use."""
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if path.parent.stat().st_uid not in (0, os.getuid()):
            raise ConfigError(f"cannot listen at {path}: its directory belongs to somebody else")
        made = socket.socket(socket.AF_UNIX)
        try:
            made.setblocking(False)
            os.fchmod(made.fileno(), 0o600)  # which its name gets from it
            with _alone_in(path.parent):
                _make_free(path)
                made.bind(str(_real(path)))
                made.listen(_BACKLOG)
                self._inode = path.stat().st_ino
        except BaseException:
            made.close()
            raise
        return made

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

    def descriptors(self) -> list[int]:
        """The descriptor of the socket, as long as it is open."""
        return [self.socket.fileno()]

    def close(self) -> None:
        """Stop listening, and remove the Unix socket, unless another one has taken its place."""
        path = self.address.path
        if path and self._inode:
            # While it listens nobody replaces it, and its number means no other file.
            with suppress(OSError), _alone_in(Path(path).parent):
                if os.stat(path).st_ino == self._inode:
                    os.unlink(path)
        self.socket.close()


def sockets_given() -> list[tuple[str, socket.socket]]:
    """The sockets that a service manager has passed on to this process, with their names, as in sd_listen_fds(3)."""
    environ = os.environ
    if environ.pop("LISTEN_PID", "") != str(os.getpid()):
        return []
    count, names = int(environ.pop("LISTEN_FDS", "0")), environ.pop("LISTEN_FDNAMES", "").split(":")
    names += [""] * (count - len(names))
    descriptors = range(_FIRST_GIVEN, _FIRST_GIVEN + count)
    for descriptor in descriptors:
        os.set_inheritable(descriptor, False)
    return [(name, socket.socket(fileno=descriptor)) for name, descriptor in zip(names, descriptors, strict=False)]


@contextmanager
def _alone_in(directory: Path) -> Iterator[None]:
    """Let one server at a time find an address free and take it, or give it up.

    Anybody who can read the directory can keep it locked for ever: raises TimeoutError then.
    """
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _lock(descriptor, directory)
        try:
            yield
        finally:
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # a child that was forked meanwhile has it, too
    finally:
        os.close(descriptor)


def _lock(descriptor: int, directory: Path) -> None:
    deadline = time.monotonic() + _ALONE_SECONDS
    while True:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise TimeoutError(errno.ETIMEDOUT, f"another process keeps {directory} locked") from None
        time.sleep(_LOOK_SECONDS)  # a lock cannot be waited for and given up


def _real(path: Path) -> Path:
    """The path without links in it, by which others know the socket, if that is not too long for one."""
    real = path.parent.resolve() / path.name
    return real if len(os.fsencode(real)) <= MAX_PATH_BYTES else path


def _make_free(path: Path) -> None:
    """Remove the socket of a dead server. Raises ConfigError where a server listens, or something else is there."""
    if not path.exists():
        return
    if not path.is_socket():
        raise ConfigError(f"cannot listen at {path}: it is there, and not a socket")
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
        except OSError as error:
            if error.errno != errno.EAGAIN:  # that is one whose backlog is full
                raise
    raise ConfigError(f"cannot listen at {path}: a server is listening there already")
