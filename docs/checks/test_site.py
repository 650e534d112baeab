"""Every page in a browser: it fits a phone, formulas are drawn, search finds, links lead to known hosts."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from browser import addresses
from pages import PAGES
from playwright.sync_api import Page

# Where links of pages may lead. Whoever adds a host has looked that it is meant.
HOSTS = {
    "arxiv.org",
    "docs.pytorch.org",
    "github.com",
    "huggingface.co",
    "keepachangelog.com",
    "pytorch.org",
    "semver.org",
}

TOO_WIDE = """() => [document.documentElement.scrollWidth, ...[...document.querySelectorAll(".md-content *")]
    .filter((e) => e.getBoundingClientRect().right > innerWidth + 1 && !e.closest(".md-clipboard"))
    .filter((e) => { // what scrolls in a box of its own may be wider
        for (let box = e.parentElement; box; box = box.parentElement) {
            if (["auto", "scroll", "hidden"].includes(getComputedStyle(box).overflowX)) return false;
        }
        return true;
    }).map((e) => e.outerHTML.slice(0, 100))]"""


PICTURES = """async (all) => { // those further down load when they are near
    for (const picture of all) { picture.loading = "eager"; await picture.decode().catch(() => null); }
    return all.map((picture) => [picture.src, picture.naturalWidth, picture.alt]);
}"""


def test_every_page_fits_a_phone(site: Path, visit: Callable[..., Page]) -> None:
    """Nothing is wider than the screen but what scrolls in a box of its own; formulas and pictures show."""
    page = visit("", width=400)
    root, formulas, wrong = page.url, 0, {}
    for address in addresses(site):
        page.goto(root + address)
        assert page.locator("h1").first.is_visible(), address
        width, *elements = page.evaluate(TOO_WIDE)
        if width > 400 or elements:
            wrong[address] = width, elements[:3]
        sizes = page.eval_on_selector_all(
            "math", "all => all.map((m) => m.getBoundingClientRect()).map((b) => [b.width, b.height])"
        )
        assert all(width > 3 and height > 5 for width, height in sizes), address
        formulas += len(sizes)
        pictures = page.eval_on_selector_all(".md-content img", PICTURES)
        assert all(width and text for _, width, text in pictures), (address, pictures)
    assert not wrong
    assert formulas > 10


def test_no_formula_is_left_as_text(site: Path) -> None:
    for address in addresses(site):
        html = (site / address / "index.html").read_text()
        prose = re.sub(r"<(pre|code|script)\b.*?</\1>", "", html, flags=re.DOTALL)
        assert not re.search(r"\\[(\[]|\$\$|\\(frac|bar|sum|Delta)\b", prose), address


def test_nothing_is_left_to_fill_in(site: Path) -> None:
    """A script that writes tables or numbers into a page has names such as @SECONDS@ for them."""
    for address in addresses(site):
        html = (site / address / "index.html").read_text()
        assert not re.findall(r"@[A-Z_]+@|<p>[A-Z]+_[A-Z_]+</p>", html), address


def test_search_finds(visit: Callable[..., Page]) -> None:
    page = visit("")
    page.keyboard.press("/")
    page.keyboard.type("state remembers")
    page.locator(".md-search-result__link").filter(has_text="What a state remembers").first.click()
    page.wait_for_url(re.compile(r"/memory/\?h="))


def test_a_phone_has_the_menu(visit: Callable[..., Page]) -> None:
    page = visit("", width=400)
    page.locator("header label[for=__drawer]").click()
    page.get_by_role("link", name="Start in five minutes").first.wait_for()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_known_hosts(page: Path) -> None:
    text = re.sub(r"```.*?```|`[^`]*`", "", page.read_text(), flags=re.DOTALL)
    assert set(re.findall(r"https?://([^/\s)>\"]+)", text)) <= HOSTS
