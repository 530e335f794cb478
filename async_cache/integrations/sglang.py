"""SGLang's HiCache on the cache: a storage backend for `--hicache-storage-backend dynamic`, see docs/sglang.md.

A page of SGLang is a chunk. Its hash is chained over all tokens before it, so it identifies the page by itself, and
SGLang asks for runs of pages that begin anywhere: hence `prompt_from_digests`. What goes wrong is a miss, and a line in
the log.
"""

import json
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
from sglang.srt.mem_cache.hicache_storage import HiCacheStorage, HiCacheStorageConfig, PoolName, PoolTransferResult
from sglang.srt.observability.metrics_collector import StorageMetrics

from async_cache.client.blocking import BlockingClient
from async_cache.client.connecting import connect
from async_cache.errors import AsyncCacheError, ConfigError, ConnectionLostError
from async_cache.integrations.asking import FIRST_CHUNKS, count_found, parts_of
from async_cache.integrations.optional import OptionalClient
from async_cache.prompt.keys import check_label
from async_cache.prompt.layout import ModelLayout, Prompt
from async_cache.prompt.objects import ObjectGroup

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

T = TypeVar("T")

_LOAD_PART = 0.8  # of the time that a batch may take

OF_SGLANG = {  # what else may be in the extra config: SGLang reads it itself
    "backend_name", "module_path", "class_name", "interface_v1", "allocator", "prefetch_threshold",
    "prefetch_timeout_base", "prefetch_timeout_per_ki_token", "hicache_storage_pass_prefix_keys", "tp_lcm_size",
    "file_storage_path",
}  # fmt: skip


class Options(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The options in `--hicache-storage-backend-extra-config` that are the cache's. docs/sglang.md has a table."""

    url: str | None = None
    namespace: str = ""
    token: str | None = None
    token_file: str | None = None
    salt: str = ""
    model: str | None = None
    revision: str = ""
    kv_cache_dtype: str = ""
    timeout_seconds: float = 10.0
    connect_timeout_seconds: float = 2.0
    retry_seconds: float = 5.0

    def client(self) -> BlockingClient:
        """A client that is not open."""
        return BlockingClient(
            self.url, self.namespace, token=self.token, connect_timeout_seconds=self.connect_timeout_seconds
        )

    @classmethod
    def of(cls, extra_config: dict[str, Any] | None) -> "Options":
        """The options in an extra config. Raises ConfigError for what is no option, or cannot be its value."""
        given = {name: value for name, value in (extra_config or {}).items() if name not in OF_SGLANG}
        try:
            options = msgspec.convert(given, cls)
            check_label("salt", options.salt)
            if min(options.timeout_seconds, options.connect_timeout_seconds, options.retry_seconds) <= 0:
                raise ValueError("seconds must be more than 0")
            if options.token_file is not None:
                token = Path(options.token_file).read_text(encoding="utf-8-sig").strip()
                options = msgspec.structs.replace(options, token=token)
            connect(options.url, options.namespace, token=options.token)  # checks them; it is not opened
        except (ValueError, OSError) as error:
            raise ConfigError(f"hicache-storage-backend-extra-config: {error}") from error
        return options


def layout_of(options: Options, config: HiCacheStorageConfig, pool: Any) -> ModelLayout:
    """The layout of all that fixes the bytes of this rank's pages. Raises ConfigError if the pool has no such pages."""
    model = options.model or config.model_name
    if not model:
        raise ConfigError('SGLang does not say which model it serves: set "model" in the extra config')
    try:
        page = pool.get_data_page(0, flat=False)
    except Exception as error:
        raise ConfigError(
            f"a {type(pool).__name__} of layout {pool.layout!r} has no pages to store ({error}): "
            "use --hicache-mem-layout page_first, or where it is that already, another --hicache-storage-backend"
        ) from error
    dtype = str(page.dtype).removeprefix("torch.")
    if dtype == "uint8" and not options.kv_cache_dtype:
        raise ConfigError(
            'the host pool keeps bytes: set "kv_cache_dtype" in the extra config to what --kv-cache-dtype is'
        )
    order = [pool.layout, pool.start_layer, pool.end_layer, config.pp_rank, config.pp_size]
    order += [config.attn_cp_rank, config.attn_cp_size, config.is_mla_model, options.kv_cache_dtype]
    return ModelLayout(
        model,
        (ObjectGroup(tuple(page.shape), dtype),),
        chunk_tokens=config.logical_page_size or pool.page_size,
        world_size=1 if config.is_mla_model else config.tp_size,
        revision=json.dumps(["sglang 1", *order, options.revision]),
    )


class AsyncCacheStorage(HiCacheStorage):  # type: ignore[misc]
    """The class for `class_name`. May be called from any thread. Raises ConfigError for options that cannot be used.

    The answers of a batch are those of a prefix of it: what follows the first missing page counts as missing.
    """

    def __init__(self, storage_config: HiCacheStorageConfig, kwargs: dict[str, Any] | None = None):
        self._options = Options.of(storage_config.extra_config)
        self._config = storage_config
        self._rank = 0 if storage_config.is_mla_model else storage_config.tp_rank
        self._layout: ModelLayout | None = None
        self._refusal: Exception = ConfigError("SGLang has not registered its host memory pool yet")
        self._warned: str | None = None
        self._lacks_room = False
        self._storing = threading.Lock()  # a page that is being stored does not land after a `clear`
        self._loads: deque[tuple[int, float]] = deque(maxlen=1000)  # (pages, GB/s) since the last `get_stats`
        self._saves: deque[tuple[int, float]] = deque(maxlen=1000)
        self._beside = ThreadPoolExecutor(1, "async_cache ask")  # it has no thread before there is much to ask for
        self._client = OptionalClient(self._options.client, self._options.retry_seconds)
        self._or_miss(self._client.get, None)  # where there is no server, that is logged now

    def close(self) -> None:
        """Close the client: SGLang calls this when the backend is detached."""
        self._client.close()
        self._beside.shutdown(wait=False)

    # The host pools.

    def register_mem_pool_host(self, mem_pool_host: Any) -> None:
        """Note the pool of the KV: its pages are what is stored."""
        super().register_mem_pool_host(mem_pool_host)
        try:
            self._layout = layout = layout_of(self._options, self._config, mem_pool_host)
        except Exception as error:
            self._refuse(error)
        else:
            log.info(
                "pages of %r: %d tokens, %d bytes a rank, %d ranks, salt %r, %s",
                layout.model,
                layout.chunk_tokens,
                layout.block_bytes[0],
                layout.world_size,
                self._options.salt,
                layout.revision,
            )

    def register_mem_host_pool_v2(self, host_pool: Any, host_pool_name: str) -> None:
        """Refuse other pools beside that of the KV: this backend does not support their models."""
        super().register_mem_host_pool_v2(host_pool, host_pool_name)
        if host_pool_name != PoolName.KV:
            what = f"this model keeps {str(host_pool_name)!r} beside its KV, which cannot be stored here"
            self._refuse(ConfigError(f"{what}: use another --hicache-storage-backend for it"))

    def _refuse(self, error: Exception) -> None:
        self._layout, self._refusal = None, error
        self._warn(error)

    # Failures.

    def _or_miss(self, call: Callable[[], T], miss: T) -> T:
        try:
            value = call()
        except Exception as error:
            if isinstance(error, ConnectionLostError | TimeoutError):
                self._client.failed(error)
            self._warn(error)
            return miss
        if self._warned is not None and self._layout is not None:
            self._warned = None
            log.info("SGLang uses the cache again")
        return value

    def _warn(self, error: Exception) -> None:
        """Log one line, until it is another one or all is well."""
        expected = isinstance(error, AsyncCacheError | ValueError | TimeoutError)
        text = self._text_of(error)
        if text != self._warned:
            self._warned = text
            log.warning("SGLang goes on without the cache: %s", text, exc_info=None if expected else error)

    def _text_of(self, error: Exception) -> str:
        return str(error) or f"the cache has not answered for {self._options.timeout_seconds} s"

    def _prompt(self, keys: Sequence[str]) -> Prompt:
        return self._known_layout().prompt_from_digests(list(map(bytes.fromhex, keys)), salt=self._options.salt)

    def _known_layout(self) -> ModelLayout:
        if self._layout is None:
            raise self._refusal.with_traceback(None)  # it is raised often: its traceback is not to grow
        return self._layout

    # Is it there?

    def batch_exists(self, keys: list[str], extra_info: Any = None) -> int:
        """How many of the first keys are there, for all ranks."""
        return self._or_miss(lambda: self._count(keys), 0)

    def exists(self, key: str) -> bool:
        """Whether a page is there, for all ranks."""
        return self.batch_exists([key]) == 1

    def _count(self, keys: Sequence[str]) -> int:
        client, end = self._client.get(), time.monotonic() + self._options.timeout_seconds

        def lookup(prompt: Prompt) -> int:
            return client.lookup(prompt, timeout_seconds=max(end - time.monotonic(), 0)).chunks

        if len(keys) <= FIRST_CHUNKS:
            return lookup(self._prompt(keys))
        return count_found((self._prompt(keys[begin:end]) for begin, end in parts_of(len(keys))), lookup, self._beside)

    # Reading.

    def batch_get_v1(self, keys: list[str], host_indices: "torch.Tensor", extra_info: Any = None) -> list[bool]:
        """Copy straight from the server's memory into the pages of the host pool that begin at these indices."""
        pool, taken = self.mem_pool_host, [False] * len(keys)

        def take(number: int, page: "torch.Tensor") -> None:
            pool.set_from_flat_data_page(starts[number], page.view(-1))
            taken[number] = True

        def load() -> bool:
            starts.extend(self._starts(keys, host_indices))
            return self._load(keys, take)

        starts: list[int] = []
        if not self._or_miss(load, False):
            return [False] * len(keys)
        return taken

    def batch_get(
        self, keys: list[str], target_locations: Any = None, target_sizes: Any = None
    ) -> "list[torch.Tensor | None]":
        """Copy pages into the targets, or without any, into new tensors; None for what is missing."""
        taken: list[torch.Tensor | None] = [None] * len(keys)

        def take(number: int, page: "torch.Tensor") -> None:
            if target_locations is None:
                taken[number] = page.clone()
                return
            target = target_locations[number]
            target.view(-1).copy_(same_form(page, target).view(-1))
            taken[number] = target

        return taken if self._or_miss(lambda: self._load(keys, take), False) else [None] * len(keys)

    def get(self, key: str, target_location: Any = None, target_sizes: Any = None) -> "torch.Tensor | None":
        """Copy a page into the target, or without one, into a new tensor; None if it is missing."""
        return self.batch_get([key], None if target_location is None else [target_location])[0]

    def _load(self, keys: Sequence[str], take: "Callable[[int, torch.Tensor], None]") -> bool:
        """True once every page that there is was taken. What is copied while the connection is lost may be anything."""
        prompt, client, seconds = self._prompt(keys), self._client.get(), self._options.timeout_seconds
        began = time.perf_counter()
        # A slow disk gives what it has in time for that to be read: only a silent server gives nothing.
        prefetch = client.prefetch(prompt, ranks=[self._rank], deadline_seconds=_LOAD_PART * seconds)
        try:
            prefetch.load_done.result(seconds)
            left = max(began + seconds - time.perf_counter(), 0)
            with client.read(prefetch.request_id, rank=self._rank, timeout_seconds=left) as lease:
                for number, chunk in enumerate(lease):
                    page = chunk.tensors()[0]
                    assert page is not None
                    take(number, page)
                if not lease.held:
                    raise ConnectionLostError("the connection was lost while pages were copied")
                self._count_traffic(self._loads, len(lease), time.perf_counter() - began)
            return True
        except BaseException:
            client.end_request_nowait(prefetch.request_id)
            raise

    # Writing.

    def batch_set_v1(self, keys: list[str], host_indices: "torch.Tensor", extra_info: Any = None) -> list[bool]:
        """Store straight from the pages of the host pool that begin at these indices."""
        pool, none = self.mem_pool_host, [False] * len(keys)

        def save() -> list[bool]:
            starts = self._starts(keys, host_indices)
            return self._save(keys, lambda number: pool.get_data_page(starts[number], flat=False))

        return self._or_miss(save, none)

    def batch_set(
        self, keys: list[str], values: Any = None, target_locations: Any = None, target_sizes: Any = None
    ) -> bool:
        """Store pages; whether all could be."""
        return all(self._or_miss(lambda: self._save(keys, values.__getitem__), [False]))

    def set(self, key: str, value: Any = None, target_location: Any = None, target_sizes: Any = None) -> bool:
        """Store a page; whether it could be."""
        return self.batch_set([key], [value])

    def _save(self, keys: Sequence[str], page_of: "Callable[[int], torch.Tensor]") -> list[bool]:
        prompt, client = self._prompt(keys), self._client.get()
        began = time.perf_counter()
        seconds = self._options.timeout_seconds
        with (
            self._alone(),
            client.store(prompt, rank=self._rank, timeout_seconds=seconds) as writer,  # chunks that memory lacks
        ):
            for chunk in writer:
                room = chunk.tensors()[0]
                assert room is not None
                room.view(-1).copy_(same_form(page_of(chunk.index), room).reshape(-1))
                del room
                chunk.commit()
            stored = len(keys) if writer.shortfall is None else writer[-1].index + 1 if len(writer) else 0
            self._warn_of_room(prompt, found=stored > 0 or not keys)
            self._count_traffic(self._saves, len(writer), time.perf_counter() - began)
        return [number < stored for number in range(len(keys))]

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Room for one call that stores, or empties the cache: SGLang stores from one thread.

        Raises TimeoutError if another does not end.
        """
        seconds = self._options.timeout_seconds
        if not self._storing.acquire(timeout=seconds):
            raise TimeoutError(f"pages are still being stored, or the cache emptied, after {seconds} s")
        try:
            yield
        finally:
            self._storing.release()

    def _warn_of_room(self, prompt: Prompt, *, found: bool) -> None:
        """Log one line, until a page has found room."""
        if not found and not self._lacks_room:
            log.warning(
                "a page of %d bytes finds no room in the server's memory: if that lasts, give it more --l1-bytes",
                prompt.layout.objects.room_bytes[self._rank],
            )
        self._lacks_room = not found

    def _starts(self, keys: Sequence[str], host_indices: "torch.Tensor") -> list[int]:
        """Where the pages begin in the host pool."""
        page_tokens = self._known_layout().chunk_tokens
        if len(host_indices) != len(keys) * page_tokens:
            raise ValueError(f"{len(host_indices)} host indices are not those of {len(keys)} pages of {page_tokens}")
        starts: list[int] = host_indices[::page_tokens].tolist()
        return starts

    # Models with other pools beside their KV.

    def batch_exists_v2(self, keys: list[str], pool_transfers: Any = None, extra_info: Any = None) -> Any:
        """How many of the first keys are there; none where there are other pools beside the KV."""
        return PoolTransferResult(self.batch_exists(keys), {}) if not pool_transfers else PoolTransferResult.empty()

    def batch_get_v2(self, transfers: Any, extra_info: Any = None) -> dict[str, list[bool]]:
        """Copy nothing: other pools beside the KV are not supported."""
        return {transfer.name: [False] * len(transfer.keys or ()) for transfer in transfers}

    batch_set_v2 = batch_get_v2

    # Looking at it and emptying it.

    def clear(self) -> None:
        """Empty the server, of all engines that use it, once this one's pages that are being stored are there.

        A token that is bound to salts may not. Failing is logged.
        """
        try:
            with self._alone():
                deleted = self._client.get().clear("all", timeout_seconds=self._options.timeout_seconds)
        except Exception as error:
            log.warning("the cache was not emptied: %s", self._text_of(error))
        else:
            log.info("SGLang has emptied the cache: %d chunks", deleted.chunks)

    def get_stats(self) -> StorageMetrics | None:
        """The pages moved and their speed since it was last asked, if SGLang collects metrics."""
        if not self._config.enable_storage_metrics:
            return None
        loads, saves = ([log.popleft() for _ in range(len(log))] for log in (self._loads, self._saves))
        return StorageMetrics(
            prefetch_pgs=[pages for pages, _ in loads],
            backup_pgs=[pages for pages, _ in saves],
            prefetch_bandwidth=[speed for _, speed in loads],
            backup_bandwidth=[speed for _, speed in saves],
        )

    def _count_traffic(self, traffic: deque[tuple[int, float]], pages: int, seconds: float) -> None:
        if pages:
            traffic.append((pages, pages * self._known_layout().block_bytes[self._rank] / 1e9 / seconds))


def same_form(tensor: "torch.Tensor", as_: "torch.Tensor") -> "torch.Tensor":
    """The tensor, if a copy between the two keeps each byte."""
    if tensor.dtype != as_.dtype or tensor.numel() != as_.numel():
        forms = f"{tensor.numel()} {tensor.dtype} against {as_.numel()} {as_.dtype}"
        raise ValueError(f"a tensor does not fit the registered host pool: {forms}")
    return tensor
