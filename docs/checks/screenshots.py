"""Pictures of the built site, to look at: after `make docs`, `python docs/checks/screenshots.py [PAGE ...]`.

Each page, or those named, goes to build/screenshots as NAME-1280.png, NAME-400.png and NAME-dark.png: a wide
screen, a phone, and a wide screen in the dark. Long pages go on below the screen.
"""

import sys

from browser import addresses, opened, served
from pages import ROOT

SITE, TARGET = ROOT / "build" / "site", ROOT / "build" / "screenshots"
SHOTS = {"1280": (1280, "light"), "400": (400, "light"), "dark": (1280, "dark")}


def main(names: list[str]) -> None:
    if not SITE.is_dir():
        raise FileNotFoundError(f"{SITE} is missing: make docs, or python -m mkdocs build")
    TARGET.mkdir(parents=True, exist_ok=True)
    with served(SITE) as address, opened() as browser:
        for kind, (width, scheme) in SHOTS.items():
            context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
            for page in addresses(SITE):
                name = page.strip("/").replace("/", "-") or "index"
                if names and name not in names:
                    continue
                opened_page = context.new_page()
                opened_page.goto(address + page, wait_until="networkidle")
                opened_page.screenshot(path=TARGET / f"{name}-{kind}.png", full_page=True)
                opened_page.close()


if __name__ == "__main__":
    main(sys.argv[1:])
