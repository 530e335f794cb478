"""The suite against Azurite, the emulator of Azure Blob Storage by its makers, in a process of its own."""

import base64
import hashlib
import hmac
import itertools
import os
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from email.utils import formatdate
from pathlib import Path

import pytest

from async_cache.l2.backend import Backend
from async_cache.l2.object_store.backend import ObjectStoreBackend
from async_cache.l2.urls.registry import from_url

from .test_conformance import Suite, name

INSTALL = "npm install --prefix .azurite azurite@3.37.0"
PROGRAM = Path(__file__).parents[3] / ".azurite/node_modules/.bin/azurite-blob"
START_SECONDS = 100
ACCOUNT, CONTAINER = "devstoreaccount1", "container"
KEY = base64.b64encode(bytes(range(64))).decode()

numbers = itertools.count()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A running emulator with an account and a container."""
    program = os.environ.get("AZURITE") or (str(PROGRAM) if PROGRAM.exists() else shutil.which("azurite-blob"))
    if program is None:
        pytest.fail(f"these tests need the emulator of Azure: {INSTALL}")
    port = free_port()
    command = [program, "--blobPort", str(port), "--inMemoryPersistence", "--silent", "--skipApiVersionCheck"]
    environment = {**os.environ, "AZURITE_ACCOUNTS": f"{ACCOUNT}:{KEY}"}
    folder = tmp_path_factory.mktemp("azurite")
    with subprocess.Popen(command, env=environment, cwd=folder, stdout=subprocess.DEVNULL) as process:
        try:
            deadline = time.monotonic() + START_SECONDS
            while not listens(port):
                assert process.poll() is None and time.monotonic() < deadline, INSTALL
                time.sleep(0.05)
            url = f"http://127.0.0.1:{port}/{ACCOUNT}"
            make_container(url)
            yield url
        finally:
            process.kill()


def make_container(endpoint: str) -> None:
    """What no client of objects does: signed with the account's key."""
    date, version = formatdate(usegmt=True), "2021-12-02"
    to_sign = (
        f"PUT\n\n\n\n\n\n\n\n\n\n\n\nx-ms-date:{date}\nx-ms-version:{version}\n"
        f"/{ACCOUNT}/{ACCOUNT}/{CONTAINER}\nrestype:container"
    )
    signature = base64.b64encode(hmac.digest(base64.b64decode(KEY), to_sign.encode(), hashlib.sha256)).decode()
    request = urllib.request.Request(
        f"{endpoint}/{CONTAINER}?restype=container",
        b"",
        {"x-ms-date": date, "x-ms-version": version, "Authorization": f"SharedKey {ACCOUNT}:{signature}"},
        method="PUT",
    )
    request.add_header("Content-Type", "")
    urllib.request.urlopen(request, timeout=START_SECONDS).close()


@pytest.fixture
def account(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The endpoint, with the key where its clients look for it."""
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", KEY)
    return endpoint


def make(endpoint: str, prefix: str) -> ObjectStoreBackend:
    parameters = f"account={ACCOUNT}&endpoint={endpoint}&allow_http=true&lookup_timeout=20&part=5MiB"
    backend = from_url(f"az://{CONTAINER}/{prefix}?{parameters}")
    assert isinstance(backend, ObjectStoreBackend)
    return backend


class TestAzure(Suite):
    @pytest.fixture(autouse=True)
    def its_account(self, account: str) -> None:
        self.endpoint = account

    async def make(self, tmp_path: Path) -> Backend:
        prefix = f"suite-{next(numbers)}"
        backend = make(self.endpoint, prefix)
        self.client = backend._connect(20)
        self.path = lambda key: f"{prefix}/{name(key)}"
        return backend
