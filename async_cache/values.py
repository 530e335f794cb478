"""The values that callers get back: counts, results, shortfalls, statistics."""

from enum import StrEnum
from typing import Literal

from msgspec import Struct


class Shortfall(StrEnum):
    """Why fewer chunks are promised than exist, or fewer are readable than were promised."""

    MEMORY = "memory"  # L1 could not make room
    BACKEND_ERROR = "backend_error"  # a backend raised, stayed silent, or is cut off by its breaker
    CORRUPT = "corrupt"  # the stored bytes failed verification
    GONE = "gone"  # the object vanished between lookup and load, or was deleted
    DEADLINE = "deadline"  # the request's deadline, or a load's timeout, passed
    CANCELLED = "cancelled"  # the request was cancelled, ended or swept


class Removal(StrEnum):
    """Why a chunk is no longer where it was."""

    CAPACITY = "capacity"  # others needed the room
    QUOTA = "quota"  # its owner had more than its share
    DELETED = "deleted"  # somebody asked for it: `delete`, `clear`
    EXPIRED = "expired"  # its time was over
    DAMAGED = "damaged"  # its bytes failed verification
    LOST = "lost"  # its tier lost it, or was closed
    REFUSED = "refused"  # it left memory, and a backend had not admitted it


class Clipped(StrEnum):
    """Why less is retained than was asked for."""

    QUOTA = "quota"  # the tenant has used up its share of the tiers that have it
    MEMORY = "memory"  # these tiers have retained for others what they can, or can promise nothing
    NOT_STORED = "not_stored"  # the rest is not in the cache


class ChunkState(StrEnum):
    """Where a chunk is."""

    L1 = "l1"  # in memory
    L2 = "l2"  # some of it, or all, in a backend only
    LOADING = "loading"  # on its way from a backend
    WRITING = "writing"  # a writer has room for it, and has not committed it
    REMOVED = "removed"  # it was there
    UNKNOWN = "unknown"  # it was never seen, or has gone for longer than is remembered


class Missed(Struct, frozen=True, array_like=True, gc=False):
    """Why the first chunk that is missing of a prompt is.

    `removal` is why it left, where that is remembered. `diverges`: what lies before it is known, and goes on otherwise.
    """

    state: ChunkState
    removal: Removal | None = None
    diverges: bool = False


class BackendState(StrEnum):
    """ACTIVE -> DRAINING -> DRAINED; each goes to LEAVING, and then the backend is closed."""

    ACTIVE = "active"
    DRAINING = "draining"  # nothing new is written to it, and what only it has is copied to the others
    DRAINED = "drained"  # all that it has, others have, too
    LEAVING = "leaving"  # no lookup asks it any more; what was promised of it is still loaded


class LookupHits(Struct, frozen=True, kw_only=True, array_like=True, gc=False):
    """How much of a prompt can be served. Counts are whole chunks over all ranks and groups, from `start_chunk` on.

    `recompute_from`: the chunk, counted from the beginning of the prompt, from which on to compute is expected to be
    faster than to load; None: load all, or nothing is known.
    `base_tokens`: those of a segment's context, at which the positions of its keys begin.
    """

    request_id: str
    start_chunk: int
    chunks: int
    tokens: int
    l1_chunks: int
    l2_chunks: int
    found_chunks: int
    shortfall: Shortfall | None = None
    load_bytes: int = 0
    expected_load_seconds: float | None = None
    missed: Missed | None = None
    recompute_from: int | None = None
    base_tokens: int = 0


class LoadResult(Struct, frozen=True, kw_only=True, array_like=True):
    """How much of a prompt is in memory, leased to the request. `seconds`: from `prefetch` to the end of the load.

    `base_tokens`: as in `LookupHits`.
    """

    request_id: str
    start_chunk: int
    chunks: int
    tokens: int
    l1_chunks: int
    l2_chunks: int
    shortfall: Shortfall | None = None
    seconds: float = 0.0
    base_tokens: int = 0


class SegmentHits(LookupHits, frozen=True, kw_only=True, array_like=True):
    """How much of several prompts can be served: of each of the `parts` a prefix, and of all together so much.

    `load_bytes` counts once what several parts have in common, and `expected_load_seconds` is for all of them: a part
    has it, too, if anything of it is to be loaded. `shortfall` and `missed` are those of the first part that has any.
    """

    parts: tuple[LookupHits, ...] = ()


class SegmentResult(LoadResult, frozen=True, kw_only=True, array_like=True):
    """How much of several prompts is in memory: of each of the `parts`, and of all together."""

    parts: tuple[LoadResult, ...] = ()


class Retained(Struct, frozen=True, array_like=True):
    """What is kept of a prompt until its time is over: so many whole `chunks`, which have so many `tokens`.

    `clipped`: why it is less than was asked for. The names are those of the prompt, in a list.
    """

    tokens: int
    chunks: int
    expires_in_seconds: float
    clipped: Clipped | None = None
    model: str = ""
    revision: str = ""
    adapter: str = ""
    salt: str = ""


class Span(Struct, frozen=True, array_like=True):
    """Chunks of a prompt, one behind the other, of which the same is to be said.

    `backend`: where they are, are loaded from, or were last (None: in L1, or not known). Those that were removed left
    within a second of the first, which was `seconds_ago`.
    """

    start_chunk: int
    chunks: int
    state: ChunkState
    backend: str | None = None
    seconds_ago: float | None = None
    removal: Removal | None = None


class Elsewhere(Struct, frozen=True, array_like=True):
    """The same tokens, cached under another root of the same model and salt: so many `chunks` of that.

    `differs` names what is not the same: revision, adapter, chunk_tokens, world_size, groups, or of these dtype, shape,
    window_chunks, ranks.
    """

    model: str
    revision: str
    adapter: str
    differs: tuple[str, ...]
    chunks: int


class ListedChunk(Struct, frozen=True, array_like=True):
    """A chunk in L1: whose it is, the memory it takes, the requests that keep it, and the backends that lack it.

    Or one in a backend: the bytes it takes there, and whose it is, if L1 has it, too.
    """

    chunk_hash: bytes
    model: str
    salt: str
    room_bytes: int
    leases: int
    unwritten: int


class Explanation(Struct, frozen=True, array_like=True):
    """Where the chunks of a prompt are, or why they are not there, as it was when each was looked at.

    The spans cover its whole `chunks`, which have so many `tokens`, in their order. `missed`: as in `LookupHits`.
    """

    chunks: int
    tokens: int
    spans: tuple[Span, ...]
    elsewhere: tuple[Elsewhere, ...] = ()
    missed: Missed | None = None


Tier = Literal["l1", "l2"]


class Stored(Struct, frozen=True, array_like=True, tag=True):
    """A tier has all objects of a chunk, of so many `tokens`, which it had not before.

    `parent` is the chunk before it in a prompt, None for the first or where that is not known; `backend` None in L1.
    """

    chunk_hash: bytes
    parent: bytes | None
    tokens: int
    tier: Tier
    backend: str | None


class Removed(Struct, frozen=True, array_like=True, tag=True):
    """A chunk cannot be served from a tier any more, and why."""

    chunk_hash: bytes
    tier: Tier
    backend: str | None
    removal: Removal


class Skipped(Struct, frozen=True, array_like=True, tag=True):
    """Here stood events that the reader was too slow for: so many."""

    count: int


Event = Stored | Removed | Skipped
"""What `events` iterates over."""


class Deleted(Struct, frozen=True, array_like=True):
    """What a delete or clear found, in chunks; the `leased` ones of them leave memory when they are released."""

    chunks: int
    leased: int


class DeletedModel(Struct, frozen=True, array_like=True):
    """What a deletion of a model, or of a revision or an adapter of it, found, in chunks; `leased` as in `Deleted`.

    `size_bytes`: what they took, of L1 and of each backend. `unsure` names the backends that may have more of it: those
    that do not know what their objects are of, all or some of them.
    """

    chunks: int
    leased: int
    size_bytes: int
    unsure: tuple[str, ...] = ()


class FlushResult(Struct, frozen=True, array_like=True):
    """Chunks that were written back or dropped since the last flush, and those that still wait.

    `refused` counts how often since then a backend did not admit one (`admit`, `write_budget`, or larger than all of
    it): that is no loss, but is told.
    """

    written: int
    pending: int
    dropped: int
    refused: int = 0


class BackendUsage(Struct, frozen=True):
    """What a backend holds. `capacity_bytes` is None where it is unbounded."""

    objects: int
    used_bytes: int
    capacity_bytes: int | None = None


class Copied(Struct, frozen=True, kw_only=True):
    """What has become of the objects of one backend that were to be copied to others, so far.

    `found` counts all that were looked at: `present` were elsewhere already, `copied` were stored, with `copied_bytes`,
    `gone` vanished meanwhile, `corrupt` failed verification, and `failed` could not be read, or nobody stored them.
    """

    found: int = 0
    present: int = 0
    copied: int = 0
    copied_bytes: int = 0
    gone: int = 0
    corrupt: int = 0
    failed: int = 0


class BackendStatus(Struct, frozen=True, kw_only=True):
    """One backend of an open cache, as it is now.

    `breaker` is "closed" while it is well, and else "open" or "half-open". `usage` is None where it cannot say.
    `pending` counts the chunks that wait to be written to it. `write`, `promote` and `admit` are those of its URL;
    `promoted` counts chunks that were written to it since they were found behind it, `unpromoted` those that were not,
    for want of room or time. `refused` counts chunks that it did not admit, by the parameter that was against it:
    `admit`, `capacity` or `write_budget`, of which `budget_left_bytes` are left now. `copied` is what its draining has
    done so far.
    """

    name: str
    state: BackendState
    breaker: str
    usage: BackendUsage | None
    pending: int
    write: str
    promote: bool
    admit: int
    promoted: int
    unpromoted: int
    refused: dict[str, int] = {}
    write_budget: int | None = None
    budget_left_bytes: int | None = None
    copied: Copied | None = None


class LimitUse(Struct, frozen=True):
    """How much of a limit is used; `most` is None where there is none."""

    used: int
    most: int | None = None


class Hold(Struct, frozen=True):
    """An event loop did not answer for so long, of which its thread computed for `busy_seconds`; and where it was seen.

    The rest of the time it waited: for other threads and processes, or for something that blocks.
    """

    seconds: float = 0.0
    busy_seconds: float = 0.0
    where: str = ""


class CacheStats(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A snapshot of levels, and counters since the cache was opened.

    `leases` counts pairs of request and chunk, `leased_bytes` memory once. `l1_used_bytes` is all of L1 that is not
    free: resident, reserved and quarantined. `loads` counts objects read from L2, `shared_loads` those that a request
    did not have to read because another one did. `writebacks_dropped` counts chunks that a backend did not get.
    `backends` lacks those that could not say what they hold.

    `hold` is the longest of the loop of a server, in the last minute; None where nobody looks.
    A client whose token is bound to salts is told of its own alone: then `limits` are those of its tenant, and what is
    counted for all together is 0: `quarantined_bytes`, `loads`, `shared_loads`, `swept_*`, and `backends`.
    """

    requests: int
    leases: int
    leased_bytes: int
    reserved_bytes: int
    quarantined_bytes: int
    l1_used_bytes: int
    l1_capacity_bytes: int
    l1_chunks: int
    loads: int
    shared_loads: int
    swept_results: int
    swept_leases: int
    swept_reservations: int
    writebacks_pending: int
    writebacks_dropped: int
    backends: dict[str, BackendUsage]
    limits: dict[str, LimitUse] = {}
    hold: Hold | None = None
