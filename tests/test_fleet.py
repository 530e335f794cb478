"""Several servers share a store: the example and what deploys it, and what both have deleted neither serves."""

import asyncio
import gzip
import json
import os
import random
import re
import runpy
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, contextmanager
from importlib import resources
from pathlib import Path
from subprocess import PIPE
from typing import Any

import jsonschema
import kubernetes_validate
import psutil
import pytest
import yaml
from contract.support import fill, make_layout, make_prompt, pattern
from l2.valkey.servers import running, valkey_binary
from server.programs import server
from soak import rounds

from async_cache import CacheClient, CacheConfig, ConfigError, ObjectGroup, Prompt, __version__, connect
from async_cache.config import ServerConfig, parse_bytes
from async_cache.l2.mooncake.process import _kill as mooncake_kill
from async_cache.l2.urls.registry import from_urls

ROOT = Path(__file__).parents[1]
FLEET = ROOT / "examples" / "fleet"
EXAMPLE = FLEET / "fleet.py"
LAYOUT = make_layout(ObjectGroup((1000,), "uint8"))
CHUNKS = 4
WORKERS = 8
VERSIONS = 250  # the version of a prompt's bytes is a byte: they return after so many, long after they were deleted


# The example.


def start_example(*arguments: str) -> "subprocess.Popen[str]":
    command = [sys.executable, str(EXAMPLE), *arguments]
    return subprocess.Popen(command, stdout=PIPE, stderr=PIPE, text=True)


@pytest.mark.parametrize(
    ("stores", "steps"), [(["valkey"], 18), (["directory"], 12), (["s3"], 18), (["valkey", "s3"], 14)]
)
def test_the_example_finds_what_it_must(stores: list[str], steps: int) -> None:
    with start_example(*(word for store in stores for word in ("--store", store))) as child:
        told, errors = child.communicate(timeout=150)
    assert child.returncode == 0, told + errors
    assert ("the first store is killed" in told) is (len(stores) > 1)
    assert len(told.splitlines()) == 1 + steps
    assert " b  " in next(line for line in told.splitlines() if line.startswith("what a stored"))


def test_two_servers_that_run_are_only_asked(tmp_path: Path) -> None:
    with two_servers(tmp_path, f"fs://{tmp_path}/store") as urls:
        with start_example("--connect", *urls) as child:
            told, errors = child.communicate(timeout=150)
        assert child.returncode == 0, told + errors
        assert "what both deleted" in told


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_example_that_is_stopped_stops_what_it_started(number: signal.Signals) -> None:
    with start_example() as child:
        example = psutil.Process(child.pid)
        started: list[psutil.Process] = []
        while len(started) < 2 and child.poll() is None:  # Valkey and a server, which is still starting
            started = example.children(recursive=True)
        os.kill(child.pid, number)
        _, errors = child.communicate(timeout=150)
    assert child.returncode == 130, errors
    assert not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in started)


def test_what_cannot_be_a_store_is_one_line() -> None:
    with start_example("--store", "nope://x") as child:
        told, errors = child.communicate(timeout=150)
    assert (child.returncode, told) == (1, "")
    assert len(errors.splitlines()) == 1
    assert "unknown scheme 'nope'" in errors


@pytest.mark.parametrize("of", ["the example", "Mooncake's helper"])
async def test_a_signal_to_a_process_that_has_ended_leaves_it_to_who_waits(
    of: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """asyncio's thread that waits for it comes late, as on a busy machine, and must not find it gone."""
    kill = runpy.run_path(str(EXAMPLE))["tell"] if of == "the example" else None
    signalled, waitpid = threading.Event(), os.waitpid

    def late(pid: int, options: int) -> tuple[int, int]:
        signalled.wait(100)
        return waitpid(pid, options)

    monkeypatch.setattr(os, "waitpid", late)
    ended = await asyncio.create_subprocess_exec(sys.executable, "-c", "raise SystemExit(7)")
    try:
        await asyncio.to_thread(os.waitid, os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)
        kill(ended, signal.SIGTERM) if kill is not None else mooncake_kill(ended)
    finally:
        signalled.set()
    assert await ended.wait() == 7
    assert "Unknown child process" not in caplog.text


# What deploys it.


def settings_of(text: str, path: Path) -> tuple[CacheConfig, ServerConfig]:
    """The settings in a TOML text, as the server reads them; its backends are made, and not opened."""
    path.write_text(text)
    config = CacheConfig.load(path, environ={})
    assert from_urls(config.l2)
    return config, ServerConfig.load(path, environ={})


def manifests() -> dict[str, Any]:
    """What the Kubernetes manifest has, by kind."""
    return {document["kind"]: document for document in yaml.safe_load_all((FLEET / "kubernetes.yaml").read_text())}


def containers() -> list[dict[str, Any]]:
    pods = [manifests()[kind]["spec"]["template"]["spec"] for kind in ("DaemonSet", "StatefulSet")]
    pods.append(manifests()["Pod"]["spec"])
    return [container for pod in pods for container in pod["containers"] + pod.get("initContainers", [])]


def test_the_compose_file_fits_its_schema() -> None:
    compose = yaml.safe_load((FLEET / "compose.yaml").read_text())
    schema = resources.files("check_jsonschema.builtin_schemas.vendor").joinpath("compose-spec.json").read_text()
    jsonschema.validate(compose, json.loads(schema))
    with pytest.raises(jsonschema.ValidationError):  # the schema says something
        jsonschema.validate({"services": {"a": {"imagee": "x"}}}, json.loads(schema))


@pytest.mark.parametrize("kind", ["ConfigMap", "DaemonSet", "Service", "StatefulSet", "Pod"])
def test_the_manifest_fits_the_schemas_of_kubernetes(kind: str) -> None:
    kubernetes_validate.validate(manifests()[kind], kubernetes_validate.latest_version(), strict=True)
    broken = manifests()[kind] | {"unknown": 1}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, kubernetes_validate.latest_version(), strict=True)


def test_the_settings_are_those_of_a_server(tmp_path: Path) -> None:
    text = (FLEET / "server.toml").read_text()
    config, serving = settings_of(text, tmp_path / "server.toml")
    assert serving.listen == ("unix:///run/async-cache/cache.sock",)
    assert manifests()["ConfigMap"]["data"]["server.toml"] == text
    with pytest.raises(ConfigError):
        settings_of(text.replace("lookup_timeout", "look_timeout"), tmp_path / "server.toml")
    limits = {container["name"]: container["resources"]["limits"]["memory"] for container in containers()}
    assert parse_bytes(f"{limits['server']}B") >= config.l1_bytes + 2 * 2**30, "L1 counts as the server's memory"


def test_images_are_named_with_a_version_and_nothing_runs_as_root_but_one_step() -> None:
    images = set(
        re.findall(r"image: (\S+)", (FLEET / "kubernetes.yaml").read_text() + (FLEET / "compose.yaml").read_text())
    )
    assert images == {f"async-kv-cache:{__version__}", "valkey/valkey:8.1.3-bookworm", "engine:1.0"}
    assert not re.search(r"FROM \S+:latest|FROM [^:\s]+$", (FLEET / "Dockerfile").read_text(), re.MULTILINE)
    as_root = [c["name"] for c in containers() if c["securityContext"].get("runAsUser") == 0]
    assert as_root == ["own-the-directory"]
    assert all(c["securityContext"]["capabilities"]["drop"] == ["ALL"] for c in containers())


@pytest.mark.parametrize("where", ["compose", "kubernetes"])
def test_valkey_takes_its_settings_and_the_password_from_standard_input(where: str, tmp_path: Path) -> None:
    settings = manifests()["ConfigMap"]["data"]["valkey.conf"]
    if where == "compose":
        settings = (FLEET / "valkey.conf").read_text()
    settings += f"requirepass secret\nport 0\nunixsocket {tmp_path}/valkey\n"
    with subprocess.Popen([valkey_binary(), "-"], cwd=tmp_path, stdin=PIPE, stdout=PIPE, text=True) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.write(settings)
        child.stdin.close()
        said = next((line for line in child.stdout if "Ready to accept" in line or "FATAL" in line), "")
        child.terminate()
    assert "Ready to accept" in said


def test_the_document_shows_what_the_simulation_prints() -> None:
    document = (ROOT / "docs" / "deployment.md").read_text()
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "sizing.py"], stdout=PIPE, text=True, timeout=150, check=True
    )
    tables = [block for block in done.stdout.split("\n\n") if block.startswith("|")]
    assert len(tables) == 5
    for shown in tables:
        assert shown.strip() in document


def test_the_simulation_takes_a_trace(tmp_path: Path) -> None:
    row = {"input_length": 2048, "output_length": 100, "hash_ids": [1, 2, 3, 4]}
    with gzip.open(tmp_path / "trace.jsonl.gz", "wt") as lines:
        lines.writelines(f"{json.dumps(row | {'timestamp': second * 1000})}\n" for second in range(400))
    command = [
        sys.executable,
        ROOT / "benchmarks" / "sizing.py",
        "--hosts",
        "2",
        "--trace",
        tmp_path / "trace.jsonl.gz",
    ]
    told = subprocess.run(command, stdout=PIPE, text=True, timeout=150, check=True).stdout
    assert re.search(r"\| rack \| 2 \| by chance \| 100% \|  \| 0% \|  \| 0% \|", told)


# Two servers against a model.


@contextmanager
def two_servers(directory: Path, l2: str) -> Iterator[list[str]]:
    """Their addresses."""
    with ExitStack() as stack:
        urls = []
        for name in ("a", "b"):
            folder = directory / name
            folder.mkdir()
            urls.append(stack.enter_context(server(folder, l2=[l2], l1="8MiB")).url)
        yield urls


@pytest.fixture(params=["valkey", "directory"])
async def fleet(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[tuple[CacheClient, CacheClient]]:
    """Clients of two servers that share one store."""
    with ExitStack() as stack:
        if request.param == "valkey":
            l2 = f"valkey://127.0.0.1:{stack.enter_context(running(tmp_path / 'valkey')).port}"
        else:
            l2 = f"fs://{tmp_path}/store"
        urls = stack.enter_context(two_servers(tmp_path, l2))
        async with connect(urls[0]) as a, connect(urls[1]) as b:
            yield a, b


async def find(cache: CacheClient, prompt: Prompt) -> list[bytes]:
    """The bytes that a server has of a prompt, by chunk."""
    prefetch = cache.prefetch(prompt)
    await prefetch.load_done
    async with cache.read(prefetch.request_id) as lease:
        found = [bytes(chunk.views[0]) for chunk in lease]
    await cache.end_request(prefetch.request_id)
    return found


class Model:
    """What may be served of one prompt, which one worker at a time stores, deletes and finds through both servers.

    Whoever stores it writes bytes of a new version. What one server deleted the other may serve, from its own L1; what
    both deleted neither may.
    """

    def __init__(self, number: int, told: Counter[str]):
        self.prompt = make_prompt(CHUNKS, number, LAYOUT)
        self.told = told
        self.version = 0
        self.alive: set[int] = set()  # versions that were stored since both deleted
        self.everywhere = False  # it is in L2, and nothing was deleted since: both must find all of it

    def allowed(self, versions: set[int]) -> list[set[bytes]]:
        """By chunk, what may be served."""
        return [{pattern(self.prompt, i, version=version) for version in versions} for i in range(CHUNKS)]

    async def find(self, cache: CacheClient, *, must: bool = False) -> int:
        """Look at what is there, and return how many chunks that is."""
        found = await find(cache, self.prompt)
        for served, allowed in zip(found, self.allowed(self.alive), strict=False):
            assert served in allowed, "bytes that were deleted"
        assert not must or len(found) == CHUNKS, "what one stored the other did not find"
        self.told["found" if len(found) == CHUNKS else "found a part" if found else "found nothing"] += 1
        return len(found)

    async def store(self, *caches: CacheClient) -> None:
        """Store it through these, at the same time; each has bytes of its own."""
        versions = [(self.version + n) % VERSIONS for n in range(len(caches))]
        self.version += len(caches)
        self.alive |= set(versions)
        async with asyncio.TaskGroup() as tasks:
            for cache, version in zip(caches, versions, strict=True):
                tasks.create_task(fill(cache, self.prompt, version=version))
        self.told["stored"] += len(caches)

    async def delete_everywhere(self, caches: tuple[CacheClient, CacheClient], *, together: bool) -> None:
        """Delete it through both; afterwards nothing of it may be served."""
        if together:
            await asyncio.gather(*(cache.delete(self.prompt) for cache in caches))
        else:
            for cache in caches:
                await cache.delete(self.prompt)
        self.alive.clear()
        self.everywhere = False
        self.told["deleted by both"] += 1


async def play(model: Model, caches: tuple[CacheClient, CacheClient], rng: random.Random) -> None:
    """One round: an action, and what both serve after it."""
    one, other = rng.sample(caches, 2)
    how = rng.random()
    if how < 0.3:
        await model.store(one)
        if rng.random() < 0.7:
            await one.flush()
            model.everywhere = model.everywhere or len(model.alive) == 1
    elif how < 0.4:
        await model.store(one, other)
    elif how < 0.5:
        await one.clear("l1")
    elif how < 0.6:
        await one.delete(model.prompt)
        model.everywhere = False
        model.told["deleted by one"] += 1
    elif how < 0.7:  # asked for while it is deleted: nothing waits to be written, so it does not return
        await asyncio.gather(one.flush(), other.flush())
        asking = asyncio.gather(*(find(cache, model.prompt) for cache in caches for _ in range(3)))
        await model.delete_everywhere((one, other), together=True)
        await asking
    elif how < 0.8:
        await model.delete_everywhere((one, other), together=rng.random() < 0.5)
    elif how < 0.95:  # deleted while it is written to the store
        await model.store(one)
        await asyncio.sleep(rng.choice((0, 0.001, 0.002)))
        await model.delete_everywhere((one, other), together=rng.random() < 0.5)
    for cache in rng.sample(caches, 2):
        await model.find(cache, must=model.everywhere)


async def test_what_both_deleted_none_serves_and_what_one_stored_the_other_finds(
    fleet: tuple[CacheClient, CacheClient],
) -> None:
    told: Counter[str] = Counter()

    async def work(number: int) -> None:
        rng = random.Random(number)
        models = [Model(10 * number + n, told) for n in range(3)]
        for _ in range(rounds(200, 10_000) // WORKERS):
            await play(rng.choice(models), fleet, rng)

    async with asyncio.TaskGroup() as tasks:
        for number in range(WORKERS):
            tasks.create_task(work(number))
    assert min(told[what] for what in ("found", "found nothing", "stored", "deleted by both", "deleted by one")) > 10
