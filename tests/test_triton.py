"""The Triton backend without a GPU: interpreted in a process of its own, and compiled for GPUs elsewhere."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from packaging.version import Version

from s4.backends import triton as backend


def test_without_triton_the_reason_tells_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    assert "pip install 's4-pytorch[triton]'" in str(backend.status(torch.device("cuda")))


def test_without_a_gpu_the_reason_is_one() -> None:
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert "GPU" in str(backend.status(torch.device("cuda")))


def test_importing_the_library_imports_no_kernels() -> None:
    code = "import sys, s4, s4.kernel; s4.S4Layer(2); sys.exit('s4.backends.triton.kernels' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_sums_as_interpreted() -> None:
    triton = pytest.importorskip("triton")
    if Version(triton.__version__) < Version("3.7") and Version(np.__version__) >= Version("2.4"):
        pytest.skip("Triton before 3.7 does not interpret with numpy 2.4 or newer")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "triton_interpreted.py"],
        cwd=Path(__file__).parent,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr


class Code(NamedTuple):
    """Machine code: how many instructions, and which of them move registers to and from memory."""

    instructions: int
    spills: int
    spills_in_loops: int  # stores alone: what a loop changes and cannot hold


def disassembled(listing: str) -> Code:
    """From what cuobjdump -sass prints, where a branch backwards is a loop."""
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/ +(?:@!?U?P\w+ +)?([A-Z]\w*)(.*?);", listing)
    code = [(int(address, 16), name, rest) for address, name, rest in lines]
    loops = []
    for address, name, rest in code:
        target = re.search(r"0x([0-9a-f]+)\W*$", rest)
        if name == "BRA" and target and int(target[1], 16) < address:
            loops.append(range(int(target[1], 16), address))
    stores = [address for address, name, _ in code if name == "STL"]
    loads = [address for address, name, _ in code if name == "LDL"]
    return Code(len(code), len(stores) + len(loads), sum(any(at in loop for loop in loops) for at in stores))


def compiled(
    capability: int,
    rows: int,
    complex_dtype: torch.dtype,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    **options: int,
) -> dict[str, Code]:
    """Every kernel with the tiles that the backend takes for so many rows, by the assembler of Triton."""
    triton = pytest.importorskip("triton")
    if triton.knobs.runtime.interpret:
        pytest.skip("TRITON_INTERPRET is set, nothing is compiled")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from s4.backends.triton import kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(folder))
    number = "*fp32" if complex_dtype == torch.complex64 else "*fp64"
    found = {}

    def compile_instead(name: str, programs: int, tensors: list, sizes: list, **tiles: int) -> None:
        function = getattr(kernels, name)
        constants = {**tiles, "BLOCK": backend._BLOCK}
        kinds = [*(len(tensors) * [number]), *(len(sizes) * ["i32"]), *(len(constants) * ["constexpr"])]
        source = ASTSource(
            function,
            dict(zip(function.arg_names, kinds, strict=True)),
            constants,
            {(i,): [["tt.divisibility", 16]] for i in range(len(tensors))},
        )
        kernel = triton.compile(
            source,
            target=GPUTarget("cuda", capability, 32),
            options={"num_warps": backend._WARPS, "enable_fp_fusion": True, **options},
        )
        cubin = folder / f"{name}.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        tool = [triton.knobs.nvidia.cuobjdump.path, "-sass", str(cubin)]
        listing = subprocess.run(tool, capture_output=True, text=True, check=True).stdout
        found[name] = disassembled(listing)

    monkeypatch.setattr(backend, "_launch", compile_instead)
    v, w = torch.ones(1, rows, 3, dtype=complex_dtype), torch.ones(1, 3, dtype=complex_dtype)
    grad = backend.cauchy(v, w, w)
    backend.cauchy_backward(grad, v, w, w, True)
    assert len(found) == 3
    assert all(code.instructions > 100 for code in found.values())
    return found


@pytest.mark.parametrize(
    ("capability", "rows", "complex_dtype"),
    [
        *((90, rows, dtype) for rows in (1, 2, 4, 8) for dtype in (torch.complex64, torch.complex128)),
        *((capability, 4, torch.complex128) for capability in (80, 100)),  # which needs more registers
    ],
    ids=str,
)
def test_every_kernel_keeps_its_sums_in_registers(
    capability: int,
    rows: int,
    complex_dtype: torch.dtype,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No loop stores what it sums up. An address may wait in memory where the loop only reads it."""
    for name, code in compiled(capability, rows, complex_dtype, tmp_path, monkeypatch).items():
        assert code.spills_in_loops == 0, f"{name} spills what it sums up: {code}"
        assert code.spills <= code.instructions / 50, f"{name} spills: {code}"


def test_too_few_registers_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same kernels, where each thread may have no more than 32."""
    for name, code in compiled(90, 4, torch.complex128, tmp_path, monkeypatch, maxnreg=32).items():
        assert code.spills_in_loops > 0, f"{name}: {code}"
        assert code.spills > code.instructions / 50, f"{name}: {code}"
