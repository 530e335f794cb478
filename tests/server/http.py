"""What the tests of HTTP share: a server that answers it, and how it is asked."""

import json
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from .programs import ServerProcess, server

SECONDS = 100
TOKEN, BOUND_TOKEN = "token-of-operations", "token-of-acme-number-one"
TENANTS = f"""
[server.tenants.operations]
tokens = ["{TOKEN}"]
[server.tenants.acme]
tokens = ["{BOUND_TOKEN}"]
salts = ["acme"]
"""


class Web:
    """A server, as a browser or a monitor sees it."""

    def __init__(self, url: str):
        self.url = url

    def get(self, path: str, token: str | None = None, host: str | None = None) -> tuple[int, dict[str, str], bytes]:
        """The code, the headers in lower case, and the body."""
        headers = {"Authorization": f"Bearer {token}"} if token is not None else {}
        headers |= {"Host": host} if host is not None else {}
        try:
            with urlopen(Request(self.url + path, headers=headers), timeout=SECONDS) as response:
                return response.status, {k.lower(): v for k, v in response.headers.items()}, response.read()
        except HTTPError as error:
            with error:
                return error.code, {k.lower(): v for k, v in error.headers.items()}, error.read()

    def post(self, path: str, value: Any, token: str | None = None) -> tuple[int, Any]:
        """The code, and the answer, of what is asked in JSON."""
        headers = {"Content-Type": "application/json"}
        headers |= {"Authorization": f"Bearer {token}"} if token is not None else {}
        try:
            request = Request(self.url + path, json.dumps(value).encode(), headers)
            with urlopen(request, timeout=SECONDS) as response:
                return response.status, json.load(response)
        except HTTPError as error:
            with error:
                return error.code, json.load(error)

    def json(self, path: str, token: str | None = None) -> tuple[int, Any]:
        code, _, body = self.get(path, token)
        return code, json.loads(body)


class ServedWeb(Web):
    """That of a server in a process of its own."""

    def __init__(self, served: ServerProcess):
        super().__init__(http_url(served))
        self.served = served


@contextmanager
def web(directory: Path, *listen: str, http: str = "127.0.0.1:0", **options: Any) -> Iterator[ServedWeb]:
    """A server that answers HTTP at a port of its own."""
    with server(directory, *listen, server_http=http, **options) as served:
        yield ServedWeb(served)


def http_url(served: ServerProcess) -> str:
    """Where a server says that it answers HTTP."""
    deadline = time.monotonic() + SECONDS
    while not (match := re.search(r"HTTP at (http://[\w.:\[\]]+)", served.log)):  # a thread writes the log
        assert time.monotonic() < deadline, served.log
        time.sleep(0.01)
    return match[1]
