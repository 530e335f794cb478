"""An S3 server (moto's) that fails on demand: `python faulty_s3.py port` serves until it is killed; 0 is any port.

Requests to /__faults__ are for itself: a POST sets its faults, a list of objects of JSON with these members, and
forgets which requests it has seen; a GET returns those, as `METHOD path?query`, in order.

    request   a regular expression that must match the whole of `METHOD path?query`
    skip      how many such requests go through first; 0 if it is left out
    times     how many fail then; all if it is left out
    status, code      answer with this status, and this code in S3's XML
    delay             wait for so many seconds first
    cut               send so many bytes of the body, and end the connection
    trim              send only so many bytes of the body, as if that were all
    reset             reset the connection, before or (`after`) when the request was carried out
    late              carry the request out at once, and send its answer so many seconds later
"""

import json
import re
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

CONTROL = "/__faults__"
SIGNED = "AWS4-HMAC-SHA256 Credential=x/20000101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=x"
Headers = list[tuple[str, str]]


class QuietHandler(WSGIRequestHandler):
    def log(self, *_: Any) -> None:
        pass

    def connection_dropped(self, *_: Any) -> None:
        self.close_connection = True


class Faulty:
    """moto, and the faults in front of it."""

    def __init__(self, inner: WSGIApplication):
        self._inner = inner
        self._lock = threading.Lock()
        self._faults: list[dict[str, Any]] = []
        self._seen: list[str] = []

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        if environ["PATH_INFO"] == CONTROL:
            return self._control(environ, start_response)
        if not environ.get("HTTP_AUTHORIZATION", "").startswith("AWS4"):
            environ["HTTP_AUTHORIZATION"] = (
                SIGNED  # Google's client has a token, or nothing, of which moto knows nothing
            )
        query = f"?{environ['QUERY_STRING']}" if environ["QUERY_STRING"] else ""
        fault = self._next_fault(f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']}{query}")
        time.sleep(fault.get("delay", 0))
        if fault.get("reset") == "before":
            _reset(environ)
        if "status" in fault:
            _read(environ)
            body = f"<Error><Code>{fault.get('code', 'Fault')}</Code><Message>on demand</Message></Error>".encode()
            start_response(f"{fault['status']} Fault", [("Content-Length", str(len(body)))])
            return [body]
        if fault.keys() & {"cut", "trim", "reset", "late"}:
            return self._spoil(fault, environ, start_response)
        return self._inner(environ, start_response)

    def _control(self, environ: WSGIEnvironment, start_response: StartResponse) -> list[bytes]:
        with self._lock:
            answer = json.dumps(self._seen).encode()
            if environ["REQUEST_METHOD"] == "POST":
                self._faults, self._seen = json.loads(_read(environ)), []
        start_response("200 OK", [("Content-Length", str(len(answer)))])
        return [answer]

    def _next_fault(self, request: str) -> dict[str, Any]:
        with self._lock:
            self._seen.append(request)
            for fault in self._faults:
                if re.fullmatch(fault["request"], request):
                    if fault.get("skip", 0) > 0:
                        fault["skip"] -= 1
                    elif fault.get("times", 1) > 0:
                        fault["times"] = fault.get("times", sys.maxsize) - 1
                        return fault
        return {}

    def _spoil(self, fault: dict[str, Any], environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        answers: list[tuple[str, Headers]] = []

        def keep(status: str, headers: Headers, *_: Any) -> Callable[[bytes], object]:
            answers.append((status, headers))
            return lambda _: None

        body = b"".join(self._inner(environ, keep))  # type: ignore[arg-type]
        time.sleep(fault.get("late", 0))
        if "reset" in fault:
            _reset(environ)
        status, headers = answers[-1]
        if "trim" in fault:
            body = body[: fault["trim"]]
            headers = [(name, value) for name, value in headers if name.lower() != "content-length"]
            headers.append(("Content-Length", str(len(body))))
        start_response(status, headers)
        return _cut(body, fault["cut"], environ) if "cut" in fault else [body]


def _cut(body: bytes, count: int, environ: WSGIEnvironment) -> Iterator[bytes]:
    yield body[:count]
    environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
    yield body[count:]


def _reset(environ: WSGIEnvironment) -> None:
    environ["werkzeug.socket"].setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    raise ConnectionAbortedError


def _read(environ: WSGIEnvironment) -> bytes:
    body: bytes = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
    return body


def main() -> None:
    app = Faulty(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", int(sys.argv[1]), app, threaded=True, request_handler=QuietHandler)
    sys.stdout.write(f"{server.server_port}\n")
    sys.stdout.flush()
    server.serve_forever()


if __name__ == "__main__":
    main()
