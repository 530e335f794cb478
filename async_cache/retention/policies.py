"""The policies by name, as `policy=` takes it."""

from collections.abc import Callable
from typing import Any

from async_cache.errors import ConfigError
from async_cache.retention.arc import AdaptiveReplacement
from async_cache.retention.fifo import FirstInFirstOut
from async_cache.retention.lru import LeastRecentlyUsed
from async_cache.retention.policy import EvictionPolicy
from async_cache.retention.s3fifo import S3FIFO
from async_cache.retention.tinylfu import TinyLFU


def _prefix(clock: Callable[[], float]) -> EvictionPolicy[Any]:
    try:
        from async_cache.retention.prefix import PrefixPolicy
    except ImportError as error:
        needs = "the policy prefix needs the extra prefix: pip install 'async-kv-cache[prefix]'"
        raise ConfigError(f"{error.name} is not installed; {needs}") from error
    return PrefixPolicy(clock)


_POLICIES: dict[str, Callable[[Callable[[], float]], EvictionPolicy[Any]]] = {
    "prefix": _prefix,
    "lru": lambda clock: LeastRecentlyUsed(),
    "fifo": lambda clock: FirstInFirstOut(),
    "s3fifo": lambda clock: S3FIFO(),
    "arc": lambda clock: AdaptiveReplacement(),
    "tinylfu": lambda clock: TinyLFU(),
}
NAMES = tuple(_POLICIES)
"""What `make_policy` takes."""


def make_policy(name: str, clock: Callable[[], float]) -> EvictionPolicy[Any]:
    """A new policy of that name.

    `clock` tells the time in seconds. Raises ConfigError for a name that is none,
    and where the extra that it needs is not installed.
    """
    if name not in _POLICIES:
        raise ConfigError(f"there is no policy {name!r}: take one of {', '.join(NAMES)}")
    return _POLICIES[name](clock)
