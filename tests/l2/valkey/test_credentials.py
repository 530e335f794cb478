"""Passwords: wrong, changed, taken away while connected, from a file; and never told."""

import asyncio
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from contract.support import PAGE, assert_fails_alone, fill_l2, make_prompt, object_keys, read_back

from async_cache import AsyncCache, CacheConfig
from async_cache.errors import BackendError, ConfigError
from async_cache.l2.backend import LoadOutcome
from async_cache.l2.urls.registry import from_url
from async_cache.l2.valkey.names import Names
from async_cache.testing.conformance import content, find, get, key, put

from .certificates import Certificates
from .servers import Server, running
from .support import nothing_left, opened, until_it_answers

SECRET, WRONG = "s3cret-word", "wr0ng-word"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with running(tmp_path / "valkey", "--requirepass", SECRET) as server:
        yield server


@pytest.mark.parametrize("credentials", ["", f":{WRONG}@", f"user:{WRONG}@", f"user:{SECRET}@", ":@", "default@"])
async def test_who_is_refused_is_told_so_at_the_start_and_the_password_is_not(
    server: Server, credentials: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with nothing_left():
        backend = from_url(f"valkey://{credentials}127.0.0.1:{server.port}")
        with caplog.at_level(logging.DEBUG), pytest.raises(ConfigError) as caught:
            await backend.open()
        told = f"{caught.value!r} {caught.value} {backend!r} {backend.name} {vars(backend)} {caplog.text}"
        assert f"valkey://127.0.0.1:{server.port}: " in str(caught.value)
        assert "WRONGPASS" in told or "NOAUTH" in told
        assert WRONG not in told and SECRET not in told


async def test_a_server_that_quotes_what_it_was_told_is_not_quoted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with running(tmp_path / "valkey", "--rename-command", "AUTH", "") as server, caplog.at_level(logging.DEBUG):
        async with opened(f"valkey://somebody:{SECRET}@127.0.0.1:{server.port}") as backend:
            with pytest.raises(BackendError, match="does not understand AUTH") as caught:
                await find(backend, [1])
    assert "does not understand AUTH" in caplog.text
    for told in (str(caught.value), caplog.text):
        assert SECRET not in told and "somebody" not in told


@pytest.mark.parametrize("mark", "/?#")
@pytest.mark.parametrize("scheme", ["valkey", "valkeys+cluster", "s3", "mooncake"])
def test_a_password_that_is_not_percent_encoded_is_refused_and_not_told(scheme: str, mark: str) -> None:
    with pytest.raises(ConfigError, match="in a password, write %2F for /") as caught:
        from_url(f"{scheme}://somebody:{SECRET}{mark}{WRONG}@host")
    assert SECRET not in str(caught.value) and WRONG not in str(caught.value)


async def test_a_password_is_percent_decoded(server: Server) -> None:
    await server.say("ACL", "SETUSER", "us:er@x", "on", ">p/a:s@s %?#", "~*", "+@all")
    async with opened(f"valkey://us%3Aer%40x:p%2Fa%3As%40s%20%25%3F%23@127.0.0.1:{server.port}") as backend:
        assert await put(backend, [1], 5000) == [True]


async def test_a_password_that_changes_while_connected(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    async with opened(f"valkey://:{SECRET}@127.0.0.1:{server.port}") as backend:
        assert await put(backend, [1], 5000) == [True]
        await server.say("CONFIG", "SET", "requirepass", WRONG)
        assert await get(backend, [1], 5000) == [content(1, 5000)]  # connections stay
        server.password = WRONG
        await server.say("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        with caplog.at_level(logging.DEBUG):
            for _ in range(3):
                with pytest.raises(BackendError, match=r"valkey://127.0.0.1:\d+: ") as caught:
                    await get(backend, [1], 5000)
                assert SECRET not in str(caught.value)
        await server.say("CONFIG", "SET", "requirepass", SECRET)
        await until_it_answers(backend)
        assert await get(backend, [1], 5000) == [content(1, 5000)]
        assert SECRET not in caplog.text


async def test_a_user_who_may_do_nothing_any_more(server: Server) -> None:
    await server.say("ACL", "SETUSER", "akv", "on", f">{SECRET}", "~akv:*", "+@all")
    async with opened(f"valkey://akv:{SECRET}@127.0.0.1:{server.port}") as backend:
        assert await put(backend, [1, 2], 5000) == [True] * 2
        await server.say("ACL", "SETUSER", "akv", "-@all", "+ping")
        for call in (find(backend, [1]), get(backend, [1], 5000), put(backend, [3], 5000), backend.delete([key(1)])):
            with pytest.raises(BackendError, match="NOPERM"):
                await call
        with pytest.raises(BackendError, match="NOPERM"):
            assert [entry async for entry in backend.keys()]
        await server.say("ACL", "SETUSER", "akv", "+@all")
        assert await get(backend, [1, 2], 5000) == [content(n, 5000) for n in (1, 2)]
        await server.say("ACL", "DELUSER", "akv")  # which closes connections
        results = [await asyncio.gather(get(backend, [1], 5000), return_exceptions=True) for _ in range(3)]
        assert isinstance(results[-1][0], BackendError)


async def test_a_user_of_one_key_pattern_is_enough(server: Server) -> None:
    rights = ("+get", "+set", "+strlen", "+unlink", "+scan", "+ping", "+select")
    await server.say("ACL", "SETUSER", "least", "on", f">{SECRET}", "~akv:*", *rights)
    async with opened(f"valkey://least:{SECRET}@127.0.0.1:{server.port}/1") as backend:
        assert await put(backend, [1], 5000) == [True]
        assert await find(backend, [1]) == [True]
        assert await get(backend, [1], 5000) == [content(1, 5000)]
        assert len([entry async for entry in backend.keys()]) == 1
        assert await backend.delete([key(1)]) == 1


async def test_what_is_damaged_and_may_not_be_removed_is_not_found_and_replaced_when_it_may(server: Server) -> None:
    await server.say("ACL", "SETUSER", "akv", "on", f">{SECRET}", "~akv:*", "+@all", "-unlink")
    async with opened(f"valkey://akv:{SECRET}@127.0.0.1:{server.port}") as backend:
        assert await put(backend, [1, 2], 5000) == [True] * 2
        await server.flip_bit(Names("akv").of(key(1)), 77)
        for _ in range(2):
            assert await get(backend, [1, 2], 5000) == [LoadOutcome.CORRUPT, content(2, 5000)]
            assert await find(backend, [1, 2]) == [False, True]
        await server.say("ACL", "SETUSER", "akv", "+unlink")
        assert await put(backend, [1, 2], 5000) == [True] * 2
        assert await find(backend, [1, 2]) == [True, True]
        assert await get(backend, [1, 2], 5000) == [content(n, 5000) for n in (1, 2)]


async def test_a_password_from_a_file_is_read_for_each_connection(server: Server, tmp_path: Path) -> None:
    file = tmp_path / "password"
    file.write_text(f"{SECRET}\n", "utf-8-sig")  # as some editors write it
    async with opened(f"valkey://127.0.0.1:{server.port}?password_file={file}") as backend:
        assert await put(backend, [1], 5000) == [True]
        await server.say("CONFIG", "SET", "requirepass", WRONG)
        server.password = WRONG
        file.write_text(WRONG)
        await server.say("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        await until_it_answers(backend)
        assert await get(backend, [1], 5000) == [content(1, 5000)]
        file.unlink()
        await server.say("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        results = [await asyncio.gather(get(backend, [1], 5000), return_exceptions=True) for _ in range(3)]
        assert "cannot be read" in str(results[-1][0])


async def test_certificates_that_do_not_fit_are_refused(
    tls: Server, certificates: Certificates, tmp_path: Path
) -> None:
    others = tmp_path / "others"
    others.mkdir()
    url = f"rediss://:secret@127.0.0.1:{tls.tls_port}?connect_timeout=20&"
    named = url.replace("127.0.0.1", "localhost")  # which is not the name in the certificate
    async with nothing_left():
        with pytest.raises(ConfigError, match="certificate"):  # an authority that we do not trust
            await from_url(url + Certificates(others).parameters).open()
        with pytest.raises(ConfigError, match="mismatch"):
            await from_url(named + certificates.parameters).open()
        async with opened(named + certificates.parameters + "&verify=ca") as backend:
            assert await put(backend, [1], 5000) == [True]
        backend = from_url(f"{url}ca={certificates.directory}/ca.pem")  # without one of our own
        await backend.open()
        with pytest.raises(BackendError):
            await find(backend, [1])
        await backend.close()


@pytest.mark.parametrize("chunks", [1, 3])
async def test_what_a_user_may_not_read_of_one_prompt_leaves_the_server_in_use(server: Server, chunks: int) -> None:
    bad, sound = make_prompt(chunks, 1), make_prompt(3, 2)
    user = ("ACL", "SETUSER", "akv", "on", f">{SECRET}", "resetkeys")
    await server.say(*user, "~akv:*", "+@all")
    url = f"valkey://akv:{SECRET}@127.0.0.1:{server.port}?lookup_timeout=20"
    async with nothing_left(), AsyncCache(CacheConfig(l1_bytes=64 * PAGE, l2=[url])) as cache:
        await fill_l2(cache, bad, sound)
        readable = [f"~{Names('akv').of(k).decode()}" for k in object_keys(sound)]
        await server.say(*user, "-@all", "+ping", "+get", *readable, "(~akv:* +strlen +set +unlink)")
        await assert_fails_alone(cache, bad, sound)
        await server.say(*user, "~akv:*", "+@all")
        assert await read_back(cache, bad) == chunks
