"""The settings, built once at the edge: from arguments, or from a TOML file and the environment.

texts     sizes, and URLs that are shown
settings  tables of settings, and where each was set
cache     the settings of a cache
server    those of a server beside it
"""

from async_cache.config.cache import CacheConfig, default_l2, parse_quota
from async_cache.config.server import ServerConfig, TenantConfig, http_address
from async_cache.config.settings import ENVIRONMENT_PREFIX, Given, Settings, prefixed, told_where
from async_cache.config.texts import hide_password, parse_bytes

__all__ = [
    "ENVIRONMENT_PREFIX",
    "CacheConfig",
    "Given",
    "ServerConfig",
    "Settings",
    "TenantConfig",
    "default_l2",
    "hide_password",
    "http_address",
    "parse_bytes",
    "parse_quota",
    "prefixed",
    "told_where",
]
