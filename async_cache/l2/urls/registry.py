"""From the URL of a backend to the backend: our own schemes, and those of other packages.

A package gives a scheme by an entry point: in the group `async_cache.backends`, by the scheme's name, a callable that
makes a backend, not opened yet, from a `BackendURL`.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import EntryPoint, entry_points
from typing import Any
from urllib.parse import unquote, unquote_plus

import msgspec

from async_cache.config import CacheConfig, hide_password, prefixed
from async_cache.errors import ConfigError
from async_cache.l2.backend import Backend, Limits
from async_cache.l2.codec import parameters
from async_cache.l2.codec.backend import CodecBackend
from async_cache.l2.codec.codec import Codec
from async_cache.l2.codec.keyfile import read_keys
from async_cache.l2.codec.parameters import Steps
from async_cache.l2.placement import MOST_ADMIT, Placing
from async_cache.l2.urls.schemes import OWN
from async_cache.l2.urls.url import BackendURL, one_of, size, whole_number

GROUP = "async_cache.backends"
_ZSTD = "async_cache.l2.codec.zstd:Zstd"
_AES = "async_cache.l2.codec.aes:Aes"


_LIMITS = {name.removesuffix("_seconds"): name for name in Limits.__struct_fields__}
"""The limit that each of these parameters sets, which every URL may have."""
_PLACEMENT: dict[str, Callable[[str], Any]] = {
    "write": one_of(**{str(placing): placing for placing in Placing}),
    "promote": one_of(true=True, false=False),
    "admit": whole_number(MOST_ADMIT),
    "write_budget": size,
}
"""And what of its placement each of these sets, by its own name."""
_CODEC = {"codec": parameters.codec, "key_file": parameters.key_file}
_PARSERS = {parameter: partial(CacheConfig.parse, name) for parameter, name in _LIMITS.items()} | _PLACEMENT | _CODEC


def from_url(url: str) -> Backend:
    """The backend, not opened yet, that a URL describes: of a scheme of ours (`schemes`), or of an installed package.

    Any URL may set limits (`lookup_timeout`, `load_timeout`, `store_timeout` and `breaker_reset` in seconds,
    `breaker_failures`), which come before the settings of the cache; what the backend is given (`write`, `promote`,
    `admit`, `write_budget`); and how that is stored (`codec`, `key_file`).

    Raises ConfigError, which names the URL without its password, and what is allowed or who made it.
    """
    own = OWN.get(url.strip().partition(":")[0].lower())
    try:
        parts = BackendURL.parse(url)
        make = _load(own.make, own.extra) if own is not None else partial(_make, _find(parts.scheme))
        parts, common = _split_common(parts)
        codec = _codec(**{parameter: common[parameter] for parameter in _CODEC if parameter in common})
        backend: Backend = make(parts)
        if codec is not None:
            backend = CodecBackend(backend, codec)
        if not backend.name.isprintable():
            raise ConfigError(f"the name {backend.name!r} cannot be printed")
    except ConfigError as error:
        allowed = f"; allowed: {own.form}" if own is not None else ""
        raise ConfigError(f"{hide_password(url)}: {error}{allowed}") from error
    limits = {name: common[parameter] for parameter, name in _LIMITS.items() if parameter in common}
    placement = {parameter: common[parameter] for parameter in _PLACEMENT if parameter in common}
    if limits:
        backend.limits = msgspec.structs.replace(backend.limits, **limits)
    if placement:
        backend.placement = msgspec.structs.replace(backend.placement, **placement)
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


def _split_common(url: BackendURL) -> tuple[BackendURL, dict[str, Any]]:
    """The URL without the parameters that any may have, and their values."""
    fields = url.query.split("&")
    ours = [field for field in fields if unquote_plus(field.partition("=")[0]) in _PARSERS]
    values = BackendURL("", "", "", "&".join(ours), "").parameters(**_PARSERS)
    return url._replace(query="&".join(field for field in fields if field not in ours)), values


def _codec(codec: Steps | None = None, key_file: str | None = None) -> Codec | None:
    """What `codec` and `key_file` of a URL ask for; None if objects are stored as they are. Raises ConfigError."""
    encrypts = codec is not None and codec.aes
    if encrypts and key_file is None:
        raise ConfigError("codec: aes needs key_file=/path")
    if key_file is not None and not encrypts:
        raise ConfigError("key_file: without aes in the codec, a key has no use")
    compression = _load(_ZSTD, "codecs")(codec.level) if codec is not None and codec.zstd else None
    encryption = _load(_AES, "codecs")(_keys(key_file)) if key_file is not None else None
    return Codec(compression, encryption) if compression or encryption else None


def _keys(path: str) -> list[bytes]:
    with prefixed("key_file"):
        return read_keys(path)


def _load(where: str, extra: str) -> Callable[..., Any]:
    """What is written as `module:attribute`. Raises ConfigError where the extra that it needs is not installed."""
    try:
        made: Callable[..., Any] = EntryPoint("", where, GROUP).load()
    except ImportError as error:
        needs = f"it needs the extra {extra}: pip install 'async-kv-cache[{extra}]'"
        raise ConfigError(f"{error.name} is not installed; {needs}") from error
    return made


# Other packages.


def _find(scheme: str) -> list[EntryPoint]:
    """What packages have for a scheme that is not ours: one entry point, or more than one if they contradict."""
    found = list(entry_points(group=GROUP, name=scheme)) if scheme else []
    if not found:
        others = sorted({entry_point.name for entry_point in entry_points(group=GROUP)} - set(OWN))
        of_packages = f"; of installed packages: {', '.join(others)}" if others else ""
        raise ConfigError(f"unknown scheme {scheme!r}; there are {', '.join(OWN)}{of_packages}")
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
