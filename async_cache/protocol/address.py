"""Where a server listens: `unix:///path` or `tcp://host:port`."""

import ipaddress
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Self
from urllib.parse import quote, unquote, urlsplit

from async_cache.errors import ConfigError

MAX_PATH_BYTES = 107  # of a Unix socket, see unix(7)


@dataclass(frozen=True)
class Address:
    """Where a server listens: the path of a Unix socket, or a host and port."""

    path: str = ""
    host: str = ""
    port: int = 0

    @classmethod
    def parse(cls, url: str) -> Self:
        """The address that a URL names; in a path, "?", "#" and "%" are percent-encoded. Raises ConfigError."""
        if not isinstance(url, str):
            raise ConfigError(f"an address must be a URL, not {type(url).__name__}")
        try:
            if any(c < " " for c in url):
                raise ValueError("control characters are percent-encoded")
            parts = urlsplit(url)
            if parts.query or parts.fragment or parts.username is not None:
                raise ValueError("nothing but an address belongs there")
            if parts.scheme == "unix":
                return cls(path=_check_path(parts.netloc, unquote(parts.path, errors="surrogateescape")))
            if parts.scheme == "tcp":
                if parts.path or not parts.hostname or parts.port is None:
                    raise ValueError("a host and a port are needed, and no path")
                parts.hostname.encode("idna")  # what cannot be looked up is refused here
                return cls(host=parts.hostname, port=parts.port)
            raise ValueError(f"unknown scheme {parts.scheme!r}")
        except ValueError as error:
            raise ConfigError(f"{url!r}: {error}; allowed: unix:///path or tcp://host:port") from error

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
        return f"tcp://[{self.host}]:{self.port}" if ":" in self.host else f"tcp://{self.host}:{self.port}"


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
