"""From the URL of a backend to the backend."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from async_cache.config import parse_bytes
from async_cache.errors import ConfigError
from async_cache.l2.backend import Backend
from async_cache.l2.filesystem.backend import FileSystemBackend
from async_cache.l2.memory import MemoryBackend


@dataclass(frozen=True)
class _Scheme:
    """How the URLs of one scheme become the arguments of its implementation."""

    form: str  # shown to whoever wrote a URL that does not fit
    make: Callable[..., Backend]
    place: Callable[[SplitResult], dict[str, Any]]  # from what stands before the "?"
    parameters: dict[str, tuple[str, Callable[[str], Any]]]  # by name: the argument it sets, and its parser


def from_url(url: str) -> Backend:
    """The backend, not opened yet, that a URL describes.

        memory://[name]?capacity=1GiB
        fs:///path?capacity=10GiB&durability=none|fsync&direct=true|false&threads=4

    `capacity` is in bytes or with a unit; "none" is no bound. Without it, memory is unbounded and a directory
    is bounded to 10 GiB. A path is absolute; in it, "?", "#" and "%" are percent-encoded.

    Raises ConfigError, which names the URL and what is allowed.
    """
    try:
        parts = urlsplit(url)
        scheme = _SCHEMES.get(parts.scheme)
        if scheme is None:
            raise ValueError(f"unknown scheme {parts.scheme!r}")
        arguments = _arguments(scheme, parts)
    except ValueError as error:  # a ConfigError of parse_bytes is one, too
        forms = " or ".join(known.form for known in _SCHEMES.values())
        raise ConfigError(f"{_shown(url)}: {error}; allowed: {forms}") from error
    return scheme.make(**arguments)


def _arguments(scheme: _Scheme, parts: SplitResult) -> dict[str, Any]:
    if parts.fragment:
        raise ValueError("a fragment means nothing here")
    arguments = scheme.place(parts)
    for name, value in parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query)):
        if name not in scheme.parameters:
            raise ValueError(f"unknown parameter {name!r}")
        argument, parse = scheme.parameters[name]
        if argument in arguments:
            raise ValueError(f"parameter {name!r} is repeated")
        try:
            arguments[argument] = parse(value)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    return arguments


def _shown(url: str) -> str:
    """The URL without a password."""
    return re.sub(r"//[^/?#]*@", "//***@", url)


def _name(parts: SplitResult) -> dict[str, Any]:
    if parts.path:
        raise ValueError("memory has no path")
    return {"name": parts.netloc} if parts.netloc else {}


def _directory(parts: SplitResult) -> dict[str, Any]:
    if parts.netloc:
        raise ValueError("a directory has no host")
    if not parts.path.startswith("/"):
        raise ValueError(f"the path {parts.path!r} is not absolute")
    return {"path": unquote(parts.path)}


def _capacity(text: str) -> int | None:
    if text == "none":
        return None
    size_bytes = parse_bytes(text)
    if not size_bytes:
        raise ValueError('must be more than 0, or "none" for no bound')
    return size_bytes


def _threads(text: str) -> int:
    if not re.fullmatch("[1-9][0-9]{0,3}", text):
        raise ValueError(f"{text!r} is not a number from 1 to 9999")
    return int(text)


def _choice(**values: Any) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        if text not in values:
            raise ValueError(f"{text!r} is not {' or '.join(values)}")
        return values[text]

    return parse


_SCHEMES = {
    "memory": _Scheme(
        form="memory://[name]?capacity=1GiB",
        make=MemoryBackend,
        place=_name,
        parameters={"capacity": ("capacity_bytes", _capacity)},
    ),
    "fs": _Scheme(
        form="fs:///path?capacity=10GiB&durability=none|fsync&direct=true|false&threads=4",
        make=FileSystemBackend,
        place=_directory,
        parameters={
            "capacity": ("capacity_bytes", _capacity),
            "durability": ("durability", _choice(none="none", fsync="fsync")),
            "direct": ("direct", _choice(true=True, false=False)),
            "threads": ("threads", _threads),
        },
    ),
}
