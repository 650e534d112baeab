"""docs/tools.md from the tests' own marks: `python tests/promises.py` writes it.

A line of it is a test's `@pytest.mark.promise("tool", "what is promised")`; with `supported=False`
what is not supported, in a test that it is refused. Marks are read from the source, no library needed.
"""

import ast
from pathlib import Path
from typing import NamedTuple

TESTS = Path(__file__).parent
DOCUMENT = TESTS.parent / "docs" / "tools.md"
# The order of the tools in the document; a mark of another is an error.
TOOLS = (
    "torch.compile",
    "torch.export",
    "s4.deploy",
    "half precision",
    "torch.func and forward mode",
    "devices without float64",
    "sharding and distributed training",
    "torch.nn",
    "other libraries",
)
HEAD = """# What works with which tool

Each line is held by the tests named beside it, which run in CI with the libraries of the extra `test`. This
page is made from those tests, by `python tests/promises.py`.
"""


class Promise(NamedTuple):
    """One line: the tool, what is promised or refused of it, and the test, as file::function."""

    tool: str
    what: str
    supported: bool
    test: str


def promises() -> list[Promise]:
    """The marks of all test files, in their order."""
    found = []
    for file in sorted(TESTS.glob("test_*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            for mark in node.decorator_list if isinstance(node, ast.FunctionDef) else ():
                called = ast.unparse(mark.func) if isinstance(mark, ast.Call) else ""
                if not isinstance(mark, ast.Call) or "promise" not in called:
                    continue
                if called != "pytest.mark.promise":
                    raise ValueError(f"{file.name}: write @pytest.mark.promise(...), got @{called}(...)")
                tool, what = map(ast.literal_eval, mark.args)
                options = {k.arg: ast.literal_eval(k.value) for k in mark.keywords}
                supported = options.get("supported", True)
                found.append(Promise(tool, what, supported, f"{file.name}::{node.name}"))
    return found


def document() -> str:
    """The page, as it has to be."""
    found = promises()
    if odd := sorted({promise.tool for promise in found} - set(TOOLS)):
        raise ValueError(f"tools must be of {TOOLS}, got {odd}")
    parts = [HEAD]
    for tool in TOOLS:
        for supported, title in ((True, "promised"), (False, "not supported")):
            lines = [p for p in found if (p.tool, p.supported) == (tool, supported)]
            tests: dict[str, list[str]] = {}
            for promise in lines:
                tests.setdefault(promise.what, []).append(f"`{promise.test}`")
            if tests:
                heading = f"## {tool}\n\n" if supported else ""
                rows = [f"| {what} | {', '.join(by)} |" for what, by in tests.items()]
                parts.append(f"{heading}| {title} | tested by |\n|---|---|\n" + "\n".join(rows) + "\n")
    return "\n".join(parts)


if __name__ == "__main__":
    DOCUMENT.parent.mkdir(exist_ok=True)
    DOCUMENT.write_text(document())
