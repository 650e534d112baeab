"""Every public object says what it is, takes and returns; the examples in docstrings run, and are true."""

import ast
import doctest
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from public import MODULES, Public, public
from torch import nn

import s4

ROOT = Path(s4.__file__).parent
# What an example may use without an import: what a reader has who has read the first page.
KNOWN = {"s4": s4, "torch": torch, "nn": nn, **{name: getattr(s4, name) for name in s4.__all__}}
METHODS = {  # which have an example, beside the functions and classes themselves
    "S4Layer": ("forward", "step", "states", "kernel", "dense", "config"),
    "S4Block": ("forward", "step", "config"),
    "S4Model": ("forward", "step", "config", "generate", "stream"),
    "State": ("select", "reset", "detach", "clone", "to", "cat"),
    "Pretrained": ("save_pretrained", "from_pretrained"),
}


FILES = [file for file in sorted(ROOT.rglob("*.py")) if ">>>" in file.read_text()]


def examples(file: Path) -> Iterator[doctest.DocTest]:
    """Of every docstring in a file. doctest's own finder passes over functions that torch has decorated."""
    name = ".".join(file.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__")
    known = KNOWN | vars(importlib.import_module(name))
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            at = getattr(node, "name", name)
            text = ast.get_docstring(node, clean=False) or ""
            found = doctest.DocTestParser().get_doctest(text, dict(known), at, str(file), 0)
            if found.examples:
                yield found


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
@pytest.mark.usefixtures("unchecked")
def test_examples_are_true(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    for example in examples(file):
        runner.run(example)
    assert not runner.failures, "see the captured output"
    assert runner.tries == len(re.findall(r"^ *>>> ", file.read_text(), re.MULTILINE))


def text(it: Public) -> str:
    return inspect.getdoc(it.value) or ""


def section(it: Public, *titles: str) -> str:
    """What stands under one of these titles of a docstring."""
    found = re.search(rf"^(?:{'|'.join(titles)}):\n((?:    .*\n|\n)*)", text(it) + "\n", re.MULTILINE)
    return found[1] if found else ""


def said(it: Public) -> list[str]:
    """The arguments or fields that a docstring describes."""
    lines = re.findall(r"^    (\w+(?:, \w+)*): \S", section(it, "Args", "Attributes"), re.MULTILINE)
    return [name for line in lines for name in line.split(", ")]


@pytest.mark.parametrize("module", MODULES)
def test_docstrings_are_complete(module: str) -> None:
    wrong = []
    for it in public(module):
        first = text(it).partition("\n")[0]
        if not re.match(r"\S.*[.:]$", first) or (text(it) != first and "\n\n" not in text(it)):
            wrong.append(f"{it.name}: its first line must be a sentence of its own")
        if missing := [name for name in it.parameters if name not in said(it)]:
            wrong.append(f"{it.name}: Args must have {', '.join(missing)}")
        known = {*it.parameters, *it.attributes}
        if unknown := [name for name in said(it) if name not in known]:
            wrong.append(f"{it.name}: there is no {', '.join(unknown)}")
        returned = section(it, "Returns")
        if it.parameters and it.result != "None" and not returned:
            wrong.append(f"{it.name}: needs Returns")
        if ": " in returned.partition("\n")[0]:  # of which the site makes a type and what follows
            wrong.append(f"{it.name}: the first line of Returns must have no colon")
        if re.search(r"^    \w+: .*\. \w+Error: ", section(it, "Raises"), re.MULTILINE):
            wrong.append(f"{it.name}: Raises must have a line for each error")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("module", MODULES)
def test_what_users_call_has_an_example(module: str) -> None:
    needed = {it.name for it in public(module) if it.node and it.name.count(".") == module.count(".") + 1}
    for kind, methods in METHODS.items():
        needed |= {f"{module}.{kind}.{each}" for each in methods}
    needed -= {"s4.transformers.S4PreTrainedModel"}  # which is to inherit from
    lacking = [it.name for it in public(module) if it.name in needed and ">>>" not in text(it)]
    assert not lacking
