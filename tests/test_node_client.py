"""The client in another language, which was written from the protocol's document alone, run against a real server."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from server.programs import server

CLIENT = Path(__file__).parents[1] / "examples" / "client.mjs"
TOKEN = "token-of-acme-number-one"


def node(*arguments: str) -> "subprocess.CompletedProcess[str]":
    program = shutil.which("node")
    assert program is not None, "apt-get install nodejs"
    return subprocess.run([program, *arguments], capture_output=True, text=True, timeout=150, check=False)


@pytest.mark.parametrize("kind", ["unix", "tcp"])
def test_it_stores_asks_and_reads(kind: str, tmp_path: Path) -> None:
    url = f"unix://{tmp_path}/s" if kind == "unix" else "tcp://127.0.0.1:0"
    with server(tmp_path, url) as served:
        done = node(str(CLIENT), served.url.removeprefix("unix://").removeprefix("tcp://"))
        assert done.stderr == ""
        # What was stored before is not stored again: all that it holds is given back, and its bytes are still there.
        assert json.loads(done.stdout) == {"stored": 3, "hits": 3, "loaded": 3, "read": 3}
        again = node(str(CLIENT), served.url.removeprefix("unix://").removeprefix("tcp://"))
        assert json.loads(again.stdout) == {"stored": 0, "hits": 3, "loaded": 3, "read": 3}


def test_it_is_told_why_it_is_refused(tmp_path: Path) -> None:
    config = tmp_path / "cache.toml"
    config.write_text(f'[server.tenants.acme]\ntokens = ["{TOKEN}"]\n')
    with server(tmp_path, "tcp://127.0.0.1:0", config=config) as served:
        where = served.url.removeprefix("tcp://")
        assert "the server wants a token" in node(str(CLIENT), where).stderr
        assert json.loads(node(str(CLIENT), where, TOKEN).stdout)["read"] == 3


def test_its_messagepack_is_messagepack() -> None:
    script = f"""
        import {{ pack, unpack }} from "{CLIENT}";
        import assert from "node:assert/strict";
        const long = "x".repeat(70000), many = Array.from({{ length: 70000 }}, (_, n) => n % 7);
        const numbers = [0, 127, 128, 2 ** 40, -1, -40, 1.5];
        const bytes = [0, 200, 300, 70000].map(size => Buffer.alloc(size, 7));
        for (const value of [null, true, false, ...numbers, ...bytes, "", "é".repeat(20), long, many, [], [[1], "a"]])
            assert.deepEqual(unpack(pack(value)), value);
    """
    assert node("--input-type=module", "-e", script).stderr == ""
