"""What a connection asks of prompts and models beside requests: what is cached of them, to keep it, or to remove it."""

import asyncio
from typing import Any

import msgspec

from async_cache.aio.slices import InTurns
from async_cache.cache import AsyncCache
from async_cache.prompt.arguments import wanted
from async_cache.prompt.layout import Prompt
from async_cache.prompt.parts import Parts
from async_cache.protocol import messages
from async_cache.protocol.messages import Message, encode_each, encoded_array
from async_cache.protocol.parts import split_hits
from async_cache.server import costs
from async_cache.server.access import Tenant, before_own_ids
from async_cache.server.accounts import Account, record_bytes
from async_cache.server.deletions import ModelDeletions, told

_SPANS_AT_ONCE = 2048  # that are encoded in a step: a millisecond


class Queries:
    """Answers messages for one tenant, each when it is known: a prompt of theirs is one that it may ask for."""

    def __init__(self, cache: AsyncCache, tenant: Tenant, account: Account, deletions: ModelDeletions):
        self._cache, self._core = cache, cache.core
        self._tenant = tenant
        self._account = account
        self._deletions = deletions

    async def lookup(self, message: messages.Lookup | messages.LookupSegments, asked: Prompt | Parts) -> Message:
        """How much is cached of a prompt, or of several."""
        return messages.Hits(message.number, *split_hits(await self._core.count_hits(asked)))

    async def explain(self, message: messages.Explain, prompt: Prompt) -> Message:
        """Where each chunk is, or why it is not there; what is long is encoded in turns."""
        explanation = await self._cache.explain(prompt)
        if len(explanation.spans) <= _SPANS_AT_ONCE:
            return messages.Explained(message.number, explanation)
        parts: list[bytes] = []
        async for spans in InTurns(explanation.spans, _SPANS_AT_ONCE):
            parts.append(encode_each(spans))
        array: Any = encoded_array(len(explanation.spans), parts)
        return messages.Explained(message.number, msgspec.structs.replace(explanation, spans=array))

    async def retain(self, message: messages.Retain, prompt: Prompt) -> Message:
        """Keep a prompt."""
        kept = await self._cache.retain(prompt, tokens=message.tokens, ttl_seconds=message.ttl_seconds)
        return messages.Kept(message.number, kept)

    async def list_retained(self, message: messages.ListRetained) -> Message:
        """What is kept of the tenant's salts."""
        async with self._account.listing:
            kept = await self._core.retentions.retained(self._tenant.may_use)
        return messages.RetainedListed(message.number, kept)

    async def warm(self, message: messages.Warm, prompt: Prompt) -> Message:
        """Load a prompt, and let go of it."""
        size_bytes = record_bytes(len(prompt), costs.objects_of(prompt.layout))
        self._account.take_request(size_bytes)
        try:
            request_id = self._core.requests.new_id(before_own_ids(self._tenant))
            what = wanted(prompt, request_id=request_id, deadline_seconds=message.deadline_seconds)
            return messages.Loaded(message.number, await self._core.warm(self._core.start(what)))
        finally:
            self._account.give_request(size_bytes)

    async def hint(self, message: messages.Hint, prompt: Prompt) -> Message:
        """Note what is known of the future of a prompt."""
        known = message.output_tokens, message.returns, message.within_seconds
        await self._cache.hint(prompt, output_tokens=known[0], returns=known[1], within_seconds=known[2])
        return messages.Done(message.number)

    async def delete(self, message: messages.Delete, prompt: Prompt) -> Message:
        """Remove every chunk of a prompt."""
        return messages.Removed(message.number, await self._cache.delete(prompt))

    async def delete_model(self, message: messages.DeleteModel) -> Message:
        """Remove what is of a model and of the tenant's salts."""
        asked = message.model, message.revision, message.adapter, message.salt
        deletion = self._deletions.begin(self._tenant, *asked)
        return messages.ModelDeleted(message.number, told(self._tenant, await asyncio.shield(deletion)))

    async def flush(self, message: messages.Flush) -> Message:
        """Wait until what was committed of the tenant's salts is in L2."""
        owners = None if self._tenant.trusted else self._tenant.salts
        return messages.Flushed(message.number, await self._core.writeback.flush(message.deadline_seconds, owners))
