"""Settings that are read anew: what is live is used, what is not waits, what is wrong changes nothing."""

import asyncio
import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
from contract.support import fill, make_prompt, verify

from async_cache import AccessDeniedError, ConfigError, ConnectionLostError, connect
from async_cache.aio.sweeper import Sweeper
from async_cache.server.reload import settled
from async_cache.testing.virtual import run_virtual

from .programs import ServerProcess, program_output, server
from .support import wait_until

TOKENS = {"operations": "token-of-operations", "acme": "token-of-acme-number-one"}


def write(path: Path, *, top: str = "", in_server: str = "", tenants: tuple[str, ...] = ()) -> None:
    tables = "".join(f'[server.tenants.{name}]\ntokens = ["{TOKENS[name]}"]\n' for name in tenants)
    path.write_text(f"{top}\n[server]\n{in_server}\n{tables}")


async def said(served: ServerProcess, text: str) -> None:
    async def is_said() -> bool:
        await asyncio.sleep(0.01)
        return text in served.log

    await wait_until(is_said)


async def hang_up(served: ServerProcess, text: str) -> None:
    os.kill(served.pid, signal.SIGHUP)
    await said(served, text)


@pytest.fixture(autouse=True)
def _nothing_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))


async def test_live_settings_are_used_and_others_wait(tmp_path: Path) -> None:
    config = tmp_path / "cache.toml"
    write(config, top="result_ttl_seconds = 60")
    with server(tmp_path, config=config, l2=()) as served:
        async with connect(served.url) as cache:
            await fill(cache, make_prompt(2))
            await cache.prefetch(make_prompt(2)).load_done
            write(config, top="result_ttl_seconds = 0.05", in_server='max_connections = 1\nhttp = "127.0.0.1:1"\n')
            os.kill(served.pid, signal.SIGHUP)
            await said(served, "settings are changed: result_ttl_seconds, server.max_connections")

            async def is_swept() -> bool:
                return (await cache.stats()).swept_results == 1

            await wait_until(is_swept)
            with pytest.raises(Exception, match="1 connections, which is its limit"):
                async with connect(served.url):
                    pass
            write(config, top="result_ttl_seconds = 0.05", in_server="max_connections = 1\nstall_timeout_seconds = 7\n")
            assert await cache.reload() == (["server.stall_timeout_seconds"], [])
            assert await cache.reload() == ([], [])
            write(config, in_server="log_format = 'json'\nlog_level = 'debug'")
            changed, waiting = await cache.reload()
            assert waiting == ["server.log_format"]
            assert "server.log_level" in changed and "result_ttl_seconds" in changed
        assert served.stop() == 0
        assert "settings wait for a restart: server.log_format" in served.log


async def test_a_file_that_does_not_answer_holds_up_nobody(tmp_path: Path) -> None:
    config = tmp_path / "cache.toml"
    write(config, in_server="max_connections = 9")
    with server(tmp_path, config=config, l2=()) as served:
        async with connect(served.url) as cache:
            config.unlink()
            os.mkfifo(config)
            reloading = asyncio.create_task(cache.reload())
            async with asyncio.timeout(60):
                writer = await opened(config)  # somebody reads, and waits
                await fill(cache, make_prompt(2))
                assert (await cache.lookup(make_prompt(2))).chunks == 2
                write(tmp_path / "new.toml", in_server="max_connections = 8")
                os.replace(tmp_path / "new.toml", config)
                os.close(writer)
                assert await reloading == (["server.max_connections"], [])


async def opened(pipe: Path) -> int:
    """A pipe to write to, when somebody reads from it."""
    while True:
        try:
            return os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
        except OSError:
            await asyncio.sleep(0.01)


async def test_what_cannot_be_used_changes_nothing(tmp_path: Path) -> None:
    config = tmp_path / "cache.toml"
    write(config, in_server="max_connections = 9")
    with server(tmp_path, config=config) as served:
        async with connect(served.url) as cache:
            for text in ("max_connections = 1\nmax_requests = 0", "nonsense", "log_level = 'loud'"):
                write(config, in_server=text)
                with pytest.raises(ConfigError):
                    await cache.reload()
            await hang_up(served, "settings are as they were: ")
            async with connect(served.url) as other:
                await other.ping()
            config.unlink()
            with pytest.raises(ConfigError, match="cannot read"):
                await cache.reload()


def test_a_file_that_is_being_written_is_not_believed(tmp_path: Path) -> None:
    """Half of it would have no tenants, and let everybody in."""
    config = tmp_path / "cache.toml"
    write(config, tenants=("operations", "acme"))
    whole = config.read_text()

    async def main() -> None:
        clock = asyncio.get_running_loop().time
        waiting = asyncio.create_task(settled(config))
        for end in range(0, len(whole), 9):
            config.write_text(whole[:end])
            await asyncio.sleep(0.06)
            assert not waiting.done()
        config.write_text(whole)
        began = clock()
        await waiting
        assert clock() - began < 0.3
        config.unlink()
        await settled(config)
        assert clock() - began < 0.5

    run_virtual(main())


async def test_backends_come_and_go_under_load_and_no_request_is_lost(tmp_path: Path) -> None:
    config = tmp_path / "cache.toml"
    near, far = f'"fs://{tmp_path}/near?capacity=none"', f'"fs://{tmp_path}/far?capacity=none"'
    write(config, top=f"l2 = [{near}]")
    with server(tmp_path, config=config, l2=()) as served:
        async with connect(served.url) as cache:
            done = 0
            stopped = asyncio.Event()

            async def go(number: int) -> None:
                nonlocal done
                while not stopped.is_set():
                    prompt = make_prompt(3, number)
                    await fill(cache, prompt)
                    prefetch = cache.prefetch(prompt)
                    assert (await prefetch.load_done).chunks == 3
                    async with cache.read(prefetch.request_id) as lease:
                        verify(lease, prompt)
                    done += 1

            tasks = [asyncio.create_task(go(number)) for number in range(4)]
            for urls in (f"{near}, {far}", f"{far}", f"{far}, {near}", f"{near}"):
                before = done
                write(config, top=f"l2 = [{urls}]")
                assert await cache.reload() == (["l2"], [])
                names = [backend.name for backend in await cache.backends()]
                assert names == [part.split("?")[0].strip('" ') for part in urls.split(",")]

                async def goes_on(before: int = before) -> bool:
                    return done > before + 4

                await wait_until(goes_on)
            stopped.set()
            await asyncio.gather(*tasks)


async def test_tenants_come_and_go(tmp_path: Path) -> None:
    config = tmp_path / "cache.toml"
    write(config, tenants=("operations",))
    with server(tmp_path, config=config) as served:
        with pytest.raises(AccessDeniedError):
            await connect(served.url, token=TOKENS["acme"]).open()
        write(config, tenants=("operations", "acme"))
        await hang_up(served, "settings are changed: server.tenants")
        async with connect(served.url, token=TOKENS["acme"]) as cache:
            await cache.ping()
        assert TOKENS["acme"] not in served.log


@pytest.mark.parametrize("at", ["unix://{}/s", "tcp://127.0.0.1:0"])
async def test_who_loses_its_token_while_it_sends_hears_that(tmp_path: Path, at: str) -> None:
    config = tmp_path / "cache.toml"
    write(config, tenants=("operations", "acme"))
    with server(tmp_path, at.format(tmp_path), config=config) as served:
        async with connect(served.url, token=TOKENS["acme"], heartbeat_seconds=None) as cache:
            await cache.ping()
            write(config, tenants=("operations",))
            os.kill(served.pid, signal.SIGHUP)
            while "settings are changed" not in served.log:
                time.sleep(0.01)  # noqa: ASYNC251 - the loop is busy, and reads nothing
            prefetch = cache.prefetch(make_prompt(2))
            with pytest.raises(ConnectionLostError, match="the token was removed"):
                await prefetch.lookup_done


async def test_the_command_says_what_has_changed(tmp_path: Path) -> None:
    config = tmp_path / "cache.toml"
    write(config)
    with server(tmp_path, config=config) as served:
        write(config, in_server='max_requests = 7\nhttp = "127.0.0.1:1"')
        command = [sys.executable, "-m", "async_cache", "reload", "--url", served.url]
        told = json.loads(await asyncio.to_thread(program_output, [*command, "--json"]))
        assert told == {"changed": ["server.max_requests"], "waiting": []}
        assert await asyncio.to_thread(program_output, command) == "changed: nothing\n"


async def test_without_a_file_a_hangup_ends_it_as_before(tmp_path: Path) -> None:
    with server(tmp_path) as served:
        async with connect(served.url) as cache:
            with pytest.raises(ConfigError, match="without a file"):
                await cache.reload()
        assert served.stop(signal.SIGHUP) == 0


def test_what_lives_already_lives_as_long_as_what_comes() -> None:
    async def main() -> list[tuple[str, float]]:
        sweeper, gone = Sweeper(), []
        loop = asyncio.get_running_loop()
        expiry = sweeper.expiry(100.0, lambda item: gone.append((item, loop.time())))
        task = asyncio.create_task(sweeper.run())
        expiry.add("old")
        await asyncio.sleep(10)
        expiry.add("new")
        expiry.live_for(20.0)
        await asyncio.sleep(100)
        task.cancel()
        return gone

    assert run_virtual(main()) == [("old", 20.0), ("new", 30.0)]


async def test_the_log_as_objects_tells_whose_each_line_is_and_no_secret(tmp_path: Path) -> None:
    config = tmp_path / "cache.toml"
    write(config, in_server='log_format = "json"', tenants=("operations", "acme"))
    with server(tmp_path, config=config) as served:
        async with connect(served.url, "engine", token=TOKENS["acme"]) as cache:
            await fill(cache, make_prompt(2))
            await cache.prefetch(make_prompt(2), request_id="of-acme").load_done
        with pytest.raises(AccessDeniedError):
            await connect(served.url, token="token-of-nobody-at-all").open()
        assert served.stop() == 0
        lines = [json.loads(line) for line in served.log.splitlines()]
    assert all({"time", "level", "logger", "message"} <= set(line) for line in lines)
    mine = [line for line in lines if line.get("tenant") == "acme"]
    assert [line["message"].split()[-1] for line in mine] == ["in", "gone"]
    assert {line["namespace"] for line in mine} == {"engine"}
    assert "of-acme" not in served.log, "no line for each request"
    assert not any(token in served.log for token in (*TOKENS.values(), "token-of-nobody-at-all"))
