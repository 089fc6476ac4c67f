"""One ComfyUI server for all browser tests, one browser, one tab per renderer."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from comfy_server import Comfy, Server, find_comfy, skip_below

if TYPE_CHECKING:
    from browser import ComfyPage
    from playwright.sync_api import Browser

NODES_2 = (0, 4)
"""The first ComfyUI whose frontend offers Nodes 2.0."""
CHROMIUM = shutil.which("chromium") or "/usr/bin/chromium"


def missing() -> str | None:
    """Return one line that says what these tests lack here, None where they can run."""
    if importlib.util.find_spec("playwright") is None:
        return "needs playwright: pip install playwright"
    if not Path(CHROMIUM).exists():
        return "needs Debian's chromium: apt-get install chromium"
    found = find_comfy()
    return found if isinstance(found, str) else None


MISSING = missing()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    skip_below(Path(__file__).parent, items, MISSING)


def renderers() -> list[str]:
    comfy = find_comfy()
    return ["canvas", "vue"] if isinstance(comfy, Comfy) and comfy.version >= NODES_2 else ["canvas"]


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    comfy = find_comfy()
    assert isinstance(comfy, Comfy), comfy
    running = Server(comfy, tmp_path_factory.mktemp("comfyui"))
    try:
        running.start()
        running.set("Comfy.TutorialCompleted", True)
        running.set("Comfy.Minimap.Visible", False)
        yield running
    finally:
        running.stop()


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        )
        yield launched
        launched.close()


@pytest.fixture(scope="session", params=renderers())
def tab(
    request: pytest.FixtureRequest,
    server: Server,
    browser: Browser,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[ComfyPage]:
    """A tab that stays open for all tests of one renderer: loading the frontend is the slow part."""
    from browser import ComfyPage, shots_folder

    server.set("Comfy.VueNodes.Enabled", request.param == "vue")
    server.set("Comfy.ColorPalette", "dark")
    page = browser.new_page(viewport={"width": 1700, "height": 1050})
    page.set_default_timeout(30_000)
    opened = ComfyPage(page, server.url, request.param, shots_folder(tmp_path_factory.mktemp("shots")))
    opened.open()
    yield opened
    page.close()


@pytest.fixture
def comfy(tab: ComfyPage, request: pytest.FixtureRequest) -> Iterator[ComfyPage]:
    """The tab with an empty canvas; afterwards a last screenshot, and nothing of the pack may have thrown."""
    tab.errors.clear()
    tab.start_empty()
    yield tab
    tab.shot(f"end-of-{request.function.__name__}")
    assert not tab.pack_errors()
