"""What a server says over HTTP, for the commands that ask it there."""

from pathlib import Path
from typing import Annotated
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import msgspec
import typer

from async_cache.cli.terminal import read_token
from async_cache.config import ServerConfig, http_address, prefixed
from async_cache.errors import AccessDeniedError, ConnectionLostError, ProtocolError
from async_cache.server.http.status import Status

_SECONDS = 5.0

Http = Annotated[
    str,
    typer.Option(
        "--http",
        metavar="HOST:PORT",
        help="Where the server answers HTTP; by default, as its settings in the environment say.",
        show_default=False,
    ),
]


class StatusPage:
    """The status of a server, as often as one asks."""

    def __init__(self, http: str, token_file: Path | None):
        where = http or ServerConfig.load().http
        with prefixed("--http" if http else "http"):
            address = http_address(where)
        self.url = str(address).replace("tcp://", "http://", 1) + "/status"
        token = read_token(token_file)
        self._headers = {"Authorization": f"Bearer {token}"} if token is not None else {}

    def raw(self) -> bytes:
        """The status as JSON. Raises AccessDeniedError, ConnectionLostError or ProtocolError."""
        try:
            with urlopen(Request(self.url, headers=self._headers), timeout=_SECONDS) as response:
                body: bytes = response.read()
                return body
        except HTTPError as error:
            with error:
                if error.code in (401, 403):
                    raise AccessDeniedError(msgspec.json.decode(error.read())["error"]) from error
                raise ProtocolError(f"{self.url} answers {error.code}") from error
        except (URLError, OSError) as error:
            why = error.reason if isinstance(error, URLError) else error
            said = (why.strerror if isinstance(why, OSError) else None) or why
            where = "`http` in the settings of a server says where it answers, --http where to ask"
            raise ConnectionLostError(f"nobody answers at {self.url}: {said}; {where}") from error

    def read(self) -> Status:
        """The status. Raises as `raw`, and ProtocolError where something else answers there."""
        try:
            return msgspec.json.decode(self.raw(), type=Status)
        except msgspec.DecodeError as error:
            raise ProtocolError(f"{self.url} is not that of a server of this version: {error}") from error
