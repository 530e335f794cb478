"""Settings: from arguments, TOML and environment; what can not be used is refused; the document lists all of them."""

import os
import re
from pathlib import Path
from typing import Any

import pytest

from async_cache.config import CacheConfig, default_l2, parse_bytes
from async_cache.errors import ConfigError
from async_cache.l2.registry import from_url

DOCUMENT = (Path(__file__).parent.parent / "docs" / "configuration.md").read_text()
ROWS = [re.findall(r"`([^`]*)`", row)[:3] for row in re.findall(r"^\| `.*ASYNC_CACHE_.*$", DOCUMENT, re.MULTILINE)]
NUMBERS = [name for name in CacheConfig.__struct_fields__ if name != "l2"]


def load(path: Path | None = None, **environ: str) -> CacheConfig:
    return CacheConfig.load(path, environ)


# The document.


def test_the_document_lists_every_setting_in_order() -> None:
    assert [name for name, _, _ in ROWS] == list(CacheConfig.__struct_fields__)


@pytest.mark.parametrize(("name", "variable", "default"), ROWS, ids=[row[0] for row in ROWS])
def test_the_document_has_the_default_and_the_variable(
    name: str, variable: str, default: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/users/cache")
    loaded = load(**{variable: os.path.expandvars(default)})
    assert variable == f"ASYNC_CACHE_{name.upper()}"
    assert getattr(loaded, name) == getattr(CacheConfig(), name)


def test_the_file_and_the_urls_of_the_document_can_be_used(tmp_path: Path) -> None:
    path = tmp_path / "cache.toml"
    path.write_text("".join(re.findall(r"^```toml\n(.*?)^```$", DOCUMENT, re.MULTILINE | re.DOTALL)))
    config = load(path)
    assert config.l1_bytes == 64 * 2**30
    assert [from_url(url).usage().capacity_bytes for url in config.l2] == [8 * 2**30, 2 * 2**40]


def test_the_document_has_the_urls_and_parameters_of_every_backend() -> None:
    with pytest.raises(ConfigError) as caught:
        from_url("none://")
    forms = str(caught.value).partition("allowed: ")[2].split(" or ")
    assert [line.strip() for line in re.findall(r"^    \w+://.*$", DOCUMENT, re.MULTILINE)] == forms
    parameters = [name for form in forms for name in re.findall(r"[?&](\w+)=", form)]
    assert re.findall(r"^\| \| `(\w+)`", DOCUMENT, re.MULTILINE) == parameters


# Where they come from.


def test_a_variable_overrides_the_file(tmp_path: Path) -> None:
    path = tmp_path / "cache.toml"
    path.write_text('l1_bytes = 4096\nprefetch_share = 0.5\nl2 = ["memory://"]\n')
    config = load(path, ASYNC_CACHE_L1_BYTES="1MiB", ASYNC_CACHE_L2="memory://a\n memory://b", HOME="/other")
    assert config == CacheConfig(l1_bytes=2**20, prefetch_share=0.5, l2=("memory://a", "memory://b"))


def test_no_urls_are_a_cache_in_memory_only() -> None:
    assert load(ASYNC_CACHE_L2="").l2 == CacheConfig(l2=()).l2 == ()


def test_a_list_of_urls_is_kept_as_it_was(tmp_path: Path) -> None:
    urls = ["memory://b", "memory://a"]
    config = CacheConfig(l2=urls)  # type: ignore[arg-type]
    urls.clear()
    assert config.l2 == ("memory://b", "memory://a")


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
    assert from_url(url).name == f"fs://{parent}/async_cache"
    assert from_url(url).usage().capacity_bytes == 10 * 2**30


def test_without_a_home_the_default_says_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(ConfigError, match="set l2"):
        CacheConfig()
    assert CacheConfig(l2=()).l2 == ()


# What can not be used.


@pytest.mark.parametrize("value", [0, -1, True, None, "1", float("nan"), float("inf"), [1]], ids=repr)
@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_that_can_not_be_used_is_refused(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"^{name} must be"):
        CacheConfig(**{name: value})


@pytest.mark.parametrize("name", ["l1_bytes", "load_inflight_bytes", "breaker_failures"])
def test_a_count_is_whole(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} must be a whole number"):
        CacheConfig(**{name: 1.5})


@pytest.mark.parametrize("name", ["prefetch_share", "writeback_share"])
def test_a_share_is_at_most_1(name: str) -> None:
    assert getattr(CacheConfig(**{name: 1}), name) == 1
    with pytest.raises(ConfigError, match=f"{name} must be at most 1"):
        CacheConfig(**{name: 1.01})


@pytest.mark.parametrize("urls", ["memory://", b"memory://", None, 5, {"memory://"}, [1], [None]], ids=repr)
def test_urls_that_are_no_list_of_text_are_refused(urls: Any) -> None:
    with pytest.raises(ConfigError, match="l2 must be a list of URLs"):
        CacheConfig(l2=urls)


@pytest.mark.parametrize("text", ["l3 = 1", "[l1]\nbytes = 1", "L1_bytes = 1"])
def test_an_unknown_key_of_the_file_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "cache.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"unknown setting .*l1_bytes, l2, "):
        load(path)


def test_an_unknown_variable_is_refused() -> None:
    with pytest.raises(ConfigError, match="unknown setting 'l1_size'"):
        load(ASYNC_CACHE_L1_SIZE="1")


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


@pytest.mark.parametrize("content", [b"l1_bytes = ", b"\xff", None], ids=["no TOML", "no UTF-8", "no file"])
def test_a_file_that_can_not_be_read_is_named(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "cache.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=f"can not read {re.escape(str(path))}"):
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
