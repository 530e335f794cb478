"""Which messages each role may send."""

from async_cache.protocol import messages
from async_cache.protocol.messages import Message

_READING: tuple[type[Message], ...] = (
    messages.Prefetch,
    messages.AwaitingPrefetch,
    messages.PrefetchSegments,
    messages.Lookup,
    messages.LookupSegments,
    messages.Explain,
    messages.QueryPrefetchLookupHits,
    messages.QueryPrefetchStatus,
    messages.AcquireRead,
    messages.AcquireStream,
    messages.Events,
    messages.ListRoots,
    messages.ListChunks,
    messages.ListRetained,
    messages.Warm,
    messages.Hint,
)
_STORING: tuple[type[Message], ...] = (
    messages.ReserveStore,
    messages.Delete,
    messages.DeleteModel,
    messages.Flush,
    messages.Retain,
)
OF_ROLES = {kind: role for role, kinds in (("read", _READING), ("store", _STORING)) for kind in kinds}
"""The role that may ask for it, beside those that may ask for everything."""
OF_ALL_ROLES = frozenset(
    (
        messages.Ping,
        messages.Stats,
        messages.RegisterLayout,
        messages.Cancel,
        messages.Unclaim,
        messages.Renew,
        messages.EndRequest,
        messages.ReleaseRead,
        messages.StoreData,
        messages.CommitStore,
        messages.CloseStore,
    )
)
