"""Sockets that a service manager passes on: the server listens there, and not where its settings say."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from urllib.request import urlopen

import pytest

from async_cache import BlockingClient

from .programs import END_SECONDS, TESTS, environment, server

DEPLOY = Path(__file__).parents[2] / "deploy"
PASS_ON = """
import os, sys
given = [int(number) for number in sys.argv[1].split(",")]
for number, descriptor in enumerate(given):
    os.dup2(descriptor, 20 + number)
for number in range(len(given)):
    os.dup2(20 + number, 3 + number)
os.environ |= {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": str(len(given)), "LISTEN_FDNAMES": sys.argv[2]}
os.execv(sys.executable, [sys.executable, "-m", "async_cache", *sys.argv[3:]])
"""


def test_a_server_listens_at_the_sockets_that_it_is_given() -> None:
    with tempfile.TemporaryDirectory(prefix="sd") as name:
        directory = Path(name)
        with socket.socket(socket.AF_UNIX) as serves, socket.create_server(("127.0.0.1", 0)) as answers:
            serves.bind(f"{directory}/given")
            serves.listen()
            numbers = serves.fileno(), answers.fileno()
            command = [sys.executable, "-c", PASS_ON, ",".join(map(str, numbers)), "async-cache.socket:http"]
            with subprocess.Popen(
                [*command, "serve", "--l1-bytes", "1MiB", "--l2", "memory://"],
                cwd=TESTS,
                env=environment(),
                pass_fds=numbers,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            ) as process:
                # Who connects before it is there waits in the backlog: that is what a service manager's socket is for.
                with BlockingClient(f"unix://{directory}/given", connect_timeout_seconds=20) as cache:
                    cache.ping()
                    with urlopen(f"http://127.0.0.1:{answers.getsockname()[1]}/readyz", timeout=100) as response:
                        assert response.status == 200
                process.terminate()
                assert process.wait(END_SECONDS) == 0
            assert [path.name for path in directory.iterdir()] == ["given"], "its name is the service manager's"


def test_sockets_of_another_process_are_none_of_ours(tmp_path: Path) -> None:
    os.environ["LISTEN_PID"], os.environ["LISTEN_FDS"] = "1", "7"
    try:
        with server(tmp_path) as served:
            assert served.url == f"unix://{tmp_path}/s"
    finally:
        del os.environ["LISTEN_PID"], os.environ["LISTEN_FDS"]


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="there is no systemd here")
def test_the_units_are_units(tmp_path: Path) -> None:
    for unit in ("async-cache.service", "async-cache.socket"):
        text = (DEPLOY / "systemd" / unit).read_text().replace("/opt/async-cache/bin/async-cache", sys.executable)
        (tmp_path / unit).write_text(text.replace("User=async-cache", "User=root").replace("Group=async-cache", ""))
    paths = [str(tmp_path / unit) for unit in ("async-cache.service", "async-cache.socket")]
    done = subprocess.run(["systemd-analyze", "verify", *paths], capture_output=True, text=True, check=False)
    ours = [line for line in done.stderr.splitlines() if "async-cache" in line]
    assert (done.returncode, ours) == (0, []), done.stderr
