"""Files of keys: what is a key, what is not, and that nothing of it is shown."""

import os
from base64 import b64encode, urlsafe_b64encode
from pathlib import Path

import pytest

from async_cache.errors import ConfigError
from async_cache.l2.codec.keyfile import read_keys

ONE, TWO = bytes(range(224, 256)), bytes([251, 255] * 16)


def write(path: Path, data: bytes, mode: int = 0o600) -> str:
    path.write_bytes(data)
    path.chmod(mode)
    return str(path)


@pytest.mark.parametrize(
    ("data", "keys"),
    [
        (ONE, [ONE]),
        (ONE.hex().encode(), [ONE]),
        (ONE.hex().upper().encode() + b"\n", [ONE]),
        (b64encode(TWO), [TWO]),
        (urlsafe_b64encode(TWO).rstrip(b"=") + b"\r\n", [TWO]),
        (b"# new\n" + b64encode(TWO) + b"\n\n# old, until May\n  " + ONE.hex().encode() + b"\n", [TWO, ONE]),
    ],
)
def test_keys_are_bytes_or_lines_and_the_first_one_encrypts(tmp_path: Path, data: bytes, keys: list[bytes]) -> None:
    assert read_keys(write(tmp_path / "keys", data)) == keys


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "has no key"),
        (b"# nothing\n\n", "has no key"),
        (b"correct horse battery staple....", "a password is no key"),
        (b"correct horse", "line 1: a key is 32 bytes in hex or base64"),
        (ONE.hex().encode()[:-1], "line 1: a key is"),
        (ONE[:31], "line 1: a key is"),
        (ONE.hex().encode() + b"\n" + ONE.hex().encode()[:-2] + b"\n", "line 2: a key is"),
        (ONE.hex().encode() + b"\n" + b64encode(ONE), "has a key twice"),
        (b"#" * 70_000, "has no key"),
    ],
)
def test_what_is_no_key_is_refused_and_not_shown(tmp_path: Path, data: bytes, reason: str) -> None:
    path = write(tmp_path / "keys", data)
    with pytest.raises(ConfigError) as caught:
        read_keys(path)
    assert str(caught.value).startswith(f"{path!r}")
    assert reason in str(caught.value)
    assert "horse" not in str(caught.value) and ONE.hex()[:8] not in str(caught.value)


@pytest.mark.parametrize("mode", [0o604, 0o602, 0o666])
def test_keys_that_everybody_can_read_are_refused(tmp_path: Path, mode: int) -> None:
    with pytest.raises(ConfigError, match="open to every user of the machine"):
        read_keys(write(tmp_path / "keys", ONE, mode))
    assert read_keys(write(tmp_path / "keys", ONE, 0o640)) == [ONE]


def test_what_is_not_a_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe", 0o600)
    for name, reason in (("absent", "No such file"), ("", "is not a file|Is a directory"), ("pipe", "is not a file")):
        with pytest.raises(ConfigError, match=reason):
            read_keys(str(tmp_path / name))
