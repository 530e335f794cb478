"""LMCache 0.5.6 in vLLM: its multiprocess server, its own connector, and storage that can be slow.

What it has is switched on: shared memory, the look-up when a request arrives, and as many loads at a time as there are
slow requests.
"""

import asyncio
import json
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import zmq
from lmcache.v1.distributed.l2_adapters.config import get_l2_adapter_config_class
from lmcache.v1.distributed.l2_adapters.factory import create_l2_adapter_from_registry
from lmcache.v1.distributed.l2_adapters.fault_inject_l2_adapter import FaultInjectL2Adapter
from lmcache.v1.multiprocess.transport.zmq_impl.client import ZmqMultiprocessClient
from lmcache.v1.multiprocess.transport.zmq_impl.mq import MessageQueueClient


class SlowAdapter(FaultInjectL2Adapter):
    """Its native adapter for a directory; loads take that many seconds more which the file `latency` holds."""

    def __init__(self, parameters, l1_memory_desc=None):
        native = {"type": "fs_native", "base_path": parameters["base_path"]}
        config = get_l2_adapter_config_class("fs_native").from_dict(native)
        super().__init__(create_l2_adapter_from_registry(config, l1_memory_desc), 0.0, 0, ())
        self._latency = Path(parameters["latency"])
        self._tasks, self._number, self._mutex = {}, 0, threading.Lock()

    def submit_load_task(self, keys, objects):
        with self._mutex:
            self._number += 1
            number, self._tasks[self._number] = self._number, None

        def submit():
            with self._mutex:  # the result is not asked for before its number is known
                self._tasks[number] = self._inner.submit_load_task(keys, objects)

        if seconds := float(self._latency.read_text()):
            threading.Timer(seconds, submit).start()
        else:
            submit()
        return number

    def query_load_result(self, task_id):
        with self._mutex:
            task = self._tasks[task_id]
            result = None if task is None else self._inner.query_load_result(task)
            if result is not None:
                del self._tasks[task_id]
        return result


class Peer:
    """Its server, and what is said to it."""

    def __init__(self, directory):
        self._storage, self._latency = directory / "lmcache", directory / "latency"
        self._storage.mkdir()
        self.set_latency(0.0)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = probe.getsockname()[1]
        self._client = None

    def set_latency(self, seconds):
        self._latency.write_text(str(seconds))

    def transfer(self):
        """vLLM's `kv_transfer_config`."""
        return {
            "kv_connector": "LMCacheMPConnector",
            "kv_role": "kv_both",
            "kv_connector_module_path": "lmcache.integration.vllm.lmcache_mp_connector",
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": {
                "lmcache.mp.host": "tcp://127.0.0.1",
                "lmcache.mp.port": self._port,
                "lmcache.mp.eager_prefetch": True,
            },
        }

    @contextmanager
    def running(self, chunk_tokens, l1_gib, loads):
        adapter = {
            "type": "plugin",
            "module_path": "lmcache_peer",
            "class_name": "SlowAdapter",
            "adapter_params": {"base_path": str(self._storage), "latency": str(self._latency)},
        }
        options = {
            "host": "127.0.0.1",
            "port": self._port,
            "chunk-size": chunk_tokens,
            "l1-size-gb": l1_gib,
            "eviction-policy": "LRU",
            "supported-transfer-mode": "engine_driven",
            "shm-name": f"lmcache-e2e-{self._port}",  # without it, all bytes go through its socket
            "l2-prefetch-max-in-flight": loads,
            "l2-adapter": json.dumps(adapter),
        }
        flags = [f"--{name}={value}" for name, value in options.items()]
        module = ["-m", "lmcache.v1.multiprocess.server", "--no-l1-use-lazy", "--disable-observability"]
        process = subprocess.Popen([sys.executable, *module, *flags], stdout=subprocess.DEVNULL)
        try:
            self._wait_for(process)
            self._client = ZmqMultiprocessClient(MessageQueueClient(f"tcp://127.0.0.1:{self._port}", zmq.Context()))
            yield
        finally:
            if self._client is not None:
                self._client.close()
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _wait_for(self, process):
        until = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", self._port), 0.2).close()
                return
            except OSError as error:
                if time.monotonic() > until or process.poll() is not None:
                    raise RuntimeError("LMCache's server does not come up") from error
                time.sleep(0.1)

    async def flush(self):
        """It does not say when its storage has everything: until nothing is added any more."""
        before = None
        while (files := sum(1 for _ in self._storage.rglob("*"))) != before:
            before = files
            await asyncio.sleep(0.5)

    async def clear(self, tier):
        """Its memory, and what is not in use there; storage has no such call."""
        if tier == "l1":
            await asyncio.to_thread(self._client.clear(False).result, 60)
