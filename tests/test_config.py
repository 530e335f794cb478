"""Settings: from arguments, TOML and environment; what can not be used is refused; the document lists all of them."""

import inspect
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from distribution import install

from async_cache.config import CacheConfig, ServerConfig, Settings, TenantConfig, default_l2, parse_bytes
from async_cache.errors import ConfigError
from async_cache.l2.backend import Limits
from async_cache.l2.filesystem.backend import FileSystemBackend
from async_cache.l2.filesystem.format import VERSION
from async_cache.l2.urls.registry import GROUP, from_url
from async_cache.l2.urls.schemes import OWN

DOCUMENT = (Path(__file__).parent.parent / "docs" / "configuration.md").read_text()
BACKENDS, SERVER = (
    re.search(rf"^## {title}$(.*?)^## ", DOCUMENT, re.M | re.S)[1] for title in ("Backends", "The server")
)
ROWS = [re.findall(r"`([^`]*)`", row)[:3] for row in re.findall(r"^\| `.*ASYNC_CACHE_.*$", DOCUMENT, re.MULTILINE)]
SERVER_ROWS = [row for row in ROWS if "_SERVER_" in row[1]]
CACHE_ROWS = [row for row in ROWS if row not in SERVER_ROWS]
NUMBERS = [name for name in CacheConfig.__struct_fields__ if name != "l2"]
SERVER_NUMBERS = [name for name in ServerConfig.__struct_fields__ if name not in ("listen", "tenants")]

UNIX = ("unix:///run/cache.sock",)
ANYWHERE = ("tcp://0.0.0.0:7000",)
TOKENS = [f"token-number-{number:04}" for number in range(3)]


def load(path: Path | None = None, **environ: str) -> CacheConfig:
    return CacheConfig.load(path, environ)


def load_server(path: Path | None = None, **environ: str) -> ServerConfig:
    return ServerConfig.load(path, environ)


def serve_tenants(tenants: Any, listen: tuple[str, ...] = UNIX) -> ServerConfig:
    return ServerConfig(listen=listen, tenants=tenants)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Of a file that is not there yet."""
    return tmp_path / "cache.toml"


# The document.


def test_the_document_lists_every_setting_in_order() -> None:
    assert [name for name, _, _ in CACHE_ROWS] == list(CacheConfig.__struct_fields__)


def test_the_document_lists_every_setting_of_the_server_in_order() -> None:
    assert re.findall(r"^\| `(\w+)` ", SERVER, re.MULTILINE) == list(ServerConfig.__struct_fields__)
    have_no_variable = ["tenants", "limits"]
    assert [name for name, _, _ in SERVER_ROWS] + have_no_variable == [*ServerConfig.__struct_fields__]


@pytest.mark.parametrize(("name", "variable", "default"), ROWS, ids=[row[1] for row in ROWS])
def test_the_document_has_the_default_and_the_variable(
    name: str, variable: str, default: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/users/cache")
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/users/run")
    kind, prefix = (ServerConfig, "ASYNC_CACHE_SERVER_") if "_SERVER_" in variable else (CacheConfig, "ASYNC_CACHE_")
    loaded = kind.load(None, {variable: os.path.expandvars(default)})
    assert variable == f"{prefix}{name.upper()}"
    assert getattr(loaded, name) == getattr(kind(), name)


def test_the_file_and_the_urls_of_the_document_can_be_used(path: Path) -> None:
    path.write_text("".join(re.findall(r"^```toml\n(.*?)^```$", DOCUMENT, re.MULTILINE | re.DOTALL)))
    config, server = load(path), load_server(path)
    assert config.l1_bytes == 64 * 2**30
    assert [from_url(url).usage().capacity_bytes for url in config.l2] == [8 * 2**30, 2 * 2**40]
    assert {name: tenant.salts for name, tenant in server.tenants.items()} == {
        "operations": None,
        "acme": ("acme", "acme-staging"),
    }


def test_the_document_has_the_urls_and_parameters_of_every_backend() -> None:
    forms = list(dict.fromkeys(scheme.form for scheme in OWN.values()))
    assert [line.strip() for line in re.findall(r"^    [\w+]+://.*$", BACKENDS, re.MULTILINE)] == forms
    parameters = [name for form in forms for name in re.findall(r"[?&](\w+)=", form)]
    assert re.findall(r"^\| \| `(\w+)`", DOCUMENT, re.MULTILINE) == parameters


def test_the_document_has_the_limits_that_any_url_may_have() -> None:
    table = BACKENDS.partition("| parameter of any URL |")[2].partition("\n\n")[0]
    rows = dict(re.findall(r"^\| `(\w+)` \| `(\w+)` \|", table, re.MULTILINE))
    assert list(rows.values()) == list(Limits.__struct_fields__)
    for parameter, setting in rows.items():
        assert getattr(from_url(f"memory://?{parameter}=7").limits, setting) == 7
        assert setting in CacheConfig.__struct_fields__
    for url in re.findall(r"`(\w+://[^`]*breaker[^`]*)`", BACKENDS):
        assert from_url(url).limits != Limits()


def test_the_document_shows_how_another_package_gives_a_scheme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (source,) = re.findall(r"^```python\n# kv_remote.py\n(.*?)^```$", BACKENDS, re.M | re.S)
    ((group, scheme, value, url),) = re.findall(
        r'entry-points\."([^"]*)"\]`, the line `(\w+) = "([\w:]*)"`, makes backends of `([^`]*)`', BACKENDS
    )
    assert group == GROUP
    made = "\n    def __new__(cls, *arguments, **named):\n        raise LookupError(arguments, named)"
    install(tmp_path, "kv_remote", source.replace(" ...", made), **{scheme: value})
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "kv_remote", raising=False)
    with pytest.raises(ConfigError, match=re.escape("LookupError: (('host', 7000), {'ttl': 60.0})")):
        from_url(url)


def test_the_document_has_the_defaults_of_the_file_system() -> None:
    parameters = inspect.signature(FileSystemBackend).parameters
    rows = dict(re.findall(r"^\| \| `(durability|direct|threads)` \| `([^`]*)`", BACKENDS, re.MULTILINE))
    assert rows == {name: str(parameters[name].default).lower() for name in ("durability", "direct", "threads")}


def test_the_document_has_the_forms_of_an_address() -> None:
    with pytest.raises(ConfigError) as caught:
        ServerConfig(listen=("none://",))
    forms = re.split(", | or ", str(caught.value).partition("allowed: ")[2])
    assert [line.strip() for line in re.findall(r"^    \w+://.*$", SERVER, re.MULTILINE)] == forms


# Where they come from.


def test_a_variable_overrides_the_file(tmp_path: Path) -> None:
    path = tmp_path / "cache.toml"
    path.write_text('l1_bytes = 4096\nprefetch_share = 0.5\nl2 = ["memory://"]\n')
    config = load(path, ASYNC_CACHE_L1_BYTES="1MiB", ASYNC_CACHE_L2="memory://a\n memory://b", HOME="/other")
    assert config == CacheConfig(l1_bytes=2**20, prefetch_share=0.5, l2=("memory://a", "memory://b"))


def test_a_variable_overrides_the_table_of_the_server(path: Path) -> None:
    path.write_text('[server]\nmax_requests = 5\nmax_connections = 6\nlisten = ["unix:///a"]\n')
    config = load_server(
        path, ASYNC_CACHE_SERVER_MAX_REQUESTS="7", ASYNC_CACHE_SERVER_LISTEN="unix:///b\n tcp://[::1]:0", HOME="/other"
    )
    assert config == ServerConfig(max_requests=7, max_connections=6, listen=("unix:///b", "tcp://[::1]:0"))


def test_a_file_has_the_settings_of_both(path: Path) -> None:
    path.write_text('l1_bytes = "1MiB"\nl2 = []\n[server]\nlisten = ["unix:///a"]\n')
    assert load(path) == CacheConfig(l1_bytes=2**20, l2=())
    assert load_server(path) == ServerConfig(listen=("unix:///a",))


@pytest.mark.parametrize("text", ["", "[server]\n", "[server.tenants]\n"])
def test_a_file_may_say_nothing_of_the_server(text: str, path: Path) -> None:
    path.write_text(f"l2 = []\n{text}")
    assert load(path) == CacheConfig(l2=())
    assert load_server(path) == ServerConfig()


def test_what_is_wrong_of_one_does_not_disturb_the_other(path: Path) -> None:
    path.write_text('l2 = []\n[server]\nlisten = ["unix:///a"]\nl1_bytes = 4096\n')
    assert load(path) == CacheConfig(l2=())
    path.write_text('l2 = 5\nlisten = "unix:///a"\n[server]\nlisten = ["unix:///a"]\n')
    assert load_server(path) == ServerConfig(listen=("unix:///a",))


def test_the_variables_of_one_do_not_disturb_the_other() -> None:
    both = {"ASYNC_CACHE_L1_BYTES": "1MiB", "ASYNC_CACHE_L2": "", "ASYNC_CACHE_SERVER_LISTEN": "unix:///a"}
    assert load(**both) == CacheConfig(l1_bytes=2**20, l2=())
    assert load_server(**both) == ServerConfig(listen=("unix:///a",))
    assert load(ASYNC_CACHE_SERVER_L1_BYTES="x", ASYNC_CACHE_L2="") == CacheConfig(l2=())
    assert load_server(ASYNC_CACHE_L1_BYTES="x", ASYNC_CACHE_SERVER_LISTEN="unix:///a").listen == ("unix:///a",)


@pytest.mark.parametrize(
    ("kind", "variable", "text"),
    [(CacheConfig, "ASYNC_CACHE_L1_BYTES", "1MiB"), (ServerConfig, "ASYNC_CACHE_SERVER_MAX_REQUESTS", "9")],
)
def test_what_is_given_says_where(kind: type[Settings], variable: str, text: str, path: Path) -> None:
    path.write_text("l1_bytes = 4096\nprefetch_share = 0.5\n[server]\nmax_requests = 5\nstall_timeout_seconds = 1.5\n")
    first, second = ("max_requests", "stall_timeout_seconds") if kind.SECTION else ("l1_bytes", "prefetch_share")
    assert {name: given.origin for name, given in kind.given(path, {}).items()} == dict.fromkeys(
        (first, second), str(path)
    )
    given = kind.given(path, {variable: text, "HOME": "/other"})
    assert {name: value.origin for name, value in given.items()} == {first: variable, second: str(path)}
    assert given[first].value == text, "as it stands there"
    assert kind.given(None, {}) == {}


def test_a_value_that_does_not_fit_is_told_with_where_it_is(path: Path) -> None:
    path.write_text('l1_bytes = "much"\n[server]\nmax_requests = "many"\n')
    for kind in (CacheConfig, ServerConfig):
        with pytest.raises(ConfigError, match=f"^{re.escape(str(path))}: "):
            kind.load(path, {})
    with pytest.raises(ConfigError, match=r"^ASYNC_CACHE_SERVER_MAX_REQUESTS: max_requests must be a number"):
        load_server(path, ASYNC_CACHE_SERVER_MAX_REQUESTS="many")


@pytest.mark.parametrize(
    ("kind", "text", "setting"),
    [
        (CacheConfig, 'l1_bytes = "much"', "l1_bytes"),
        (CacheConfig, "l1_bytes = 5", "l1_bytes"),
        (CacheConfig, 'l2 = "memory://a memory://b"', "l2"),
        (CacheConfig, "l2 = [5]", "l2"),
        (CacheConfig, "lookup_timeout_seconds = 1e308", "lookup_timeout_seconds"),
        (CacheConfig, "lookup_timeout_seconds = 2000-01-01", "lookup_timeout_seconds"),
        (CacheConfig, "[l3]", "unknown setting 'l3"),
        (ServerConfig, "server = 5", "server"),
        (ServerConfig, '[server]\nlisten = "unix:///a"', "listen"),
        (ServerConfig, '[server]\nlisten = ["unix:a"]', "listen"),
        (ServerConfig, "[server]\nlisten = []", "listen"),
        (ServerConfig, '[server]\nlisten = ["tcp://0.0.0.0:0"]', "listen"),
        (ServerConfig, "[server]\nshutdown_timeout_seconds = 1e308", "shutdown_timeout_seconds"),
        (ServerConfig, "[server]\ntenants = 5", "tenants"),
        (ServerConfig, '[server.tenants.a]\ntokens = "token-number-of-a"', "tenants"),
        (ServerConfig, '[server.tenants.a]\ntokens = ["token-number-of-a"]\nsalts = "s"', "tenants"),
    ],
)
def test_what_is_wrong_of_a_file_is_told_with_the_file_and_the_setting(
    kind: type[Settings], text: str, setting: str, path: Path
) -> None:
    path.write_text(text)
    with pytest.raises(ConfigError, match=f"^{re.escape(str(path))}: {re.escape(setting)}\\b"):
        kind.load(path, {})


def test_what_is_wrong_of_a_variable_is_told_with_the_variable_and_the_setting(path: Path) -> None:
    path.write_text('[server]\nlisten = ["unix:///a"]\n')
    with pytest.raises(ConfigError, match=r"^ASYNC_CACHE_L1_BYTES: l1_bytes: 'much' is not a size"):
        load(ASYNC_CACHE_L1_BYTES="much")
    with pytest.raises(ConfigError, match=r"^ASYNC_CACHE_SERVER_LISTEN: listen: tcp://0.0.0.0:0 can be reached"):
        load_server(path, ASYNC_CACHE_SERVER_LISTEN="tcp://0.0.0.0:0")


@pytest.mark.parametrize("start", ["", "\ufeff"], ids=["no mark", "a byte order mark"])
def test_a_file_is_utf_8_in_every_locale(start: str, path: Path) -> None:
    path.write_text(f'{start}l2 = ["memory://é"]\n# 漢字\n', encoding="utf-8")
    program = "import sys; from async_cache import CacheConfig; print(ascii(CacheConfig.load(sys.argv[1], {}).l2))"
    run = subprocess.run(
        [sys.executable, "-X", "utf8=0", "-c", program, str(path)],
        env=os.environ | {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (run.stdout, run.stderr) == ("('memory://\\xe9',)\n", "")


def test_paths_need_not_be_utf_8(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", os.fsdecode(b"/users/\xff\n"))
    (url,) = default_l2()
    backend = from_url(url)
    assert isinstance(backend, FileSystemBackend)
    assert os.fsencode(backend.path) == b"/users/\xff\n/async_cache-2"
    assert backend.name == "fs:///users/%FF%0A/async_cache-2", "it can be printed, and sent"


def test_no_urls_are_a_cache_in_memory_only() -> None:
    assert load(ASYNC_CACHE_L2="").l2 == CacheConfig(l2=()).l2 == ()


def test_a_list_of_urls_is_kept_as_it_was() -> None:
    urls = ["memory://b", "memory://a"]
    config = CacheConfig(l2=urls)
    urls.clear()
    assert config.l2 == ("memory://b", "memory://a")


@pytest.mark.parametrize(("kind", "name"), [(CacheConfig, "l2"), (ServerConfig, "listen")])
def test_a_list_of_urls_is_of_the_declared_type(kind: type[Settings], name: str) -> None:
    assert get_type_hints(kind)[name] == Sequence[str], "a type checker lets a user pass a list"


def test_settings_are_frozen() -> None:
    with pytest.raises(AttributeError):
        CacheConfig().l1_bytes = 1  # type: ignore[misc]


@pytest.mark.parametrize("base", ["/users/a b?#%é", None, "", "relative"])
def test_the_default_directory_is_below_that_of_the_user(base: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/user")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    if base is not None:
        monkeypatch.setenv("XDG_CACHE_HOME", base)
    (url,) = default_l2()
    parent = base if base and base.startswith("/") else "/home/user/.cache"
    assert from_url(url).name == f"fs://{parent}/async_cache-{VERSION}", (
        "a store of another version is left where it is"
    )
    assert from_url(url).usage().capacity_bytes == 10 * 2**30


def test_without_a_home_the_default_says_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(ConfigError, match="set l2"):
        CacheConfig()
    assert CacheConfig(l2=()).l2 == ()


def test_a_home_that_is_not_absolute_is_named_and_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", "somewhere/relative")
    with pytest.raises(ConfigError, match="the home directory 'somewhere/relative' is not absolute: set l2"):
        CacheConfig()
    assert CacheConfig(l2=()).l2 == ()


# What can not be used.


@pytest.mark.parametrize("value", [0, -1, True, None, "1", float("nan"), float("inf"), [1]], ids=repr)
@pytest.mark.parametrize(
    ("kind", "name"), [(CacheConfig, name) for name in NUMBERS] + [(ServerConfig, name) for name in SERVER_NUMBERS]
)
def test_a_number_that_can_not_be_used_is_refused(kind: type[Settings], name: str, value: Any) -> None:
    if (name, value) == ("prefill_tokens_per_second", 0):  # where that is not known
        assert CacheConfig(prefill_tokens_per_second=value).prefill_tokens_per_second == 0
        return
    with pytest.raises(ConfigError, match=f"^{name} must be"):
        kind(**{name: value})


@pytest.mark.parametrize("kind", [CacheConfig, ServerConfig])
def test_seconds_are_bounded(kind: type[Settings]) -> None:
    for name in (name for name in kind.__struct_fields__ if name.endswith("_seconds")):
        assert getattr(kind(**{name: 1e9}), name) == 1e9
        with pytest.raises(ConfigError, match=f"^{name} must be more than 0 and at most 1e9, not 1e"):
            kind(**{name: 1e308})


def test_l1_is_a_page_at_least() -> None:
    with pytest.raises(ConfigError, match=r"^l1_bytes must be at least a page of 4096 bytes, not 4095"):
        CacheConfig(l1_bytes=4095)


@pytest.mark.parametrize("name", ["l1_bytes", "load_inflight_bytes", "breaker_failures"])
def test_a_count_is_whole(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} must be a whole number"):
        CacheConfig(**{name: 1.5})


@pytest.mark.parametrize("name", ["max_connections", "max_requests"])
def test_a_limit_of_the_server_is_whole(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} must be a whole number"):
        ServerConfig(**{name: 1.5})


@pytest.mark.parametrize("name", ["prefetch_share", "writeback_share"])
def test_a_share_is_at_most_1(name: str) -> None:
    assert getattr(CacheConfig(**{name: 1}), name) == 1
    with pytest.raises(ConfigError, match=f"{name} must be at most 1"):
        CacheConfig(**{name: 1.01})


@pytest.mark.parametrize("urls", ["memory://", b"memory://", None, 5, {"memory://"}, [1], [None]], ids=repr)
def test_urls_that_are_no_list_of_text_are_refused(urls: Any) -> None:
    with pytest.raises(ConfigError, match="l2 must be a list of URLs"):
        CacheConfig(l2=urls)


@pytest.mark.parametrize("urls", ["unix:///a", b"unix:///a", None, 5, {"unix:///a"}, [1], [None]], ids=repr)
def test_addresses_that_are_no_list_of_text_are_refused(urls: Any) -> None:
    with pytest.raises(ConfigError, match="listen must be a list of URLs"):
        ServerConfig(listen=urls)


@pytest.mark.parametrize("url", ["", "/run/cache.sock", "http://localhost:80", "unix://cache.sock", "tcp://localhost"])
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="allowed: unix:///path, tcp://host:port or tls://host:port"):
        ServerConfig(listen=[*UNIX, url])


def test_a_server_needs_an_address() -> None:
    with pytest.raises(ConfigError, match="a server needs an address"):
        ServerConfig(listen=())
    with pytest.raises(ConfigError, match="a server needs an address"):
        load_server(ASYNC_CACHE_SERVER_LISTEN="")


@pytest.mark.parametrize("text", ["l3 = 1", "[l1]\nbytes = 1", "L1_bytes = 1"])
def test_an_unknown_key_of_the_file_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "cache.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"unknown setting .*l1_bytes, l2, "):
        load(path)


@pytest.mark.parametrize("text", ["port = 1", "l1_bytes = 1", "[server.tenant.a]", "LISTEN = []"])
def test_an_unknown_key_of_the_server_is_refused(text: str, path: Path) -> None:
    path.write_text(f"[server]\n{text}")
    with pytest.raises(ConfigError, match=r"unknown setting .*listen, max_connections, "):
        load_server(path)


@pytest.mark.parametrize("text", ["server = 5", "server = []", "[[server]]\nmax_requests = 5"])
def test_the_server_is_a_table(text: str, path: Path) -> None:
    path.write_text(text)
    with pytest.raises(ConfigError, match="server must be a table"):
        load_server(path)


def test_an_unknown_variable_is_refused() -> None:
    with pytest.raises(ConfigError, match="unknown setting 'l1_size'"):
        load(ASYNC_CACHE_L1_SIZE="1")
    with pytest.raises(ConfigError, match="unknown setting 'port'"):
        load_server(ASYNC_CACHE_SERVER_PORT="1")
    with pytest.raises(ConfigError, match="unknown setting 'server'"):
        load(ASYNC_CACHE_SERVER="unix:///a")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("l1_bytes", "much"),
        ("l1_bytes", ""),
        ("l1_bytes", "0"),
        ("l1_bytes", "9" * 5000),
        ("prefetch_share", "half"),
        ("prefetch_share", "nan"),
        ("breaker_failures", "2.5"),
        ("lookup_timeout_seconds", "1s"),
        ("lookup_timeout_seconds", "inf"),
    ],
)
def test_a_variable_that_can_not_be_used_is_refused(name: str, text: str) -> None:
    with pytest.raises(ConfigError):
        load(**{f"ASYNC_CACHE_{name.upper()}": text})


@pytest.mark.parametrize(
    "content",
    [b"l1_bytes = ", b"\xff", None, b"l1_bytes = " + b"9" * 5000, b"a = " + b"[" * 10000],
    ids=["no TOML", "no UTF-8", "no file", "a number beyond bounds", "nested too deep"],
)
def test_a_file_that_can_not_be_read_is_named(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "cache.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=f"cannot read {re.escape(str(path))}"):
        load(path)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("4096", 4096),
        ("1B", 1),
        ("1 kb", 1000),
        ("2KiB", 2048),
        (" 1.5 MiB ", 3 * 2**19),
        ("10GB", 10**10),
        ("10gib", 10 * 2**30),
        ("1TB", 10**12),
        ("9007199254740993TiB", 9007199254740993 * 2**40),
    ],
)
def test_a_size_has_a_unit(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1", "+1", "1e3", "1,5GiB", "1 000", "1PiB", "1GiBB", "٣", "0x10", "1."])
def test_a_text_that_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="is not a size"):
        parse_bytes(text)


# Tenants.


def test_tenants_come_from_the_file(path: Path) -> None:
    path.write_text(
        f'[server]\nlisten = ["tcp://0.0.0.0:7000"]\n[server.tenants.a]\ntokens = ["{TOKENS[0]}", "{TOKENS[1]}"]\n'
        f'[server.tenants."b c"]\ntokens = ["{TOKENS[2]}"]\nsalts = ["s", ""]\n'
    )
    assert load_server(path).tenants == {
        "a": TenantConfig(tokens=(TOKENS[0], TOKENS[1])),
        "b c": TenantConfig(tokens=(TOKENS[2],), salts=("s", "")),
    }


def test_tenants_are_kept_as_they_were() -> None:
    tenants: dict[str, Any] = {"a": {"tokens": [TOKENS[0]], "salts": ["s"]}}
    config = serve_tenants(tenants)
    tenants["a"]["salts"].append("t")
    tenants.clear()
    assert config.tenants == {"a": TenantConfig(tokens=(TOKENS[0],), salts=("s",))}


def test_tenants_made_from_lists_are_kept_as_they_were() -> None:
    salts = ["s"]
    config = serve_tenants({"a": TenantConfig(tokens=[TOKENS[0]], salts=salts)})  # type: ignore[arg-type]
    salts.append("t")
    assert config.tenants == {"a": TenantConfig(tokens=(TOKENS[0],), salts=("s",))}


@pytest.mark.parametrize("url", ["tcp://0.0.0.0:0", "tcp://[::]:0", "tcp://10.0.0.5:7000", "tcp://host:7000"])
def test_an_address_that_others_can_reach_needs_tenants(url: str) -> None:
    assert serve_tenants({"a": TenantConfig(tokens=(TOKENS[0],))}, (*UNIX, url)).listen == (*UNIX, url)
    with pytest.raises(ConfigError, match=re.escape(f"{url} can be reached from other machines: it needs tenants")):
        ServerConfig(listen=(*UNIX, url))


def test_an_address_that_others_can_reach_needs_a_token() -> None:
    with pytest.raises(ConfigError):
        serve_tenants({"a": TenantConfig(tokens=())}, ANYWHERE)


@pytest.mark.parametrize("length", [15, 513])
def test_a_token_has_16_to_512_characters(length: int) -> None:
    for right in (16, 512):
        assert serve_tenants({"a": {"tokens": ["t" * right]}}).tenants["a"].tokens == ("t" * right,)
    with pytest.raises(ConfigError, match="a token of 'a' does not have 16 to 512 characters") as caught:
        serve_tenants({"a": {"tokens": [TOKENS[0], "t" * length]}})
    assert "ttt" not in str(caught.value)


@pytest.mark.parametrize("tenants", [{"a": [0, 0]}, {"a": [0], "b": [1, 0]}], ids=["of one", "of two"])
def test_a_token_is_there_once(tenants: dict[str, list[int]]) -> None:
    with pytest.raises(ConfigError, match="is there twice") as caught:
        serve_tenants({name: {"tokens": [TOKENS[n] for n in numbers]} for name, numbers in tenants.items()})
    assert TOKENS[0] not in str(caught.value)


@pytest.mark.parametrize(
    "tenants",
    [
        None,
        5,
        [],
        "token-number-0000",
        {"": {"tokens": TOKENS}},
        {"a\0": {"tokens": TOKENS}},
        {"a" * 129: {"tokens": TOKENS}},
        {1: {"tokens": TOKENS}},
        {"a": None},
        {"a": {}},
        {"a": TOKENS[0]},
        {"a": {"tokens": None}},
        {"a": {"tokens": TOKENS[0]}},
        {"a": {"tokens": [5]}},
        {"a": {"tokens": TOKENS, "salt": "s"}},
        {"a": {"tokens": TOKENS, "salts": "s"}},
        {"a": {"tokens": TOKENS, "salts": [5]}},
        {"a": {"tokens": TOKENS, "salts": ["s\n"]}},
        {"a": {"tokens": TOKENS, "salts": ["s" * 129]}},
        {"a": TenantConfig(tokens=None)},  # type: ignore[arg-type]
        {"a": TenantConfig(tokens=(5,))},  # type: ignore[arg-type]
        {"a": TenantConfig(tokens=tuple(TOKENS), salts="abc")},  # type: ignore[arg-type]
        {"a": TenantConfig(tokens=tuple(TOKENS), salts=(5,))},  # type: ignore[arg-type]
    ],
)
def test_tenants_that_can_not_be_used_are_refused(tenants: Any) -> None:
    with pytest.raises(ConfigError, match="tenants") as caught:
        serve_tenants(tenants)
    assert not any(token in str(caught.value) for token in TOKENS)


def test_tenants_are_not_taken_from_the_environment(path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^ASYNC_CACHE_SERVER_TENANTS: tenants") as caught:
        load_server(ASYNC_CACHE_SERVER_TENANTS=TOKENS[0])
    assert TOKENS[0] not in str(caught.value)
    path.write_text(f'[server]\ntenants = "{TOKENS[0]}"')
    with pytest.raises(ConfigError, match="tenants") as caught:
        load_server(path)
    assert TOKENS[0] not in str(caught.value)


def test_a_configuration_that_is_logged_does_not_tell_passwords() -> None:
    config = CacheConfig(l2=["redis://user:secret@host/0", "memory://"])
    assert "secret" not in repr(config)
    assert "('redis://***@host/0', 'memory://')" in repr(config)
    assert config.l2[0] == "redis://user:secret@host/0"


def test_a_configuration_that_is_logged_does_not_tell_its_tokens() -> None:
    assert TOKENS[0] not in repr(serve_tenants({"a": {"tokens": [TOKENS[0]]}}))
