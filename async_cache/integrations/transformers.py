"""transformers: a model's prompt is prefilled through the cache, its KV copied out of leases and into writers.

    prefix = CachedPrefix(cache, model)
    logits, kv, result = await prefix.prefill(tokens)
    await prefix.store(tokens, kv)

Bit-equal, and not only alike, unless `fp8` is asked for: a sum of floats depends on how the work is cut. So a prompt
is always computed in steps that end where a chunk ends. Who begins where the stored chunks end repeats the last steps
of who stored them: the same shapes over the same bytes. (On one machine, that is, with one version of torch and as
many threads.) KV that was computed in other steps, such as that of generated tokens, can be stored as well; it is
alike. A model whose positions depend on the length of the whole prompt is refused.

Needs `async-kv-cache[transformers]`.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple, TypeVar

try:
    import torch
    from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
    from transformers.cache_utils import DynamicLayer
except ModuleNotFoundError as error:
    raise ImportError("this needs torch and transformers: pip install 'async-kv-cache[transformers]'") from error

from async_cache.aio.ending import in_thread
from async_cache.cache import AsyncCache
from async_cache.client import CacheClient
from async_cache.errors import AsyncCacheError, ConnectionLostError
from async_cache.handles.lease import ReadChunk
from async_cache.handles.prefetch import Prefetch
from async_cache.integrations.blended import BlendedCache
from async_cache.integrations.fp8 import fp8_layout, from_fp8, to_fp8
from async_cache.prompt.keys import pack_tokens
from async_cache.prompt.layout import ModelLayout, Prompt
from async_cache.prompt.objects import ObjectGroup
from async_cache.values import LoadResult, Shortfall

log = logging.getLogger(__name__)

_READ, _STORED = "computed without the cache", "not stored"
_LENGTH_DEPENDENT = ("dynamic", "longrope")  # of transformers' `rope_type`

T = TypeVar("T")


class Loaded(NamedTuple):
    """`kv` of the longest prefix that was cached, for the model to add to; `result` says how long that is."""

    kv: DynamicCache
    result: LoadResult


class Prefilled(NamedTuple):
    """`logits` after the last token, `kv` of all tokens, and the `result` of the load before it."""

    logits: torch.Tensor
    kv: DynamicCache
    result: LoadResult


def kv_layout(
    model: PreTrainedModel, *, chunk_tokens: int = 256, name: str | None = None, revision: str | None = None
) -> ModelLayout:
    """One object for each chunk, of shape (2, layers, heads, chunk_tokens, head_dim): keys and values.

    `name` and `revision` stand for the weights: two models that share both, and what follows from their configuration,
    share their KV. They are those that the model was loaded by, if they are not given. The shape is that of the KV
    that the model makes of one token. Raises ValueError for a model without a name, and for one that `check_cacheable`
    refuses, or whose layers differ.
    """
    config = model.config
    name = name or config.name_or_path
    if not name:
        raise ValueError("the model has no name: pass `name`, which stands for its weights")
    check_cacheable(config, name)
    kv = DynamicCache(config=config)
    try:
        compute_next(model, torch.zeros(1, dtype=torch.long), kv)
    except Exception as error:
        raise ValueError(f"{name!r} cannot be cached: it does not compute a token from its id alone") from error
    if kv.get_seq_length() != 1:
        raise ValueError(f"{name!r} cannot be cached: it does not fill the cache that it is given")
    kinds = {(part.shape, part.dtype) for layer in kv.layers for part in (layer.keys, layer.values)}
    if len(kinds) > 1:
        shapes = ", ".join(sorted(f"{tuple(shape)} of {dtype}" for shape, dtype in kinds))
        raise ValueError(f"{name!r} cannot be cached: keys and values of a token are not all alike, but {shapes}")
    ((_, heads, _, width), dtype) = kinds.pop()
    group = ObjectGroup((2, len(kv.layers), heads, chunk_tokens, width), str(dtype).removeprefix("torch."))
    known = revision if revision is not None else getattr(config, "_commit_hash", None) or ""
    return ModelLayout(
        name, (group,), chunk_tokens=chunk_tokens, revision=f"{known} {config._attn_implementation}".strip()
    )


def check_cacheable(config: PreTrainedConfig, name: str) -> None:
    """Raises ValueError where KV is more than keys and values of all tokens in all layers, or not theirs alone."""
    layers = DynamicCache(config=config).layers
    for number, layer in enumerate(layers):
        if type(layer) is not DynamicLayer:
            kind = type(layer).__name__
            raise ValueError(f"{name!r} cannot be cached: layer {number} has no full attention, but a {kind}")
    if config.is_encoder_decoder or not layers:
        raise ValueError(f"{name!r} cannot be cached: it is not a decoder of which all KV is attention's")
    rope = getattr(config.get_text_config(decoder=True), "rope_parameters", None) or {}
    for parameters in (rope, *rope.values()):
        if isinstance(parameters, dict) and parameters.get("rope_type") in _LENGTH_DEPENDENT:
            kind = parameters["rope_type"]
            raise ValueError(f"{name!r} cannot be cached: its {kind} positions depend on the length of the prompt")


@torch.no_grad()
def compute_next(model: PreTrainedModel, ids: torch.Tensor, kv: DynamicCache) -> torch.Tensor:
    """The logits after the last of these tokens, which come behind those of `kv`, and are added to it."""
    with torch.autocast(model.device.type, enabled=False):  # whatever thread it is
        output = model(ids[None].to(model.device), cache=kv, use_cache=True, logits_to_keep=1)
    logits: torch.Tensor = output.logits[0, -1]
    return logits


class CachedPrefix:
    """Prefills prompts of one model through a cache, which is to be open while it is used.

    Whatever fails in the cache, the model computes: a fault makes the prefix shorter. A server that is lost or denies
    access, and a cache that is closed or could not be opened, are one line in the log until it works again.
    Tokens are a flat sequence of ids, or a tensor of one dimension.
    """

    def __init__(
        self,
        cache: AsyncCache | CacheClient,
        model: PreTrainedModel,
        *,
        chunk_tokens: int = 256,
        name: str | None = None,
        revision: str | None = None,
        salt: str = "",
        adapter: str = "",
        fp8: bool = False,
    ):
        """`chunk_tokens`, `name`, `revision`: see `kv_layout`. `salt` separates tenants, `adapter` names a LoRA.

        With `fp8`, KV takes half of the memory and storage, or a quarter, and is not what it was: what is computed
        behind it is alike, not bit-equal. It is never found by who wants it exact (`integrations.fp8` says why).

        The model computes one token. Raises ValueError for a model that cannot be cached, TypeError for what is none.
        """
        if not isinstance(cache, AsyncCache | CacheClient):
            raise TypeError(f"cache must be an AsyncCache or a CacheClient, not {type(cache).__name__}")
        if not isinstance(model, PreTrainedModel):
            raise TypeError(f"model must be a transformers model, not {type(model).__name__}")
        exact = kv_layout(model, chunk_tokens=chunk_tokens, name=name, revision=revision)
        (self._group,) = exact.groups
        self._fp8 = fp8
        self.layout = fp8_layout(exact) if fp8 else exact
        self._cache = cache
        self._model = model
        self._salt, self._adapter = salt, adapter
        self._warned: dict[str, str] = {}  # by what is not done, why
        self.prompt([])  # a salt or an adapter that cannot be used is known now

    def prompt(self, tokens: Any) -> Prompt:
        """The prompt of these tokens, for calls of the cache."""
        return self.layout.prompt(tokens, salt=self._salt, adapter=self._adapter)

    # Out of the cache.

    def prefetch(
        self, tokens: Any, *, request_id: str | None = None, deadline_seconds: float | None = None
    ) -> Prefetch:
        """Look up what is cached of a prompt, and load it: a future for the count, one for the bytes. Then `read` it.

        At least the last token is left to be computed: its logits are what a prefill is for.
        """
        prompt = self.prompt(token_ids(tokens)[:-1])
        return self._cache.prefetch(prompt, request_id=request_id, deadline_seconds=deadline_seconds)

    async def read(self, prefetch: Prefetch) -> Loaded:
        """The KV of what was loaded, copied once that is done: the request is over. One that is gone gives none."""
        try:
            kv = await self.copied(prefetch, self._rebuild)
            return Loaded(kv, await prefetch.load_done)
        except AsyncCacheError as error:
            return self._without_cache(error, prefetch.request_id)

    async def copied(self, prefetch: Prefetch, copy: Callable[[Sequence[ReadChunk]], T]) -> T:
        """What is made, in a thread, of the chunks that were loaded, once that is done: the request is over.

        For other integrations. Raises AsyncCacheError where nothing can be read.
        """
        try:
            await prefetch.load_done  # an error of its own says more than that there is nothing to read
            async with self._cache.read(prefetch.request_id) as lease:
                made = await in_thread(copy, list(lease))
                if not lease.held:
                    raise ConnectionLostError("the connection was lost while the KV was copied")
        except asyncio.CancelledError:
            with suppress(AsyncCacheError):
                await self._cache.end_request(prefetch.request_id)
            raise
        self._is_well(_READ)
        return made

    def _without_cache(self, error: AsyncCacheError, request_id: str = "") -> Loaded:
        self.warn_unread(error)
        return Loaded(self._rebuild(()), _nothing(request_id))

    def warn_unread(self, error: AsyncCacheError) -> None:
        """Log that a prompt is computed without the cache, and why, once for each reason."""
        self._warn(_READ, error)

    def _warn(self, what: str, error: AsyncCacheError) -> None:
        """Log one line, until it is another one or all is well."""
        if self._warned.get(what) != str(error):
            self._warned[what] = str(error)
            log.warning("prompts are %s: %s", what, error)

    def _is_well(self, what: str) -> None:
        """Log the next failure, whatever it is."""
        self._warned.pop(what, None)

    async def load(self, tokens: Any, *, deadline_seconds: float | None = None) -> Loaded:
        """The KV of the longest prefix that is cached."""
        try:
            prefetch = self.prefetch(tokens, deadline_seconds=deadline_seconds)
        except AsyncCacheError as error:
            return self._without_cache(error)
        return await self.read(prefetch)

    def _rebuild(self, leased: Sequence[ReadChunk]) -> DynamicCache:
        """The KV of consecutive chunks, the first of the prompt before all. It shares no memory with them."""
        kv = DynamicCache(config=self._model.config)
        dtype = getattr(torch, self._group.dtype)
        stored: list[Any] = [chunk.tensors() for chunk in leased]
        chunks = [from_fp8(tensors[0], tensors[1], dtype) if self._fp8 else tensors[0] for tensors in stored]
        for layer in range(len(kv.layers) if chunks else 0):
            keys, values = (torch.cat([chunk[part, layer] for chunk in chunks], dim=1)[None] for part in (0, 1))
            kv.update(keys.to(self._model.device), values.to(self._model.device), layer)
        return kv

    # The model.

    async def prefill(self, tokens: Any, *, deadline_seconds: float | None = None) -> Prefilled:
        """Load what is cached of a prompt, and compute the rest, in threads. To have that cached too, `store` it.

        Raises ValueError for tokens that the model cannot read, and for a model that is being trained.
        """
        ids = self.checked(tokens)
        kv, result = await self.load(ids, deadline_seconds=deadline_seconds)
        return Prefilled(await self.compute(ids, kv), kv, result)

    async def compute(self, tokens: Any, kv: DynamicCache) -> torch.Tensor:
        """Compute the tokens that `kv` lacks, and add them to it; the logits after the last one."""
        ids = self.checked(tokens)
        self._check_kv(kv)
        begin, chunk = kv.get_seq_length(), self.layout.chunk_tokens
        if begin >= len(ids):
            raise ValueError(f"kv has {begin} tokens of a prompt of {len(ids)}: nothing is left to be computed")
        while begin < len(ids):
            end = min(begin - begin % chunk + chunk, len(ids))
            logits = await in_thread(compute_next, self._model, ids[begin:end], kv)
            begin = end
        return logits

    # Into the cache.

    async def store(self, tokens: Any, kv: DynamicCache) -> int:
        """Give the cache the chunks of a prompt that it lacks in memory; how many it took.

        Only whole chunks of which `kv` has all tokens. The model may go on and add to `kv` meanwhile.
        Raises ValueError for a KV of another model, and for one that was blended.
        """
        self._check_kv(kv)
        if isinstance(kv, BlendedCache):
            raise ValueError("kv was blended from segments: it is not what the model computes of these tokens")
        prompt = self.prompt(token_ids(tokens)[: kv.get_seq_length()])
        return await self.write(prompt, [(layer.keys, layer.values) for layer in kv.layers])  # an update makes new ones

    async def write(self, prompt: Prompt, layers: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> int:
        """Store the chunks of a prompt that the cache lacks in memory, from the keys and values of each layer.

        For other integrations: nobody checks that they are those of the prompt.
        """
        taken = 0
        try:
            async with self._cache.store(prompt) as writer:
                for chunk in writer:
                    copy: Callable[..., None] = _round_chunk if self._fp8 else _copy_chunk
                    await in_thread(copy, layers, chunk.index, *chunk.tensors())
                    chunk.commit()
                    taken += 1
            self._is_well(_STORED)
        except AsyncCacheError as error:
            self._warn(_STORED, error)
        return taken

    # What callers give.

    def checked(self, tokens: Any) -> torch.Tensor:
        """Token ids that the model can read. Raises TypeError and ValueError for others."""
        ids = token_ids(tokens)
        known = self._model.get_input_embeddings().num_embeddings
        if not len(ids):
            raise ValueError("tokens must not be empty: there is nothing to compute")
        if ids.max() >= known:
            raise ValueError(f"token {int(ids.max())} is not one of the model's {known}")
        if self._model.training:
            raise ValueError("the model is being trained: call its `eval()` first")
        return ids

    def _check_kv(self, kv: DynamicCache) -> None:
        if not isinstance(kv, DynamicCache):
            raise TypeError(f"kv must be a DynamicCache, not {type(kv).__name__}")
        _, layers, heads, _, width = self._group.shape
        if len(kv.layers) != layers:
            raise ValueError(
                f"kv has {len(kv.layers)} layers, those of {self.layout.model!r} are {layers}: "
                "make an empty one by `DynamicCache(config=model.config)`"
            )
        tokens = kv.get_seq_length()
        expected = ((1, heads, tokens, width), f"torch.{self._group.dtype}")
        for layer in kv.layers if tokens else ():
            for part in (layer.keys, layer.values):
                if (tuple(part.shape), str(part.dtype)) != expected:
                    shape, dtype = expected
                    raise ValueError(
                        f"kv has {tuple(part.shape)} of {part.dtype} in a layer, "
                        f"where {self.layout.model!r} has {shape} of {dtype}"
                    )


def token_ids(tokens: Any) -> torch.Tensor:
    """Token ids of any kind that a prompt is made from. Raises TypeError and ValueError for what is none."""
    packed = bytearray(pack_tokens(tokens))
    return torch.frombuffer(packed, dtype=torch.int32).long() if packed else torch.empty(0, dtype=torch.long)


def _nothing(request_id: str) -> LoadResult:
    return LoadResult(
        request_id=request_id,
        start_chunk=0,
        chunks=0,
        tokens=0,
        l1_chunks=0,
        l2_chunks=0,
        shortfall=Shortfall.BACKEND_ERROR,
    )


def _copy_chunk(layers: Sequence[tuple[torch.Tensor, torch.Tensor]], index: int, chunk: torch.Tensor) -> None:
    """Fill `chunk`, shaped as in `kv_layout`, with chunk number `index` of the model's KV."""
    size = chunk.shape[3]
    tokens = slice(index * size, (index + 1) * size)
    with torch.no_grad():
        for number, (keys, values) in enumerate(layers):
            chunk[0, number].copy_(keys[0, :, tokens])
            chunk[1, number].copy_(values[0, :, tokens])


def _round_chunk(
    layers: Sequence[tuple[torch.Tensor, torch.Tensor]], index: int, scales: torch.Tensor, chunk: torch.Tensor
) -> None:
    """Fill `chunk`, shaped as in `kv_layout`, and its scales with chunk number `index` of the model's KV in fp8."""
    size = chunk.shape[3]
    tokens = slice(index * size, (index + 1) * size)
    for number, parts in enumerate(layers):
        for part, exact in enumerate(parts):
            to_fp8(exact[0, :, tokens], scales[part, number], chunk[part, number])
