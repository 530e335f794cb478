"""The commands about prompts, the driver and the doctor, as a user runs them."""

import asyncio
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from subprocess import PIPE

import pytest
from contract.support import fill, make_layout, make_prompt, make_tokens
from server.programs import ServerProcess, environment, server
from terminal import terminal
from test_cli import complaint, printed, run

from async_cache import connect
from async_cache.cli import doctor

TOKENS = ",".join(map(str, make_tokens(4)))
OTHER = make_layout(model="other")
OTHER_TOKENS = ",".join(map(str, make_tokens(2, 9)))
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


def test_list_tells_what_a_backend_has(served: ServerProcess, tmp_path: Path) -> None:
    flags = ["--url", served.url, "--backend", "memory"]
    printed(tmp_path, "delete", TOKENS, "--url", served.url, "--model", "model")
    printed(tmp_path, "clear", "--url", served.url)
    wanted = sorted(chunk_hash.hex() for chunk_hash in make_prompt(2, 9, OTHER, salt="secret").chunk_hashes)
    told = json.loads(printed(tmp_path, "list", *flags, "--json"))
    assert [(it["chunk_hash"], it["model"], it["room_bytes"]) for it in told] == [(h, "", 16) for h in wanted]
    printed(tmp_path, "prefetch", OTHER_TOKENS, "--url", served.url, "--model", "other", "--salt", "secret")
    first = printed(tmp_path, "list", *flags, "-n", "1").splitlines()
    assert first[1].split() == [wanted[0], "other", "secret", "16", "B", "0", "0"]
    assert first[-1] == f"more: --after {wanted[0]}"
    assert wanted[1] in printed(tmp_path, "list", *flags, "--after", wanted[0])
    assert "no backend 'far'" in complaint(run(tmp_path, "list", "--url", served.url, "--backend", "far"))
    assert "--model and --salt" in complaint(run(tmp_path, "list", *flags, "--salt", "secret"))


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
    assert "4 of 5 chunks are cached, 0 of them in memory; the first missing chunk: it is not known" in text
    assert "4 chunks (16 tokens) in " in text
    told = json.loads(printed(tmp_path, "prefetch", TOKENS + ",1,2,3,4", *flags, "--json"))
    assert (told["hits"]["l1_chunks"], told["result"]["chunks"]) == (4, 4)
    assert told["hits"]["missed"] == {"state": "unknown", "removal": None, "diverges": False}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_tokens_come_from_a_file_and_the_layout_too(served: ServerProcess, tmp_path: Path, encoding: str) -> None:
    tokens, layout = tmp_path / "tokens", tmp_path / "layout"
    tokens.write_text(json.dumps(make_tokens(4)), encoding)
    root = json.loads(printed(tmp_path, "list", "--url", served.url, "--json", "--model", "model"))[0]
    layout.write_text(json.dumps(root["layout"]), encoding)
    told = json.loads(
        printed(tmp_path, "explain", f"@{tokens}", "--layout", str(layout), "--url", served.url, "--json")
    )
    assert [span["state"] for span in told["spans"]] == ["l1"]


def test_a_model_whose_chunks_were_removed_is_not_asked_about(served: ServerProcess, tmp_path: Path) -> None:
    printed(tmp_path, "delete-model", "other", "--url", served.url)
    told = json.loads(printed(tmp_path, "explain", TOKENS, "--url", served.url, "--json"))
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
    assert complaint(run(tmp_path, "explain", "1,x", "--model", "model", *flags)) == "TOKENS: 'x' is no token id"
    assert complaint(run(tmp_path, "bench", "--chunk-bytes", "x", *flags)).startswith(
        "--chunk-bytes: 'x' is not a size"
    )
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
        assert "not for" in complaint(run(tmp_path, "list", "--backend", "memory", *flags))


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


def test_doctor_knows_a_mount_whatever_its_path_is_made_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mounts, there = tmp_path / "mounts", Path(os.fsdecode(b"/data of\xff"))
    mounts.write_bytes(b"/dev/a / ext4 rw 0 0\nhost:/b /data\\040of\xff nfs4 rw,soft 0 0\n")
    monkeypatch.setattr(doctor, "_MOUNTS", mounts)
    assert doctor._mount(there / "store") == ("nfs4", "rw,soft")
    assert doctor._mount(Path("/data")) == ("ext4", "rw")


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
    unknown = run(tmp_path, "doctor", "--l1-bytes", "1MiB", "--l2", "what://user:secret@x", "--json")
    assert unknown.returncode == 1 and "secret" not in unknown.stdout
    assert "unknown scheme 'what'" in next(
        it["found"] for it in json.loads(unknown.stdout) if it["about"].startswith("what")
    )


@pytest.mark.parametrize(
    ("where", "why"), [("/proc/nobody/makes/this", "cannot be written to"), ("/etc/hostname/kv", "is no directory")]
)
def test_doctor_goes_on_where_a_directory_cannot_be_used(where: str, why: str, tmp_path: Path) -> None:
    done = run(tmp_path, "doctor", "--l1-bytes", "1MiB", "--l2", f"fs://{where}", "--json")
    assert (done.returncode, done.stderr) == (1, "")
    told = {it["about"]: it for it in json.loads(done.stdout)}
    assert told[f"fs://{where}"]["state"] == "bad" and why in told[f"fs://{where}"]["found"]
    assert "packages" in told


def test_doctor_tells_an_address_that_is_taken_from_one_that_can_not_be(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        busy = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        where = busy, "unix:///proc/nobody/makes/this"
        listen = [word for url in where for word in ("--listen", url)]
        done = run(tmp_path, "doctor", "--l1-bytes", "1MiB", "--l2", "fs:///proc/nobody", *listen, "--json")
    assert done.returncode == 1
    told = {it["about"]: (it["state"], it["change"]) for it in json.loads(done.stdout)}
    assert told[busy] == ("look", "A server may be running already: async-cache ping.")
    assert told[where[1]] == ("bad", "Take another one.")
    assert told["fs:///proc/nobody"] == ("bad", "Name another one."), "nobody can own what is there"


@pytest.mark.parametrize(
    ("words", "wanted"),
    [("ba", {"backend"}), ("backend re", {"remove"}), ("list --ch", {"--chunks"}), ("serve --log-f", {"--log-format"})],
)
def test_a_shell_completes_commands_and_flags(words: str, wanted: set[str], tmp_path: Path) -> None:
    """What bash does for a word that is begun, with the script that `--show-completion` prints."""
    taken_at_its_word = {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}  # there may be no shell above a test
    program = Path(sys.executable).with_name("async-cache")
    script = subprocess.run(
        [program, "--show-completion", "bash"],
        env=environment() | taken_at_its_word,
        stdout=PIPE,
        text=True,
        check=True,
    ).stdout
    count = len(words.split())
    asks = f"""
        {script}
        complete -p async-cache > /dev/null || exit 1
        COMP_WORDS=({program} {words}); COMP_CWORD={count}
        _async_cache_completion {program}
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    told = subprocess.run(["bash", "-c", asks], env=environment(), stdout=PIPE, text=True, check=True).stdout
    assert set(told.split()) == wanted


def test_what_is_kept_is_said_listed_and_let_go(served: ServerProcess, tmp_path: Path) -> None:
    flags = ["--url", served.url]
    of_model = [*flags, "--model", "model"]
    assert "nothing is kept" in printed(tmp_path, "retained", *flags)
    told = json.loads(printed(tmp_path, "retain", TOKENS, "--ttl", "3600", *of_model, "--json"))
    assert (told["chunks"], told["clipped"], told["model"]) == (4, None, "model")
    more = ",".join(map(str, make_tokens(6)))
    assert "4 chunks (16 tokens) are kept" in printed(tmp_path, "retain", more, *of_model)
    assert "not_stored" in printed(tmp_path, "retained", *flags)
    assert [it["chunks"] for it in json.loads(printed(tmp_path, "retained", *flags, "--json"))] == [4, 4]
    assert "nothing of it is kept" in printed(tmp_path, "retain", more, "--ttl", "0", *of_model)
    assert len(json.loads(printed(tmp_path, "retained", *flags, "--json"))) == 1
    assert "tokens must be" in complaint(run(tmp_path, "retain", TOKENS, "--tokens", "999", *of_model))
    assert "ttl_seconds" in complaint(run(tmp_path, "retain", TOKENS, "--ttl", "-1", *of_model))
    printed(tmp_path, "clear", *flags)
    assert "4 chunks (16 tokens)" in printed(tmp_path, "warm", TOKENS, *of_model)


def test_a_prompt_is_asked_about_by_its_revision(served: ServerProcess, tmp_path: Path) -> None:
    async def store_again() -> None:
        async with connect(served.url) as cache:
            await fill(cache, make_prompt(2, layout=make_layout(revision="new")))

    asyncio.run(store_again())
    flags = [TOKENS, "--url", served.url, "--model", "model"]
    told = {
        revision: json.loads(run(tmp_path, "explain", *flags, *given, "--json").stdout)["spans"][0]["chunks"]
        for revision, given in (("newest", []), ("new", ["--revision", "new"]), ("none", ["--revision", ""]))
    }
    assert told == {"newest": 2, "new": 2, "none": 4}
    assert run(tmp_path, "warm", *flags).stdout.startswith("2 of 4 chunks (8 tokens) are in memory, after ")
    assert "of revision 'old'" in complaint(run(tmp_path, "explain", *flags, "--revision", "old"))


def test_names_are_whole_in_a_narrow_terminal(tmp_path: Path) -> None:
    store = tmp_path / ("a" * 60)
    with server(tmp_path, l2=[f"fs://{store}"]) as served:
        for command in (["backend", "list"], ["status"]):
            program = [sys.executable, "-m", "async_cache", *command, "--url", served.url]
            with terminal(program, tmp_path, environment(), columns=60) as screen:
                assert screen.end() == 0
                assert "…" not in screen.text and screen.text.count("a") > 60
