"""Where a server listens: `unix:///path`, `tcp://host:port`, or `tls://host:port`."""

import ipaddress
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Self
from urllib.parse import parse_qsl, quote, unquote, urlsplit

from async_cache.errors import ConfigError
from async_cache.protocol.certificates import Certificates

MAX_PATH_BYTES = 107  # of a Unix socket, see unix(7)


@dataclass(frozen=True)
class Address:
    """Where a server listens: the path of a Unix socket, or a host and port, there with TLS if there is `tls`."""

    path: str = ""
    host: str = ""
    port: int = 0
    tls: Certificates | None = None

    @classmethod
    def parse(cls, url: str) -> Self:
        """The address that a URL names; in a path, "?", "#" and "%" are percent-encoded. Raises ConfigError.

        After `tls://host:port` may stand the files that are used there: `?ca=FILE&cert=FILE&key=FILE`.
        """
        if not isinstance(url, str):
            raise ConfigError(f"an address must be a URL, not {type(url).__name__}")
        try:
            if any(c < " " for c in url):
                raise ValueError("control characters are percent-encoded")
            parts = urlsplit(url)
            is_tls = parts.scheme == "tls"
            if (parts.query and not is_tls) or parts.fragment or parts.username is not None:
                raise ValueError("nothing but an address belongs there")
            if parts.scheme == "unix":
                return cls(path=_check_path(parts.netloc, unquote(parts.path, errors="surrogateescape")))
            if parts.scheme == "tcp" or is_tls:
                if parts.path or not parts.hostname or parts.port is None:
                    raise ValueError("a host and a port are needed, and no path")
                parts.hostname.encode("idna")  # what cannot be looked up is refused here
                return cls(host=parts.hostname, port=parts.port, tls=_certificates(parts.query) if is_tls else None)
            raise ValueError(f"unknown scheme {parts.scheme!r}")
        except ValueError as error:
            allowed = "unix:///path, tcp://host:port or tls://host:port"
            raise ConfigError(f"{url!r}: {error}; allowed: {allowed}") from error

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach it."""
        if self.path or self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    def __str__(self) -> str:
        if self.path:
            return f"unix://{quote(self.path, errors='surrogateescape')}"
        scheme = "tcp" if self.tls is None else "tls"
        return f"{scheme}://[{self.host}]:{self.port}" if ":" in self.host else f"{scheme}://{self.host}:{self.port}"


def default_url() -> str:
    """The URL of the user's own socket: a server listens there, and a client connects to it, by default."""
    base = os.environ.get("XDG_RUNTIME_DIR", "")
    if not base.startswith("/"):
        base = str(Path(tempfile.gettempdir()) / f"async_cache-{os.getuid()}")
    return str(Address(path=f"{base}/async_cache.sock"))


def _check_path(host: str, path: str) -> str:
    if host or not path.startswith("/") or path.endswith("/"):
        raise ValueError("the path of a socket is absolute")
    if len(os.fsencode(path)) > MAX_PATH_BYTES or "\0" in path:
        raise ValueError(f"the path of a socket has at most {MAX_PATH_BYTES} bytes")
    return path


def _certificates(query: str) -> Certificates:
    files = parse_qsl(query, keep_blank_values=True, strict_parsing=True, errors="surrogateescape") if query else []
    given = dict(files)
    if len(given) < len(files) or not given.keys() <= {"ca", "cert", "key"} or not all(given.values()):
        raise ValueError("behind the address may stand one ca=FILE, one cert=FILE and one key=FILE")
    if "key" in given and "cert" not in given:
        raise ValueError("a key is that of a certificate: cert=FILE is missing")
    return Certificates(**given)
