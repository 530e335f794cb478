"""To keep prompts, and to warm them, over HTTP: what is kept is told at once, what loads is told by its progress."""

import asyncio
from collections import OrderedDict
from secrets import token_hex
from typing import Any

from msgspec import Struct

from async_cache.core import Core
from async_cache.errors import AsyncCacheError, LimitError
from async_cache.handles.prefetch import Prefetch
from async_cache.prompt.arguments import check_tokens, check_ttl, wanted
from async_cache.prompt.layout import Prompt
from async_cache.server.access import Tenant, before_own_ids
from async_cache.server.http.explain import Question
from async_cache.server.http.named import named
from async_cache.values import LoadResult

MOST_LOADS = 64
"""Loads that are under way at a time, and those that have ended and are remembered."""


class KeepQuestion(Question, forbid_unknown_fields=True):
    """A prompt, and for how long so much of it is to be kept; `keep_tokens` None: all."""

    keep_tokens: int | None = None
    ttl_seconds: float = 300.0


class Load(Struct, eq=False):
    """A prompt that is warmed for a tenant, until it has loaded."""

    tenant: Tenant
    task: "asyncio.Task[LoadResult]"
    prefetch: Prefetch
    error: str = ""


class Keeping:
    """Retains, and warms, for those who ask over HTTP."""

    def __init__(self, core: Core):
        self._core = core
        self._loads: OrderedDict[str, Load] = OrderedDict()

    async def retain(self, prompt: Prompt, question: KeepQuestion) -> dict[str, Any]:
        """Keep a prompt, and say how much of it is kept. Raises ValueError or TypeError."""
        check_tokens(prompt, question.keep_tokens)
        kept = await self._core.retentions.retain(prompt, question.keep_tokens, check_ttl(question.ttl_seconds))
        return named(kept)

    async def retained(self, tenant: Tenant) -> list[dict[str, Any]]:
        """What is kept of a tenant's salts."""
        return [named(kept) for kept in await self._core.retentions.retained(tenant.may_use)]

    def warm(self, prompt: Prompt, tenant: Tenant) -> str:
        """Begin to load a prompt, and let go of it when it has loaded; the name to ask for its progress by.

        Raises LimitError where too many are under way.
        """
        done = [name for name, load in self._loads.items() if load.task.done()]
        if len(self._loads) - len(done) >= MOST_LOADS:
            raise LimitError(f"{MOST_LOADS} prompts are being loaded, which is the limit")
        for name in done[: max(len(self._loads) + 1 - 2 * MOST_LOADS, 0)]:
            del self._loads[name]
        core, name = self._core, token_hex(8)
        prefetch = core.start(wanted(prompt, request_id=core.requests.new_id(before_own_ids(tenant))))
        self._loads[name] = load = Load(tenant, asyncio.create_task(core.warm(prefetch)), prefetch)
        load.task.add_done_callback(lambda task: task.cancelled() or task.exception())
        return name

    def progress(self, name: str, tenant: Tenant) -> dict[str, Any] | None:
        """How far it is; None for what this tenant has not asked for, or long ago."""
        load = self._loads.get(name)
        if load is None or load.tenant != tenant:
            return None
        told: dict[str, Any] = {"state": "looking up", "hits": None, "result": None}
        request = load.prefetch.promised
        for future, what, state in ((request.hits, "hits", "loading"), (request.result, "result", "loaded")):
            if future.value is not None:
                told |= {"state": state, what: named(future.value) | {"request_id": ""}}
        if load.task.done() and told["result"] is None:
            error = None if load.task.cancelled() else load.task.exception()
            told |= {"state": "failed", "error": str(error) if isinstance(error, AsyncCacheError) else "it has ended"}
        return told

    def close(self) -> None:
        """Let go of all that is under way."""
        for load in self._loads.values():
            load.task.cancel()
