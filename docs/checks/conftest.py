"""The built site, once a run, and a browser that looks at it."""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import browser as chromium
import pytest
from filelock import FileLock
from pages import ROOT
from playwright.sync_api import Browser, Page


@pytest.fixture(scope="session")
def warnings(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What mkdocs said if it warned of something, else nothing. One worker of xdist builds for all."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    with FileLock(folder / "mkdocs.lock"):
        if not (said := folder / "mkdocs.txt").exists():
            command = [sys.executable, "-m", "mkdocs", "build", "--strict"]
            built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            said.write_text(built.stdout + built.stderr if built.returncode else "")
        return said.read_text()


@pytest.fixture(scope="session")
def site(warnings: str) -> Path:
    """The built site; that there was no warning is a test of its own."""
    assert not warnings or re.search(r"Aborted with \d+ warnings? in strict mode", warnings), warnings
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
