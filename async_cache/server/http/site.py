"""What is answered over HTTP, and to whom."""

import asyncio
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

from async_cache.errors import AccessDeniedError, BackendError, CacheClosedError, LimitError
from async_cache.metrics import Watch, exposition
from async_cache.metrics.families import counter, gauge
from async_cache.prompt.arguments import selection_of
from async_cache.server.access import Tenant, pass_of
from async_cache.server.deletions import told
from async_cache.server.http.explain import ModelQuestion, Question, prompt_of, question_of
from async_cache.server.http.health import problems
from async_cache.server.http.keeping import Keeping, KeepQuestion
from async_cache.server.http.named import named
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
_DELETE_SECONDS = 20.0
_EXPLAIN_SECONDS = 30.0  # for a question to come and to be answered
_BEARER = "Bearer "


class Site:
    """Answers about one server. Where it has tenants, those that may use every salt are told what concerns all."""

    def __init__(self, server: Server, watch: Watch):
        self._server = server
        self._watch = watch
        self._keeping = Keeping(watch.core)
        self.app = Starlette(
            routes=[
                Route("/", self._answered(self._page, openly=True)),
                Route("/healthz", self._answered(self._healthz, openly=True)),
                Route("/readyz", self._answered(self._readyz, openly=True)),
                Route("/metrics", self._answered(self._metrics)),
                Route("/status", self._answered(self._status)),
                Route("/explain", self._asked(self._explain), methods=["GET", "POST"]),
                Route("/retain", self._asked(self._retain), methods=["POST"]),
                Route("/retained", self._asked(self._retained)),
                Route("/warm", self._asked(self._warm), methods=["POST"]),
                Route("/delete_model", self._asked(self._delete_model), methods=["POST"]),
                Route("/warm/{name}", self._asked(self._warming)),
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
                if not openly and not tenant.watches:
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
        tenant = self._server.access.admit(pass_of(token, over_unix=False))
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
        if (probe := self._server.probe) is not None:
            more += [
                gauge(
                    "loop_hold_seconds", "The longest that the loop computed, of late", {(): probe.recent.busy_seconds}
                ),
                counter("loop_holds", "How often the loop computed for more than 10 ms", {(): probe.held}),
            ]
        if (recorder := self._server.recording.recorder) is not None:
            more += [
                counter(
                    "recorded", "Requests and hints that were recorded to the present file", {(): recorder.recorded}
                ),
                counter("recording_dropped", "Those that the disk did not take in time", {(): recorder.dropped}),
                gauge("recording_bytes", "What the files of the recording take", {(): recorder.used_bytes}),
            ]
        return Response(await exposition(self._watch, more), headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def _status(self, _: Tenant) -> Response:
        return _json(status(self._watch, self._server))

    # What any tenant may ask, of its own salts.

    def _asked(
        self, answer: Callable[[Request, Tenant], Awaitable[Response]]
    ) -> Callable[[Request], Awaitable[Response]]:
        """A route: what cannot be answered is told so."""

        async def respond(request: Request) -> Response:
            try:
                tenant = self._admit(request)
                is_json = request.headers.get("content-type", "").startswith("application/json")
                if request.method == "POST" and not is_json:
                    raise ValueError("what is posted is application/json")  # which no form of another site can send
                async with asyncio.timeout(_EXPLAIN_SECONDS):
                    response = await answer(request, tenant)
            except AccessDeniedError as error:
                response = _json({"error": str(error)}, 403 if "authorization" in request.headers else 401)
            except (ValueError, TypeError) as error:
                response = _json({"error": str(error)}, 400)
            except LimitError as error:
                response = _json({"error": str(error)}, 429)
            except TimeoutError:
                response = _json({"error": f"this takes more than {_EXPLAIN_SECONDS:g} s: ask for a part of it"}, 503)
            except CacheClosedError as error:
                response = _json({"error": str(error)}, 503)
            response.headers.update(_HEADERS)
            return response

        return respond

    async def _explain(self, request: Request, tenant: Tenant) -> Response:
        """Why a prompt is not cached."""
        tenant.check_role("read")
        core = self._watch.core
        prompt = prompt_of(await question_of(request, Question), core, tenant)
        return _json(named(await core.explainer.explain(prompt)))

    async def _retain(self, request: Request, tenant: Tenant) -> Response:
        tenant.check_role("read")
        question = await question_of(request, KeepQuestion)
        return _json(await self._keeping.retain(prompt_of(question, self._watch.core, tenant), question))

    async def _retained(self, request: Request, tenant: Tenant) -> Response:
        return _json(await self._keeping.retained(tenant))

    async def _warm(self, request: Request, tenant: Tenant) -> Response:
        """Begin to load a prompt: that takes its time, and `/warm/NAME` tells how far it is."""
        tenant.check_role("read")
        prompt = prompt_of(await question_of(request, Question), self._watch.core, tenant)
        name = self._keeping.warm(prompt, tenant)
        return _json({"name": name} | (self._keeping.progress(name, tenant) or {}), 202, Location=f"/warm/{name}")

    async def _delete_model(self, request: Request, tenant: Tenant) -> Response:
        """Delete a model, or a part of it: 202 where that takes longer than one waits for an answer, and goes on."""
        tenant.check_role("store")
        asked = await question_of(request, ModelQuestion)
        selection_of(asked.model, asked.revision, asked.adapter, asked.salt)
        deletion = self._server.deletions.begin(tenant, asked.model, asked.revision, asked.adapter, asked.salt)
        await asyncio.wait((deletion,), timeout=_DELETE_SECONDS)
        if not deletion.done():
            return _json({"state": "deleting"}, 202)
        try:
            return _json({"state": "deleted"} | named(told(tenant, await deletion)))
        except BackendError as error:
            return _json({"error": str(error) if tenant.trusted else "a backend could not delete all of it"}, 502)

    async def _warming(self, request: Request, tenant: Tenant) -> Response:
        told = self._keeping.progress(request.path_params["name"], tenant)
        return _json(
            told if told is not None else {"error": "nothing of this name is being loaded"}, 200 if told else 404
        )


def _json(value: Any, code: int = 200, **headers: str) -> Response:
    return Response(msgspec.json.encode(value) + b"\n", code, headers, media_type="application/json")


def _is_plain(host: str) -> bool:
    """Whether it is an address or `localhost`: no name that somebody else's DNS can answer for."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return host == "localhost"
    return True
