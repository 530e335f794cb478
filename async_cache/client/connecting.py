"""`connect`: from its arguments to a client, which they are checked for."""

import ssl
from collections.abc import Callable
from functools import partial

from async_cache.client.client import CONNECT_TIMEOUT_SECONDS, HEARTBEAT_SECONDS, CacheClient
from async_cache.client.dial import dial
from async_cache.client.writing import Post, call_now
from async_cache.errors import ConfigError
from async_cache.prompt.arguments import check_seconds, check_some_seconds
from async_cache.prompt.keys import check_label, check_text
from async_cache.protocol.address import Address, default_url
from async_cache.protocol.messages import VERSION, Hello


def connect(
    url: str | None = None,
    namespace: str = "",
    *,
    token: str | None = None,
    tls: ssl.SSLContext | None = None,
    connect_timeout_seconds: float = CONNECT_TIMEOUT_SECONDS,
    heartbeat_seconds: float | None = HEARTBEAT_SECONDS,
) -> CacheClient:
    """A client of the server at `unix:///path`, `tcp://host:port` or `tls://host:port`, to enter by `async with`.

    `url` None is where `async-cache serve` listens by default. Request ids are scoped to the `namespace`, and to the
    tenant whose `token` it is. A server by TLS has to have a certificate of the system's authorities, or of those that
    the URL names by `?ca=FILE`, which may name a client's own by `&cert=FILE&key=FILE`; `tls` stands for all of these.
    Entering tries for `connect_timeout_seconds`; a server that is silent for twice
    `heartbeat_seconds` is given up, and never if that is None. Raises ConfigError for an argument that cannot be used.
    """
    return client_maker(url, namespace, token, tls, connect_timeout_seconds, heartbeat_seconds)(call_now)


def client_maker(
    url: str | None,
    namespace: str,
    token: str | None,
    tls: ssl.SSLContext | None,
    connect_timeout_seconds: float,
    heartbeat_seconds: float | None,
) -> Callable[[Post], CacheClient]:
    """`connect` in two steps: arguments are checked now, a client is made where the way into its loop is known.

    Raises ConfigError for an argument that cannot be used.
    """
    address = Address.parse(default_url() if url is None else url)
    if tls is not None and address.tls is None:
        raise ConfigError(f"{address} is without TLS: connect to tls://host:port")
    if tls is not None and not isinstance(tls, ssl.SSLContext):
        raise ConfigError(f"tls must be an ssl.SSLContext, not {type(tls).__name__}")
    try:
        hello = Hello(VERSION, token, check_label("namespace", namespace))
        if token is not None:
            check_text("token", token)
        timeout_seconds = check_some_seconds("connect_timeout_seconds", connect_timeout_seconds)
        heartbeat_seconds = check_seconds("heartbeat_seconds", heartbeat_seconds)
    except (TypeError, ValueError) as error:
        raise ConfigError(str(error)) from error
    if heartbeat_seconds == 0:
        raise ConfigError("heartbeat_seconds must be more than 0, or None for no heartbeat")
    return lambda post: CacheClient(
        partial(dial, address, hello, tls=tls),
        connect_timeout_seconds=timeout_seconds,
        heartbeat_seconds=heartbeat_seconds,
        post=post,
    )
