"""Commands about prompts and chunks: why one is not cached, what there is, and to fetch or remove it."""

import sys
from collections.abc import Awaitable, Callable
from inspect import Parameter, Signature, signature
from operator import itemgetter
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from async_cache.cli.drawing import count, seconds
from async_cache.cli.terminal import Json, TokenFile, Url, busy, console, print_json, show_bytes, table, with_client
from async_cache.client.client import CacheClient
from async_cache.errors import ConfigError
from async_cache.prompt.layout import ModelLayout, Prompt
from async_cache.protocol.prompts import describe
from async_cache.server.http.explain import Layout
from async_cache.server.http.named import named
from async_cache.values import Deleted, DeletedModel, Explanation, ListedChunk, Missed

Tokens = Annotated[
    str, typer.Argument(metavar="TOKENS", help="Token ids with commas or spaces between, or @FILE with them; @- reads.")
]
Model = Annotated[
    str,
    typer.Option(
        "--model",
        metavar="NAME",
        help="Of this model; its layout is that of the newest prompts. By default, the only one there is.",
    ),
]
LayoutFile = Annotated[
    Path | None,
    typer.Option("--layout", metavar="FILE", help="The layout as `list --json` shows it, if the server knows none."),
]
Salt = Annotated[str, typer.Option("--salt", help="The salt of the prompt: what keeps tenants apart.")]
Adapter = Annotated[str, typer.Option("--adapter", help="The adapter (LoRA) of the prompt.")]
Revision = Annotated[
    str | None,
    typer.Option("--revision", help="Of this revision of the model, '' for none; by default, that of the newest."),
]


def of_a_prompt(work: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """The command that does this about the prompt that its flags say; with True, it prints JSON.

    It has the flags that all such commands have, and those of `work` itself: its parameters that are named.
    """

    def command(
        tokens: Tokens,
        model: Model = "",
        layout: LayoutFile = None,
        salt: Salt = "",
        adapter: Adapter = "",
        revision: Revision = None,
        url: Url = "",
        token_file: TokenFile = None,
        json: Json = False,
        **own: Any,
    ) -> None:
        make = _asked(tokens, model, layout, salt, adapter, revision)

        async def ask(client: CacheClient) -> None:
            await work(client, await make(client), json, **own)

        with_client(url, token_file, ask)

    tokens, *common = list(signature(command).parameters.values())[:-1]
    own = [given for given in signature(work).parameters.values() if given.kind is Parameter.KEYWORD_ONLY]
    parameters = [tokens, *own, *common]
    command.__name__, command.__doc__ = work.__name__, work.__doc__
    command.__signature__ = Signature(  # type: ignore[attr-defined]
        [given.replace(kind=Parameter.POSITIONAL_OR_KEYWORD) for given in parameters], return_annotation=None
    )
    command.__annotations__ = {given.name: given.annotation for given in parameters} | {"return": None}
    return command


@of_a_prompt
async def explain(client: CacheClient, prompt: Prompt, json: bool) -> None:
    """Say where each chunk of a prompt is, or why it is not in the cache. Nothing is loaded, and no token kept."""
    explanation = await client.explain(prompt)
    if json:
        print_json(named(explanation))
    else:
        _print_explanation(explanation)


@of_a_prompt
async def prefetch(client: CacheClient, prompt: Prompt, json: bool) -> None:
    """Load what is cached of a prompt into memory, and let go of it: the next request for it will find it there."""
    begun = client.prefetch(prompt)
    hits = await begun.lookup_done
    if not json:
        found = f"{hits.chunks:,} of {len(prompt):,} chunks are cached, {hits.l1_chunks:,} of them in memory"
        console.print(found + (f"; {_why(hits.missed)}" if hits.missed is not None else ""))
    with busy(f"loading {show_bytes(hits.load_bytes)}", shown=not json):
        result = await begun.load_done
    await client.end_request(begun.request_id)
    if json:
        print_json({"hits": named(hits), "result": named(result)})
        return
    short = f", less than promised: {result.shortfall}" if result.shortfall is not None else ""
    console.print(f"{result.chunks:,} chunks ({result.tokens:,} tokens) in {seconds(result.seconds)}{short}")


@of_a_prompt
async def delete(client: CacheClient, prompt: Prompt, json: bool) -> None:
    """Remove every chunk of a prompt from memory and storage. What builds on it cannot be found any more, either."""
    with busy("deleting", shown=not json):
        deleted = await client.delete(prompt)
    _tell_deleted(deleted, json)


def delete_model(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="The name of the model.")],
    revision: Annotated[str | None, typer.Option("--revision", help="Of this revision only; '' for none.")] = None,
    adapter: Annotated[str | None, typer.Option("--adapter", help="Of this adapter only; '' for none.")] = None,
    salt: Annotated[str | None, typer.Option("--salt", help="Of this salt only; '' for none.")] = None,
    url: Url = "",
    token_file: TokenFile = None,
    json: Json = False,
) -> None:
    """Remove all that is cached of a model, or of one revision or adapter of it, from memory and storage."""

    async def ask(client: CacheClient) -> None:
        with busy("deleting", shown=not json):
            try:
                deleted = await client.delete_model(model, revision=revision, adapter=adapter, salt=salt)
            except ValueError as error:
                raise ConfigError(str(error)) from error
        if json:
            print_json(named(deleted))
            return
        _tell_deleted(deleted, json)
        if deleted.unsure:
            console.print(f"there may be more of it in {', '.join(deleted.unsure)}: not all objects there are known")

    with_client(url, token_file, ask)


def list_chunks(
    model: Annotated[str, typer.Option("--model", metavar="NAME", help="Of this model only.")] = "",
    salt: Annotated[str | None, typer.Option("--salt", help="Of this salt only; '' for none.")] = None,
    chunks: Annotated[bool, typer.Option("--chunks", help="List chunk by chunk, not only how many there are.")] = False,
    backend: Annotated[
        str | None, typer.Option("--backend", metavar="NAME", help="The chunks of this backend, not those in memory.")
    ] = None,
    after: Annotated[str, typer.Option("--after", metavar="HASH", help="Chunks behind this one: the next page.")] = "",
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, max=1000, help="Chunks on a page.")] = 50,
    url: Url = "",
    token_file: TokenFile = None,
    json: Json = False,
) -> None:
    """List what is in a server's memory: the models and salts, with how many chunks each; or the chunks, in pages.

    Of a backend, it lists the chunks: what model and salt they are of is known of those that are in memory, too.
    """
    try:
        hash_after = bytes.fromhex(after) or None
    except ValueError as error:
        raise ConfigError(f"--after: {after!r} is no hash") from error
    if backend is not None and (model or salt is not None):
        raise ConfigError("--backend: it knows chunks by their hashes only: leave --model and --salt out")

    async def ask(client: CacheClient) -> None:
        if not chunks and backend is None:
            roots = [r for r in await client.roots() if model in ("", r[0].model) and salt in (None, r[2])]
            if json:
                print_json([_root(*root) for root in roots])
            else:
                _print_roots(roots)
            return
        with busy("listing", shown=not json):
            which = {"model": model or None, "salt": salt, "backend": backend}
            page = await client.chunks(**which, after=hash_after, limit=limit)
        if json:
            print_json([named(chunk) | {"chunk_hash": chunk.chunk_hash.hex()} for chunk in page])
        else:
            _print_chunks(page, limit, "memory" if backend is None else "size")

    with_client(url, token_file, ask)


def clear(
    everything: Annotated[bool, typer.Option("--all", help="Storage as well: all of it is gone then.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask before storage is emptied.")] = False,
    url: Url = "",
    token_file: TokenFile = None,
    json: Json = False,
) -> None:
    """Empty a server's memory of what is in storage; with --all, storage too."""
    if everything and not yes:
        typer.confirm("All that is cached will be gone, in memory and in storage. Go on?", abort=True, err=True)

    async def ask(client: CacheClient) -> None:
        with busy("clearing", shown=not json):
            deleted = await client.clear("all" if everything else "l1")
        _tell_deleted(deleted, json)

    with_client(url, token_file, ask)


# What is asked for.


def _asked(
    tokens: str, model: str, layout: Path | None, salt: str, adapter: str, revision: str | None
) -> Callable[[CacheClient], Awaitable[Prompt]]:
    """What makes the prompt that the flags say, once there is a server to ask for the layout. Raises ConfigError."""
    ids = _ids(tokens)
    given = _read_layout(layout) if layout is not None else None
    if given is not None and revision not in (None, given.revision):
        raise ConfigError(f"--revision: that of the layout is {given.revision!r}")

    async def make(client: CacheClient) -> Prompt:
        try:
            return (given or await _known_layout(client, model, salt, revision)).prompt(ids, salt=salt, adapter=adapter)
        except (ValueError, TypeError) as error:
            raise ConfigError(str(error)) from error

    return make


async def _known_layout(client: CacheClient, model: str, salt: str, revision: str | None) -> ModelLayout:
    """The layout of the newest prompts of a model that the server knows, those of the same salt before others.

    A model need not be named that is the only one, or the only one with chunks in memory.
    """
    roots = await client.roots()
    models = sorted({layout.model for layout, *_ in roots})
    if not model and len(models) > 1:
        cached = sorted({layout.model for layout, _, _, chunks in roots if chunks})
        model = cached[0] if len(cached) == 1 else ""
    if not model and len(models) > 1:
        raise ConfigError(f"--model: the server has {', '.join(models)}: say which")
    known = [
        (its_salt != salt, layout)
        for layout, _, its_salt, _ in roots
        if model in ("", layout.model) and revision in (None, layout.revision)
    ]
    if not known:
        which = f"of {model!r}" if model else "at all"
        which += f" of revision {revision!r}" if revision is not None else ""
        raise ConfigError(f"--model: the server knows no prompts {which}: give the layout with --layout")
    return min(known, key=itemgetter(0))[1]


def _read_layout(path: Path) -> ModelLayout:
    try:
        return msgspec.json.decode(path.read_text("utf-8-sig"), type=Layout).made()
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"--layout: {path}: {error}") from error


def _ids(tokens: str) -> list[int]:
    text = tokens
    if tokens.startswith("@"):
        try:
            text = sys.stdin.read() if tokens == "@-" else Path(tokens[1:]).read_text("utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{tokens}: {error}") from error
    try:
        return [int(word) for word in text.replace(",", " ").replace("[", " ").replace("]", " ").split()]
    except ValueError as error:
        raise ConfigError(f"TOKENS: {str(error).rpartition(': ')[2]} is no token id") from error


# What is said.


def _root(layout: ModelLayout, adapter: str, salt: str, chunks: int) -> dict[str, Any]:
    return {"layout": named(describe(layout)), "adapter": adapter, "salt": salt, "chunks": chunks}


def _print_roots(roots: list[tuple[ModelLayout, str, str, int]]) -> None:
    rows = table("model", "revision", "adapter", "salt", "chunk", "chunks in memory")
    for layout, adapter, salt, chunks in roots:
        size = f"{layout.chunk_tokens} tokens, {show_bytes(sum(layout.block_bytes))}"
        rows.add_row(layout.model, layout.revision, adapter, salt, size, f"{chunks:,}")
    console.print(rows if roots else "no prompt was stored or loaded yet")


def _print_chunks(page: list[ListedChunk], limit: int, size: str) -> None:
    rows = table("chunk", "model", "salt", size, "leases", "not written")
    for chunk in page:
        sizes = show_bytes(chunk.room_bytes), f"{chunk.leases:,}", f"{chunk.unwritten:,}"
        rows.add_row(chunk.chunk_hash.hex(), chunk.model, chunk.salt, *sizes)
    console.print(rows if page else "no chunks")
    if len(page) == limit:
        console.print(f"\nmore: --after {page[-1].chunk_hash.hex()}")


def _print_explanation(explanation: Explanation) -> None:
    rows = table("chunks", "tokens", "where", "why")
    of_one = explanation.tokens // explanation.chunks if explanation.chunks else 0
    for span in explanation.spans:
        begin, end = span.start_chunk, span.start_chunk + span.chunks
        where = f"{span.state.value} {span.backend or ''}".strip()
        ago = f", {seconds(span.seconds_ago)} ago" if span.seconds_ago is not None else ""
        why = f"{span.removal.value}{ago}" if span.removal is not None else ""
        rows.add_row(f"{begin:,}-{end - 1:,}", f"{begin * of_one:,}-{end * of_one - 1:,}", where, why)
    console.print(rows if explanation.spans else "the prompt is shorter than a chunk")
    if explanation.missed is not None:
        console.print(_why(explanation.missed))
    for other in explanation.elsewhere:
        place = f"{other.model} {other.revision} {other.adapter}".strip()
        console.print(
            f"{other.chunks:,} chunks of the same tokens are there as {place}: other {', '.join(other.differs)}"
        )


def _why(missed: Missed) -> str:
    if missed.removal is not None:
        why = f"it was there, and left: {missed.removal.value}"
    elif missed.diverges:
        why = "what is before it is known, and goes on otherwise"
    else:
        why = f"it is {'not known' if missed.state.value == 'unknown' else missed.state.value}"
    return f"the first missing chunk: {why}"


def _tell_deleted(deleted: Deleted | DeletedModel, json: bool) -> None:
    if json:
        print_json(named(deleted))
        return
    leased = deleted.leased
    later = f"; {count(leased)} of them are in use, and leave when they are released" if leased else ""
    console.print(f"{deleted.chunks:,} chunks removed{later}")
