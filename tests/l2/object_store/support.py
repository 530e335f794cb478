"""A server of S3 in a process of its own, and backends on it."""

import json
import subprocess
import sys
import urllib.request
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, Self

import pytest

from async_cache.l2.object_store.backend import ObjectStoreBackend
from async_cache.l2.urls.registry import from_url

PROGRAM = Path(__file__).with_name("faulty_s3.py")
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "AKIDEXAMPLE", "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI-not-to-be-shown"}
BUCKET = "bucket"


class Server:
    """moto, with the faults that `faulty_s3.py` describes. Killed, it has lost all that it had."""

    def __init__(self) -> None:
        self.port = 0
        self.start()

    def start(self) -> None:
        """Start it, on the port that it had before."""
        command = (sys.executable, str(PROGRAM), str(self.port))
        with TemporaryFile("w+") as errors:
            self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
            assert self._process.stdout is not None
            line = self._process.stdout.readline()
            if not line:
                errors.seek(0)
                pytest.fail(f"there is no server of S3: pip install 'moto[server]'\n{errors.read()[-300:]}")
        self.port = int(line)
        self.request("PUT", f"/{BUCKET}")

    def kill(self) -> None:
        """Kill it, and wait until it is gone."""
        self._process.kill()
        self._process.communicate()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def request(self, method: str, path: str, data: bytes | None = None) -> bytes:
        """What the server answers to a request without credentials, which it does not ask for."""
        request = urllib.request.Request(f"{self.endpoint}{path}", data, method=method)
        with urllib.request.urlopen(request, timeout=100) as answer:
            body: bytes = answer.read()
        return body

    def faults(self, *faults: dict[str, Any]) -> None:
        """Set the faults from now on, and forget which requests it has seen."""
        self.request("POST", "/__faults__", json.dumps(faults).encode())

    def seen(self) -> list[str]:
        """The requests since then."""
        requests: list[str] = json.loads(self.request("GET", "/__faults__"))
        return requests

    def url(self, prefix: str = "", **parameters: Any) -> str:
        rest = "".join(f"&{name}={value}" for name, value in parameters.items())
        return f"s3://{BUCKET}/{prefix}?endpoint={self.endpoint}&region=us-east-1&allow_http=true{rest}"

    def backend(self, prefix: str = "", **parameters: Any) -> ObjectStoreBackend:
        """A backend that is not opened yet."""
        backend = from_url(self.url(prefix, **parameters))
        assert isinstance(backend, ObjectStoreBackend)
        return backend
