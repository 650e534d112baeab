"""The built site, once a run, and a browser that looks at it."""

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import browser as chromium
import pytest
from pages import ROOT
from playwright.sync_api import Browser, Page


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whatever needs the built site runs on one worker, which builds it once."""
    for item in items:
        if "build" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.xdist_group("site"))


@pytest.fixture(scope="session")
def build() -> subprocess.CompletedProcess[str]:
    """mkdocs has run; it builds the site, and says by its status whether it had to warn of something."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.fixture(scope="session")
def site(build: subprocess.CompletedProcess[str]) -> Path:
    """The built site; that there was no warning is a test of its own."""
    said = build.stdout + build.stderr
    assert build.returncode == 0 or re.search(r"Aborted with \d+ warnings? in strict mode", said), said
    return ROOT / "build" / "site"


@pytest.fixture(scope="session")
def address(site: Path) -> Iterator[str]:
    """Of a server that has the site."""
    with chromium.served(site) as at:
        yield at


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    with chromium.opened() as browser:
        yield browser


@pytest.fixture
def visit(address: str, browser: Browser) -> Iterator[Callable[..., Page]]:
    """visit("memory/", width=400, color_scheme="dark", ...): an open page, options as of a browser context.

    After the test, that no page wrote an error to the console, threw one, or asked another host for anything.
    """
    contexts, wrong = [], []

    def visit(page: str, width: int = 1280, height: int = 900, **options: Any) -> Page:
        context = browser.new_context(viewport={"width": width, "height": height}, **options)
        contexts.append(context)
        context.set_default_timeout(10_000)
        opened = context.new_page()
        opened.on(
            "console", lambda said: wrong.append(said.text) if said.type in ("error", "warning") else None
        )
        opened.on("pageerror", lambda error: wrong.append(str(error)))
        opened.on(
            "response", lambda got: wrong.append(f"{got.status} {got.url}") if got.status > 399 else None
        )
        opened.on("request", lambda asked: None if _ours(asked.url, address) else wrong.append(asked.url))
        opened.goto(address + page)
        return opened

    yield visit
    for context in contexts:
        context.close()
    assert not wrong


def _ours(url: str, address: str) -> bool:
    return url.startswith((address, "data:", "blob:"))
