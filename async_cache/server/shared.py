"""What the sessions of a server have in common."""

from collections.abc import Awaitable, Callable
from concurrent.futures import Executor
from dataclasses import dataclass

from async_cache.cache import AsyncCache
from async_cache.config import ServerConfig
from async_cache.server.accounts import Account, Accounts
from async_cache.server.deletions import ModelDeletions
from async_cache.server.layouts import SharedLayouts
from async_cache.server.partials import TenantPartials
from async_cache.server.prefetches import Holders
from async_cache.server.turns import Turns
from async_cache.values import Hold


@dataclass(frozen=True)
class Shared:
    """What the sessions of a server share."""

    cache: AsyncCache
    config: ServerConfig
    holders: Holders
    layouts: SharedLayouts
    copiers: Executor
    makers: Executor
    """Make long prompts and large layouts."""
    partials_of: Callable[[Account], TenantPartials]
    """What knows of frames that have begun, of the connections of a tenant."""
    reload: Callable[[], Awaitable[tuple[list[str], list[str]]]]
    hold: Callable[[], Hold | None]
    """The longest of the loop, of late."""
    turns: Turns
    accounts: Accounts
    deletions: ModelDeletions
