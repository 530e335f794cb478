"""vLLM with the connector, against a real server on this machine: `make e2e`.

Makes an environment of its own in `.e2e/` (some minutes, once), and runs itself in it. It fails unless outputs are the
same with and without the cache, a second request reuses all whole chunks, a pause and a reset leave nothing in the
cache while a request goes on, a backend that fails in the middle of a load changes nothing, and after 200 requests with
random aborts the server holds nothing; and the same outputs and hits for one engine that prefills and another one that
decodes, and for a hybrid model of random weights. It measures beside LMCache, and ends with a table of all that.

environment    vLLM, LMCache, the model
servers        sound ones, and `faulty_server`s
lmcache_peer   LMCache's server
engine         engines, and what is asked of them
checks, slow   what has to hold; what slow storage costs
arrangements   a prefill/decode pair, and a hybrid model
report         the tables
"""

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
from contextlib import ExitStack, asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path

from arrangements import check_hybrid, check_pair
from checks import check_aborts, check_failure, check_outputs, check_resets, check_tests
from engine import CHUNK_TOKENS, PROMPT_CHUNKS, Subject, ask, forget, make_engine, read_prompts, transfer
from environment import SETTINGS, Place
from report import Report
from servers import Servers
from slow import SLOW_REQUESTS, SLOW_SECONDS, measure_scheduler, measure_slow

L1_GIB = 2
PARTS = ["tests", "outputs", "resets", "failure", "aborts", "slow", "pair", "hybrid"]


@contextmanager
def peer(place, directory):
    """LMCache in an engine, or None, and why in a line."""
    with ExitStack() as stack:
        found = None
        try:
            from lmcache_peer import Peer

            cache = Peer(directory)
            stack.enter_context(cache.running(CHUNK_TOKENS, L1_GIB, max(SLOW_REQUESTS)))
            found = Subject("LMCache", make_engine(place.model, cache.transfer()), cache)
            stack.callback(found.engine.shutdown)
        except Exception as error:  # whatever it is, our own part goes on
            print(f"LMCache is not available: {type(error).__name__}: {error}", flush=True)
        yield found


@asynccontextmanager
async def client_of(server, url):
    """A server, and a client of it."""
    from async_cache import connect

    with server:
        async with connect(url) as client:
            yield client


async def expect(place, prompts, *, known):
    """The answers of an engine without a cache; those of the last run, if they are to be `known`."""
    kept = place.work / "expected.json"
    if known and kept.exists():
        return [tuple(tokens) for tokens in json.loads(kept.read_text())]
    engine = make_engine(place.model)
    try:
        expected = [(await ask(engine, prompt)).tokens for prompt in prompts]
    finally:
        engine.shutdown()
    kept.write_text(json.dumps(expected))
    return expected


async def run(place, parts):
    """Those parts, in their order, with one engine of ours."""
    with ExitStack() as stack:
        report = Report()
        stack.callback(report.print)
        if "tests" in parts:
            await check_tests(report)
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="async_cache-e2e-")))
        prompts, holders = await asyncio.to_thread(read_prompts, place.model, max(SLOW_REQUESTS))
        few = prompts[:4]
        expected = await expect(place, few, known=parts != PARTS)
        servers = Servers(directory)
        url, sound = servers.url, partial(servers.sound, L1_GIB)
        if set(parts) - {"tests", "pair", "hybrid"}:
            await run_one_engine(report, place, parts, servers, prompts, holders, expected, directory)
        for part, check in (("pair", partial(check_pair, prompts=few, expected=expected)), ("hybrid", check_hybrid)):
            if part in parts:
                async with client_of(sound(), url) as client:
                    await client.clear("all")
                    await check(report, place, client, url)


async def run_one_engine(report, place, parts, servers, prompts, holders, expected, directory):
    """What needs one engine of ours, and LMCache's beside it."""
    few, url, sound = prompts[: len(expected)], servers.url, partial(servers.sound, L1_GIB)
    with ExitStack() as stack:
        async with client_of(sound(), url) as client:
            engine = make_engine(place.model, transfer(url))
            stack.callback(engine.shutdown)
            if "outputs" not in parts:  # which stores these
                for prompt in few:
                    await ask(engine, prompt)
                await forget(engine, client)
        if {"outputs", "slow"} & set(parts):
            with peer(place, directory) as theirs:
                if "outputs" in parts:
                    async with client_of(sound(), url) as client:
                        subjects = [Subject("ours", engine, client), *filter(None, [theirs])]
                        await check_outputs(report, subjects, few, expected)
                if "slow" in parts:
                    if theirs is not None:
                        theirs.cache.set_latency(SLOW_SECONDS)
                    slow = servers.faulty(latency=SLOW_SECONDS, l1_bytes=L1_GIB * 2**30)
                    async with client_of(slow, url) as client:
                        subjects = [Subject("ours", engine, client), *filter(None, [theirs])]
                        await measure_slow(report, subjects, prompts, holders)
                        await measure_scheduler(report, client, url)
        if "resets" in parts:
            async with client_of(sound(), url) as client:
                await check_resets(report, engine, client, few, expected)
        if "failure" in parts:
            async with client_of(servers.faulty(fail_after=PROMPT_CHUNKS + 2), url) as client:
                await check_failure(report, engine, client, few, expected)
        if "aborts" in parts:
            async with client_of(servers.faulty(latency=0.05, l1_bytes=250 * 2**20), url) as client:
                await check_aborts(report, engine, client, few, expected)


def main():
    parser = argparse.ArgumentParser(description="vLLM with the cache, end to end.")
    parser.add_argument("--work", type=Path, default=Place.work, help="where all of it is kept, and made at first")
    parser.add_argument("--model", action="store_true", help="make the models, in the environment")
    parser.add_argument("--inside", action="store_true", help="run in the environment")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"only these: {', '.join(PARTS)}")
    options = parser.parse_args()
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    place = Place(options.work.absolute())
    if options.model:
        place.make_models()
    elif options.inside:
        asyncio.run(run(place, options.parts or PARTS))
        sys.unraisablehook = lambda _: None  # vLLM ends its engine once more as the interpreter ends, and fails
    else:
        place.prepare()
        here = Path(__file__).parent
        command = [place.python, here, "--work", place.work, "--inside", *options.parts]
        environment = {**os.environ, **SETTINGS, "PYTHONPATH": f"{here}:{place.peer}"}
        sys.exit(subprocess.run(command, env=environment).returncode)


if __name__ == "__main__":
    main()
