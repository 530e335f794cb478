"""Why a prompt is not cached, over HTTP: the question, as parameters or JSON."""

from typing import Any, TypeVar

import msgspec
from msgspec import Struct
from starlette.requests import Request

from async_cache.core import Core
from async_cache.prompt.layout import ModelLayout, Prompt
from async_cache.prompt.objects import ObjectGroup
from async_cache.server.access import Tenant

MAX_BODY_BYTES = 2**20


class Group(Struct, forbid_unknown_fields=True):
    """As `ObjectGroup`."""

    shape: tuple[int, ...]
    dtype: str
    window_chunks: int | None = None
    ranks: tuple[int, ...] | None = None


class Layout(Struct, forbid_unknown_fields=True):
    """As `ModelLayout`, and as `async-cache list --json` shows it."""

    model: str
    groups: list[Group]
    chunk_tokens: int = 256
    world_size: int = 1
    readers_per_rank: int = 1
    revision: str = ""

    def made(self) -> ModelLayout:
        """The layout. Raises ValueError or TypeError if it is impossible."""
        groups = [ObjectGroup(it.shape, it.dtype, window_chunks=it.window_chunks, ranks=it.ranks) for it in self.groups]
        numbers = {name: getattr(self, name) for name in ("chunk_tokens", "world_size", "readers_per_rank")}
        return ModelLayout(self.model, tuple(groups), revision=self.revision, **numbers)


class Question(Struct, forbid_unknown_fields=True):
    """A prompt: its tokens, and a layout, or the model of prompts that were stored or loaded of late."""

    tokens: list[int]
    model: str = ""
    salt: str = ""
    adapter: str = ""
    layout: Layout | None = None


class ModelQuestion(Struct, forbid_unknown_fields=True):
    """A model, or of it one revision, adapter or salt."""

    model: str
    revision: str | None = None
    adapter: str | None = None
    salt: str | None = None


Q = TypeVar("Q", bound=Struct)


async def question_of(request: Request, kind: type[Q]) -> Q:
    """What is asked, by GET with parameters or by POST with JSON. Raises ValueError."""
    if request.method != "POST":
        told: dict[str, Any] = dict(request.query_params)
        told["tokens"] = told.get("tokens", "").replace(",", " ").split()
        return msgspec.convert(told, kind, strict=False)
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MAX_BODY_BYTES:
            raise ValueError(f"a question has up to {MAX_BODY_BYTES} bytes")
    return msgspec.json.decode(body, type=kind)


def prompt_of(question: Question, core: Core, tenant: Tenant) -> Prompt:
    """The prompt that is asked about. Raises AccessDeniedError for another's salt, ValueError for what cannot be."""
    tenant.check_salt(question.salt)
    layout = question.layout.made() if question.layout is not None else _known(question, core)
    return layout.prompt(question.tokens, salt=question.salt, adapter=question.adapter)


def _known(question: Question, core: Core) -> ModelLayout:
    for root in core.roots:
        if root.salt == question.salt and question.model in ("", root.layout.model):
            return root.layout
    raise ValueError(f"no prompt of model {question.model!r} and this salt was stored of late: give its layout")
