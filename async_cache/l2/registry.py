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
from async_cache.l2.codec import parameters
from async_cache.l2.codec.backend import CodecBackend
from async_cache.l2.codec.codec import Codec
from async_cache.l2.codec.keyfile import read_keys
from async_cache.l2.codec.parameters import Steps
from async_cache.l2.filesystem.backend import FileSystemBackend
from async_cache.l2.memory import MemoryBackend
from async_cache.l2.placement import MOST_ADMIT, Placing
from async_cache.l2.url import BackendURL, one_of, whole_number

GROUP = "async_cache.backends"


class _Scheme(NamedTuple):
    form: str  # shown to whoever wrote a URL that does not fit
    make: Callable[[BackendURL], Backend] | EntryPoint  # which is loaded when it is asked for
    extra: str = ""  # that it needs


_BUCKET = "async_cache.l2.object_store.backend:ObjectStoreBackend.from_url"
_OF_BUCKETS = (
    "endpoint=https://host:9000&allow_http=true|false&ca=/file.pem&anonymous=true|false&concurrency=32&part=8MiB"
)


_OWN = {
    "memory": _Scheme("memory://[name]?capacity=1GiB", MemoryBackend.from_url),
    "fs": _Scheme(
        "fs:///path?capacity=10GiB&durability=none|fsync&direct=true|false&threads=4", FileSystemBackend.from_url
    ),
    "s3": _Scheme(
        f"s3://bucket[/prefix]?region=us-east-1&addressing=path|virtual&bulk_delete=true|false&{_OF_BUCKETS}",
        EntryPoint("s3", _BUCKET, GROUP),
        "objects",
    ),
    "gs": _Scheme(f"gs://bucket[/prefix]?{_OF_BUCKETS}", EntryPoint("gs", _BUCKET, GROUP), "objects"),
    "az": _Scheme(f"az://container[/prefix]?account=name&{_OF_BUCKETS}", EntryPoint("az", _BUCKET, GROUP), "objects"),
}
_VALKEY = _Scheme(
    "valkey://host:6379/0?namespace=akv&ttl=3600&connections=2, valkeys://... (TLS), valkey+unix:///path?..., "
    "valkey+cluster://host:port,host:port?..., valkeys+cluster://... (redis and rediss mean the same)",
    EntryPoint("valkey", "async_cache.l2.valkey.backend:ValkeyBackend.from_url", GROUP),
)
_VARIANTS = ("", "s", "+unix", "+cluster", "s+cluster")
_OWN |= {scheme + variant: _VALKEY for scheme in ("valkey", "redis") for variant in _VARIANTS}
_LIMITS = {name.removesuffix("_seconds"): name for name in Limits.__struct_fields__}
"""The limit that each of these parameters sets, which every URL may have."""
_PLACEMENT: dict[str, Callable[[str], Any]] = {
    "write": one_of(**{str(placing): placing for placing in Placing}),
    "promote": one_of(true=True, false=False),
    "admit": whole_number(MOST_ADMIT),
}
"""And what of its placement each of these sets, by its own name."""
_CODEC = {"codec": parameters.codec, "key_file": parameters.key_file}
_PARSERS = {parameter: partial(CacheConfig.parse, name) for parameter, name in _LIMITS.items()} | _PLACEMENT | _CODEC
_STEPS = {
    name: EntryPoint(name, value, GROUP)
    for name, value in {"zstd": "async_cache.l2.codec.zstd:Zstd", "aes": "async_cache.l2.codec.aes:Aes"}.items()
}
"""The steps of a codec, which are imported when a URL asks for them: they need packages that not everybody has."""


def from_url(url: str) -> Backend:
    """The backend, not opened yet, that a URL describes.

        memory://[name]?capacity=1GiB
        fs:///path?capacity=10GiB&durability=none|fsync&direct=true|false&threads=4
        s3://bucket[/prefix]?..., gs://bucket[/prefix]?..., az://container[/prefix]?...
        valkey://host:6379/0?namespace=akv&ttl=3600&connections=2      (`docs/backends/valkey.md` has its variants)

    `capacity` is in bytes or with a unit; "none" is no bound. Without it, memory is unbounded and a directory
    is bounded to 10 GiB. A path is absolute; in it, "?", "#" and "%" are percent-encoded. Other schemes are those of
    installed packages. `lookup_timeout`, `load_timeout`, `store_timeout` and `breaker_reset` in seconds, and
    `breaker_failures`, may stand in any URL, and come before the settings of the cache. So may what the backend is
    given: `write=all|first|skip_if_present|none`, `promote=true|false` and `admit`, from 1 to 15; and `codec=zstd`,
    which compresses what is stored, `codec=aes&key_file=/path`, which encrypts it, and `codec=zstd,aes`.

    Raises ConfigError, which names the URL without its password, and what is allowed or who made it.
    """
    allowed = f"; allowed: {' or '.join(dict.fromkeys(scheme.form for scheme in _OWN.values()))}"
    try:
        parts = BackendURL.parse(url)
        own = _OWN.get(parts.scheme)
        make = _load(own) if own is not None else partial(_make, _find(parts.scheme))
        if own is None:
            allowed = ""
        parts, common = _split_common(parts)
        codec = _codec(**{parameter: common[parameter] for parameter in _CODEC if parameter in common})
        backend = make(parts)
        if codec is not None:
            backend = CodecBackend(backend, codec)
        if not backend.name.isprintable():
            raise ConfigError(f"the name {backend.name!r} cannot be printed")
    except ConfigError as error:
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
    try:
        compression = _STEPS["zstd"].load()(codec.level) if codec is not None and codec.zstd else None
        encryption = _STEPS["aes"].load()(_keys(key_file)) if key_file is not None else None
    except ImportError as error:
        raise ConfigError(f"codec: {error}: pip install 'async-kv-cache[codecs]'") from error
    return Codec(compression, encryption) if compression or encryption else None


def _keys(path: str) -> list[bytes]:
    with prefixed("key_file"):
        return read_keys(path)


def _load(own: _Scheme) -> Callable[[BackendURL], Backend]:
    """What makes a backend of ours. Raises ConfigError where the extra that it needs is not installed."""
    if not isinstance(own.make, EntryPoint):
        return own.make
    try:
        make: Callable[[BackendURL], Backend] = own.make.load()
    except ImportError as error:
        needs = f"it needs the extra {own.extra}: pip install 'async-kv-cache[{own.extra}]'"
        raise ConfigError(f"{error.name} is not installed; {needs}") from error
    return make


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
