"""What the API reference shows of a docstring: plain signatures, and links to what it names.

A jaxtyping annotation is shown as Tensor, as the docstring has its shape. A public name in backticks becomes
a link: in full, as `S4Layer.forward`, or alone where the same class or module has it.
"""

import re
from pathlib import Path
from typing import Any

import griffe

_DTYPES = {"Bool", "Complex", "Complex128", "Float", "Float64", "Int"}
_INHERITED = ("from_pretrained", "push_to_hub", "save_pretrained")  # shown where they are defined
_GOLDEN = Path(__file__).parents[2] / "tests" / "golden" / "api.txt"
NAMES = {re.split(r"[(:]", line)[0] for line in _GOLDEN.read_text().split("\n") if line}


class Shapes(griffe.Extension):
    """Both of it, for all that griffe finds."""

    def on_function(self, *, func: griffe.Function, **_: Any) -> None:
        """Float64[Tensor, "N N"] -> Tensor, in parameters and in what a function returns."""
        func.returns = _plain(func.returns)
        for parameter in func.parameters:
            parameter.annotation = _plain(parameter.annotation)

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """`S4Layer.forward` -> a link."""
        if obj.docstring is not None:
            code = re.split(r"^( *>>> .*)$", obj.docstring.value, flags=re.MULTILINE)
            code[::2] = [
                re.sub(r"`([\w.]+)(\(\))?`", lambda it: _linked(it[0], it[1], obj), each)
                for each in code[::2]
            ]
            obj.docstring.value = "".join(code)


def _plain(annotation: Any) -> Any:
    if isinstance(annotation, griffe.ExprSubscript):
        if str(annotation.left) in _DTYPES:
            return annotation.slice.elements[0]
        annotation.slice = _plain(annotation.slice)
    elif isinstance(annotation, griffe.ExprTuple):
        annotation.elements = [_plain(each) for each in annotation.elements]
    elif isinstance(annotation, griffe.ExprBinOp):
        annotation.left, annotation.right = _plain(annotation.left), _plain(annotation.right)
    return annotation


def _linked(code: str, name: str, obj: griffe.Object) -> str:
    found = public_name(name, obj.path)
    return code if found is None else f"[{code}][{found}]"


def public_name(name: str, path: str) -> str | None:
    """What a name means in the docstring of the object at a path, such as s4.layer.S4Layer.forward."""
    place = path.split(".")
    kinds = [part for part in place if part[0].isupper()][:1]
    around = [f"{each}.{kinds[0]}" for each in ("s4", ".".join(place[:2])) if kinds]
    own = (
        [".".join(place[:2])] if place[1:2] == ["convert"] else [".".join(place[:2]), "s4"]
    )  # `S4Block`: theirs
    for each in (name, *(f"{prefix}.{name}" for prefix in (*around, *own))):
        if each in NAMES and each.count(".") > 0:
            owner, _, last = each.rpartition(".")
            return f"s4.pretrained.Pretrained.{last}" if last in _INHERITED and owner in NAMES else each
    return None
