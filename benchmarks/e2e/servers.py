"""Servers, one at a time, at one address, over one directory."""

import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

RECONNECT_SECONDS = 3.0  # an engine's clients look for a new server at least once a second


class Servers:
    """What is stored by one of them is there for the next."""

    def __init__(self, directory):
        self.socket, self.storage = directory / "cache.sock", directory / "kv"
        self.url = f"unix://{self.socket}"

    @contextmanager
    def sound(self, l1_gib):
        command = ["-m", "async_cache", "serve", "--listen", self.url, "--l1-bytes", f"{l1_gib}GiB"]
        with self._run(*command, "--l2", f"fs://{self.storage}?capacity=4GiB", "--log-level", "warning"):
            yield

    @contextmanager
    def faulty(self, **options):
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
        with self._run(Path(__file__).with_name("faulty_server.py"), self.socket, self.storage, *flags):
            yield

    @contextmanager
    def _run(self, *arguments):
        process = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.DEVNULL)
        try:
            until = time.monotonic() + 60
            while subprocess.run(
                [sys.executable, "-m", "async_cache", "ping", "--url", self.url], capture_output=True
            ).returncode:
                assert time.monotonic() < until and process.poll() is None, "the server does not come up"
            time.sleep(RECONNECT_SECONDS)
            yield
        finally:
            process.terminate()
            process.wait(60)
