"""The commands about prompts, the driver and the doctor, as a user runs them."""

import asyncio
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from contract.support import fill, make_layout, make_prompt, make_tokens
from server.programs import ServerProcess, environment, server
from terminal import terminal
from test_cli import complaint, printed, run

from async_cache import connect

TOKENS = ",".join(map(str, make_tokens(4)))
OTHER = make_layout(model="other")
pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[ServerProcess]:
    """A server with four chunks of a prompt in memory and storage, two of which another model has too."""
    with server(tmp_path) as it:
        asyncio.run(store(it.url))
        yield it


async def store(url: str) -> None:
    async with connect(url) as cache:
        await fill(cache, make_prompt(4))
        await fill(cache, make_prompt(2, 9, OTHER, salt="secret"))
        await cache.flush()


def test_list_tells_models_and_salts(served: ServerProcess, tmp_path: Path) -> None:
    rows = printed(tmp_path, "list", "--url", served.url).splitlines()
    assert [row.split()[:1] + row.split()[-1:] for row in rows[1:]] == [["other", "2"], ["model", "4"]]
    told = json.loads(printed(tmp_path, "list", "--url", served.url, "--json", "--model", "other"))
    assert [(it["layout"]["model"], it["salt"], it["chunks"]) for it in told] == [("other", "secret", 2)]


def test_list_tells_chunks_in_pages(served: ServerProcess, tmp_path: Path) -> None:
    wanted = sorted(chunk_hash.hex() for chunk_hash in make_prompt(4).chunk_hashes)
    seen: list[str] = []
    flags = ["--url", served.url, "--chunks", "--model", "model", "-n", "3", "--json"]
    while page := json.loads(printed(tmp_path, "list", *flags, *(["--after", seen[-1]] if seen else []))):
        seen += [chunk["chunk_hash"] for chunk in page]
    assert seen == wanted
    text = printed(tmp_path, "list", "--url", served.url, "--chunks", "-n", "3", "--salt", "")
    assert text.splitlines()[-1] == f"more: --after {wanted[2]}"
    assert "no hash" in complaint(run(tmp_path, "list", "--chunks", "--after", "xyz", "--url", served.url))


def test_explain_tells_where_a_prompt_is_and_why_not(served: ServerProcess, tmp_path: Path) -> None:
    flags = ["--url", served.url, "--model", "model"]
    assert "0-3     0-15    l1" in printed(tmp_path, "explain", TOKENS, *flags)
    printed(tmp_path, "delete", TOKENS, *flags)
    text = printed(tmp_path, "explain", TOKENS, *flags)
    assert "removed" in text and "deleted, " in text and "it was there, and left: deleted" in text
    told = json.loads(printed(tmp_path, "explain", TOKENS, *flags, "--json"))
    assert [(span["state"], span["chunks"]) for span in told["spans"]] == [("removed", 4)]
    assert told["missed"]["removal"] == "deleted"


def test_prefetch_loads_into_memory(served: ServerProcess, tmp_path: Path) -> None:
    flags = ["--url", served.url, "--model", "model"]
    assert printed(tmp_path, "clear", "--url", served.url) == "6 chunks removed\n"
    text = printed(tmp_path, "prefetch", TOKENS + ",1,2,3,4", *flags)
    assert "4 of 5 chunks are cached, 0 of them in memory; it is not known" in text
    assert "4 chunks (16 tokens) in " in text
    told = json.loads(printed(tmp_path, "prefetch", TOKENS, *flags, "--json"))
    assert (told["hits"]["l1_chunks"], told["result"]["chunks"]) == (4, 4)


def test_tokens_come_from_a_file_and_the_layout_too(served: ServerProcess, tmp_path: Path) -> None:
    tokens, layout = tmp_path / "tokens", tmp_path / "layout"
    tokens.write_text(json.dumps(make_tokens(4)))
    root = json.loads(printed(tmp_path, "list", "--url", served.url, "--json", "--model", "model"))[0]
    layout.write_text(json.dumps(root["layout"]))
    told = json.loads(
        printed(tmp_path, "explain", f"@{tokens}", "--layout", str(layout), "--url", served.url, "--json")
    )
    assert [span["state"] for span in told["spans"]] == ["l1"]


def test_clear_asks_before_storage_is_emptied(served: ServerProcess, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "async_cache", "clear", "--all", "--url", served.url]
    with terminal(command, tmp_path, environment()) as shown:
        shown.until(lambda text: "Go on?" in text)
        shown.press(b"n\r")
        assert shown.end() == 1
    assert json.loads(printed(tmp_path, "clear", "--all", "--yes", "--json", "--url", served.url))["chunks"] == 6


def test_what_is_asked_wrongly_is_one_line(served: ServerProcess, tmp_path: Path) -> None:
    flags = ["--url", served.url]
    assert "say which" in complaint(run(tmp_path, "explain", TOKENS, *flags))
    assert "knows no prompts of 'none'" in complaint(run(tmp_path, "explain", TOKENS, "--model", "none", *flags))
    assert complaint(run(tmp_path, "explain", "1,x", "--model", "model", *flags)).startswith("TOKENS: ")
    assert "no-such-file" in complaint(run(tmp_path, "explain", "@no-such-file", *flags))
    broken = tmp_path / "layout"
    broken.write_text('{"model": "m"}')
    assert complaint(run(tmp_path, "explain", "1", "--layout", str(broken), *flags)).startswith("--layout: ")


def test_a_tenant_hears_nothing_of_others(tmp_path: Path) -> None:
    config = tmp_path / "cache.toml"
    config.write_text(
        '[server.tenants.operations]\ntokens = ["token-of-operations"]\n'
        '[server.tenants.acme]\ntokens = ["token-of-acme-number-one"]\nsalts = ["acme"]\n'
    )
    token = tmp_path / "token"
    token.write_text("token-of-acme-number-one")
    with server(tmp_path, config=config) as it:
        asyncio.run(store(it.url))
        flags = ["--url", it.url, "--token-file", str(token)]
        assert json.loads(printed(tmp_path, "list", "--json", *flags)) == []
        assert json.loads(printed(tmp_path, "list", "--chunks", "--json", *flags)) == []
        assert "not for" in complaint(run(tmp_path, "clear", *flags))


def test_bench_drives_a_server_and_leaves_nothing(served: ServerProcess, tmp_path: Path) -> None:
    mix = ["--seconds", "1", "--clients", "2", "--prompts", "4", "--chunks", "2", "--chunk-bytes", "4KiB"]
    told = json.loads(printed(tmp_path, "bench", *mix, "--url", served.url, "--json"))
    assert told["requests"] == told["lookup_seconds"]["count"] > 10
    assert told["failed"] == 0 and told["hit_rate"]["l1"] > 0.2
    assert [it["layout"]["model"] for it in json.loads(printed(tmp_path, "list", "--url", served.url, "--json"))][
        1:
    ] == ["other", "model"]
    stats = json.loads(printed(tmp_path, "status", "--url", served.url, "--json"))
    assert (stats["l1_chunks"], stats["requests"]) == (6, 0)
    text = printed(tmp_path, "bench", *mix, "--url", served.url)
    assert "█" in text and "median" in text


def test_doctor_says_what_to_change(tmp_path: Path) -> None:
    good = run(tmp_path, "doctor", "--l1-bytes", "1MiB", "--l2", f"fs://{tmp_path}/l2?capacity=1MiB", "--json")
    told = json.loads(good.stdout)
    assert good.returncode == 0 and {it["state"] for it in told} <= {"ok", "look"}
    assert any(it["about"] == f"fs://{tmp_path}/l2" and it["state"] == "ok" for it in told)
    bad = run(tmp_path, "doctor", "--l1-bytes", "900TiB", "--l2", "valkey://127.0.0.1:1/0", "--json")
    assert bad.returncode == 1
    found = {it["about"]: it["state"] for it in json.loads(bad.stdout)}
    assert found["memory"] == found["valkey://127.0.0.1:1"] == "bad"
    assert "-> " in run(tmp_path, "doctor", "--l1-bytes", "900TiB", "--l2", "memory://").stdout


def test_shells_complete_commands(tmp_path: Path) -> None:
    taken_at_its_word = {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}  # there may be no shell above a test
    script = printed(tmp_path, "--show-completion", "bash", **taken_at_its_word)
    assert "complete" in script
