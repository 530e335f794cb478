"""What one tenant of a server may hold and do at a time."""

from typing import Annotated

from msgspec import Meta, Struct

Count = Annotated[int, Meta(gt=0, le=2**63 - 1)]
Share = Annotated[float, Meta(gt=0, le=1)]


class TenantLimits(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The limits of a tenant, over all of its connections. Beyond one, a call gets `LimitError` with its name, at once.

    `docs/tenants.md` has them in a table. Shares are parts of L1: 1 is no limit, and None is decided by the number of
    tenants (see `ServerConfig.tenant_limits`).
    """

    connections: Count = 256
    """Connections at a time."""
    requests: Count = 16_384
    """Requests that are known: prefetches that are not over."""
    record_bytes: Count = 48 * 2**20
    """What is known of its requests, by an estimate that is not too low: hashes, chunks and objects."""
    layout_objects: Count = 65_536
    """Objects in a chunk of each of its different layouts, together."""
    waiting: Count = 8192
    """Calls that wait for an answer."""
    unread_bytes: Count = 16 * 2**20
    """Answers that its clients do not read."""
    leased_share: Share | None = None
    """Chunks that its requests hold and its reads look at."""
    reserved_share: Share | None = None
    """Chunks that its writers have reserved."""
    kept_share: Share | None = None
    """What others cannot evict of its chunks."""
    partial_bytes: Count = 32 * 2**20
    """What has come of frames that are not complete."""
    stored_bytes_per_second: Count | None = None
    """Bytes that it may reserve room for in a second, on average over some seconds; None is any number."""


UNLIMITED = TenantLimits(
    connections=2**62,
    requests=2**62,
    record_bytes=2**62,
    layout_objects=2**62,
    waiting=2**62,
    unread_bytes=2**62,
    partial_bytes=2**62,
    leased_share=1.0,
    reserved_share=1.0,
)
"""Those of whoever needs no token: the user who runs the server."""
