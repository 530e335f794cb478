"""What is answered over HTTP, and to whom."""

import ipaddress
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from async_cache.errors import AccessDeniedError
from async_cache.metrics import Watch, exposition
from async_cache.metrics.families import gauge
from async_cache.server.access import Tenant
from async_cache.server.http.explain import answer, prompt_of, question_of
from async_cache.server.http.health import problems
from async_cache.server.http.status import status
from async_cache.server.server import Server

_PAGE = Path(__file__).with_name("page.html").read_bytes()
_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; connect-src 'self';"
        " base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
_BEARER = "Bearer "


class Site:
    """Answers about one server. Where it has tenants, those that may use every salt are told what concerns all."""

    def __init__(self, server: Server, watch: Watch):
        self._server = server
        self._watch = watch
        self.app = Starlette(
            routes=[
                Route("/", self._answered(self._page, openly=True)),
                Route("/healthz", self._answered(self._healthz, openly=True)),
                Route("/readyz", self._answered(self._readyz, openly=True)),
                Route("/metrics", self._answered(self._metrics)),
                Route("/status", self._answered(self._status)),
                Route("/explain", self._explain, methods=["GET", "POST"]),
            ]
        )
        self.app.router.redirect_slashes = False  # a redirect would go to wherever the request says that it came to

    def _answered(
        self, answer: Callable[[Tenant], Awaitable[Response]], *, openly: bool = False
    ) -> Callable[[Request], Awaitable[Response]]:
        """A route: who may not ask is told so."""

        async def respond(request: Request) -> Response:
            try:
                tenant = Tenant() if openly else self._admit(request)
                if not openly:
                    tenant.check_trusted("watching the server")
                response = await answer(tenant)
            except AccessDeniedError as error:
                asked = "authorization" in request.headers
                response = _json({"error": str(error)}, 403 if asked else 401)
                if not asked:
                    response.headers["WWW-Authenticate"] = "Bearer"
            response.headers.update(_HEADERS)
            return response

        return respond

    def _admit(self, request: Request) -> Tenant:
        """Whose token this is. Raises AccessDeniedError.

        Without tenants, whoever is on this machine may ask; but no page of another site, whose name was made to lead
        here for a browser.
        """
        header = request.headers.get("authorization", "")
        token = header.removeprefix(_BEARER) if header.startswith(_BEARER) else None
        tenant = self._server.access.admit(token, over_unix=False)
        if token is None and not _is_plain(request.url.hostname or ""):
            raise AccessDeniedError("without tenants, this is asked for by localhost or an address, and no other name")
        return tenant

    async def _page(self, _: Tenant) -> Response:
        return Response(_PAGE, media_type="text/html")

    async def _healthz(self, _: Tenant) -> Response:
        """Names what is wrong; the details, which name backends and requests, are for `/status`."""
        wrong = problems(self._watch)
        told = {"status": "unhealthy" if wrong else "ok", "problems": sorted({problem.what for problem in wrong})}
        return _json(told, 503 if wrong else 200)

    async def _readyz(self, _: Tenant) -> Response:
        ready = self._server.is_listening
        return _json({"status": "ready" if ready else "not ready"}, 200 if ready else 503)

    async def _metrics(self, _: Tenant) -> Response:
        wrong = {problem.what for problem in problems(self._watch)}
        found = {(what,): float(what in wrong) for what in ("task", "sweeper", "quarantine", "breaker", "lag")}
        more = [
            gauge("problem", "1 for what makes /healthz unhealthy", found, ("what",)),
            gauge("connections", "Clients that are connected", {(): self._server.connections}),
        ]
        return Response(await exposition(self._watch, more), headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def _status(self, _: Tenant) -> Response:
        return _json(status(self._watch, self._server.connections))

    async def _explain(self, request: Request) -> Response:
        """Why a prompt is not cached, to whoever may use its salt."""
        try:
            tenant = self._admit(request)
            if request.method == "POST" and not request.headers.get("content-type", "").startswith("application/json"):
                raise ValueError("what is posted is application/json")  # which no form of another site can send
            core = self._watch.core
            prompt = prompt_of(await question_of(request), core, tenant)
            response = _json(answer(await core.explainer.explain(prompt)))
        except AccessDeniedError as error:
            response = _json({"error": str(error)}, 403 if "authorization" in request.headers else 401)
        except (ValueError, TypeError) as error:
            response = _json({"error": str(error)}, 400)
        response.headers.update(_HEADERS)
        return response


def _json(value: Any, code: int = 200) -> Response:
    return Response(msgspec.json.encode(value) + b"\n", code, media_type="application/json")


def _is_plain(host: str) -> bool:
    """Whether it is an address or `localhost`: no name that somebody else's DNS can answer for."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return host == "localhost"
    return True
