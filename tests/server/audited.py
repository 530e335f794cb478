"""A server that keeps account of what could run the code of others, as a program: `python -m server.audited serve ...`.

From the moment that it serves until its end, it says what it saw in the end, as a line of JSON.
"""

import json
import marshal
import os
import pickle
import subprocess
import sys
from collections import Counter

from async_cache.cli import app as cli
from async_cache.server import Server, process

from .programs import say

FORBIDDEN = (
    "pickle.", "marshal.", "exec", "compile", "code.__new__", "object.__reduce", "import", "subprocess.", "os.system",
    "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.startfile", "ctypes.dlopen", "ctypes.dlsym", "pty.",
    "shelve.", "webbrowser.", "socket.connect", "urllib.", "os.putenv",
)  # fmt: skip


class Auditor:
    """Counts events."""

    def __init__(self):
        self.watching = False
        self.seen = 0
        self.forbidden = Counter()

    def __call__(self, event, args):
        if not self.watching:
            return
        self.seen += 1
        if event.startswith(FORBIDDEN):
            self.watching = False
            self.forbidden[f"{event} {args!r:.200}"] += 1
            self.watching = True


auditor = Auditor()


class AuditedServer(Server):
    """Watched once it listens."""

    async def open(self):
        await super().open()
        auditor.watching = True
        return self


def do_all_that_is_forbidden():
    """So that the tests know that it would be seen."""
    pickle.loads(pickle.dumps(os.getcwd))
    marshal.loads(marshal.dumps(1))
    eval("1")  # the event is that of exec
    os.system("true")
    subprocess.run(["true"], check=True)
    import wave  # noqa: F401


def main():
    sys.addaudithook(auditor)
    if sys.argv[1:] == ["canary"]:
        auditor.watching = True
        do_all_that_is_forbidden()
        auditor.watching = False
        say(json.dumps(auditor.forbidden))
        return
    process.Server = AuditedServer
    try:
        cli.main()
    finally:
        auditor.watching = False
        say(json.dumps({"seen": auditor.seen, "forbidden": auditor.forbidden}))


if __name__ == "__main__":
    main()
