"""Servers and other programs that end with their test."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from subprocess import PIPE, Popen
from typing import Any

import psutil

TESTS = Path(__file__).parents[1]
END_SECONDS = 100
PATIENT = {"server_shutdown_timeout_seconds": END_SECONDS, "lookup_timeout_seconds": 60}
"""Where a test is of neither, a busy machine may take longer than their defaults: a second, for what is to be found."""


class ServerProcess:
    """A server that serves."""

    def __init__(self, child: "Popen[str]", urls: Sequence[str], log: Path):
        self.child = child
        self.urls = urls
        self.url = urls[0]
        self.pid = child.pid
        self._process = psutil.Process(child.pid)
        self._log = log

    @property
    def log(self) -> str:
        return self._log.read_text()

    def says(self, text: str) -> bool:
        """Whether the log has this, or gets it: a thread writes what the server has done by now."""
        end = time.monotonic() + END_SECONDS
        while text not in self.log and time.monotonic() < end:
            time.sleep(0.01)
        return text in self.log

    def resident_bytes(self) -> int:
        return self._process.memory_info().rss

    def busy_seconds(self) -> float:
        return busy_seconds(self.pid)

    def descriptors(self) -> int:
        return self._process.num_fds()

    def open_files(self) -> list[str]:
        """What its descriptors mean, as the kernel says it."""
        paths = []
        for descriptor in Path(f"/proc/{self.pid}/fd").iterdir():
            with suppress(FileNotFoundError):  # it was closed meanwhile
                paths.append(os.readlink(descriptor))
        return paths

    def descendants(self) -> list[psutil.Process]:
        return self._process.children(recursive=True)

    def kill(self) -> None:
        self.child.kill()
        self.child.wait()

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Its exit code."""
        self.child.send_signal(number)
        return self.child.wait(END_SECONDS)


def busy_seconds(pid: int) -> float:
    """How long the threads of a process have had a processor: what it does, whoever else the machine serves."""
    busy = 0
    for thread in Path(f"/proc/{pid}/task").glob("*/schedstat"):
        with suppress(OSError):  # it has ended meanwhile
            busy += int(thread.read_text().split()[0])
    return busy / 1e9


def environment(**settings: Any) -> dict[str, str]:
    """This process's own, with these settings of a server instead of those that it has."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("ASYNC_CACHE_")}
    settings = {"server_http": ""} | PATIENT | settings  # else all would want the same port
    return inherited | {f"ASYNC_CACHE_{name.upper()}": str(value) for name, value in settings.items()}


def serve_command(*listen: str, l1: str, l2: Sequence[str], config: Path | None, via: Sequence[str]) -> list[str]:
    command = [sys.executable, "-m", *via, "serve", "--l1-bytes", l1]
    for url in listen:
        command += ["--listen", url]
    for url in l2:
        command += ["--l2", url]
    return command + (["--config", str(config)] if config is not None else [])


@contextmanager
def server(
    directory: Path,
    *listen: str,
    l1: str = "64MiB",
    l2: Sequence[str] = ("memory://",),
    config: Path | None = None,
    via: Sequence[str] = ("async_cache",),
    **settings: Any,
) -> Iterator[ServerProcess]:
    """A server that serves, at the socket `s` of a directory by default. In the end it is stopped if it still runs.

    `via`: the module to run, and its arguments before those of the command line.
    """
    command = serve_command(*(listen or [socket_in(directory)]), l1=l1, l2=l2, config=config, via=via)
    log = directory / "log"
    with (
        log.open("a") as errors,
        Popen(command, cwd=TESTS, env=environment(**settings), stdout=PIPE, stderr=errors, text=True) as child,
    ):
        try:
            assert child.stdout is not None
            serving = next((line for line in child.stdout if line.startswith("serving at ")), None)
            assert serving is not None, log.read_text()
            yield ServerProcess(child, serving.split()[2:], log)
            if child.poll() is None:
                child.terminate()
                child.wait(END_SECONDS)
        finally:
            child.kill()
    assert "Traceback" not in log.read_text(), log.read_text()


def program_output(command: Sequence[str]) -> str:
    """What a command prints that ends well."""
    return subprocess.run(command, env=environment(), stdout=PIPE, text=True, timeout=END_SECONDS, check=True).stdout


def socket_in(directory: Path) -> str:
    return f"unix://{directory}/s"


@contextmanager
def program(module: str, *arguments: Any) -> Iterator["Popen[str]"]:
    """A module of the tests as a program, with pipes to it. It is killed at the end if it is still there."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    with Popen(command, cwd=TESTS, env=environment(), stdin=PIPE, stdout=PIPE, text=True, bufsize=1) as child:
        try:
            yield child
        finally:
            child.kill()


def heard(child: "Popen[str]") -> str:
    """The next line that a program says."""
    assert child.stdout is not None
    line = child.stdout.readline()
    assert line, "the program has ended"
    return line.rstrip("\n")


def tell(child: "Popen[str]", line: str) -> None:
    assert child.stdin is not None
    child.stdin.write(f"{line}\n")
    child.stdin.flush()


def say(line: Any) -> None:
    """To whoever started this program."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()
