"""From an address to a connection whose server has said welcome."""

import asyncio
import os
import socket
import ssl
from contextlib import suppress

import msgspec

from async_cache.client.link import Link, Lost
from async_cache.client.memory import Segment
from async_cache.errors import AccessDeniedError, AsyncCacheError, ConnectionLostError, ProtocolError
from async_cache.memory.mapping import map_read_only
from async_cache.protocol.address import Address, default_url
from async_cache.protocol.certificates import reason
from async_cache.protocol.greeting import NoDescriptorError, check_byte_order, greet, peer_process
from async_cache.protocol.messages import Hello
from async_cache.protocol.secured import Secured

_NO_TLS = ("WRONG_VERSION_NUMBER", "PACKET_LENGTH_TOO_LONG", "UNSUPPORTED_PROTOCOL", "HTTP_REQUEST")


async def dial(
    address: Address, hello: Hello, lost: Lost, timeout_seconds: float, tls: ssl.SSLContext | None = None
) -> Link:
    """A link to the server at an address. Raises ConnectionLostError if there is none, or none that answers in time.

    What the server refuses the client with is raised as well, AccessDeniedError where it has not the certificate that
    it should, and ConfigError where the files of the address cannot be used; `tls` stands for them. `lost` is called
    once the link is lost.
    """
    check_byte_order()
    try:
        async with asyncio.timeout(timeout_seconds):
            try:
                return await _dial(address, hello, lost, tls)
            except NoDescriptorError:
                return await _dial(address, msgspec.structs.replace(hello, descriptors=False), lost, tls)
    except TimeoutError as error:
        raise ConnectionLostError(f"no answer from {address} within {timeout_seconds:.3g} s") from error
    except AsyncCacheError:
        raise
    except ssl.SSLError as error:  # what a server says to a certificate comes after the handshake
        raise AccessDeniedError(f"no TLS with the server at {address}: {reason(error)}") from error
    except (FileNotFoundError, ConnectionRefusedError) as error:
        raise ConnectionLostError(
            f"there is no server at {address}: {error.strerror}; `async-cache serve` starts one"
        ) from error
    except OSError as error:
        raise ConnectionLostError(f"cannot connect to {address}: {error.strerror or error}") from error


async def _dial(address: Address, hello: Hello, lost: Lost, tls: ssl.SSLContext | None) -> Link:
    if address.tls is not None and tls is None:
        tls = await asyncio.to_thread(address.tls.client_context)  # anew each time: certificates are renewed
    sock: socket.socket | Secured = (connected := await _connect(address))
    segment = None
    try:
        _check_owner(connected, address)
        if tls is not None:
            sock = await _secure(connected, tls, address)
        segment = Segment() if address.path and hello.descriptors else None
        welcome, arena_fd = await greet(sock, hello, segment.fd if segment is not None else None)
        arena = None
        if arena_fd is not None:
            try:
                arena = map_read_only(arena_fd, welcome.arena_bytes)
            finally:
                os.close(arena_fd)
        if segment is not None:
            segment.grow(welcome.arena_bytes)
        link = Link(welcome, arena, segment, lost)
    except BaseException:
        if isinstance(sock, Secured):
            sock.abort()
        else:
            sock.close()
        if segment is not None:
            segment.close()
        raise
    # From here on the connection owns the socket, and the link its segment. Where this is given up, they are closed as
    # with every connection that is lost: to close them here as well would hit whoever has their numbers by then.
    await link.connection.take(sock)
    return link


async def _connect(address: Address) -> socket.socket:
    if address.path:
        return _connect_unix(address)
    loop = asyncio.get_running_loop()
    places = await loop.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
    for number, (family, kind, _, _, where) in enumerate(places):
        sock = socket.socket(family, kind)
        sock.setblocking(False)
        last = number == len(places) - 1
        try:
            with suppress(*() if last else (OSError,)):
                await loop.sock_connect(sock, where)
                return sock
        except BaseException:
            sock.close()
            raise
        sock.close()
    raise OSError("the host has no address")


async def _secure(sock: socket.socket, tls: ssl.SSLContext, address: Address) -> Secured:
    try:
        return await Secured.connect(sock, tls, address.host)
    except ssl.SSLCertVerificationError as error:
        raise AccessDeniedError(f"the certificate of the server at {address} is not good: {reason(error)}") from error
    except ssl.SSLError as error:
        if error.reason in _NO_TLS:
            raise ProtocolError(f"the server speaks no TLS at {address}: connect to tcp://host:port") from error
        raise AccessDeniedError(f"no TLS with the server at {address}: {reason(error)}") from error


def _connect_unix(address: Address) -> socket.socket:
    """A socket that is connected at once. A loop would take one that finds the backlog full for connected."""
    sock = socket.socket(socket.AF_UNIX)
    sock.setblocking(False)
    try:
        sock.connect(address.path)
    except BlockingIOError:
        sock.close()
        raise ConnectionLostError(f"the server at {address} is busy: too many clients wait to be let in") from None
    except BaseException:
        sock.close()
        raise
    return sock


def _check_owner(sock: socket.socket, address: Address) -> None:
    """Raises AccessDeniedError for a socket that another user has made, who would be sent tokens and prompts.

    Root may connect to any user's server whose address it was given; what stands at its own default is its own.
    """
    if sock.family != socket.AF_UNIX:
        return
    _, owner = peer_process(sock)
    user = os.geteuid()
    if owner in (0, user) or (user == 0 and str(address) != default_url()):
        return
    raise AccessDeniedError(f"the server at this socket runs as another user, number {owner}")
