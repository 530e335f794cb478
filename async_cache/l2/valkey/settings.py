"""What the URL of a server or a cluster says."""

import os
import re
import ssl
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

from async_cache.config import CacheConfig
from async_cache.errors import ConfigError
from async_cache.l2.urls.url import BackendURL, one_of, whole_number

PORT = 6379
_MAX_PATH_BYTES = 107  # of a Unix socket, see unix(7)
NAMESPACE = "akv"
_NAMESPACE = re.compile(r"[A-Za-z0-9_.:/-]{1,64}")  # no glob, and nothing that would begin the hash tag of a name
_ADDRESS = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([^\[\]:]+))(?::([0-9]{1,5}))?")


class Address(NamedTuple):
    """Where a server listens: a host and a port, or the path of a Unix socket and 0."""

    host: str
    port: int

    def __str__(self) -> str:
        if not self.port:
            return os.fsencode(self.host).decode(errors="backslashreplace")  # the name of a backend is text
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to reach a server, or a cluster through any of its nodes, and what is ours there."""

    name: str
    addresses: tuple[Address, ...]
    is_cluster: bool = False
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    password_file: Path | None = None
    database: int = 0
    tls: ssl.SSLContext | None = field(default=None, repr=False)
    namespace: str = NAMESPACE
    ttl_seconds: float | None = None
    connections: int = 2
    connect_timeout_seconds: float = 1.0
    usage_seconds: float = 600.0

    @classmethod
    def from_url(cls, url: BackendURL) -> "Settings":
        """The settings that a URL stands for; `docs/backends/valkey.md` has them all. Raises ConfigError."""
        kind, _, variant = url.scheme.partition("+")
        is_tls = kind in ("valkeys", "rediss")
        is_cluster, is_unix = variant == "cluster", variant == "unix"
        parsers: dict[str, Callable[[str], Any]] = {
            "namespace": _namespace,
            "ttl": _seconds,
            "connections": whole_number(most=64),
            "connect_timeout": _seconds,
            "usage_every": _seconds,
            "password_file": _file,
        }
        if is_unix:
            parsers["db"] = _database
        if is_tls:
            parsers |= {"ca": _file, "cert": _file, "key": _file, "verify": one_of(full="full", ca="ca", none="none")}
        given = url.parameters(**parsers)
        credentials, _, hosts = url.netloc.rpartition("@")
        username, password = _credentials(credentials)
        addresses: tuple[Address, ...]
        if is_unix:
            addresses = (_socket_path(hosts, url.path),)
            database = given.pop("db", 0)
        else:
            addresses = _addresses(hosts, several=is_cluster)
            database = _database(url.path.removeprefix("/") or "0")
        if is_cluster and database:
            raise ConfigError("a cluster has no databases")
        if password is not None and "password_file" in given:
            raise ConfigError("there are two passwords: that of the URL, and password_file")
        namespace = given.get("namespace", NAMESPACE)
        return cls(
            name=_name(url.scheme, addresses, database, namespace),
            addresses=addresses,
            is_cluster=is_cluster,
            username=username,
            password=password,
            password_file=given.get("password_file"),
            database=database,
            tls=_tls(given) if is_tls else None,
            namespace=namespace,
            ttl_seconds=given.get("ttl"),
            connections=given.get("connections", cls.connections),
            connect_timeout_seconds=given.get("connect_timeout", cls.connect_timeout_seconds),
            usage_seconds=given.get("usage_every", cls.usage_seconds),
        )


def _name(scheme: str, addresses: tuple[Address, ...], database: int, namespace: str) -> str:
    """What tells this backend from others: the URL without its credentials and what is no matter of identity."""
    where = ",".join(map(str, addresses))
    is_unix = not addresses[0].port
    path = f"/{database}" if database and not is_unix else ""
    query = [f"db={database}"] if database and is_unix else []
    query += [f"namespace={namespace}"] if namespace != NAMESPACE else []
    return f"{scheme}://{where}{path}{'?' if query else ''}{'&'.join(query)}"


def _addresses(hosts: str, *, several: bool) -> tuple[Address, ...]:
    addresses = tuple(map(_address, hosts.split(",")))
    if len(addresses) > 1 and not several:
        raise ConfigError("only a cluster has several addresses")
    if len(set(addresses)) < len(addresses):
        raise ConfigError("an address is repeated")
    return addresses


def _address(text: str) -> Address:
    match = _ADDRESS.fullmatch(text)
    port = int(match[3] or PORT) if match else 0
    if match is None or not 0 < port < 65536:
        raise ConfigError(f"{text!r} is not host or host:port")
    return Address(match[1] or match[2], port)


def _socket_path(host: str, path: str) -> Address:
    path = unquote(path, errors="surrogateescape")
    if host or not path.startswith("/") or "\0" in path:
        raise ConfigError("the path of a Unix socket is absolute: valkey+unix:///path")
    if len(os.fsencode(path)) > _MAX_PATH_BYTES:
        raise ConfigError(f"the path of a Unix socket has at most {_MAX_PATH_BYTES} bytes")
    return Address(path, 0)


def _credentials(text: str) -> tuple[str | None, str | None]:
    """User and password of `user:password`, `:password` or `user`."""
    username, colon, password = text.partition(":")
    return unquote(username) or None, unquote(password) if colon else None


def _database(text: str) -> int:
    if not re.fullmatch("[0-9]{1,5}", text):
        raise ConfigError(f"{text!r} is not the number of a database")
    return int(text)


def _namespace(text: str) -> str:
    if not _NAMESPACE.fullmatch(text):
        raise ConfigError(f"{text!r} is not 1 to 64 of the characters A-Z a-z 0-9 _ . : / -")
    return text


def _seconds(text: str) -> float:
    """A number of seconds, within the bounds of the cache's own settings."""
    value = CacheConfig.parse("lookup_timeout_seconds", text)
    return float(value)


def _file(text: str) -> Path:
    path = Path(text)
    if not path.is_absolute() or "\0" in text:
        raise ConfigError(f"the path {text!r} is not absolute")
    return path


def _tls(given: dict[str, Any]) -> ssl.SSLContext:
    """Certificates are those of the system, or of `ca`; the host's name is verified unless `verify` says otherwise."""
    if ("cert" in given) != ("key" in given):
        raise ConfigError("cert and key belong together")
    try:
        context = ssl.create_default_context(cafile=given.get("ca"))
        if "cert" in given:
            context.load_cert_chain(given["cert"], given["key"], password=_no_password)
    except (OSError, ssl.SSLError, ValueError) as error:
        raise ConfigError(f"the certificates cannot be used: {error}") from error
    verify = given.get("verify", "full")
    context.check_hostname = verify == "full"
    if verify == "none":
        context.verify_mode = ssl.CERT_NONE
    return context


def _no_password() -> str:
    raise ValueError("the key has a password")
