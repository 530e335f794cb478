"""`async-cache top` in a terminal: it shows what the page shows, lives, fits, and leaves the terminal as it was."""

import asyncio
import json
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from contract.support import fill, make_prompt
from server.http import TENANTS, TOKEN, ServedWeb, http_url, web
from server.programs import environment
from terminal import terminal
from test_cli import complaint, run

from async_cache import connect

TOP = [sys.executable, "-m", "async_cache", "top", "--every", "0.2"]
pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedWeb]:
    directory = tmp_path_factory.mktemp("top")
    with web(directory, l2=["memory://near?capacity=1MiB"]) as served:
        asyncio.run(exchange(served.served.url, "engine-1"))
        yield served


async def exchange(url: str, name: str) -> None:
    async with connect(url) as cache:
        await fill(cache, make_prompt(4))
        await cache.flush()
        await cache.clear("l1")
        await cache.prefetch(make_prompt(5), request_id=name).load_done


def address(site: ServedWeb) -> str:
    return site.url.removeprefix("http://")


def test_it_shows_what_there_is_and_lives(site: ServedWeb, tmp_path: Path) -> None:
    with terminal([*TOP, "--http", address(site)], tmp_path, environment(), 130, 40) as shown:
        words = ("● healthy", "80 %", "1 µs", "near", "what misses", "unknown", "tenants", "model")
        shown.until(
            lambda text: all(word in text for word in words) and re.search(r"engine-1 +━*●━*■", text) is not None
        )
        asyncio.run(exchange(site.served.url, "another one"))
        shown.until(lambda text: "another one" in text)
        shown.press(b"q")
        assert shown.end() == 0
        assert b"\x1b[?1049l" in shown.heard[-80:] and b"\x1b[?25h" in shown.heard[-80:], "the screen is as it was"


@pytest.mark.parametrize(("columns", "lines"), [(80, 24), (60, 20), (200, 60)])
def test_it_fits_any_terminal(columns: int, lines: int, site: ServedWeb, tmp_path: Path) -> None:
    with terminal([*TOP, "--http", address(site)], tmp_path, environment(), columns, lines) as shown:
        text = shown.until(lambda text: "engine-1" in text and "tiers" in text)
        assert len(text.splitlines()) <= lines
        shown.press(b"\x03")
        assert shown.end() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_leaves_the_terminal_as_it_was(number: signal.Signals, site: ServedWeb, tmp_path: Path) -> None:
    with terminal([*TOP, "--http", address(site)], tmp_path, environment(), 100, 30) as shown:
        shown.until(lambda text: "healthy" in text)
        shown.process.send_signal(number)
        assert shown.end() == 0
        assert b"\x1b[?1049l" in shown.heard[-80:] and b"\x1b[?25h" in shown.heard[-80:]


def test_in_80_columns_nothing_of_the_times_is_cut(site: ServedWeb, tmp_path: Path) -> None:
    with terminal([*TOP, "--http", address(site)], tmp_path, environment(), 80, 24) as shown:
        tiles = shown.until(lambda text: "engine-1" in text and "tiers" in text).splitlines()[1:4]
        assert "known 50, 99 %" in tiles[0] and "loaded 50, 99 %" in tiles[0]
        assert "…" not in "".join(tiles)


def test_a_terminal_that_cannot_be_drawn_on_gets_it_once(site: ServedWeb, tmp_path: Path) -> None:
    with terminal([*TOP, "--http", address(site)], tmp_path, environment(), 130, 60, "dumb") as shown:
        assert shown.end() == 0
        assert b"healthy" in shown.heard and b"\x1b" not in shown.heard


def test_a_server_that_goes_away_is_seen_and_one_that_comes_back(tmp_path: Path) -> None:
    with web(tmp_path) as site:
        where = address(site)
        with terminal([*TOP, "--http", where], tmp_path, environment(), 100, 30) as shown:
            shown.until(lambda text: "healthy" in text)
            assert site.served.stop() == 0
            shown.until(lambda text: "no answer" in text)
            (tmp_path / "log").unlink()
            with web(tmp_path, http=where) as again:
                assert http_url(again.served) == site.url
                shown.until(lambda text: "healthy" in text)
                shown.press(b"q")
                assert shown.end() == 0


def test_without_a_terminal_it_prints_once(site: ServedWeb, tmp_path: Path) -> None:
    done = run(tmp_path, "top", "--http", address(site))
    assert (done.returncode, done.stderr) == (0, "")
    assert "healthy" in done.stdout and "\x1b" not in done.stdout
    assert json.loads(run(tmp_path, "top", "--json", "--http", address(site)).stdout)["problems"] == []


def test_what_is_wrong_is_one_line(tmp_path: Path) -> None:
    told = complaint(run(tmp_path, "top", "--http", "127.0.0.1:1"))
    assert told.startswith("nobody answers at http://127.0.0.1:1/status: Connection refused; `http` in the settings")
    assert complaint(run(tmp_path, "top", "--http", "nowhere")).startswith("--http: http must be host:port")
    config = tmp_path / "cache.toml"
    config.write_text(TENANTS)
    with web(tmp_path, config=config) as site:
        assert "wants a token" in complaint(run(tmp_path, "top", "--http", address(site)))
        token = tmp_path / "token"
        token.write_text(TOKEN)
        done = run(tmp_path, "top", "--http", address(site), "--token-file", str(token))
        assert "healthy" in done.stdout
