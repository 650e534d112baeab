"""The site in a Chromium without a window: where to find one, and a server for the built pages."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

from playwright.sync_api import Browser, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def executable() -> str:
    """The path of a Chromium or Chrome: `$S4_CHROMIUM`, or the first of `NAMES` on the path."""
    found = os.environ.get("S4_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        raise FileNotFoundError(
            f"the checks of the site need one of {', '.join(NAMES)} on the path, or its path in S4_CHROMIUM: "
            "apt-get install chromium on Debian, brew install --cask chromium on macOS"
        )
    return found


@contextmanager
def opened() -> Iterator[Browser]:
    """A browser. As root, Chromium runs only without its sandbox."""
    with sync_playwright() as playwright:
        sandbox = not hasattr(os, "geteuid") or os.geteuid() != 0
        browser = playwright.chromium.launch(executable_path=executable(), chromium_sandbox=sandbox)
        yield browser
        browser.close()


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address of a server on this machine that has the files of a folder."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(folder)))
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


def addresses(site: Path) -> list[str]:
    """The pages of a built site, as their addresses below its root: "", "start/", ..."""
    found = {file.parent.relative_to(site).as_posix() for file in site.rglob("index.html")}
    pages = [page for page in found if not page.startswith("repository/")]
    return sorted("" if page == "." else f"{page}/" for page in pages)
