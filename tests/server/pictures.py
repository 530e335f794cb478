"""Make the pictures of the page in docs/: `python -m server.pictures` in tests/, after a change of how it looks.

A server under the requests of three models and a tenant, with more of them than memory holds, seen in a browser.
"""

import asyncio
import base64
import random
import sys
import tempfile
from io import BytesIO
from pathlib import Path

from contract.support import fill
from PIL import Image
from selenium.webdriver import Chrome

from async_cache import AsyncCacheError, ModelLayout, ObjectGroup, connect

from .browser import browser, show_as
from .http import BOUND_TOKEN, TENANTS, TOKEN, ServedWeb, web

DOCS = Path(__file__).parents[2] / "docs"
STORE = Path(tempfile.gettempdir(), "kv")
SECONDS = 75
MODELS = {"gpt-oss-120b": 1, "qwen3-32b": 3, "llama-3.3-70b": 1}
"""With the number of engines that each has."""
SCREENS = {
    "light": {"width": 1240, "height": 1000},
    "dark": {"width": 1240, "height": 1000, "dark": True},
    "phone": {"width": 390, "height": 844, "phone": True},
}


async def engine(url: str, model: str, number: int, *, salt: str = "", token: str = TOKEN) -> None:
    """Ask for prompts, some of them often and most of them now and then, and store what is not there."""
    layout = ModelLayout(model, (ObjectGroup((32768,), "uint8"),))
    chance, loop = random.Random(number), asyncio.get_running_loop()
    end, turn = loop.time() + SECONDS, 0
    async with connect(url, f"engine-{number}", token=token) as cache:
        while loop.time() < end:
            which, turn = int(chance.paretovariate(0.5)) % 400, turn + 1
            prompt = layout.prompt([which] * 256 * (4 + which % 13), salt=salt)
            request_id = f"req-{number}-{turn:05}"
            try:
                result = await cache.prefetch(prompt, request_id=request_id, deadline_seconds=2).load_done
                await cache.end_request(request_id)
                if result.chunks < len(prompt):
                    await fill(cache, prompt)
            except AsyncCacheError as error:
                sys.stderr.write(f"{request_id}: {error}\n")
            await asyncio.sleep(chance.expovariate(20))


async def traffic(url: str) -> None:
    engines = [model for model, count in MODELS.items() for _ in range(count)]
    await asyncio.gather(
        *(engine(url, model, number) for number, model in enumerate(engines)),
        engine(url, "llama-3.3-70b", len(engines), salt="acme", token=BOUND_TOKEN),
    )


def picture(chrome: Chrome, name: str) -> None:
    """The whole page on one of the screens."""
    show_as(chrome, **SCREENS[name])  # type: ignore[arg-type]
    chrome.execute_script("document.activeElement.blur()")  # type: ignore[no-untyped-call]
    size = chrome.execute_cdp_cmd("Page.getLayoutMetrics", {})["cssContentSize"]
    clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
    shot = chrome.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip})
    Image.open(BytesIO(base64.b64decode(shot["data"]))).quantize(128).save(DOCS / f"page_{name}.png", optimize=True)


async def take(site: ServedWeb, chrome: Chrome) -> None:
    chrome.get(site.url)
    chrome.execute_script("sessionStorage.setItem('token', arguments[0])", TOKEN)  # type: ignore[no-untyped-call]
    chrome.get(site.url)
    running = asyncio.create_task(traffic(site.served.url))
    await asyncio.sleep(SECONDS - 10)
    for name in SCREENS:
        await asyncio.to_thread(picture, chrome, name)
    await running


def main() -> None:
    with tempfile.TemporaryDirectory() as place:
        config = Path(place, "server.toml")
        config.write_text(TENANTS)
        l2 = [f"fs://{STORE}?capacity=192MiB"]
        with web(Path(place), l1="40MiB", l2=l2, config=config) as site, browser() as chrome:
            asyncio.run(take(site, chrome))


if __name__ == "__main__":
    main()
