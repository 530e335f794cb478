"""What a cache tells apart by tenants: whose chunks leave L1 for whom, and whose write-back is told to whom."""

from collections.abc import Iterable, Mapping

from async_cache.config import ServerConfig
from async_cache.core import Core


def tell_apart(core: Core, config: ServerConfig) -> None:
    """Divide L1 among the tenants that are bound to salts; all others have what is left of it together."""
    limits = config.tenant_limits()
    size_bytes = core.arena.size_bytes
    salts = {name: frozenset(tenant.salts) for name, tenant in config.tenants.items() if tenant.salts is not None}
    parts = {
        " ".join(sorted(names)): (
            frozenset[str]().union(*(salts[name] for name in names)),
            int(size_bytes * sum(limits[name].kept_share or 0.0 for name in names)),
        )
        for names in _with_common_salts(salts)
    }
    core.divide(parts, size_bytes - sum(kept_bytes for _, kept_bytes in parts.values()))


def _with_common_salts(salts: Mapping[str, frozenset[str]]) -> Iterable[set[str]]:
    """The names of tenants, those together that may use the same salt."""
    group_of: dict[str, set[str]] = {}  # by salt
    groups: dict[int, set[str]] = {}
    for name, own in salts.items():
        group = {name}.union(*(group_of[salt] for salt in own if salt in group_of))
        for other in group:
            for salt in salts[other]:
                groups.pop(id(group_of.get(salt)), None)
                group_of[salt] = group
        groups[id(group)] = group
    return groups.values()
