"""Which module of s4 may import which: one way only, no circle, no private name of another."""

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

import pytest

import s4

ROOT = Path(s4.__file__).parent
# Each may import what stands after it, and itself.
ORDER = [
    "s4.info", "s4.deploy", "s4.convert", "s4.transformers", "s4", "s4.model", "s4.generation", "s4.state",
    "s4.optim", "s4.block", "s4.layer", "s4.distributed",
    "s4.sequence", "s4.kernel", "s4.ops", "s4.powers", "s4.system", "s4.options", "s4.hippo",
]  # fmt: skip
# Which import nothing of s4 but each other.
SERVE_ALL = {"s4.checks", "s4.padding", "s4.precision", "s4.pretrained", "s4.sharded", "s4.version"}
LEAF = "s4.backends"  # of `ops` and `info`; imports nothing of the rest
OPTIONAL = {"triton", "pykeops", "keopscore", "cuda", "numpy", "scipy", "lightning", "matplotlib"}
HUB = {"huggingface_hub", "safetensors"}  # also of those who read and write files of models


@functools.cache
def sources() -> dict[str, str]:
    found = {}
    for file in sorted(ROOT.rglob("*.py")):
        parts = ("s4", *file.relative_to(ROOT).with_suffix("").parts)
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file.read_text()
    return found


@functools.cache
def modules() -> dict[str, ast.Module]:
    return {name: ast.parse(text) for name, text in sources().items()}


def names() -> set[str]:
    return set(modules())


def imports(tree: ast.AST) -> Iterator[tuple[str, list[str]]]:
    """Module and names, at any depth."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, []) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield node.module or "", [alias.name for alias in node.names]


def home(name: str) -> str:
    """The line of the order that a module belongs to."""
    lines = [*ORDER, *SERVE_ALL, LEAF]
    return max((line for line in lines if name == line or name.startswith(line + ".")), key=len)


EDGES = [
    (name, f"{module}.{each}" if f"{module}.{each}" in names() else module)
    for name, tree in modules().items()
    for module, found in imports(tree)
    if module.split(".")[0] == "s4"
    for each in (found or [""])
]


def test_every_module_has_its_place() -> None:
    assert {home(name) for name in names()} == {*ORDER, *SERVE_ALL, LEAF}
    assert home("s4.ops.scan") == "s4.ops"
    assert len(EDGES) > 50


@pytest.mark.parametrize("edge", sorted(set(EDGES)), ids=" -> ".join)
def test_imports_go_one_way(edge: tuple[str, str]) -> None:
    here, there = map(home, edge)
    if here == there or there in SERVE_ALL:
        return
    if here == LEAF or here in SERVE_ALL:
        raise AssertionError(f"{edge[0]} imports {edge[1]}")
    if there == LEAF:
        assert here in ("s4.ops", "s4.info")
        return
    assert ORDER.index(here) < ORDER.index(there)


def test_there_is_no_circle() -> None:
    """Of files: a module is loaded after all that it imports."""
    wanted = {name: {there for here, there in EDGES if here == name and there != name} for name in names()}
    for name in [n for n in wanted if any(m.startswith(n + ".") for m in wanted)]:  # the API lists
        wanted[name] -= {m for m in wanted if m.startswith(name + ".")} if name != "s4" else wanted[name]
    while wanted:
        ready = {name for name, needs in wanted.items() if not needs & wanted.keys() - {name}}
        assert ready, wanted
        wanted = {name: needs for name, needs in wanted.items() if name not in ready}


@pytest.mark.parametrize("name", sorted(names()))
def test_private_names_stay_private(name: str) -> None:
    tree = modules()[name]
    for module, found in imports(tree):
        if module.split(".")[0] == "s4" and module != name:
            private = [each for each in found if each.startswith("_") and each != "__version__"]
            assert not private, (name, module)
    aliases = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "s4"
        for alias in node.names
        if f"{node.module}.{alias.name}" in names()
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in aliases:
            assert not node.attr.startswith("_"), f"{name} uses {node.value.id}.{node.attr}"


@pytest.mark.parametrize("name", sorted(names()))
def test_optional_libraries_are_imported_where_they_are_needed(name: str) -> None:
    """Inside the function of a backend, so that s4 loads without them."""
    tree = modules()[name]
    if name in ("s4.backends.triton.kernels", "s4.transformers.installed"):  # which users import by name
        return
    for node in tree.body:
        for module, _ in imports(node) if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) else ():
            assert module.split(".")[0] not in OPTIONAL | HUB, (name, module)
    if not name.startswith(LEAF):
        files = name == "s4.pretrained" or name.startswith("s4.convert")
        forbidden = OPTIONAL if files else OPTIONAL | HUB
        assert not {module.split(".")[0] for module, _ in imports(tree)} & forbidden


def test_parameters_are_of_modules_and_questions_to_torch_of_dispatch() -> None:
    texts = {name: ast.unparse(tree) for name, tree in modules().items()}
    holders = {name for name, text in texts.items() if "nn.Parameter(" in text}
    assert holders <= {"s4.layer", "s4.block", "s4.model"}
    questions = (
        "is_compiling(", "is_exporting(", "is_grad_enabled(", "maybe_current_level(", "is_autocast_enabled(",
        "is_current_stream_capturing(", "_get_tracing_state(",
    )  # fmt: skip
    asking = {name for name, text in texts.items() if any(question in text for question in questions)}
    assert "s4.ops.dispatch" in asking
    # Others ask only whether numbers can be read now, or code be loaded.
    assert asking <= {"s4.ops.dispatch", "s4.checks", "s4.state", "s4.backends.cuda", "s4.backends.triton"}


def documented(node: ast.Module | ast.ClassDef | ast.FunctionDef) -> int:
    """Lines of its docstring."""
    first = node.body[0] if node.body else None
    if not (isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)):
        return 0
    return (first.end_lineno or 0) - first.lineno + 1


def test_files_and_functions_can_be_read_in_one_sitting() -> None:
    """Of code 360 lines: docstrings, which hold the reference and its examples, come on top."""
    for file in [f for kind in ("h", "cpp", "cu") for f in ROOT.rglob(f"*.{kind}")]:
        assert len(file.read_text().splitlines()) <= 400, file
    for name, tree in modules().items():
        nodes = [n for n in ast.walk(tree) if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef)]
        whole = len(sources()[name].splitlines())
        code = whole - sum(map(documented, nodes))
        assert code <= 360, f"{name}: {code} lines of code"
        assert whole <= 550, f"{name}: {whole} lines with docstrings"
        for node in nodes:
            if isinstance(node, ast.FunctionDef) and name != "s4.backends.triton.kernels":
                length = (node.end_lineno or 0) - node.lineno + 1 - documented(node)
                assert length <= 60, f"{name}.{node.name}: {length} lines"
