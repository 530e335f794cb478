"""The command line, as a user runs it: what it says, where, and with which exit code. Never a traceback."""

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from distribution import BACKEND, install

from async_cache import CacheConfig, CacheStats, ObjectKey, ServerConfig, __version__
from async_cache.l2.urls.registry import from_url

COMMAND = [sys.executable, "-m", "async_cache"]
SECONDS = 100
TOKENS = ["token-of-operations", "token-of-acme-number-one", "token-of-acme-number-two"]

FLAGS = {
    "serve": [
        *("--config", "-c", "--listen", "--l1-bytes", "--l2", "--quota", "--record", "--log-level", "--log-format"),
        "--help",
    ],
    "ping": ["--url", "--token-file", "--count", "-n", "--json", "--help"],
    "status": ["--url", "--token-file", "--json", "--help"],
    "config": ["--config", "-c", "--listen", "--l1-bytes", "--l2", "--json", "--help"],
    "reload": ["--url", "--token-file", "--json", "--help"],
    "backend add": ["--position", "--url", "--token-file", "--json", "--help"],
    "backend drain": ["--url", "--token-file", "--json", "--help"],
    "backend remove": ["--url", "--token-file", "--json", "--help"],
    "backend list": ["--url", "--token-file", "--json", "--help"],
    "copy": ["--json", "--help"],
    "replay": [
        "--capacity",
        "--policy",
        "--bytes-per-token",
        "--measured",
        "--outputs",
        "--no-outputs",
        "--plot",
        *("--timed", "--pace", "--at-once", "--salt", "--url", "--token-file"),
        "--json",
        "--help",
    ],
    "size": ["--capacity", "--policy", "--kv-dtype", "--plot", "--json", "--help"],
    "explain": [
        "--model",
        "--layout",
        "--revision",
        "--salt",
        "--adapter",
        "--url",
        "--token-file",
        "--json",
        "--help",
    ],
    "prefetch": [
        "--model",
        "--layout",
        "--revision",
        "--salt",
        "--adapter",
        "--url",
        "--token-file",
        "--json",
        "--help",
    ],
    "list": [
        *("--model", "--salt", "--chunks", "--backend", "--after", "--limit", "-n"),
        *("--url", "--token-file", "--json", "--help"),
    ],
    "delete": ["--model", "--layout", "--revision", "--salt", "--adapter", "--url", "--token-file", "--json", "--help"],
    "clear": ["--all", "--yes", "--url", "--token-file", "--json", "--help"],
    "retain": [
        *("--tokens", "--ttl", "--model", "--layout", "--revision", "--salt", "--adapter"),
        *("--url", "--token-file", "--json", "--help"),
    ],
    "retained": ["--url", "--token-file", "--json", "--help"],
    "warm": ["--model", "--layout", "--revision", "--salt", "--adapter", "--url", "--token-file", "--json", "--help"],
    "bench": [
        *("--url", "--token-file", "--seconds", "--clients", "--prompts", "--chunks", "--chunk-bytes", "--hits"),
        *("--seed", "--json", "--help"),
    ],
    "doctor": ["--config", "-c", "--listen", "--l1-bytes", "--l2", "--json", "--help"],
    "top": ["--http", "--token-file", "--json", "--every", "--help"],
}
COMMANDS = list(dict.fromkeys(command.split()[0] for command in FLAGS))


@pytest.fixture(scope="module")
def shared() -> Iterator[Path]:
    """A directory whose name is short enough for sockets in it."""
    with tempfile.TemporaryDirectory(prefix="cli") as directory:
        yield Path(directory)


@pytest.fixture
def directory() -> Iterator[Path]:
    """As `shared`, of one test."""
    with tempfile.TemporaryDirectory(prefix="cli") as directory:
        yield Path(directory)


def environment(directory: Path, **variables: str) -> dict[str, str]:
    """No settings but these; the defaults are in the directory."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("ASYNC_CACHE_", "XDG_"))}
    places = {"XDG_RUNTIME_DIR": str(directory), "XDG_CACHE_HOME": str(directory), "COLUMNS": "200", "TERM": "dumb"}
    return kept | places | variables


def start(directory: Path, *arguments: str, **variables: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*COMMAND, *arguments],
        cwd=directory,
        env=environment(directory, **({"ASYNC_CACHE_SERVER_HTTP": ""} if "serve" in arguments else {}) | variables),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
    try:
        out, err = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise
    assert "Traceback" not in out + err
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def run(directory: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return finish(start(directory, *arguments, **variables))


def printed(directory: Path, *arguments: str, **variables: str) -> str:
    """What a command prints that has nothing to complain of."""
    done = run(directory, *arguments, **variables)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def complaint(done: subprocess.CompletedProcess[str]) -> str:
    """The one line of a command that failed."""
    assert done.returncode == 1, done
    match = re.fullmatch(r"async-cache: (\S.*)\n", done.stderr)
    assert match, done.stderr
    return match[1]


@contextmanager
def serving(directory: Path, *arguments: str, **variables: str) -> Iterator[tuple[subprocess.Popen[str], list[str]]]:
    """A server with 1 MiB of memory and no storage, if nothing else is said, and where it listens; ended at the end."""
    defaults = {"ASYNC_CACHE_L1_BYTES": "1MiB", "ASYNC_CACHE_L2": ""}
    process = start(directory, "serve", *arguments, **defaults | variables)
    try:
        assert process.stdout is not None
        lines = [process.stdout.readline(), process.stdout.readline()]
        if not lines[1].startswith("serving at "):
            pytest.fail(f"{lines} {finish(process)}")
        yield process, lines[1].split()[2:]
    finally:
        if process.poll() is None:
            process.terminate()
        done = finish(process)
    assert done.returncode == 0, done


@pytest.fixture(scope="module")
def server(shared: Path) -> Iterator[Path]:
    """The directory of a server at the default address."""
    with serving(shared, "--l2", "memory://near?capacity=1MiB"):
        yield shared


def settings(text: str) -> dict[str, tuple[str, str]]:
    """What `config` prints: value and origin by setting. A value of several lines has them joined by a space."""
    first, *lines = text.splitlines()
    begins = [first.index(title) for title in ("setting", "value", "from", "live")]
    found: dict[str, tuple[str, str]] = {}
    name = ""
    for line in lines:
        setting, value, origin, _ = (line[b:e].strip() for b, e in zip(begins, [*begins[1:], None], strict=True))
        if setting:
            name = setting
            found[name] = (value, origin)
        else:
            found[name] = (f"{found[name][0]} {value}", found[name][1] + origin)
    return found


# Help.


def test_help_lists_the_commands(shared: Path) -> None:
    listed = re.findall(r"^│ (\w+) ", printed(shared, "--help").partition("Commands")[2], re.MULTILINE)
    assert sorted(listed) == sorted(COMMANDS)
    listed = re.findall(r"^│ (\w+) ", printed(shared, "backend", "--help").partition("Commands")[2], re.MULTILINE)
    assert listed == ["add", "drain", "remove", "list"]


def test_a_command_that_is_written_wrongly_is_guessed(shared: Path) -> None:
    done = run(shared, "bakcend")
    assert done.returncode == 2
    assert "Did you mean 'backend'" in done.stderr


def test_the_version_is_printed(shared: Path) -> None:
    assert printed(shared, "--version") == f"async-cache {__version__}\n"


@pytest.mark.parametrize("command", FLAGS)
def test_help_tells_of_every_flag(command: str, shared: Path) -> None:
    text = printed(shared, *command.split(), "--help")
    assert sorted(re.findall(r"(?<![\w-])--?[a-z][\w-]*(?=[ \[])", text.partition("Options")[2])) == sorted(
        FLAGS[command]
    )
    for line in re.findall(r"^│ (-.*)│$", text, re.MULTILINE):
        assert re.search(r" {2,}[A-Z]\w+ .*\.", line), f"{line} is not explained"


# Asking a server.


def test_ping_says_how_long_it_took(server: Path) -> None:
    line = r"{} answers: fastest (\d+) us, median (\d+) us, slowest (\d+) us\n"
    assert re.fullmatch(line.format(3), printed(server, "ping"))
    match = re.fullmatch(
        line.format(50), printed(server, "ping", "-n", "50", "--url", f"unix://{server}/async_cache.sock")
    )
    assert match
    times = [int(time) for time in match.groups()]
    assert times == sorted(times)
    told = json.loads(printed(server, "ping", "-n", "5", "--json"))
    assert told.pop("answers") == 5
    assert list(told) == ["fastest_seconds", "median_seconds", "slowest_seconds"]
    assert 0 < told["fastest_seconds"] <= told["median_seconds"] <= told["slowest_seconds"] < SECONDS


def test_every_command_that_says_something_says_it_in_json_too() -> None:
    assert [command for command, flags in FLAGS.items() if "--json" not in flags] == ["serve"]


def test_status_is_a_table(server: Path) -> None:
    text = printed(server, "status")
    assert re.search(r"^L1 +0 B of 1 MiB \(0%\), 0 chunks", text, re.MULTILINE)
    assert re.search(r"^requests +0, which hold 0 leases", text, re.MULTILINE)
    assert re.search(r"^L2 near +0 B of 1 MiB, 0 objects", text, re.MULTILINE)


def test_status_in_json_has_all_counters(server: Path) -> None:
    text = printed(server, "status", "--json")
    assert text.count("\n") == 1
    stats = json.loads(text)
    assert list(stats) == list(CacheStats.__struct_fields__)
    assert stats["l1_capacity_bytes"] == 2**20
    assert stats["backends"] == {"near": {"objects": 0, "used_bytes": 0, "capacity_bytes": 2**20}}


def test_without_a_server_it_says_how_to_start_one(directory: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(directory / "dead"))
    processes = start(directory, "ping"), start(directory, "status", "--url", f"unix://{directory}/dead")
    for process, name, reason in zip(
        processes, ("async_cache.sock", "dead"), ("No such file or directory", "Connection refused"), strict=True
    ):
        line = f"there is no server at unix://{directory}/{name}: {reason}; `async-cache serve` starts one"
        assert complaint(finish(process)) == line


def test_a_server_that_is_silent_is_given_up(directory: Path) -> None:
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(directory / "silent"))
        silent.listen()
        line = complaint(run(directory, "ping", "--url", f"unix://{directory}/silent"))
    assert re.fullmatch(rf"no answer from unix://{directory}/silent within \d(\.\d)? s", line)


def test_a_server_of_something_else_is_told_apart(directory: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        process = start(directory, "ping", "--url", f"tcp://127.0.0.1:{other.getsockname()[1]}")
        connection, _ = other.accept()
        with connection:
            connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            assert complaint(finish(process))


@pytest.mark.parametrize("url", ["/run/cache.sock", "tcp://localhost", "tcp://a..b:1"])
def test_a_url_that_is_none_is_told(url: str, shared: Path) -> None:
    assert "allowed: unix:///path, tcp://host:port or tls://host:port" in complaint(run(shared, "ping", "--url", url))


def test_an_interrupted_command_says_nothing(directory: Path) -> None:
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(directory / "async_cache.sock"))
        silent.listen()
        process = start(directory, "ping")
        silent.settimeout(SECONDS)
        silent.accept()[0].close()  # it asks
        connection, _ = silent.accept()  # and again
        process.send_signal(signal.SIGINT)
        done = finish(process)
        connection.close()
    assert done.returncode == 130
    assert len(done.stderr.splitlines()) <= 1


# Backends of a server that runs.


def rows(text: str) -> list[list[str]]:
    """The rows of a table without its head, each by its cells."""
    return [re.split(r" {2,}", line.strip()) for line in text.splitlines()[1:]]


@pytest.mark.timeout(180)  # a dozen processes
def test_backends_are_added_drained_removed_and_listed(directory: Path) -> None:
    with serving(directory, "--l2", "memory://near"):
        head, row = printed(directory, "backend", "list").splitlines()
        assert head.split() == ["backend", "state", "breaker", "used", "of", "objects", "pending", "given"]
        assert re.split(r" {2,}", row.strip()) == ["near", "active", "closed", "0 B", "no bound", "0", "0", "all"]
        assert printed(directory, "backend", "add", f"fs://{directory}/disk?capacity=1GiB&write=first&admit=2") == ""
        assert printed(directory, "backend", "add", "memory://fast?promote=true", "--position", "0") == ""
        names = [row[0] for row in rows(printed(directory, "backend", "list"))]
        assert names == ["fast", "near", f"fs://{directory}/disk"]
        listed = json.loads(printed(directory, "backend", "list", "--json"))
        assert [each["write"] for each in listed] == ["all", "all", "first"]
        assert (listed[0]["promote"], listed[2]["admit"]) == (True, 2)
        drained = printed(directory, "backend", "drain", "near")
        assert drained == "0 objects: 0 copied (0 B), 0 were there, 0 gone, 0 corrupt, 0 failed\n"
        assert json.loads(printed(directory, "backend", "drain", "near", "--json"))["found"] == 0
        assert [row[1] for row in rows(printed(directory, "backend", "list"))] == ["active", "drained", "active"]
        assert printed(directory, "backend", "remove", "near") == ""
        assert [row[0] for row in rows(printed(directory, "backend", "list"))] == names[::2]
        listed = json.loads(printed(directory, "backend", "add", "memory://last", "--json"))
        assert [each["name"] for each in listed] == [*names[::2], "last"]
        listed = json.loads(printed(directory, "backend", "remove", "last", "--json"))
        assert [each["name"] for each in listed] == names[::2]
        for arguments, why in {
            ("add", "memory://fast"): "there is a backend 'fast' already",
            ("add", "nothing://"): "nothing://: unknown scheme 'nothing'",
            ("add", "memory://x", "--position", "7"): "--position: position must be from 0 to 2, not 7",
            ("drain", "near"): "there is no backend 'near': there is fast, ",
            ("remove", "near"): "there is no backend 'near': there is fast, ",
        }.items():
            said = complaint(run(directory, "backend", *arguments))
            assert why in said and said.startswith("--position") == ("--position" in arguments)


def test_a_token_that_is_bound_to_salts_is_not_for_backends(directory: Path, tenants: Path) -> None:
    (directory / "bound").write_text(TOKENS[1])
    with serving(directory, "-c", str(tenants), "--listen", f"unix://{directory}/s") as (_, (unix,)):
        for arguments in (("list",), ("add", "memory://x"), ("drain", "x"), ("remove", "x")):
            done = run(directory, "backend", *arguments, "--url", unix, "--token-file", "bound")
            assert complaint(done).startswith("the token is bound to salts: it is not for ")


def fill(url: str, count: int) -> None:
    """Put objects into a directory that nobody has open."""

    async def run() -> None:
        backend = from_url(url)
        await backend.open()
        keys = [ObjectKey(number.to_bytes(32, "big"), 0, 0) for number in range(count)]
        await backend.store(keys, [memoryview(bytearray(4096)) for _ in keys])
        await backend.close()

    asyncio.run(run())


def test_a_copy_says_what_it_has_copied_and_is_run_again_without_harm(directory: Path) -> None:
    source, target = f"fs://{directory}/a", f"fs://{directory}/b"
    fill(source, 50)
    line = "50 objects: 50 copied (200 KiB), 0 were there, 0 gone, 0 corrupt, 0 failed\n"
    assert printed(directory, "copy", source, target) == line
    told = json.loads(printed(directory, "copy", source, target, "--json"))
    assert (told["found"], told["present"], told["copied"]) == (50, 50, 0)


def test_a_copy_that_is_killed_is_gone_on_with(directory: Path) -> None:
    source, target = f"fs://{directory}/a", f"fs://{directory}/b"
    fill(source, 3000)
    process = start(directory, "copy", source, target)
    end = time.monotonic() + SECONDS
    while time.monotonic() < end and not any(path.stat().st_size > 20_000 for path in (directory / "b").rglob("*.idx")):
        time.sleep(0.001)
    process.kill()
    process.communicate()
    told = json.loads(printed(directory, "copy", source, target, "--json"))
    assert told["found"] == 3000 == told["present"] + told["copied"]
    assert told["present"] > 0
    assert json.loads(printed(directory, "copy", source, target, "--json"))["present"] == 3000


def test_a_copy_that_cannot_be_is_told_in_one_line(directory: Path) -> None:
    fill(f"fs://{directory}/a", 1)
    assert "unknown scheme" in complaint(run(directory, "copy", f"fs://{directory}/a", "nothing://x"))
    done = run(directory, "copy", f"fs://{directory}/mistyped", f"fs://{directory}/b")
    assert complaint(done) == f"SRC: there is no directory {directory}/mistyped"
    assert not (directory / "mistyped").exists()
    assert "cannot be opened" in complaint(run(directory, "copy", f"fs://{directory}/a", "fs:///proc/self/none"))


# Tokens.


@pytest.fixture
def tenants(directory: Path) -> Path:
    """A file with tenants, of a server at a Unix socket and a port of loopback."""
    path = directory / "cache.toml"
    path.write_text(
        'l1_bytes = "1MiB"\nl2 = []\n[server]\nlisten = ["unix:///run/cache.sock"]\n'
        f'[server.tenants.operations]\ntokens = ["{TOKENS[0]}"]\n'
        f'[server.tenants."[bold]acme[/red]"]\ntokens = ["{TOKENS[1]}", "{TOKENS[2]}"]\nsalts = ["[dim]", "acme"]\n'
    )
    return path


def test_a_token_is_read_from_a_file(directory: Path, tenants: Path) -> None:
    listen = ["--listen", f"unix://{directory}/s", "--listen", "tcp://127.0.0.1:0"]
    for name, token in {"right": TOKENS[1], "wrong": TOKENS[1] + "x", "empty": "", "long": "x" * 5000}.items():
        (directory / name).write_text(f"{token}\n")
    (directory / "marked").write_text(f"\ufeff{TOKENS[1]}\r\n", encoding="utf-8")
    (directory / "binary").write_bytes(b"\xff" * 20)
    with serving(directory, "-c", str(tenants), *listen) as (_, (unix, tcp)):
        for name in ("right", "marked"):
            assert printed(directory, "ping", "--url", tcp, "--token-file", name, PYTHONUTF8="0", LC_ALL="C")
        assert printed(directory, "status", "--url", unix), "whoever may open the socket needs none"
        assert complaint(run(directory, "ping", "--url", tcp)) == "the server wants a token"
        for name, url in {"wrong": unix, "empty": tcp}.items():
            process = run(directory, "ping", "--url", url, "--token-file", name)
            assert complaint(process) == "the server does not know this token"
        assert "xxx" not in complaint(run(directory, "ping", "--url", tcp, "--token-file", "long"))
    for name in ("none", "binary"):
        assert complaint(run(directory, "ping", "--token-file", name)).startswith(f"cannot read the token in {name}: ")


def test_config_never_shows_a_token(directory: Path, tenants: Path) -> None:
    text = printed(directory, "config", "-c", str(tenants))
    assert settings(text)["server.tenants"] == (
        "operations: 1 token(s), salts: all [bold]acme[/red]: 2 token(s), salts: ['[dim]', 'acme']",
        str(tenants),
    )
    assert not any(token in text for token in TOKENS)


@pytest.mark.parametrize(
    "text",
    [
        f'tenants = "{TOKENS[0]}"',
        f'[server.tenants.a]\ntokens = "{TOKENS[0]}"',
        f'[server.tenants.a]\ntokens = ["{TOKENS[0]}", "{TOKENS[0] * 30}"]',
        f'[server.tenants.a]\ntoken = "{TOKENS[0]}"',
    ],
)
def test_a_complaint_of_the_file_never_shows_a_token(text: str, directory: Path) -> None:
    (directory / "c.toml").write_text(f"[server]\n{text}\n")
    done = run(directory, "config", "-c", "c.toml")
    assert "tenants" in complaint(done)
    assert TOKENS[0] not in done.stdout + done.stderr


# The settings.


def test_config_shows_every_setting_and_its_default(directory: Path) -> None:
    shown = settings(printed(directory, "config"))
    assert list(shown) == [
        *CacheConfig.__struct_fields__,
        *(f"server.{name}" for name in ServerConfig.__struct_fields__),
    ]
    assert {origin for _, origin in shown.values()} == {"default"}
    assert shown["l1_bytes"] == ("1 GiB", "default")
    assert shown["l2"] == (f"fs://{directory}/async_cache-2?capacity=10GiB", "default")
    assert shown["lookup_timeout_seconds"] == ("1.0", "default")
    assert shown["server.listen"] == (f"unix://{directory}/async_cache.sock", "default")


def test_a_flag_comes_before_the_environment_and_that_before_the_file(directory: Path) -> None:
    (directory / "cache.toml").write_text(
        'l1_bytes = "1MiB"\nl2 = ["memory://file"]\nprefetch_share = 0.5\n'
        '[server]\nlisten = ["unix:///file"]\nmax_requests = 5\nmax_connections = 5\n'
    )
    variables = {
        "ASYNC_CACHE_L1_BYTES": "2MiB",
        "ASYNC_CACHE_L2": "memory://variable",
        "ASYNC_CACHE_SERVER_LISTEN": "unix:///variable",
        "ASYNC_CACHE_SERVER_MAX_REQUESTS": "6",
    }
    arguments = ["config", "--config", "cache.toml"]
    flags = ["--l1-bytes", "3MiB", "--l2", "memory://a", "--l2", "memory://b", "--listen", "unix:///flag"]
    names = ["l1_bytes", "l2", "prefetch_share", "lookup_timeout_seconds"]
    names += [f"server.{name}" for name in ("listen", "max_requests", "max_connections", "tenants")]
    file = "cache.toml"
    for extra, environ, expected in [
        ([], variables, ["2 MiB", "memory://variable", "0.5", "1.0", "unix:///variable", "6", "5", ""]),
        (flags, variables, ["3 MiB", "memory://a memory://b", "0.5", "1.0", "unix:///flag", "6", "5", ""]),
    ]:
        shown = settings(printed(directory, *arguments, *extra, **environ))
        assert [shown[name][0] for name in names] == expected
        origins = [file, file, file, "default", file, file, file, "default"]
        for place, variable in zip((0, 1, 4, 5), environ, strict=True):
            origins[place] = variable
        if extra:
            origins[0], origins[1], origins[4] = "--l1-bytes", "--l2", "--listen"
        assert [shown[name][1] for name in names] == origins


def test_config_shows_a_value_as_it_was_given(shared: Path) -> None:
    long = f"fs:///{'kv/' * 100}"
    values = ["fs:///kv/[bold]a[/red]", "memory://:heart:", "unix:///run/[a]/:heart:", long]
    flags = ["--listen" if value.startswith("unix") else "--l2" for value in values]
    shown = settings(printed(shared, "config", *(f"{f}={v}" for f, v in zip(flags, values, strict=True))))
    assert shown["server.listen"] == (values[2], "--listen")
    assert shown["l2"][0].replace(" ", "") == values[0] + values[1] + values[3]


def test_serve_uses_what_config_shows(directory: Path) -> None:
    (directory / "cache.toml").write_text(
        f'l1_bytes = "1MiB"\nl2 = ["memory://file"]\n[server]\nlisten = ["unix://{directory}/file"]\n'
    )
    process = start(directory, "serve", "-c", "cache.toml", "--l1-bytes", "2MiB", ASYNC_CACHE_L2="memory://variable")
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "async-cache with 2 MiB of memory and memory://variable\n"
        assert process.stdout.readline() == f"serving at unix://{directory}/file\n"
        stats = json.loads(printed(directory, "status", "--json", "--url", f"unix://{directory}/file"))
        assert stats["l1_capacity_bytes"] == 2 * 2**20
        assert list(stats["backends"]) == ["variable"]
    finally:
        process.terminate()
        assert finish(process).returncode == 0


# Storage of other packages.


def test_serve_takes_the_scheme_of_another_package(directory: Path) -> None:
    install(directory, "kv_remote", remote="kv_remote:make")
    path = os.pathsep.join([str(directory), os.environ.get("PYTHONPATH", "")])
    url = "remote://user:secret@host:7/0?lookup_timeout=5&capacity_bytes=64"
    with serving(directory, "--l2", url, PYTHONPATH=path) as (_, _):
        stats = json.loads(printed(directory, "status", "--json"))
    assert stats["backends"] == {"remote host:7/0": {"objects": 0, "used_bytes": 0, "capacity_bytes": 64}}


def test_serve_tells_what_is_wrong_with_another_package(directory: Path) -> None:
    install(directory, "kv_remote", BACKEND.replace("url.hostname", "url.absent"), remote="kv_remote:make")
    path = os.pathsep.join([str(directory), os.environ.get("PYTHONPATH", "")])
    done = run(
        directory, "serve", "--l2", "remote://user:secret@host:7/0", PYTHONPATH=path, ASYNC_CACHE_L1_BYTES="1MiB"
    )
    line = complaint(done)
    assert line.startswith("--l2: l2: remote://***@host:7/0: kv_remote:make of kv_remote 1.5 failed: AttributeError")
    assert "secret" not in done.stdout + done.stderr


@pytest.mark.parametrize("command", ["config", "serve"])
def test_the_passwords_of_urls_are_not_shown(command: str, directory: Path) -> None:
    url = "nosuch://user:secret@host:7/0"
    done = run(directory, command, "--l2", url, ASYNC_CACHE_L1_BYTES="1MiB")
    assert "nosuch://***@host:7/0" in done.stdout + done.stderr
    assert "secret" not in done.stdout + done.stderr


# What can not be used.


@pytest.mark.parametrize(
    ("arguments", "text", "told"),
    [
        (["--l1-bytes", "much"], "", "--l1-bytes: l1_bytes: 'much' is not a size"),
        (["--l1-bytes", "0"], "", "l1_bytes must be more than 0"),
        (["--l2", "nosuch://x"], "", "nosuch"),
        (["--l2", "fs:///kv?size=5"], "", "size"),
        (["--listen", "tcp://0.0.0.0:0"], "", "it needs tenants with tokens"),
        (["--listen", "tcp://0.0.0.0:0"], "[server.tenants.a]\ntokens = []\n", "token"),
        ([], "l3 = 5", "c.toml: unknown setting 'l3'"),
        ([], "[server]\nport = 5", "c.toml: unknown setting 'port'"),
        (["-c", "none.toml"], "", "cannot read none.toml"),
        (["-c", "."], "", "cannot read .: "),
    ],
)
def test_settings_that_can_not_be_used_are_told(
    arguments: Sequence[str], text: str, told: str, directory: Path
) -> None:
    (directory / "c.toml").write_text(text)
    command = "serve" if "--l2" in arguments else "config"
    assert told in complaint(run(directory, command, "-c", "c.toml", *arguments, ASYNC_CACHE_L1_BYTES="1MiB"))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('l2 = ["fs:///kv?size=5"]', "c.toml: l2: fs:///kv?size=5: unknown parameter 'size'"),
        ('l2 = ["fs:///"]', "c.toml: l2: fs:///: '/' cannot be the path of a directory of its own"),
        ('l2 = ["fs:///a%00b"]', "c.toml: l2: fs:///a%00b: '/a\\x00b' cannot be the path of a directory of its own"),
        ('l2 = ["fs:///a?load_timeout=1e308"]', "c.toml: l2: fs:///a?load_timeout=1e308: load_timeout: "),
        ('l2 = ["memory://a\\u200bb"]', "c.toml: l2: memory://a"),
        ('l2 = ["memory://", "memory://"]', "c.toml: l2: 2 backends have the same name 'memory'"),
        ('l2 = "memory://a memory://b"', "c.toml: l2 must be a list of URLs, not one str"),
        ('l1_bytes = "9TiB"', "c.toml: l1_bytes: 9,437,184 MiB is more than the machine has, "),
        ('[server]\nlisten = ["tcp://0.0.0.0:0"]', "c.toml: listen: tcp://0.0.0.0:0 can be reached"),
        ('[server]\nlisten = ["unix:///a/s", "unix:///a/%73"]', "c.toml: listen: unix:///a/s is there twice"),
        ("[server]\nshutdown_timeout_seconds = 1e308", "c.toml: shutdown_timeout_seconds must be "),
    ],
)
def test_config_refuses_what_serve_refuses_in_the_same_line(text: str, told: str, directory: Path) -> None:
    (directory / "c.toml").write_text(f"{text}\n", encoding="utf-8")
    config, serve = map(finish, [start(directory, command, "-c", "c.toml") for command in ("config", "serve")])
    assert complaint(config) == complaint(serve)
    assert complaint(serve).startswith(told)
    assert (config.stdout, serve.stdout) == ("", ""), "nothing is said before it is known"


def test_what_can_not_be_opened_is_told_before_anything_is_said(directory: Path) -> None:
    (directory / "file").write_text("mine")
    done = run(directory, "serve", "--l2", f"fs://{directory}/file", ASYNC_CACHE_L1_BYTES="1MiB")
    assert complaint(done).startswith(f"--l2: l2: fs://{directory}/file cannot be used: ")
    assert done.stdout == ""


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/kv"])
def test_storage_that_can_not_be_opened_is_told_with_its_setting_and_the_file(place: str, directory: Path) -> None:
    """Whether it is the setting that cannot be used, or the storage that fails."""
    (directory / "file").write_text("mine")
    path = directory / place
    (directory / "c.toml").write_text(f'l1_bytes = "1MiB"\nl2 = ["fs://{path}"]\n')
    assert complaint(run(directory, "serve", "-c", "c.toml")).startswith(f"c.toml: l2: fs://{path} cannot be ")


def test_names_need_not_fit_the_encoding_of_the_terminal(directory: Path) -> None:
    raw = os.fsdecode(b"\xff\xc3\xa9")
    (directory / f"{raw}.toml").write_text(f'l2 = ["fs://{directory}/%FF", "memory://é"]\n', encoding="utf-8")
    for variables in ({"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C"}, {}):
        shown = printed(directory, "config", "-c", f"{raw}.toml", **variables)
        assert f"fs://{directory}/%FF" in shown
        complaint(run(directory, "config", "-c", f"{raw}.none", **variables))
    with serving(directory, "--l2", f"fs://{directory}/%FF", "--listen", f"unix://{directory}/%FE") as (_, [url]):
        assert url == f"unix://{directory}/%FE"
        assert f"L2 fs://{directory}/%FF" in printed(directory, "status", "--url", url).replace("\n", "")
    assert b"\xff" in os.listdir(os.fsencode(directory))


def test_a_backend_called_memory_is_told_apart_from_l1(directory: Path) -> None:
    with serving(directory, "--l2", "memory://", "--l2", "memory://L1", "--l2", "memory://requests") as (_, [url]):
        rows = re.findall(r"^(\S.*?)  ", printed(directory, "status", "--url", url), re.MULTILINE)
    assert len(rows) == len(set(rows))
    assert [row for row in rows if row.startswith("L")] == ["L1", "L2 memory", "L2 L1", "L2 requests"]


def test_an_address_that_is_none_is_told_with_its_flag(shared: Path) -> None:
    assert complaint(run(shared, "status", "--url", "unix:relative")).startswith("--url: 'unix:relative': ")


def test_a_server_that_stops_in_the_middle_is_given_up_soon(directory: Path) -> None:
    with serving(directory) as (process, [url]):
        before = len(os.listdir(f"/proc/{process.pid}/fd"))
        ping = start(directory, "ping", "-n", "100000")
        deadline = time.monotonic() + SECONDS
        while len(os.listdir(f"/proc/{process.pid}/fd")) <= before:  # until it is connected
            assert time.monotonic() < deadline
            assert ping.poll() is None
            time.sleep(0.001)
        process.send_signal(signal.SIGSTOP)
        try:
            line = complaint(finish(ping))
        finally:
            process.send_signal(signal.SIGCONT)
    assert line.startswith(("the server has not answered for ", f"no answer from {url} within "))
    (seconds,) = re.findall(r"([\d.]+) s\b", line)
    assert float(seconds) <= 5, "twice a heartbeat of 10 s is long for who waits at a terminal"


def test_a_variable_that_can_not_be_used_is_told(shared: Path) -> None:
    line = complaint(run(shared, "config", ASYNC_CACHE_SERVER_MAX_REQUESTS="many"))
    assert line.startswith("ASYNC_CACHE_SERVER_MAX_REQUESTS: max_requests must be a number")


@pytest.mark.parametrize("size", ["1B", "99999999TiB"])
def test_memory_that_there_can_not_be_is_told(size: str, directory: Path) -> None:
    assert complaint(run(directory, "serve", "--l1-bytes", size, "--l2", "memory://"))


def test_an_address_in_use_is_told(server: Path, directory: Path) -> None:
    url = f"unix://{server}/async_cache.sock"
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = f"tcp://127.0.0.1:{other.getsockname()[1]}"
        processes = [
            start(directory, "serve", "--listen", each, ASYNC_CACHE_L1_BYTES="1MiB", ASYNC_CACHE_L2="")
            for each in (url, port)
        ]
        unix, tcp = (complaint(finish(process)) for process in processes)
    assert unix == f"cannot listen at {server}/async_cache.sock: a server is listening there already"
    assert tcp == f"cannot listen at {port}: Address already in use"
    assert printed(server, "ping"), "the server that is there goes on"


def test_nothing_but_a_socket_is_replaced_and_none_of_the_addresses_is_used(directory: Path) -> None:
    (directory / "file").write_text("mine")
    for name, reason in {"file": "it is there, and not a socket", "file/socket": ""}.items():
        arguments = [f"--listen=unix://{directory}/{each}" for each in ("first", name)]
        line = complaint(run(directory, "serve", *arguments, ASYNC_CACHE_L1_BYTES="1MiB", ASYNC_CACHE_L2=""))
        assert line.startswith("cannot listen at ")
        assert line.endswith(reason)
        assert f"{directory}/file" in line
    assert (directory / "file").read_text() == "mine"
    assert [path.name for path in directory.iterdir()] == ["file"]


def test_a_path_as_long_as_a_path_may_be_can_be_listened_at(directory: Path) -> None:
    deep = directory / ("d" * (107 - len(f"{directory}//s")))
    with serving(directory, "--listen", f"unix://{deep}/s") as (_, [url]):
        assert len(url.removeprefix("unix://")) == 107
        assert printed(directory, "ping", "--url", url)


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["serve", "--nonsense"],
        ["serve", "--log-level", "loud"],
        ["serve", "--l1-bytes"],
        ["ping", "--count", "many"],
    ],
    ids=" ".join,
)
def test_a_wrong_usage_is_told_with_exit_code_2(arguments: Sequence[str], shared: Path) -> None:
    done = run(shared, *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert "─ Error ─" in done.stderr


def test_no_command_is_a_wrong_usage_with_the_help(shared: Path) -> None:
    done = run(shared)
    assert done.returncode == 2
    assert "serve" in done.stdout + done.stderr


# The life of a server.


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_server_and_nothing_is_left(number: signal.Signals, directory: Path) -> None:
    with serving(directory) as (process, _):
        assert (directory / "async_cache.sock").stat().st_mode & 0o777 == 0o600
        process.send_signal(number)
        done = finish(process)
        assert (done.returncode, done.stdout) == (0, "")
        assert re.fullmatch(r"\S+ \S+ INFO async_cache\S*: shutting down\n", done.stderr)
    assert list(directory.iterdir()) == []


def test_a_second_signal_changes_nothing(directory: Path) -> None:
    with serving(directory, "--log-level", "WARNING") as (process, _):
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGINT)
        done = finish(process)
    assert (done.returncode, done.stderr) == (0, ""), "what is less important than a warning is not shown"


def test_the_socket_of_a_dead_server_is_replaced(directory: Path) -> None:
    process = start(directory, "serve", ASYNC_CACHE_L1_BYTES="1MiB", ASYNC_CACHE_L2="")
    assert process.stdout is not None
    assert [process.stdout.readline() for _ in range(2)][1].startswith("serving at ")
    process.kill()
    process.communicate()
    assert (directory / "async_cache.sock").is_socket()
    with serving(directory):
        assert printed(directory, "ping")


def test_a_port_that_the_system_chose_is_told(directory: Path) -> None:
    with serving(directory, "--listen", "tcp://127.0.0.1:0", "--listen", "tcp://localhost:0") as (_, urls):
        assert len(urls) == 2
        for url in urls:
            assert not url.endswith(":0")
            assert printed(directory, "ping", "--url", url)


def test_a_reader_that_leaves_early_is_no_error(server: Path) -> None:
    process = start(server, "config")
    assert process.stdout is not None
    process.stdout.close()
    assert process.wait(SECONDS) in (0, 1)
    assert process.stderr is not None
    with process.stderr as stderr:
        assert "Traceback" not in stderr.read()


def test_config_says_which_settings_are_live(shared: Path) -> None:
    told = {it["setting"]: it for it in json.loads(printed(shared, "config", "--json", "--l1-bytes", "1MiB"))}
    assert (told["l1_bytes"]["from"], told["l1_bytes"]["live"]) == ("--l1-bytes", False)
    assert told["result_ttl_seconds"]["live"] and told["server.tenants"]["live"] and not told["server.listen"]["live"]
