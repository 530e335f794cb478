"""The dashboard and the alerts ask for what there is: a real Prometheus scrapes a real server, and answers them."""

import asyncio
import json
import re
import shutil
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import DEVNULL, Popen
from typing import Any
from urllib.error import URLError
from urllib.parse import urlencode
from urllib.request import urlopen

import pytest
from contract.support import fill, make_prompt

from async_cache import connect

from .http import TENANTS, TOKEN, web
from .support import wait_until

DEPLOY = Path(__file__).parents[2] / "deploy"
RULES = DEPLOY / "prometheus" / "alerts.yml"
CONFIG = DEPLOY / "prometheus" / "prometheus.yml"
DASHBOARD = json.loads((DEPLOY / "grafana" / "async_cache.json").read_text())
QUERIES = {
    f"{panel['title']} {target['refId']}": target["expr"]
    for panel in DASHBOARD["panels"]
    for target in panel.get("targets", ())
}
OPERATIONS = (DEPLOY.parent / "docs" / "operations.md").read_text()


class Prometheus:
    """One that runs."""

    def __init__(self, url: str):
        self.url = url

    def ask(self, path: str, **parameters: str) -> Any:
        with urlopen(f"{self.url}/api/v1/{path}?{urlencode(parameters)}", timeout=100) as response:
            return json.load(response)["data"]

    def query(self, text: str) -> Any:
        return self.ask("query", query=text)["result"]

    def alerts(self) -> dict[str, str]:
        return {alert["labels"]["alertname"]: alert["state"] for alert in self.ask("alerts")["alerts"]}


@contextmanager
def prometheus(directory: Path, target: str) -> Iterator[Prometheus]:
    """One that scrapes a server as our example says, but more often."""
    program = shutil.which("prometheus")
    assert program is not None, "apt-get install prometheus"
    text = CONFIG.read_text().replace("15s", "1s").replace("127.0.0.1:9600", target).replace("alerts.yml", str(RULES))
    token = directory / "token"
    token.write_text(TOKEN)
    text = text.replace("# authorization", "authorization").replace("#   credentials", "  credentials")
    text = text.replace("/etc/prometheus/async_cache.token", str(token))
    text = text.replace("global:", "global:\n  evaluation_interval: 1s")
    config = directory / "prometheus.yml"
    config.write_text(text)
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [program, f"--config.file={config}", f"--web.listen-address={address}"]
    command += [f"--storage.tsdb.path={directory}/tsdb", "--log.level=error"]
    with (directory / "prometheus.log").open("w") as log, Popen(command, stdout=DEVNULL, stderr=log) as process:
        try:
            yield Prometheus(f"http://{address}")
        finally:
            process.send_signal(signal.SIGTERM)


@pytest.mark.timeout(120)
async def test_every_query_of_the_dashboard_and_the_alerts_has_an_answer(tmp_path: Path) -> None:
    config = tmp_path / "cache.toml"
    config.write_text("[server]" + TENANTS)
    l2 = f"fs://{tmp_path}/l2?capacity=1MiB"
    with (
        web(tmp_path, l2=[l2], config=config) as site,
        prometheus(tmp_path, site.url.removeprefix("http://")) as watcher,
    ):
        async with connect(site.served.url) as cache:

            async def is_answered(query: str) -> bool:
                await exchange(cache)
                try:
                    return bool(await asyncio.to_thread(watcher.query, query))
                except URLError:  # it has just begun
                    return False

            await wait_until(lambda: is_answered("rate(async_cache_promises_broken_total[10s]) > 0"), 60)
            unanswered = []
            for name, query in QUERIES.items():
                filled = query.replace("$__rate_interval", "30s")
                filled = re.sub(r"\$(instance|tenant|model)", ".*", filled)
                assert "$" not in filled
                if not await asyncio.to_thread(watcher.query, filled):
                    unanswered.append(name)
            assert unanswered == []
            known = set(await asyncio.to_thread(watcher.ask, "label/__name__/values"))
            groups = (await asyncio.to_thread(watcher.ask, "rules"))["groups"]
        rules = [rule for group in groups for rule in group["rules"]]
        assert len(rules) == RULES.read_text().count("- alert:") > 8
        for rule in rules:
            assert (rule["health"], rule.get("lastError")) == ("ok", None)
            assert set(re.findall(r"\b(?:async_cache_\w+|up)\b(?=[{\[])", rule["query"])) <= known
        assert "AsyncCacheDown" not in watcher.alerts()
        site.served.stop()

        async def is_told() -> bool:
            return (await asyncio.to_thread(watcher.alerts)).get("AsyncCacheDown") == "pending"

        await wait_until(is_told, 30)


async def exchange(cache: Any) -> None:
    """Requests that hit in memory and in storage, miss, and are not kept."""
    await fill(cache, make_prompt(4))
    await cache.flush()
    for tier in ("l1", "none"):
        if tier == "l1":
            await cache.clear("l1")
        prefetch = cache.prefetch(make_prompt(5))
        await prefetch.load_done
        await cache.end_request(prefetch.request_id)
    await cache.clear("l1")
    prefetch = cache.prefetch(make_prompt(4))
    await prefetch.lookup_done
    prefetch.cancel()
    await cache.end_request(prefetch.request_id)


def test_every_alert_is_explained() -> None:
    alerts = re.findall(r"- alert: (\w+)", RULES.read_text())
    assert re.findall(r"^### (AsyncCache\w+)$", OPERATIONS, re.MULTILINE) == alerts


def test_the_dashboard_has_no_two_panels_in_one_place() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken, panel["title"]
        assert at["x"] + at["w"] <= 24
        taken |= cells
