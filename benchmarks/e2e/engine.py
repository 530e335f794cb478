"""An engine, what is asked of it, and the cache that it uses."""

import asyncio
import time
from dataclasses import dataclass

CHUNK_TOKENS = 256
PROMPT_CHUNKS = 4
PROMPT_TOKENS = PROMPT_CHUNKS * CHUNK_TOKENS + 20
ANSWER_TOKENS = 16
BLOCKS = 110  # of 128 tokens
HOLDERS = 3  # requests that run on and on, with 88 blocks between them
HOLDER_TOKENS = 3610


def transfer(url, role="kv_both", chunk_tokens=CHUNK_TOKENS, model="SmolLM2-135M"):
    """vLLM's `kv_transfer_config`."""
    return {
        "kv_connector": "AsyncCacheConnector",
        "kv_role": role,
        "kv_connector_module_path": "async_cache.integrations.vllm",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"url": url, "chunk_tokens": chunk_tokens, "model": model},
    }


def make_engine(model, transfer=None, **more):
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    return AsyncLLM.from_engine_args(
        AsyncEngineArgs(
            model=str(model),
            dtype="float32",
            max_model_len=4096,
            max_num_seqs=32,
            num_gpu_blocks_override=BLOCKS,
            enforce_eager=True,
            gpu_memory_utilization=0.3,  # of the memory of this machine, which has other users
            kv_transfer_config=transfer,
            **more,
        )
    )


class Answer:
    """Of one request: its tokens, how many of the prompt were not computed, and when the first token came."""

    def __init__(self):
        self.tokens, self.cached_tokens, self.first_token_seconds = (), 0, None
        self.begun = asyncio.Event()


_numbers = iter(range(10**9))


async def ask(engine, prompt, *, tokens=ANSWER_TOKENS, answer=None, texts=True):
    from vllm import SamplingParams

    answer, began = answer or Answer(), time.perf_counter()
    parameters = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, detokenize=texts)
    async for output in engine.generate({"prompt_token_ids": prompt}, parameters, f"request-{next(_numbers)}"):
        if answer.first_token_seconds is None:
            answer.first_token_seconds = time.perf_counter() - began
            answer.begun.set()
        answer.tokens, answer.cached_tokens = tuple(output.outputs[0].token_ids), output.num_cached_tokens or 0
    return answer


def read_prompts(model, count):
    """Long prompts that begin differently, from the documentation of Python's standard library, and longer ones."""
    from pydoc_data.topics import topics

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    text = "\n".join(topics[name] for name in sorted(topics))
    tokens = tokenizer(text)["input_ids"]
    longer = tokens[count * PROMPT_TOKENS :]
    return (
        [tokens[n * PROMPT_TOKENS : (n + 1) * PROMPT_TOKENS] for n in range(count)],
        [longer[n * HOLDER_TOKENS : (n + 1) * HOLDER_TOKENS] for n in range(HOLDERS)],
    )


async def forget(engine, cache=None, tier=None):
    """What the engine has, once nothing is saved from it any more, and what the cache has in one tier."""
    async with asyncio.timeout(30):
        while not await engine.reset_prefix_cache():  # noqa: ASYNC110  # vLLM has no event for it
            await asyncio.sleep(0.02)
    if cache is not None:
        await cache.flush()
        if tier is not None:
            await cache.clear(tier)


@dataclass
class Subject:
    """A cache in an engine: `cache` has `flush()` and `clear(tier)`."""

    name: str
    engine: object
    cache: object

    async def forget(self, tier=None):
        await forget(self.engine, self.cache, tier)
