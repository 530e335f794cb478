"""The first frame in each direction, with the file descriptors that travel beside it over a Unix socket.

Without TLS it is read and written on the bare socket, since a transport passes no descriptors; and a peer that is not
known yet may send nothing else.
"""

import asyncio
import os
import socket
import struct
import sys
from contextlib import suppress

from async_cache.errors import ConfigError, ConnectionLostError, LimitError, ProtocolError, ServiceError
from async_cache.protocol.frames import HEADER_BYTES, MAX_GREETING_BYTES, check_size, frame
from async_cache.protocol.messages import Decoder, Failed, Hello, Welcome, encode, error_of
from async_cache.protocol.secured import Secured, looks_like_tls, readable

_ONE_DESCRIPTOR = socket.CMSG_LEN(struct.calcsize("i"))

_hello_decoder = Decoder(Hello)
_welcome_decoder = Decoder(Welcome | Failed)


class NoDescriptorError(ProtocolError):
    """The server has sent a descriptor, and it has not come: what is between the two passes none."""


def check_byte_order() -> None:
    """Check that this is a little-endian machine: token ids and KV travel as one has them. Raises ConfigError."""
    if sys.byteorder != "little":
        raise ConfigError("clients and servers run on little-endian machines only: KV travels as it lies in memory")


async def receive_hello(sock: socket.socket | Secured) -> tuple[Hello, int | None]:
    """What a client says first, and its descriptor, which is the caller's to close.

    Raises ProtocolError for anything but a Hello, LimitError where no descriptor can be taken, ConnectionLostError if
    the client is gone.
    """
    payload, descriptor = await _receive(sock)
    try:
        return _hello_decoder.decode(payload), descriptor
    except ProtocolError:
        if descriptor is not None:
            os.close(descriptor)
        raise


async def send(sock: socket.socket | Secured, message: Hello | Welcome | Failed, descriptor: int | None = None) -> None:
    """Send a message, and a descriptor with its first byte."""
    data = frame(encode(message))
    if isinstance(sock, Secured):
        sock.send(data)
        return
    if descriptor is not None:
        data = data[socket.send_fds(sock, [data], [descriptor]) :]  # the first send to a socket does not block
    await asyncio.get_running_loop().sock_sendall(sock, data)


async def greet(sock: socket.socket | Secured, hello: Hello, descriptor: int | None) -> tuple[Welcome, int | None]:
    """Introduce a client; what the server says, and its descriptor. Raises the ServiceError that it refuses with."""
    with suppress(BrokenPipeError, ConnectionResetError):  # it has refused already, and said why
        await send(sock, hello, descriptor)
    payload, received = await _receive(sock)
    try:
        answer = _welcome_decoder.decode(payload)
        if isinstance(answer, Failed):
            error = error_of(answer)
            raise error if isinstance(error, ServiceError) else ConnectionLostError(str(error))
        if answer.mapped and received is None:
            raise NoDescriptorError("the server's memory did not come with its welcome")
    except BaseException:
        if received is not None:
            os.close(received)
        raise
    return answer, received


def peer_process(sock: socket.socket) -> tuple[int, int]:
    """The process at the other end of a Unix socket, and its user."""
    process, user, _ = struct.unpack(
        "3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    )
    return process, user


async def _receive(sock: socket.socket | Secured) -> tuple[bytes, int | None]:
    """One frame, and not a byte more; the first descriptor that comes with it."""
    if isinstance(sock, Secured):
        return await sock.receive(), None
    descriptors: list[int] = []
    try:
        header = await _receive_exactly(sock, HEADER_BYTES, descriptors)
        if looks_like_tls(header):
            raise ProtocolError("this address speaks no TLS: connect to tcp://host:port")
        length = int.from_bytes(header, "little")
        check_size(length, MAX_GREETING_BYTES)
        payload = await _receive_exactly(sock, length, descriptors)
    except BaseException:
        for descriptor in descriptors:
            os.close(descriptor)
        raise
    return payload, descriptors[0] if descriptors else None


async def _receive_exactly(sock: socket.socket, size_bytes: int, descriptors: list[int]) -> bytes:
    data = b""
    while len(data) < size_bytes:
        with suppress(BlockingIOError):
            if sock.family == socket.AF_UNIX:
                more = _receive_with_descriptor(sock, size_bytes - len(data), descriptors)
            else:
                more = sock.recv(size_bytes - len(data))
            if not more:
                raise ConnectionLostError("the other end closed the connection before it said anything")
            data += more
            continue
        await readable(sock)
    return data


def _receive_with_descriptor(sock: socket.socket, size_bytes: int, descriptors: list[int]) -> bytes:
    """Keeps the first descriptor, and closes all others. Raises LimitError where the system has dropped the first.

    (`socket.recv_fds` forgets the flags in Python 3.11.)
    """
    data, ancillary, flags, _ = sock.recvmsg(size_bytes, _ONE_DESCRIPTOR, socket.MSG_CMSG_CLOEXEC)
    for level, kind, came in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            descriptors += struct.unpack(f"{len(came) // 4}i", came[: len(came) // 4 * 4])
    if flags & socket.MSG_CTRUNC and not descriptors:
        raise LimitError("a file descriptor that came with the greeting was dropped: this process may have no more")
    while len(descriptors) > 1:
        os.close(descriptors.pop())
    return data
