"""What has to hold: the same outputs with the cache, with storage that fails, and nothing that is left behind."""

import asyncio
import random
import statistics
import subprocess
import sys

from engine import CHUNK_TOKENS, PROMPT_CHUNKS, Answer, ask, forget
from environment import ROOT
from report import in_ms

ABORTED_REQUESTS = 200
TIMED_ROUNDS = 3
RUNNING_TOKENS = 400  # of an answer that is not there yet when the caches are reset


async def check_tests(report):
    """Those of the connector need vLLM: here it is."""
    tests = ["-q", "-W", "ignore::DeprecationWarning", ROOT / "tests" / "integrations" / "test_vllm.py"]
    outcome = await asyncio.to_thread(subprocess.run, [sys.executable, "-m", "pytest", *tests], cwd=ROOT)
    report.check(outcome.returncode == 0, "the connector's own tests pass")


async def check_outputs(report, subjects, prompts, expected):
    """The time to the first token of the same prompts, in turns. What is not ours is not checked, but told."""
    times = {(kind, s.name): [] for kind in ("computed", "L1 hit", "L2 hit") for s in subjects}
    whole = PROMPT_CHUNKS * CHUNK_TOKENS
    for prompt, tokens in zip(prompts, expected, strict=True):
        for subject in subjects:
            cold = await ask(subject.engine, prompt)
            if subject.name == "ours":
                report.check(cold.tokens == tokens and not cold.cached_tokens, "computed: as without the cache")
            times["computed", subject.name].append(cold.first_token_seconds)
        for kind in ("L1 hit", "L2 hit") * TIMED_ROUNDS:
            for subject in subjects:
                await subject.forget("l1" if kind == "L2 hit" else None)
                warm = await ask(subject.engine, prompt)
                if subject.name == "ours":
                    report.check(warm.tokens == tokens, f"{kind}: the same output as without the cache")
                    report.check(warm.cached_tokens == whole, f"{kind}: all whole chunks are reused")
                elif warm.tokens != tokens or warm.cached_tokens != whole:
                    print(f"{subject.name}, {kind}: {warm.cached_tokens} tokens of {whole} reused", flush=True)
                times[kind, subject.name].append(warm.first_token_seconds)
        for subject in subjects:
            await subject.forget()
    for (kind, name), seconds in times.items():
        fastest = f"{in_ms(statistics.median(seconds))} (at best {in_ms(min(seconds))})"
        report.figure(kind, name, fastest, "LMCache's" if "hit" in kind else "")


async def check_failure(report, engine, client, prompts, expected):
    """The first load passes, so that the next are expected to be short, and get blocks before they fail."""
    await forget(engine, client, "l1")
    first = await ask(engine, prompts[0])
    report.check(first.tokens == expected[0] and first.cached_tokens == PROMPT_CHUNKS * CHUNK_TOKENS, "the disk lives")
    for prompt, tokens in list(zip(prompts, expected, strict=True))[1:3]:
        answer = await ask(engine, prompt)
        report.check(answer.tokens == tokens, "the disk dies: the right output")


async def check_resets(report, engine, client, prompts, expected):
    """A pause and a reset, each while a request runs that has saved chunks."""
    whole = PROMPT_CHUNKS * CHUNK_TOKENS

    async def pause():
        await engine.pause_generation(mode="keep", clear_cache=True)  # it raises where the reset fails

    async def reset():
        done = await engine.reset_prefix_cache(reset_running_requests=True, reset_connector=True)
        report.check(done, "reset: it is done")

    for name, way in (("pause", pause), ("reset", reset)):
        for prompt in prompts:
            await ask(engine, prompt)
        await forget(engine, client)
        answer = Answer()
        running = asyncio.create_task(ask(engine, prompts[0], tokens=RUNNING_TOKENS, answer=answer))
        await answer.begun.wait()
        await way()
        report.check(not running.done(), f"{name}: a request runs meanwhile")
        left = await count_stored(client)
        report.check(not left, f"{name}: the server is empty after it", f"{left} left")
        if name == "pause":
            await engine.resume_generation()
        went_on = await running
        report.check(went_on.tokens[: len(expected[0])] == expected[0], f"{name}: the request goes on, with its output")
        await forget(engine, client)
        for cached in (0, whole):
            found = await ask(engine, prompts[1])
            right = found.tokens == expected[1] and found.cached_tokens == cached
            report.check(right, f"{name}: of another prompt {cached} tokens are reused then", str(found.cached_tokens))
            await forget(engine, client)


async def count_stored(client):
    """The chunks in memory, and the objects in storage."""
    stats = await client.stats()
    return stats.l1_chunks + sum(usage.objects for usage in stats.backends.values())


async def check_aborts(report, engine, client, prompts, expected):
    chance = random.Random(5)
    known = {tuple(prompt): tokens for prompt, tokens in zip(prompts, expected, strict=True)}
    counts = {"answered": 0, "aborted": 0}
    room = asyncio.Semaphore(12)

    async def one():
        prompt = chance.choice(prompts)
        if chance.random() < 0.3:  # one that is not stored yet, behind chunks that are
            prompt = [
                *prompt[: -chance.randrange(30, 600)],
                *chance.choices(range(1000, 40_000), k=chance.randrange(300)),
            ]
        patience = chance.choice((None, None, 0.002, 0.02, 0.1, 0.5, 2.0))
        async with room:
            try:
                async with asyncio.timeout(patience):
                    answer = await ask(engine, prompt, tokens=chance.choice((1, 4)))
            except TimeoutError:
                counts["aborted"] += 1
                return
        counts["answered"] += 1
        tokens = known.get(tuple(prompt), answer.tokens)
        assert tokens[: len(answer.tokens)] == answer.tokens, "an output has changed"
        if chance.random() < 0.1:
            await engine.reset_prefix_cache()

    await asyncio.gather(*(one() for _ in range(ABORTED_REQUESTS)))
    report.check(
        sum(counts.values()) == ABORTED_REQUESTS,
        f"{ABORTED_REQUESTS} requests, aborted at random, all end",
        str(counts),
    )
    await client.flush()
    for _ in range(100):
        stats = await client.stats()
        held = (stats.requests, stats.leases, stats.reserved_bytes, stats.quarantined_bytes)
        if not any(held):
            break
        await asyncio.sleep(0.1)
    report.check(not any(held), "the server holds no record, lease or reservation after them", str(held))
    report.check(not stats.swept_results + stats.swept_leases + stats.swept_reservations, "nothing had to be swept")
