"""From the URL of a backend to the backend: our own schemes, and those of other packages.

A package gives a scheme by an entry point: in the group `async_cache.backends`, by the scheme's name, a callable that
makes a backend, not opened yet, from a `BackendURL`.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import EntryPoint, entry_points
from typing import Any, NamedTuple
from urllib.parse import unquote, unquote_plus

import msgspec

from async_cache.config import CacheConfig, hide_password, prefixed
from async_cache.errors import ConfigError
from async_cache.l2.backend import Backend, Limits
from async_cache.l2.filesystem.backend import FileSystemBackend
from async_cache.l2.memory import MemoryBackend
from async_cache.l2.url import BackendURL

GROUP = "async_cache.backends"


class _Scheme(NamedTuple):
    form: str  # shown to whoever wrote a URL that does not fit
    make: Callable[[BackendURL], Backend]


def _later(value: str) -> Callable[[BackendURL], Backend]:
    """What makes a backend, written as `module:attribute`, which is imported when it is first asked for."""

    def make(url: BackendURL) -> Backend:
        made: Backend = EntryPoint(url.scheme, value, GROUP).load()(url)
        return made

    return make


_OWN = {
    "memory": _Scheme("memory://[name]?capacity=1GiB", MemoryBackend.from_url),
    "fs": _Scheme(
        "fs:///path?capacity=10GiB&durability=none|fsync&direct=true|false&threads=4", FileSystemBackend.from_url
    ),
}
_VALKEY = _Scheme(
    "valkey://host:6379/0?namespace=akv&ttl=3600&connections=2, valkeys://... (TLS), valkey+unix:///path?..., "
    "valkey+cluster://host:port,host:port?..., valkeys+cluster://... (redis and rediss mean the same)",
    _later("async_cache.l2.valkey.backend:ValkeyBackend.from_url"),
)
_VARIANTS = ("", "s", "+unix", "+cluster", "s+cluster")
_OWN |= {scheme + variant: _VALKEY for scheme in ("valkey", "redis") for variant in _VARIANTS}
_LIMITS = {name.removesuffix("_seconds"): name for name in Limits.__struct_fields__}
"""The parameters that every URL may have, and the limit that each sets."""
_PARSERS = {parameter: partial(CacheConfig.parse, name) for parameter, name in _LIMITS.items()}


def from_url(url: str) -> Backend:
    """The backend, not opened yet, that a URL describes.

        memory://[name]?capacity=1GiB
        fs:///path?capacity=10GiB&durability=none|fsync&direct=true|false&threads=4
        valkey://host:6379/0?namespace=akv&ttl=3600&connections=2      (`docs/backends/valkey.md` has its variants)

    `capacity` is in bytes or with a unit; "none" is no bound. Without it, memory is unbounded and a directory
    is bounded to 10 GiB. A path is absolute; in it, "?", "#" and "%" are percent-encoded. Other schemes are those of
    installed packages. `lookup_timeout`, `load_timeout`, `store_timeout` and `breaker_reset` in seconds, and
    `breaker_failures`, may stand in any URL, and come before the settings of the cache.

    Raises ConfigError, which names the URL without its password, and what is allowed or who made it.
    """
    allowed = f"; allowed: {' or '.join(dict.fromkeys(scheme.form for scheme in _OWN.values()))}"
    try:
        parts = BackendURL.parse(url)
        own = _OWN.get(parts.scheme)
        make = own.make if own is not None else partial(_make, _find(parts.scheme))
        if own is None:
            allowed = ""
        parts, limits = _split_limits(parts)
        backend = make(parts)
        if not backend.name.isprintable():
            raise ConfigError(f"the name {backend.name!r} cannot be printed")
    except ConfigError as error:
        raise ConfigError(f"{hide_password(url)}: {error}{allowed}") from error
    if limits:
        backend.limits = msgspec.structs.replace(backend.limits, **limits)
    return backend


def from_urls(urls: Sequence[str]) -> list[Backend]:
    """The backends of the setting `l2`, not opened yet. Raises ConfigError, which names the setting."""
    with prefixed("l2"):
        backends = [from_url(url) for url in urls]
        check_names(backends)
    return backends


def check_names(backends: Sequence[Backend]) -> None:
    """Raises ConfigError for two backends of the same name: nobody could tell them apart."""
    names = Counter(backend.name for backend in backends)
    for name in names:
        if names[name] > 1:
            raise ConfigError(f"{names[name]} backends have the same name {name!r}")


def _split_limits(url: BackendURL) -> tuple[BackendURL, dict[str, Any]]:
    """The URL without the parameters that set limits, and the limits."""
    fields = url.query.split("&")
    ours = [field for field in fields if unquote_plus(field.partition("=")[0]) in _LIMITS]
    values = BackendURL("", "", "", "&".join(ours), "").parameters(**_PARSERS)
    rest = url._replace(query="&".join(field for field in fields if field not in ours))
    return rest, {_LIMITS[parameter]: value for parameter, value in values.items()}


# Other packages.


def _find(scheme: str) -> list[EntryPoint]:
    """What packages have for a scheme that is not ours: one entry point, or more than one if they contradict."""
    found = list(entry_points(group=GROUP, name=scheme)) if scheme else []
    if not found:
        others = sorted({entry_point.name for entry_point in entry_points(group=GROUP)} - set(_OWN))
        of_packages = f" (installed packages have {', '.join(others)})" if others else ""
        raise ConfigError(f"unknown scheme {scheme!r}{of_packages}")
    return found


def _make(found: list[EntryPoint], url: BackendURL) -> Backend:
    """The backend that another package makes of the URL. Raises ConfigError, whatever the package does."""
    if len(found) > 1:
        raise ConfigError(f"{' and '.join(sorted(map(_who, found)))} both give the scheme {url.scheme!r}")
    (entry_point,) = found
    who = _who(entry_point)
    try:
        make = entry_point.load()
    except Exception as error:
        raise ConfigError(f"{who} cannot be imported: {_told(error, url)}") from error
    try:
        backend = make(url)
    except Exception as error:
        raise ConfigError(f"{who} failed: {_told(error, url)}") from error
    if not isinstance(backend, Backend):
        raise ConfigError(f"{who} made no Backend, but {type(backend).__name__}")
    if not isinstance(getattr(backend, "name", None), str):
        raise ConfigError(f"{who} made a Backend without a name")
    return backend


def _who(entry_point: EntryPoint) -> str:
    """What an entry point names, and the package that it belongs to."""
    dist = entry_point.dist
    return f"{entry_point.value} of {f'{dist.name} {dist.version}' if dist is not None else 'an unknown package'}"


def _told(error: Exception, url: BackendURL) -> str:
    """What an exception says, in one line and without the password of the URL."""
    text = str(error) if isinstance(error, ConfigError) else f"{type(error).__name__}: {error}"
    text = " ".join(text.split())
    for password in (url.password, unquote(url.password or "")):
        text = text.replace(password, "***") if password else text
    return text
