"""torch.export: one program for every batch and length, saved, loaded, and run where s4 is imported."""

import re

import pytest
import torch
from processes import lines, printed, process

from s4 import S4Layer


@pytest.mark.promise(
    "torch.export",
    "one program for every batch and length from 1, dimensions named or `Dim.AUTO`: layer, block, model and "
    "`step`, in every mode, with `lengths`, a chunk with a `State` in and out; saved and loaded",
)
@pytest.mark.parametrize("mode", ["fft", "scan", "auto"])
def test_one_program_serves_every_shape(mode: str) -> None:
    """With the numbers of eager mode, but for the order of float32 sums; named dimensions begin at 1.

    Dim.AUTO takes 2 for the least, and the program serves 1 all the same.
    """
    found = lines("exported.py", mode)
    assert len(found) == (8 if mode == "auto" else 3)
    for name, worst, ranges in found:
        assert worst < 2e-5, name
        assert re.fullmatch(
            r"VR\[1, int_oo\](, VR\[1, int_oo\])?|VR\[2, int_oo\], VR\[2, int_oo\]", ranges
        ), name
    assert any(ranges.startswith("VR[1") for _, _, ranges in found)


MAKE = """
import sys, torch
from torch.export import Dim
from s4 import S4Layer
torch.manual_seed(0)
layer = S4Layer(3, 8, mode="fft").eval()
u = torch.randn(2, 70, 3)
sizes = ({0: Dim("batch", min=1), 1: Dim("length", min=1)},)
torch.export.save(torch.export.export(layer, (u,), dynamic_shapes=sizes), sys.argv[1])
torch.save((u, layer(u).detach()), sys.argv[2])
"""
LOAD = """
import sys, torch
IMPORT
program = torch.export.load(sys.argv[1]).module()
u, want = torch.load(sys.argv[2])
torch.testing.assert_close(program(u), want, rtol=1e-4, atol=1e-4)
print("loaded")
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A saved program; inputs and outputs."""
    folder = tmp_path_factory.mktemp("program")
    found = str(folder / "layer.pt2"), str(folder / "values.pt")
    printed(process(MAKE, *found))
    return found


@pytest.mark.promise("torch.export", "a saved program runs in a process that imports s4 before it loads it")
def test_a_program_is_loaded_where_s4_is_imported(files: tuple[str, str]) -> None:
    assert printed(process(LOAD.replace("IMPORT", "import s4"), *files)) == "loaded"


@pytest.mark.promise(
    "torch.export",
    "a saved program in a process that does not import s4, whose operators it holds; `s4.deploy` makes one",
    supported=False,
)
def test_a_program_does_not_load_without_s4(files: tuple[str, str]) -> None:
    running = process(LOAD.replace("IMPORT", "assert 's4' not in sys.modules"), *files)
    out, err = running.communicate(timeout=300)
    assert running.returncode != 0
    assert "loaded" not in out
    assert re.search(
        r"s4(::|\.)(response|convolve)|Unknown operator|has no attribute 's4'|_OpNamespace", err
    ), err


def test_a_program_trains(unchecked: None) -> None:
    """Its gradients are the layer's."""
    layer = S4Layer(3, 8, mode="fft", dtype=torch.float64)
    u = torch.randn(2, 20, 3, dtype=torch.float64)
    program = torch.export.export(layer, (u,)).module()
    losses = [f(u).square().sum() for f in (program, layer)]
    grads = []
    for f, loss in zip((program, layer), losses, strict=True):
        names = [name for name, _ in f.named_parameters()]
        grads.append(dict(zip(names, torch.autograd.grad(loss, [*f.parameters()]), strict=True)))
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-9)
