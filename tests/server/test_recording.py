"""A server's requests as a trace: by configuration and reload, of all tenants, and of none of them anything else."""

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import pytest
from contract.support import fill, make_prompt

from async_cache import connect
from async_cache.recording.trace import read_trace

from .http import BOUND_TOKEN, TENANTS, TOKEN, web
from .programs import environment, program_output, serve_command, server
from .support import wait_until


async def test_requests_of_all_tenants_are_recorded_where_the_settings_say_now(tmp_path: Path) -> None:
    first, second, config = tmp_path / "first", tmp_path / "second", tmp_path / "cache.toml"
    http = 'http = "127.0.0.1:0"'
    config.write_text(f'[server]\n{http}\nrecord = "{first}"\n{TENANTS}')
    with web(tmp_path, config=config, l2=()) as seen:
        served = seen.served
        async with connect(served.url, token=TOKEN) as cache, connect(served.url, token=BOUND_TOKEN) as acme:
            await fill(cache, make_prompt(3))
            for prompt in (make_prompt(3), make_prompt(2)):
                await cache.prefetch(prompt).load_done
            await acme.prefetch(make_prompt(2, salt="acme")).load_done
            await acme.hint(make_prompt(2, salt="acme"), returns=False)

            async def is_recorded() -> bool:
                return bool(seen.json("/status", TOKEN)[1]["recording"]["recorded"] == 4)

            await wait_until(is_recorded)
            assert "async_cache_recorded_total 4.0" in seen.get("/metrics", TOKEN)[2].decode()
            config.write_text(f'[server]\n{http}\nrecord = "{second}"\nrecord_bytes = "1MiB"\n{TENANTS}')
            assert await cache.reload() == (["server.record", "server.record_bytes"], [])
            await cache.prefetch(make_prompt(3)).load_done
            config.write_text(f'[server]\n{http}\nrecord = "/nowhere/trace"\n{TENANTS}')
            with pytest.raises(Exception, match="record: /nowhere/trace cannot be written to"):
                await cache.reload()
            await cache.prefetch(make_prompt(3)).load_done
            config.write_text(f"[server]\n{http}\n{TENANTS}")
            await cache.reload()
            await cache.prefetch(make_prompt(3)).load_done
            assert seen.json("/status", TOKEN)[1]["recording"] is None
    trace = read_trace(first)
    long, short, of_acme = (request.path for request in trace.requests)
    assert short == long[:2] and not {*long} & {*of_acme}
    assert [hint.path for hint in trace.hints] == [of_acme]
    assert "acme" not in first.read_text() and TOKEN not in first.read_text()
    assert len(read_trace(second).requests) == 2
    command = [sys.executable, "-m", "async_cache", "replay", str(first), "--capacity", "1GiB", "--json"]
    told = json.loads(await asyncio.to_thread(program_output, [*command, "--policy", "lru", "--measured", "1"]))
    assert told[0]["hit_tokens"] == 8


async def test_what_was_noted_is_written_when_the_server_ends(tmp_path: Path) -> None:
    with server(tmp_path, l2=(), server_record=str(tmp_path / "trace")) as served:
        async with connect(served.url) as cache:
            for number in range(200):
                await cache.prefetch(make_prompt(2, number)).load_done
        assert served.stop() == 0
    assert len(read_trace(tmp_path / "trace").requests) == 200


def test_a_file_that_cannot_be_recorded_to_is_one_line(tmp_path: Path) -> None:
    command = serve_command(f"unix://{tmp_path}/s", l1="8MiB", l2=(), config=None, via=("async_cache",))
    done = subprocess.run(
        [*command, "--record", "/nowhere/trace"], env=environment(), capture_output=True, text=True, timeout=100
    )
    told = [line for line in done.stderr.splitlines() if line.startswith("async-cache:")]
    assert (done.returncode, len(told)) == (1, 1)
    assert "--record: record: /nowhere/trace cannot be written to: No such file" in told[0]
