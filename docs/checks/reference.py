"""The list of everything on the first page of the API reference: `python docs/checks/reference.py`."""

import inspect
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))
from public import MODULES, Public, public  # noqa: E402 - which is beside the tests that use it

PAGE = ROOT / "docs" / "api" / "index.md"
BEGIN, END = "<!-- the list of everything: python docs/checks/reference.py -->", "<!-- its end -->"


def listed() -> str:
    """Each function and class by module with its first sentence, and the methods of classes."""
    return "\n\n".join(_of_module([*public(name)]) for name in MODULES)


def page() -> str:
    """The page with the list as it should be."""
    text = PAGE.read_text()
    return f"{text[: text.index(BEGIN)]}{BEGIN}\n\n{listed()}\n\n{text[text.index(END) :]}"


def _of_module(found: list[Public]) -> str:
    module, *rest = found
    lines = [f"## {module.name}", "", _first(module), ""]
    for it in rest:
        name = it.name.removeprefix(f"{module.name}.")
        if "." not in name:
            lines.append(f"- [`{name}`][{it.name}]: {_first(it)}")
            methods = [each for each in rest if each.name.startswith(f"{it.name}.")]
            links = [f"[`{each.name.rpartition('.')[2]}`][{_shown(each)}]" for each in methods]
            lines += [f"  Members: {', '.join(links)}."] if links else []
    return "\n".join(lines)


def _first(it: Public) -> str:
    """The first paragraph of a docstring, in one line."""
    return " ".join((inspect.getdoc(it.value) or "").partition("\n\n")[0].split())


def _shown(it: Public) -> str:
    """Where a method is described: what a class takes from Pretrained, there."""
    function = getattr(it.value, "__func__", it.value)
    last = it.name.rpartition(".")[2]
    inherited = getattr(function, "__module__", "") == "s4.pretrained"
    return f"s4.pretrained.Pretrained.{last}" if inherited else it.name


if __name__ == "__main__":
    PAGE.write_text(page())
