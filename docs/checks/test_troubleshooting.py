"""docs/troubleshooting.md has every message that s4 raises, and none that it does not.

On the page, a line that is nothing but a piece of code is a message, with `…` for what varies. In the code,
the message of an exception is the text that it is made with. A sentence that a backend returns, as its reason
not to run, counts as well.
"""

import ast
import builtins
import itertools
import re
from collections.abc import Iterator

import pytest
from pages import ROOT

PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()
FILES = sorted((ROOT / "s4").rglob("*.py"))


def told(page: str) -> list[str]:
    """The messages of the page."""
    return [code.strip() for _, code in re.findall(r"^(`{1,2})([^`].*[^`])\1$", page, re.MULTILINE)]


def texts(expression: ast.expr, known: dict[str, list[ast.expr]]) -> list[str]:
    """What an expression may say, `…` where it varies; of a variable that is set to texts alone, those."""
    match expression:
        case ast.Constant(value=str(text)):
            return [text]
        case ast.JoinedStr(values=parts):
            return list(map("".join, itertools.product(*(texts(part, known) for part in parts))))
        case ast.BinOp(op=ast.Add(), left=left, right=right):
            return list(map("".join, itertools.product(texts(left, known), texts(right, known))))
        case ast.IfExp(body=one, orelse=other):
            return texts(one, known) + texts(other, known)
        case ast.FormattedValue(value=ast.Name() | ast.IfExp() as value, format_spec=None, conversion=-1):
            return texts(value, known)
        case ast.Name(id=name) if name in known:
            others = {other: values for other, values in known.items() if other != name}
            found = [text for value in known[name] for text in texts(value, others)]
            return found if all(map(letters, found)) else ["…"]
    return ["…"]


def assigned(tree: ast.Module) -> dict[str, list[ast.expr]]:
    """What each variable of a file is set to."""
    found: dict[str, list[ast.expr]] = {}
    for node in ast.walk(tree):
        match node:
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                found.setdefault(name, []).append(value)
            case ast.AugAssign(target=ast.Name(id=name), value=value):
                found.setdefault(name, []).append(value)
    return found


def is_exception(name: str) -> bool:
    kind = getattr(builtins, name, None)
    return isinstance(kind, type) and issubclass(kind, Exception)


def raised(text: str) -> Iterator[str]:
    """The messages of all exceptions that a file of Python makes."""
    tree = ast.parse(text)
    known = assigned(tree)
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Name(id=name), args=[message, *_]) if is_exception(name):
                yield from texts(message, known)


def reasons(text: str) -> Iterator[str]:
    """The sentences that a file returns."""
    tree = ast.parse(text)
    known = assigned(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Return) and node.value is not None:
            values = node.value.values if isinstance(node.value, ast.BoolOp) else [node.value]
            yield from (said for value in values for said in texts(value, known) if said.count(" ") >= 2)


def letters(text: str) -> int:
    return len(re.sub(r"[^A-Za-z0-9]", "", text))


def is_told(message: str, page: list[str]) -> str | None:
    """The line of the page that a message is found by: with the most of its words, or 60 letters of them."""
    for line in page:
        pattern = ".*".join(map(re.escape, line.split("…")))
        enough = letters(line) >= min(60, 0.6 * letters(message))
        if enough and re.fullmatch(pattern, message, re.DOTALL):
            return line
    return None


def all_raised() -> dict[str, str]:
    """Every message of s4, and the file that it is of. What is a variable alone was made where it was set."""
    found: dict[str, str] = {}
    for path in FILES:
        text, file = path.read_text(), str(path.relative_to(ROOT))
        said = [*raised(text), *(reasons(text) if "backends" in path.parts else ())]
        found |= {message: file for message in said if letters(message)}
    return found


def test_every_message_of_the_library_has_an_entry() -> None:
    found, page = all_raised(), told(PAGE)
    assert len(found) > 200
    missing = [f"{file}: {message}" for message, file in found.items() if is_told(message, page) is None]
    assert not missing, "\n".join(missing)


def test_what_has_no_words_of_its_own_is_known() -> None:
    """Exceptions made of what a function returned: the reasons of backends, which are found there."""
    files = {file.relative_to(ROOT).as_posix() for file in FILES if "…" in raised(file.read_text())}
    assert files == {"s4/layer.py", "s4/backends/cpu/__init__.py"}


def test_every_entry_is_of_a_message() -> None:
    found, page = all_raised(), told(PAGE)
    used = {line for message in found for line in page if is_told(message, [line])}
    assert not [line for line in page if line not in used]
    assert len(set(page)) == len(page)


@pytest.mark.parametrize(
    ("code", "messages"),
    [
        ("raise ValueError(f'{name} must be so, got {value!r}')", ["… must be so, got …"]),
        ("raise TypeError('one ' f'two {x:g}' + ' three')", ["one two … three"]),
        ("def _made():\n    return ValueError('made elsewhere')", ["made elsewhere"]),
        ("what = f'{file} is odd'\nraise ValueError(what)", ["… is odd"]),
        ("a = 'no' if x else f'a {y}'\nraise KeyError(f'{a} key')", ["no key", "a … key"]),
    ],
)
def test_messages_are_read_from_the_code(code: str, messages: list[str]) -> None:
    assert list(raised(code)) == messages


def test_what_counts_as_told() -> None:
    message = "lengths must lie in 0..…, the length of the batch, got …"
    assert is_told(message, ["lengths must lie in 0..…, the length of the batch, got …"])
    assert is_told(message, ["… must lie in 0..…, the length of the batch, got …"])
    assert not is_told(message, ["… must …, got …"])  # nobody finds it by these words
    assert not is_told(message, ["lengths must lie in 0..…, the length of the row, got …"])
    assert not is_told(message, ["lengths must lie in 0..3, the length of the batch, got …"])
