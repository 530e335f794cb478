"""The layouts of one link: prompts name theirs by an index, under which the server gets it once."""

from async_cache.client.calls import Line, Registration
from async_cache.errors import LimitError
from async_cache.prompt.layout import ModelLayout, Prompt
from async_cache.protocol.messages import (
    MAX_CHUNKS,
    MAX_TOKENS,
    NEWER_PROMPTS,
    Layout,
    RegisterLayout,
    WirePrompt,
    encode,
)
from async_cache.protocol.prompts import describe, layout_of, pack


class Layouts:
    """The layouts that a client has registered over a link, and those that the server has described to it."""

    def __init__(self, line: Line) -> None:
        self._line = line
        self._registered: dict[ModelLayout, Registration] = {}
        self._by_index: list[Registration] = []
        self._described: dict[bytes, ModelLayout] = {}

    def pack(self, prompt: Prompt, *, trusted: bool) -> WirePrompt:
        """A prompt to send, behind its layout. Raises what the server refuses the layout with, and LimitError."""
        registration = self._registered.get(prompt.layout) or self._register(prompt.layout)
        if registration.refusal is not None:
            raise registration.refusal.with_traceback(None)
        if len(prompt) > MAX_CHUNKS:
            raise LimitError(f"a prompt has at most {MAX_CHUNKS} chunks, not {len(prompt)}")
        tokens = prompt.tokens + prompt.base_tokens
        if not trusted and tokens > MAX_TOKENS:
            raise LimitError(f"a prompt that the server hashes has at most {MAX_TOKENS} tokens, not {tokens}")
        wire = pack(prompt, registration.index, trusted=trusted)
        if isinstance(wire, NEWER_PROMPTS):
            self._line.check_knows(type(wire))
        return wire

    def _register(self, layout: ModelLayout) -> Registration:
        registration = self._registered[layout] = Registration(len(self._by_index), layout)
        self._by_index.append(registration)
        message = RegisterLayout(self._line.next_number(), registration.index, describe(layout))
        self._line.begin(message, registration)
        return registration

    def find(self, layout: int | Layout) -> ModelLayout:
        """The layout that the server names: one of this link's, or where others have prefetched, a description."""
        if isinstance(layout, int):
            return self._by_index[layout].layout
        key = encode(layout)
        if key not in self._described:
            self._described[key] = layout_of(layout)
        return self._described[key]
