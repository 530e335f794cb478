"""What others and the scheduler pay for requests whose storage is slow."""

import asyncio
import random
import statistics
import time
from dataclasses import dataclass
from types import SimpleNamespace

from engine import CHUNK_TOKENS, Answer, ask
from report import in_ms

SLOW_SECONDS = 1.0
SLOW_REQUESTS = (4, 8, 16)
SLOW_CHUNKS = 2
SLOW_ROUNDS = 5
OTHER_REQUESTS, OTHER_TOKENS = 12, 100
HELD_ANSWER_TOKENS = 480
WAITING_REQUESTS = 200


@dataclass
class Turn:
    """Seconds to the first token: the mean of the others without the slow ones and beside them, and the slow ones'."""

    alone: float
    beside: float
    slow: list[float]

    @property
    def ratio(self):
        return self.beside / self.alone


async def measure_slow(report, subjects, prompts, holders):
    """The time to the first token of short requests, alone and beside long ones whose storage takes a second.

    Both are measured in turns, and once more with most of the engine's blocks held by requests that go on.
    """
    chance = random.Random(7)
    prompts = [prompt[: SLOW_CHUNKS * CHUNK_TOKENS + 20] for prompt in prompts]
    for subject in subjects:
        for prompt in (*prompts, *holders):
            await ask(subject.engine, prompt, tokens=1)
        await subject.forget()
    for held, where in ((), ""), (holders, ", 80 % of the blocks held"):
        turns = {(subject.name, count): [] for count in SLOW_REQUESTS for subject in subjects}
        for _ in range(SLOW_ROUNDS):
            for subject in subjects:
                alone, _ = await _beside(report, subject, [], held, chance)
                for count in SLOW_REQUESTS:
                    beside, slow = await _beside(report, subject, prompts[:count], held, chance)
                    turns[subject.name, count].append(Turn(alone, beside, slow))
        for (name, count), taken in turns.items():
            alone, beside, ratio = (
                statistics.median(getattr(turn, figure) for turn in taken) for figure in ("alone", "beside", "ratio")
            )
            others = f"{ratio:.2f} of alone ({in_ms(beside)}, {in_ms(alone)})"
            report.figure(f"others, {count} slow beside{where}", name, others, "1.10")
            slow = in_ms(statistics.median(seconds for turn in taken for seconds in turn.slow))
            report.figure(f"the slow ones, {count} slow beside{where}", name, slow)
            print(f"by turn: {[round(turn.ratio, 2) for turn in taken]}", flush=True)


async def _beside(report, subject, prompts, held, chance):
    """Ask for slow ones, and for others while they wait: the mean time of these, and the slow ones' own."""
    engine = subject.engine
    await subject.forget("l1")
    answers = [Answer() for _ in held]
    holding = [
        asyncio.create_task(ask(engine, prompt, tokens=HELD_ANSWER_TOKENS, answer=answer))
        for prompt, answer in zip(held, answers, strict=True)
    ]
    for answer in answers:
        await answer.begun.wait()
    waiting = [asyncio.create_task(ask(engine, prompt, tokens=1)) for prompt in prompts]
    await asyncio.sleep(0.05)
    others = [
        await ask(engine, chance.choices(range(1000, 40_000), k=OTHER_TOKENS), tokens=4) for _ in range(OTHER_REQUESTS)
    ]
    slow = await asyncio.gather(*waiting)
    if any(task.done() for task in holding):
        print(f"{subject.name}: the blocks were not held to the end", flush=True)
    for task in holding:
        task.cancel()
    await asyncio.gather(*holding, return_exceptions=True)
    short = [answer for answer in slow if answer.cached_tokens != SLOW_CHUNKS * CHUNK_TOKENS]
    if subject.name == "ours":
        report.check(not short, "slow requests are loaded, not computed", f"{len(slow)} of them")
    elif short:
        print(f"{subject.name}: of {len(slow)} slow requests, {len(short)} were not loaded as a whole", flush=True)
    mean = statistics.mean(answer.first_token_seconds for answer in others)
    return mean, [answer.first_token_seconds for answer in slow]


async def measure_scheduler(report, client, url):
    """What a step costs the scheduler for each request whose load has not ended."""
    from async_cache import BlockingClient, ModelLayout, ObjectGroup
    from async_cache.integrations.optional import OptionalClient
    from async_cache.integrations.paged import Geometry, PagedScheduler

    layout = ModelLayout("toy", (ObjectGroup((2, 8, 4), "float16"),), chunk_tokens=4)
    tokens = list(range(9))
    async with client.store(layout.prompt(tokens)) as writer:
        for chunk in writer:
            chunk.commit()
    await client.flush()
    await client.clear("l1")
    requests = [
        SimpleNamespace(request_id=f"waits-{n}", all_token_ids=tokens, num_tokens=9, num_preemptions=0)
        for n in range(WAITING_REQUESTS)
    ]

    def run():
        scheduler = PagedScheduler(
            OptionalClient(lambda: BlockingClient(url)), Geometry(layout, ()), threshold_seconds=0.0
        )
        for request in requests:
            scheduler.add(request, {}, 0, load=True)
        time.sleep(0.3)
        steps, answers, until = [], set(), time.perf_counter() + 0.3
        while (began := time.perf_counter()) < until:
            answers.update([scheduler.match(request, 0) for request in requests])
            scheduler.step({}, lambda name: None)
            steps.append((time.perf_counter() - began) / len(requests))
        assert answers == {(None, False)}, "these were to wait"
        for request in requests:
            scheduler.finish(request.request_id)
        scheduler.close()
        return statistics.median(steps)

    seconds = await asyncio.to_thread(run)
    what = f"the scheduler's time a step and waiting request, {WAITING_REQUESTS} of them"
    report.figure(what, "ours", f"{seconds * 1e6:.2f} us", "1.5 us")
