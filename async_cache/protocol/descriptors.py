"""Descriptors that do not have the numbers of standard streams, where a program has closed these.

libuv ends a process that closes one of these numbers, and any library may write to them.
"""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

_STANDARD_ERROR = 2


@contextmanager
def above_standard() -> Iterator[None]:
    """Have what is opened meanwhile not get the number of a standard stream."""
    taken: list[int] = []
    try:
        while not taken or taken[-1] <= _STANDARD_ERROR:
            taken.append(os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC))
        os.close(taken.pop())
        yield
    finally:
        for descriptor in taken:
            os.close(descriptor)


def moved_above_standard(sock: socket.socket) -> socket.socket:
    """The socket, under another number if it has that of a standard stream."""
    if sock.fileno() > _STANDARD_ERROR:
        return sock
    with sock:
        moved = socket.socket(fileno=fcntl.fcntl(sock, fcntl.F_DUPFD_CLOEXEC, _STANDARD_ERROR + 1))
    moved.setblocking(False)
    return moved
