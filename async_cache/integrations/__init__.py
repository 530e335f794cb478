"""Serving engines that use the cache; each module imports its engine, and is imported when it is used.

vllm          vLLM's connector
vllm_layouts  what of a vLLM is cached: layouts, and where they are in its workers
vllm_reports  what it tells its engine: where chunks are, what was hit
sglang        SGLang's HiCache
asking        how many of very many pages there are, asked in parts
transformers  transformers: a prompt is prefilled through the cache
segments      transformers: passages that stand in many prompts are not computed again
blended       KV of which parts were computed elsewhere
rotary        keys that were computed at one position, at another
fp8           KV in eight bits, a layout of its own, for any of them that has torch
paged         what engines with pages have in common
optional      a client for an engine that goes on without it
"""
