"""The statistics of a cache, for whom they are: a tenant that is bound to salts is told of its own alone."""

import msgspec

from async_cache.core import Core
from async_cache.server.access import Tenant
from async_cache.server.accounts import Account
from async_cache.values import CacheStats, Hold


def stats_for(core: Core, tenant: Tenant, account: Account, hold: Hold | None) -> CacheStats:
    """What is held now, of all or of a tenant; whoever is told of all is told of the loop."""
    if tenant.watches or tenant.salts is None:
        return msgspec.structs.replace(core.stats(), hold=hold)
    core.writing.reclaim()
    l1, salts = core.l1, tenant.salts
    shares, leased = l1.shares.those_of(salts), l1.uses.leased_of(salts)
    return CacheStats(
        requests=account.used["requests"],
        leases=leased.leases,
        leased_bytes=leased.size_bytes,
        reserved_bytes=account.used["reserved_share"],
        quarantined_bytes=0,
        l1_used_bytes=sum(share.used_bytes for share in shares) + account.used["reserved_share"],
        l1_capacity_bytes=core.arena.size_bytes,
        l1_chunks=sum(share.chunks for share in shares),
        loads=0,
        shared_loads=0,
        swept_results=0,
        swept_leases=0,
        swept_reservations=0,
        writebacks_pending=core.writeback.pending_of(salts),
        writebacks_dropped=core.writeback.dropped_of(salts),
        backends={},
        limits=account.told(),
    )
