"""SGLang's storage backend, created by SGLang's own factory, between its host pools and a server process.

They run where SGLang is installed; docs/sglang.md says how such an environment is made.
"""

import asyncio
import logging
import os
import queue
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("sglang")

import torch

with warnings.catch_warnings():  # SGLang says at its import what a CPU can not do
    warnings.simplefilter("ignore")
    from sglang.srt.managers.cache_controller import HiCacheController, PrefetchOperation, StorageOperation
    from sglang.srt.mem_cache.device_pool_info import KVBufferLayout, KVBuffers, MHABufferInfo, MLABufferInfo
    from sglang.srt.mem_cache.hicache_storage import (
        HiCacheStorage,
        HiCacheStorageConfig,
        PoolHitPolicy,
        PoolName,
        PoolTransfer,
    )
    from sglang.srt.mem_cache.pool_host.mha import MHATokenToKVPoolHost
    from sglang.srt.mem_cache.pool_host.mla import MLATokenToKVPoolHost
    from sglang.srt.mem_cache.storage import StorageBackendFactory

from async_cache import BlockingClient, ConfigError, connect

PAGE = 4
LAYERS, HEADS, DIM = 3, 2, 8
LAYOUTS = ["layer_first", "page_first", "page_first_direct", "page_head"]
WARNING = "SGLang goes on without the cache: "


# A server, host pools, and backends.


class ServerProcess:
    """`async-cache serve`, which can be killed and started again at the same address."""

    def __init__(self, directory: Path, config: str = ""):
        self.url = f"unix://{directory}/cache.sock"
        self._directory = directory
        self._process: subprocess.Popen[str] | None = None
        (directory / "config.toml").write_text(config)

    def start(self) -> None:
        command = [sys.executable, "-m", "async_cache", "serve", "--listen", self.url, "--l1-bytes", "16MiB"]
        command += ["--l2", f"fs://{self._directory}/kv", "--config", f"{self._directory}/config.toml"]
        environ = os.environ | {"XDG_RUNTIME_DIR": str(self._directory)}
        self._process = subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        assert any(line.startswith("serving at") for line in self._process.stdout)

    def stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        if self._process is not None:
            self._process.send_signal(number)
            self._process.wait(60)
            assert self._process.stdout is not None
            self._process.stdout.close()
            self._process = None


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ServerProcess]:
    server = ServerProcess(tmp_path)
    server.start()
    yield server
    server.stop()


def mha_pool(
    layout: str = "page_first", page: int = PAGE, dtype: torch.dtype = torch.bfloat16, tokens: int = 64
) -> Any:
    layers = tuple(torch.zeros(tokens, HEADS, DIM, dtype=dtype) for _ in range(LAYERS))
    pointers = torch.zeros(LAYERS, dtype=torch.uint64)
    buffers = KVBuffers(k=layers, v=layers, k_data_ptrs=pointers, v_data_ptrs=pointers, layout=KVBufferLayout.NHD)
    info = MHABufferInfo(
        buffers=buffers,
        page_size=page,
        head_num=HEADS,
        head_dim=DIM,
        v_head_dim=DIM,
        dtype=dtype,
        device=torch.device("cpu"),
    )
    return filled(MHATokenToKVPoolHost(
        info, 2.0, 0, page, layout, pin_memory=False, device_capacity_tokens=tokens, start_layer=0, end_layer=LAYERS
    ))  # fmt: skip


def mla_pool(layout: str = "page_first") -> Any:
    layers = tuple(torch.zeros(64, 1, 2 * DIM, dtype=torch.bfloat16) for _ in range(LAYERS))
    info = MLABufferInfo(
        buffers=layers,
        data_ptrs=torch.zeros(LAYERS, dtype=torch.uint64),
        layer_indices=tuple(range(LAYERS)),
        device_layer_num=LAYERS,
        page_size=PAGE,
        kv_lora_rank=DIM,
        qk_rope_head_dim=DIM,
        kv_cache_dim=2 * DIM,
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
    )
    return filled(MLATokenToKVPoolHost(
        info, 2.0, 0, PAGE, layout, pin_memory=False,
        device_capacity_tokens=64, start_layer=0, end_layer=LAYERS, target_layer_num=LAYERS,
    ))  # fmt: skip


def filled(pool: Any) -> Any:
    """With bytes of which no two pages have the same."""
    numbers = torch.randint(0, 128, (pool.kv_buffer.nbytes,), dtype=torch.uint8)
    pool.kv_buffer.view(-1).view(torch.uint8).copy_(numbers)
    return pool


def config_of(url: str, rank: int = 0, size: int = 1, mla: bool = False, **extra: Any) -> HiCacheStorageConfig:
    path = {"module_path": "async_cache.integrations.sglang", "class_name": "AsyncCacheStorage"}
    return HiCacheStorageConfig(
        tp_rank=rank, tp_size=size, pp_rank=0, pp_size=1, attn_cp_rank=0, attn_cp_size=1, is_mla_model=mla,
        enable_storage_metrics=True, is_page_first_layout=True, model_name="org/model",
        extra_config={"backend_name": "async_cache", **path, "interface_v1": 1, "url": url, **extra},
    )  # fmt: skip


Make = Callable[..., Any]


@pytest.fixture
def make(server: ServerProcess) -> Iterator[Make]:
    """Backends of a host pool, made as SGLang's controller makes them."""
    made: list[Any] = []

    def make_one(pool: Any, rank: int = 0, size: int = 1, mla: bool = False, **extra: Any) -> Any:
        config = config_of(extra.pop("url", server.url), rank, size, mla, **extra)
        backend = StorageBackendFactory.create_backend("dynamic", config, pool)
        made.append(backend)
        backend.register_mem_pool_host(pool)
        backend.on_host_pools_registered()
        return backend

    yield make_one
    for backend in made:
        backend.close()


def keys_of(count: int, name: str = "prompt") -> list[str]:
    """As SGLang's: the hash of a page goes over the hash of the one before."""
    keys, previous = [], b""
    for number in range(count):
        previous = sha256(previous + f"{name} {number}".encode()).digest()
        keys.append(previous.hex())
    return keys


def pages(first: int, count: int, page: int = PAGE) -> torch.Tensor:
    """The host indices of `count` pages from the page `first` on."""
    return torch.arange(first * page, (first + count) * page)


def bytes_of(pool: Any, first: int, count: int) -> list[torch.Tensor]:
    return [pool.get_data_page(n * pool.page_size).view(torch.uint8).clone() for n in range(first, first + count)]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


def store(backend: Any, keys: list[str], indices: torch.Tensor) -> None:
    """All of it, and until it can be found over other connections: a commit is in order only with its own."""
    assert backend.batch_set_v1(keys, indices) == [True] * len(keys)
    backend.exists(keys[0])


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.getMessage().startswith(WARNING)]


def wait_until(is_so: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# What it is made by.


def test_the_factory_makes_it_from_its_class_path(make: Make) -> None:
    backend = make(mha_pool())
    assert isinstance(backend, HiCacheStorage)
    assert type(backend).__name__ == "AsyncCacheStorage"


def test_it_has_all_that_the_abstract_class_has(make: Make) -> None:
    names = {name for name, value in vars(HiCacheStorage).items() if callable(value) and not name.startswith("_")}
    ours = vars(type(make(mha_pool())))
    assert names - set(ours) == {"on_host_pools_registered"}


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ({"urll": "unix:///x"}, "urll"),
        ({"url": "http://somewhere"}, "http"),
        ({"timeout_seconds": "long"}, "timeout_seconds"),
        ({"timeout_seconds": 0}, "more than 0"),
        ({"salt": "a\n"}, "control characters"),
        ({"namespace": 7}, "namespace"),
        ({"token_file": "/there/is/none"}, "/there/is/none"),
    ],
)
def test_an_option_that_can_not_be_used_is_told_at_the_start(make: Make, extra: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=f"hicache-storage-backend-extra-config: .*{said}"):
        make(mha_pool(), **extra)


def test_what_sglang_reads_itself_is_no_unknown_option(make: Make) -> None:
    make(mha_pool(), prefetch_threshold=64, hicache_storage_pass_prefix_keys=True, allocator="shm")


# Is it there?


def test_exists_counts_up_to_the_first_that_is_missing(make: Make) -> None:
    pool, keys = mha_pool(), keys_of(8)
    backend = make(pool)
    assert backend.batch_exists(keys) == 0
    assert backend.batch_set_v1(keys[:3], pages(0, 3)) == [True] * 3
    assert backend.batch_set_v1(keys[5:], pages(5, 3)) == [True] * 3
    assert backend.batch_exists(keys) == 3
    assert backend.batch_exists(keys[:2]) == 2
    assert backend.batch_exists([]) == 0
    assert [backend.exists(key) for key in keys] == [True] * 3 + [False] * 2 + [True] * 3


def test_a_batch_that_begins_in_the_middle_finds_its_pages(make: Make) -> None:
    pool, keys = mha_pool(), keys_of(8)
    backend = make(pool)
    backend.batch_set_v1(keys, pages(0, 8))
    assert backend.batch_exists(keys[3:]) == 5
    before = bytes_of(pool, 4, 4)
    assert backend.batch_get_v1(keys[4:], pages(20, 4)) == [True] * 4
    assert same(bytes_of(pool, 20, 4), before)


def test_what_another_engine_stored_is_found(make: Make) -> None:
    pool, keys = mha_pool(), keys_of(4)
    store(make(pool), keys, pages(0, 4))
    other = mha_pool()
    backend = make(other)
    assert backend.batch_exists(keys) == 4
    assert backend.batch_get_v1(keys, pages(10, 4)) == [True] * 4
    assert same(bytes_of(other, 10, 4), bytes_of(pool, 0, 4))


# The same bytes.


@pytest.mark.parametrize("layout", LAYOUTS)
def test_v1_moves_pages_between_host_pools_of_any_layout(make: Make, layout: str) -> None:
    pool, other, keys = mha_pool(layout), mha_pool(layout), keys_of(6)
    store(make(pool), keys, pages(2, 6))
    untouched = bytes_of(other, 0, 10)
    assert make(other).batch_get_v1(keys, pages(10, 6)) == [True] * 6
    assert same(bytes_of(other, 10, 6), bytes_of(pool, 2, 6))
    assert same(bytes_of(other, 0, 10), untouched)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_v0_moves_flat_pages(make: Make, layout: str) -> None:
    pool, keys = mha_pool(layout), keys_of(6)
    backend = make(pool)
    assert backend.batch_set(keys, [pool.get_data_page(PAGE * n) for n in range(6)])
    targets = [pool.get_dummy_flat_data_page() for _ in keys]
    found = backend.batch_get(keys, targets)
    assert all(page is target for page, target in zip(found, targets, strict=True))
    assert same([page.view(torch.uint8) for page in found], bytes_of(pool, 0, 6))
    assert same([page.view(-1).view(torch.uint8) for page in backend.batch_get(keys)], bytes_of(pool, 0, 6))


def test_v0_and_v1_meet(make: Make) -> None:
    pool, keys = mha_pool("layer_first"), keys_of(2)
    backend = make(pool)
    assert backend.set(keys[0], pool.get_data_page(0))
    assert backend.batch_set_v1(keys[1:], pages(1, 1)) == [True]
    assert backend.batch_get_v1(keys, pages(8, 2)) == [True, True]
    assert same(bytes_of(pool, 8, 2), bytes_of(pool, 0, 2))
    assert torch.equal(backend.get(keys[1], pool.get_dummy_flat_data_page()), pool.get_data_page(PAGE))


def test_what_is_missing_and_what_follows_it_is_told(make: Make) -> None:
    pool, keys = mha_pool(), keys_of(6)
    backend = make(pool)
    backend.batch_set_v1(keys[:2] + keys[3:], pages(0, 5))
    before = bytes_of(pool, 12, 4)
    assert backend.batch_get_v1(keys, pages(10, 6)) == [True, True, False, False, False, False]
    assert same(bytes_of(pool, 10, 2), bytes_of(pool, 0, 2))
    assert same(bytes_of(pool, 12, 4), before)
    found = backend.batch_get(keys, [pool.get_dummy_flat_data_page() for _ in keys])
    assert [page is not None for page in found] == [True, True, False, False, False, False]
    assert backend.get(keys[2], pool.get_dummy_flat_data_page()) is None


def test_what_is_stored_twice_stays_as_it_was(make: Make) -> None:
    pool, keys = mha_pool(), keys_of(4)
    backend = make(pool)
    backend.batch_set_v1(keys[:2], pages(0, 2))
    assert backend.batch_set_v1(keys, pages(4, 4)) == [True] * 4
    assert backend.batch_get_v1(keys, pages(10, 4)) == [True] * 4
    assert same(bytes_of(pool, 10, 4), bytes_of(pool, 0, 2) + bytes_of(pool, 6, 2))


def test_more_than_fits_is_not_said_to_be_stored(make: Make) -> None:
    pool = mha_pool(page=1)
    backend = make(pool)
    keys = keys_of(6000)
    stored = backend.batch_set_v1(keys, torch.zeros(6000, dtype=torch.int64))
    assert stored == sorted(stored, reverse=True)
    assert True in stored and False in stored
    assert not backend.batch_set(keys[-1:] + keys_of(5000, "other"), [pool.get_data_page(0)] * 5001)


def test_nothing_is_held_afterwards(make: Make, server: ServerProcess) -> None:
    pool, keys = mha_pool(), keys_of(6)
    backend = make(pool)
    backend.batch_set_v1(keys[:4], pages(0, 4))
    backend.batch_get_v1(keys, pages(10, 6))
    backend.batch_get(keys[5:], [pool.get_dummy_flat_data_page()])
    backend.batch_get(keys[:1], [torch.zeros(1)])

    async def held() -> tuple[int, int, int]:
        async with connect(server.url) as client:
            stats = await client.stats()
            return stats.requests, stats.leases, stats.reserved_bytes

    wait_until(lambda: asyncio.run(held()) == (0, 0, 0))


# Ranks.


def test_a_page_is_there_when_all_ranks_have_it_and_each_gets_its_own(make: Make) -> None:
    pools, keys = [mha_pool(), mha_pool()], keys_of(4)
    backends = [make(pool, rank, 2) for rank, pool in enumerate(pools)]
    assert backends[0].batch_set_v1(keys, pages(0, 4)) == [True] * 4
    assert [backend.batch_exists(keys) for backend in backends] == [0, 0]
    assert backends[0].batch_get_v1(keys, pages(8, 4)) == [False] * 4
    store(backends[1], keys[:3], pages(0, 3))
    assert [backend.batch_exists(keys) for backend in backends] == [3, 3]
    for backend, pool in zip(backends, pools, strict=True):
        assert backend.batch_get_v1(keys, pages(8, 4)) == [True] * 3 + [False]
        assert same(bytes_of(pool, 8, 3), bytes_of(pool, 0, 3))
    assert make(pools[0]).batch_exists(keys) == 0, "a world of another size"


@pytest.mark.parametrize("layout", ["layer_first", "page_first", "page_first_direct"])
def test_all_ranks_of_an_mla_model_share_one_copy(make: Make, server: ServerProcess, layout: str) -> None:
    pools, keys = [mla_pool(layout), mla_pool(layout)], keys_of(4)
    writer, reader = (make(pool, rank, 2, mla=True) for rank, pool in enumerate(pools))
    store(writer, keys, pages(0, 4))
    assert reader.batch_exists(keys) == 4
    assert reader.batch_get_v1(keys, pages(8, 4)) == [True] * 4
    assert same(bytes_of(pools[1], 8, 4), bytes_of(pools[0], 0, 4))
    alone = make(mla_pool(layout), mla=True)
    assert alone.batch_exists(keys) == 4, "of however many ranks"


# What never meets.


def test_other_forms_never_meet(make: Make) -> None:
    pool, keys = mha_pool(), keys_of(4)
    store(make(pool), keys, pages(0, 4))
    assert make(mha_pool()).batch_exists(keys) == 4
    assert make(mha_pool("layer_first")).batch_exists(keys) == 0
    assert make(mha_pool("page_first_direct")).batch_exists(keys) == 0
    assert make(mha_pool(page=8)).batch_exists(keys) == 0
    assert make(mha_pool(dtype=torch.float16)).batch_exists(keys) == 0
    assert make(mla_pool(), mla=True).batch_exists(keys) == 0
    assert make(mha_pool(), salt="tenant").batch_exists(keys) == 0
    assert make(mha_pool(), model="other").batch_exists(keys) == 0
    assert make(mha_pool(), revision="other").batch_exists(keys) == 0


def test_a_pool_of_bytes_needs_the_name_of_their_type(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    pool, keys = mha_pool(dtype=torch.uint8), keys_of(2)
    backend = make(pool)
    assert [backend.batch_exists(keys), backend.batch_set_v1(keys, pages(0, 2))] == [0, [False, False]]
    assert len(warnings_in(caplog)) == 1
    assert "--kv-cache-dtype" in warnings_in(caplog)[0]
    store(make(pool, kv_cache_dtype="fp8_e4m3"), keys, pages(0, 2))
    assert make(pool, kv_cache_dtype="fp8_e4m3").batch_exists(keys) == 2
    assert make(pool, kv_cache_dtype="fp8_e5m2").batch_exists(keys) == 0


# Failures.


def misses(backend: Any, pool: Any, keys: list[str]) -> bool:
    """Each call is answered, and tells that nothing is there, or was stored."""
    none = [False] * len(keys)
    assert not backend.exists(keys[0])
    assert backend.batch_get_v1(keys, pages(8, len(keys))) == none
    assert backend.batch_set_v1(keys, pages(0, len(keys))) == none
    assert backend.batch_get(keys, [pool.get_dummy_flat_data_page() for _ in keys]) == [None] * len(keys)
    assert not backend.batch_set(keys, [pool.get_data_page(0) for _ in keys])
    backend.clear()
    return bool(backend.batch_exists(keys) == 0)


def test_a_server_that_is_not_there_is_one_line_and_it_may_come_later(
    make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    (tmp_path / "later").mkdir()
    later, pool, keys = ServerProcess(tmp_path / "later"), mha_pool(), keys_of(3)
    backend = make(pool, url=later.url, connect_timeout_seconds=0.1, retry_seconds=0.1)
    assert misses(backend, pool, keys)
    assert misses(backend, pool, keys)
    assert len(warnings_in(caplog)) == 1
    assert "`async-cache serve` starts one" in warnings_in(caplog)[0]
    later.start()
    try:
        wait_until(lambda: backend.batch_set_v1(keys, pages(0, 3)) == [True] * 3)
        assert backend.batch_exists(keys) == 3
        assert "SGLang uses the cache again" in caplog.text
    finally:
        backend.close()
        later.stop()


def test_a_server_that_is_killed_is_a_miss_until_it_is_back(
    make: Make, server: ServerProcess, caplog: pytest.LogCaptureFixture
) -> None:
    pool, keys = mha_pool(), keys_of(3)
    backend = make(pool, retry_seconds=1)
    assert backend.batch_set_v1(keys, pages(0, 3)) == [True] * 3
    assert backend._client.get().flush(10).pending == 0
    server.stop(signal.SIGKILL)
    assert misses(backend, pool, keys)
    began = time.monotonic()
    for _ in range(10):
        assert misses(backend, pool, keys)
    assert time.monotonic() - began < 15, "nobody waits again and again, for two seconds"
    assert 1 <= len(warnings_in(caplog)) <= 2, "it was lost, and there is none"
    server.start()
    wait_until(lambda: backend.batch_exists(keys) == 3)
    assert backend.batch_get_v1(keys, pages(8, 3)) == [True] * 3
    assert same(bytes_of(pool, 8, 3), bytes_of(pool, 0, 3))


def test_a_server_that_is_silent_is_a_miss_after_the_timeout(
    make: Make, server: ServerProcess, caplog: pytest.LogCaptureFixture
) -> None:
    pool, keys = mha_pool(), keys_of(3)
    backend = make(pool, timeout_seconds=0.1, retry_seconds=0.1)
    backend.batch_set_v1(keys, pages(0, 3))
    process = server._process
    assert process is not None
    process.send_signal(signal.SIGSTOP)
    began = time.monotonic()
    try:
        assert backend.batch_exists(keys) == 0
        time.sleep(0.1)  # it is asked again
        assert backend.batch_get_v1(keys, pages(8, 3)) == [False] * 3
        time.sleep(0.1)
        assert backend.batch_set_v1(keys_of(3, "another"), pages(8, 3)) == [False] * 3
        assert warnings_in(caplog) == [WARNING + "the cache has not answered for 0.1 s"]
        time.sleep(0.1)
        backend.clear()
        assert caplog.messages[-1] == "the cache was not emptied: the cache has not answered for 0.1 s"
        assert time.monotonic() - began < 20
    finally:
        process.send_signal(signal.SIGCONT)
    with BlockingClient(server.url) as client:
        wait_until(lambda: not client.stats().requests)  # what was given up is not kept until it is swept
    saved = partial(backend.batch_set_v1, keys, pages(0, 3))  # what it was told last was to clear the cache
    wait_until(lambda: saved() == [True] * 3 and backend.batch_exists(keys) == 3)


TENANTS = '[server.tenants.ours]\ntokens = ["0123456789abcdef"]\nsalts = ["ours"]\n'


@contextmanager
def guarded(directory: Path) -> Iterator[ServerProcess]:
    directory.mkdir()
    server = ServerProcess(directory, TENANTS)
    server.start()
    try:
        yield server
    finally:
        server.stop()


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ({"token": "0123456789abcdef", "salt": "theirs"}, "the token is not for the salt 'theirs'"),
        ({"token": "fedcba9876543210", "salt": "ours"}, "does not know this token"),
    ],
)
def test_what_the_token_is_not_for_is_one_line_and_misses(
    make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture, extra: dict[str, str], said: str
) -> None:
    with guarded(tmp_path / "guarded") as server:
        pool, keys = mha_pool(), keys_of(3)
        backend = make(pool, url=server.url, **extra)
        assert backend.batch_exists(keys) == 0
        assert backend.batch_get_v1(keys, pages(8, 3)) == [False] * 3
        assert backend.batch_set_v1(keys, pages(0, 3)) == [False] * 3
        assert len(warnings_in(caplog)) == 1
        assert said in warnings_in(caplog)[0]
        backend.close()


def test_a_token_that_is_bound_to_a_salt_is_enough(make: Make, tmp_path: Path) -> None:
    with guarded(tmp_path / "guarded") as server:
        (tmp_path / "token").write_text("0123456789abcdef\n")
        pool, keys = mha_pool(), keys_of(5)
        backend = make(pool, url=server.url, salt="ours", token_file=str(tmp_path / "token"))
        assert backend.batch_set_v1(keys, pages(0, 5)) == [True] * 5
        assert backend.batch_exists(keys[2:]) == 3
        assert backend.batch_get_v1(keys[2:], pages(8, 3)) == [True] * 3
        assert same(bytes_of(pool, 8, 3), bytes_of(pool, 2, 3))
        backend.close()


@pytest.mark.parametrize(
    ("keys", "said"), [(["not a hash"] * 2, "hexadecimal"), (["00" * 32] * 2, "there twice"), (["00"] * 2, "8 to 64")]
)
def test_keys_that_are_no_page_hashes_are_one_line_and_misses(
    make: Make, caplog: pytest.LogCaptureFixture, keys: list[str], said: str
) -> None:
    backend = make(mha_pool())
    assert backend.batch_exists(keys) == 0
    assert backend.batch_set_v1(keys, pages(0, 2)) == [False] * 2
    assert len(warnings_in(caplog)) == 1
    assert said in warnings_in(caplog)[0]


def test_tensors_and_indices_that_do_not_fit_are_misses(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    pool, keys = mha_pool(), keys_of(2)
    backend = make(pool)
    assert backend.batch_set_v1(keys, pages(0, 2)) == [True] * 2
    assert backend.batch_get(keys, [torch.zeros(7)] * 2) == [None, None]
    assert backend.batch_get(keys, [pool.get_dummy_flat_data_page().float()] * 2) == [None, None]
    assert not backend.set(keys_of(1, "other")[0], torch.zeros(7))
    assert not backend.exists(keys_of(1, "other")[0])
    assert backend.batch_get_v1(keys, pages(0, 3)) == [False] * 2
    assert [("does not fit" in line, "host indices" in line) for line in warnings_in(caplog)] == [
        (True, False), (True, False), (True, False), (False, True),
    ]  # fmt: skip


def test_a_host_pool_without_flat_pages_is_one_line_and_misses(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    pool, keys = mha_pool(), keys_of(2)
    pool.layout = "page_unified"
    backend = make(pool)
    assert backend.batch_exists(keys) == 0
    assert backend.batch_set_v1(keys, pages(0, 2)) == [False] * 2
    assert len(warnings_in(caplog)) == 1
    assert "--hicache-mem-layout" in warnings_in(caplog)[0]


def test_a_model_with_other_pools_is_one_line_and_misses(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    pool, keys = mha_pool(), keys_of(2)
    backend = make(pool)
    backend.register_mem_host_pool_v2(pool, PoolName.KV)
    assert backend.batch_set_v1(keys, pages(0, 2)) == [True] * 2
    assert backend.batch_exists_v2(keys).kv_hit_pages == 2
    backend.register_mem_host_pool_v2(mha_pool(), PoolName.SWA)
    transfers = [PoolTransfer(PoolName.SWA, keys=keys[1:], hit_policy=PoolHitPolicy.TRAILING_PAGES)]
    assert backend.batch_exists_v2(keys, transfers).kv_hit_pages == 0
    assert backend.batch_get_v2(transfers) == {PoolName.SWA: [False]}
    assert backend.batch_set_v2(transfers) == {PoolName.SWA: [False]}
    assert misses(backend, pool, keys)
    assert len(warnings_in(caplog)) == 1
    assert "'swa'" in warnings_in(caplog)[0]


# The rest.


def test_clear_empties_the_server(make: Make) -> None:
    pool, keys = mha_pool(), keys_of(3)
    backend = make(pool)
    backend.batch_set_v1(keys, pages(0, 3))
    backend.clear()
    assert backend.batch_exists(keys) == 0


def test_a_page_that_is_being_stored_does_not_land_after_a_clear(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    pool, keys = mha_pool(), keys_of(3)
    backend = make(pool, timeout_seconds=0.5)
    reading, may_go, page_of = threading.Event(), threading.Event(), pool.get_data_page

    def held(*args: Any, **kwargs: Any) -> Any:
        reading.set()
        assert may_go.wait(60)
        return page_of(*args, **kwargs)

    pool.get_data_page = held
    storing = threading.Thread(target=backend.batch_set_v1, args=(keys, pages(0, 3)))
    storing.start()
    assert reading.wait(60)
    backend.clear()
    assert "the cache was not emptied: pages are still being stored" in caplog.messages[-1]
    may_go.set()
    storing.join()
    assert backend.batch_exists(keys) == 3
    backend.clear()
    assert backend.batch_exists(keys) == 0


def test_a_clear_that_is_refused_is_no_outage(make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with guarded(tmp_path / "guarded") as server:
        backend = make(mha_pool(), url=server.url, salt="ours", token="0123456789abcdef")
        backend.clear()
        assert "the cache was not emptied: the token is bound to salts" in caplog.messages[-1]
        assert not warnings_in(caplog)
        backend.close()


def test_a_page_for_which_the_server_is_too_small_is_one_line(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    tokens = 2**24 // (2 * LAYERS * HEADS * DIM * 2) + PAGE  # more than the 16 MiB of the server
    pool = mha_pool(page=tokens, tokens=tokens)
    backend = make(pool)
    for _ in range(3):
        assert backend.batch_set_v1(keys_of(1), torch.arange(tokens)) == [False]
    assert [message for message in caplog.messages if "finds no room" in message] == [caplog.messages[-1]]


def test_what_sglang_adds_to_the_extra_config_is_no_mistake(make: Make) -> None:
    assert make(mha_pool(), file_storage_path="/tmp").batch_exists(keys_of(1)) == 0


def test_stats_tell_what_was_moved_since_the_last_time(make: Make) -> None:
    pool, keys = mha_pool(), keys_of(3)
    backend = make(pool)
    backend.batch_set_v1(keys, pages(0, 3))
    backend.batch_get_v1(keys[:2], pages(8, 2))
    stats = backend.get_stats()
    assert (stats.backup_pgs, stats.prefetch_pgs) == ([3], [2])
    assert all(speed > 0 for speed in stats.backup_bandwidth + stats.prefetch_bandwidth)
    assert backend.get_stats().prefetch_pgs == []


def test_after_close_all_is_a_miss(make: Make) -> None:
    pool, keys = mha_pool(), keys_of(3)
    backend = make(pool)
    backend.batch_set_v1(keys, pages(0, 3))
    backend.close()
    backend.close()
    assert misses(backend, pool, keys)


# As SGLang's controller calls it, in batches of 128 pages.


@pytest.mark.parametrize("interface", ["v0", "v1"])
def test_sglangs_controller_backs_up_and_prefetches_through_it(make: Make, interface: str) -> None:
    pool, other, keys = mha_pool(page=1, tokens=320), mha_pool(page=1, tokens=320), keys_of(300)
    operation = StorageOperation(torch.arange(300), list(range(300)), hash_value=keys)
    writer = make(pool)
    controller_of(writer, pool, interface)._page_backup(operation)
    assert operation.completed_tokens == 300
    assert writer.batch_exists(keys) == 300

    backend = make(other)
    assert backend.batch_exists(keys) == 300
    prefetch = PrefetchOperation("request", list(range(300)))
    prefetch.hash_value, prefetch.host_indices = keys, torch.arange(300).flip(0)
    assert controller_of(backend, other, interface)._page_transfer(prefetch) == 300
    assert same(bytes_of(other, 0, 300)[::-1], bytes_of(pool, 0, 300))


def controller_of(backend: Any, pool: Any, interface: str) -> Any:
    """One that has what moves pages, and no device."""
    controller = object.__new__(HiCacheController)
    controller.storage_backend, controller.storage_host_pool = backend, pool
    controller.page_size, controller.prefetch_sync_queue = pool.page_size, queue.Queue()
    v1 = interface == "v1"
    controller.page_get_func = controller._page_get_zero_copy if v1 else controller._generic_page_get
    controller.page_set_func = controller._page_set_zero_copy if v1 else controller._generic_page_set
    return controller
