"""Commands about what is kept: to keep a prompt for a while, to see what is kept, and to load one beforehand."""

from typing import Annotated

import typer

from async_cache.cli.drawing import seconds
from async_cache.cli.prompts import of_a_prompt
from async_cache.cli.terminal import Json, TokenFile, Url, busy, console, print_json, table, with_client
from async_cache.client.client import CacheClient
from async_cache.errors import ConfigError
from async_cache.prompt.layout import Prompt
from async_cache.server.http.named import named
from async_cache.values import Retained


@of_a_prompt
async def retain(
    client: CacheClient,
    prompt: Prompt,
    json: bool,
    *,
    keep: Annotated[int | None, typer.Option("--tokens", metavar="N", help="Only the first so many tokens.")] = None,
    ttl: Annotated[float, typer.Option("--ttl", metavar="SECONDS", help="For so long; 0 ends it.")] = 300.0,
) -> None:
    """Keep what is cached of a prompt for a while, and say how much that is: it is not evicted before its time."""
    try:
        kept = await client.retain(prompt, tokens=keep, ttl_seconds=ttl)
    except (ValueError, TypeError) as error:
        raise ConfigError(str(error)) from error
    if json:
        print_json(named(kept))
    else:
        console.print(_sentence(kept))


def retained(url: Url = "", token_file: TokenFile = None, json: Json = False) -> None:
    """List what is kept, the first to expire first."""

    async def ask(client: CacheClient) -> None:
        kept = await client.retained()
        if json:
            print_json([named(one) for one in kept])
            return
        rows = table("model", "revision", "adapter", "salt", "chunks", "tokens", "for", "clipped")
        for one in kept:
            names = one.model, one.revision, one.adapter, one.salt
            rows.add_row(
                *names, f"{one.chunks:,}", f"{one.tokens:,}", seconds(one.expires_in_seconds), one.clipped or ""
            )
        console.print(rows if kept else "nothing is kept")

    with_client(url, token_file, ask)


@of_a_prompt
async def warm(client: CacheClient, prompt: Prompt, json: bool) -> None:
    """Load what is cached of a prompt into memory, where the next request for it finds it."""
    with busy("loading", shown=not json):
        result = await client.warm(prompt)
    if json:
        print_json(named(result))
    else:
        of = f"{result.chunks:,} of {len(prompt):,} chunks ({result.tokens:,} tokens)"
        console.print(f"{of} are in memory, after {seconds(result.seconds)}")


def _sentence(kept: Retained) -> str:
    if not kept.chunks and kept.clipped is None:
        return "nothing of it is kept any more"
    clipped = f", less than was asked for: {kept.clipped.value}" if kept.clipped is not None else ""
    return f"{kept.chunks:,} chunks ({kept.tokens:,} tokens) are kept for {seconds(kept.expires_in_seconds)}{clipped}"
