"""The public names and signatures are those of tests/golden/api.txt: what users call keeps working.

`python tests/test_api.py` writes that file anew, after a change that is meant.
"""

from pathlib import Path

import pytest
from public import MODULES, public

GOLDEN = Path(__file__).parent / "golden" / "api.txt"
HOW = """
The public interface is no longer that of tests/golden/api.txt. If that is not meant, undo it. If it is:

1. Versions are semantic (https://semver.org). What is removed, or called in another way, breaks its users'
   code: that takes a new major version (before 1.0 a new minor one). A new name, or a new argument with a
   default, breaks nothing, and takes a new minor version.
2. Say in CHANGELOG.md, under Unreleased, what changed, and what a user has to do.
3. Run `python tests/test_api.py`, and commit tests/golden/api.txt with the change.
"""


def signatures(module: str) -> list[str]:
    return [it.signature for it in public(module)]


def golden() -> dict[str, list[str]]:
    """The lines of the file, by module."""
    paragraphs = GOLDEN.read_text().strip().split("\n\n")
    return {lines[0]: lines for lines in (each.split("\n") for each in paragraphs)}


def changes(was: list[str], now: list[str]) -> list[str]:
    """Lines of a message: what is gone or other than it was, and what is new."""
    before, after = ({line.split("(")[0].split(":")[0]: line for line in lines} for lines in (was, now))
    lines = [f"removed: {line}" for name, line in before.items() if name not in after]
    for name in before.keys() & after.keys():
        if before[name] != after[name]:
            lines += [f"changed: {before[name]}", f"     to: {after[name]}"]
    return lines + [f"new:     {line}" for name, line in after.items() if name not in before]


@pytest.mark.parametrize("module", MODULES)
def test_the_public_interface_is_as_it_was(module: str) -> None:
    now, was = signatures(module), golden().get(module, [])
    assert now == was, "\n".join([*changes(was, now), HOW])


def test_the_file_has_no_other_modules() -> None:
    assert [*golden()] == MODULES


def test_a_message_says_what_changed() -> None:
    was = ["s4", "s4.f(a: int) -> int", "s4.g() -> None", "s4.h: Tensor"]
    now = ["s4", "s4.f(a: int, b: int) -> int", "s4.h: Tensor", "s4.k() -> None"]
    assert changes(was, now) == [
        "removed: s4.g() -> None",
        "changed: s4.f(a: int) -> int",
        "     to: s4.f(a: int, b: int) -> int",
        "new:     s4.k() -> None",
    ]


if __name__ == "__main__":
    GOLDEN.write_text("\n\n".join("\n".join(signatures(module)) for module in MODULES) + "\n")
    print(f"{GOLDEN}: {sum(len(signatures(module)) for module in MODULES)} names")
