"""transformers: prompts of which passages stand in many others, at other places, and are not computed again.

    prefill = SegmentedPrefill(cache, model, context=tokens_of_something_neutral)
    blended = await prefill.prefill([Text(system), Segment(passage), Segment(other), Text(question)])
    logits, kv, result, computed_tokens = blended

What is stored of a segment is exact and repeatable: what the model computes of it behind the context, whatever stands
before it in a prompt. So is a leading text. What is approximate is what is made of them here, and only who uses this
module gets it: segments are moved to where they stand, which their values do not notice and their keys are turned for
(`integrations.rotary`), and did not see one another. What is computed anew sees all that is before it: the first tokens
of each segment, which would otherwise draw attention as the first ones of a prompt do; what of it fills no chunk; and
all texts. `docs/segments.md` has what that costs.

The answer does not depend on what is cached: a segment that lacks a chunk is computed alone behind the context, in
steps that end where a chunk ends, and stored; then it is as one that was found, bit by bit.

Needs `async-kv-cache[transformers]`.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from transformers import DynamicCache, PreTrainedModel

from async_cache.aio.ending import in_thread
from async_cache.cache import AsyncCache
from async_cache.client import CacheClient
from async_cache.errors import AsyncCacheError
from async_cache.handles.lease import ReadChunk
from async_cache.integrations.blended import BlendedCache
from async_cache.integrations.rotary import Rotary, Turn, turned
from async_cache.integrations.transformers import CachedPrefix, compute_next, token_ids
from async_cache.prompt.keys import pack_tokens
from async_cache.prompt.layout import ModelLayout, Prompt
from async_cache.values import SegmentResult, Shortfall


@dataclass(frozen=True)
class Segment:
    """Tokens that are reused wherever they stand. Ids of any kind that a prompt is made from."""

    tokens: Any


@dataclass(frozen=True)
class Text:
    """Tokens that are computed anew; where they lead a prompt, they are exact, and reused as those of any prompt."""

    tokens: Any


class Blended(NamedTuple):
    """`logits` after the last token, `kv` of all, the `result` of the load, and how many tokens the model computed."""

    logits: torch.Tensor
    kv: BlendedCache
    result: SegmentResult
    computed_tokens: int


def split_at(tokens: Sequence[int], separator: Sequence[int]) -> list[list[int]]:
    """Cut tokens behind each place where those of the separator stand; together, what is returned is the tokens."""
    ids, mark = list(tokens), list(separator)
    if not mark:
        raise ValueError("separator must not be empty")
    parts: list[list[int]] = []
    begin = at = 0
    while at + len(mark) <= len(ids):
        if ids[at : at + len(mark)] == mark:
            at += len(mark)
            parts.append(ids[begin:at])
            begin = at
        else:
            at += 1
    return parts + ([ids[begin:]] if begin < len(ids) or not parts else [])


@dataclass(frozen=True, eq=False)
class _Piece:
    """A part of a prompt that is cached as `prompt`, and has a whole chunk: a segment, or a text that leads.

    It begins at token `start`; its token ids are of shape (tokens,).
    """

    start: int
    ids: torch.Tensor
    prompt: Prompt
    is_segment: bool


class _Spliced(NamedTuple):
    """Keys and values of a whole prompt, of shape (layers, heads, tokens, width), while they are put together."""

    keys: torch.Tensor
    values: torch.Tensor


class SegmentedPrefill:
    """Prefills prompts of parts through a cache, which is to be open while it is used.

    Whatever fails in the cache, the model computes.
    """

    def __init__(
        self,
        cache: AsyncCache | CacheClient,
        model: PreTrainedModel,
        *,
        context: Any = (),
        chunk_tokens: int = 32,
        first_tokens: int = 16,
        name: str | None = None,
        revision: str | None = None,
        salt: str = "",
        adapter: str = "",
    ):
        """`context`: the tokens behind which segments are computed; others have other segments.

        `first_tokens` of each segment are computed anew. The rest is as for a `CachedPrefix`. The model computes some
        tokens: raises ValueError for one whose KV cannot be moved, as measured, or that cannot be cached.
        """
        if type(first_tokens) is not int or first_tokens < 0:
            raise ValueError(f"first_tokens must be a whole number from 0 on, not {first_tokens!r}")
        self._prefix = CachedPrefix(
            cache, model, chunk_tokens=chunk_tokens, name=name, revision=revision, salt=salt, adapter=adapter
        )
        self._rotary = Rotary(model)
        self._cache, self._model = cache, model
        self._salt, self._adapter = salt, adapter
        self._first_tokens = first_tokens
        self._context = token_ids(context)
        self._packed_context = memoryview(pack_tokens(context)).cast("i")
        if len(self._context):
            self._prefix.checked(self._context)
        self._context_kv: DynamicCache | None = None

    @property
    def layout(self) -> ModelLayout:
        """The layout of what is stored."""
        return self._prefix.layout

    def segment(self, tokens: Any) -> Prompt:
        """What a segment is cached as, for calls of the cache."""
        return self.layout.segment(tokens, context=self._packed_context, salt=self._salt, adapter=self._adapter)

    async def prefill(self, parts: Sequence[Segment | Text], *, deadline_seconds: float | None = None) -> Blended:
        """Load what is cached of the parts, and compute the rest, in threads; segments that lack a chunk are stored.

        Raises ValueError for tokens that the model cannot read and for more than 256 parts that are cached, and
        TypeError for what is no part.
        """
        ids, pieces = self._pieces(parts)
        self._prefix.checked(ids)
        spliced = _Spliced(self._empty(len(ids)), self._empty(len(ids)))
        result, found = await self._load(pieces, spliced, deadline_seconds)
        computed = await self._complete(pieces, found, spliced)
        places = self._places(pieces, len(ids))
        kv = await in_thread(self._blended, spliced)
        logits = await in_thread(self._blend, ids, places, kv)
        return Blended(logits, kv, result, computed + len(places))

    def _pieces(self, parts: Sequence[Segment | Text]) -> tuple[torch.Tensor, list[_Piece]]:
        """The token ids of a prompt, and what of it is cached."""
        texts: list[torch.Tensor] = []
        pieces: list[_Piece] = []
        start = 0
        for part in parts:
            if not isinstance(part, Segment | Text):
                raise TypeError(f"a part must be a Segment or a Text, not a {type(part).__name__}")
            is_segment, ids = isinstance(part, Segment), token_ids(part.tokens)
            if len(ids) >= self.layout.chunk_tokens and (is_segment or not start):
                prompt = self.segment(ids) if is_segment else self._prefix.prompt(ids)
                pieces.append(_Piece(start, ids, prompt, is_segment))
            texts.append(ids)
            start += len(ids)
        return torch.cat(texts) if texts else token_ids(()), pieces

    def _empty(self, tokens: int) -> torch.Tensor:
        (group,) = self.layout.groups
        _, layers, heads, _, width = group.shape
        return torch.empty((layers, heads, tokens, width), dtype=getattr(torch, group.dtype))

    # Out of the cache.

    async def _load(
        self, pieces: Sequence[_Piece], spliced: _Spliced, deadline_seconds: float | None
    ) -> tuple[SegmentResult, dict[_Piece, int]]:
        """Put what is cached where it belongs; the result, and how many chunks there are of each piece."""
        if not pieces:
            return _nothing("", None), {}
        request_id = ""
        try:
            prompts = [piece.prompt for piece in pieces]
            prefetch = self._cache.prefetch_segments(prompts, deadline_seconds=deadline_seconds)
            request_id = prefetch.request_id
            found = await self._prefix.copied(prefetch, partial(self._take, pieces, spliced))
            return await prefetch.load_done, found
        except AsyncCacheError as error:
            self._prefix.warn_unread(error)
            return _nothing(request_id, Shortfall.BACKEND_ERROR), {}

    def _take(self, pieces: Sequence[_Piece], spliced: _Spliced, leased: Sequence[ReadChunk]) -> dict[_Piece, int]:
        """Copy what is leased; a segment that lacks a chunk is not taken, since all of it is computed."""
        chunks = Counter(chunk.part for chunk in leased)
        found = {piece: chunks[part] for part, piece in enumerate(pieces)}
        turns = [self._turn(piece) for piece in pieces]
        for chunk in leased:
            piece = pieces[chunk.part]
            if self._is_there(piece, found):
                (stored,) = chunk.tensors()
                assert stored is not None  # nothing has a window
                self._put(piece, turns[chunk.part], chunk.index, stored[0], stored[1], spliced)
        return found

    def _is_there(self, piece: _Piece, found: dict[_Piece, int]) -> bool:
        return not piece.is_segment or found.get(piece, 0) == len(piece.prompt)

    def _turn(self, piece: _Piece) -> Turn | None:
        """By how much the keys of a segment are turned, from where they were computed to where they stand."""
        if not piece.is_segment:
            return None
        return self._rotary.turn(len(self._context), piece.start, len(piece.prompt) * self.layout.chunk_tokens)

    def _put(
        self, piece: _Piece, turn: Turn | None, index: int, keys: torch.Tensor, values: torch.Tensor, spliced: _Spliced
    ) -> None:
        """Put some consecutive tokens of a piece where they stand, from chunk `index` of it on."""
        tokens, offset = keys.shape[-2], index * self.layout.chunk_tokens
        there = slice(piece.start + offset, piece.start + offset + tokens)
        spliced.values[:, :, there] = values
        if turn is not None:
            turned(keys, turn.of(slice(offset, offset + tokens)), spliced.keys[:, :, there])
        else:
            spliced.keys[:, :, there] = keys

    def _put_computed(self, piece: _Piece, kv: DynamicCache, skipped: int, spliced: _Spliced) -> None:
        """Put all whole chunks of a piece where they stand, from KV that has them behind so many other tokens."""
        keys = torch.cat([layer.keys[:, :, skipped:] for layer in kv.layers]).cpu()
        values = torch.cat([layer.values[:, :, skipped:] for layer in kv.layers]).cpu()
        self._put(piece, self._turn(piece), 0, keys, values, spliced)

    # What is not there.

    async def _complete(self, pieces: Sequence[_Piece], found: dict[_Piece, int], spliced: _Spliced) -> int:
        """Compute and store the whole chunks that lack; how many tokens that were."""
        computed = 0
        made: dict[bytes, DynamicCache] = {}  # of segments that stand in this prompt more than once
        for piece in pieces:
            if not piece.is_segment:
                computed += await self._complete_lead(piece, found.get(piece, 0), spliced)
            elif not self._is_there(piece, found):
                name = piece.prompt.chunk_hashes[-1]
                if name not in made:
                    made[name], count = await self._compute_alone(piece.prompt, piece.ids)
                    computed += count
                await in_thread(self._put_computed, piece, made[name], len(self._context), spliced)
        return computed

    async def _complete_lead(self, piece: _Piece, chunks: int, spliced: _Spliced) -> int:
        """Compute what lacks of a leading text, behind what is there, as any prompt is."""
        chunk = self.layout.chunk_tokens
        begin, end = chunks * chunk, len(piece.prompt) * chunk
        if begin == end:
            return 0
        there = _Spliced(*(part[:, :, :begin] for part in spliced))
        kv = await in_thread(self._copied, zip(*there, strict=True) if begin else ())
        await self._prefix.compute(piece.ids[:end], kv)
        await self._prefix.write(piece.prompt, [(layer.keys, layer.values) for layer in kv.layers])
        await in_thread(self._put_computed, piece, kv, 0, spliced)
        return end - begin

    async def _compute_alone(self, prompt: Prompt, ids: torch.Tensor) -> tuple[DynamicCache, int]:
        """Compute a segment behind the context, and store it; what was computed, behind that, and how much."""
        computed = len(prompt) * self.layout.chunk_tokens
        if self._context_kv is None:
            context = DynamicCache(config=self._model.config)
            if len(self._context):
                await self._prefix.compute(self._context, context)
                computed += len(self._context)
            self._context_kv = context
        context_layers = self._context_kv.layers if len(self._context) else ()
        kv = await in_thread(self._copied, ((layer.keys[0], layer.values[0]) for layer in context_layers))
        chunk, begin = self.layout.chunk_tokens, len(self._context)
        for first in range(0, len(prompt) * chunk, chunk):
            await in_thread(compute_next, self._model, ids[first : first + chunk], kv)
        await self._prefix.write(prompt, [(it.keys[:, :, begin:], it.values[:, :, begin:]) for it in kv.layers])
        return kv, computed

    def _copied(self, layers: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> DynamicCache:
        """KV for the model to go on behind, from the keys and values of each layer, of shape (heads, tokens, width)."""
        kv = DynamicCache(config=self._model.config)
        for number, parts in enumerate(layers):
            keys, values = (part[None].to(self._model.device) for part in parts)
            kv.update(keys, values, number)
        return kv

    # All of it together.

    def _blended(self, spliced: _Spliced) -> BlendedCache:
        return BlendedCache(self._model.config, *(part.to(self._model.device) for part in spliced))

    def _places(self, pieces: Sequence[_Piece], tokens: int) -> torch.Tensor:
        """The places of tokens that are computed anew, the last one in any case."""
        anew = torch.ones(tokens, dtype=torch.bool)
        for piece in pieces:
            kept = len(piece.prompt) * self.layout.chunk_tokens
            first = min(self._first_tokens, kept) if piece.is_segment else 0
            anew[piece.start + first : piece.start + kept] = False
        anew[-1] = True
        return anew.nonzero().flatten()

    @torch.no_grad()
    def _blend(self, ids: torch.Tensor, places: torch.Tensor, kv: BlendedCache) -> torch.Tensor:
        """Compute these tokens, each of which sees all that stands before it; the logits after the last one."""
        device, dtype = self._model.device, self._model.dtype
        sees = torch.arange(len(ids))[None, :] <= places[:, None]
        mask = torch.zeros(sees.shape, dtype=dtype).masked_fill_(~sees, torch.finfo(dtype).min)
        kv.fill(places.to(device))
        arguments: dict[str, Any] = {
            "attention_mask": mask[None, None].to(device),
            "position_ids": places[None].to(device),
            "cache": kv,
            "use_cache": True,
            "logits_to_keep": 1,
        }
        with torch.autocast(device.type, enabled=False):
            output = self._model(ids[places][None].to(device), **arguments)
        kv.fill(None)
        logits: torch.Tensor = output.logits[0, -1]
        return logits


def _nothing(request_id: str, shortfall: Shortfall | None) -> SegmentResult:
    return SegmentResult(
        request_id=request_id,
        start_chunk=0,
        chunks=0,
        tokens=0,
        l1_chunks=0,
        l2_chunks=0,
        shortfall=shortfall,
    )
