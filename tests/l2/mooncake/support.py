"""A master, and clients of Mooncake's own beside the backend."""

import json
import shutil
import socket
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Self

import pytest

BARE = Path(__file__).parent / "bare.py"
INSTALL = "pip install 'async-kv-cache[mooncake]' && apt-get install libibverbs1"
START_SECONDS = 100


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


class Master:
    """A `mooncake_master` on loopback, which can be killed and started again at the same address."""

    def __init__(self, *options: str):
        try:
            version("mooncake-transfer-engine-non-cuda")
        except PackageNotFoundError:
            pytest.fail(f"Mooncake is missing: {INSTALL}")
        program = Path(sys.executable).with_name("mooncake_master")
        self._program = str(program) if program.exists() else shutil.which("mooncake_master")
        self._options = options
        self.port, self.metrics_port = free_port(), free_port()
        self.address = f"127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def start(self) -> None:
        assert self._program is not None, INSTALL
        ports = ["--rpc_port", str(self.port), "--metrics_port", str(self.metrics_port)]
        options = [*ports, "--rpc_address=127.0.0.1", "--metrics_host=127.0.0.1", *self._options]
        self.process = subprocess.Popen([self._program, *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return
            except OSError:
                assert self.process.poll() is None, f"mooncake_master ended: {INSTALL}"
                assert time.monotonic() < deadline, "mooncake_master does not listen"
                time.sleep(0.02)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def url(self, namespace: str, **parameters: object) -> str:
        given = {"namespace": namespace, "metrics_port": self.metrics_port, **parameters}
        return f"mooncake://{self.address}?" + "&".join(f"{name}={value}" for name, value in given.items())


class Bare:
    """A client of Mooncake's own, in a process; with a segment, it is where objects lie."""

    def __init__(self, master: Master, segment_bytes: int = 0):
        command = [sys.executable, str(BARE), master.address, str(segment_bytes)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        answer = self._answer()
        assert answer == 0, f"{answer}: {INSTALL}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def call(self, *call: Any) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(call) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def put(self, name: str, value: bytes) -> None:
        assert self.call("put", name, value.hex()) == 0

    def get(self, name: str) -> bytes:
        return bytes.fromhex(self.call("get", name))

    def _answer(self) -> Any:
        assert self.process.stdout is not None and self.process.stderr is not None
        line = self.process.stdout.readline()
        assert line, self.process.stderr.read()
        return json.loads(line)

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()
