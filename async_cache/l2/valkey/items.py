"""One object of a call: under which name it is asked for, and what became of it."""

from collections.abc import Callable, Sequence

from msgspec import Struct

from async_cache.errors import BackendError
from async_cache.l2.backend import LoadOutcome
from async_cache.l2.valkey.node import Node
from async_cache.l2.valkey.replies import Redirect, number_of, parse_redirect
from async_cache.prompt.keys import ObjectKey

_NO_BUFFER = memoryview(b"")


class Item(Struct, eq=False):
    """An object, and what a server said of it."""

    key: ObjectKey
    name: bytes
    buffer: memoryview = _NO_BUFFER
    told: Callable[[], object] | None = None
    """Whom to tell that it is loaded, when it is."""
    may_be_shorter: bool = False
    """Whether the object may be shorter than its buffer, which is cut to its size then."""
    lines: Sequence[bytes] = ()
    """The replies about it that are of one line."""
    outcome: LoadOutcome | None = None
    stored: bool = False
    redirect: Redirect | None = None
    error: BackendError | None = None

    def fail(self, line: bytes) -> None:
        """Note an error that the server said, such as `-MOVED 3999 127.0.0.1:6381`."""
        self.redirect = parse_redirect(line)
        self.error = BackendError(line[1:].decode(errors="replace"))

    def number(self, index: int) -> int:
        """A reply that is a number; 0 where it is none. Raises BackendError for what is no reply."""
        line = self.lines[index] if index < len(self.lines) else b""
        return number_of(line) or 0


async def ask(verbs: Sequence[bytes], node: Node, items: list[Item], asking: bool) -> None:
    """Ask a node, about each object, for what each verb says. Raises BackendError."""
    lines = await node.ask(verbs, [item.name for item in items], asking)
    width = len(verbs)
    for index, item in enumerate(items):
        item.lines = lines[index * width : (index + 1) * width]
    if any(line[:1] == b"-" for line in lines):
        for item in items:
            for line in item.lines:
                if line[:1] == b"-" and not line.startswith(b"-WRONGTYPE"):  # a foreign thing is not ours
                    item.fail(line)
                    break
